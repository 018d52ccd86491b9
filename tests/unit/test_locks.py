"""A Ray that anybody could use is not served on."""

import pytest

from serve_apps.locks import require_locked
from stack.errors import Unauthorized

LOCKED = {"RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.10", "172.16.3.4", "192.168.1.9", "fd00::1", "::1", "node-1"])
def test_a_locked_ray_inside_is_taken(address: str) -> None:
    require_locked(LOCKED, [address, "10.0.0.11"], ["127.0.0.1"])


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": ""}])
def test_a_ray_without_a_token_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(Unauthorized, match="RAY_AUTH_MODE") as refused:
        require_locked(environment, ["10.0.0.10"], ["127.0.0.1"])
    assert "set it to token" in refused.value.message


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "1.1.1.1"])
def test_a_ray_in_the_internet_is_refused(address: str) -> None:
    with pytest.raises(Unauthorized, match="addresses of the internet") as refused:
        require_locked(LOCKED, ["10.0.0.10", address], [])
    assert address in refused.value.message
    assert "10.0.0.10" not in refused.value.message


@pytest.mark.parametrize("address", ["8.8.8.8", "198.41.0.4", "2001:4860:4860::8888"])
def test_a_node_that_has_an_address_of_the_internet_besides_is_refused(address: str) -> None:
    with pytest.raises(Unauthorized, match="firewalled: true") as refused:
        require_locked(LOCKED, ["10.0.0.10"], [], ["127.0.0.1", "10.0.0.10", address])
    assert f"({address})" in refused.value.message
    require_locked(LOCKED, ["10.0.0.10"], [], ["127.0.0.1", "10.0.0.10", address], firewalled=True)


def test_a_firewall_takes_no_node_that_is_known_by_an_address_of_the_internet() -> None:
    with pytest.raises(Unauthorized, match="--node-ip-address"):
        require_locked(LOCKED, ["8.8.8.8"], [], ["8.8.8.8"], firewalled=True)


@pytest.mark.parametrize("address", ["100.64.3.4", "169.254.1.2", "fe80::1%eth0", "fd00::1", "127.0.0.1", "::1"])
def test_addresses_that_the_internet_does_not_reach_are_taken_everywhere(address: str) -> None:
    require_locked(LOCKED, [address], [], [address])


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.10", "8.8.8.8"])
def test_a_dashboard_that_others_reach_is_refused(address: str) -> None:
    with pytest.raises(Unauthorized, match="start the head with") as refused:
        require_locked(LOCKED, ["10.0.0.10"], ["127.0.0.1", address])
    assert f"({address})" in refused.value.message


def test_on_kubernetes_the_operator_reaches_the_dashboard() -> None:
    require_locked(LOCKED | {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, ["10.0.0.10"], ["10.0.0.10"])

"""When a gateway asks for keys, and what of its node it looks at."""

import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

from stack import keys
from stack.config import Config
from stack.errors import Unauthorized
from stack.store import Store

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray Serve's own use of pydantic
    from serve_apps import address, gateway

CONFIG = Config.parse({"models": [{"id": "small", "path": "models/small"}]}, "the tests' config")
FIREWALLED = CONFIG.model_copy(update={"firewalled": True})
NODES = ["10.0.0.10", "10.0.0.11"]
PUBLIC = "198.41.0.4"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/stack.db")


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that asks for its token, whose nodes have an address of the internet besides."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(gateway, "dashboard_hosts", lambda: ["127.0.0.1"])
    monkeypatch.setattr(gateway, "interfaces", lambda: {"127.0.0.1", *NODES, PUBLIC})


def listen(monkeypatch: pytest.MonkeyPatch, host: str | None) -> None:
    monkeypatch.setattr(gateway, "listening_host", lambda: host)


def test_of_several_nodes_one_that_cannot_ask_where_it_listens_needs_keys(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(monkeypatch, None)
    gateway.require_closed(CONFIG, store, NODES[:1])
    with pytest.raises(Unauthorized, match="there are no API keys"):
        gateway.require_closed(FIREWALLED, store, NODES)
    keys.create(store, "acme", "n", ["data"])
    gateway.require_closed(FIREWALLED, store, NODES)


@pytest.mark.parametrize(("host", "nodes"), [(None, NODES), ("0.0.0.0", NODES[:1])])
def test_an_address_of_the_internet_is_refused_unless_the_config_says_that_there_is_a_firewall(
    store: Store, monkeypatch: pytest.MonkeyPatch, host: str | None, nodes: list[str]
) -> None:
    keys.create(store, "acme", "n", ["data"])
    listen(monkeypatch, host)
    with pytest.raises(Unauthorized, match=PUBLIC):
        gateway.require_closed(CONFIG, store, nodes)
    gateway.require_closed(FIREWALLED, store, nodes)


def test_a_gateway_of_one_machine_alone_may_have_any_addresses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    listen(monkeypatch, "127.0.0.1")
    gateway.require_closed(CONFIG, store, ["10.0.0.10"])


def test_all_interfaces_are_looked_at_but_for_a_ray_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(family: int, value: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=value)

    found = {
        "lo": [one(socket.AF_INET, "127.0.0.1"), one(socket.AF_INET, PUBLIC)],
        "eth0": [one(socket.AF_INET, "10.0.0.10"), one(socket.AF_INET6, "fd00::1"), one(psutil.AF_LINK, "0a:00")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.10")
    assert address.addresses_here() == ["127.0.0.1", PUBLIC, "10.0.0.10", "fd00::1"]
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    assert address.addresses_here() == ["127.0.0.1"]

"""When a gateway asks for keys, and what of nodes is looked at: of its own as it starts, of others as they join."""

import socket
import warnings
from collections.abc import Sequence
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
    from serve_apps.node_locks import AGAIN_S, NodeLocks

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
    gateway.require_closed(FIREWALLED, store, NODES[:1])
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
    monkeypatch.delenv("RAY_AUTH_MODE")
    gateway.require_closed(CONFIG, store, ["127.0.0.1"])


@pytest.mark.parametrize("node", [NODES[0], "127.0.1.1"])
def test_a_ray_that_listens_beyond_loopback_is_locked_though_its_gateway_does_not(
    store: Store, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    listen(monkeypatch, "127.0.0.1")
    with pytest.raises(Unauthorized, match=PUBLIC):
        gateway.require_closed(CONFIG, store, [node])
    gateway.require_closed(FIREWALLED, store, [node])
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(Unauthorized, match="asks nobody for a token"):
        gateway.require_closed(FIREWALLED, store, [node])


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


class Nodes:
    """Living nodes, and what interfaces each of them has; one that is `silent` does not answer. `now` is the clock."""

    def __init__(self) -> None:
        self.living = {"head": NODES[0]}
        self.interfaces = {"head": [NODES[0]], "gpu": [NODES[1]]}
        self.silent: set[str] = set()
        self.asked: list[list[str]] = []
        self.now = 0.0

    def ask(self, nodes: Sequence[str]) -> dict[str, list[str]]:
        self.asked.append(list(nodes))
        return {node: self.interfaces[node] for node in nodes if node not in self.silent}

    def looking(self, firewalled: bool = False) -> NodeLocks:
        return NodeLocks(firewalled, self.ask, lambda: self.now)


ONE_IS_OPEN = (
    "Ray is not locked on 1 of its nodes, which the log of the job supervisor names; see docs/clusters.md, "
    "`Ray is locked`"
)


def test_a_node_that_joins_with_an_address_of_the_internet_is_told_until_it_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = Nodes()
    locks = nodes.looking()
    assert locks.look(nodes.living) is None
    nodes.living["gpu"] = NODES[1]
    nodes.interfaces["gpu"].append(PUBLIC)
    with caplog.at_level("WARNING", "ray.serve"):
        assert locks.look(nodes.living) == ONE_IS_OPEN, "and no address: everybody may read it"
    assert locks.look(nodes.living) == ONE_IS_OPEN
    (told,) = caplog.messages
    assert told.startswith(f"Ray is not locked on the node gpu at {NODES[1]}: ")
    assert PUBLIC in told
    del nodes.living["gpu"]
    assert locks.look(nodes.living) is None
    assert nodes.asked == [["head"], ["gpu"]], "each of them once"


def test_a_node_that_does_not_answer_is_asked_again_and_others_are_looked_at() -> None:
    nodes = Nodes()
    nodes.living["gpu"] = NODES[1]
    nodes.silent.add("head")
    nodes.interfaces["gpu"].append(PUBLIC)
    locks = nodes.looking()
    assert locks.look(nodes.living) == ONE_IS_OPEN
    nodes.silent.clear()
    locks.look(nodes.living)
    assert nodes.asked == [["head", "gpu"], ["head"]]


def test_a_node_that_was_locked_later_is_found_so_at_the_next_look() -> None:
    nodes = Nodes()
    nodes.interfaces["head"].append(PUBLIC)
    locks = nodes.looking()
    assert locks.look(nodes.living) == ONE_IS_OPEN
    nodes.interfaces["head"].remove(PUBLIC)
    nodes.now += AGAIN_S
    assert locks.look(nodes.living) is None


def test_nodes_behind_a_firewall_are_not_asked_but_known_by_inner_addresses() -> None:
    nodes = Nodes()
    assert nodes.looking(firewalled=True).look(nodes.living) is None
    assert nodes.looking(firewalled=True).look(nodes.living | {"gpu": PUBLIC}) == ONE_IS_OPEN
    assert nodes.asked == []


def test_a_ray_on_loopback_is_not_asked() -> None:
    nodes = Nodes()
    assert nodes.looking().look({"head": "127.0.0.1"}) is None
    assert nodes.asked == []

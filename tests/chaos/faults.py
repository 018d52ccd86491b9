"""What is done to a cluster that serves: parts of it are killed, changed and taken away."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos.cluster import AWAY_S, LANGUAGE_MODEL, Cluster
from tests.running_stack import wait_for

GATEWAY = "ServeReplica:gateway:Gateway"
RAYLET = "src/ray/raylet/raylet"
# How long a head is away: as long as whoever looks after it (systemd, Kubernetes) takes to start it again.
HEAD_AWAY_S = 10.0
# What a node that is drained may take: more than the longest stream.
DRAIN_S = 180
DEPLOYED_S = 300


@dataclass(frozen=True)
class Fault:
    """`strike` does it and returns what it was done to; after `away_s`, `repair` brings that back.

    Of one that is `planned`, no request fails.
    """

    name: str
    what: str
    strike: Callable[[Cluster, random.Random], str]
    repair: Callable[[Cluster, str], None] | None = None
    away_s: float = AWAY_S
    planned: bool = False


def kill_gateway(cluster: Cluster, draw: random.Random) -> str:
    found = sorted(name for name, host in cluster.hosts.items() if host.processes(GATEWAY))
    name = draw.choice(found)
    assert cluster.kill(cluster.hosts[name], GATEWAY)
    return name


def kill_raylet(cluster: Cluster, draw: random.Random) -> str:
    name = _a_worker(cluster, draw)
    assert cluster.kill(cluster.hosts[name], RAYLET) == 1
    return name


def lose_worker(cluster: Cluster, draw: random.Random) -> str:
    name = _a_worker(cluster, draw)
    cluster.hosts[name].lose_power()
    return name


def lose_head(cluster: Cluster, _: random.Random) -> str:
    cluster.hosts["head"].lose_power()
    return "head"


def update_model(cluster: Cluster, draw: random.Random) -> str:
    """Another rate of the language model's answers: its replicas are replaced."""
    rate = draw.randint(51, 60)
    _application(cluster, LANGUAGE_MODEL)["args"]["tokens_per_second"] = rate
    cluster.deploy()
    wait_until_deployed(cluster)
    return f"tokens_per_second: {rate}"


def update_gateway(cluster: Cluster, draw: random.Random) -> str:
    """Another bound of the gateway: it is replaced, with the writer of banks, the pool of sessions, the supervisor."""
    most = draw.randint(1_001, 1_999)
    _application(cluster, "gateway")["args"]["max_requests"] = most
    cluster.deploy()
    wait_until_deployed(cluster)
    return f"max_requests: {most}"


def drain(cluster: Cluster, draw: random.Random) -> str:
    """Returns when the node says that nothing is left on it."""
    name = _a_worker(cluster, draw)
    cluster.run(name, f"python -m scripts.drain_node --seconds {DRAIN_S}")
    return name


def _a_worker(cluster: Cluster, draw: random.Random) -> str:
    """One on which there is a gateway."""
    return draw.choice(sorted(host.name for host in cluster.workers if host.processes(GATEWAY)))


def _application(cluster: Cluster, name: str) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = (one for one in cluster.document["applications"] if one["name"] == name)
    return found


def wait_until_deployed(cluster: Cluster) -> None:
    wait_for(cluster.is_deployed, DEPLOYED_S)


FAULTS = (
    Fault("gateway", "a gateway is killed", kill_gateway),
    Fault(
        "raylet",
        f"a worker's raylet is killed, and Ray started there again after {AWAY_S:.0f} s",
        kill_raylet,
        Cluster.start_ray,
    ),
    Fault("worker", f"a worker loses its power for {AWAY_S:.0f} s", lose_worker, Cluster.switch_on),
    Fault(
        "head",
        f"the head loses its power for {HEAD_AWAY_S:.0f} s, and Redis with it",
        lose_head,
        Cluster.switch_on,
        HEAD_AWAY_S,
    ),
    Fault("model", "a model's setting is changed: rolling update", update_model, planned=True),
    Fault("update", "a setting of the gateway is changed: rolling update", update_gateway, planned=True),
    Fault("drain", "a worker is drained, ended, and started again", drain, Cluster.start_ray, 0.0, planned=True),
)

"""What is done to a cluster that serves: parts of it are killed, changed and taken away."""

import random
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from scripts.local_stack import ROOT
from tests.chaos.clients import read_stream
from tests.chaos.cluster import AWAY_S, LANGUAGE_MODEL, REQUEST_S, Cluster
from tests.running_stack import wait_for

GATEWAY = "ServeReplica:gateway:Gateway"
RAYLET = "src/ray/raylet/raylet"
# How long a head is away: as long as whoever looks after it (systemd, Kubernetes) takes to start it again.
HEAD_AWAY_S = 10.0
# What a node that is drained may take: more than the longest stream.
DRAIN_S = 180
# A rolling update of two replicas took 330 s on two cores that were busy with it all the time.
DEPLOYED_S = 600
# Of the longest stream that a model may have, at a token a second, with some seconds to begin in.
LONGEST_TOKENS = int(REQUEST_S) - 8
TITLE = 'title="Llama Stack on Ray"'


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


def update_code(cluster: Cluster, draw: random.Random) -> str:
    """Other code, in a folder of its own, for all that is served: all gateways answer by it at the end."""
    folder = cluster.folder / f"code-{draw.randrange(10**6)}"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__"))
    file = folder / "serve_apps" / "gateway.py"
    code = file.read_text()
    assert code.count(TITLE) == 1
    file.write_text(code.replace(TITLE, f'title="{folder.name}"'))
    for application in cluster.document["applications"]:
        application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(folder)}}
    cluster.deploy()
    wait_until_deployed(cluster)
    gateways = [cluster.url(host) for host in cluster.workers if host.processes(GATEWAY)]
    titles = {url: httpx.get(f"{url}/openapi.json", timeout=30).json()["info"]["title"] for url in gateways}
    assert titles
    assert set(titles.values()) == {folder.name}, titles
    return folder.name


def drain(cluster: Cluster, draw: random.Random) -> str:
    """Returns when the node says that nothing is left on it. The longest stream that there may be has begun there
    before, and comes to its end."""
    name = _a_worker(cluster, draw)
    begun = threading.Event()
    with cluster.client(cluster.url(cluster.hosts[name])) as http, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read_stream, http, LANGUAGE_MODEL, "fault:slow", LONGEST_TOKENS, begun.set)
        try:
            wait_for(lambda: begun.is_set() or stream.done(), REQUEST_S)
            cluster.run(name, f"python -m scripts.drain_node --seconds {DRAIN_S}")
        finally:
            stream.result()
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
    Fault("code", "other code is served: rolling update", update_code, planned=True),
    Fault(
        "drain",
        f"a worker with a stream of {LONGEST_TOKENS} s is drained, ended, and started again",
        drain,
        Cluster.start_anew,
        0.0,
        planned=True,
    ),
)

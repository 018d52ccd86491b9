"""What a fleet costs as it grows: the same load for each gateway, on stacks of 1, 2 and 3 nodes.

    scripts/bench fleet [--nodes N …] [--requests N] [--json FILE]

docs/sizing.md takes it that the work of a token and of a request stays the same however many gateways there are, and
that of Ray and Serve at rest the same for each node. This starts stacks on Rays of so many nodes one after the other,
all nodes on this machine, with a gateway, a proxy and a replica of a scripted model on each, and looks at the CPU
seconds of their processes. The speed is no measure: all nodes share the cores of this machine, so the load is one that
they can bear.

rest    nobody asks, for 15 seconds: cores that the controller, the GCS, raylets and agents take
tokens  of each gateway 8 streams of answers of 128 tokens, 50 a second: CPU of 1,000 tokens
short   … of answers of 16 tokens, so that requests weigh more: CPU of a request

What a process takes at rest is taken off what it takes for tokens and requests. The rows are in PostgreSQL, the files
in an S3 server, as several nodes need; neither is counted, nor is the load generator. Replicas have the scripted engine
in them. The exit status is 1 if a target is missed. It needs PostgreSQL and a C compiler, as the tests do.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from scripts import local_stack
from scripts.bench_servers import (
    BenchFailed,
    command_of,
    free_port,
    local_model,
    prepared_home,
    processes_of,
    spent,
    stack_document,
)
from scripts.bench_trainings import say
from scripts.figures import Comparison, write_comparisons, write_json
from scripts.load_generator import Found, LoadGenerator, NoLoad
from stack.config import GATEWAY
from tests import postgres, s3
from tests.stack_on_nodes import cluster, environment

MODEL = "scripted"
NODES = (1, 2, 3)
STREAMS, TOKENS, REQUESTS = 8, 128, 6  # of each gateway
SHORT_TOKENS, SHORT_REQUESTS = 16, 24
WARM_REQUESTS, WARM_TOKENS = 3, 8
REST_S, SETTLE_S, START_S, LOOK_S = 15.0, 5.0, 240.0, 0.5
# By how much the work of a token or a request may grow from the smallest fleet to the largest; two runs differ by 0.1.
MOST = 1.25
GATEWAYS, PROXIES, REPLICAS = "gateways", "proxies", "replicas"
CONTROLLER, GCS, RAYLETS, AGENTS = "controller", "GCS", "raylets", "Ray's agents of nodes"
# Ray's dashboard and monitors are on the head; so is here, for all nodes, the one that reads the logs of a machine.
DASHBOARD, OTHERS = "dashboard and monitors", "others"
SERVING = (GATEWAYS, PROXIES, REPLICAS)
PARTS = (*SERVING, CONTROLLER, GCS, RAYLETS, AGENTS, DASHBOARD, OTHERS)
# What the command line of a process, or its title where it has set one, tells of its part; the first that fits: a
# raylet's has those of its agents in it.
_WORDS = (
    ("ServeReplica:gateway:Gateway", GATEWAYS),
    (f"ServeReplica:{MODEL}:", REPLICAS),
    ("ProxyActor", PROXIES),
    ("ServeController", CONTROLLER),
    ("/gcs/gcs_server", GCS),
    ("/raylet/raylet ", RAYLETS),
    ("DashboardAgent", AGENTS),
    ("dashboard/agent.py", AGENTS),
    ("RuntimeEnvAgent", AGENTS),
    ("runtime_env/agent", AGENTS),
    ("dashboard", DASHBOARD),
    ("monitor.py", DASHBOARD),
)
Look = dict[tuple[int, float], tuple[str, float]]


@dataclass(frozen=True)
class Fleet:
    """A stack that runs on so many nodes, with a gateway on each."""

    nodes: int
    url: str
    home: Path

    def look(self) -> Look:
        """The part of each of its processes, and the CPU seconds that it has taken so far."""
        taken: Look = {}
        for process in processes_of(self.home):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                times = process.cpu_times()
                taken[process.pid, process.create_time()] = (
                    part_of(command_of(process)),
                    times.user + times.system,
                )
        return taken


@dataclass(frozen=True)
class Load:
    """What was found under a load: CPU seconds are those of all processes of a part, without what they take at rest."""

    streams: int
    requests: int
    tokens: int
    seconds: float
    first_ms_p50: float
    first_ms_p99: float
    cpu_s: dict[str, float]
    cpu_s_with_rest: float
    busiest_gateway: float  # its share of what the gateways took
    generator_cpu_s: float

    @property
    def per_1000_tokens(self) -> dict[str, float]:
        return {part: 1_000 * seconds / self.tokens for part, seconds in self.cpu_s.items()}

    @property
    def ms_per_request(self) -> dict[str, float]:
        return {part: 1_000 * seconds / self.requests for part, seconds in self.cpu_s.items()}


@dataclass(frozen=True)
class Measured:
    """Of a fleet: `rest` are cores that each part takes at rest, `processes` how many there are of it."""

    nodes: int
    started_s: float
    rest: dict[str, float]
    processes: dict[str, int]
    tokens: Load
    short: Load


def main() -> int:
    arguments = _arguments()
    all_measured: list[Measured] = []
    try:
        with LoadGenerator.compiled() as generator, tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
            for nodes in arguments.nodes:
                say(f"starting {nodes} node{'s' * (nodes > 1)}")
                start = time.monotonic()
                with running(Path(folder) / f"{nodes}-nodes", nodes) as fleet:
                    all_measured.append(measured(fleet, generator, arguments.requests, time.monotonic() - start))
    except (BenchFailed, NoLoad, local_stack.StartFailed, OSError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows = comparisons(all_measured[0], all_measured[-1]) if len(all_measured) > 1 else []
    print(table(all_measured), end="\n\n")
    print(write_comparisons(rows, f"{arguments.nodes[0]} nodes", f"{arguments.nodes[-1]} nodes"))
    if arguments.json is not None:
        write_json(arguments.json, rows, bench="fleet", measured=[asdict(one) for one in all_measured])
    return 0 if all(one.met for one in rows) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nodes", nargs="+", type=_positive, default=NODES, metavar="N", help="so many, one after the other (1 2 3)"
    )
    parser.add_argument(
        "--requests", type=_positive, default=REQUESTS, metavar="N", help=f"of each long stream ({REQUESTS})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 100, not {text!r}")
    return int(text)


# The stacks


@contextmanager
def running(folder: Path, nodes: int) -> Iterator[Fleet]:
    """A stack on so many nodes of this machine for this block, once all its gateways answer."""
    with ExitStack() as held:
        storage = held.enter_context(s3.server())
        database = held.enter_context(held.enter_context(postgres.server()).database())
        held.enter_context(environment(s3.variables(storage.address)))
        fleet = Fleet(nodes, f"http://127.0.0.1:{(port := free_port())}", prepared_home(folder))
        made = document(nodes, port, database, storage.bucket())
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(made))
        # Ray's workers would give way to whatever else runs, and others would not.
        address = held.enter_context(cluster(fleet.home, nodes, STACK_CONFIG=str(file), RAY_worker_niceness="0"))
        local_stack.deploy(made, address, lambda: False)
        _wait_until_ready(fleet, address)
        yield fleet


def document(nodes: int, port: int, database: str, storage: str) -> dict[str, Any]:
    """The Serve config file: on each node a gateway, a proxy and a replica of a model that is scripted."""
    many = {"max_ongoing_requests": 256, "target_ongoing_requests": 256, "max_queued_requests": 256}
    model = local_model(id=MODEL, adapters=0, cpus=0.1, min_replicas=nodes, max_replicas=nodes, **many)
    made = stack_document(model, is_scripted=True)
    gateway = next(one for one in made["applications"] if one["name"] == GATEWAY)
    gateway["args"] |= {
        "firewalled": True,  # its nodes are at loopback, whatever other addresses this machine has
        "store": database,
        "artifacts": f"{storage}/artifacts",
        "data_roots": [f"{storage}/data"],
        "memory_banks": {"folder": f"{storage}/memory_banks"},
    }
    gateway["deployments"] = [{"name": "Gateway", "num_replicas": nodes, "max_replicas_per_node": 1}]
    served = next(one for one in made["applications"] if one["name"] == MODEL)
    served["args"]["artifacts"] = gateway["args"]["artifacts"]
    return made | {"proxy_location": "EveryNode", "http_options": {"host": "127.0.0.1", "port": port}}


def _wait_until_ready(fleet: Fleet, address: str) -> None:
    """Until the stack is ready and each node has its gateway, its proxy and its replica. Raises BenchFailed."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    client = ServeSubmissionClient(address)
    deadline = time.monotonic() + START_S
    while waiting := local_stack.what_is_missing(fleet.url, just_deployed=True) or _not_there(client, fleet.nodes):
        if time.monotonic() > deadline:
            raise BenchFailed(f"a stack of {fleet.nodes} nodes is not ready after {START_S:.0f} s: {waiting}")
        time.sleep(LOOK_S)


def _not_there(client: Any, nodes: int) -> str:
    details = client.get_serve_details()
    there = {"proxies": sum(proxy["status"] == "HEALTHY" for proxy in details["proxies"].values())}
    for application, deployment in ((GATEWAY, "Gateway"), (MODEL, None)):
        deployments = details["applications"][application]["deployments"]
        for name, one in deployments.items():
            if deployment in (None, name):
                there[name] = sum(replica["state"] == "RUNNING" for replica in one["replicas"])
    return ", ".join(f"{name}: {count} of {nodes}" for name, count in there.items() if count < nodes)


def part_of(command: str) -> str:
    """The part of a process with this command line."""
    return next((part for word, part in _WORDS if word in command), OTHERS)


# Measuring


def measured(fleet: Fleet, generator: LoadGenerator, requests: int, started_s: float) -> Measured:
    """Raises BenchFailed where a request fails, or has other than the tokens asked for."""
    url, streams = f"{fleet.url}/v1/chat/completions", STREAMS * fleet.nodes
    generator.ask(url, body(WARM_TOKENS), streams=streams, requests=WARM_REQUESTS)
    time.sleep(SETTLE_S)
    say(f"  at rest for {REST_S:.0f} s")
    before, start = fleet.look(), time.monotonic()
    time.sleep(REST_S)
    after, seconds = fleet.look(), time.monotonic() - start
    rest = {part: spent(before, after).get(part, 0.0) / seconds for part in PARTS}
    processes = {part: sum(one == part for one, _ in after.values()) for part in PARTS}
    loads = []
    for tokens, number in ((TOKENS, requests), (SHORT_TOKENS, SHORT_REQUESTS)):
        say(f"  {streams} streams of {number} answers of {tokens} tokens")
        before, start = fleet.look(), time.monotonic()
        found = generator.ask(url, body(tokens), streams=streams, requests=number)
        after, seconds = fleet.look(), time.monotonic() - start
        if found.errors:
            raise BenchFailed(f"{len(found.errors)} of {len(found.requests)} failed: {found.errors[0]}")
        if found.tokens != streams * number * tokens:
            raise BenchFailed(f"there came {found.tokens} tokens of {streams * number * tokens}")
        loads.append(load_of(found, streams, before, after, seconds, rest))
    long, short = loads
    return Measured(fleet.nodes, started_s, rest, processes, long, short)


def body(tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Write a long story about a river."}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "temperature": 0, **options}


def load_of(found: Found, streams: int, before: Look, after: Look, seconds: float, rest: dict[str, float]) -> Load:
    """The figures of a load between two looks that are so many seconds apart."""
    parts = spent(before, after)
    of_gateways = [taken - before.get(key, ("", 0.0))[1] for key, (part, taken) in after.items() if part == GATEWAYS]
    first = sorted(1_000 * one.first_s for one in found.requests if one.first_s is not None)
    return Load(
        streams=streams,
        requests=len(found.requests),
        tokens=found.tokens,
        seconds=found.seconds,
        first_ms_p50=first[len(first) // 2],
        first_ms_p99=first[int(0.99 * (len(first) - 1))],
        cpu_s={part: parts.get(part, 0.0) - seconds * rest[part] for part in PARTS},
        cpu_s_with_rest=sum(parts.values()),
        busiest_gateway=max(of_gateways) / sum(of_gateways),
        generator_cpu_s=found.cpu_seconds,
    )


# Comparing


def comparisons(small: Measured, large: Measured) -> list[Comparison]:
    """Of the smallest and the largest fleet: what is to stay the same."""

    def serving(parts: dict[str, float]) -> float:
        return sum(parts[part] for part in SERVING)

    def of_a_node(one: Measured) -> float:
        return 1_000 * (one.rest[RAYLETS] + one.rest[AGENTS] + one.rest[GATEWAYS] + one.rest[PROXIES]) / one.nodes

    return [
        Comparison(
            "CPU of gateways, proxies and replicas, per 1,000 tokens", "s",
            serving(small.tokens.per_1000_tokens), serving(large.tokens.per_1000_tokens), most=MOST,
        ),
        Comparison(
            f"… per request of {SHORT_TOKENS} tokens", "ms",
            serving(small.short.ms_per_request), serving(large.short.ms_per_request), most=MOST,
        ),
        Comparison("thousandths of a core of each node at rest", "", of_a_node(small), of_a_node(large), most=MOST),
        Comparison("… of the controller", "", 1_000 * small.rest[CONTROLLER], 1_000 * large.rest[CONTROLLER]),
        Comparison("… of the GCS", "", 1_000 * small.rest[GCS], 1_000 * large.rest[GCS]),
    ]  # fmt: skip


def table(all_measured: Sequence[Measured]) -> str:
    """A table in Markdown, with a column for each size."""
    heads = [f"{one.nodes} node{'s' * (one.nodes > 1)}" for one in all_measured]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]

    def row(name: str, values: Sequence[str]) -> None:
        lines.append(f"| {name} | {' | '.join(values)} |")

    row("streams", [f"{one.tokens.streams}" for one in all_measured])
    row("tokens/s", [f"{one.tokens.tokens / one.tokens.seconds:,.0f}" for one in all_measured])
    row(
        "time to first token, p50 / p99, ms",
        [f"{one.tokens.first_ms_p50:.0f} / {one.tokens.first_ms_p99:.0f}" for one in all_measured],
    )
    row("the busiest gateway's share of their CPU", [f"{one.tokens.busiest_gateway:.2f}" for one in all_measured])
    whole = [1_000 * one.tokens.cpu_s_with_rest / one.tokens.tokens for one in all_measured]
    row("CPU per 1,000 tokens, with all at rest, s", [f"{value:.2f}" for value in whole])
    for part in PARTS:
        row(f"… of {part}, beyond rest", [f"{one.tokens.per_1000_tokens[part]:.3f}" for one in all_measured])
    each = [sum(one.short.ms_per_request.values()) for one in all_measured]
    row(f"CPU per request of {SHORT_TOKENS} tokens, beyond rest, ms", [f"{value:.1f}" for value in each])
    for part in PARTS:
        row(f"… of {part}", [f"{one.short.ms_per_request[part]:.2f}" for one in all_measured])
    row("at rest, cores", [f"{sum(one.rest.values()):.3f}" for one in all_measured])
    for part in PARTS:
        row(f"… of {part} (processes)", [f"{one.rest[part]:.3f} ({one.processes[part]})" for one in all_measured])
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

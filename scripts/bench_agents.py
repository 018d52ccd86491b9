"""What agents cost: the orchestration of turns, new sessions, many at once, idle ones.

    scripts/bench agents [--only PART …] [--json FILE]

All of it is measured on a served stack whose models are scripted, over HTTP, from threads of this process on the same
cores.

steps   what a step of a turn takes beside the engine and the tool, in a turn of three (the model calls a tool, which
        fails at once, as it has no key, and answers): from the beginning of the first step to the end of the turn,
        less twice the time in which the same engine answers Ray Serve's handle in this process, by three
first   the first event of the first turn of a new session, one session after the other, and when its first step begins
many    50 sessions at once, each with such a turn whose model takes half a second a time: errors, and the memory of
        their actors that they share with nothing
idle    5,000 sessions, each of which has had a turn: how many actors there are beside those that wait, and the memory
        of what serves agents, beside what it was before
bfcl    only where it is asked for: how often a real model calls the right functions (scripts/bfcl.py)

The exit status is 1 if a target is missed.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from scripts import bfcl, local_stack
from scripts.bench_servers import BenchFailed, Server, command_of, free_port, local_model, stack_document
from scripts.bench_trainings import enter_home, running_ray, say
from scripts.figures import Comparison, Figure, Share, figure, write_comparisons, write_json, write_shares, write_table
from stack.config import GATEWAY, LanguageModel
from stack.models import Model
from stack.serve_engine import ServeEngine

PARTS = ("steps", "first", "many", "idle")
BFCL = "bfcl"
MODEL = "scripted"
TURNS, A_ROUND, SESSIONS, AT_ONCE, IDLE, CLIENTS = 200, 20, 200, 50, 5_000, 4
# Targets: milliseconds of a step; of a first event, at the median and the 99th percentile; megabytes of an actor; the
# memory of what serves agents, as a share of what it was before.
STEP_MS, FIRST_MS, FIRST_P99_MS, ACTOR_MB, MOST_MEMORY = 10, 100, 300, 120, 1.05
TOOL = {"type": "wolfram_alpha"}
# The scripted engine says what follows `say:`; the tool has no key.
CALLING = f"say:{json.dumps({'name': 'wolfram_alpha', 'parameters': {'query': '6 * 7'}})}"
STEPS, ANSWERS = 3, 2  # of such a turn
SLOW_TOKENS = 25  # at 50 a second
WARM, IDLE_S, LOOK_S, END_S, START_S = 1, 1.0, 0.5, 60.0, 300.0
SERVING = ("ServeReplica:gateway", "SharedEngine")
ACTOR = "ray::SessionActor"
Figures = list[Figure | Comparison | Share]
Event = tuple[float, dict[str, Any]]  # when it came, in seconds since its turn was asked for, and its payload


def main() -> int:
    arguments = _arguments()
    figures: Figures = []
    try:
        with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder:
            if parts := [one for one in PARTS if one in arguments.only]:
                with served(Path(folder) / "served") as server:
                    measured(server, parts, figures)
            if BFCL in arguments.only:
                shares = bfcl.shares_of(bfcl.measure(Path(folder) / "bfcl"))
                figures += shares
                print(write_shares(shares), end="\n\n", flush=True)
    except (BenchFailed, local_stack.StartFailed, OSError, httpx.HTTPError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:  # what was measured before a part failed, too
        if arguments.json is not None:
            write_json(arguments.json, figures, bench="agents")
    return 0 if all(one.met for one in figures) else 1


def measured(server: Server, only: Sequence[str], figures: Figures) -> None:
    """Adds the figures of these parts, and prints them."""
    with Agents(server) as agents:
        parts = {"steps": agents.steps, "first": agents.first, "many": agents.many, "idle": agents.idle}
        for name in only:
            say(f"{name} (load {os.getloadavg()[0]:.1f})")
            found = parts[name]()
            figures += found
            print(write_table([one for one in found if isinstance(one, Figure)]), end="\n\n", flush=True)
            if comparisons := [one for one in found if isinstance(one, Comparison)]:
                print(write_comparisons(comparisons, "before", "with them"), end="\n\n", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench agents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=(*PARTS, BFCL), default=PARTS, metavar="PART", help="measure these parts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A stack with two scripted models, of which one takes no time, on a Ray of this process's own."""
    port = free_port()
    made = enter_home(folder)
    os.environ.pop("WOLFRAM_ALPHA_KEY", None)
    url = f"http://127.0.0.1:{port}"
    with running_ray() as address:
        from ray import serve

        try:
            local_stack.deploy(document(port), address, lambda: False)
            local_stack.wait_until_ready(url, START_S, lambda: False, lambda _: None)
            yield Server("the stack", url, made)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]  # its actors end before Ray does


def document(port: int) -> dict[str, Any]:
    model = fast_model()
    made = stack_document(model, is_scripted=True, tokens_per_second=1_000_000)
    slow = stack_document(model.model_copy(update={"id": "slow"}), is_scripted=True)
    gateway = next(one for one in made["applications"] if one["name"] == GATEWAY)
    gateway["args"]["agents"] = {"warm": WARM, "idle_s": IDLE_S}
    gateway["args"]["models"].append({**gateway["args"]["models"][0], "id": "slow"})
    other = next(one for one in slow["applications"] if one["name"] == "slow")
    other["args"]["model"] = gateway["args"]["models"][1]
    options = {"host": "127.0.0.1", "port": port}
    return made | {"http_options": options, "applications": [*made["applications"], other]}


def fast_model() -> LanguageModel:
    many = {"max_ongoing_requests": 256, "target_ongoing_requests": 256, "max_queued_requests": 256}
    return local_model(id=MODEL, adapters=0, cpus=0.1, **many)


async def engine_times(texts: Sequence[str]) -> list[float]:
    """The milliseconds in which the engine answers these, one after the other, after one that does not count."""
    engine, model = ServeEngine(), Model(MODEL, fast_model(), is_adapter=False)
    times = []
    for text in (texts[0], *texts):
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True}
        start = time.perf_counter()
        async with aclosing(engine.generate(model, "chat", body)) as items:
            async for _ in items:
                pass
        times.append(1_000 * (time.perf_counter() - start))
    return times[1:]


class Agents:
    """An agent of the stack, whose sessions and turns are measured."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = httpx.Client(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=AT_ONCE))

    def __enter__(self) -> "Agents":
        self._agent_id = self._made("create", agent_config=config(MODEL))["agent_id"]
        for _ in range(20):  # what is loaded with the first ones does not count
            self.turn(self.session(), CALLING)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def session(self) -> str:
        return str(self._made("session/create", agent_id=self._agent_id, session_name="bench")["session_id"])

    def turn(self, session_id: str, text: str, **fields: Any) -> list[Event]:
        """The events of a turn, which must be completed."""
        body = {"agent_id": self._agent_id, "session_id": session_id, "stream": True, **fields}
        body["messages"] = [{"role": "user", "content": text}]
        start = time.perf_counter()
        events: list[Event] = []
        with self._client.stream("POST", "/agentic_system/turn/create", json=body) as reply:
            if reply.status_code != 200:
                raise BenchFailed(f"a turn was refused: {reply.read().decode()}")
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    told = json.loads(line[6:])
                    events.append((time.perf_counter() - start, told.get("event", {}).get("payload", told)))
        if not events or events[-1][1].get("event_type") != "turn_complete":
            raise BenchFailed(f"a turn has failed: {events[-1:]}")
        return events

    # The parts

    def steps(self) -> Figures:
        times: list[float] = []
        engine: list[float] = []
        while len(times) < TURNS:  # in turns, so that both have their share of what else the machine does
            session_id = self.session()  # a new one, so that what the model is told of earlier turns stays short
            alone = asyncio.run(engine_times(["Hello"] * A_ROUND))
            turns = [self.turn(session_id, CALLING) for _ in range(A_ROUND)]
            times += [of_a_step(events, statistics.median(alone)) for events in turns]
            engine += alone
        return [figure("a step, beside engine and tool", "ms", times, STEP_MS), figure("the engine", "ms", engine)]

    def first(self) -> Figures:
        all_events = [self.turn(self.session(), "Hello") for _ in range(SESSIONS)]
        firsts = [1_000 * events[0][0] for events in all_events]
        begun = [1_000 * time_of(events, "step_start") for events in all_events]
        of_first = figure("the first event of a new session", "ms", firsts, FIRST_MS)
        return [
            of_first,
            Figure("… its 99th percentile", "ms", of_first.p99 or 0.0, most=FIRST_P99_MS),
            figure("the beginning of its first step", "ms", begun),
        ]

    def many(self) -> Figures:
        agent_id = self._made("create", agent_config=config("slow"))["agent_id"]
        sessions = [
            str(self._made("session/create", agent_id=agent_id, session_name="bench")["session_id"])
            for _ in range(AT_ONCE)
        ]
        memory: list[float] = []

        def one(session_id: str) -> list[Event] | None:
            try:
                sampling = {"strategy": "greedy", "max_tokens": SLOW_TOKENS}
                return self.turn(session_id, "Hello", agent_id=agent_id, sampling_params=sampling)
            except (BenchFailed, httpx.HTTPError) as error:
                say(str(error))
                return None

        start = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            turns = [threads.submit(one, session_id) for session_id in sessions]
            while not all(turn.done() for turn in turns):
                memory += [megabytes(process) for process in self._processes(ACTOR)]
                time.sleep(LOOK_S)
        seconds = time.perf_counter() - start
        ended = [events for turn in turns if (events := turn.result()) is not None]
        name = f"{AT_ONCE} sessions at once"
        return [
            Figure(f"errors of {name}", "", AT_ONCE - len(ended), most=0),
            Figure(f"{name}, until the last has ended", "s", seconds),
            figure(f"the first event, {name}", "ms", [1_000 * events[0][0] for events in ended]),
            Figure("the memory of a session's actor, the greatest", "MB", max(memory), most=ACTOR_MB),
        ]

    def idle(self) -> Figures:
        self._until_idle()
        before = self._memory()
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(lambda _: self.turn(self.session(), "Hello"), range(IDLE)))
        actors = self._until_idle()
        return [
            Figure(f"actors with {IDLE:,} idle sessions, beside {WARM} that waits", "", actors - WARM, most=0),
            Comparison("the memory of what serves agents", "MB", before, self._memory(), most=MOST_MEMORY),
        ]

    def _until_idle(self) -> int:
        """Waits until actors that nobody needs have ended. Returns how many there are then."""
        deadline = time.monotonic() + END_S
        while (count := len(self._processes(ACTOR))) > WARM and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return count

    def _memory(self) -> float:
        return sum(megabytes(process) for part in SERVING for process in self._processes(part))

    def _processes(self, part: str) -> list[psutil.Process]:
        found = []
        for process in self._server.processes():
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if part in command_of(process):
                    found.append(process)
        return found

    def _made(self, path: str, **body: Any) -> Any:
        reply = self._client.post(f"/agentic_system/{path}", json=body)
        if reply.status_code != 200:
            raise BenchFailed(f"{path} was refused: {reply.text}")
        return reply.json()


def config(model: str) -> dict[str, Any]:
    return {"model": model, "instructions": "Be brief.", "tools": [TOOL]}


def of_a_step(events: Sequence[Event], engine_ms: float) -> float:
    """What a step of a turn has taken, in milliseconds, beside the engine. Raises BenchFailed for another turn."""
    steps = [payload["step_type"] for _, payload in events if payload["event_type"] == "step_complete"]
    if steps != ["inference", "tool_execution", "inference"]:
        raise BenchFailed(f"the turn that is measured has other steps: {steps}")
    whole = 1_000 * (events[-1][0] - time_of(events, "step_start"))
    return (whole - ANSWERS * engine_ms) / STEPS


def time_of(events: Sequence[Event], event_type: str) -> float:
    """When the first event of a type came."""
    return next(at for at, payload in events if payload["event_type"] == event_type)


def megabytes(process: psutil.Process) -> float:
    """The memory that a process shares with no other; none of one that has just ended."""
    try:
        private: float = process.memory_full_info().uss / 1e6
    except psutil.NoSuchProcess:
        return 0.0
    return private


if __name__ == "__main__":
    sys.exit(main())

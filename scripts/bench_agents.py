"""What agents cost: the orchestration of turns, new sessions, many at once, idle ones.

    scripts/bench agents [--only PART …] [--json FILE]

All of it is measured on a served stack whose model is a scripted engine that takes no time, over HTTP, from threads of
this process on the same cores.

steps   milliseconds of a step in a turn of three (the model calls a tool, the call is refused, as its arguments do not
        fit, and the model answers), from when the first step begins to the end of the turn: all but engine and tool
first   the first event of the first turn of a new session, one session after the other, and when its first step begins
many    50 sessions at once, each with such a turn whose model takes half a second a time: errors, and the memory of
        their actors that they share with nothing
idle    5,000 sessions, each of which has had a turn: how many actors there are beside those that wait, and the memory
        of what serves agents, beside what it was before

The exit status is 1 if a target is missed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from scripts import local_stack
from scripts.bench_servers import BenchFailed, Server, command_of, free_port, local_model, running, stack_document
from scripts.figures import Comparison, Figure, figure, write_comparisons, write_json, write_table
from stack.config import GATEWAY

PARTS = ("steps", "first", "many", "idle")
MODEL = "scripted"
TURNS, SESSIONS, AT_ONCE, IDLE, CLIENTS = 200, 200, 50, 5_000, 4
# Targets: milliseconds of a step; of a first event, at the median and the 99th percentile; megabytes of an actor; the
# memory of what serves agents, as a share of what it was before.
STEP_MS, FIRST_MS, FIRST_P99_MS, ACTOR_MB, MOST_MEMORY = 10, 100, 300, 120, 1.05
TOOL = {"type": "code_interpreter", "enable_inline_code_execution": True}
# The scripted engine says what follows `say:`; the tool takes no such argument.
REFUSED = f"say:{json.dumps({'name': 'code_interpreter', 'parameters': {'no_such': 1}})}"
SLOW_TOKENS = 25  # at 50 a second
WARM, IDLE_S, LOOK_S, END_S = 1, 1.0, 0.5, 60.0
SERVING = ("ServeReplica:gateway", "SharedEngine")
ACTOR = "ray::SessionActor"
Figures = list[Figure | Comparison]
Event = tuple[float, dict[str, Any]]  # when it came, in seconds since its turn was asked for, and its payload


def main() -> int:
    arguments = _arguments()
    figures: Figures = []
    try:
        with tempfile.TemporaryDirectory(prefix="stack-bench-") as folder, served(Path(folder) / "served") as server:
            measured(server, arguments.only, figures)
    except (BenchFailed, local_stack.StartFailed, OSError) as error:
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
        for name in (one for one in PARTS if one in only):
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
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="measure these parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args()


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A stack with two scripted models, of which one takes no time."""
    port = free_port()
    folder.mkdir()
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(document()))
    command = [sys.executable, "-m", "scripts.serve", "--config", str(file), "--port", str(port), "--stop-with-stdin"]
    with running("the stack", command, folder, port, "/health", RAY_SERVE_ENABLE_HA_PROXY="0") as server:
        yield server


def document() -> dict[str, Any]:
    many = {"max_ongoing_requests": 256, "target_ongoing_requests": 256, "max_queued_requests": 256}
    model = local_model(id=MODEL, adapters=0, cpus=0.1, **many)
    made = stack_document(model, is_scripted=True, tokens_per_second=1_000_000)
    slow = stack_document(model.model_copy(update={"id": "slow"}), is_scripted=True)
    gateway = next(one for one in made["applications"] if one["name"] == GATEWAY)
    gateway["args"]["agents"] = {"warm": WARM, "idle_s": IDLE_S}
    gateway["args"]["models"].append({**gateway["args"]["models"][0], "id": "slow"})
    other = next(one for one in slow["applications"] if one["name"] == "slow")
    other["args"]["model"] = gateway["args"]["models"][1]
    return made | {"applications": [*made["applications"], other]}


class Agents:
    """An agent of the stack, whose sessions and turns are measured."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = httpx.Client(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=AT_ONCE))

    def __enter__(self) -> "Agents":
        self._agent_id = self._made("create", agent_config=config(MODEL))["agent_id"]
        for _ in range(20):  # what is loaded with the first ones does not count
            self.turn(self.session(), REFUSED)
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
        session_id, times = self.session(), []
        for number in range(TURNS):
            if number % 20 == 0:  # so that what the model is told of earlier turns stays short
                session_id = self.session()
            times.append(milliseconds_a_step(self.turn(session_id, REFUSED)))
        return [figure("a step of a turn", "ms", times, STEP_MS)]

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


def milliseconds_a_step(events: Sequence[Event]) -> float:
    """From the beginning of the first step to the end of the turn, by the number of steps."""
    count = len([payload for _, payload in events if payload["event_type"] == "step_complete"])
    return 1_000 * (events[-1][0] - time_of(events, "step_start")) / count


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


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What a cluster's faults cost its clients: scripts/chaos [--only FAULT…] [--seed N] [--json FILE]

A cluster of hosts on this machine serves clients of all kinds, first without a fault, then with each: it is measured
how many requests fail and for how long, and looked whether all that was acknowledged is there exactly once.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos import clients
from tests.chaos.clients import Work
from tests.chaos.cluster import EMBEDDING_MODEL, LANGUAGE_MODEL, Cluster, cluster
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.load import Again, Attempt, Balancer, Client, Load, Wrong
from tests.running_stack import wait_for

PREFIX = "10.80.0"
BEFORE_S = 10.0  # of load before a fault
CALM_S = 15.0  # without any failure: it has recovered
MOST_S = 240.0
TARGET_S = 60.0
JOB_S = 600.0
GATEWAYS = 2  # of a worker on which nothing serves there is none
# An attempt that takes longer, and longer than three times the 99th percentile without a fault, is as bad as one that
# fails.
SLOW_S = 5.0
# Which is asked once in a phase, before the fault.
ONCE = "work"


@dataclass
class Result:
    """What was found in a phase. Times are seconds: `recovery` of each kind of request, and `whole` until two gateways
    take requests again, both from the fault; from the end of one that is planned."""

    name: str
    what: str
    victim: str = ""
    seconds: float = 0.0
    answered: int = 0
    refused: int = 0
    broken: int = 0
    lost: list[str] = field(default_factory=list)
    recovery: dict[str, float] = field(default_factory=dict)
    whole: float | None = None
    p50: dict[str, float] = field(default_factory=dict)
    p99: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    busy: float = 0.0  # share of this machine's CPU time that was used
    planned: bool = False
    failed: str = ""  # why the fault itself, or its end, did not come about

    @property
    def recovered(self) -> float:
        return max(self.recovery.values(), default=0.0)

    @property
    def met(self) -> bool:
        wrong = self.failed or self.missing or self.lost or (self.planned and (self.refused or self.broken))
        return not wrong and self.recovered <= TARGET_S


class Run:
    """A cluster with its clients."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.seed = seed
        self.balancer = Balancer(cluster.urls)
        self.load = Load(self.balancer, cluster.key, seed)
        self.slow: dict[str, float] = {}  # by kinds: from how many seconds on
        with self._http() as http:
            self.kinds = clients.prepare(http, LANGUAGE_MODEL, EMBEDDING_MODEL)

    def without(self, seconds: float) -> Result:
        """The load without any fault, once all is warm."""
        with self.balancer.looking():
            with self._running():
                threading.Event().wait(BEFORE_S)
            start = time.monotonic()
            psutil.cpu_percent()
            with self._running():
                threading.Event().wait(seconds)
            busy = psutil.cpu_percent() / 100
        result = self._result(Result("none", "no fault", busy=busy), start, None)
        self.slow = {kind: max(SLOW_S, 3 * seconds) for kind, seconds in result.p99.items()}
        return result

    def with_fault(self, fault: Fault) -> Result:
        result = Result(fault.name, fault.what, planned=fault.planned)
        with self.balancer.looking(), self._running():
            start = time.monotonic()
            threading.Event().wait(BEFORE_S)
            with closing(Client(self.load, f"{self.seed}/{fault.name}")) as client:
                self.kinds.work(client)
            struck = time.monotonic()
            draw = random.Random(f"{self.seed}/{fault.name}")
            try:
                result.victim = fault.strike(self.cluster, draw)
                say(f"  {result.victim}")
                if fault.repair is not None:
                    threading.Event().wait(max(0.0, struck + fault.away_s - time.monotonic()))
                    fault.repair(self.cluster, result.victim)
            except (AssertionError, RuntimeError, Again, Wrong, httpx.TransportError, pytest.fail.Exception) as error:
                result.failed = f"{type(error).__name__}: {error}"
                say(f"  {result.failed}")
            if fault.planned:  # it takes minutes, in which nothing fails
                struck = time.monotonic()
            calm = 0.0
            while calm < CALM_S and time.monotonic() - struck < MOST_S:
                threading.Event().wait(0.5)
                well = len(self.balancer.well) >= GATEWAYS
                if well and result.whole is None:
                    result.whole = time.monotonic() - struck
                calm = time.monotonic() - max(
                    [struck, *(one.end for one in self.load.log.attempts if is_bad(one, self.slow))]
                )
                calm = calm if well else 0.0
        last: dict[str, Any] = {}
        if not result.failed:
            wait_for(lambda: self.cluster.is_whole(last), MOST_S, lambda: last)
        return self._result(result, start, struck)

    def finish(self) -> list[Work]:
        """The jobs that were under way at the faults, once all of them have ended."""
        with self._http() as http:
            return [clients.ended(http, uuid, JOB_S) for uuid in self.kinds.memory.work]

    def _result(self, result: Result, start: float, struck: float | None) -> Result:
        log = self.load.log
        attempts = [one for one in log.attempts if one.end >= start]
        answered = [one for one in log.answered if one.end >= start]
        result.seconds = time.monotonic() - start
        result.answered = len(answered)
        result.refused = sum(one.outcome == "refused" for one in attempts)
        result.broken = sum(one.outcome == "broken" for one in attempts)
        result.reasons = dict(Counter(f"{one.kind}: {one.why[:160]}" for one in attempts if one.outcome != "ok"))
        result.lost, log.lost = log.lost, []
        for kind in sorted({one.kind for one in answered}):
            took = [one.end - one.start for one in answered if one.kind == kind]
            result.p50[kind] = statistics.median(took)
            result.p99[kind] = statistics.quantiles(took, n=100, method="inclusive")[98] if len(took) > 1 else took[0]
            if struck is not None and kind != ONCE:
                result.recovery[kind] = recovery_of([one for one in attempts if one.kind == kind], struck, self.slow)
        with self._http() as http:
            result.missing = clients.missing(http, self.kinds, self.cluster.bucket)
        memory = self.kinds.memory
        result.acknowledged = {
            "documents": len(memory.documents), "sessions": len(memory.sessions),
            "turns": sum(map(len, memory.sessions.values())), "jobs": len(memory.jobs),
            "data sets": len(memory.datasets),
        }  # fmt: skip
        return result

    def _running(self) -> Any:
        kinds = self.kinds
        return self.load.running(
            [
                kinds.chat,
                kinds.stream,
                kinds.long_stream,
                kinds.insert,
                kinds.query,
                kinds.turn,
                kinds.job,
                kinds.dataset,
            ]
        )

    def _http(self) -> httpx.Client:
        return self.cluster.client(self.balancer.choose())


def is_bad(attempt: Attempt, slow: Mapping[str, float]) -> bool:
    seconds = attempt.end - attempt.start
    return attempt.outcome != "ok" or seconds > slow.get(attempt.kind, math.inf)


def recovery_of(attempts: Sequence[Attempt], struck: float, slow: Mapping[str, float]) -> float:
    """How long after a fault requests of one kind were answered again: from when on all are. 0 where all were.

    The last one may be slow and nothing behind it, as the load has ended.
    """
    bad = max((one.end for one in attempts if one.end > struck and is_bad(one, slow)), default=None)
    if bad is None:
        return 0.0
    fine = (one.start for one in attempts if one.start >= bad and not is_bad(one, slow))
    return min(fine, default=bad) - struck


def table(results: Sequence[Result]) -> str:
    """In Markdown."""
    heads = ["", "answered", "/s", "refused", "broken off", "lost", "chat p50, p99", "insert p50, p99"]
    heads += ["recovered", "whole", "missing of what was acknowledged"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for one in results:
        times = [
            f"{one.p50.get(kind, 0) * 1000:.0f}, {one.p99.get(kind, 0) * 1000:,.0f} ms" for kind in ("chat", "insert")
        ]
        cells = [
            one.what, f"{one.answered:,}", f"{one.answered / one.seconds:.1f}", str(one.refused), str(one.broken),
            str(len(one.lost)), *times, f"{one.recovered:.1f} s" if one.recovery else "",
            "" if one.whole is None else f"{one.whole:.0f} s",
            f"{len(one.missing)} of {sum(one.acknowledged.values()):,}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--only", nargs="+", metavar="FAULT", choices=[one.name for one in FAULTS], help="%(choices)s")
    parser.add_argument(
        "--seed", type=int, default=1, help="of all that is drawn: whom a fault meets, what clients ask"
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long the load without a fault is measured (60)")
    parser.add_argument("--workers", type=int, default=3, choices=(2, 3))
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    chosen = [one for one in FAULTS if not given.only or one.name in given.only]
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        cluster(Path(folder), PREFIX, given.workers) as started,
    ):
        run = Run(started, given.seed)
        say("no fault")
        results = [run.without(given.seconds)]
        for fault in chosen:
            say(fault.what)
            results.append(run.with_fault(fault))
            say(table(results[-1:]))
            write(given.json, given.seed, results, [])
            if results[-1].failed:  # what would be done next is done to another cluster
                say("the run ends here")
                break
        jobs = run.finish()
    say(table(results))
    say(f"without a fault {results[0].busy:.0%} of the CPU time was used")
    for job in jobs:
        say(f"job {job.uuid}: {job.status} with {job.rows} of {clients.ROWS} answers, attempts: {job.attempts}")
    write(given.json, given.seed, results, jobs)
    return 0 if all(one.met for one in (*results, *jobs)) else 1


def write(file: Path | None, seed: int, results: Sequence[Result], jobs: Sequence[Work]) -> None:
    """All that is known so far, if there is a file for it."""
    if file is not None:
        phases = [asdict(one) | {"met": one.met} for one in results]
        file.write_text(json.dumps({"seed": seed, "phases": phases, "jobs": list(map(asdict, jobs))}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

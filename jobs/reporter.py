"""What a running job writes down: its log, its figures, and a sign of life.

Nothing here waits for the database: a thread writes what has come together, a few times a second, in one transaction
each. `flush` waits until all of it is written; what was flushed is kept whatever happens next.
"""

import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Self

import psutil
from sqlalchemy.exc import SQLAlchemyError

from stack.store import Attempt, Job, Store, now

WRITE_S = 0.5
BEAT_S = 2.0
# Without a heartbeat for so long a driver must take itself for lost, since the supervisor does: see LEASE_S there.
LIFE_S = 20.0
MAX_LINE = 10_000
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
MAX_LINES = 1_000
MAX_POINTS = 5_000


def resources(process: psutil.Process) -> dict[str, float]:
    """What a process uses: its memory in GiB, and the percentage of one CPU since it was asked last."""
    return {"memory_gb": process.memory_info().rss / 2**30, "cpu_percent": process.cpu_percent()}


class Metrics:
    """The figures of a job's run and its progress, from any process that works on it."""

    def __init__(self, store: Store, job: Job, number: int) -> None:
        self._store = store
        self._job = job
        self._number = number
        self._points: deque[tuple[str, int, float]] = deque()
        self._progress: dict[str, Any] | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.flush()

    def log(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        """Notes values by name at a step."""
        self._points.extend((name, step, value) for name, value in values)

    def progress(self, done: int, total: int, unit: str, seconds_left: float | None = None) -> None:
        """Notes how far the job is."""
        self._progress = {"done": done, "total": total, "unit": unit, "seconds_left": seconds_left}

    def flush(self) -> None:
        """Waits until everything noted is written. Raises SQLAlchemyError."""
        with self._writing:
            while self._points:
                batch = [self._points[number] for number in range(min(len(self._points), MAX_POINTS))]
                self._store.telemetry.add_metrics(self._job.tenant, self._job.run_id, batch)
                for _ in batch:
                    self._points.popleft()
            if (progress := self._progress) is not None:
                self._store.jobs.record(self._job.id, self._number, progress=progress)
                if self._progress is progress:
                    self._progress = None

    def _write_on(self) -> None:
        while not self._ended.wait(WRITE_S):
            with suppress(SQLAlchemyError):  # a busy database: they are kept, and the last flush raises
                self.flush()


class Reporter:
    """A driver's side of an attempt: while it is open, the attempt has a heartbeat, and what is printed is its log.

    `lost` is called, in another thread, when the attempt has been given up or the database is out of reach for longer
    than a heartbeat may be late. It must end the process.
    """

    def __init__(self, store: Store, job: Job, attempt: Attempt, lost: Callable[[str], None]) -> None:
        self.job = job
        self.number = attempt.number
        self.metrics = Metrics(store, job, attempt.number)
        self._store = store
        self._lost = lost
        self._lines: deque[tuple[str, str, str]] = deque()
        self._ended = threading.Event()
        self._captured: list[tuple[int, int, threading.Thread]] = []
        self._thread = threading.Thread(target=self._live, name="reporter", daemon=True)

    def __enter__(self) -> Self:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._capture(1, "info")
        self._capture(2, "warning")
        self.metrics.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, original, thread in self._captured:
            os.dup2(original, descriptor)  # closes the pipe's end, so that its reader comes to an end
            thread.join(timeout=5)  # a child that lives on may hold the pipe open
        self._ended.set()
        self._thread.join()
        self._write_lines()
        self.metrics.__exit__()

    def _live(self) -> None:
        beaten = time.monotonic()
        while not self._ended.wait(WRITE_S):
            try:
                self._write_lines()
                if time.monotonic() - beaten >= BEAT_S:
                    if not self._store.jobs.beat(self.job.id, self.number):
                        self._lost("this attempt has been given up for another one, or cancelled")
                        return
                    beaten = time.monotonic()
            except SQLAlchemyError as error:
                if time.monotonic() - beaten >= LIFE_S:
                    self._lost(f"the database has been out of reach for {LIFE_S:.0f} s: {error}")
                    return

    def _capture(self, descriptor: int, level: str) -> None:
        """Reads what this process and its children write to its output or error stream, and passes it on."""
        original = os.dup(descriptor)
        reading, writing = os.pipe()
        os.dup2(writing, descriptor)
        os.close(writing)
        thread = threading.Thread(target=self._read, args=(reading, original, level), daemon=True)
        thread.start()
        self._captured.append((descriptor, original, thread))

    def _read(self, reading: int, original: int, level: str) -> None:
        with os.fdopen(reading, "rb") as pipe:
            while line := pipe.readline(MAX_LINE):
                os.write(original, line)
                # A progress bar writes over its line: what stands there at last counts. PostgreSQL takes no NUL.
                text = _COLOURS.sub("", line.decode("utf-8", "replace")).replace("\0", "")
                text = text.rstrip("\r\n").rsplit("\r", 1)[-1]
                if text.strip():
                    self._lines.append((now(), level, text))

    def _write_lines(self) -> None:
        while self._lines:
            batch = [self._lines[number] for number in range(min(len(self._lines), MAX_LINES))]
            self._store.telemetry.add_logs(self.job.tenant, self.job.run_id, batch)
            for _ in batch:
                self._lines.popleft()

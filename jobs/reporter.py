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
from typing import Any, Self, TypeVar

import psutil
from sqlalchemy.exc import SQLAlchemyError

from stack.errors import Unavailable
from stack.store import Attempt, Job, Store, faults, now

T = TypeVar("T")
WRITE_S = 0.5
BEAT_S = 2.0
# Without a heartbeat for so long a driver must take itself for lost, since the supervisor does: see LEASE_S there.
LIFE_S = 20.0
GIVEN_UP = "this attempt has been given up for another one, or cancelled"
MAX_LINE = 10_000
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# How many are written in one transaction.
BATCH_LINES = 1_000
BATCH_POINTS = 5_000


# The names of what `resources` measures.
RESOURCES = ("memory_gb", "cpu_percent")


def resources(process: psutil.Process) -> dict[str, float]:
    """What a process uses: its memory in GiB, and the percentage of one CPU since it was asked last."""
    return dict(zip(RESOURCES, (process.memory_info().rss / 2**30, process.cpu_percent()), strict=True))


def steadily(step: Callable[[], T]) -> T:
    """Takes a step in the database, and takes it again while that is away, as long as a heartbeat may be late.

    Raises SQLAlchemyError if it lasts longer, or is no fault that passes.
    """
    deadline = time.monotonic() + LIFE_S
    while True:
        try:
            return step()
        except SQLAlchemyError as error:
            if faults.passing(error) is None or time.monotonic() >= deadline:
                raise
        time.sleep(WRITE_S)


class Metrics:
    """The figures of a job's run and its progress, from any process that works on an attempt at it."""

    def __init__(self, store: Store, job: Job, number: int) -> None:
        self._store = store
        self._job = job
        self._attempt = (job.id, number)
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
        """Waits until everything noted is written.

        Raises SQLAlchemyError, and Unavailable when the attempt has been given up: then nothing more is written.
        """
        with self._writing:
            while self._points:
                batch = [self._points[number] for number in range(min(len(self._points), BATCH_POINTS))]
                if not self._store.telemetry.add_metrics(self._job.tenant, self._job.run_id, batch, self._attempt):
                    raise Unavailable(GIVEN_UP)
                for _ in batch:
                    self._points.popleft()
            if (progress := self._progress) is not None:
                self._store.jobs.record(*self._attempt, progress=progress)
                if self._progress is progress:
                    self._progress = None

    def _write_on(self) -> None:
        while not self._ended.wait(WRITE_S):
            try:
                self.flush()
            except SQLAlchemyError:  # a busy database: they are kept, and the last flush raises
                continue
            except Unavailable:  # the next flush raises it again
                return


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
        self._writing = threading.Lock()
        self._beaten = time.monotonic()
        self._problem = "it does not answer"
        self._ended = threading.Event()
        self._captured: list[tuple[int, int, threading.Thread]] = []
        self._threads = [
            threading.Thread(target=self._live, name="reporter", daemon=True),
            threading.Thread(target=self._watch, name="life", daemon=True),
        ]

    def __enter__(self) -> Self:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._capture(1, "info")
        self._capture(2, "warning")
        self.metrics.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._write_lines()
        with suppress(Unavailable):  # an attempt that was given up has nothing more to say
            self.metrics.__exit__()

    def finish(self) -> bool:
        """Writes what was printed and noted, before the attempt's end is; False if the attempt has been given up.

        What is printed from then on is no part of the job's log. Raises SQLAlchemyError, and can be tried again then.
        """
        self._release()
        try:
            self.metrics.flush()
        except Unavailable:
            return False
        written = self._write_lines()
        # No heartbeat from here on: it would find the attempt ended, and take that for being given up.
        self._ended.set()
        return written

    def _live(self) -> None:
        while not self._ended.wait(WRITE_S):
            try:
                # The heartbeat first: lines can wait.
                if not (self._beat() and self._write_lines()):
                    # A beat that was on its way when `finish` set the end found the attempt ended, not given up.
                    if not self._ended.is_set():
                        self._lost(GIVEN_UP)
                    return
            except SQLAlchemyError as error:  # all of it is tried again, as long as `_watch` lets it
                self._problem = faults.reason(error)

    def _beat(self) -> bool:
        """Shows a sign of life if it is time; False if the attempt has been given up."""
        if time.monotonic() - self._beaten < BEAT_S:
            return True
        if not self._store.jobs.beat(self.job.id, self.number):
            return False
        self._beaten = time.monotonic()
        return True

    def _watch(self) -> None:
        """Sees that there are heartbeats, in a thread of its own: a database can also be away by never answering.

        It goes by its own steps, so that a process that was held up as a whole first tries once more.
        """
        beaten, silent = self._beaten, 0.0
        while not self._ended.wait(WRITE_S):
            silent = silent + WRITE_S if beaten == self._beaten else 0.0
            beaten = self._beaten
            if silent >= LIFE_S:
                self._lost(f"the database has been out of reach for {LIFE_S:.0f} s: {self._problem}")
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

    def _release(self) -> None:
        """Ends what `_capture` has begun, and waits until everything is read."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        while self._captured:
            descriptor, original, thread = self._captured.pop(0)
            os.dup2(original, descriptor)  # closes the pipe's end, so that its reader comes to an end
            thread.join(timeout=5)  # a child that lives on may hold the pipe open

    def _read(self, reading: int, original: int, level: str) -> None:
        with os.fdopen(reading, "rb") as pipe:
            while line := pipe.readline(MAX_LINE):
                os.write(original, line)
                # A progress bar writes over its line: what stands there at last counts. PostgreSQL takes no NUL.
                text = _COLOURS.sub("", line.decode("utf-8", "replace")).replace("\0", "")
                text = text.rstrip("\r\n").rsplit("\r", 1)[-1]
                if text.strip():
                    self._lines.append((now(), level, text))

    def _write_lines(self) -> bool:
        """Writes the lines that have come so far; False if the attempt has been given up."""
        with self._writing:
            while self._lines and self._beat():
                batch = [self._lines[number] for number in range(min(len(self._lines), BATCH_LINES))]
                of = (self.job.tenant, self.job.run_id)
                if not self._store.telemetry.add_logs(*of, batch, attempt=(self.job.id, self.number)):
                    return False
                for _ in batch:
                    self._lines.popleft()
            return not self._lines

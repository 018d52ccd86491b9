"""What a job has found out about its rows: one line for each, in its folder, from which a next attempt goes on.

A line is `{"row": 7, "value": {…}, "result": {…}, "error": null}`: the row's number, what was asked, and what came of
it or why nothing did. No row has two lines, and of all rows only the numbers are in memory, a bit for each.
"""

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jobs.reporter import Metrics, resources
from stack.errors import TooLarge, TooManyFailed, Unavailable

# How many rows are written at once, and how often it is noted how far a job is.
WRITE_ROWS = 32
NOTE_S = 1.0


class RowNumbers:
    """A set of numbers from 0: a bit for each up to the greatest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, number: int) -> bool:
        """Adds a number; False if it was there."""
        if number in self:
            return False
        byte = number // 8
        if byte >= len(self._bits):
            self._bits.extend(bytes(max(byte + 1 - len(self._bits), len(self._bits))))
        self._bits[byte] |= 1 << number % 8
        self._count += 1
        return True

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        byte = number // 8
        return byte < len(self._bits) and bool(self._bits[byte] >> number % 8 & 1)

    def __len__(self) -> int:
        return self._count


@dataclass(frozen=True)
class Bounds:
    """How many of a job's rows may fail, and how many bytes may be made of the others, if that is bounded."""

    failed: int
    bytes: int | None = None


class RowLog:
    """The lines of a file, and what is known of them: which rows they are of, how many failed, and the first error;
    and how many bytes `size` says are made of them.

    A line that a lost attempt did not finish is cut off. Beside the file stands for how long its job has worked.
    """

    def __init__(self, file: Path, size: Callable[[dict[str, Any]], int] = lambda _: 0) -> None:
        self._file = file
        self._size = size
        self.rows = RowNumbers()
        self.bytes = 0
        self.failed = 0
        self.first_error: str | None = None
        self._clock = file.with_suffix(".seconds")
        self.seconds = float(self._clock.read_text()) if self._clock.exists() else 0.0
        self._noted = time.monotonic()
        cut(file)
        for line in self:
            self._note(line)

    def add(self, lines: Iterable[dict[str, Any]]) -> int:
        """Adds lines, but for those of rows that have one. What was added is in the file when this returns."""
        added = 0
        with self._file.open("a") as file:
            for line in lines:
                if self._note(line):
                    file.write(json.dumps(line) + "\n")
                    added += 1
        return added

    def note_time(self) -> None:
        """Adds the time since this was done last, or since the log was opened, to the `seconds` of the job's work.

        They are those of all its attempts, but for what one that was lost had not noted yet, and for the time between.
        """
        now = time.monotonic()
        self.seconds += now - self._noted
        self._noted = now
        # In one step, so that what was noted before is there whenever the attempt is lost.
        new = self._clock.with_suffix(".new")
        new.write_text(str(self.seconds))
        new.replace(self._clock)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return lines_of(self._file)

    def _note(self, line: dict[str, Any]) -> bool:
        if not self.rows.add(line["row"]):
            return False
        self.bytes += self._size(line)
        if line["error"] is not None:
            self.failed += 1
            self.first_error = self.first_error or f"row {line['row']}: {line['error']['message']}"
        return True

    def require_within(self, bounds: Bounds) -> None:
        """Raises TooManyFailed, with the first error, and TooLarge where what is made of the rows is too much."""
        if self.failed > bounds.failed:
            many = f"{self.failed} rows have failed; allowed: max_failed_rows, {bounds.failed}; the first of them: "
            raise TooManyFailed((many if bounds.failed else "") + (self.first_error or ""))
        if bounds.bytes is not None and self.bytes > bounds.bytes:
            raise TooLarge(
                f"what is made of {len(self.rows)} rows has {self.bytes} bytes; allowed: max_dataset_bytes, "
                f"{bounds.bytes}; take fewer rows for a job"
            )


def cut(file: Path) -> None:
    """Cuts off what stands behind the last whole line of a file: a line that a lost attempt did not finish."""
    if not file.exists():
        return
    with file.open("rb+") as lines:
        end = 0
        while (line := lines.readline()).endswith(b"\n"):
            end += len(line)
        lines.truncate(end)


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON Lines, one by one; none of one that is not there."""
    if file.exists():
        with file.open("rb") as lines:
            for line in lines:
                yield json.loads(line)


def text_of(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON Lines. The half of a letter, which a model can write as JSON, becomes a question mark."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSON Lines, in the place of what is there. How many they are."""
    count = 0
    with file.open("wb") as lines:
        for row in rows:
            lines.write(text_of(row))
            count += 1
    return count


def complete(
    log: RowLog, ask: Callable[[], Generator[dict[str, Any]]], total: int, metrics: Metrics, bounds: Bounds
) -> None:
    """Adds the rows that a log has not yet of `total`, as `ask` has them answered, if there are any.

    Raises as `fill` does, and Unavailable where some have come to nothing: another attempt may go well.
    """
    if len(log.rows):
        print(f"going on from {len(log.rows)} of {total} rows")
    if len(log.rows) < total:
        with closing(ask()) as answered:
            fill(log, answered, total, metrics, bounds)
    if len(log.rows) < total:
        raise Unavailable(f"{total - len(log.rows)} of {total} rows have no answer")


def fill(log: RowLog, answered: Iterable[dict[str, Any]], total: int, metrics: Metrics, bounds: Bounds) -> None:
    """Adds rows to a log as they come from the workers, and notes how far that is of `total`, and how long it takes.

    What has come is in the log however this ends. Raises as `require_within` does, as soon as it would, and at the end
    Unavailable where a model was away for some rows.
    """
    away = ""
    begun = noted = time.monotonic()
    before, process = len(log.rows), psutil.Process()
    waiting: list[dict[str, Any]] = []
    try:
        for row in answered:
            if row["away"]:
                away = away or f"row {row['row']}: {row['away']}"
                continue
            waiting.append(line_of(row))
            is_time = time.monotonic() - noted >= NOTE_S
            if len(waiting) >= WRITE_ROWS or is_time:
                log.add(waiting)
                waiting.clear()
                log.require_within(bounds)
            if is_time:
                noted = time.monotonic()
                log.note_time()
                done = len(log.rows)
                speed = (done - before) / (noted - begun)
                print(f"{done} of {total} rows, {log.failed} of them failed", flush=True)
                metrics.log(done, [("rows_per_second", speed), *resources(process).items()])
                metrics.progress(done, total, "rows", (total - done) / speed if speed else None)
    finally:
        log.add(waiting)
        log.note_time()
    log.require_within(bounds)
    metrics.progress(len(log.rows), total, "rows", 0)
    if away:
        raise Unavailable(away)


def line_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Ray Data that an asker has answered, as a line."""
    number = row["row"]
    return {
        "row": int(number),
        "value": json.loads(row["value"]),
        "result": json.loads(row["result"]) if row["result"] else None,
        "error": json.loads(row["error"]) if row["error"] else None,
    }

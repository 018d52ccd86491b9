"""Rows in files: JSON Lines, JSON, CSV and Parquet, compressed or not.

A file is read as a stream, a row at a time: neither the file nor what it unpacks to is ever whole in memory, and what a
row may take is bounded before it is parsed.

In CSV and Parquet a column of type dialog or json holds JSON text; in Parquet it may also be lists and structs.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import pyarrow
from pydantic_core import from_json

from stack import parquet_rows
from stack.api.datasets import TrainEvalDatasetColumnType as Type
from stack.errors import BadInput, TooLarge

# To parse a row of many small values takes its process, a gateway say, about a third of a second for each 2 MiB.
MAX_ROW_BYTES = 2 * 2**20
MAX_COLUMNS = 10_000
MAX_ROWS = 20_000_000
# Rows of CSV are parted by line breaks; a small compressed file may hold nothing else.
MAX_EMPTY_LINES = 100_000
# What the reader of Parquet may take, of address space.
PARQUET_MEMORY = 2 * 2**30
KINDS = {".jsonl": "JSON Lines", ".ndjson": "JSON Lines", ".json": "JSON", ".csv": "CSV", ".parquet": "Parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# The greatest level of xz needs 65 MiB, but a file can ask for 4 GiB.
XZ_MEMORY = 128 * 2**20
_BLOCK = 2**16
_BOM = codecs.BOM_UTF8
_BLANK = re.compile(r"[ \t\r\n]*")

# A row with its number, from 1: its declared columns, or what is wrong with it.
Numbered = tuple[int, dict[str, Any] | str]

# A bound of the whole process: a cell may be as long as a row.
csv.field_size_limit(MAX_ROW_BYTES)


@dataclass(frozen=True)
class Format:
    """How rows lie in a file: one of KINDS, and the suffix of its compression, if there is one."""

    kind: str
    compression: str | None


def format_of(name: str) -> Format:
    """The format that a file's name promises. Raises BadInput."""
    suffixes = PurePosixPath(name.lower()).suffixes[-2:]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None or (kind == "Parquet" and compression):
        allowed = ", ".join(KINDS)
        raise BadInput(
            f"{name!r} is no file of rows by its name: it must end with one of {allowed}; all but .parquet may be "
            f"compressed, with one of {', '.join(COMPRESSIONS)} after it"
        )
    return Format(kind, compression)


def read(file: BinaryIO, form: Format, columns: Mapping[str, Type], most: int) -> Iterator[Numbered]:
    """The rows of an open file, with the declared columns, which still may hold anything.

    Raises BadInput for a file that cannot be read any further, and TooLarge for one that unpacks to more than `most`
    bytes or has more than MAX_ROWS rows.
    """
    match form.kind:
        case "Parquet":
            rows = _parquet(file, columns, most)
        case "JSON Lines":
            rows = _json_lines(_unpacked(file, form.compression, most))
        case "JSON":
            rows = _json_array(_unpacked(file, form.compression, most))
        case _:
            rows = _csv(_unpacked(file, form.compression, most), columns)
    for number, row in rows:
        if number > MAX_ROWS:
            raise TooLarge(f"the file has more than {MAX_ROWS} rows")
        yield number, row if isinstance(row, str) else _declared(number, row, columns)


def _declared(number: int, row: dict[str, Any], columns: Mapping[str, Type]) -> dict[str, Any] | str:
    try:
        return {name: row[name] for name in columns}
    except KeyError as error:
        return f"row {number} lacks the declared column {error.args[0]!r}; it has: {_names(row)}"


def _names(names: Any) -> str:
    shown = ", ".join(str(name)[:100] for name, _ in zip(names, range(20), strict=False))
    return (shown or "none") + (", ..." if len(names) > 20 else "")


# Streams


class _Unpacked(io.RawIOBase):
    """A stream that raises TooLarge once more than `most` bytes have come out of it, and BadInput if it is broken."""

    def __init__(self, stream: Any, most: int, kind: str) -> None:
        self._stream = stream
        self._most = most
        self._kind = kind
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = int(self._stream.readinto(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # it is the disk
            raise BadInput(f"the file is not whole, or not {self._kind}: {str(error)[:200]}") from error
        self._total += count
        if self._total > self._most:
            raise TooLarge(f"the content has more than {self._most} bytes when it is unpacked")
        return count


class _Xz(io.RawIOBase):
    """What comes out of an xz file. Its decoder may take XZ_MEMORY; lzma.LZMAFile has no such bound."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def readinto(self, buffer: Any) -> int:
        while not self._decoder.eof:
            packed = self._file.read(_BLOCK) if self._decoder.needs_input else b""
            if not packed and self._decoder.needs_input:
                raise EOFError("it ends before its last block does")
            block = self._decoder.decompress(packed, max_length=len(buffer))
            if block:
                buffer[: len(block)] = block
                return len(block)
        if self._decoder.unused_data or self._file.read(1):
            raise EOFError("it goes on after its end")
        return 0


def _unpacked(file: BinaryIO, compression: str | None, most: int) -> io.BufferedReader:
    stream: Any
    match compression:
        case ".gz":
            stream = gzip.GzipFile(fileobj=file)
        case ".bz2":
            stream = bz2.BZ2File(file)
        case ".xz":
            stream = _Xz(file)
        case ".zst":
            # Of a handle of its own, which is closed when the stream is forgotten.
            packed = pyarrow.PythonFile(os.fdopen(os.dup(file.fileno()), "rb"), "r")
            stream = pyarrow.CompressedInputStream(packed, "zstd")
        case _:
            stream = file
    return io.BufferedReader(_Unpacked(stream, most, f"compressed as {compression}"), _BLOCK)


def _lines(stream: io.BufferedReader, what: str) -> Iterator[bytes]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise BadInput(f"{what} {number} has more than {MAX_ROW_BYTES} bytes")
        yield line.removeprefix(_BOM) if number == 1 else line


# Formats


def _json_lines(stream: io.BufferedReader) -> Iterator[Numbered]:
    for number, line in enumerate(_lines(stream, "row"), start=1):
        yield number, _object(number, line)


def _object(number: int, text: bytes | str) -> dict[str, Any] | str:
    try:
        row = from_json(text, allow_inf_nan=False)  # not nested deeper than 200, and without half characters
    except ValueError as error:
        return f"row {number} is not JSON: {error}"
    if not isinstance(row, dict):
        return f"row {number} is not a JSON object with the declared columns"
    if len(row) > MAX_COLUMNS:
        return f"row {number} has {len(row)} columns; allowed: {MAX_COLUMNS}"
    return row


class _Scanner:
    """Finds one JSON value after the other in a stream."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._ended = False

    def next(self) -> str:
        """The next character that is not blank, which is not taken; nothing at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def take(self) -> None:
        """Takes the character that `next` found."""
        self._at += 1

    def value(self, number: int) -> str:
        """The text of the value that begins here, of this row. Raises ValueError and RecursionError if it is none."""
        while True:
            try:
                _, end = self._scan(self._text, self._at)
            except ValueError:
                if self._ended:
                    raise
                if len(self._text) - self._at > MAX_ROW_BYTES:
                    raise BadInput(f"row {number} has more than {MAX_ROW_BYTES} bytes, or is not JSON") from None
            else:
                if end < len(self._text) or self._ended:
                    value, self._at = self._text[self._at : end], end
                    return value
            self._more()

    def _more(self) -> None:
        # Twice as much each time, so that a long value is not scanned over and over.
        left = self._text[self._at :]
        block = self._stream.read(max(_BLOCK, len(left)))
        self._ended = not block
        try:
            self._text, self._at = left + self._decode(block, final=not block), 0
        except UnicodeDecodeError as error:
            raise BadInput(f"the file is not UTF-8: {error.reason}") from error


def _json_array(stream: io.BufferedReader) -> Iterator[Numbered]:
    scanner = _Scanner(stream)
    if scanner.next() != "[":
        raise BadInput("the file is not a JSON array of objects; one object a line is JSON Lines, named .jsonl")
    scanner.take()
    number = 0
    while scanner.next() != "]" or number:
        number += 1
        try:
            text = scanner.value(number)
        except (ValueError, RecursionError) as error:
            yield number, f"row {number} is not JSON: {error}"
            return
        if len(text) > MAX_ROW_BYTES:
            raise BadInput(f"row {number} has more than {MAX_ROW_BYTES} bytes")
        yield number, _object(number, text)
        if scanner.next() == "]":
            break
        if scanner.next() != ",":
            raise BadInput(f"after row {number} the file goes on with {scanner.next()!r}, where ',' or ']' must stand")
        scanner.take()
    scanner.take()
    if scanner.next():
        raise BadInput(f"after its array the file goes on with {scanner.next()!r}")


def _csv(stream: io.BufferedReader, columns: Mapping[str, Type]) -> Iterator[Numbered]:
    taken = 0  # by the row that is being read, which may have several lines

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in _lines(stream, "line"):
            taken += len(line)
            if taken > MAX_ROW_BYTES:
                raise BadInput(f"row {number} has more than {MAX_ROW_BYTES} bytes")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise BadInput(f"row {number} is not UTF-8: {error.reason}") from error

    number = 0  # of the header
    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise BadInput(f"the header is not CSV: {error}") from error
    _require_columns(header, columns)
    number, empty = 1, 0
    while True:
        taken = 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"row {number} is not CSV: {error}"
        else:
            if not cells:
                empty += 1
                if empty > MAX_EMPTY_LINES:
                    raise BadInput(f"before row {number} there are more than {MAX_EMPTY_LINES} empty lines")
                continue
            empty = 0
            if len(cells) == len(header):
                yield number, _from_cells(number, dict(zip(header, cells, strict=True)), columns)
            else:
                yield number, f"row {number} has {len(cells)} cells, where the header has {len(header)}"
        number += 1


def _require_columns(header: list[str], columns: Mapping[str, Type]) -> None:
    if len(header) > MAX_COLUMNS:
        raise BadInput(f"the file has {len(header)} columns; allowed: {MAX_COLUMNS}")
    for name in columns:
        if header.count(name) != 1:
            problem = "has twice" if name in header else "lacks"
            raise BadInput(f"the file {problem} the declared column {name!r}; it has: {_names(header)}")


def _from_cells(number: int, row: dict[str, Any], columns: Mapping[str, Type]) -> dict[str, Any] | str:
    """What texts mean in columns that are not of type text."""
    for name, kind in columns.items():
        if kind == Type.number:
            row[name] = _number(row[name])
    return _from_texts(number, row, columns)


def _from_texts(number: int, row: dict[str, Any], columns: Mapping[str, Type]) -> dict[str, Any] | str:
    for name, kind in columns.items():
        if kind in (Type.dialog, Type.json) and isinstance(row[name], str):
            try:
                row[name] = from_json(row[name], allow_inf_nan=False)
            except ValueError as error:
                return f"row {number}: the column {name!r} is declared as {kind}, but is not JSON: {error}"
    return row


def _number(text: str) -> int | float | str:
    if "_" in text:  # Python takes it for a number, others do not
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# Parquet


def _parquet(file: BinaryIO, columns: Mapping[str, Type], most: int) -> Iterator[Numbered]:
    """Reads a file in a process of its own, whose memory is bounded: a small file can unpack to anything."""
    settings = {
        "columns": list(columns),
        "most": most,
        "most_columns": MAX_COLUMNS,
        "most_row_bytes": MAX_ROW_BYTES,
        "memory": PARQUET_MEMORY,
    }
    command = [sys.executable, "-P", str(Path(parquet_rows.__file__).resolve()), str(file.fileno())]
    pipe = subprocess.PIPE
    with TemporaryFile() as errors:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, pass_fds=[file.fileno()])
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with child.stdin as stdin:
                stdin.write(json.dumps(settings).encode())
            for number, row in _json_lines(_unpacked(child.stdout, None, most)):  # type: ignore[arg-type]
                yield number, row if isinstance(row, str) else _from_texts(number, row, columns)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if status:
            errors.seek(0)
            _refuse(status, errors.read(2**16).decode(errors="replace").strip().rpartition("\n")[2])


def _refuse(status: int, message: str) -> None:
    match status:
        case parquet_rows.REFUSED:
            raise BadInput(message)
        case parquet_rows.TOO_LARGE:
            raise TooLarge(message)
        case _:
            raise BadInput(f"the Parquet file cannot be read within {PARQUET_MEMORY} bytes of memory, or is broken")


def is_finite_number(value: Any) -> bool:
    """Whether a value of a row is a number that calculations can take."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False

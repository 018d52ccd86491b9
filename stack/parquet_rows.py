"""A program that writes the rows of a Parquet file as JSON Lines, with bounded memory.

`stack/dataset_files.py` runs it in a process of its own: a small Parquet file can declare billions of rows, or repeat
one value of megabytes as often, and what its decoder takes is not known before it has taken it. The file is the open
descriptor in its only argument; the settings are JSON on its input. It ends with REFUSED or TOO_LARGE, and the reason
as the last line of its error stream, or dies when its memory is used up.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, NoReturn

REFUSED = 3
TOO_LARGE = 4
MAX_FOOTER_BYTES = 16 * 2**20
MAX_CPU_S = 600
# What is decoded at once: with each batch comes all of its column's dictionary, so few rows would be slow.
BATCH_ROWS = 1_024
BATCH_BYTES = 8 * 2**20


def main(descriptor: int, settings: dict[str, Any]) -> None:
    """Writes the rows, or refuses the file."""
    most = settings["memory"]
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others reserve more than they use
    import pyarrow

    try:
        with os.fdopen(descriptor, "rb") as file:
            for line in _lines(file, settings):
                sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            os._exit(REFUSED)  # nobody reads on
        if isinstance(error, MemoryError):
            _end(REFUSED, f"the Parquet file cannot be read within {most} bytes of memory")
        _end(REFUSED, f"the file is not whole, or not Parquet: {str(error)[:300]}")


def _lines(file: Any, settings: dict[str, Any]) -> Iterator[bytes]:
    from pyarrow import parquet

    _check_footer(file)
    opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**16)
    _check_sizes(opened.metadata, settings)
    _check_schema(opened.schema_arrow, settings["columns"])
    leaves = (opened.schema.column(index) for index in range(opened.metadata.num_columns))
    texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
    # Repeated texts stay one text and numbers, so that they do not multiply.
    opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**16, read_dictionary=texts)
    number = 0
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // _row_bytes(opened.metadata)))
    for batch in opened.iter_batches(rows, columns=settings["columns"], use_threads=False):
        columns = [(name, _exact(batch.column(name))) for name in settings["columns"]]
        for index in range(batch.num_rows):
            number += 1
            row = {name: _plain(column[index].as_py()) for name, column in columns}
            line = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
            if len(line) >= settings["most_row_bytes"]:
                _end(REFUSED, f"row {number} has more than {settings['most_row_bytes']} bytes")
            yield line + b"\n"


def _row_bytes(metadata: Any) -> int:
    """What a row has on average, by what the file declares."""
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return int(max(1, size // max(1, metadata.num_rows)))


def _check_footer(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    if size < 12 or tail[4:] != b"PAR1":
        _end(REFUSED, "the file is not whole, or not Parquet: it does not end with PAR1")
    footer = int.from_bytes(tail[:4], "little")
    if footer > MAX_FOOTER_BYTES:
        _end(REFUSED, f"the footer of the Parquet file has {footer} bytes; allowed: {MAX_FOOTER_BYTES}")
    file.seek(0)


def _check_sizes(metadata: Any, settings: dict[str, Any]) -> None:
    """What the file declares; that it lies costs it its memory later."""
    most = settings["most"]
    if metadata.num_columns > settings["most_columns"]:
        _end(REFUSED, f"the file has {metadata.num_columns} columns; allowed: {settings['most_columns']}")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if min([metadata.num_rows, *(group.num_rows for group in groups)]) < 0:
        _end(REFUSED, "the Parquet file declares less than no rows")
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    if rows * 2 > most:  # a row has two bytes at least
        _end(TOO_LARGE, f"the Parquet file declares {rows} rows; allowed: {most // 2}")
    size = sum(group.total_byte_size for group in groups)
    if size > most:
        _end(TOO_LARGE, f"the content has {size} bytes when it is unpacked; allowed: {most}")
    values = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
    if values > most:
        _end(TOO_LARGE, f"the Parquet file declares {values} values; allowed: {most}")


def _check_schema(schema: Any, names: list[str]) -> None:
    """Refuses columns that are not there or that no row can hold."""
    for name in names:
        if schema.names.count(name) != 1:
            problem = "has twice" if name in schema.names else "lacks"
            shown = ", ".join(one[:100] for one in schema.names[:20]) or "none"
            _end(REFUSED, f"the file {problem} the declared column {name!r}; it has: {shown}")
        field = schema.field(name)
        wrong = _unreadable(field.type)
        if wrong is not None:
            allowed = "null, booleans, numbers, texts, dates and times, and lists, structs and maps of them"
            _end(REFUSED, f"the column {name!r} is of Parquet's type {wrong}; allowed: {allowed}")


def _unreadable(kind: Any) -> str | None:
    """The part of a type that no row can hold."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _unreadable(kind.value_type)
    if types.is_map(kind):
        return _unreadable(kind.key_type) or _unreadable(kind.item_type)
    if types.is_struct(kind):
        parts = (_unreadable(kind.field(index).type) for index in range(kind.num_fields))
        return next((part for part in parts if part is not None), None)
    if types.is_dictionary(kind):
        return _unreadable(kind.value_type)
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    texts = types.is_string(kind) or types.is_large_string(kind)
    times = types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind)
    return None if numbers or texts or times or types.is_boolean(kind) or types.is_null(kind) else str(kind)[:100]


def _exact(column: Any) -> Any:
    """Nanoseconds, which Python's times do not have, are cut off."""
    import pyarrow

    if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    return column


def _plain(value: Any) -> Any:
    """A value as JSON has it. A field of a struct that is null is one that is not there."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return value


def _end(status: int, reason: str) -> NoReturn:
    sys.stderr.write(f"{' '.join(reason.split())}\n")
    sys.stderr.flush()
    sys.stdout.buffer.flush()
    os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.load(sys.stdin))

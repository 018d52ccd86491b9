"""Data sets for jobs, as sources of Ray Data.

They are read as `stack/datasets.py` does, a row at a time, and have the content that was checked, or end with Conflict.
"""

import json
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow
import ray.data
from ray.data.block import Block, BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

from stack import datasets
from stack.config import Config
from stack.context import Context
from stack.datasets import Shape

# What one block holds at most.
BLOCK_ROWS = 1_000
BLOCK_BYTES = 4 * 2**20
SCHEMA = pyarrow.schema([("row", pyarrow.int64()), ("value", pyarrow.string())])

# How what a shape makes of a row becomes several rows.
Split = Callable[[Any], Iterable[Any]]


def rows(
    context: Context,
    checked: datasets.Checked,
    shape: Shape[Any],
    but: Container[int] = frozenset(),
    split: Split | None = None,
) -> ray.data.Dataset:
    """The rows of a data set, or their parts, as a Dataset of Ray Data, but for those of these numbers.

    Its columns are `row`, from 1, and `value`, what the shape makes of the row, as JSON. Reading takes no CPU of its
    own: it is faster than what is done with the rows.
    """
    source = Rows(context, checked, shape, but, split)
    found: ray.data.Dataset = ray.data.read_datasource(source, num_cpus=0, override_num_blocks=1)
    return found


class InOrder(Datasource):
    """One task that reads what it is given in blocks of SCHEMA, so that it never holds more than one of them."""

    def __init__(self, read: Callable[[], Iterable[Block]], size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read
        self._bytes = size

    def estimate_inmemory_data_size(self) -> int:
        return self._bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One, whatever the parallelism is: a file is read from its start to its end."""
        about = BlockMetadata(num_rows=None, size_bytes=self._bytes, exec_stats=None, input_files=None)
        return [ReadTask(self._read, about, schema=SCHEMA, per_task_row_limit=per_task_row_limit)]


class Rows(InOrder):
    """The rows of a data set."""

    def __init__(
        self,
        context: Context,
        checked: datasets.Checked,
        shape: Shape[Any],
        but: Container[int] = frozenset(),
        split: Split | None = None,
    ) -> None:
        config = context.config.model_dump(mode="json")
        super().__init__(partial(_blocks, config, context.tenant, checked, shape, but, split), checked.bytes)


def numbered(
    context: Context, checked: datasets.Checked, shape: Shape[Any], split: Split | None
) -> Iterator[tuple[int, Any]]:
    """The rows as their shape has them, with their numbers; or the parts of all rows, which are numbered through."""
    read = datasets.read_as(context, checked, shape)
    return read if split is None else enumerate((part for _, value in read for part in split(value)), 1)


def _blocks(
    config: dict[str, Any],
    tenant: str,
    checked: datasets.Checked,
    shape: Shape[Any],
    but: Container[int],
    split: Split | None,
) -> Iterator[Block]:
    # Closed however the reading ends: the worker lives on.
    with closing(Context.open(Config.parse(config, "config"))) as context:
        values = numbered(context.of_tenant(tenant), checked, shape, split)
        yield from blocks_of(((number, json.dumps(asdict(value))) for number, value in values if number not in but))


def blocks_of(values: Iterable[tuple[int, str]]) -> Iterator[Block]:
    """Rows, by their numbers, in blocks of a bounded size."""
    read: list[dict[str, Any]] = []
    size = 0
    for number, text in values:
        read.append({"row": number, "value": text})
        size += len(text)
        if len(read) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield pyarrow.Table.from_pylist(read, SCHEMA)
            read, size = [], 0
    if read:
        yield pyarrow.Table.from_pylist(read, SCHEMA)

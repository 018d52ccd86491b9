"""Data sets for jobs: as a source of Ray Data, and as rows on disk for trainers.

Both read as `stack/datasets.py` does, a row at a time, and find the content that was checked, or end with Conflict.
"""

import json
from collections.abc import Iterator
from contextlib import closing
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

# What one block holds at most.
BLOCK_ROWS = 1_000
BLOCK_BYTES = 4 * 2**20
QUESTIONS = pyarrow.schema([("row", pyarrow.int64()), ("messages", pyarrow.string()), ("expected", pyarrow.string())])


def questions(context: Context, checked: datasets.Checked, but: frozenset[int]) -> ray.data.Dataset:
    """The examples of a data set as a Dataset of Ray Data, but for the rows of these numbers.

    Its columns are `row`, from 1, `messages`, as JSON, and `expected`. Reading takes no CPU of its own: it is slower to
    answer the questions than to read them.
    """
    source = Examples(context, checked, but)
    found: ray.data.Dataset = ray.data.read_datasource(source, num_cpus=0, override_num_blocks=1)
    return found


class Examples(Datasource):
    """One task that reads the examples of a data set in blocks, so that it never holds more than one of them."""

    def __init__(self, context: Context, checked: datasets.Checked, but: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = partial(_blocks, context.config.model_dump(mode="json"), context.tenant, checked, but)
        self._bytes = checked.bytes

    def estimate_inmemory_data_size(self) -> int:
        return self._bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One, whatever the parallelism is: a file is read from its start to its end."""
        about = BlockMetadata(num_rows=None, size_bytes=self._bytes, exec_stats=None, input_files=None)
        return [ReadTask(self._read, about, schema=QUESTIONS, per_task_row_limit=per_task_row_limit)]


def _blocks(config: dict[str, Any], tenant: str, checked: datasets.Checked, but: frozenset[int]) -> Iterator[Block]:
    # Closed however the reading ends: the worker lives on.
    with closing(Context.open(Config.parse(config, "config"))) as context:
        yield from _read_blocks(context.of_tenant(tenant), checked, but)


def _read_blocks(context: Context, checked: datasets.Checked, but: frozenset[int]) -> Iterator[Block]:
    rows: list[dict[str, Any]] = []
    size = 0
    for number, example in enumerate(datasets.examples(context, checked), start=1):
        if number in but:
            continue
        messages = json.dumps(example.messages)
        rows.append({"row": number, "messages": messages, "expected": example.answer})
        size += len(messages) + len(example.answer)
        if len(rows) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield pyarrow.Table.from_pylist(rows, QUESTIONS)
            rows, size = [], 0
    if rows:
        yield pyarrow.Table.from_pylist(rows, QUESTIONS)


def on_disk(context: Context, checked: datasets.Checked, folder: str) -> Any:
    """The examples of a data set as TRL takes them, in a file in this folder, which is mapped into memory.

    They are read through before anything is made of them, so that what is wrong is raised as it is.
    """
    from datasets import Dataset, Features, Value, disable_progress_bars

    disable_progress_bars()  # which would fill the job's log
    fields = {"role": Value("string"), "content": Value("string")}
    for example in datasets.examples(context, checked):
        for message in example.messages:
            fields |= {name: Value("string") for name in message if name not in fields}

    def rows() -> Iterator[dict[str, Any]]:
        for example in datasets.examples(context, checked):
            yield {"prompt": example.messages, "completion": [{"role": "assistant", "content": example.answer}]}

    return Dataset.from_generator(
        rows,
        features=Features({"prompt": [fields], "completion": [{"role": Value("string"), "content": Value("string")}]}),
        cache_dir=folder,
        fingerprint=checked.sha256,  # otherwise the function is hashed, with all that it refers to
    )

"""Documents of memory banks for jobs, as sources of Ray Data.

A bank changes, so a job works on a copy of the documents that it had when the job began, each as it was when its turn
came: a file of JSON Lines in the job's folder, `{"row": 1, "value": {…}}` each, from which a next attempt goes on. A
line may have an `error` instead: why there is nothing to ask about.
"""

import json
from collections.abc import AsyncIterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data.block import Block
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.dataset_source import InOrder, blocks_of
from jobs.row_log import RowLog, RowNumbers, lines_of


async def copy(file: Path, rows: AsyncIterable[dict[str, Any]]) -> int:
    """Writes the rows that a job is about, each with a `value` or an `error` too, unless an earlier attempt has.

    How many there are.
    """
    if not file.exists():
        new = file.with_suffix(".new")
        with new.open("w") as lines:
            number = 0
            async for row in rows:
                number += 1
                lines.write(json.dumps({"row": number, **row}) + "\n")
        new.replace(file)
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def note_errors(file: Path, log: RowLog) -> None:
    """Adds the rows of a copy that have an error to a log."""
    failed = (line for line in lines_of(file) if line.get("error") is not None and line["row"] not in log.rows)
    log.add({**line, "result": None} for line in failed)


def rows(file: Path, but: RowNumbers) -> ray.data.Dataset:
    """The rows of a copy as jobs/dataset_source.py has them, but for those of these numbers. Read where the copy is."""
    if not ray.is_initialized():
        ray.init()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    found: ray.data.Dataset = ray.data.read_datasource(
        Copied(file, but), num_cpus=0, override_num_blocks=1, ray_remote_args={"scheduling_strategy": here}
    )
    return found


class Copied(InOrder):
    """The rows of a copy."""

    def __init__(self, file: Path, but: RowNumbers) -> None:
        super().__init__(partial(_blocks, file, but), file.stat().st_size)


def _blocks(file: Path, but: RowNumbers) -> Iterator[Block]:
    given = (line for line in lines_of(file) if line.get("error") is None and line["row"] not in but)
    return blocks_of((line["row"], json.dumps(line["value"])) for line in given)

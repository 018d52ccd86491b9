"""The prompts that a job grows from its seeds, before any of them is answered.

They are asked for by the driver itself, as each round needs the one before; what a round has brought is a line in the
job's folder, so that a next attempt goes on from there.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.data

from jobs import driver
from jobs.asking import patiently
from jobs.row_log import RowLog, RowNumbers, cut, lines_of, write_rows
from stack import made_datasets, self_instruct
from stack.api.messages import StopReason, UserMessage
from stack.api.synthetic_data_generation import SyntheticDataJobRequest
from stack.batch_inference import PatientEngine
from stack.errors import BadInput, StackError, TooManyRequests, Unavailable
from stack.self_instruct import Grown, Said
from stack.synthetic_data_generation import Sampler


def grow(work: driver.Work, request: SyntheticDataJobRequest, log: RowLog) -> Path:
    """The file with all that the model has proposed: `num_prompts` prompts, or as many as it has come to.

    The log of the answers to them notes for how long was worked. Raises BadInput where not one was of use.
    """
    file = work.folder / "prompts.jsonl"
    error: StackError | None = None
    cut(file)
    if sum(1 for _ in prompts(file)) < request.num_prompts:
        if not ray.is_initialized():
            ray.init()
        error = asyncio.run(_grow(work, request, log, file))
    count = sum(1 for _ in prompts(file))
    if not count:
        raise BadInput(
            f"the model {request.model!r} has proposed no prompt of use: each was unfinished, of less than "
            f"{self_instruct.MIN_WORDS} or more than {self_instruct.MAX_WORDS} words, or like one that is there"
            + (f"; the last question that failed: {error.message}" if error else "")
        )
    if count < request.num_prompts:
        print(f"nothing new came any more: {count} of {request.num_prompts} prompts")
    return file


def prompts(file: Path) -> Iterator[str]:
    """The prompts that were grown, in their order."""
    return (line["prompt"] for line in lines_of(file) if line["reason"] is None)


def publish(file: Path, to: Path) -> str:
    """Writes the prompts that were grown to a file, with the ids of their rows. Its hash."""
    write_rows(to, ({"id": str(number), "prompt": prompt} for number, prompt in enumerate(prompts(file), 1)))
    return made_datasets.sha256(to)


def dropped(file: Path) -> Iterator[Grown]:
    """What was proposed and dropped."""
    return (Grown(**line) for line in lines_of(file) if line["reason"] is not None)


def rows(file: Path, but: RowNumbers) -> ray.data.Dataset:
    """The prompts as rows of Ray Data, as jobs/dataset_source.py has them, but for those of these numbers."""
    left = [row for row in _rows(file) if row["row"] not in but]
    found: ray.data.Dataset = ray.data.from_items(left, override_num_blocks=1)
    return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for number, prompt in enumerate(prompts(file), 1):
        value = {"id": str(number), "dialog": [{"role": "user", "content": prompt}]}
        yield {"row": number, "value": json.dumps(value)}


async def _grow(work: driver.Work, request: SyntheticDataJobRequest, log: RowLog, file: Path) -> StackError | None:
    """Grows prompts into a file. Returns the error of the last question that failed: it costs no more than itself.

    Raises Unavailable where the model stays away.
    """
    context = replace(work.context, engine=PatientEngine(work.context.engine))
    sampler = Sampler(context, request.model_copy(update={"num_generations": 1}))
    known = list(prompts(file))
    # What is proposed by an attempt that goes on has other seeds than what was proposed before.
    begun = sum(1 for _ in lines_of(file))
    failed: StackError | None = None

    async def ask(number: int, question: str) -> Said:
        nonlocal failed
        try:
            # Below 0, so that the seeds are not those of the answers to the prompts.
            (answer,) = await patiently(lambda: sampler.answers(-1 - begun - number, [UserMessage(content=question)]))
        except (Unavailable, TooManyRequests) as error:
            raise Unavailable(error.message) from error
        except StackError as error:
            failed = error
            return Said("")
        return Said(str(answer.message.content), answer.message.stop_reason != StopReason.out_of_tokens)

    rounds = self_instruct.grow(
        ask, request.seed_prompts or (), known, request.num_prompts, request.max_similarity, request.seed
    )
    count = len(known)
    async with aclosing(rounds) as found:
        async for proposed in found:
            with file.open("a") as lines:
                lines.writelines(json.dumps(asdict(one)) + "\n" for one in proposed)
            log.note_time()
            count += sum(one.reason is None for one in proposed)
            print(f"{count} of {request.num_prompts} prompts grown", flush=True)
            work.reporter.metrics.progress(count, request.num_prompts, "prompts", None)
    return failed

"""Workers of Ray Data that ask served models about the rows of a batch, side by side.

The models answer them as they answer users: behind their shields. A row is asked again while a model is away or fails;
what is wrong with the row itself is recorded in its place, in the column `error`, until too many rows have failed.
"""

import asyncio
import json
from asyncio import sleep as pause
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import ray.data

from stack import jobs
from stack.batch_inference import PatientEngine
from stack.config import Config
from stack.context import Context
from stack.errors import EngineFailed, StackError, TooManyRequests, Unavailable

# How many rows one worker asks about at once; the engine batches them.
BATCH_SIZE = 32
# How much comes together before a worker hands it on. A job that is lost has lost no more than that.
BLOCK_BYTES = 2**16
# How often a row is asked while a model cannot answer for the moment, and while it fails.
TRIES = 6
TRIES_OF_FAILED = 3
T = TypeVar("T")


@dataclass
class Failures:
    """The rows of a job that have failed: at most so many may. `first` is the first one's error."""

    most: int
    count: int = 0
    first: str | None = None

    def add(self, row: int, error: StackError) -> None:
        """Notes a row that has failed. Raises an error of the same kind where it is one too many."""
        self.count += 1
        self.first = self.first or f"row {row}: {error.message}"
        if self.count > self.most:
            many = f"{self.count} rows have failed; allowed: max_failed_rows, {self.most}; the first of them: "
            raise type(error)((many if self.most else "") + self.first) from error


class Asker:
    """A worker that asks about rows. What it adds to them are the columns that `ask` returns, and `error`.

    `error` is empty or, in JSON, the `code`, `message`, `type` and `param` of why the row has failed; then the row has
    what is in `nothing`.
    """

    nothing: ClassVar[dict[str, Any]] = {"result": ""}

    def __init__(self, config: dict[str, Any], tenant: str, failures: Failures) -> None:
        context = Context.open(Config.parse(config, "config")).of_tenant(tenant)
        self._context = replace(context, engine=PatientEngine(context.engine))
        self._failures = failures

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        """What comes of a row, by its number and its value: the same columns for each. Raises StackError."""
        raise NotImplementedError

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        pairs = zip(batch["row"], batch["value"], strict=True)
        found = await asyncio.gather(*(self._outcome(int(row), json.loads(value)) for row, value in pairs))
        yield dict(batch) | {name: [one[name] for one in found] for name in found[0]}

    async def _outcome(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        try:
            return await patiently(lambda: self.ask(row, value)) | {"error": ""}
        except Unavailable as error:  # no fault of the row: another attempt may go well
            raise Unavailable(f"row {row}: {error.message}") from error
        except TooManyRequests as error:
            raise Unavailable(f"row {row}: {error.message}") from error
        except StackError as error:
            self._failures.add(row, error)
            told = {"code": error.code, "message": error.message, "type": error.type, "param": error.param}
            return self.nothing | {"error": json.dumps(told)}


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What is answered at last: asked again while a model is away (TRIES times) or fails (TRIES_OF_FAILED times)."""
    for tries in range(1, TRIES):
        try:
            return await ask()
        except (Unavailable, TooManyRequests) as error:  # a replica is being replaced, say
            await pause(error.retry_after or 1)
        except EngineFailed:
            if tries >= TRIES_OF_FAILED:
                raise
            await pause(1)
    return await ask()


def asked(read: Callable[[], ray.data.Dataset], asker: type[Asker], *arguments: Any) -> Iterator[dict[str, Any]]:
    """The rows that `read` gives, as one worker answers them, which is made with these arguments: as they come, a few
    blocks at a time."""
    ray.data.DataContext.get_current().target_max_block_size = BLOCK_BYTES
    answered = read().map_batches(
        asker, fn_constructor_args=arguments, batch_size=BATCH_SIZE, concurrency=1, num_cpus=jobs.ASKER_CPUS
    )
    for row in answered.iter_rows():
        yield {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}

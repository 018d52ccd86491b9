"""Workers of Ray Data that ask models about the rows of a batch, side by side: served ones, or by an own engine.

The models answer them as they answer users: behind their shields. A row is asked again while a model is away or fails.
What is wrong with the row itself is recorded in its place, in the column `error`. So is that a row breaks its model, or
is never answered in time: while others are answered, the model is there. Where it stays away for all, the rows that are
left have the reason in the column `away`. It is not raised: with an error Ray Data would lose those that are answered.
"""

import asyncio
import json
from asyncio import sleep as pause
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import ray.data
from pydantic import ValidationError

from jobs.own_engine import EngineDied, OwnEngine, room_for
from stack import jobs
from stack.api.wire import describe
from stack.batch_inference import PatientEngine
from stack.config import Config, LanguageModel
from stack.context import Context
from stack.errors import BadInput, EngineFailed, StackError, TooManyRequests, Unavailable

# How many rows a batch has, how many blocks a worker takes at once, so that it need not wait for the slowest row of
# each, and how many rows it asks about at once; the engine batches them.
BATCH_SIZE = 32
BLOCKS_AT_ONCE = 4
ROWS_AT_ONCE = 128
# How much comes together before a worker hands it on: about a batch of short rows. A job that is lost has lost no more
# than that, and its progress is seen as often.
BLOCK_BYTES = 2**13
# How often a row is asked while a model cannot answer for the moment, and while it fails.
TRIES = 6
TRIES_OF_FAILED = 3
T = TypeVar("T")
# Rows by their numbers, and what has come of them.
Rows = dict[int, dict[str, Any]]
Outcomes = dict[int, dict[str, Any] | Unavailable]


class Asker:
    """A worker that asks about rows. What it adds to them are the columns that `ask` returns, `error` and `away`.

    `error` is empty or, in JSON, the `code`, `message`, `type` and `param` of why the row has failed. `away` is empty
    or says why a model has not answered, for which the row is not to blame. In both cases the row has what is in
    `nothing`. `harmless` is a value that the models can answer when they are there at all. The worker asks the model
    `own` by an engine of its own (jobs/own_engine.py).
    """

    nothing: ClassVar[dict[str, Any]] = {"result": ""}
    harmless: ClassVar[dict[str, Any]]

    def __init__(self, config: dict[str, Any], tenant: str, own: LanguageModel | None = None) -> None:
        context = Context.open(Config.parse(config, "config")).of_tenant(tenant)
        engine = context.engine if own is None else OwnEngine(own, context.config.artifacts_url, context.engine)
        self._context = replace(context, engine=PatientEngine(engine))
        self._slots = asyncio.Semaphore(ROWS_AT_ONCE)
        self._turn = asyncio.Lock()
        self._gone: Unavailable | None = None

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        """What comes of a row, by its number and its value: the same columns for each.

        It asks each model `patiently`. Raises StackError, and ValidationError where a row is over a request's bounds.
        """
        raise NotImplementedError

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        pairs = zip(batch["row"], batch["value"], strict=True)
        rows: Rows = {int(row): json.loads(value) for row, value in pairs}
        found = await self._outcomes(rows)
        if unanswered := _unanswered(rows, found):
            found |= await self._once_more(unanswered)
        told = [self._told(found[row]) for row in rows]
        yield dict(batch) | {name: [one[name] for one in told] for name in told[0]}

    async def _outcomes(self, rows: Rows) -> Outcomes:
        return dict(zip(rows, await asyncio.gather(*(self._outcome(*one) for one in rows.items())), strict=True))

    async def _outcome(self, row: int, value: dict[str, Any]) -> dict[str, Any] | Unavailable:
        """The columns of a row; Unavailable where a model was away as often as it was asked."""
        try:
            async with self._slots:
                if self._gone is not None:
                    return self._gone
                return await self.ask(row, value) | {"error": ""}
        except (Unavailable, TooManyRequests) as error:
            return Unavailable(error.message, param=error.param)
        except ValidationError as error:
            return self._failed(BadInput(describe(error)))
        except StackError as error:
            return self._failed(error)

    async def _once_more(self, rows: Rows) -> Outcomes:
        """What comes of rows for which a model was away, when it is there: while no other such rows are asked, all
        together, as mostly none of them is to blame; then each alone, as one may have brought down the model for all.

        Those for which it is away again have no outcome but that, if it is away for what is harmless, too: another
        attempt may go well. Otherwise it is the row's own fault.
        """
        async with self._turn:
            if not await self._is_there():
                return {}
            found = await self._outcomes(rows)
            unanswered = _unanswered(rows, found)
            if not unanswered or not await self._is_there():
                return found
            for row, value in unanswered.items():
                outcome = await self._outcome(row, value)
                if isinstance(outcome, Unavailable):
                    if not await self._is_there():
                        break
                    outcome = self._failed(outcome)
                found[row] = outcome
            return found

    async def _is_there(self) -> bool:
        """Whether the models answer what is harmless. If not, nothing more is asked: the attempt is lost."""
        found = await self._outcome(0, self.harmless)
        if isinstance(found, Unavailable):
            self._gone = found
        return self._gone is None

    def _told(self, outcome: dict[str, Any] | Unavailable) -> dict[str, Any]:
        if isinstance(outcome, Unavailable):
            return self.nothing | {"error": "", "away": outcome.message}
        return outcome | {"away": ""}

    def _failed(self, error: StackError) -> dict[str, Any]:
        told = {"code": error.code, "message": error.message, "type": error.type, "param": error.param}
        return self.nothing | {"error": json.dumps(told)}


def _unanswered(rows: Rows, found: Outcomes) -> Rows:
    return {row: value for row, value in rows.items() if isinstance(found[row], Unavailable)}


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What is answered at last: asked again while a model is away (TRIES times) or fails (TRIES_OF_FAILED times).

    An engine of the job's own that has died is not asked again: it takes long to start another one, which may die of
    the same.
    """
    for tries in range(1, TRIES):
        try:
            return await ask()
        except EngineDied:
            raise
        except (Unavailable, TooManyRequests) as error:  # a replica is being replaced, say
            await pause(error.retry_after or 1)
        except EngineFailed:
            if tries >= TRIES_OF_FAILED:
                raise
            await pause(1)
    return await ask()


def asked(
    read: Callable[[], ray.data.Dataset], asker: type[Asker], *arguments: Any, own: LanguageModel | None = None
) -> Generator[dict[str, Any]]:
    """The rows that `read` gives, as one worker answers them, which is made with these arguments and with `own`: as
    they come, a few blocks at a time."""
    settings = ray.data.DataContext.get_current()
    settings.target_max_block_size = BLOCK_BYTES
    # What a worker raises comes as it is: Ray Data's own error would not tell what it was.
    settings.raise_original_map_exception = True
    one = ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=BLOCKS_AT_ONCE)
    with room_for(own) as options:
        answered = read().map_batches(
            asker,
            fn_constructor_args=arguments,
            fn_constructor_kwargs={"own": own},
            batch_size=BATCH_SIZE,
            compute=one,
            num_cpus=jobs.ASKER_CPUS,
            **options,
        )
        for row in answered.iter_rows():
            yield {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}

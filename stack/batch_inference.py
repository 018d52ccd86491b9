"""Many chats or texts at once: all rows go to the engine together, which batches them; each is answered or fails alone.

What is wrong with the whole request (its model, its sampling, its tools) is raised. So is what keeps every row from an
answer but will pass, such as an engine that does not answer: asking again may help. All else is told row by row.
"""

import asyncio
from asyncio import sleep as pause
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from stack import inference
from stack.api.batch_inference import (
    BatchChatCompletionRequest,
    BatchChatCompletionResponse,
    BatchCompletionRequest,
    BatchCompletionResponse,
    RefusedRow,
    RowError,
    RowErrorDetails,
)
from stack.api.inference import ChatCompletionRequest, ChatCompletionResponse, CompletionRequest, CompletionResponse
from stack.api.messages import CompletionMessage, StopReason
from stack.config import SequenceClassifier
from stack.context import Context
from stack.errors import BadInput, StackError, TooManyRequests
from stack.models import Classifiable, Endpoint, Engine, Model, Scores

# How many rows of a batch are with the engine at once, so that there is room for others in its queue.
AT_ONCE = 64
# How long a row waits for room in the engine's queue.
PATIENCE_S = 60

Answer = ChatCompletionResponse | CompletionResponse
Ask = Callable[[Any], Awaitable[Answer]]


async def chat_completion(context: Context, request: BatchChatCompletionRequest) -> BatchChatCompletionResponse:
    """The model's answers to conversations, in their order.

    Raises as `inference.chat_completion` does for what is wrong with all rows.
    """
    shared = {name: getattr(request, name) for name in type(request).model_fields if name != "messages_batch"}
    patient = replace(context, engine=PatientEngine(context.engine))

    async def ask(row: Any) -> ChatCompletionResponse:
        return await inference.chat_completion(patient, ChatCompletionRequest(messages=row, **shared))

    await context.models.find(request.model)
    outcomes = await _ask_all(request.messages_batch, ask, "messages", request)
    return BatchChatCompletionResponse(**_told(outcomes, request.logprobs is not None))


async def completion(context: Context, request: BatchCompletionRequest) -> BatchCompletionResponse:
    """The continuations of texts, in their order. Raises as `chat_completion` does."""
    shared = {name: getattr(request, name) for name in type(request).model_fields if name != "content_batch"}
    patient = replace(context, engine=PatientEngine(context.engine))

    async def ask(row: Any) -> CompletionResponse:
        return await inference.completion(patient, CompletionRequest(content=row, **shared))

    await context.models.find(request.model)
    outcomes = await _ask_all(request.content_batch, ask, "content", request)
    return BatchCompletionResponse(**_told(outcomes, request.logprobs is not None))


async def _ask_all(
    rows: Sequence[Any], ask: Ask, field: str, request: BatchChatCompletionRequest | BatchCompletionRequest
) -> list[Answer | StackError]:
    """The answer or error of each row. Whoever leaves takes all of them along."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def outcome(index: int, row: Any) -> Answer | StackError:
        if isinstance(row, RefusedRow):
            return BadInput(row.problem, param=_place(field, index, row.place))
        try:
            async with slots:
                return await ask(row)
        except StackError as error:
            first, _, rest = (error.param or "").partition(".")
            if first in type(request).model_fields:  # it is wrong in all rows alike
                raise
            if first == field:
                error.param = _place(field, index, rest)
            return error

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(index, row)) for index, row in enumerate(rows)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    outcomes = [task.result() for task in tasks]
    _require_not_all_in_vain(outcomes)
    return outcomes


class PatientEngine:
    """An engine that is asked again while its queue is full: the engine alone, as what a row holds was fetched once.

    So are the classifiers of the shields that a row passes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.embed = engine.embed

    async def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        waited = 0
        while True:
            try:
                async with aclosing(self._engine.generate(model, endpoint, body)) as items:
                    async for item in items:
                        yield item
                return
            except TooManyRequests as error:
                seconds = _more_patience(waited, error)
            waited += seconds
            await pause(seconds)

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        waited = 0
        while True:
            try:
                return await self._engine.classify(model, inputs, windows)
            except TooManyRequests as error:
                seconds = _more_patience(waited, error)
            waited += seconds
            await pause(seconds)


def _more_patience(waited: int, error: TooManyRequests) -> int:
    """For how many more seconds to wait. Raises the error where there is no patience left."""
    seconds = error.retry_after or 1
    if waited + seconds > PATIENCE_S:
        raise error
    return seconds


def _require_not_all_in_vain(outcomes: list[Answer | StackError]) -> None:
    """Raises what keeps every row from an answer, if it will pass or is a fault of ours."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, StackError)]
    passing = [error for error in errors if error.status == 429 or error.status >= 500]
    if len(passing) == len(outcomes):
        raise passing[0]


def _place(field: str, index: int, rest: str) -> str:
    return f"{field}_batch.{index}" + (f".{rest}" if rest else "")


def _told(outcomes: list[Answer | StackError], wants_logprobs: bool) -> dict[str, Any]:
    """Outcomes in the shape of a response."""
    errors = [
        RowError(index=index, error=RowErrorDetails(code=one.code, message=one.message, type=one.type, param=one.param))
        for index, one in enumerate(outcomes)
        if isinstance(one, StackError)
    ]
    messages = [_nothing() if isinstance(one, StackError) else one.completion_message for one in outcomes]
    told: dict[str, Any] = dict(completion_message_batch=messages, errors=errors)
    if wants_logprobs:
        told["logprobs_batch"] = [None if isinstance(one, StackError) else one.logprobs for one in outcomes]
    return told


def _nothing() -> CompletionMessage:
    """What stands in the place of an answer. Its stop reason is not that of a whole one."""
    return CompletionMessage(content="", stop_reason=StopReason.out_of_tokens)

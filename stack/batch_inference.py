"""Many chats or texts at once: all rows go to the engine together, which batches them; each is answered or fails alone.

What is wrong with the whole request (its model, its sampling, its tools) is raised. So is what keeps every row from an
answer but will pass, such as an engine that does not answer: asking again may help. All else is told row by row.
"""

import asyncio
from asyncio import sleep as pause
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from stack import datasets, engines, inference, jobs, made_datasets, prompt_rows, quotas
from stack.api.batch_inference import (
    BatchChatCompletionRequest,
    BatchChatCompletionResponse,
    BatchCompletionRequest,
    BatchCompletionResponse,
    BatchInferenceJobArtifactsResponse,
    BatchInferenceJobEntry,
    BatchInferenceJobRequest,
    BatchInferenceJobStatusResponse,
    BatchKind,
    RefusedRow,
    RowError,
    RowErrorDetails,
)
from stack.api.inference import ChatCompletionRequest, ChatCompletionResponse, CompletionRequest, CompletionResponse
from stack.api.jobs import ArtifactFile, JobEngine, JobStatus
from stack.api.messages import CompletionMessage, StopReason
from stack.config import EmbeddingModel, LanguageModel, SequenceClassifier
from stack.context import Context
from stack.datasets import Shape, Size
from stack.errors import BadInput, StackError, TooManyRequests
from stack.inference import sampling_body
from stack.models import Classifiable, Embeddable, Embeddings, Endpoint, Engine, Model, Scores
from stack.store import Job

KINDS = (jobs.BATCH_INFERENCE,)
# About how many bytes a token has, the probability of one, a number of a vector, and what stands beside an answer in a
# row.
TOKEN_BYTES, LOGPROB_BYTES, NUMBER_BYTES, RESULT_BYTES = 6, 40, 21, 512
# How many numbers a vector is taken to have where the config does not say it.
DIMENSIONS = 1_024
# How many rows of a batch are with the engine at once, so that there is room for others in its queue.
AT_ONCE = 64
# How long a row waits for room in the engine's queue.
PATIENCE_S = 60

Answer = ChatCompletionResponse | CompletionResponse
Ask = Callable[[Any], Awaitable[Answer]]
T = TypeVar("T")


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


def submit(context: Context, request: BatchInferenceJobRequest, submission_id: str | None = None) -> Job:
    """Accepts a batch of any size.

    Raises BadInput for data of other columns, or with two rows of the same id, NotFound, Conflict where data sets of
    these names are there already, or another job is going to make them, and StorageFull.
    """
    known = context.store.jobs.get(context.tenant, request.job_uuid)
    if known is not None:
        request, bundles = datasets.as_accepted(request, known.request), known.bundles
    else:
        _require_model(context, request)
        made_datasets.require_free(context, jobs.BATCH_INFERENCE, request.model_dump(mode="json"), "job_uuid")
        request, found = datasets.accept(context, request, shape_of(request))
        _require_room(context, request, [datasets.size(context, one) for one in found])
        bundles = engines.bundles_of_job(own_model(context, request))
    return jobs.submit(
        context, jobs.BATCH_INFERENCE, request.job_uuid, request, bundles=bundles, submission_id=submission_id
    )


def resources(context: Context, request: BatchInferenceJobRequest) -> dict[str, Any]:
    """What a batch that starts takes beside the model that serves.

    Raises StorageFull where there is no room for it, and Conflict where another data set has its name by now.
    """
    made_datasets.require_still_free(context, jobs.BATCH_INFERENCE, request.model_dump(mode="json"))
    _require_room(context, request, datasets.sizes_before_reading(context, request))
    return engines.resources_of_job(own_model(context, request))


def own_model(context: Context, request: BatchInferenceJobRequest) -> LanguageModel | None:
    """The model that a batch has an engine of its own of, if it has one. Raises NotFound."""
    return context.models.get(request.model).base if request.engine == JobEngine.own else None


def list_jobs(
    context: Context, kind: str | None, status: JobStatus | None, after: str | None, limit: int
) -> list[BatchInferenceJobEntry]:
    """Batches, newest first."""
    return [BatchInferenceJobEntry(**jobs.entry(job)) for job in jobs.page(context, KINDS, kind, status, after, limit)]


def job_status(context: Context, job_uuid: str) -> BatchInferenceJobStatusResponse:
    """How far a batch is. Raises NotFound."""
    return BatchInferenceJobStatusResponse(**jobs.state(context, jobs.get(context, job_uuid, KINDS)))


def job_artifacts(context: Context, job_uuid: str) -> BatchInferenceJobArtifactsResponse:
    """The data sets and the files that a batch has made. Raises NotFound."""
    result = jobs.get(context, job_uuid, KINDS).result or {}
    return BatchInferenceJobArtifactsResponse(
        job_uuid=job_uuid,
        path=result.get("path"),
        files=[ArtifactFile(**file) for file in result.get("files", [])],
        datasets=result.get("datasets", {}),
    )


def shape_of(request: BatchInferenceJobRequest) -> Shape[Any]:
    """What the rows of a job's data set must be."""
    return prompt_rows.CHATS if request.kind == BatchKind.chat_completion else prompt_rows.TEXTS


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
    require_not_all_in_vain(outcomes)
    return outcomes


class PatientEngine:
    """An engine that is asked again while its queue is full: the engine alone, as what a row holds was fetched once.

    So are embedding models, reward models, and the classifiers of the shields that a row passes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

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

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:
        return await _when_there_is_room(lambda: self._engine.embed(model, texts, truncate))

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        return await _when_there_is_room(lambda: self._engine.classify(model, inputs, windows))


async def _when_there_is_room(ask: Callable[[], Awaitable[T]]) -> T:
    waited = 0
    while True:
        try:
            return await ask()
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


def require_not_all_in_vain(outcomes: Sequence[object]) -> None:
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


def _require_model(context: Context, request: BatchInferenceJobRequest) -> None:
    """Raises NotFound and BadInput for a model that cannot do what is asked, or sampling that none can do."""
    if request.kind == BatchKind.embeddings:
        context.models.get_embedding_model(request.model)
    else:
        context.models.get(request.model)
        sampling_body(request.sampling_params)


def _require_room(context: Context, request: BatchInferenceJobRequest, sizes: Sequence[Size]) -> None:
    """Raises StorageFull unless there is room for the answers: those that are kept, and all while the job works."""
    text, rows = sum(size.text for size in sizes), sum(size.rows for size in sizes)
    if request.kind == BatchKind.embeddings:
        answer = (context.models.get_embedding_model(request.model).dimensions or DIMENSIONS) * NUMBER_BYTES
    else:
        most = request.sampling_params.max_tokens or context.models.get(request.model).base.context
        answer = most * TOKEN_BYTES
        if request.logprobs is not None:
            answer += most * (request.logprobs.top_k + 1) * LOGPROB_BYTES
    kept = rows * (answer + RESULT_BYTES)
    work = jobs.work_folder(context.tenant, request.job_uuid)
    quotas.require_room_for_job(context, kept=kept, temporary=2 * (text + kept), work=work)

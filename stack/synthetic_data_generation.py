"""Synthetic data: generations that a served model samples, a reward model scores and a filter chooses from.

`generate` answers a bounded request at once; a job of any size does the same row by row, by way of Sampler
(jobs/generate_synthetic_data.py).
"""

import asyncio
import random
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from stack import datasets, engines, jobs, made_datasets, prompt_rows, quotas, reward_scoring
from stack.api.batch_inference import RowError, RowErrorDetails
from stack.api.inference import ChatCompletionRequest
from stack.api.jobs import ArtifactFile, JobEngine, JobStatus
from stack.api.messages import Message
from stack.api.reward_scoring import (
    DialogGenerations,
    RewardScoringRequest,
    ScoredDialogGenerations,
    ScoredMessage,
)
from stack.api.synthetic_data_generation import (
    GenerationSettings,
    PromptSource,
    SyntheticDataGenerationRequest,
    SyntheticDataGenerationResponse,
    SyntheticDataJobArtifactsResponse,
    SyntheticDataJobEntry,
    SyntheticDataJobRequest,
    SyntheticDataJobStatusResponse,
    SyntheticOutput,
)
from stack.api.wire import describe
from stack.batch_inference import AT_ONCE, RESULT_BYTES, TOKEN_BYTES, PatientEngine, require_not_all_in_vain
from stack.config import LanguageModel
from stack.context import Context
from stack.datasets import Shape, Size
from stack.errors import BadInput, NotFound, StackError, TooManyRequests, Unavailable
from stack.filtering import BOUNDED, Filter, kept
from stack.inference import Answer, answer_chat, chat_body, sampling_body
from stack.memory_banks import ingestion
from stack.store import Job

KINDS = (jobs.GENERATE,)
HISTOGRAM_BINS = 10
# About how long a prompt is that a model makes up.
GROWN_PROMPT_BYTES = 500
S = TypeVar("S", bound=GenerationSettings)


async def generate(context: Context, request: SyntheticDataGenerationRequest) -> SyntheticDataGenerationResponse:
    """The generations to each dialog that the filter keeps, with their scores, and statistics of all.

    A dialog that cannot be answered or scored fails alone. Raises NotFound or BadInput for a model that cannot be
    asked, BadInput for sampling that no model can do, Unavailable for a reward model that is away, and what keeps all
    dialogs from an answer and will pass.
    """
    started = time.perf_counter()
    request = await asyncio.to_thread(with_models, context, request)
    dialogs = request.each
    sampler = Sampler(replace(context, engine=PatientEngine(context.engine)), request)

    async def outcome(index: int, dialog: list[Message]) -> Sampled | StackError:
        try:
            return await sampler.sample(index, dialog)
        except StackError as error:
            if error.param == "reward_model":  # it is away for all
                raise
            error.param = f"dialogs.{index}"
            return error

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(index, dialog)) for index, dialog in enumerate(dialogs)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    outcomes = [task.result() for task in tasks]
    require_not_all_in_vain(outcomes)
    data = _filtered(request, dialogs, outcomes)
    return SyntheticDataGenerationResponse(
        synthetic_data=data,
        statistics=_statistics(request, outcomes, data) | {"seconds": time.perf_counter() - started},
        errors=[_row_error(index, one) for index, one in enumerate(outcomes) if isinstance(one, StackError)],
    )


def submit(context: Context, request: SyntheticDataJobRequest, submission_id: str | None = None) -> Job:
    """Accepts a generation of any size.

    Raises BadInput for data that has no prompts or two rows of the same id and for a bank without documents, NotFound,
    Conflict where a data set of the name is there already, or another job is going to make it, and StorageFull.
    """
    known = context.store.jobs.get(context.tenant, request.job_uuid)
    if known is not None:
        meant = {name: getattr(request, name) or known.request.get(name) for name in ("model", "reward_model")}
        request = datasets.as_accepted(request.model_copy(update=meant), known.request)
        bundles = known.bundles
    else:
        request = with_models(context, request)
        made_datasets.require_free(context, jobs.GENERATE, request.model_dump(mode="json"), "output_dataset")
        request, found = datasets.accept(context, request, shape_of(request))
        _require_room(
            context, request, [datasets.size(context, one) for one in found] or _size_of_bank(context, request)
        )
        bundles = engines.bundles_of_job(own_model(context, request))
    return jobs.submit(context, jobs.GENERATE, request.job_uuid, request, bundles=bundles, submission_id=submission_id)


def resources(context: Context, request: SyntheticDataJobRequest) -> dict[str, Any]:
    """What a generation that starts takes beside the models that serve.

    Raises StorageFull where there is no room for it, and Conflict where another data set has its name by now.
    """
    made_datasets.require_still_free(context, jobs.GENERATE, request.model_dump(mode="json"))
    sizes = datasets.sizes_before_reading(context, request) or _size_of_bank(context, request)
    _require_room(context, request, sizes)
    return engines.resources_of_job(own_model(context, request))


def own_model(context: Context, request: SyntheticDataJobRequest) -> LanguageModel | None:
    """The model that a generation `with_models` has an engine of its own of, if it has one. Raises NotFound."""
    if request.engine != JobEngine.own:
        return None
    assert request.model is not None
    return context.models.get(request.model).base


def list_jobs(
    context: Context, kind: str | None, status: JobStatus | None, after: str | None, limit: int
) -> list[SyntheticDataJobEntry]:
    """Generations, newest first."""
    return [SyntheticDataJobEntry(**jobs.entry(job)) for job in jobs.page(context, KINDS, kind, status, after, limit)]


def job_status(context: Context, job_uuid: str) -> SyntheticDataJobStatusResponse:
    """How far a generation is, and what came of it once it is completed. Raises NotFound."""
    return SyntheticDataJobStatusResponse(**jobs.state(context, jobs.get(context, job_uuid, KINDS)))


def job_artifacts(context: Context, job_uuid: str) -> SyntheticDataJobArtifactsResponse:
    """The data set that a generation has made, and the files that say what was rejected. Raises NotFound."""
    result = jobs.get(context, job_uuid, KINDS).result or {}
    return SyntheticDataJobArtifactsResponse(
        job_uuid=job_uuid,
        path=result.get("path"),
        files=[ArtifactFile(**file) for file in result.get("files", [])],
        datasets=result.get("datasets", {}),
    )


def shape_of(request: SyntheticDataJobRequest) -> Shape[Any]:
    """What the rows of a job's data set must be."""
    return prompt_rows.TEXTS if request.source == PromptSource.documents else prompt_rows.PROMPTS


def with_models(context: Context, request: S) -> S:
    """The request with the models that it means: those that it names, or the first ones of the config.

    Raises NotFound and BadInput where there is no such model or it cannot do that, and BadInput for sampling that no
    model can do.
    """
    model = request.model or context.config.models[0].id
    context.models.get(model)
    reward = request.reward_model or next((one.id for one in context.models.reward_models()), None)
    if reward is None:
        raise NotFound(
            "there is no reward model, as the config lists no reward_models",
            param="reward_model",
            code="model_not_found",
        )
    try:
        context.models.get_reward_model(reward)
    except (NotFound, BadInput) as error:
        error.param = "reward_model"
        raise
    sampling_body(request.sampling_params)
    return request.model_copy(update={"model": model, "reward_model": reward})


def filter_of(request: GenerationSettings) -> Filter:
    """The filter that a request describes."""
    return Filter(request.filtering_function, request.filter_k, request.filter_p, request.threshold, request.seed)


@dataclass(frozen=True)
class Sampled:
    """The generations to a dialog with their scores, in the order of their seeds, and the tokens read and written."""

    generations: list[ScoredMessage]
    prompt_tokens: int
    completion_tokens: int


def sampled(answers: Sequence[Answer], scores: Sequence[float]) -> Sampled:
    """Answers with their scores."""
    scored = [ScoredMessage(message=one.message, score=score) for one, score in zip(answers, scores, strict=True)]
    return Sampled(scored, sum(one.prompt_tokens for one in answers), sum(one.completion_tokens for one in answers))


class Sampler:
    """Samples and scores generations: so many questions at once are with the engine, and about as many with the reward
    model, whatever there are of dialogs.

    `settings` name both models (`with_models`).
    """

    def __init__(self, context: Context, settings: GenerationSettings, at_once: int = AT_ONCE) -> None:
        self._context = context
        self._settings = settings
        self._slots = asyncio.Semaphore(at_once)
        # All generations to a dialog are scored in one request.
        self._scorings = asyncio.Semaphore(max(1, at_once // settings.num_generations))

    async def sample(self, number: int, dialog: Sequence[Message]) -> Sampled:
        """`num_generations` generations to the dialog of this number, scored.

        Raises what the model raises, and what the reward model raises of this dialog; Unavailable and TooManyRequests
        of the reward model, with the param `reward_model`.
        """
        answers = await self.answers(number, dialog)
        return sampled(answers, await self.scores(dialog, [one.message for one in answers]))

    async def answers(self, number: int | str, dialog: Sequence[Message], **more: Any) -> list[Answer]:
        """`num_generations` answers to a dialog, with other fields of OpenAI's request, such as a response_format.

        Their seeds follow from the number, or another name, of the dialog.
        Whoever leaves takes all questions along.
        """
        settings = self._settings
        assert settings.model is not None
        asked = ChatCompletionRequest(
            model=settings.model, messages=list(dialog), sampling_params=settings.sampling_params
        )
        body = chat_body(asked) | more

        async def ask(index: int) -> Answer:
            async with self._slots:
                seed = seed_of(settings.seed, number, index)
                return await answer_chat(self._context, body | {"seed": seed})

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(index)) for index in range(settings.num_generations)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return [task.result() for task in tasks]

    async def scores(self, dialog: Sequence[Message], answers: Sequence[Message]) -> list[float]:
        """The reward model's score of each answer as the dialog's next message."""
        name = self._settings.reward_model
        assert name is not None
        if not answers:
            return []
        try:
            one = DialogGenerations(dialog=list(dialog), sampled_generations=list(answers))
            asked = RewardScoringRequest(dialog_generations=[one], model=name)
        except ValidationError as error:  # too many characters together
            raise BadInput(f"the reward model {name!r} cannot score it: {describe(error)}") from error
        try:
            async with self._scorings:
                response = await reward_scoring.score(self._context, asked)
        except (Unavailable, TooManyRequests) as error:
            message = f"the reward model {name!r} cannot score now: {error.message}"
            raise type(error)(message, param="reward_model", retry_after=error.retry_after) from error
        return [scored.score for scored in response.scored_generations[0].scored_generations]


def seed_of(seed: int, number: int | str, index: int) -> int:
    """The seed of a dialog's generation, so that none is like another and all are the same again."""
    return random.Random(f"{seed}:{number}:{index}").getrandbits(62)


def histogram(scores: Iterable[float], lowest: float, greatest: float) -> dict[str, list[float]]:
    """How scores lie between the lowest and the greatest: the `counts` between each two of the `edges`.

    An edge belongs to what is above it, but for the last one.
    """
    width = (greatest - lowest) / HISTOGRAM_BINS or 1.0
    edges = [lowest + width * number for number in range(HISTOGRAM_BINS + 1)]
    counts = [0.0] * HISTOGRAM_BINS
    for score in scores:
        counts[min(bisect_right(edges, score), HISTOGRAM_BINS) - 1] += 1
    return {"edges": edges, "counts": counts}


def _filtered(
    request: GenerationSettings, dialogs: Sequence[list[Message]], outcomes: Sequence[Sampled | StackError]
) -> list[ScoredDialogGenerations]:
    by = filter_of(request)
    data = []
    for number, (dialog, one) in enumerate(zip(dialogs, outcomes, strict=True)):
        scored = [] if isinstance(one, StackError) else one.generations
        chosen = [scored[index] for index in kept(by, [each.score for each in scored], number)]
        data.append(ScoredDialogGenerations(dialog=dialog, scored_generations=chosen))
    return data


def _statistics(
    request: GenerationSettings, outcomes: Sequence[Sampled | StackError], data: Sequence[ScoredDialogGenerations]
) -> dict[str, Any]:
    sampled = [one for one in outcomes if isinstance(one, Sampled)]
    scores = [generation.score for one in sampled for generation in one.generations]
    return {
        "model": request.model,
        "reward_model": request.reward_model,
        "dialogs": len(outcomes),
        "failed": len(outcomes) - len(sampled),
        "generated": len(scores),
        "kept": sum(len(one.scored_generations) for one in data),
        "mean_score": sum(scores) / len(scores) if scores else None,
        "score_histogram": histogram(scores, min(scores), max(scores)) if scores else {"edges": [], "counts": []},
        "prompt_tokens": sum(one.prompt_tokens for one in sampled),
        "completion_tokens": sum(one.completion_tokens for one in sampled),
    }


def _row_error(index: int, error: StackError) -> RowError:
    told = RowErrorDetails(code=error.code, message=error.message, type=error.type, param=error.param)
    return RowError(index=index, error=told)


def _require_room(context: Context, request: SyntheticDataJobRequest, sizes: Sequence[Size]) -> None:
    """Raises StorageFull unless there is room for what is kept, and for all generations while the job works."""
    text, prompts = sum(size.text for size in sizes), sum(size.rows for size in sizes)
    if request.source == PromptSource.self_instruct:
        text, prompts = request.num_prompts * GROWN_PROMPT_BYTES, request.num_prompts
    elif request.source == PromptSource.documents:
        prompts += text // request.passage_characters
    most = request.sampling_params.max_tokens or context.models.get(request.model or "").base.context
    generation = most * TOKEN_BYTES + RESULT_BYTES
    kept_bytes = text + prompts * _kept_of_each(request) * generation
    generated = 2 * text + prompts * request.num_generations * generation  # with other letters escaped
    work = jobs.work_folder(context.tenant, request.job_uuid)
    quotas.require_room_for_job(context, kept=kept_bytes, temporary=generated + kept_bytes, work=work)


def _size_of_bank(context: Context, request: SyntheticDataJobRequest) -> list[Size]:
    """About how much there is in a bank whose documents are asked about. Raises NotFound, and BadInput for none."""
    if request.bank_id is None:
        return []
    return [ingestion.size_of_bank(ingestion.require_documents(context, request.bank_id, "bank_id"))]


def _kept_of_each(request: SyntheticDataJobRequest) -> int:
    """How many generations to a prompt, or about a passage, are kept at most."""
    if request.output == SyntheticOutput.preferences:
        return 2
    if request.output == SyntheticOutput.sft and request.source != PromptSource.documents:
        return 1
    is_bounded = request.filtering_function in BOUNDED
    return min(request.filter_k, request.num_generations) if is_bounded else request.num_generations

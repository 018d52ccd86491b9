"""Evaluations: what is checked before a job is accepted, and what a finished one has found."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from stack import datasets, engines, function_calls, jobs, quotas
from stack.api.datasets import TrainEvalDataset
from stack.api.evaluations import (
    AnyEvaluationRequest,
    EvaluateBenchmarkRequest,
    EvaluateFunctionCallingRequest,
    EvaluateJudgedRequest,
    EvaluateQuestionAnsweringRequest,
    EvaluateSummarizationRequest,
    EvaluateTextGenerationRequest,
    EvaluationJobArtifactsResponse,
    EvaluationJobEntry,
    EvaluationJobStatusResponse,
    JudgedMetric,
)
from stack.api.jobs import ArtifactFile, JobEngine, JobStatus
from stack.batch_inference import TOKEN_BYTES
from stack.config import Judge, LanguageModel
from stack.context import Context
from stack.datasets import Example, Shape, Size
from stack.errors import BadInput, NotFound, StackError
from stack.inference import sampling_body
from stack.models import Model
from stack.post_training import linear_modules, whole_model_of
from stack.row_ids import id_of
from stack.store import Job

KINDS = (
    *(jobs.EVALUATE, jobs.EVALUATE_SUMMARIZATION, jobs.EVALUATE_TEXT_GENERATION),
    *(jobs.EVALUATE_JUDGED, jobs.EVALUATE_BENCHMARK, jobs.EVALUATE_FUNCTION_CALLING),
)
# What the results say of each example beside its messages, about: an answer, scores, times; and the report with its
# plots. The messages stand in the results as JSON, with other letters escaped, and once more in Parquet.
RESULT_BYTES = 1_536
REPORT_BYTES = 2**18
# What a benchmark keeps, about: lm-eval's results, and what was asked and answered. And what the answers of the engine
# may take while it works: 56,000 choices of MMLU behind five examples take about 1 GiB.
BENCHMARK_BYTES = 2**25
ANSWERS_BYTES = 2**31
PARQUET_FILE = "examples.parquet"
R = TypeVar("R", bound=AnyEvaluationRequest)


@dataclass(frozen=True)
class Question(Example):
    """An example with its id: that of its column `id`, if there is one, or the row's number.

    Where a model may call `functions`, in BFCL's format, the answer is the calls that are expected, as JSON.
    """

    id: str
    functions: list[dict[str, Any]] | None = None


def question_answering(
    context: Context, request: EvaluateQuestionAnsweringRequest, submission_id: str | None = None
) -> Job:
    """Accepts an evaluation. Raises BadInput for data that has no examples or the same id twice, NotFound, Conflict."""
    return _accept(context, jobs.EVALUATE, request, submission_id)


def summarization(context: Context, request: EvaluateSummarizationRequest, submission_id: str | None = None) -> Job:
    """Accepts an evaluation. Raises as `question_answering` does, and BadInput for a reference that is empty."""
    return _accept(context, jobs.EVALUATE_SUMMARIZATION, request, submission_id)


def text_generation(context: Context, request: EvaluateTextGenerationRequest, submission_id: str | None = None) -> Job:
    """Accepts an evaluation. Raises as `summarization` does."""
    return _accept(context, jobs.EVALUATE_TEXT_GENERATION, request, submission_id)


def judged(context: Context, request: EvaluateJudgedRequest, submission_id: str | None = None) -> Job:
    """Accepts an evaluation. Raises as `question_answering` does, and NotFound and BadInput for what is no judge."""
    return _accept(context, jobs.EVALUATE_JUDGED, request, submission_id)


def function_calling(
    context: Context, request: EvaluateFunctionCallingRequest, submission_id: str | None = None
) -> Job:
    """Accepts an evaluation. Raises as `question_answering` does, for rows that are not of BFCL's format too."""
    return _accept(context, jobs.EVALUATE_FUNCTION_CALLING, request, submission_id)


def benchmark(context: Context, request: EvaluateBenchmarkRequest, submission_id: str | None = None) -> Job:
    """Accepts tasks of lm-eval. Whether it has them is found out by the job. Raises NotFound, BadInput, Conflict."""
    if context.store.jobs.get(context.tenant, request.job_uuid) is None:
        _require_text_model(context, request.checkpoint)
        resources_of_benchmark(context, request)
    return jobs.submit(context, jobs.EVALUATE_BENCHMARK, request.job_uuid, request, submission_id=submission_id)


def resources_of_benchmark(context: Context, request: EvaluateBenchmarkRequest) -> dict[str, Any]:
    """What a benchmark takes beside the model that serves: nothing but its driver, and room. Raises StorageFull."""
    work = jobs.work_folder(context.tenant, request.job_uuid)
    temporary = BENCHMARK_BYTES + ANSWERS_BYTES
    quotas.require_room_for_job(context, kept=BENCHMARK_BYTES, temporary=temporary, work=work)
    return {"workers": 0}


def resources(context: Context, request: AnyEvaluationRequest) -> dict[str, Any]:
    """What an evaluation that starts takes beside the model that serves.

    Raises StorageFull where there is no room for it: there may have been more when it was accepted.
    """
    _require_room(context, request, datasets.sizes_before_reading(context, request))
    return engines.resources_of_job(own_model(context, request))


def own_model(context: Context, request: AnyEvaluationRequest) -> LanguageModel | None:
    """The model that an evaluation has an engine of its own of, if it has one. Raises as `model_of` does."""
    return model_of(context, request.checkpoint).base if request.engine == JobEngine.own else None


def list_jobs(
    context: Context, kind: str | None, status: JobStatus | None, after: str | None, limit: int
) -> list[EvaluationJobEntry]:
    """Evaluations, newest first."""
    return [EvaluationJobEntry(**jobs.entry(job)) for job in jobs.page(context, KINDS, kind, status, after, limit)]


def model_of(context: Context, checkpoint: str) -> Model:
    """The served model that a checkpoint means: by its id, or by the training that made it, which is named by its
    job_uuid or by the address of its artifact.

    Raises NotFound, and BadInput for a model that makes no text.
    """
    try:
        return context.models.get(checkpoint)
    except NotFound as unknown:
        for adapter in context.store.adapters.list(context.tenant):
            if checkpoint in (adapter.job_uuid, context.artifacts.url(adapter.artifact)):
                return context.models.get(adapter.model_id)
        if (whole := whole_model_of(context, checkpoint)) is not None:
            return context.models.get(whole)
        raise NotFound(
            f"the checkpoint {checkpoint!r} is not served; allowed: the id of a served model, or the job_uuid or the "
            f"artifact's address of a training that has made one; {unknown.message.rpartition('; ')[2]}",
            param="checkpoint",
        ) from unknown


def judge_of(request: EvaluateJudgedRequest) -> Judge:
    """The judge of an evaluation."""
    return Judge(kind="judge", id=request.job_uuid, model=request.judge, rubric=request.rubric)


def shape_of(request: AnyEvaluationRequest) -> Shape[Question]:
    """What is wanted of each row of the data set of an evaluation."""
    if isinstance(request, EvaluateFunctionCallingRequest):
        return Shape(function_calls.columns_problem, _function_question, unique_ids=True)
    judges_references = isinstance(request, EvaluateJudgedRequest) and _compares_with_references(request)
    # Some questions have no answer, and a judge may need none.
    if isinstance(request, EvaluateQuestionAnsweringRequest | EvaluateJudgedRequest) and not judges_references:
        return Shape(datasets.EXAMPLES.columns_problem, _question, of_examples=True, unique_ids=True)
    return Shape(datasets.EXAMPLES.columns_problem, _question_with_reference, unique_ids=True)


def job_status(context: Context, job_uuid: str) -> EvaluationJobStatusResponse:
    """How far an evaluation is, and its scores once it is completed. Raises NotFound."""
    return EvaluationJobStatusResponse(**jobs.state(context, jobs.get(context, job_uuid, KINDS)))


def job_artifacts(context: Context, job_uuid: str) -> EvaluationJobArtifactsResponse:
    """The files that an evaluation has made: each example with its output and scores, and a report. Raises NotFound."""
    result = jobs.get(context, job_uuid, KINDS).result or {}
    return EvaluationJobArtifactsResponse(
        job_uuid=job_uuid,
        path=result.get("path"),
        files=[ArtifactFile(**file) for file in result.get("files", [])],
    )


def results_name(tenant: str, job_uuid: str) -> str:
    """The artifact that holds the results of an evaluation by example."""
    return jobs.artifact_name(tenant, jobs.RESULTS, job_uuid)


def _accept(context: Context, kind: str, request: R, submission_id: str | None) -> Job:
    known = context.store.jobs.get(context.tenant, request.job_uuid)
    if known is not None:
        request, bundles = datasets.as_accepted(request, known.request), known.bundles
    else:
        request = _checked(context, request)
        bundles = engines.bundles_of_job(own_model(context, request))
    return jobs.submit(context, kind, request.job_uuid, request, bundles=bundles, submission_id=submission_id)


def _checked(context: Context, request: R) -> R:
    """The request with the hash of the data set that it describes. Raises what `summarization` raises."""
    _require_text_model(context, request.checkpoint)
    if isinstance(request, EvaluateJudgedRequest):
        _check_judged(context, request)
    sampling_body(request.sampling_params)
    _require_each_once(request.metrics)
    _require_likelihoods(context, request)
    request, found = datasets.accept(context, request, shape_of(request))
    _require_room(context, request, [datasets.size(context, one) for one in found])
    return request


def _require_text_model(context: Context, checkpoint: str) -> None:
    try:
        model_of(context, checkpoint)
    except StackError as error:
        error.param = "checkpoint"
        raise


def _check_judged(context: Context, request: EvaluateJudgedRequest) -> None:
    field = "judge"
    try:
        context.models.get(request.judge)
        if request.opponent is not None:
            field = "opponent"
            if JudgedMetric.win_rate not in request.metrics:
                raise BadInput("an opponent is for the metric win_rate, which is not asked for: leave it out")
            model_of(context, request.opponent)
    except StackError as error:
        error.param = field
        raise


def _compares_with_references(request: EvaluateJudgedRequest) -> bool:
    return JudgedMetric.win_rate in request.metrics and request.opponent is None


def _require_each_once(metrics: Sequence[str]) -> None:
    for number, metric in enumerate(metrics):
        if metric in metrics[:number]:
            raise BadInput(f"the metric {str(metric)!r} is asked for twice; allowed: each once", param="metrics")


def _require_likelihoods(context: Context, request: AnyEvaluationRequest) -> None:
    """Raises BadInput for perplexity of a model that cannot tell the logprobs of a prompt: see serve_apps/llm.py."""
    if "perplexity" not in request.metrics:
        return
    base = model_of(context, request.checkpoint).base
    if base.adapters and not linear_modules(base):
        raise BadInput(
            f"the model {base.id!r} serves adapters, and its weights do not tell of which layers these may be, so that "
            "it has no perplexity; allowed: other metrics, or adapters: 0 in the config",
            param="metrics",
        )


def _function_question(number: int, row: dict[str, Any], dataset: TrainEvalDataset) -> Question:
    case = function_calls.read(number, row)
    return Question(case.messages, json.dumps(case.expected), id_of(number, row, dataset), case.functions)


def _question(number: int, row: dict[str, Any], dataset: TrainEvalDataset) -> Question:
    example = datasets.EXAMPLES.read(number, row, dataset)
    return Question(example.messages, example.answer, id_of(number, row, dataset))


def _question_with_reference(number: int, row: dict[str, Any], dataset: TrainEvalDataset) -> Question:
    question = _question(number, row, dataset)
    if not question.answer.strip():
        raise BadInput(f"row {number}: the reference, which answers are compared with, is empty")
    return question


def _require_room(context: Context, request: AnyEvaluationRequest, sizes: list[Size]) -> None:
    """Raises StorageFull unless there is room for the results, which repeat all messages.

    They are written to the job's folder, beside the log of its rows, and become an artifact at its end. Answers stand
    in them twice too, as JSON and in Parquet.
    """
    text, rows = sum(size.text for size in sizes), sum(size.rows for size in sizes)
    most = request.sampling_params.max_tokens or model_of(context, request.checkpoint).base.context
    has_opponent = isinstance(request, EvaluateJudgedRequest) and request.opponent is not None
    answers = most * TOKEN_BYTES * (2 if has_opponent else 1)
    log = 2 * text + rows * (answers + RESULT_BYTES)
    results = 3 * text + rows * (2 * answers + RESULT_BYTES) + REPORT_BYTES
    work = jobs.work_folder(context.tenant, request.job_uuid)
    quotas.require_room_for_job(context, kept=results, temporary=log + results, work=work)

"""The evaluation API."""

from fastapi import APIRouter

from serve_apps.readers import READERS
from serve_apps.routes.common import ContextOf, JobUuid, needs
from serve_apps.routes.jobs import After, Kind, Limit, Status, add_job_routes
from stack import comparisons, evaluations
from stack.api.evaluations import (
    CompareEvaluationsRequest,
    CompareEvaluationsResponse,
    EvaluateBenchmarkRequest,
    EvaluateFunctionCallingRequest,
    EvaluateJudgedRequest,
    EvaluateQuestionAnsweringRequest,
    EvaluateSummarizationRequest,
    EvaluateTextGenerationRequest,
    EvaluationJob,
    EvaluationJobArtifactsResponse,
    EvaluationJobEntry,
    EvaluationJobStatusResponse,
)

router = APIRouter(prefix="/evaluate", tags=["evaluations"], dependencies=[needs("training")])


@router.post("/question_answering/")
async def question_answering(context: ContextOf, body: EvaluateQuestionAnsweringRequest) -> EvaluationJob:
    """Accepts an evaluation of a model's answers against the expected ones; it runs on its own."""
    job = await READERS.run(evaluations.question_answering, context, body)
    return EvaluationJob(job_uuid=job.uuid)


@router.post("/summarization/")
async def summarization(context: ContextOf, body: EvaluateSummarizationRequest) -> EvaluationJob:
    """Accepts an evaluation of a model's summaries beside references; it runs on its own."""
    job = await READERS.run(evaluations.summarization, context, body)
    return EvaluationJob(job_uuid=job.uuid)


@router.post("/text_generation/")
async def text_generation(context: ContextOf, body: EvaluateTextGenerationRequest) -> EvaluationJob:
    """Accepts an evaluation of what a model writes, and of how likely references are to it; it runs on its own."""
    job = await READERS.run(evaluations.text_generation, context, body)
    return EvaluationJob(job_uuid=job.uuid)


@router.post("/judged/")
async def judged(context: ContextOf, body: EvaluateJudgedRequest) -> EvaluationJob:
    """Accepts an evaluation of a model's answers by a judge; it runs on its own."""
    job = await READERS.run(evaluations.judged, context, body)
    return EvaluationJob(job_uuid=job.uuid)


@router.post("/function_calling/")
async def function_calling(context: ContextOf, body: EvaluateFunctionCallingRequest) -> EvaluationJob:
    """Accepts an evaluation of the functions that a model calls; it runs on its own."""
    job = await READERS.run(evaluations.function_calling, context, body)
    return EvaluationJob(job_uuid=job.uuid)


@router.post("/benchmark/")
def benchmark(context: ContextOf, body: EvaluateBenchmarkRequest) -> EvaluationJob:
    """Accepts tasks of lm-eval, which it runs itself on a model; they run on their own."""
    return EvaluationJob(job_uuid=evaluations.benchmark(context, body).uuid)


@router.post("/compare", response_model_exclude_none=True)
async def compare(context: ContextOf, body: CompareEvaluationsRequest) -> CompareEvaluationsResponse:
    """Compares two completed evaluations of the same data set, example by example."""
    return await READERS.run(comparisons.compare, context, body)


@router.get("/job/status", response_model_exclude_none=True)
def job_status(context: ContextOf, job_uuid: JobUuid) -> EvaluationJobStatusResponse:
    """How far an evaluation is, and its scores when it is completed."""
    return evaluations.job_status(context, job_uuid)


@router.get("/job/artifacts", response_model_exclude_none=True)
def job_artifacts(context: ContextOf, job_uuid: JobUuid) -> EvaluationJobArtifactsResponse:
    """The files with an evaluation's results by example."""
    return evaluations.job_artifacts(context, job_uuid)


@router.get("/jobs", response_model_exclude_none=True)
def list_jobs(
    context: ContextOf, status: Status = None, kind: Kind = None, after: After = None, limit: Limit = 100
) -> list[EvaluationJobEntry]:
    """Evaluations, newest first, a page at a time."""
    return evaluations.list_jobs(context, kind, status, after, limit)


add_job_routes(router, evaluations.KINDS)

"""The evaluation API."""

from fastapi import APIRouter

from serve_apps.readers import READERS
from serve_apps.routes.common import ContextOf, JobUuid, needs
from serve_apps.routes.jobs import After, Kind, Limit, Status, add_job_routes
from stack import evaluations
from stack.api.evaluations import (
    EvaluateQuestionAnsweringRequest,
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

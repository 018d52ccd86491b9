"""The batch inference API."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.readers import READERS
from serve_apps.routes.common import ContextOf, JobUuid, answer_to, needs
from serve_apps.routes.jobs import After, Kind, Limit, Status, add_job_routes
from stack import batch_inference
from stack.api.batch_inference import (
    BatchChatCompletionRequest,
    BatchChatCompletionResponse,
    BatchCompletionRequest,
    BatchCompletionResponse,
    BatchInferenceJob,
    BatchInferenceJobArtifactsResponse,
    BatchInferenceJobEntry,
    BatchInferenceJobRequest,
    BatchInferenceJobStatusResponse,
)

router = APIRouter(prefix="/batch_inference", tags=["batch inference"])
# Jobs read data sets and make some: they need more than who asks a model.
_jobs = APIRouter(dependencies=[needs("training")])


@router.post("/chat_completion", response_model=BatchChatCompletionResponse, dependencies=[needs("inference")])
async def chat_completion(request: Request, context: ContextOf, body: BatchChatCompletionRequest) -> Response:
    """A model's answers to up to 256 conversations, in their order. A row that fails is told in `errors`."""
    return await answer_to(request, batch_inference.chat_completion(context, body))


@router.post("/completion", response_model=BatchCompletionResponse, dependencies=[needs("inference")])
async def completion(request: Request, context: ContextOf, body: BatchCompletionRequest) -> Response:
    """The continuations of up to 256 texts, in their order. A row that fails is told in `errors`."""
    return await answer_to(request, batch_inference.completion(context, body))


@_jobs.post("/jobs")
async def submit(context: ContextOf, body: BatchInferenceJobRequest) -> BatchInferenceJob:
    """Accepts a batch of any size, which makes a data set; it runs on its own."""
    job = await READERS.run(batch_inference.submit, context, body)
    return BatchInferenceJob(job_uuid=job.uuid)


@_jobs.get("/job/status", response_model_exclude_none=True)
def job_status(context: ContextOf, job_uuid: JobUuid) -> BatchInferenceJobStatusResponse:
    """How far a batch is."""
    return batch_inference.job_status(context, job_uuid)


@_jobs.get("/job/artifacts", response_model_exclude_none=True)
def job_artifacts(context: ContextOf, job_uuid: JobUuid) -> BatchInferenceJobArtifactsResponse:
    """The data sets that a batch has made, and its files."""
    return batch_inference.job_artifacts(context, job_uuid)


@_jobs.get("/jobs", response_model_exclude_none=True)
def list_jobs(
    context: ContextOf, status: Status = None, kind: Kind = None, after: After = None, limit: Limit = 100
) -> list[BatchInferenceJobEntry]:
    """Batches, newest first, a page at a time."""
    return batch_inference.list_jobs(context, kind, status, after, limit)


add_job_routes(_jobs, batch_inference.KINDS)
router.include_router(_jobs)

"""The synthetic data generation API."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.readers import READERS
from serve_apps.routes.common import ContextOf, JobUuid, answer_to, needs
from serve_apps.routes.jobs import After, Kind, Limit, Status, add_job_routes
from stack import synthetic_data_generation
from stack.api.synthetic_data_generation import (
    SyntheticDataGenerationRequest,
    SyntheticDataGenerationResponse,
    SyntheticDataJob,
    SyntheticDataJobArtifactsResponse,
    SyntheticDataJobEntry,
    SyntheticDataJobRequest,
    SyntheticDataJobStatusResponse,
)

router = APIRouter(prefix="/synthetic_data_generation", tags=["synthetic data generation"])
# Jobs read data sets and make some: they need more than who asks a model.
_jobs = APIRouter(dependencies=[needs("training")])


@router.post("/generate", response_model=SyntheticDataGenerationResponse, dependencies=[needs("inference")])
async def generate(request: Request, context: ContextOf, body: SyntheticDataGenerationRequest) -> Response:
    """Samples generations to dialogs, scores them by a reward model, and answers with those that a filter keeps."""
    return await answer_to(request, synthetic_data_generation.generate(context, body))


@_jobs.post("/jobs")
async def submit(context: ContextOf, body: SyntheticDataJobRequest) -> SyntheticDataJob:
    """Accepts a generation of any size, which makes a data set; it runs on its own."""
    job = await READERS.run(synthetic_data_generation.submit, context, body)
    return SyntheticDataJob(job_uuid=job.uuid)


@_jobs.get("/job/status", response_model_exclude_none=True)
def job_status(context: ContextOf, job_uuid: JobUuid) -> SyntheticDataJobStatusResponse:
    """How far a generation is."""
    return synthetic_data_generation.job_status(context, job_uuid)


@_jobs.get("/job/artifacts", response_model_exclude_none=True)
def job_artifacts(context: ContextOf, job_uuid: JobUuid) -> SyntheticDataJobArtifactsResponse:
    """The data sets that a generation has made, and its files."""
    return synthetic_data_generation.job_artifacts(context, job_uuid)


@_jobs.get("/jobs", response_model_exclude_none=True)
def list_jobs(
    context: ContextOf, status: Status = None, kind: Kind = None, after: After = None, limit: Limit = 100
) -> list[SyntheticDataJobEntry]:
    """Generations, newest first, a page at a time."""
    return synthetic_data_generation.list_jobs(context, kind, status, after, limit)


add_job_routes(_jobs, synthetic_data_generation.KINDS)
router.include_router(_jobs)

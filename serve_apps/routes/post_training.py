"""The post-training API."""

from fastapi import APIRouter

from serve_apps.readers import READERS
from serve_apps.routes.common import ContextOf, JobUuid, needs
from serve_apps.routes.jobs import After, Kind, Limit, Status, add_job_routes
from stack import post_training
from stack.api.post_training import (
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobEntry,
    PostTrainingJobStatusResponse,
    PostTrainingRLHFRequest,
    PostTrainingSFTRequest,
    RewardModelRequest,
)

router = APIRouter(prefix="/post_training", tags=["post_training"], dependencies=[needs("training")])


@router.post("/supervised_fine_tune")
async def supervised_fine_tune(context: ContextOf, body: PostTrainingSFTRequest) -> PostTrainingJob:
    """Accepts a supervised fine-tuning; it runs on its own."""
    job = await READERS.run(post_training.supervised_fine_tune, context, body)
    return PostTrainingJob(job_uuid=job.uuid)


@router.post("/preference_optimize")
async def preference_optimize(context: ContextOf, body: PostTrainingRLHFRequest) -> PostTrainingJob:
    """Accepts a preference optimization; it runs on its own."""
    job = await READERS.run(post_training.preference_optimize, context, body)
    return PostTrainingJob(job_uuid=job.uuid)


@router.post("/train_reward_model")
async def train_reward_model(context: ContextOf, body: RewardModelRequest) -> PostTrainingJob:
    """Accepts the training of a reward model; it runs on its own."""
    job = await READERS.run(post_training.train_reward_model, context, body)
    return PostTrainingJob(job_uuid=job.uuid)


@router.get("/job/status", response_model_exclude_none=True)
def job_status(context: ContextOf, job_uuid: JobUuid) -> PostTrainingJobStatusResponse:
    """How far a fine-tuning job is."""
    return post_training.job_status(context, job_uuid)


@router.get("/job/artifacts", response_model_exclude_none=True)
def job_artifacts(context: ContextOf, job_uuid: JobUuid) -> PostTrainingJobArtifactsResponse:
    """The checkpoints and the metrics of a fine-tuning job."""
    return post_training.job_artifacts(context, job_uuid)


@router.get("/jobs", response_model_exclude_none=True)
def list_jobs(
    context: ContextOf, status: Status = None, kind: Kind = None, after: After = None, limit: Limit = 100
) -> list[PostTrainingJobEntry]:
    """Fine-tuning jobs, newest first, a page at a time."""
    return post_training.list_jobs(context, kind, status, after, limit)


add_job_routes(router, post_training.KINDS)

"""Fine-tuning: what is checked before a job is accepted, and what a finished one has made."""

from pathlib import Path

from stack import datasets, jobs
from stack.api.jobs import ArtifactFile, MetricPoint
from stack.api.post_training import (
    Checkpoint,
    FinetuningAlgorithm,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobStatusResponse,
    PostTrainingSFTRequest,
)
from stack.config import home
from stack.context import Context
from stack.errors import BadInput, Conflict
from stack.store import Job

KINDS = (jobs.SUPERVISED_FINE_TUNE,)


def supervised_fine_tune(context: Context, request: PostTrainingSFTRequest, submission_id: str | None = None) -> Job:
    """Accepts a fine-tuning job. Raises BadInput for what cannot be trained, NotFound, Conflict."""
    known = context.store.job(request.job_uuid)
    if known is None:
        _check(context, request)
    return jobs.submit(
        context, jobs.SUPERVISED_FINE_TUNE, request.job_uuid, request.model_dump(mode="json"), submission_id
    )


def job_status(context: Context, job_uuid: str) -> PostTrainingJobStatusResponse:
    """How far a fine-tuning job is. Raises NotFound."""
    job = jobs.get(context, job_uuid, KINDS)
    resources = (job.result or {}).get("resources_allocated")
    return PostTrainingJobStatusResponse(
        **jobs.state(context, job), resources_allocated=resources, checkpoints=_checkpoints(job)
    )


def job_artifacts(context: Context, job_uuid: str) -> PostTrainingJobArtifactsResponse:
    """What a fine-tuning job has made: its checkpoints, and its metrics as series. Raises NotFound."""
    job = jobs.get(context, job_uuid, KINDS)
    points = [
        MetricPoint(name=metric.name, step=metric.step, value=metric.value, timestamp=metric.timestamp)
        for metric in context.store.metrics_of(job_uuid)
    ]
    return PostTrainingJobArtifactsResponse(job_uuid=job_uuid, checkpoints=_checkpoints(job), metrics=points)


def list_jobs(context: Context) -> list[PostTrainingJob]:
    """All fine-tuning jobs, newest first."""
    return [PostTrainingJob(job_uuid=job.uuid) for job in context.store.jobs_of_kinds(KINDS)]


def adapter_name(job_uuid: str) -> str:
    """The artifact that holds the adapter which a job has trained."""
    return f"adapters/{job_uuid}"


def model_id(base: str, job_uuid: str) -> str:
    """The id under which that adapter is served."""
    return f"{base}:{job_uuid}"


def training_folder(job_uuid: str) -> Path:
    """Where a fine-tuning keeps what it needs until its end."""
    return home() / "training" / job_uuid


def _checkpoints(job: Job) -> list[Checkpoint]:
    if not job.result:
        return []
    return [
        Checkpoint(**dict(checkpoint, files=[ArtifactFile(**file) for file in checkpoint["files"]]))
        for checkpoint in job.result["checkpoints"]
    ]


def _check(context: Context, request: PostTrainingSFTRequest) -> None:
    model = context.models.get(request.model)
    if model.is_adapter:
        raise BadInput(f"{request.model!r} is an adapter; name its base, {model.base.id!r}", param="model")
    if request.algorithm != FinetuningAlgorithm.lora:
        raise BadInput(f"the algorithm {request.algorithm} is not there yet; allowed: lora", param="algorithm")
    if not request.algorithm_config.lora_attn_modules and not request.algorithm_config.apply_lora_to_mlp:
        raise BadInput(
            "no layer would get an adapter: name lora_attn_modules, or set apply_lora_to_mlp", param="algorithm_config"
        )
    if request.algorithm_config.apply_lora_to_output:
        message = "an adapter of the output layer cannot be served yet; allowed: false"
        raise BadInput(message, param="algorithm_config.apply_lora_to_output")
    if request.algorithm_config.rank > model.base.adapter_rank:
        allowed = model.base.adapter_rank
        rank = request.algorithm_config.rank
        message = f"{request.model} serves adapters up to rank {allowed} (adapter_rank in the config), not {rank}"
        raise BadInput(message, param="algorithm_config.rank")
    if request.optimizer_config.lr_min > request.optimizer_config.lr:
        optimizer = request.optimizer_config
        raise BadInput(f"lr_min is {optimizer.lr_min}, above lr {optimizer.lr}", param="optimizer_config.lr_min")
    for field in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload"):
        if getattr(request.training_config, field):
            raise BadInput(f"{field} is not there yet; allowed: false", param=f"training_config.{field}")
    for field in ("hyperparam_search_config", "logger_config"):
        if getattr(request, field):
            raise BadInput(f"{field} is not there yet; allowed: {{}}", param=field)
    datasets.check_examples(context, request.dataset, "dataset")
    if request.validation_dataset is not None:
        datasets.check_examples(context, request.validation_dataset, "validation_dataset")
    if context.artifacts.exists(adapter_name(request.job_uuid)):
        message = f"there is an adapter of a job {request.job_uuid!r} already; choose another job_uuid"
        raise Conflict(message, param="job_uuid")

"""Fine-tuning: what is checked before a job is accepted, and what a finished one has made."""

import importlib.util
import json
from typing import Any

from stack import datasets, jobs, quotas
from stack.api.jobs import ArtifactFile, JobStatus, MetricPoint
from stack.api.post_training import (
    Checkpoint,
    FinetuningAlgorithm,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobEntry,
    PostTrainingJobStatusResponse,
    PostTrainingSFTRequest,
)
from stack.config import LanguageModel
from stack.context import DEFAULT_TENANT, Context
from stack.datasets import Size
from stack.errors import BadInput, Conflict
from stack.store import Job

KINDS = (jobs.SUPERVISED_FINE_TUNE, jobs.PREFERENCE_OPTIMIZE)
# How many checkpoints there are at once, each of an adapter and Adam's two moments: the trainer and Ray Train have two
# while one takes the place of another, and one is on its way between them.
CHECKPOINTS = 5
# How much of a data set's text there is on disk in a training, about: its rows, those in the model's prompt format,
# and their tokens with the masks, which have 16 bytes for each token.
COPIES = 8


def supervised_fine_tune(context: Context, request: PostTrainingSFTRequest, submission_id: str | None = None) -> Job:
    """Accepts a fine-tuning job. Raises BadInput for what cannot be trained, NotFound, Conflict."""
    known = context.store.jobs.get(context.tenant, request.job_uuid)
    request = _checked(context, request) if known is None else datasets.as_accepted(request, known.request)
    return jobs.submit(
        context, jobs.SUPERVISED_FINE_TUNE, request.job_uuid, request.model_dump(mode="json"),
        bundles=[_workers(context, request)["per_worker"]], submission_id=submission_id,
    )  # fmt: skip


def resources(context: Context, request: PostTrainingSFTRequest) -> dict[str, Any]:
    """What a fine-tuning that starts takes: its workers, and what each of them needs on its node.

    Raises StorageFull where there is no room for it: there may have been more when it was accepted.
    """
    _require_room(context, request, datasets.sizes_before_reading(context, request))
    return _workers(context, request)


def _workers(context: Context, request: PostTrainingSFTRequest) -> dict[str, Any]:
    gpus = context.models.get(request.model).base.gpus
    return {"workers": 1, "per_worker": {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}}


def job_status(context: Context, job_uuid: str) -> PostTrainingJobStatusResponse:
    """How far a fine-tuning job is. Raises NotFound."""
    job = jobs.get(context, job_uuid, KINDS)
    return PostTrainingJobStatusResponse(**jobs.state(context, job), checkpoints=_checkpoints(job))


def job_artifacts(context: Context, job_uuid: str) -> PostTrainingJobArtifactsResponse:
    """What a fine-tuning job has made: its checkpoints, and its metrics as series. Raises NotFound."""
    job = jobs.get(context, job_uuid, KINDS)
    points = [
        MetricPoint(name=metric.name, step=metric.step, value=metric.value, timestamp=metric.timestamp)
        for metric in context.store.telemetry.metrics(job.tenant, job.run_id)
        if isinstance(metric.value, float | int) and not isinstance(metric.value, bool)
    ]
    return PostTrainingJobArtifactsResponse(job_uuid=job_uuid, checkpoints=_checkpoints(job), metrics=points)


def list_jobs(
    context: Context, kind: str | None, status: JobStatus | None, after: str | None, limit: int
) -> list[PostTrainingJobEntry]:
    """Fine-tuning jobs, newest first."""
    page = jobs.page(context, KINDS, kind, status, after, limit)
    return [PostTrainingJobEntry(**jobs.entry(job)) for job in page]


def adapter_name(tenant: str, job_uuid: str) -> str:
    """The artifact that holds the adapter which a job has trained."""
    return jobs.artifact_name(tenant, jobs.ADAPTERS, job_uuid)


def model_id(tenant: str, base: str, job_uuid: str) -> str:
    """The id under which that adapter is served: no two tenants' are the same."""
    return f"{base}:{job_uuid}" if tenant == DEFAULT_TENANT else f"{base}:{tenant}/{job_uuid}"


def adapter_of_model(base: str, model_id: str) -> str:
    """The artifact of the adapter that is served under an id: the way back from `model_id`."""
    tenant, _, job_uuid = model_id.removeprefix(f"{base}:").rpartition("/")
    return adapter_name(tenant or DEFAULT_TENANT, job_uuid)


def _checkpoints(job: Job) -> list[Checkpoint]:
    """Those that the job has published; before its end the one from which another attempt would go on."""
    return [
        Checkpoint(**dict(checkpoint, files=[ArtifactFile(**file) for file in checkpoint["files"]]))
        for checkpoint in (job.result["checkpoints"] if job.result else job.checkpoints or [])
    ]


def _checked(context: Context, request: PostTrainingSFTRequest) -> PostTrainingSFTRequest:
    """The request with the hashes of the data sets that it describes. Raises what `supervised_fine_tune` raises."""
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
    if request.hyperparam_search_config:
        raise BadInput("hyperparam_search_config is not there yet; allowed: {}", param="hyperparam_search_config")
    for tool in request.logger_config.report_to:
        package = "tensorboardX" if tool == "tensorboard" else tool
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"{tool!r} needs the package {package}, which is not installed", param="logger_config")
    request, found = datasets.accept(context, request)
    _require_room(context, request, [datasets.size(context, one) for one in found])
    if context.artifacts.exists(adapter_name(context.tenant, request.job_uuid)):
        message = f"there is an adapter of a job {request.job_uuid!r} already; choose another job_uuid"
        raise Conflict(message, param="job_uuid")
    return request


def _require_room(context: Context, request: PostTrainingSFTRequest, sizes: list[Size]) -> None:
    """Raises StorageFull unless there is room for the adapter, and for what the training writes meanwhile."""
    adapter = _bytes(context.models.get(request.model).base, request)
    temporary = CHECKPOINTS * 3 * adapter + COPIES * sum(size.text for size in sizes)
    work = jobs.work_folder(context.tenant, request.job_uuid)
    quotas.require_room_for_job(context, kept=adapter, temporary=temporary, work=work)


def _bytes(model: LanguageModel, request: PostTrainingSFTRequest) -> int:
    """About how much a LoRA adapter has, in float32.

    Each adapted layer from m to n features has rank * (m + n) weights; the MLP's are the widest.
    """
    shape = json.loads((model.folder / "config.json").read_text())
    hidden, wide = shape["hidden_size"], shape.get("intermediate_size", 4 * shape["hidden_size"])
    lora = request.algorithm_config
    features = len(lora.lora_attn_modules) * 2 * hidden + (3 * (hidden + wide) if lora.apply_lora_to_mlp else 0)
    return int(shape["num_hidden_layers"] * features * lora.rank * 4)

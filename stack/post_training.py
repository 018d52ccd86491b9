"""Fine-tuning: what is checked before a job is accepted, and what a finished one has made."""

import importlib.util
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import safe_open

from stack import datasets, jobs, quotas
from stack.api.jobs import ArtifactFile, JobStatus, MetricPoint
from stack.api.post_training import (
    Checkpoint,
    FinetuningAlgorithm,
    HyperparamSearch,
    LoraFinetuningConfig,
    Parallelism,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobEntry,
    PostTrainingJobStatusResponse,
    PostTrainingRLHFRequest,
    PostTrainingSFTRequest,
    RewardModelRequest,
    SearchAlgorithm,
    TrainingConfig,
    TrainingRequest,
)
from stack.api.wire import describe
from stack.config import LanguageModel
from stack.context import DEFAULT_TENANT, Context
from stack.datasets import Shape, Size
from stack.errors import BadInput, Conflict, StackError
from stack.store import Job
from stack.training_rows import DIALOGS, PREFERENCES

KINDS = (jobs.SUPERVISED_FINE_TUNE, jobs.PREFERENCE_OPTIMIZE, jobs.TRAIN_REWARD_MODEL)
# How many checkpoints there are at once beside those that are kept, each of the weights and Adam's two moments: the
# trainer and Ray Train have two while one takes the place of another, and one is on its way between them.
CHECKPOINTS = 4
# How much of a data set's text there is on disk in a training, about: its tokens and what is learned of them, with 8
# bytes for each token, twice: as they come, and as they are mapped into memory.
COPIES = 8
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
MICRO_BATCH_ON_CPU = 4
# The folder, within what a training has made, of the checkpoint with the lowest validation loss if it is not the last.
BEST = "best"
# What DPO's loss is made of. Its `reward_clip` is always 0.
DPO_LOSS = ("beta", "reward_scale", "epsilon", "gamma", "reward_clip")
# What a search may vary.
SEARCHABLE = ("optimizer_config", "training_config", "algorithm_config", "lora_config")
# What is the same in all trials: what examples are made of, what they run on, and what becomes of the result. And what
# DPO's loss is, by which trials are compared: the lowest of several losses would be that of another scale.
NOT_SEARCHABLE = (
    *("max_length", "too_long", "packing", "merge", "workers", "parallelism"),
    *("checkpoint_iters", "keep_checkpoints", "memory_efficient_fsdp_wrap", "fsdp_cpu_offload"),
    *DPO_LOSS,
)
# What makes an adapter larger, of what a search may vary.
LARGER = (".rank", ".apply_lora_to_mlp")
MAX_TRIALS = 1_000
_KINDS: dict[str, type[TrainingRequest]] = {
    jobs.SUPERVISED_FINE_TUNE: PostTrainingSFTRequest,
    jobs.PREFERENCE_OPTIMIZE: PostTrainingRLHFRequest,
    jobs.TRAIN_REWARD_MODEL: RewardModelRequest,
}
R = TypeVar("R", bound=TrainingRequest)


@dataclass(frozen=True)
class Start:
    """What a training starts from: a model, and, if an adapter of it is trained on, the artifact of that and the folder
    within it."""

    base: LanguageModel
    adapter: str | None = None
    within: str = ""


def supervised_fine_tune(context: Context, request: PostTrainingSFTRequest, submission_id: str | None = None) -> Job:
    """Accepts a supervised fine-tuning. Raises BadInput for what cannot be trained, NotFound, Conflict."""
    return _accept(context, jobs.SUPERVISED_FINE_TUNE, request, DIALOGS, submission_id)


def preference_optimize(context: Context, request: PostTrainingRLHFRequest, submission_id: str | None = None) -> Job:
    """Accepts a preference optimization. Raises as `supervised_fine_tune` does."""
    return _accept(context, jobs.PREFERENCE_OPTIMIZE, request, PREFERENCES, submission_id)


def train_reward_model(context: Context, request: RewardModelRequest, submission_id: str | None = None) -> Job:
    """Accepts the training of a reward model. Raises as `supervised_fine_tune` does."""
    return _accept(context, jobs.TRAIN_REWARD_MODEL, request, PREFERENCES, submission_id)


def resources(context: Context, request: TrainingRequest) -> dict[str, Any]:
    """What a training that starts takes: its workers, and what each of them needs on its node.

    Raises StorageFull where there is no room for it: there may have been more when it was accepted.
    """
    _require_room(context, request, datasets.sizes_before_reading(context, request))
    return {"workers": request.training_config.workers, "per_worker": per_worker(context, request)}


def per_worker(context: Context, request: TrainingRequest) -> dict[str, float]:
    """A worker has a GPU where the model is served on GPUs."""
    return {"CPU": 1, "GPU": 1} if start_of(context, request).base.gpus else {"CPU": 1}


def start_of(context: Context, request: TrainingRequest) -> Start:
    """What the training of a request starts from. Raises NotFound and BadInput."""
    if isinstance(request, PostTrainingRLHFRequest):
        return _finetuned(context, request.finetuned_model)
    assert isinstance(request, PostTrainingSFTRequest | RewardModelRequest)
    model = context.models.get(request.model)
    if model.is_adapter:
        raise BadInput(f"{request.model!r} is an adapter; name its base, {model.base.id!r}", param="model")
    return Start(model.base)


def lora_of(request: TrainingRequest) -> LoraFinetuningConfig | None:
    """The new adapter that a training makes; none where all weights are trained, or an adapter is trained on."""
    if isinstance(request, PostTrainingRLHFRequest):
        return request.lora_config
    assert isinstance(request, PostTrainingSFTRequest | RewardModelRequest)
    return request.algorithm_config


def is_whole(request: TrainingRequest, start: Start) -> bool:
    """Whether the result is a whole model and no adapter. No engine serves DoRA's adapters, nor adapters of rewards."""
    if isinstance(request, RewardModelRequest) or request.training_config.merge:
        return True
    if isinstance(request, PostTrainingSFTRequest):
        return request.algorithm in (FinetuningAlgorithm.full, FinetuningAlgorithm.dora)
    return start.adapter is None and lora_of(request) is None


def parallelism_of(training: TrainingConfig) -> Parallelism:
    """How the workers share the training: the two fields of the specification mean FSDP."""
    is_fsdp = training.memory_efficient_fsdp_wrap or training.fsdp_cpu_offload
    return training.parallelism or (Parallelism.fsdp if is_fsdp else Parallelism.ddp)


def micro_batch_size(training: TrainingConfig, *, on_cpu: bool) -> int:
    """How many examples a worker takes at a time, if the request does not say so: as many as it can on GPUs.

    On a CPU more than four at a time were not faster, and took half as much memory again. A packed row is a whole batch
    by itself, which may be as long as the model's context.
    """
    share = training.batch_size // training.workers
    limit = 1 if training.packing else MICRO_BATCH_ON_CPU
    most = max(size for size in range(1, limit + 1) if share % size == 0) if on_cpu else share
    return training.micro_batch_size or most


def with_values(request: R, values: dict[str, Any]) -> R:
    """The request of one trial: with these values of the fields, and without the search. Raises BadInput."""
    body = request.model_dump(mode="json") | {"hyperparam_search_config": None}
    for path, value in values.items():
        section, _, field = path.partition(".")
        known = [f"{name}.{key}" for name in SEARCHABLE for key in body.get(name) or () if key not in NOT_SEARCHABLE]
        if path not in known:
            why = ": trials are compared by the loss, and it makes that another one" if field in DPO_LOSS else ""
            message = f"{path!r} cannot be searched over{why}; allowed: {', '.join(known)}"
            raise BadInput(message, param="hyperparam_search_config.parameters")
        body[section][field] = value
    try:
        return type(request).model_validate(body)
    except ValidationError as error:
        message = f"a trial cannot have these values: {describe(error)}"
        raise BadInput(message, param="hyperparam_search_config.parameters") from error


def check_trial(context: Context, request: TrainingRequest) -> None:
    """Raises BadInput for the request of a trial whose values do not go together."""
    _check_fields(request, start_of(context, request))


def combinations(search: HyperparamSearch) -> int:
    """How many there are of the values that a search names."""
    return math.prod(len(values) for values in search.parameters.values())


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


def artifact_name(tenant: str, job_uuid: str, whole: bool) -> str:
    """The artifact that holds what a job has trained: a whole model, or an adapter."""
    return jobs.artifact_name(tenant, jobs.WHOLE_MODELS if whole else jobs.ADAPTERS, job_uuid)


def model_id(tenant: str, base: str, job_uuid: str) -> str:
    """The id under which an adapter is served: no two tenants' are the same."""
    return f"{base}:{job_uuid}" if tenant == DEFAULT_TENANT else f"{base}:{tenant}/{job_uuid}"


def whole_model_id(tenant: str, base: str, job_uuid: str) -> str:
    """The id under which a whole model is served, which is also its application's name.

    No two tenants' are the same: a job_uuid has no two dots side by side.
    """
    return f"{base}-{job_uuid}" if tenant == DEFAULT_TENANT else f"{base}-{job_uuid}..{tenant}"


def adapter_of_model(base: str, model_id: str) -> str:
    """The artifact of the adapter that is served under an id: the way back from `model_id`."""
    tenant, _, job_uuid = model_id.removeprefix(f"{base}:").rpartition("/")
    return artifact_name(tenant or DEFAULT_TENANT, job_uuid, whole=False)


def whole_model_of(context: Context, named: str) -> str | None:
    """The id of the whole model that the job of this uuid has made, or that has this address; None if there is none.

    Raises BadInput for the best checkpoint of one: an adapter that is trained on it would be served on the last one.
    """
    uuid = named.removesuffix(f"/{BEST}").rsplit("/", 1)[-1]
    job = context.store.jobs.get(context.tenant, uuid)
    checkpoints: list[dict[str, Any]] = (job.result or {}).get("checkpoints", []) if job is not None else []
    for checkpoint in checkpoints:
        # What object storage holds is not served.
        if model := checkpoint.get("model"):
            if named in (uuid, checkpoint["path"]):
                return str(model)
            if named == f"{checkpoint['path']}/{BEST}":
                raise BadInput(f"{named} is not served; allowed: the last checkpoint, {checkpoint['path']}")
    return None


def _accept(context: Context, kind: str, request: TrainingRequest, shape: Shape[Any], submission_id: str | None) -> Job:
    known = context.store.jobs.get(context.tenant, request.job_uuid)
    if known is None:
        request = _checked(context, request, shape)
        bundles = [per_worker(context, request)] * request.training_config.workers
    else:  # it was accepted, whatever has become of its model since
        request, bundles = datasets.as_accepted(request, known.request), known.bundles
    return jobs.submit(context, kind, request.job_uuid, request, bundles=bundles, submission_id=submission_id)


def _finetuned(context: Context, named: str) -> Start:
    """What `finetuned_model` means: a served model, or the one that a job has made, by its uuid or its address."""
    try:
        for adapter in context.store.adapters.list(context.tenant):
            address = context.artifacts.url(adapter.artifact)
            if named in (adapter.model_id, adapter.job_uuid, address):
                return Start(context.models.get(adapter.base).base, adapter.artifact)
            if named == f"{address}/{BEST}" and _has_best(context, adapter.artifact):
                return Start(context.models.get(adapter.base).base, adapter.artifact, within=BEST)
        if (kept := _kept_by_job(context, named)) is not None:
            return kept
        if all(named != model.id for model in context.models.language_models()):
            named = whole_model_of(context, named) or named
        return Start(context.models.get(named).base)
    except StackError as error:
        error.param = "finetuned_model"
        raise


def _has_best(context: Context, artifact: str) -> bool:
    return any(file.name.startswith(f"{BEST}/") for file in context.artifacts.files(artifact))


def _kept_by_job(context: Context, address: str) -> Start | None:
    """The adapter at this address that a failed training has left: it is not served, but can be trained on."""
    job = context.store.jobs.get(context.tenant, address.rsplit("/", 1)[-1])
    kind = _KINDS.get(job.kind) if job is not None and job.status == JobStatus.failed else None
    if job is None or kind is None or all(address != checkpoint["path"] for checkpoint in job.checkpoints or []):
        return None
    request = kind.model_validate(job.request)
    start = start_of(context, request)
    if is_whole(request, start):
        raise BadInput(f"{address} is not served, as its training failed; allowed: adapters, and models that are")
    return Start(start.base, artifact_name(job.tenant, job.uuid, whole=False))


def _checkpoints(job: Job) -> list[Checkpoint]:
    """Those that the job has published; before its end those from which another attempt would go on."""
    known = job.result["checkpoints"] if job.result else job.checkpoints or []
    return [
        Checkpoint(**dict(checkpoint, files=[ArtifactFile(**file) for file in checkpoint["files"]]))
        for checkpoint in known
        # When a job has ended, what it worked in is removed, and with it what was not published.
        if job.completed_at is None or "://" in checkpoint["path"]
    ]


def _checked(context: Context, request: R, shape: Shape[Any]) -> R:
    """The request with the hashes of the data sets that it describes. Raises what `supervised_fine_tune` raises."""
    start = start_of(context, request)
    _check_fields(request, start)
    if request.hyperparam_search_config is not None:
        _check_search(request, request.hyperparam_search_config, start)
    logger = request.logger_config
    for field in ("project", "run_name"):
        if getattr(logger, field) is not None and not logger.report_to:
            message = f"{field} is for the tools that report_to names, and it names none"
            raise BadInput(message, param=f"logger_config.{field}")
    for tool in logger.report_to:
        package = "tensorboardX" if tool == "tensorboard" else tool
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"{tool!r} needs the package {package}, which is not installed", param="logger_config")
    request, found = datasets.accept(context, request, shape)
    _require_room(context, request, [datasets.size(context, one) for one in found])
    whole = is_whole(request, start)
    if context.artifacts.exists(artifact_name(context.tenant, request.job_uuid, whole)):
        message = f"there is a model of a job {request.job_uuid!r} already; choose another job_uuid"
        raise Conflict(message, param="job_uuid")
    if whole:
        _require_free_id(context, whole_model_id(context.tenant, start.base.id, request.job_uuid))
    return request


def _require_free_id(context: Context, id: str) -> None:
    if len(id) > 200:
        raise BadInput(f"the model would have the id {id!r}; allowed: at most 200 characters", param="job_uuid")
    # Also another tenant's and one that is being removed: applications of all tenants have their names in common.
    listed = (*context.models.all(), *context.config.all_models, *context.store.models.list())
    if id in {model.id for model in listed}:
        raise Conflict(f"there is a model {id!r} already; choose another job_uuid", param="job_uuid")


def _check_search(request: TrainingRequest, search: HyperparamSearch, start: Start) -> None:
    if request.validation_dataset is None:
        message = "a search compares trials by what they have not learned from: it needs a validation_dataset"
        raise BadInput(message, param="validation_dataset")
    if request.logger_config.report_to:
        message = "the figures of single trials are not reported: leave out report_to, or hyperparam_search_config"
        raise BadInput(message, param="logger_config.report_to")
    for name, values in search.parameters.items():
        if repeated := [value for number, value in enumerate(values) if value in values[:number]]:
            message = f"{name} has the value {json.dumps(repeated[0])} twice; allowed: each value once"
            raise BadInput(message, param="hyperparam_search_config.parameters")
    _check_trials(search)
    first = {name: values[0] for name, values in search.parameters.items()}
    # Each value is tried once; combinations of them that do not go together end as failed trials.
    for name, values in search.parameters.items():
        for value in values:
            _check_fields(with_values(request, first | {name: value}), start)


def _check_trials(search: HyperparamSearch) -> None:
    field, count = "hyperparam_search_config", combinations(search)
    if search.algorithm == SearchAlgorithm.grid:
        for name in ("trials", "seed"):
            if getattr(search, name) is not None:
                message = f"a grid search draws nothing: leave out {name}, or search with random or asha"
                raise BadInput(message, param=f"{field}.{name}")
        if count > MAX_TRIALS:
            raise BadInput(f"a grid search would have {count} trials; allowed: {MAX_TRIALS}", param=field)
    elif search.trials is not None and search.trials > count:
        message = f"there are {count} combinations of these values, and each is tried once; allowed: at most {count}"
        raise BadInput(f"trials is {search.trials}: {message}", param=f"{field}.trials")


def _check_fields(request: TrainingRequest, start: Start) -> None:
    """Raises BadInput for fields that do not go together, or with the model."""
    _check_training(request, start)
    if request.optimizer_config.lr_min > request.optimizer_config.lr:
        optimizer = request.optimizer_config
        raise BadInput(f"lr_min is {optimizer.lr_min}, above lr {optimizer.lr}", param="optimizer_config.lr_min")
    lora = lora_of(request)
    if isinstance(request, PostTrainingRLHFRequest):
        if start.adapter is not None and lora is not None:
            message = "the finetuned_model is an adapter, which is trained on: leave out lora_config"
            raise BadInput(message, param="lora_config")
    else:
        assert isinstance(request, PostTrainingSFTRequest | RewardModelRequest)
        _check_algorithm(request.algorithm, lora, start.base)
    if lora is not None:
        _check_lora(request, lora, start)


def _check_algorithm(algorithm: FinetuningAlgorithm, lora: LoraFinetuningConfig | None, base: LanguageModel) -> None:
    if algorithm == FinetuningAlgorithm.full and lora is not None:
        raise BadInput("full trains all weights: leave out algorithm_config, or send {}", param="algorithm_config")
    if algorithm != FinetuningAlgorithm.full and lora is None:
        raise BadInput(f"{algorithm} needs an algorithm_config", param="algorithm_config")
    if algorithm == FinetuningAlgorithm.qlora:
        if not base.gpus:
            message = "qlora trains on 4-bit weights, which need a GPU, and this model is served on CPU; allowed: lora"
            raise BadInput(message, param="algorithm")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise BadInput("qlora needs the package bitsandbytes, which is not installed", param="algorithm")


def _check_lora(request: TrainingRequest, lora: LoraFinetuningConfig, start: Start) -> None:
    field = "lora_config" if isinstance(request, PostTrainingRLHFRequest) else "algorithm_config"
    if lora.apply_lora_to_output:
        message = "apply_lora_to_output is true; allowed: false, as TRL trains no adapter of the output layer"
        raise BadInput(message, param=f"{field}.apply_lora_to_output")
    if not lora.lora_attn_modules and not lora.apply_lora_to_mlp:
        message = "no layer would get an adapter: name lora_attn_modules, or set apply_lora_to_mlp"
        raise BadInput(message, param=field)
    linear = linear_modules(start.base)
    wanted = [*lora.lora_attn_modules, *(MLP_MODULES if lora.apply_lora_to_mlp else ())]
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        message = f"the model has no linear layers named {unknown[0]!r}; it has: {', '.join(sorted(linear))}"
        at_fault = "lora_attn_modules" if unknown[0] in lora.lora_attn_modules else "apply_lora_to_mlp"
        raise BadInput(message, param=f"{field}.{at_fault}")
    whole = is_whole(request, start)
    if not whole and lora.rank > start.base.adapter_rank:
        message = (
            f"{start.base.id} serves adapters up to rank {start.base.adapter_rank} (adapter_rank in the config), not "
            f"{lora.rank}"
        )
        raise BadInput(message, param=f"{field}.rank")


def _check_training(request: TrainingRequest, start: Start) -> None:
    training = request.training_config
    share = training.batch_size / training.workers
    if not share.is_integer():
        message = f"batch_size is {training.batch_size}, which {training.workers} workers cannot share equally"
        raise BadInput(message, param="training_config.batch_size")
    if training.micro_batch_size is not None and share % training.micro_batch_size:
        message = (
            f"micro_batch_size is {training.micro_batch_size}; allowed: what divides batch_size / workers, "
            f"{int(share)}, without a rest"
        )
        raise BadInput(message, param="training_config.micro_batch_size")
    if training.max_length is not None and training.max_length > start.base.context:
        message = f"max_length is {training.max_length}; allowed: at most the model's context, {start.base.context}"
        raise BadInput(message, param="training_config.max_length")
    if training.packing and not isinstance(request, PostTrainingSFTRequest):
        raise BadInput("only supervised fine-tuning packs examples; allowed: false", param="training_config.packing")
    _check_parallelism(training, start.base)


def _check_parallelism(training: TrainingConfig, base: LanguageModel) -> None:
    parallelism = parallelism_of(training)
    for field in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload"):
        if getattr(training, field) and parallelism != Parallelism.fsdp:
            message = f"{field} is for the parallelism fsdp, not {parallelism}"
            raise BadInput(message, param=f"training_config.{field}")
    if training.fsdp_cpu_offload and not base.gpus:
        message = "fsdp_cpu_offload frees the memory of GPUs, and this model is trained on CPU; allowed: false"
        raise BadInput(message, param="training_config.fsdp_cpu_offload")


def linear_modules(base: LanguageModel) -> set[str]:
    """The names of the linear layers in a model's blocks, from the headers of its weights."""
    names = set()
    for file in base.folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            for key in weights.keys():  # noqa: SIM118  # it is no mapping
                if ".layers." in key and key.endswith(".weight") and len(weights.get_slice(key).get_shape()) == 2:
                    names.add(key.split(".")[-2])
    return names


def _require_room(context: Context, request: TrainingRequest, sizes: list[Size]) -> None:
    """Raises StorageFull unless there is room for what is kept, and for what the training writes meanwhile."""
    start, search = start_of(context, request), request.hyperparam_search_config
    if search is not None:  # its largest trial
        sizes_of = {name: max(values) for name, values in search.parameters.items() if name.endswith(LARGER)}
        request = with_values(request, sizes_of)
    trained = _trained_bytes(context, request, start)
    kept = _weights_bytes(start.base) if is_whole(request, start) else trained
    checkpoints = CHECKPOINTS + request.training_config.keep_checkpoints
    trainings = 1 if search is None else 2  # a trial, and the best one so far
    temporary = trainings * checkpoints * 3 * trained + COPIES * sum(size.text for size in sizes)
    work = jobs.work_folder(context.tenant, request.job_uuid)
    # The best checkpoint is kept beside the last one.
    quotas.require_room_for_job(context, kept=2 * kept, temporary=temporary, work=work)


def _trained_bytes(context: Context, request: TrainingRequest, start: Start) -> int:
    """About how much the weights have that are trained, in float32.

    In an adapter, each layer from m to n features has rank * (m + n) weights; the MLP's are the widest.
    """
    lora = lora_of(request)
    if lora is None:
        if start.adapter is None:
            return _weights_bytes(start.base)
        return sum(file.bytes for file in context.artifacts.files(start.adapter))
    shape = _shape(start.base)
    hidden, wide = shape["hidden_size"], shape.get("intermediate_size", 4 * shape["hidden_size"])
    features = len(lora.lora_attn_modules) * 2 * hidden + (3 * (hidden + wide) if lora.apply_lora_to_mlp else 0)
    return int(shape["num_hidden_layers"] * features * lora.rank * 4)


def _weights_bytes(base: LanguageModel) -> int:
    """How much a model's weights have in float32, at most: they may lie in half of it."""
    return 2 * sum(file.stat().st_size for file in base.folder.glob("*.safetensors"))


def _shape(base: LanguageModel) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads((base.folder / "config.json").read_text())
    return shape

"""What the drivers of all trainings do: data into tokens, workers of Ray Train, and what they made into an artifact."""

import shutil
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, Result, UserCallback, WorkerGroupError

from jobs import driver, hyperparam_search
from jobs.reporter import steadily
from jobs.trainer import Plan, trainer_of
from jobs.training_data import Kind, Prepared, described, prepare
from jobs.training_worker import MADE, Settings
from stack import datasets, post_training, trained_models
from stack.api.post_training import RewardModelRequest, TrainingRequest
from stack.config import Config, LanguageModel
from stack.errors import BadInput, Diverged, StackError
from stack.post_training import Start
from stack.store import Adapter, AddedModel, Job, Store, now

# What of a checkpoint is a model that can be loaded: not the state of its training.
WEIGHTS = ("adapter_*", "model*.safetensors*", "*config.json")


def train(work: driver.Work, request: TrainingRequest, kind: Kind) -> driver.Outcome:
    """Trains as a request says, and registers what is made as a model where one can serve it."""
    context, job = work.context, work.job
    start = post_training.start_of(context, request)
    train_data, validation = _prepared(work, request, kind, start)
    temporary = work.folder / "temporary"  # and not where the system has its own: they may be large
    shutil.rmtree(temporary, ignore_errors=True)  # those of an attempt that was lost
    temporary.mkdir()
    settings = Settings(
        config=context.config.model_dump(mode="json"),
        tenant=job.tenant,
        attempt=work.reporter.number,
        kind=kind,
        request=request.model_dump(mode="json"),
        model=str(start.base.folder),
        adapter=str(context.artifacts.local(start.adapter) / start.within) if start.adapter else None,
        train=train_data.file,
        examples=train_data.examples,
        validation=validation.file if validation else None,
        temporary=str(temporary),
        tensorboard=str(work.folder / "tensorboard"),
    )
    plan = Plan(settings, post_training.per_worker(context, request), start.base.gpus > 0, work.folder)
    if request.hyperparam_search_config is None:
        recorder = CheckpointRecorder(context.config, job, work.reporter.number)
        try:
            result = trainer_of(plan, request, "train", [recorder]).fit()
        except WorkerGroupError as error:
            if not driver.raised_in_workers(error, Diverged):
                raise
            raise Diverged(f"{driver.reason(error)}; {_kept(work, request, start)}") from error
    else:
        result, request = hyperparam_search.search(work.reporter.metrics, request, plan)
    return _publish(work, request, start, result)


class CheckpointRecorder(UserCallback):
    """Writes down the checkpoints that another attempt would go on from, once Ray Train knows them."""

    def __init__(self, config: Config, job: Job, number: int) -> None:
        self._url = config.store_url
        self._job = job
        self._number = number
        self._saved: list[dict[str, Any]] = list(job.checkpoints or [])  # those of the attempt before

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        self._saved = [saved for saved in self._saved if Path(saved["path"]).is_dir()]  # the others were not kept
        self._saved.append({"path": checkpoint.path, **_how_far(metrics[0]), "files": []})
        steadily(self._record)

    def _record(self) -> None:
        with closing(Store(self._url)) as store:
            store.jobs.record(self._job.id, self._number, checkpoints=self._saved)


def _prepared(
    work: driver.Work, request: TrainingRequest, kind: Kind, start: Start
) -> tuple[Prepared, Prepared | None]:
    training, base = request.training_config, start.base
    limit = training.max_length or base.context
    found: list[Prepared | None] = []
    for name in ("dataset", "validation_dataset"):
        reference = getattr(request, name)
        if reference is None:
            found.append(None)
            continue
        checked = datasets.resolve(work.context, reference)
        folder, model = work.folder / name, (base.folder, base.prompt_format)
        try:
            prepared = prepare(work.context, checked, kind, model, training, limit, folder)
        except BadInput as error:
            raise BadInput(f"{name}: {error.message}", param=name) from error
        print(described(name, prepared))
        found.append(prepared)
    train_data, validation = found
    assert train_data is not None
    return train_data, validation


def _publish(work: driver.Work, request: TrainingRequest, start: Start, result: Result) -> driver.Outcome:
    context, job = work.context, work.job
    whole = post_training.is_whole(request, start)
    name = post_training.artifact_name(job.tenant, job.uuid, whole)
    assert result.checkpoint is not None, "the training ended without a checkpoint"
    assert result.metrics is not None
    made = work.folder / "published"
    shutil.rmtree(made, ignore_errors=True)
    with result.checkpoint.as_directory() as folder:
        _export(Path(folder) / MADE, made, request, start, whole)
    best = _best(result)
    if best is not None:
        with best[0].as_directory() as folder:
            if _has_weights(Path(folder)):
                _export(Path(folder), made / post_training.BEST, request, start, whole)
            else:
                print(f"the best checkpoint, of step {best[1]['steps']}, is of shards, of which no model is made here")
                best = None
    if (work.folder / "tensorboard").is_dir():
        shutil.copytree(work.folder / "tensorboard", made / "tensorboard")
    if (work.folder / hyperparam_search.TRIALS).is_file():
        shutil.copy2(work.folder / hyperparam_search.TRIALS, made)
    files = driver.publish(work, name, made)
    served = _served(work, request, start, name, made, whole)
    model = served.model_id if isinstance(served, Adapter) else served.id
    path = context.artifacts.url(name)
    of_best = [file for file in files if file.name.startswith(f"{post_training.BEST}/")]
    checkpoints = [
        {"model": model, "path": path, **_how_far(result.metrics), "files": [asdict(file) for file in files]},
        *(
            [{"path": f"{path}/{post_training.BEST}", **_how_far(best[1]), "files": [asdict(file) for file in of_best]}]
            if best
            else []
        ),
    ]
    about = {"base": start.base.id, "model": model}
    return driver.Outcome(
        {"checkpoints": checkpoints},
        driver.artifact_row(work, name, "checkpoint", files, about),
        adapter=served if isinstance(served, Adapter) else None,
        model=served if isinstance(served, AddedModel) else None,
    )


def _kept(work: driver.Work, request: TrainingRequest, start: Start) -> str:
    """Keeps the last checkpoint of a training that went wrong, and says where: it was saved while all was well."""
    context, job = work.context, steadily(lambda: work.context.store.jobs.get(work.job.tenant, work.job.uuid))
    if job is None or not job.checkpoints:
        return "no checkpoint had been saved"
    last, whole = job.checkpoints[-1], post_training.is_whole(request, start)
    if not _has_weights(Path(last["path"])):
        return "the last checkpoint is of shards, of which no model is made here"
    made, name = work.folder / "published", post_training.artifact_name(job.tenant, job.uuid, whole)
    try:
        _export(Path(last["path"]), made, request, start, whole)
        files = driver.publish(work, name, made)
    except (OSError, StackError) as error:  # that is the lesser failure, and must not hide the other one
        return f"the checkpoint of step {last['iters']} could not be kept: {error}"
    row = driver.artifact_row(work, name, "checkpoint", files, {"base": start.base.id})
    steadily(lambda: context.store.artifacts.add(row))
    kept = last | {"path": context.artifacts.url(name), "files": [asdict(file) for file in files]}
    steadily(lambda: context.store.jobs.record(job.id, work.reporter.number, checkpoints=[kept]))
    return f"the checkpoint of step {last['iters']} is kept in {kept['path']}"


def _how_far(metrics: dict[str, Any]) -> dict[str, Any]:
    known = {
        "iters": metrics["steps"],
        "epoch": metrics.get("epoch"),
        "validation_loss": metrics.get("validation_loss"),
    }
    return {name: value for name, value in known.items() if value is not None}


def _best(result: Result) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The checkpoint with the lowest validation loss, if that is not the last one."""
    assert result.metrics is not None
    measured = [
        (checkpoint, metrics) for checkpoint, metrics in result.best_checkpoints or [] if "validation_loss" in metrics
    ]
    if not measured:
        return None
    checkpoint, metrics = min(measured, key=lambda one: float(one[1]["validation_loss"]))
    return (checkpoint, metrics) if metrics["steps"] != result.metrics["steps"] else None


def _has_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a model that can be loaded: those of FSDP and ZeRO may hold shards of it alone."""
    return any(checkpoint.glob("adapter_model.safetensors")) or any(checkpoint.glob("model*.safetensors"))


def _export(made: Path, target: Path, request: TrainingRequest, start: Start, whole: bool) -> None:
    """Copies a model's weights out of a checkpoint, an adapter merged into them where the result is a whole model."""
    if not whole or not (made / "adapter_config.json").is_file():
        target.mkdir(parents=True, exist_ok=True)
        for pattern in WEIGHTS:
            for file in made.glob(pattern):
                shutil.copy2(file, target)
    else:
        _merge(made, target, start.base, isinstance(request, RewardModelRequest))
    if whole:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(start.base.folder).save_pretrained(target)


def _merge(adapter: Path, target: Path, base: LanguageModel, is_reward: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = (
        AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=1)
        if is_reward
        else AutoModelForCausalLM.from_pretrained(base.folder)
    )
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)


def _served(
    work: driver.Work, request: TrainingRequest, start: Start, name: str, made: Path, whole: bool
) -> Adapter | AddedModel:
    """What serves the result: its base, or an application of its own, which starts when it is asked."""
    job, base = work.job, start.base
    if not whole:
        adapter_id = post_training.model_id(job.tenant, base.id, job.uuid)
        return Adapter(job.tenant, adapter_id, base.id, job.uuid, artifact=name, created_at=now())
    artifacts = work.context.artifacts.folder
    folder = artifacts / name if artifacts else trained_models.keep(name, made)
    model_id = post_training.whole_model_id(job.tenant, base.id, job.uuid)
    own = {"id": model_id, "path": str(folder), "min_replicas": 0, "max_replicas": base.most_replicas}
    is_reward = isinstance(request, RewardModelRequest)
    entry = (reward_entry(base) if is_reward else base.model_dump(mode="json", exclude_unset=True)) | own
    return AddedModel(model_id, job.tenant, entry, created_at=now(), removed_at=None, problem=None, private=True)


def reward_entry(base: LanguageModel) -> dict[str, Any]:
    """The entry of a reward model that was trained on a base: it takes as much, and runs on what its base does."""
    return {
        "kind": "classifier",
        "prompt_format": base.prompt_format,
        "max_tokens": base.context,
        "request_timeout_s": base.request_timeout_s,
        "cpus": base.cpus,
        "gpus": 1 if base.gpus else 0,
    }

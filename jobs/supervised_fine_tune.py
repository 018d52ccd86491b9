"""Supervised fine-tuning: TRL's SFTTrainer with a LoRA adapter of PEFT, in a worker of Ray Train.

    ray job submit -- python -m jobs.supervised_fine_tune --config jobs/examples/supervised_fine_tune.yaml

The file holds the body of POST /post_training/supervised_fine_tune. The trained adapter becomes an artifact and is
served at once as the model `base:job_uuid`. What the worker does is in jobs/training_worker.py.
"""

import shutil
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from jobs import driver
from jobs.reporter import steadily
from jobs.training_worker import ADAPTER, train_on_worker
from stack import post_training
from stack.api.post_training import PostTrainingSFTRequest
from stack.config import Config
from stack.store import Adapter, Job, Store, now


def fine_tune(work: driver.Work, request: PostTrainingSFTRequest) -> driver.Outcome:
    """Fine-tunes a model with a LoRA adapter and registers the adapter as a model."""
    context, job = work.context, work.job
    model = context.models.get(request.model).base
    workers = post_training.resources(context, request)
    temporary = work.folder / "temporary"  # and not where the system has its own: they may be large
    shutil.rmtree(temporary, ignore_errors=True)  # those of an attempt that was lost
    temporary.mkdir()
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={
            "config": context.config.model_dump(mode="json"),
            "request": request.model_dump(mode="json"),
            "model_folder": str(model.folder),
            "context": model.context,
            "tenant": job.tenant,
            "attempt": work.reporter.number,
            "temporary": str(temporary),
            "tensorboard": str(work.folder / "tensorboard"),
        },
        scaling_config=ScalingConfig(
            num_workers=workers["workers"], use_gpu=model.gpus > 0, resources_per_worker=workers["per_worker"]
        ),
        # A run of this name in this folder, by an attempt that was lost, is gone on with from its last checkpoint.
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy takes it for the class that it replaces
            name="train",
            storage_path=str(work.folder),
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[CheckpointRecorder(context.config, job, work.reporter.number)],  # type: ignore[list-item]  # as above
            # Ray Train's own `print` writes every line twice, and where others look for what they print.
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
        ),
    )
    name = post_training.adapter_name(job.tenant, job.uuid)
    result = trainer.fit()
    assert result.checkpoint is not None, "the training ended without a checkpoint"
    with result.checkpoint.as_directory() as folder:
        adapter_folder = Path(folder) / ADAPTER
        if (work.folder / "tensorboard").is_dir():
            shutil.copytree(work.folder / "tensorboard", adapter_folder / "tensorboard", dirs_exist_ok=True)
        files = driver.publish(work, name, adapter_folder)
    model_id = post_training.model_id(job.tenant, request.model, job.uuid)
    adapter = Adapter(job.tenant, model_id, request.model, job.uuid, artifact=name, created_at=now())
    checkpoint = {
        "model": adapter.model_id,
        "path": context.artifacts.url(name),
        "iters": (result.metrics or {})["steps"],
        "files": [asdict(file) for file in files],
    }
    artifact = driver.artifact_row(work, name, "checkpoint", files, {"model": adapter.model_id, "base": request.model})
    return driver.Outcome({"checkpoints": [checkpoint]}, artifact, adapter)


class CheckpointRecorder(UserCallback):
    """Writes down each checkpoint that another attempt would go on from, once Ray Train knows it."""

    def __init__(self, config: Config, job: Job, number: int) -> None:
        self._url = config.store_url
        self._job = job
        self._number = number

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            saved = {"path": checkpoint.path, "iters": metrics[0]["steps"], "files": []}
            steadily(lambda: self._record([saved]))

    def _record(self, checkpoints: list[dict[str, Any]]) -> None:
        with closing(Store(self._url)) as store:
            store.jobs.record(self._job.id, self._number, checkpoints=checkpoints)


if __name__ == "__main__":
    sys.exit(driver.run(PostTrainingSFTRequest, post_training.supervised_fine_tune, post_training.resources, fine_tune))

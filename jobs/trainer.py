"""How a training is run: the trainer of Ray Train, whose workers do what jobs/training_worker.py says."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.training_worker import Settings, train_on_worker
from stack.api.post_training import TrainingRequest

# Threads that wait for each other soon sleep: if they spin on, two trainings on the same two cores have a fifth of the
# speed each that one has alone, and if they sleep at once, one alone has a sixth less. And DeepSpeed does not find out
# by itself that there is no GPU.
ON_CPU = {"GOMP_SPINCOUNT": "1000", "DS_ACCELERATOR": "cpu"}
# How often workers are looked at, in seconds. A worker that reports a checkpoint waits for that: two seconds, which is
# what Ray Train takes, are much of a short training.
LOOK_S = "0.5"


@dataclass(frozen=True)
class Plan:
    """What the workers are told, what each of them takes, and the folder of what a training saves."""

    settings: Settings
    per_worker: dict[str, float]
    use_gpu: bool
    folder: Path


def trainer_of(
    plan: Plan, request: TrainingRequest, name: str, callbacks: list[UserCallback], *, trial: bool = False
) -> TorchTrainer:
    """The trainer of a run. One of this name by an attempt that was lost is gone on with from its last checkpoint."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", LOOK_S)
    training, settings = request.training_config, plan.settings
    told = replace(
        settings, request=request.model_dump(mode="json"), temporary=f"{settings.temporary}/{name}", trial=trial
    )
    # What is kept in the memory of the machine is summed up there, which NCCL cannot do.
    backend = "cpu:gloo,cuda:nccl" if plan.use_gpu and training.fsdp_cpu_offload else None
    return TorchTrainer(
        train_on_worker,
        train_loop_config=asdict(told),
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=plan.use_gpu, resources_per_worker=plan.per_worker
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy takes it for the class that it replaces
            name=name,
            storage_path=str(plan.folder),
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(
                num_to_keep=training.keep_checkpoints,
                checkpoint_score_attribute="validation_loss" if settings.validation else None,
                checkpoint_score_order="min",
            ),
            callbacks=callbacks,  # type: ignore[arg-type]  # as above
            # Ray Train's own `print` writes every line twice, and where others look for what they print.
            worker_runtime_env={
                "env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", **({} if plan.use_gpu else ON_CPU)},
            },
        ),
    )

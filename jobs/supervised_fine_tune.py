"""Supervised fine-tuning: TRL's SFTTrainer with a LoRA adapter of PEFT, in a worker of Ray Train.

    ray job submit -- python -m jobs.supervised_fine_tune --config jobs/examples/supervised_fine_tune.yaml

The file holds the body of POST /post_training/supervised_fine_tune. The trained adapter becomes an artifact and is
served at once as the model `base:job_uuid`.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs import driver
from stack import datasets, post_training
from stack.api.post_training import LoraFinetuningConfig, OptimizerConfig, OptimizerType, PostTrainingSFTRequest
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, StackError
from stack.store import Adapter, now

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


def fine_tune(context: Context, request: PostTrainingSFTRequest) -> driver.Outcome:
    """Fine-tunes a model with a LoRA adapter and registers the adapter as a model."""
    model = context.models.get(request.model).base
    resources: dict[str, float] = {"CPU": 1, "GPU": 1} if model.gpus else {"CPU": 1}
    storage = post_training.training_folder(request.job_uuid)
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={
            "config": context.config.model_dump(mode="json"),
            "request": request.model_dump(mode="json"),
            "model_folder": str(model.folder),
            "context": model.context,
        },
        scaling_config=ScalingConfig(num_workers=1, use_gpu=model.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=storage.name, storage_path=str(storage.parent), failure_config=FailureConfig(max_failures=0)
        ),
    )
    name = post_training.adapter_name(request.job_uuid)
    try:
        result = trainer.fit()
        assert result.checkpoint is not None, "the training ended without a checkpoint"
        with result.checkpoint.as_directory() as folder:
            files = context.artifacts.publish(name, Path(folder))
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    adapter = Adapter(
        post_training.model_id(request.model, request.job_uuid), request.model, request.job_uuid, created_at=now()
    )
    checkpoint = {
        "model": adapter.model_id,
        "path": context.artifacts.url(name),
        "iters": (result.metrics or {})["steps"],
        "files": [asdict(file) for file in files],
    }
    kept = {"checkpoints": [checkpoint], "resources_allocated": {"workers": 1, "per_worker": resources}}
    return driver.Outcome(kept, artifact=name, adapter=adapter)


def train_on_worker(settings: dict[str, Any]) -> None:
    """What a worker of Ray Train does: train, and report the adapter as its checkpoint."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if not torch.cuda.is_available():
        # Ray gives a worker one thread for each CPU it reserves, but on a laptop the other processes wait meanwhile.
        torch.set_num_threads(os.cpu_count() or 1)
    context = Context.open(Config.parse(settings["config"], "config"))
    request = PostTrainingSFTRequest.model_validate(settings["request"])
    training = request.training_config

    def dataset(reference: Any) -> Any:
        rows = datasets.examples(context, datasets.resolve(context, reference))
        return Dataset.from_list(
            [{"prompt": row.messages, "completion": [{"role": "assistant", "content": row.answer}]} for row in rows]
        )

    train = dataset(request.dataset)
    validation = dataset(request.validation_dataset) if request.validation_dataset is not None else None
    steps = -(-len(train) // training.batch_size) * training.n_epochs
    steps = min(steps, training.n_iters) if training.n_iters else steps
    model = AutoModelForCausalLM.from_pretrained(settings["model_folder"], dtype=_dtype())
    with TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=training.batch_size,
                per_device_eval_batch_size=training.batch_size,
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr": request.optimizer_config.lr_min},
                warmup_steps=max(1, round(0.03 * steps)),
                learning_rate=request.optimizer_config.lr,
                # Not grouped by length, which would save padding but make the batches less alike than chance does.
                train_sampling_strategy="random" if training.shuffle else "sequential",
                gradient_checkpointing=training.enable_activation_checkpointing,
                completion_only_loss=True,
                max_length=None,
                eval_strategy="steps" if validation is not None else "no",
                eval_steps=max(1, -(-steps // 5)),
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                seed=0,
            ),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=AutoTokenizer.from_pretrained(settings["model_folder"]),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=request.algorithm_config.rank,
                lora_alpha=request.algorithm_config.alpha,
                target_modules=target_modules(request.algorithm_config, model),
            ),
            optimizer_cls_and_kwargs=_optimizer(request.optimizer_config),
            callbacks=[_recorder(context, request.job_uuid)],
        )
        check_lengths("dataset", trainer.train_dataset["input_ids"], settings["context"])
        if validation is not None:
            check_lengths("validation_dataset", trainer.eval_dataset["input_ids"], settings["context"])
        trainer.train()
        adapter = Path(folder) / "adapter"
        trainer.model.save_pretrained(adapter)
        ray.train.report({"steps": trainer.state.global_step}, checkpoint=Checkpoint.from_directory(str(adapter)))


def check_lengths(name: str, rows: Iterable[list[int]], context: int) -> None:
    """Raises BadInput, naming the row, for an example with more tokens than the model's context."""
    for number, tokens in enumerate(rows, start=1):
        if len(tokens) > context:
            raise BadInput(f"{name}: row {number} has {len(tokens)} tokens, but the model's context is {context}")


def target_modules(lora: LoraFinetuningConfig, model: Any) -> list[str]:
    """The names of the linear layers that get an adapter. Raises BadInput for names that the model does not have."""
    import torch

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = [*lora.lora_attn_modules, *(MLP_MODULES if lora.apply_lora_to_mlp else ())]
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        raise BadInput(f"the model has no linear layers named {unknown[0]!r}; it has: {', '.join(sorted(linear))}")
    return wanted


def _optimizer(config: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    import torch

    classes = {
        OptimizerType.adam: torch.optim.Adam,
        OptimizerType.adamw: torch.optim.AdamW,
        OptimizerType.sgd: torch.optim.SGD,
    }
    return classes[config.optimizer_type], {"lr": config.lr, "weight_decay": config.weight_decay}


def _dtype() -> Any:
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _recorder(context: Context, job_uuid: str) -> Any:
    """A callback that writes each step's figures to the store."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            step, total = state.global_step, state.max_steps
            elapsed = time.monotonic() - self.start
            left = elapsed / step * (total - step) if step else None
            values = {NAMES[name]: float(value) for name, value in logs.items() if name in NAMES}
            if not math.isfinite(values.get("loss", 0.0)):
                raise StackError(f"the loss is {values['loss']} at step {step}: lower the learning rate")
            if "num_tokens" in logs:
                values["tokens_per_second"] = logs["num_tokens"] / elapsed
            values["seconds"] = elapsed
            context.store.record_progress(
                job_uuid,
                {"done": step, "total": total, "unit": "steps", "seconds_left": left},
                [(name, step, value) for name, value in values.items()],
            )
            print(f"step {step}/{total} " + " ".join(f"{name}={value:.4g}" for name, value in values.items()))

    return Recorder()


# What is recorded of what the trainer logs, and under which name.
NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "eval_loss": "validation_loss",
    "num_tokens": "tokens",
}


if __name__ == "__main__":
    sys.exit(driver.run(PostTrainingSFTRequest, post_training.supervised_fine_tune, fine_tune))

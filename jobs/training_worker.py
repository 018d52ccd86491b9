"""What a worker of Ray Train does in a fine-tuning.

It is a module of its own, so that Ray finds these functions by their names: what stands in the module that is run as
the driver would be sent as code, without the names that only annotations use.
"""

import math
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray.train
from ray.train import Checkpoint
from sqlalchemy.exc import SQLAlchemyError

from jobs.dataset_source import on_disk
from jobs.reporter import GIVEN_UP, RESOURCES, Metrics, resources, steadily
from stack import datasets
from stack.api.post_training import LoraFinetuningConfig, OptimizerConfig, OptimizerType, PostTrainingSFTRequest
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, StackError, Unavailable
from stack.store import Job, faults

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
# How often a training saves what another attempt would go on from, and under which name; the end has another one.
CHECKPOINTS = 10
SAVED = "saved"
ADAPTER = "adapter"


def train_on_worker(settings: dict[str, Any]) -> None:
    """What a worker of Ray Train does: train, reporting checkpoints to go on from, and the adapter at the end."""
    try:
        _train(settings)
    except SQLAlchemyError as error:
        # The driver gets only the text of what is raised here, by which it must know a database that is away.
        raise (faults.passing(error) or error) from error


def _train(settings: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    if not torch.cuda.is_available():
        # Ray gives a worker one thread for each CPU it reserves, but on a laptop the other processes wait meanwhile.
        torch.set_num_threads(os.cpu_count() or 1)
    restored = ray.train.get_checkpoint()
    context = Context.open(Config.parse(settings["config"], "config")).of_tenant(settings["tenant"])
    request = PostTrainingSFTRequest.model_validate(settings["request"])
    training = request.training_config
    model = AutoModelForCausalLM.from_pretrained(settings["model_folder"], dtype=_dtype())
    _set_up_loggers(request, settings["tensorboard"])
    job = context.store.jobs.get(context.tenant, request.job_uuid)
    assert job is not None
    with (
        Metrics(context.store, job, settings["attempt"]) as metrics,
        TemporaryDirectory(dir=settings["temporary"]) as folder,
        restored.as_directory() if restored else nullcontext() as earlier,
    ):
        train = on_disk(context, datasets.resolve(context, request.dataset), f"{folder}/dataset")
        validation = None
        if request.validation_dataset is not None:
            validation = on_disk(context, datasets.resolve(context, request.validation_dataset), f"{folder}/validation")
        steps = -(-len(train) // training.batch_size) * training.n_epochs
        steps = min(steps, training.n_iters) if training.n_iters else steps
        if earlier and (Path(earlier) / ADAPTER).is_dir():  # it was trained to the end, but not published
            ray.train.report({"steps": steps}, checkpoint=restored)
            return
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
                save_strategy="steps",
                save_steps=max(1, -(-steps // CHECKPOINTS)),
                save_total_limit=1,
                report_to=request.logger_config.report_to,
                run_name=request.logger_config.run_name or request.job_uuid,
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
            callbacks=[_recorder(context, job, settings, metrics)],
        )
        trainer.remove_callback(PrinterCallback)  # ours says more
        check_lengths("dataset", trainer.train_dataset["input_ids"], settings["context"])
        if validation is not None:
            check_lengths("validation_dataset", trainer.eval_dataset["input_ids"], settings["context"])
        trainer.train(resume_from_checkpoint=str(Path(earlier) / SAVED) if earlier else None)
        steadily(metrics.flush)
        final = Path(folder) / "final"
        trainer.model.save_pretrained(final / ADAPTER)
        ray.train.report({"steps": trainer.state.global_step}, checkpoint=Checkpoint.from_directory(str(final)))


def drop_figures(context: Context, job: Job, number: int, after_step: int) -> None:
    """Removes what was recorded of the steps behind one: they are done again, and their figures with them.

    Raises Unavailable if the attempt has been given up.
    """
    of = (job.tenant, job.run_id, after_step)
    if not steadily(lambda: context.store.telemetry.drop_metrics(*of, RECORDED, (job.id, number))):
        raise Unavailable(GIVEN_UP)


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


def _set_up_loggers(request: PostTrainingSFTRequest, tensorboard: str) -> None:
    """The integrations of the Trainer take where they report to from the environment."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = tensorboard
    if project := request.logger_config.project:
        os.environ |= {"WANDB_PROJECT": project, "MLFLOW_EXPERIMENT_NAME": project}


def _recorder(context: Context, job: Job, settings: dict[str, Any], metrics: Metrics) -> Any:
    """A callback that notes each step's figures, and reports what the trainer saves to Ray Train."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    process, number = psutil.Process(), settings["attempt"]

    class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = time.monotonic()
            self.first = state.global_step
            if number > 1:
                print(f"going on from step {self.first}, where the last checkpoint is")
                drop_figures(context, job, number, after_step=self.first)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steadily(metrics.flush)
            saved = get_last_checkpoint(args.output_dir)
            with TemporaryDirectory(dir=settings["temporary"]) as folder:
                shutil.copytree(saved, Path(folder) / SAVED)
                ray.train.report({"steps": state.global_step}, checkpoint=Checkpoint.from_directory(folder))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            step, total = state.global_step, state.max_steps
            elapsed = time.monotonic() - self.start
            left = elapsed / (step - self.first) * (total - step) if step > self.first else None
            values = {NAMES[name]: float(value) for name, value in logs.items() if name in NAMES}
            if not math.isfinite(values.get("loss", 0.0)):
                raise StackError(f"the loss is {values['loss']} at step {step}: lower the learning rate")
            if "num_tokens" in logs:
                values["tokens_per_second"] = logs["num_tokens"] / elapsed
            values["seconds"] = elapsed
            values |= resources(process)
            metrics.log(step, values.items())
            metrics.progress(step, total, "steps", left)
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
# All that is recorded: the figures of a run that are ours, and not what others have logged for it.
RECORDED = frozenset({*NAMES.values(), "tokens_per_second", "seconds", *RESOURCES})

"""What a worker of Ray Train does in a training: one of TRL's trainers, on examples that are tokens already.

It is a module of its own, so that Ray finds these functions by their names: what stands in the module that is run as
the driver would be sent as code, without the names that only annotations use.
"""

import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray.train
from ray.train import Checkpoint
from ray.util.placement_group import get_current_placement_group
from sqlalchemy.exc import SQLAlchemyError

from jobs import parallelism
from jobs.reporter import GIVEN_UP, RESOURCES, Metrics, resources, steadily
from jobs.step_sampler import StepSampler
from jobs.training_data import Kind
from stack import post_training
from stack.api.post_training import (
    FinetuningAlgorithm,
    LoraFinetuningConfig,
    OptimizerConfig,
    OptimizerType,
    PostTrainingRLHFRequest,
    PostTrainingSFTRequest,
    RewardModelRequest,
    TrainingConfig,
    TrainingRequest,
)
from stack.config import Config
from stack.context import Context
from stack.errors import Diverged, StackError, Unavailable
from stack.store import Job, faults

# How often a training saves what another attempt would go on from, if its request does not say so; and what is in the
# last checkpoint: the folder of what was made in the end, and its figures.
CHECKPOINTS = 10
MADE, FIGURES = "made", "figures.json"
# What a trial of a search tells of its worker: the placement group that it takes its resources from.
GROUP = "placement_group"
# Under which name it is in what the trainer has logged how long a training took so far, and how many tokens.
COUNTED = "counted"
REQUESTS: dict[Kind, type[TrainingRequest]] = {
    "sft": PostTrainingSFTRequest,
    "dpo": PostTrainingRLHFRequest,
    "reward": RewardModelRequest,
}


@dataclass(frozen=True)
class Settings:
    """What a worker is told. `train` and `validation` are Arrow files, `temporary` a folder that all workers share, as
    is `tensorboard`; `adapter` is the folder of the adapter that is trained on, if there is one. `trial` is set where
    the training is one of a search, which writes no figures of its own."""

    config: dict[str, Any]
    tenant: str
    attempt: int
    kind: Kind
    request: dict[str, Any]
    model: str
    adapter: str | None
    train: str
    examples: int
    validation: str | None
    temporary: str
    tensorboard: str
    trial: bool = False


def train_on_worker(told: dict[str, Any]) -> None:
    """What a worker of Ray Train does: train, reporting checkpoints to go on from, and what is made at the end."""
    try:
        _train(Settings(**told))
    except SQLAlchemyError as error:
        # The driver gets only the text of what is raised here, by which it must know a database that is away.
        raise (faults.passing(error) or error) from error


def _train(settings: Settings) -> None:
    import torch

    if not torch.cuda.is_available():
        # Ray gives a worker one thread for each CPU it reserves, but on a laptop the other processes wait meanwhile.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _local_workers()))
    restored = ray.train.get_checkpoint()
    request = REQUESTS[settings.kind].model_validate(settings.request)
    context = Context.open(Config.parse(settings.config, "config")).of_tenant(settings.tenant)
    for needed in (settings.model, settings.train):
        if not Path(needed).exists():
            raise StackError(f"{needed} is not on this node: STACK_HOME must be a folder that all nodes share")
    _set_up_loggers(request, settings.tensorboard)
    job = context.store.jobs.get(context.tenant, request.job_uuid)
    assert job is not None
    with (
        Metrics(context.store, job, settings.attempt) as metrics,
        restored.as_directory() if restored else nullcontext() as earlier,
    ):
        if earlier and (Path(earlier) / MADE).is_dir():  # it was trained to the end, but not published
            figures = json.loads((Path(earlier) / FIGURES).read_text())
            ray.train.report(figures, checkpoint=restored if _is_first() else None)
            return
        trainer = _trainer(settings, request)
        recorder = _recorder(context, job, settings, metrics)
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=earlier)
        steadily(metrics.flush)
        folder = Path(settings.temporary) / "final"
        parallelism.save(trainer, folder / MADE)
        figures, checkpoint = recorder.figures(trainer.state), None
        if _is_first():
            (folder / FIGURES).write_text(json.dumps(figures))
            checkpoint = Checkpoint.from_directory(str(folder))
        ray.train.report(figures, checkpoint=checkpoint)


def total_steps(request: TrainingRequest, examples: int) -> int:
    """After how many steps a training with so many examples ends. Each epoch ends with a whole step (StepSampler)."""
    training = request.training_config
    steps = -(-examples // training.batch_size) * training.n_epochs
    return min(steps, training.n_iters) if training.n_iters else steps


def algorithm_of(request: TrainingRequest, adapter: str | None) -> FinetuningAlgorithm:
    """What is trained of a model, or on an adapter of it: a preference optimization does not name it."""
    if isinstance(request, PostTrainingRLHFRequest):
        is_whole = request.lora_config is None and adapter is None
        return FinetuningAlgorithm.full if is_whole else FinetuningAlgorithm.lora
    assert isinstance(request, PostTrainingSFTRequest | RewardModelRequest)
    return request.algorithm


def loading(algorithm: FinetuningAlgorithm) -> dict[str, Any]:
    """How a model is loaded: in which precision, and in 4 bits where an adapter is trained on such weights.

    Weights that are trained are in float32 on GPUs too, which compute in bfloat16 then (the argument `bf16`): in that
    an optimizer's small steps would be lost in rounding.
    """
    import torch

    is_rough = torch.cuda.is_available() and algorithm != FinetuningAlgorithm.full
    dtype = torch.bfloat16 if is_rough else torch.float32
    if algorithm != FinetuningAlgorithm.qlora:
        return {"dtype": dtype}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # so that FSDP can shard them with the others
    )
    return {"dtype": dtype, "quantization_config": quantization}


def drop_figures(context: Context, job: Job, number: int, after_step: int) -> None:
    """Removes what was recorded of the steps behind one: they are done again, and their figures with them.

    Raises Unavailable if the attempt has been given up.
    """
    of = (job.tenant, job.run_id, after_step)
    if not steadily(lambda: context.store.telemetry.drop_metrics(*of, RECORDED, (job.id, number))):
        raise Unavailable(GIVEN_UP)


def _trainer(settings: Settings, request: TrainingRequest) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    validation = settings.validation
    given = dict(
        train_dataset=Dataset.from_file(settings.train),
        eval_dataset=Dataset.from_file(validation) if validation else None,
        processing_class=tokenizer,
    )
    arguments = _arguments(settings, request)
    match request:
        case PostTrainingSFTRequest():
            trainer = _sft_trainer(settings, request, arguments, given)
        case PostTrainingRLHFRequest():
            trainer = _dpo_trainer(settings, request, arguments, given)
        case RewardModelRequest():
            trainer = _reward_trainer(settings, request, arguments, given)
        case _:
            raise TypeError(type(request))
    trainer.remove_callback(PrinterCallback)  # ours says more
    sampler = _sampler(request.training_config, given["train_dataset"])
    trainer._get_train_sampler = lambda *_: sampler  # as a subclass of each of the trainers would do
    trainer.optimizer_cls_and_kwargs = _optimizer(request.optimizer_config)
    return trainer


def _sampler(training: TrainingConfig, data: Any) -> StepSampler:
    """The order of the examples: of shuffled ones the same that Accelerate makes of the Trainer's own sampler."""
    import pyarrow.compute
    from accelerate.data_loader import SeedableRandomSampler  # type: ignore[import-untyped]
    from torch.utils.data import SequentialSampler

    order = SeedableRandomSampler(data, data_seed=training.seed) if training.shuffle else SequentialSampler(data)
    lengths = np.sum([pyarrow.compute.list_value_length(column).to_numpy() for column in data.data.columns], axis=0)
    return StepSampler(order, lengths.tolist(), training.batch_size)


def _arguments(settings: Settings, request: TrainingRequest) -> dict[str, Any]:
    """The arguments that all trainers have in common."""
    import torch

    training, on_cpu = request.training_config, not torch.cuda.is_available()
    steps = total_steps(request, settings.examples)
    every = training.checkpoint_iters or max(1, -(-steps // CHECKPOINTS))
    micro = post_training.micro_batch_size(training, on_cpu=on_cpu)
    return dict(
        output_dir=f"{settings.temporary}/trainer",
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // (training.workers * micro),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": request.optimizer_config.lr_min / request.optimizer_config.lr},
        warmup_steps=round(0.03 * steps),  # none for a few: the first of them would learn nothing
        learning_rate=request.optimizer_config.lr,
        weight_decay=request.optimizer_config.weight_decay,
        gradient_checkpointing=training.enable_activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps" if settings.validation is not None else "no",
        eval_steps=every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or a loss that is no number any more is logged as 0
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        report_to=[] if settings.trial else request.logger_config.report_to,
        run_name=request.logger_config.run_name or request.job_uuid,
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        seed=training.seed,
        **parallelism.arguments(
            post_training.parallelism_of(training),
            wrap_blocks=training.memory_efficient_fsdp_wrap,
            offload=training.fsdp_cpu_offload,
            is_cpu=on_cpu,
        ),
    )


def _sft_trainer(
    settings: Settings, request: PostTrainingSFTRequest, arguments: dict[str, Any], given: dict[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(settings.model, **loading(request.algorithm))
    # The examples are tokens with their labels, and packed if they are to be.
    prepared = dict(max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(
        model=model,
        args=_ready(SFTConfig(**arguments, **prepared, padding_free=request.training_config.packing), request),
        peft_config=_lora(request.algorithm_config, request.algorithm, "CAUSAL_LM"),
        **given,
    )


def _dpo_trainer(
    settings: Settings, request: PostTrainingRLHFRequest, arguments: dict[str, Any], given: dict[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class Preferences(DPOTrainer):  # type: ignore[misc]  # TRL is untyped here
        """The examples are tokens already: TRL has no option that says so, as its other trainers have."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            """Where an adapter is trained on, a copy of it, "ref", is the reference, and is saved in a folder within
            the checkpoint. The Trainer loads what is in such folders, and not the adapter beside them. The reference
            needs no loading: it is as it was."""
            if settings.adapter is None or self.is_fsdp_enabled:  # FSDP has all in one file
                super()._load_from_checkpoint(checkpoint, model)
            else:
                self.model.load_adapter(checkpoint, "default", is_trainable=True)

    dpo, lora = request.algorithm_config, request.lora_config
    losses = {"robust" if dpo.epsilon else "sigmoid": 1.0} | ({"sft": dpo.gamma} if dpo.gamma else {})
    algorithm = algorithm_of(request, settings.adapter)
    model = AutoModelForCausalLM.from_pretrained(settings.model, **loading(algorithm))
    if settings.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, settings.adapter, is_trainable=True)
    config = DPOConfig(
        **arguments,
        max_length=None,
        beta=dpo.beta * dpo.reward_scale,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        label_smoothing=dpo.epsilon,
        # Where there is an adapter, the model without it, or with it as it was, is the reference. Otherwise that would
        # be a second model in the memory.
        precompute_ref_log_probs=algorithm == FinetuningAlgorithm.full,
    )
    return Preferences(
        model=model,
        args=_ready(config, request),
        peft_config=_lora(lora, algorithm, "CAUSAL_LM"),
        **given,
    )


def _reward_trainer(
    settings: Settings, request: RewardModelRequest, arguments: dict[str, Any], given: dict[str, Any]
) -> Any:
    from transformers import AutoModelForSequenceClassification, set_seed
    from trl import RewardConfig, RewardTrainer

    set_seed(request.training_config.seed)  # by which the new head is drawn
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=1, **loading(request.algorithm)
    )
    return RewardTrainer(
        model=model,
        args=_ready(RewardConfig(**arguments, max_length=None), request),
        peft_config=_lora(request.algorithm_config, request.algorithm, "SEQ_CLS"),
        **given,
    )


def _ready(config: Any, request: TrainingRequest) -> Any:
    parallelism.prepare(config, post_training.parallelism_of(request.training_config))
    return config


def _lora(lora: LoraFinetuningConfig | None, algorithm: FinetuningAlgorithm, task: str) -> Any:
    from peft import LoraConfig

    if lora is None:
        return None
    mlp = post_training.MLP_MODULES if lora.apply_lora_to_mlp else ()
    return LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[*lora.lora_attn_modules, *mlp],
        use_dora=algorithm == FinetuningAlgorithm.dora,
    )


def _optimizer(config: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    import torch

    classes = {
        OptimizerType.adam: torch.optim.Adam,
        OptimizerType.adamw: torch.optim.AdamW,
        OptimizerType.sgd: torch.optim.SGD,
    }
    # The weight decay is the Trainer's argument: it leaves out biases and norms.
    return classes[config.optimizer_type], {"lr": config.lr}


def _set_up_loggers(request: TrainingRequest, tensorboard: str) -> None:
    """The integrations of the Trainer take where they report to from the environment."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = tensorboard
    if project := request.logger_config.project:
        os.environ |= {"WANDB_PROJECT": project, "MLFLOW_EXPERIMENT_NAME": project}


def _is_first() -> bool:
    return int(ray.train.get_context().get_world_rank()) == 0


def _local_workers() -> int:
    return int(ray.train.get_context().get_local_world_size())


def _wait_for_all() -> None:
    """Until all workers have come so far: each writes its part of a checkpoint."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _recorder(context: Context, job: Job, settings: Settings, metrics: Metrics) -> Any:
    """A callback that notes each step's figures, and reports what the trainer saves to Ray Train."""
    from transformers import TrainerCallback

    process, number = psutil.Process(), settings.attempt
    writes = _is_first() and not settings.trial
    group = get_current_placement_group() if settings.trial else None
    placed = {GROUP: group.id.hex()} if group else {}

    class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        validation_loss: float | None = None
        loss: float | None = None

        def figures(self, state: Any) -> dict[str, Any]:
            """What is told with a checkpoint."""
            known = {"loss": self.loss, "validation_loss": self.validation_loss}
            measured = {name: value for name, value in known.items() if value is not None}
            return {"steps": state.global_step, "epoch": state.epoch, **measured}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = time.monotonic()
            self.first = state.global_step
            # What was counted up to the checkpoint, which has all that was logged.
            logs = [log for log in state.log_history if COUNTED in log]
            self.earlier: dict[str, float] = logs[-1][COUNTED] if logs else dict.fromkeys(("seconds", "tokens"), 0.0)
            for log in state.log_history:  # what was measured last, if nothing more is
                self.loss = log.get("loss", self.loss)
                self.validation_loss = log.get("eval_loss", self.validation_loss)
            # Where a node is about to be taken away, Ray Train starts the workers anew within an attempt.
            if (number > 1 or self.first) and writes:
                print(f"going on from step {self.first}, where the last checkpoint is")
                drop_figures(context, job, number, after_step=self.first)

        def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **_: Any) -> None:
            # Which epoch it is decides the order of the examples. Several workers that go on in the middle of one are
            # not told by the Trainer, and would have that of the first.
            batches = train_dataloader.batch_sampler
            while hasattr(batches, "batch_sampler"):
                batches = batches.batch_sampler
            if hasattr(batches.sampler, "set_epoch"):
                batches.sampler.set_epoch(int(state.epoch))
            # Or Accelerate takes examples of an epoch's last step for repeated ones, and their tokens are not counted.
            train_dataloader.dataset.total_dataset_length = len(batches.sampler)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps and settings.validation is not None:
                control.should_evaluate = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steadily(metrics.flush)
            _wait_for_all()
            saved = f"{args.output_dir}/checkpoint-{state.global_step}"
            checkpoint = Checkpoint.from_directory(saved) if _is_first() else None
            ray.train.report(self.figures(state) | placed, checkpoint=checkpoint)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            step, total = state.global_step, state.max_steps
            elapsed = time.monotonic() - self.start
            left = elapsed / (step - self.first) * (total - step) if step > self.first else None
            values = {NAMES[name]: float(value) for name, value in logs.items() if name in NAMES}
            self.loss = values.get("loss", self.loss)
            self.validation_loss = values.get("validation_loss", self.validation_loss)
            # Before anything is saved of weights that are no numbers by now, or takes that for its score.
            for name in ("loss", "gradient_norm", "validation_loss"):
                if not math.isfinite(values.get(name, 0.0)):
                    raise Diverged(f"the {name} is {values[name]} at step {step}: lower the learning rate")
            if "loss" in logs:  # and not only what was measured besides, at the same step
                values |= self.count(elapsed, values["tokens"], state) | resources(process)
            if not values or not writes:
                return
            metrics.log(step, values.items())
            metrics.progress(step, total, "steps", left)
            print(f"step {step}/{total} " + " ".join(f"{name}={value:.4g}" for name, value in values.items()))

        def count(self, seconds: float, tokens: float, state: Any) -> dict[str, float]:
            """The seconds and tokens of the whole training, which are noted in what the Trainer saves."""
            counted = {"seconds": self.earlier["seconds"] + seconds, "tokens": self.earlier["tokens"] + tokens}
            state.log_history[-1][COUNTED] = counted
            return counted | {"tokens_per_second": counted["tokens"] / counted["seconds"]}

    return Recorder()


# What is recorded of what the trainers log, and under which name.
NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "eval_loss": "validation_loss",
    "num_tokens": "tokens",
    "rewards/accuracies": "preference_accuracy",
    "rewards/margins": "preference_margin",
    "eval_rewards/accuracies": "validation_preference_accuracy",
    "eval_rewards/margins": "validation_preference_margin",
    "accuracy": "preference_accuracy",
    "eval_accuracy": "validation_preference_accuracy",
    "margin": "preference_margin",
    "eval_margin": "validation_preference_margin",
}
# All that is recorded: the figures of a run that are ours, and not what others have logged for it.
RECORDED = frozenset({*NAMES.values(), "tokens_per_second", "seconds", *RESOURCES})

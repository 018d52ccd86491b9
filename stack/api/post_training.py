"""Wire types of the post-training API."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from stack.api.datasets import DatasetReference
from stack.api.jobs import ArtifactFile, JobEntry, JobState, MetricPoint, Priority
from stack.api.wire import Id, ModelId, Request, Wire, at_most, without_nul


class FinetuningAlgorithm(StrEnum):
    """What is trained: all weights, or an adapter of low rank (LoRA), on 4-bit weights (QLoRA, Dettmers et al. 2023,
    arXiv 2305.14314) or with its magnitudes apart from its directions (DoRA, Liu et al. 2024, arXiv 2402.09353)."""

    full = "full"
    lora = "lora"
    qlora = "qlora"
    dora = "dora"


class LoraFinetuningConfig(Wire):
    """Which linear layers get an adapter, of which rank, scaled by alpha / rank (Hu et al. 2021, arXiv 2106.09685).

    `apply_lora_to_output` must be false: TRL trains no adapter of the output layer.
    """

    lora_attn_modules: Annotated[list[Annotated[str, Field(max_length=100)]], at_most(100)]
    apply_lora_to_mlp: bool
    apply_lora_to_output: bool
    rank: Annotated[int, Field(ge=1, le=1_024)]
    alpha: Annotated[int, Field(ge=1, le=10_000)]


# A client that must send one for full training, as the specification has it, sends an empty one.
OptionalLora = Annotated[LoraFinetuningConfig | None, BeforeValidator(lambda value: value if value != {} else None)]


class OptimizerType(StrEnum):
    adam = "adam"
    adamw = "adamw"
    sgd = "sgd"


class OptimizerConfig(Wire):
    """The learning rate rises over the first 3 % of the steps to `lr` and falls along a cosine to `lr_min`."""

    optimizer_type: OptimizerType
    lr: Annotated[float, Field(gt=0, le=1)]
    lr_min: Annotated[float, Field(ge=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]


class Parallelism(StrEnum):
    """How several workers share a training: each with the whole model (ddp), or with a part of its weights, gradients
    and optimizer state (fsdp, zero3), of the two latter (zero2), or of the optimizer state alone (zero1)."""

    ddp = "ddp"
    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class TooLong(StrEnum):
    """What becomes of an example with more tokens than `max_length`: the job ends, it is cut, or left out."""

    refuse = "refuse"
    cut = "cut"
    drop = "drop"


class TrainingConfig(Wire):
    """Training ends after `n_epochs` or after `n_iters` steps (0: no such limit), whichever comes first.

    `batch_size` counts the examples of one optimizer step, of all `workers` together. Each worker takes
    `micro_batch_size` of them at a time (if it is not set, all of its share on GPUs and up to 4 on CPUs, or 1 packed
    row), so that a step is made of batch_size / (workers * micro_batch_size) forward passes. The last step of an epoch
    is completed with the examples that the epoch began with.

    `memory_efficient_fsdp_wrap` shards each transformer block for itself, and `fsdp_cpu_offload` keeps the shards in
    the memory of the machine instead of the GPU's; both make the parallelism `fsdp`.

    `max_length` is the greatest number of tokens of an example, the model's context if it is not set. With `packing`
    short examples share a row of that length; those of one row do not see each other.

    What another attempt would go on from is saved every `checkpoint_iters` steps (0: ten times in all), and a
    `validation_dataset` is measured then. `keep_checkpoints` of these are kept, those that did best where that was
    measured, and the last one always. With `merge` the result of training an adapter is a whole model, with the adapter
    in its weights.
    """

    n_epochs: Annotated[int, Field(ge=1, le=1_000)]
    batch_size: Annotated[int, Field(ge=1, le=65_536)]
    shuffle: bool
    n_iters: Annotated[int, Field(ge=0, le=100_000_000)]
    enable_activation_checkpointing: bool = False
    memory_efficient_fsdp_wrap: bool = False
    fsdp_cpu_offload: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    max_length: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    too_long: TooLong = TooLong.refuse
    packing: bool = False
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    workers: Annotated[int, Field(ge=1, le=1_024)] = 1
    parallelism: Parallelism | None = None
    checkpoint_iters: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    keep_checkpoints: Annotated[int, Field(ge=1, le=100)] = 1
    merge: bool = False


class SearchAlgorithm(StrEnum):
    """All combinations, so many drawn at random, or these with the ones that do badly ended early (asynchronous
    successive halving, Li et al. 2018, arXiv 1810.05934)."""

    grid = "grid"
    random = "random"
    asha = "asha"


class HyperparamSearch(Wire):
    """Trainings of the same request with other values, one of which becomes the job's result.

    `parameters` names fields (optimizer_config.lr, algorithm_config.rank, training_config.batch_size, for example) and
    the values to try. Of the trials that are trained to their end the one with the lowest validation loss is the best,
    so that a `validation_dataset` is needed, and what makes the loss itself another one cannot be searched over: the
    algorithm_config of DPO. The algorithms random and asha draw so many different combinations as `trials` says, by
    `seed` (8 by 0 if they are not set, or all if there are fewer).
    """

    algorithm: SearchAlgorithm = SearchAlgorithm.grid
    parameters: Annotated[
        dict[
            Annotated[str, Field(max_length=100)],
            Annotated[list[int | float | str | bool], Field(min_length=1), at_most(100)],
        ],
        Field(min_length=1),
        at_most(20),
    ]
    trials: Annotated[int, Field(ge=1, le=1_000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


OptionalSearch = Annotated[HyperparamSearch | None, BeforeValidator(lambda value: value if value != {} else None)]


class LoggerConfig(Wire):
    """Where a training reports its figures beside the job's own run, by the Trainer's integrations.

    `report_to` names them; `project` and `run_name` are what they call the training (`run_name` is the job_uuid by
    default). TensorBoard's files lie among the job's artifacts. MLflow and Weights & Biases find their servers and keys
    by their own environment variables, and must be installed.
    """

    report_to: Annotated[list[Literal["tensorboard", "mlflow", "wandb"]], at_most(3)] = []
    project: Annotated[str, Field(max_length=200)] | None = None
    run_name: Annotated[str, Field(max_length=200)] | None = None


class TrainingRequest(Request):
    """What all kinds of training have in common.

    `dataset` and `validation_dataset` are data sets, or the ids of registered ones.
    """

    job_uuid: Id
    dataset: DatasetReference
    validation_dataset: DatasetReference | None = None
    optimizer_config: OptimizerConfig
    training_config: TrainingConfig
    hyperparam_search_config: OptionalSearch = None
    logger_config: LoggerConfig = LoggerConfig()
    priority: Priority = 0


class PostTrainingSFTRequest(TrainingRequest):
    """Supervised fine-tuning: the model learns the assistant's messages. `full` alone has no `algorithm_config`."""

    model: ModelId
    algorithm: FinetuningAlgorithm
    algorithm_config: OptionalLora = None


class RLHFAlgorithm(StrEnum):
    dpo = "dpo"


def _no_bound(reward_clip: float) -> float:
    if reward_clip != 0:
        raise ValueError(f"is {reward_clip:g}; allowed: 0, no bound, as no loss of TRL bounds the reward")
    return reward_clip


class DPOAlignmentConfig(Wire):
    """The loss of direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), by TRL's DPOTrainer.

    The implicit reward of an answer is r = beta * reward_scale * log(policy / reference). The loss of a pair is
    -log sigmoid(r_chosen - r_rejected). `epsilon` is how probable it is that a pair's labels are flipped, and makes the
    loss robust against that (Chowdhury et al. 2024, arXiv 2403.00409). `gamma` is the weight of the chosen answer's
    negative log-likelihood, which is added to the loss (Llama 3, arXiv 2407.21783, section 4.1.4, has 0.2).
    `reward_clip` would bound r; no loss of TRL has that, so that only 0, no bound, is allowed.
    """

    reward_scale: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    reward_clip: Annotated[float, AfterValidator(_no_bound)] = 0.0
    epsilon: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    gamma: Annotated[float, Field(ge=0, le=100)] = 0.0
    beta: Annotated[float, Field(gt=0, le=1_000)] = 0.1


class PostTrainingRLHFRequest(TrainingRequest):
    """Preference optimization of a model: a served one, the job_uuid of the training that made it, or the address of
    one of its checkpoints.

    An adapter is trained on; it is its own reference as it was. A whole model gets a new adapter by `lora_config`, and
    is the reference itself, without the adapter; without `lora_config` all its weights are trained, and the reference's
    probabilities are computed before the training.
    """

    finetuned_model: Annotated[str, Field(min_length=1, max_length=4_096), AfterValidator(without_nul)]
    algorithm: RLHFAlgorithm
    algorithm_config: DPOAlignmentConfig
    lora_config: OptionalLora = None


class RewardModelRequest(TrainingRequest):
    """A reward model: a head on the base model that gives an answer a number, which is learned from preferences
    (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155), by TRL's RewardTrainer.

    It is trained whole, or with a LoRA adapter, which is merged into its weights at the end.
    """

    model: ModelId
    algorithm: FinetuningAlgorithm
    algorithm_config: OptionalLora = None


class PostTrainingJob(Wire):
    job_uuid: str


class PostTrainingJobEntry(JobEntry):
    """A fine-tuning in a list."""


class Checkpoint(Wire):
    """A trained model: the id under which it is served, where it lies among the artifacts, and its files.

    `iters` and `epoch` are how far the training was. One that a training has saved to go on from, should it be
    interrupted, is not served and has no `model`. `validation_loss` is that of its step, if it was measured.
    """

    model: str | None = None
    path: str
    iters: int
    epoch: float | None = None
    validation_loss: float | None = None
    files: list[ArtifactFile]


class PostTrainingJobStatusResponse(JobState):
    checkpoints: list[Checkpoint]


class PostTrainingJobArtifactsResponse(Wire):
    job_uuid: str
    checkpoints: list[Checkpoint]
    metrics: list[MetricPoint]

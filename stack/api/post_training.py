"""Wire types of the post-training API."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from stack.api.datasets import DatasetReference
from stack.api.jobs import ArtifactFile, JobEntry, JobState, MetricPoint, Priority
from stack.api.wire import Id, Info, ModelId, Request, Wire, at_most


class FinetuningAlgorithm(StrEnum):
    full = "full"
    lora = "lora"
    qlora = "qlora"
    dora = "dora"


class LoraFinetuningConfig(Wire):
    """Which linear layers get an adapter, of which rank, scaled by alpha / rank (Hu et al. 2021, arXiv 2106.09685)."""

    lora_attn_modules: Annotated[list[Annotated[str, Field(max_length=100)]], at_most(100)]
    apply_lora_to_mlp: bool
    apply_lora_to_output: bool
    rank: Annotated[int, Field(ge=1, le=1_024)]
    alpha: Annotated[int, Field(ge=1, le=10_000)]


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


class TrainingConfig(Wire):
    """Training ends after `n_epochs` or after `n_iters` steps (0: no such limit), whichever comes first.

    `batch_size` counts the examples of one optimizer step.
    """

    n_epochs: Annotated[int, Field(ge=1, le=1_000)]
    batch_size: Annotated[int, Field(ge=1, le=65_536)]
    shuffle: bool
    n_iters: Annotated[int, Field(ge=0, le=100_000_000)]
    enable_activation_checkpointing: bool = False
    memory_efficient_fsdp_wrap: bool = False
    fsdp_cpu_offload: bool = False


class LoggerConfig(Wire):
    """Where a training reports its figures beside the job's own run, by the Trainer's integrations.

    `report_to` names them; `project` and `run_name` are what they call the training (`run_name` is the job_uuid by
    default). TensorBoard's files lie among the job's artifacts. MLflow and Weights & Biases find their servers and keys
    by their own environment variables, and must be installed.
    """

    report_to: Annotated[list[Literal["tensorboard", "mlflow", "wandb"]], at_most(3)] = []
    project: Annotated[str, Field(max_length=200)] | None = None
    run_name: Annotated[str, Field(max_length=200)] | None = None


class PostTrainingSFTRequest(Request):
    """`dataset` and `validation_dataset` are data sets, or the ids of registered ones."""

    job_uuid: Id
    model: ModelId
    dataset: DatasetReference
    validation_dataset: DatasetReference | None = None
    algorithm: FinetuningAlgorithm
    algorithm_config: LoraFinetuningConfig
    optimizer_config: OptimizerConfig
    training_config: TrainingConfig
    hyperparam_search_config: Info = {}
    logger_config: LoggerConfig = LoggerConfig()
    priority: Priority = 0


class PostTrainingJob(Wire):
    job_uuid: str


class PostTrainingJobEntry(JobEntry):
    """A fine-tuning in a list."""


class Checkpoint(Wire):
    """A trained model: the id under which it is served, where it lies among the artifacts, and its files.

    One that a training has saved to go on from, should it be interrupted, is not served and has no `model`.
    """

    model: str | None = None
    path: str
    iters: int
    files: list[ArtifactFile]


class PostTrainingJobStatusResponse(JobState):
    checkpoints: list[Checkpoint]


class PostTrainingJobArtifactsResponse(Wire):
    job_uuid: str
    checkpoints: list[Checkpoint]
    metrics: list[MetricPoint]

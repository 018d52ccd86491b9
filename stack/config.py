"""The configuration: one frozen Config, read once.

It is the `args` of the application `gateway` in a Serve config file (serve_apps/local.yaml). Relative paths in it are
relative to the stack's home folder: the environment variable STACK_HOME, or ~/.llama-stack-ray. Job drivers, which no
Serve application starts, find it by the environment variable STACK_CONFIG: the path of a Serve config file, or the
JSON text of a Config, which is what the job supervisor hands to them. Without it they read serve_apps/local.yaml.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from stack.agents_config import AgentsConfig
from stack.api.wire import ModelId, Wire, at_most, describe, without_nul
from stack.errors import BadInput
from stack.shield_config import ModelShields, Shield, require_base, require_shields_fit

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FILE = ROOT / "serve_apps" / "local.yaml"
GATEWAY = "gateway"


def home() -> Path:
    """The folder of everything that the stack keeps on this machine."""
    return Path(os.environ.get("STACK_HOME") or "~/.llama-stack-ray").expanduser().absolute()


# Of vLLM's: fp8 of weights that are not yet quantized at their loading; the others say what the weights are already.
Quantization = Literal["fp8", "compressed-tensors", "modelopt", "modelopt_fp4", "mxfp4", "awq_marlin", "gptq_marlin"]

# Ray's names of the GPUs that vLLM runs on.
Accelerator = Literal[
    "V100",
    "T4",
    "A10G",
    "L4",
    "L40S",
    "A100",
    "A100-40G",
    "A100-80G",
    "H20",
    "H100",
    "H200",
    "B200",
    "B300",
    "GB200",
    "GB300",
    "RTX-PRO-6000",
    "AMD-Instinct-MI250X",
    "AMD-Instinct-MI300A",
    "AMD-Instinct-MI300X-OAM",
    "AMD-Instinct-MI308X",
    "AMD-Instinct-MI325X-OAM",
    "AMD-Instinct-MI350X-OAM",
    "AMD-Instinct-MI355X-OAM",
]

# Arguments of vLLM's engine that have a key of their own.
_FIELDS_OF_ENGINE = {
    "model": "path",
    "tokenizer": "path",
    "served_model_name": "id",
    "dtype": "dtype",
    "quantization": "quantization",
    "max_model_len": "context",
    "enable_lora": "adapters",
    "max_loras": "adapters",
    "max_lora_rank": "adapter_rank",
    "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": "pipeline_parallel",
}


# The id of what the config lists: also the name of an application of Ray Serve.
ServedId = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class ServedModel(Wire):
    """A model that is served: its id, the folder of its files, and how its replicas follow the load.

    There are `min_replicas` to `max_replicas` (as many, if it is not set), such that each has about
    `target_ongoing_requests`: a load that lasts `upscale_delay_s` makes them more, one that lasts `downscale_delay_s`
    fewer. With a minimum of 0 none runs while nobody asks.

    A replica works on `max_ongoing_requests`. `max_queued_requests` more may wait in each gateway, and what comes
    beyond them is refused. A request has `request_timeout_s` for everything.
    """

    id: ServedId
    path: Annotated[str, Field(min_length=1, max_length=4_000), AfterValidator(without_nul)]
    min_replicas: Annotated[int, Field(ge=0, le=1_000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1_000)] | None = None
    target_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 64
    upscale_delay_s: Annotated[float, Field(ge=0, le=86_400)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0, le=86_400)] = 600
    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 256
    max_queued_requests: Annotated[int, Field(ge=1, le=100_000)] = 256
    request_timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 600
    cpus: Annotated[float, Field(gt=0, le=1_024)] = 1

    @model_validator(mode="after")
    def _replicas_fit(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; allowed: at least min_replicas, {self.min_replicas}"
            )
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests is {self.target_ongoing_requests}; allowed: at most max_ongoing_requests, "
                f"{self.max_ongoing_requests}"
            )
        return self

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or max(1, self.min_replicas)

    @property
    def folder(self) -> Path:
        return home() / Path(self.path).expanduser()


class LanguageModel(ServedModel):
    """A language model that is served: its id, its weights, how its engine is set up, and what it takes.

    `context` is the greatest number of prompt and answer tokens together. `adapters` is how many LoRA adapters each
    replica keeps loaded at once, each of at most rank `adapter_rank`. `quantization` names what the weights are or are
    made at loading (fp8); `prompt_format` how the model is told of tools. `engine` holds further arguments of vLLM's
    engine as they are.

    Messages for a model with `images` may hold some; it must be one that was trained for them.

    A replica is one engine. It takes `tensor_parallel` times `pipeline_parallel` workers, each with a GPU (`gpus` is
    their number, or 0 on CPU) of `accelerator_type`, in Ray's names, or with `cpus` and `kv_cache_gb` (CPU only). With
    `prefix_routing` requests that begin alike go to the same replica, which still holds what it computed of it.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization | None = None
    context: Annotated[int, Field(ge=16, le=10_000_000)] = 2_048
    prompt_format: Literal["llama3", "hermes", "plain"] = "plain"
    images: bool = False
    adapters: Annotated[int, Field(ge=0, le=256)] = 4
    adapter_rank: Annotated[int, Field(ge=1, le=512)] = 32
    prefix_routing: bool = False
    gpus: Annotated[int, Field(ge=0, le=1_024)] = 0
    accelerator_type: Accelerator | None = None
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    kv_cache_gb: Annotated[int, Field(ge=1, le=1_024)] = 2
    engine: Annotated[dict[str, Any], at_most(200)] = {}

    @field_validator("engine")
    @classmethod
    def _engine_sets_nothing_twice(cls, engine: dict[str, Any]) -> dict[str, Any]:
        for key in engine:
            if key in _FIELDS_OF_ENGINE:
                raise ValueError(f"{key!r} is set by the key {_FIELDS_OF_ENGINE[key]!r} beside `engine`")
            if key == "trust_remote_code":
                raise ValueError("'trust_remote_code' is never set: it runs code that comes with a model's weights")
        return engine

    @model_validator(mode="after")
    def _accelerators_fit(self) -> "LanguageModel":
        if self.gpus not in (0, self.workers):
            raise ValueError(
                f"gpus is {self.gpus}; allowed: tensor_parallel × pipeline_parallel, here "
                f"{self.tensor_parallel} × {self.pipeline_parallel} = {self.workers}, or 0 for none"
            )
        if self.accelerator_type and not self.gpus:
            raise ValueError(f"accelerator_type is {self.accelerator_type!r}; allowed with gpus alone, which are 0")
        return self

    @property
    def workers(self) -> int:
        """How many processes, each with its share of the weights, one replica consists of."""
        return self.tensor_parallel * self.pipeline_parallel


class EmbeddingModel(ServedModel):
    """An embedding model that is served: its id, its folder in the format of sentence-transformers, how it is run.

    `dimensions` is the length of its vectors, that of the model where it is not given; where it is another than the
    model's, the model does not start. With `matryoshka` a request may ask for fewer dimensions: only for models that
    were trained such that the beginnings of their vectors are vectors too. A replica encodes up to `max_batch` texts at
    once, of one or of several requests: those that came while it computed, and if it was idle, those that come within
    `batch_wait_s` seconds.

    A replica takes `cpus`, which is also its number of threads, and `gpus`.
    """

    dimensions: Annotated[int, Field(ge=1, le=100_000)] | None = None
    matryoshka: bool = False
    max_batch: Annotated[int, Field(ge=1, le=4_096)] = 32
    batch_wait_s: Annotated[float, Field(ge=0, le=10)] = 0
    target_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 16
    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 64
    gpus: Annotated[float, Field(ge=0, le=1)] = 0


class SequenceClassifier(ServedModel):
    """A model that gives texts a number for each of its labels, and is served: for shields, and as a reward model.

    Its folder is one of a sequence classifier of transformers with safetensors, or that of a small head on an embedding
    model (serve_apps/classifiers.py). It takes texts of up to `max_tokens` tokens, and fewer where its files say so. A
    replica scores up to `max_batch` texts at once, of one or of several requests: those that came while it computed,
    and if it was idle, those that come within `batch_wait_s` seconds.

    A `path` that begins with stack/ is that of a head which comes with the stack.

    A replica takes `cpus`, which is also its number of threads, and `gpus`.
    """

    max_tokens: Annotated[int, Field(ge=16, le=1_000_000)] = 512
    max_batch: Annotated[int, Field(ge=1, le=4_096)] = 32
    batch_wait_s: Annotated[float, Field(ge=0, le=10)] = 0
    target_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 16
    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 64
    gpus: Annotated[float, Field(ge=0, le=1)] = 0

    @property
    def folder(self) -> Path:
        return ROOT / self.path if self.path.startswith("stack/") else super().folder


class RewardModel(SequenceClassifier):
    """A reward model that is served: a sequence classifier that scores answers within their dialogs.

    One with a single label gives its number as the score. One with several, each for another objective, needs `heads`:
    the weights of labels, whose weighted sum is the score. `prompt_format` is how it is told of calls of tools.
    """

    kind: Literal["classifier"]
    prompt_format: Literal["llama3", "hermes", "plain"] = "plain"
    max_tokens: Annotated[int, Field(ge=16, le=1_000_000)] = 2_048
    heads: (
        Annotated[
            dict[Annotated[str, Field(min_length=1, max_length=200)], Annotated[float, Field(ge=-1e6, le=1e6)]],
            Field(min_length=1),
            at_most(100),
        ]
        | None
    ) = None

    def weights_of(self, labels: Sequence[str]) -> list[float]:
        """The weight of each of the model's labels in its score. Raises BadInput where `heads` does not fit them."""
        if self.heads is None and len(labels) > 1:
            raise BadInput(f"the reward model {self.id!r} needs `heads`, as it has the labels {', '.join(labels)}")
        heads = {labels[0]: 1.0} if self.heads is None else self.heads
        for label in heads:
            if label not in labels:
                raise BadInput(f"the reward model {self.id!r} has no label {label!r} (heads): {', '.join(labels)}")
        return [heads.get(label, 0.0) for label in labels]


class Judge(Wire):
    """A reward model that is a served chat model, `model`, which is asked to rate answers by a `rubric`.

    The ratings are the whole numbers from `lowest` to `highest`, and the score is the mean of them that the model
    expects: weighted with the probabilities that it gives to their tokens (Liu et al. 2023, G-Eval, arXiv 2303.16634).
    """

    kind: Literal["judge"]
    id: ServedId
    model: ModelId
    rubric: Annotated[str, Field(min_length=1, max_length=20_000)]
    lowest: Annotated[int, Field(ge=0, le=9)] = 1
    highest: Annotated[int, Field(ge=0, le=9)] = 5

    @model_validator(mode="after")
    def _there_is_a_choice(self) -> Self:
        if self.highest <= self.lowest:
            raise ValueError(f"highest is {self.highest}; allowed: more than lowest, {self.lowest}, up to 9")
        return self


class MemoryBanksConfig(Wire):
    """Where memory banks lie, a folder or s3://bucket/prefix, and how often what is due in them is looked for.

    The folder must be on a disk that the gateway and the writer of the banks both have: where they may run on several
    nodes, on object storage. `max_body_bytes` bounds a request that brings documents.
    """

    folder: Annotated[str, Field(min_length=1, max_length=4_000), AfterValidator(without_nul)] = "memory_banks"
    maintenance_s: Annotated[float, Field(ge=1, le=86_400)] = 30
    max_body_bytes: Annotated[int, Field(ge=1_024, le=2**28)] = 16 * 2**20

    @field_validator("folder")
    @classmethod
    def _folder_is_reachable(cls, folder: str) -> str:
        if "://" in folder and not re.match(r"s3://[^/]", folder):
            raise ValueError(f"{folder!r} cannot hold memory banks; allowed: a folder, s3://bucket/prefix")
        return folder.rstrip("/") or folder


class AutoscaledNodes(Wire):
    """Nodes of one kind that Ray's autoscaler starts when something finds no room: at most `most` of them.

    `resources` are what each has, in Ray's names: CPU, GPU, accelerator_type:H100.
    """

    resources: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=200)], Annotated[float, Field(ge=0, le=1e15)]],
        Field(min_length=1),
        at_most(100),
    ]
    most: Annotated[int, Field(ge=1, le=10_000)]


class Config(Wire):
    """Where things are kept, what is served, and the bounds of what users may send.

    `store` is a SQLite file or an SQLAlchemy address, `artifacts` a folder or an fsspec address (s3://bucket/prefix).
    Neither holds a secret, as a Config is handed on in the open, to jobs by way of Ray's records of them: PostgreSQL's
    password is found by every process in PGPASSWORD, or in the file that PGPASSFILE names, set where each Ray node is
    started.

    `data_roots` are the folders, and the prefixes of object storage (s3://bucket/prefix, gs://bucket/prefix), whose
    files may become data sets: they are read with the stack's own rights, and by all tenants, so nothing may lie there
    that is only one's. Of the accepted jobs `max_running_jobs` run at once, of each tenant's at most
    `max_running_jobs_per_tenant`, and `max_waiting_jobs_per_tenant` may wait. A job whose attempt was lost for no fault
    of its own (with a worker, a node, or all of Ray) gets another one, up to `max_retries` times in which it gets no
    further than it has been. A job that no node can hold waits, but for one that the `autoscaled_nodes` could hold: it
    is handed to Ray, which starts them.

    `max_dataset_bytes` bounds the content of a data set, `max_artifact_bytes` an artifact sent to an experiment,
    `max_tenant_bytes` all that a tenant keeps (artifacts, uploads and memory banks), `max_body_bytes` the
    bodies of other requests. A gateway answers `max_requests` at once.
    Traces go to `otlp_address` (OTLP over HTTP), if there is one. `agents` bounds the turns of agents.

    Ray listens at all addresses of its nodes, but of one on 127.0.0.1: where some of them are of the internet, a
    gateway starts only if the config says that the nodes are `firewalled`: that a firewall such as
    clusters/firewall.nft closes Ray's ports at these.

    What a model is asked and what it answers passes the `shields` that `model_shields` names by the model's id, or by
    "*" for all models that it does not name.
    """

    store: str = "stack.db"
    artifacts: str = "artifacts"
    data_roots: Annotated[list[str], Field(min_length=1)] = ["data"]
    max_running_jobs: Annotated[int, Field(ge=1, le=10_000)] = 2
    max_running_jobs_per_tenant: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    max_waiting_jobs_per_tenant: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    autoscaled_nodes: Annotated[list[AutoscaledNodes], Field(max_length=100)] = []
    max_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 1_000
    max_body_bytes: Annotated[int, Field(ge=1_024)] = 4 * 2**20
    max_dataset_bytes: Annotated[int, Field(ge=1_024)] = 2**30
    max_artifact_bytes: Annotated[int, Field(ge=1_024, le=2**30)] = 32 * 2**20
    max_tenant_bytes: Annotated[int, Field(ge=1_024)] = 100 * 2**30
    memory_banks: MemoryBanksConfig = MemoryBanksConfig()
    agents: AgentsConfig = AgentsConfig()
    firewalled: bool = False
    otlp_address: Annotated[str, Field(max_length=2_000, pattern=r"^https?://[^\s/]+\S*$")] | None = None
    models: Annotated[list[LanguageModel], Field(min_length=1)]
    embedding_models: list[EmbeddingModel] = []
    classifiers: list[SequenceClassifier] = []
    reward_models: list[Annotated[RewardModel | Judge, Field(discriminator="kind")]] = []
    shields: list[Shield] = []
    model_shields: Annotated[dict[ModelId, ModelShields], at_most(10_000)] = {}

    @model_validator(mode="after")
    def _ids_are_unique(self) -> "Config":
        ids = [model.id for model in (*self.all_models, *self.judges)]
        for model_id in ids:
            if model_id == GATEWAY:
                raise ValueError(f"models: a model cannot have the id {GATEWAY!r}, the gateway's application's")
            if ids.count(model_id) > 1:
                raise ValueError(f"models: the id {model_id!r} is used more than once")
        return self

    @model_validator(mode="after")
    def _shields_fit(self) -> "Config":
        classifiers = {model.id for model in self.classifiers}
        require_shields_fit(self.shields, classifiers, self.model_shields, [model.id for model in self.models])
        return self

    @model_validator(mode="after")
    def _judges_fit(self) -> "Config":
        for judge in self.judges:
            require_base(judge.model, [model.id for model in self.models], f"reward_models: the judge {judge.id!r}")
        return self

    @field_validator("store")
    @classmethod
    def _store_holds_no_password(cls, store: str) -> str:
        if "://" not in store:
            return store
        try:
            url = make_url(store)
        except (ArgumentError, ValueError):  # whose words may hold what was given
            raise ValueError(
                "is no address of a database; allowed: a file, sqlite:///FILE, postgresql://USER@HOST/NAME"
            ) from None
        if url.password is not None or {"password", "sslpassword"} & set(url.query):
            raise ValueError(
                "holds a password; allowed: an address without one, and PostgreSQL's variables PGPASSWORD or "
                "PGPASSFILE in the environment of each Ray node and of what is run by hand"
            )
        return store

    @field_validator("data_roots")
    @classmethod
    def _roots_are_folders_or_prefixes(cls, roots: list[str]) -> list[str]:
        for root in roots:
            if "://" in root and not re.match(r"(s3|gs)://[^/]", root):
                raise ValueError(f"{root!r} is no data root; allowed: a folder, s3://bucket/prefix, gs://bucket/prefix")
        return roots

    @property
    def all_models(self) -> list[LanguageModel | EmbeddingModel | SequenceClassifier]:
        """Those of all kinds, each of which is served by an application of its id."""
        return [*self.models, *self.embedding_models, *self.classifiers, *self.reward_classifiers]

    @property
    def reward_classifiers(self) -> list[RewardModel]:
        return [model for model in self.reward_models if isinstance(model, RewardModel)]

    @property
    def judges(self) -> list[Judge]:
        return [model for model in self.reward_models if isinstance(model, Judge)]

    @property
    def store_url(self) -> str:
        return self.store if "://" in self.store else f"sqlite:///{home() / Path(self.store).expanduser()}"

    @property
    def artifacts_url(self) -> str:
        return artifacts_url(self.artifacts)

    @property
    def memory_banks_url(self) -> str:
        """A local path, or an address of object storage."""
        folder = self.memory_banks.folder
        return folder if "://" in folder else str(home() / Path(folder).expanduser())

    @property
    def data_folders(self) -> list[Path]:
        return [(home() / Path(root).expanduser()).resolve() for root in self.data_roots if "://" not in root]

    @property
    def data_prefixes(self) -> list[str]:
        return [root.rstrip("/") + "/" for root in self.data_roots if "://" in root]

    @classmethod
    def parse(cls, value: Mapping[str, Any], source: str) -> "Config":
        """The Config of a mapping. Raises BadInput, naming `source`, the wrong key or value, and what is allowed."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise BadInput(f"{source}: {describe(error)}") from error

    @classmethod
    def from_file(cls, file: Path) -> "Config":
        """The Config inside a Serve config file."""
        try:
            document = yaml.safe_load(file.read_text())
        except OSError as error:
            raise BadInput(f"the config file {file} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInput(f"{file} is not YAML: {' '.join(str(error).split())}") from error
        applications = document.get("applications") if isinstance(document, dict) else None
        if not isinstance(applications, list):
            raise BadInput(f"{file} is not a Serve config file: it has no list `applications`")
        for application in applications:
            if isinstance(application, dict) and application.get("name") == GATEWAY:
                return cls.parse(application.get("args") or {}, f"{file}, args of the application {GATEWAY!r}")
        raise BadInput(f"{file} has no application named {GATEWAY!r}")

    @classmethod
    def from_environment(cls) -> "Config":
        """The Config that STACK_CONFIG names, for processes that Serve does not start."""
        value = os.environ.get("STACK_CONFIG", "")
        if value.startswith("{"):
            try:
                return cls.parse(json.loads(value), "STACK_CONFIG")
            except json.JSONDecodeError as error:
                raise BadInput(f"STACK_CONFIG is not JSON: {error}") from error
        return cls.from_file(Path(value).expanduser() if value else DEFAULT_FILE)


def artifacts_url(artifacts: str) -> str:
    return artifacts if "://" in artifacts else f"file://{home() / Path(artifacts).expanduser()}"

"""Adding and removing models while the stack runs.

Models that the config lists come and go with it. Others are kept in the database, in the same shape, and everybody may
ask them as well, but for private ones, which a tenant's job has trained: for other tenants, their administrators too,
these do not exist. The routes only write what shall be: the job supervisor, of which there is one, brings Ray Serve's
applications in line with it, also after a restart. A model that is removed is not asked any more at once; the requests
that are under way end, and then its application goes.
"""

import logging
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from pydantic import ValidationError

from stack import trained_models
from stack.api.models import ModelSource, ModelState, ServedModel
from stack.api.wire import describe
from stack.config import GATEWAY, Config, EmbeddingModel, LanguageModel, RewardModel, SequenceClassifier
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError
from stack.models import model_of
from stack.store import AddedModel, Store
from stack.store.models import RECENT_S

logger = logging.getLogger("ray.serve")

MAX_ADDED = 100
# How long after it could not be deployed a model is tried again.
RETRY_S = 30.0
# Arguments of vLLM's engine that an administrator may set from elsewhere. Others name files, addresses, other models or
# classes, whose code would run: they are for the config file, whose author has this machine anyway.
ALLOWED_ENGINE = {
    "block_size": int,
    "cpu_offload_gb": float,
    "disable_sliding_window": bool,
    "enable_chunked_prefill": bool,
    "enable_prefix_caching": bool,
    "enforce_eager": bool,
    "gpu_memory_utilization": float,
    "kv_cache_dtype": str,
    "kv_cache_memory_bytes": int,
    "max_logprobs": int,
    "max_num_batched_tokens": int,
    "max_num_seqs": int,
    "num_gpu_blocks_override": int,
    "seed": int,
}
MAX_TEXT = 50
MAX_NUMBER = 2**53


@dataclass(frozen=True)
class Application:
    """What Ray Serve says of an application."""

    state: ModelState
    replicas: int = 0
    reason: str | None = None


class Deployer(Protocol):
    """What runs the applications of models. Each method blocks, and raises Unavailable where it cannot be reached."""

    def applications(self) -> dict[str, Application]:
        """All that there are, also other ones, by name."""
        ...

    def deploy(self, model: LanguageModel | RewardModel, artifacts: str) -> None:
        """Begins to start an application of the model's id. Raises StackError for one that cannot be built."""
        ...

    def delete(self, id: str) -> None:
        """Begins to stop an application, which ends the requests that it has. One that is not there is fine."""
        ...


def add(context: Context, model: LanguageModel, deployer: Deployer) -> ServedModel:
    """Adds a model, which is started then. The same once more changes nothing.

    Raises BadInput for what cannot be a model, and Conflict where the id is taken.
    """
    _require_engine_arguments(model.engine)
    applications = deployer.applications()
    row = next((row for row in context.store.models.list() if row.id == model.id), None)
    if model.id in {*_configured(context.config), *(judge.id for judge in context.config.judges)}:
        raise Conflict(f"the config lists a model {model.id!r} already", param="id")
    # Of another tenant's private model no more is told than of an application of something else.
    taken = Conflict(f"there is another application {model.id!r} already; give the model another id", param="id")
    is_free = row.is_seen_by(context.tenant) if row else model.id != GATEWAY and model.id not in applications
    if not is_free:
        raise taken
    _require_model(model)
    entry = model.model_dump(mode="json", exclude_unset=True)
    row = context.store.models.add(model.id, context.tenant, entry, MAX_ADDED)
    if row is None:
        raise Conflict(f"{MAX_ADDED} models are added already; remove one first", param="id", code="too_many_models")
    if not row.is_seen_by(context.tenant):  # its job was completed meanwhile
        raise taken
    if row.removed_at is not None:
        raise Conflict(f"the model {model.id!r} is being removed; add it when it is gone", param="id")
    if row.entry != entry:
        raise Conflict(f"a model {model.id!r} is added already, with another entry; remove it first", param="id")
    return _added(row, applications.get(row.id))


def remove(context: Context, id: str, deployer: Deployer) -> ServedModel:
    """Removes an added model. Raises NotFound, and Conflict for one of the config."""
    if id in _configured(context.config):
        raise Conflict(
            f"the config lists the model {id!r}; take it and its application out of the config file and deploy that",
            param="model_id",
        )
    row = context.store.models.remove(id, context.tenant)
    if row is None:
        seen = (row.id for row in context.store.models.recent().values() if row.is_seen_by(context.tenant))
        known = ", ".join(seen) or "none"
        raise NotFound(f"there is no added model {id!r}; there are: {known}", param="model_id")
    return _added(row, deployer.applications().get(id))


def list_models(context: Context, deployer: Deployer) -> list[ServedModel]:
    """The models of the config, then the added ones, the oldest first, each with the state of its application.

    Without other tenants' private ones.
    """
    applications = deployer.applications()
    configured = [
        ServedModel(
            id=model.id,
            source=ModelSource.config,
            model=model.model_dump(mode="json", exclude_unset=True),
            **_state(applications.get(model.id)),
        )
        for model in _configured(context.config).values()
    ]
    rows = (row for row in context.store.models.list() if row.is_seen_by(context.tenant))
    return [*configured, *(_added(row, applications.get(row.id)) for row in rows)]


class Reconciler:
    """Brings the applications in line with the database, for one process of all."""

    def __init__(self, config: Config, store: Store, deployer: Deployer) -> None:
        self._config = config
        self._store = store
        self._deployer = deployer
        self._failed_at: dict[str, float] = {}
        self._removed_at: dict[str, float] = {}

    def reconcile(self) -> None:
        """Starts what is missing, stops what is removed, and forgets what is gone or has come into the config."""
        rows = self._store.models.list()
        if not rows:
            return
        applications = self._deployer.applications()
        for row in rows:
            if row.id in _configured(self._config):
                logger.info("the model %s, which was added, is one of the config now", row.id)
                self._store.models.forget(row.id)
            elif row.removed_at is not None:
                self._remove(row, applications.get(row.id))
            elif row.id not in applications and self._is_due(row.id):
                self._deploy(row)

    def _deploy(self, row: AddedModel) -> None:
        logger.info("the model %s is started", row.id)
        problem = None
        try:
            self._deployer.deploy(of_entry(row.entry), self._config.artifacts)
        except StackError as error:
            problem = error.message
            self._failed_at[row.id] = monotonic()
            logger.warning("the model %s cannot be started: %s", row.id, problem)
        if problem != row.problem:
            self._store.models.set_problem(row.id, problem)

    def _is_due(self, id: str) -> bool:
        return monotonic() - self._failed_at.get(id, -RETRY_S) >= RETRY_S

    def _remove(self, row: AddedModel, application: Application | None) -> None:
        if application is None:
            if row.private:
                trained_models.forget(row.entry)
            self._store.models.forget(row.id)
            self._failed_at.pop(row.id, None)
            self._removed_at.pop(row.id, None)
        elif application.state != ModelState.stopping:
            # By then no gateway takes it for one that can be asked.
            if monotonic() - self._removed_at.setdefault(row.id, monotonic()) >= 2 * RECENT_S:
                logger.info("the model %s is stopped", row.id)
                self._deployer.delete(row.id)


def of_entry(entry: dict[str, Any]) -> LanguageModel | RewardModel:
    """A model of its row. Raises BadInput where this version of the stack does not take what an older one did."""
    try:
        return model_of(entry)
    except ValidationError as error:
        raise BadInput(f"the entry of the model is not one any more: {describe(error)}") from error


def _configured(config: Config) -> dict[str, LanguageModel | EmbeddingModel | SequenceClassifier]:
    return {model.id: model for model in config.all_models}


def _require_model(model: LanguageModel) -> None:
    """Refuses a folder without a model on this machine, as it has to be the same on all."""
    try:
        is_model = (model.folder / "config.json").is_file()
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, a name that is too long, a folder of another user
        raise BadInput(f"the folder {model.path[:200]!r} cannot be read: {error}", param="path") from error
    if not is_model:
        raise BadInput(f"there is no model in the folder {model.path[:200]!r}, which has no config.json", param="path")


def _require_engine_arguments(engine: dict[str, Any]) -> None:
    for key, value in engine.items():
        kind = ALLOWED_ENGINE.get(key)
        if kind is None:
            allowed = ", ".join(ALLOWED_ENGINE)
            raise BadInput(
                f"engine: {key[:80]!r} is for the config file alone; allowed here: {allowed}", param="engine"
            )
        given = float if kind is float and type(value) is int else type(value)
        if given is not kind:
            raise BadInput(f"engine.{key}: must be of type {kind.__name__}, not {str(value)[:80]!r}", param="engine")
        if (isinstance(value, str) and not 0 < len(value) <= MAX_TEXT) or (
            isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER
        ):
            raise BadInput(f"engine.{key}: {str(value)[:80]!r} is too large", param="engine")


def _added(row: AddedModel, application: Application | None) -> ServedModel:
    state = _state(application)
    if row.removed_at is not None:
        state["state"] = ModelState.stopping
    elif application is None:
        state = dict(state=ModelState.failed if row.problem else ModelState.starting, reason=row.problem)
    source = ModelSource.trained if row.private else ModelSource.added
    return ServedModel(id=row.id, source=source, created_at=row.created_at, model={"id": row.id} | row.entry, **state)


def _state(application: Application | None) -> dict[str, Any]:
    if application is None:
        return dict(state=ModelState.failed, reason="it is not deployed")
    return dict(state=application.state, reason=application.reason, replicas=application.replicas)

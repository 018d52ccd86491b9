"""What every behaviour needs, opened once per process and passed on explicitly, and in whose name it is done."""

from dataclasses import dataclass, replace
from functools import cached_property

from stack.artifacts import Artifacts
from stack.config import Config, home
from stack.models import Engine, Models
from stack.serve_engine import ServeEngine
from stack.store import Store

SCOPES = ("inference", "data", "training", "agents", "admin")
DEFAULT_TENANT = "default"


@dataclass(frozen=True)
class Principal:
    """Who asks: the tenant whose rows and files they see, and what they may do, of SCOPES."""

    tenant: str
    scopes: frozenset[str]


# Who asks where there are no keys: the one user of this machine.
LOCAL_USER = Principal(DEFAULT_TENANT, frozenset(SCOPES))


@dataclass(frozen=True)
class Context:
    config: Config
    store: Store
    artifacts: Artifacts
    engine: Engine
    principal: Principal = LOCAL_USER

    @classmethod
    def open(cls, config: Config, engine: Engine | None = None) -> "Context":
        """Opens the store and the artifacts. Models are answered by Ray Serve unless another engine is given."""
        artifacts = Artifacts(config.artifacts_url, cache=home() / "cache")
        return cls(config, Store(config.store_url), artifacts, engine or ServeEngine())

    def of(self, principal: Principal) -> "Context":
        """The same in another's name."""
        return replace(self, principal=principal)

    def of_tenant(self, tenant: str) -> "Context":
        """The same in the name of a tenant that may do everything of its own: for its jobs."""
        return self.of(Principal(tenant, LOCAL_USER.scopes))

    @property
    def tenant(self) -> str:
        return self.principal.tenant

    @cached_property
    def models(self) -> Models:
        """The models that the principal can ask."""
        return Models(self.config, self.store, self.engine, self.tenant)

    def close(self) -> None:
        self.store.close()

"""What every behaviour needs, opened once per process and passed on explicitly."""

from dataclasses import dataclass

from stack.artifacts import Artifacts
from stack.config import Config, home
from stack.models import Engine, Models, ServeEngine
from stack.store import Store


@dataclass(frozen=True)
class Context:
    config: Config
    store: Store
    artifacts: Artifacts
    models: Models

    @classmethod
    def open(cls, config: Config, engine: Engine | None = None) -> "Context":
        """Opens the store and the artifacts. Models are answered by Ray Serve unless another engine is given."""
        store = Store(config.store_url)
        artifacts = Artifacts(config.artifacts_url, cache=home() / "cache")
        return cls(config, store, artifacts, Models(config, store, engine or ServeEngine()))

    def close(self) -> None:
        self.store.close()

"""The rows of artifacts: what a folder or file among the artifacts is, and where it came from."""

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine, delete, func, insert, select

from stack.store.paging import is_behind
from stack.store.schema import adapters, artifacts


@dataclass(frozen=True)
class Artifact:
    """`path` is its name in stack.artifacts.Artifacts, `name` the one that people gave it."""

    id: str
    tenant: str
    experiment_id: str
    run_id: str | None
    name: str
    type: str
    path: str
    bytes: int
    metadata: dict[str, Any]
    created_at: str


class Artifacts:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, artifact: Artifact) -> None:
        with self._engine.begin() as connection:
            connection.execute(insert(artifacts).values(**asdict(artifact)))

    def get(self, tenant: str, id: str) -> Artifact | None:
        query = select(artifacts).where(artifacts.c.tenant == tenant, artifacts.c.id == id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return Artifact(**found) if found else None

    def page(self, tenant: str, experiment_id: str, after: Artifact | None, limit: int) -> list[Artifact]:
        """The artifacts of an experiment, newest first, behind this one."""
        query = select(artifacts).where(artifacts.c.tenant == tenant, artifacts.c.experiment_id == experiment_id)
        if after is not None:
            query = query.where(is_behind(artifacts.c.created_at, artifacts.c.id, after.created_at, after.id))
        query = query.order_by(artifacts.c.created_at.desc(), artifacts.c.id.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [Artifact(**row) for row in connection.execute(query).mappings()]

    def delete(self, tenant: str, id: str) -> bool:
        """False if it is not there."""
        with self._engine.begin() as connection:
            query = delete(artifacts).where(artifacts.c.tenant == tenant, artifacts.c.id == id)
            return connection.execute(query).rowcount == 1

    def adapter_on(self, tenant: str, path: str) -> str | None:
        """The id of a model that is served from the files of an artifact, if there is one."""
        query = select(adapters.c.model_id).where(adapters.c.tenant == tenant, adapters.c.artifact == path)
        with self._engine.connect() as connection:
            return connection.execute(query.limit(1)).scalar()

    def known_paths(self) -> set[str]:
        """The paths of all tenants' artifacts, for the administrator."""
        with self._engine.connect() as connection:
            return set(connection.execute(select(artifacts.c.path)).scalars())

    def bytes_of(self, tenant: str) -> int:
        """How much a tenant keeps."""
        query = select(func.coalesce(func.sum(artifacts.c.bytes), 0)).where(artifacts.c.tenant == tenant)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

"""The rows of trained adapters."""

from dataclasses import dataclass

from sqlalchemy import Engine, select

from stack.store.schema import adapters


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that is served as `model_id` on top of the model `base`; its files are the artifact `artifact`."""

    tenant: str
    model_id: str
    base: str
    job_uuid: str
    artifact: str
    created_at: str


class Adapters:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, tenant: str, model_id: str) -> Adapter | None:
        query = select(adapters).where(adapters.c.tenant == tenant, adapters.c.model_id == model_id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return Adapter(**found) if found else None

    def list(self, tenant: str) -> list[Adapter]:
        """All adapters of a tenant, newest first."""
        query = select(adapters).where(adapters.c.tenant == tenant)
        query = query.order_by(adapters.c.created_at.desc(), adapters.c.model_id)
        with self._engine.connect() as connection:
            return [Adapter(**row) for row in connection.execute(query).mappings()]

"""The rows of data sets and uploads."""

from typing import Any

from sqlalchemy import Engine, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from stack.store.schema import datasets, uploads


class Datasets:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, tenant: str, row: dict[str, Any]) -> bool:
        """Adds a data set; False if its uuid is taken."""
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(datasets).values(tenant=tenant, **row))
        except IntegrityError:
            if self.get(tenant, row["uuid"]) is None:
                raise  # it was not the uuid
            return False
        return True

    def get(self, tenant: str, uuid: str) -> dict[str, Any] | None:
        query = select(datasets).where(datasets.c.tenant == tenant, datasets.c.uuid == uuid)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return dict(found) if found else None

    def delete(self, tenant: str, uuid: str) -> bool:
        """False if it is not there."""
        with self._engine.begin() as connection:
            query = delete(datasets).where(datasets.c.tenant == tenant, datasets.c.uuid == uuid)
            return connection.execute(query).rowcount == 1

    def uploaded_bytes(self, tenant: str) -> int:
        """How much a tenant has uploaded and not deleted."""
        query = select(func.coalesce(func.sum(uploads.c.bytes), 0)).where(uploads.c.tenant == tenant)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

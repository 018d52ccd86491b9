"""The rows of data sets and uploads."""

import json
from typing import Any

from sqlalchemy import Engine, Table, Text, cast, delete, func, insert, or_, select, tuple_
from sqlalchemy.exc import IntegrityError

from stack.store.schema import datasets, jobs, uploads

# Where the request of a job may have a data set.
FIELDS = ("dataset", "validation_dataset")


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

    def page(self, tenant: str, after: dict[str, Any] | None, limit: int) -> list[dict[str, Any]]:
        """Data sets, newest first, behind the one of the page before."""
        return self._page(datasets, datasets.c.uuid, tenant, after, limit)

    def delete(self, tenant: str, uuid: str) -> bool:
        """False if it is not there."""
        with self._engine.begin() as connection:
            query = delete(datasets).where(datasets.c.tenant == tenant, datasets.c.uuid == uuid)
            return connection.execute(query).rowcount == 1

    def at(self, tenant: str, content_url: str) -> str | None:
        """The uuid of a data set whose content lies at an address."""
        query = select(datasets.c.uuid).where(datasets.c.tenant == tenant, datasets.c.content_url == content_url)
        with self._engine.connect() as connection:
            return connection.execute(query.limit(1)).scalar()

    def job_on(self, tenant: str, uuid: str, content_url: str | None) -> str | None:
        """The uuid of a job that has not ended and needs a data set: by its uuid, or the address of its content."""
        wanted = {uuid} if content_url is None else {uuid, content_url}
        # The database leaves out what cannot be one, as requests may be megabytes. It only looks at their text, as
        # PostgreSQL does not look into JSON that holds a NUL character anywhere.
        text = cast(jobs.c.request, Text)
        query = select(jobs.c.uuid, jobs.c.request).where(
            jobs.c.tenant == tenant,
            jobs.c.status.in_(("scheduled", "running")),
            or_(*(text.contains(json.dumps(one), autoescape=True) for one in wanted)),
        )
        query = query.execution_options(yield_per=10)
        with self._engine.connect() as connection, connection.execute(query) as found:
            for job in found:
                if wanted & _references(job.request):
                    return str(job.uuid)
        return None

    def add_upload(self, tenant: str, row: dict[str, Any]) -> None:
        with self._engine.begin() as connection:
            connection.execute(insert(uploads).values(tenant=tenant, **row))

    def get_upload(self, tenant: str, id: str) -> dict[str, Any] | None:
        query = select(uploads).where(uploads.c.tenant == tenant, uploads.c.id == id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return dict(found) if found else None

    def upload_page(self, tenant: str, after: dict[str, Any] | None, limit: int) -> list[dict[str, Any]]:
        """Uploads, newest first, behind the one of the page before."""
        return self._page(uploads, uploads.c.id, tenant, after, limit)

    def delete_upload(self, tenant: str, id: str) -> bool:
        """False if it is not there."""
        with self._engine.begin() as connection:
            query = delete(uploads).where(uploads.c.tenant == tenant, uploads.c.id == id)
            return connection.execute(query).rowcount == 1

    def uploaded_bytes(self, tenant: str) -> int:
        """How much a tenant has uploaded and not deleted."""
        query = select(func.coalesce(func.sum(uploads.c.bytes), 0)).where(uploads.c.tenant == tenant)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def _page(
        self, table: Table, key: Any, tenant: str, after: dict[str, Any] | None, limit: int
    ) -> list[dict[str, Any]]:
        order = tuple_(table.c.created_at, key)
        query = select(table).where(table.c.tenant == tenant).order_by(table.c.created_at.desc(), key.desc())
        if after is not None:
            query = query.where(order < (after["created_at"], after[key.name]))
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query.limit(limit)).mappings()]


def _references(request: dict[str, Any]) -> set[str]:
    """The data sets that the request of a job names, and the addresses of those that it describes."""
    found = [request.get(field) for field in FIELDS]
    return {one["content_url"] if isinstance(one, dict) else one for one in found if one is not None}

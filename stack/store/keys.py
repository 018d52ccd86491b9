"""The rows of API keys. What a user was told is kept only as its hash; of all tenants, for the administrator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, Select, insert, select, update

from stack.store.connection import now
from stack.store.schema import api_keys

_COLUMNS = (
    api_keys.c.id,
    api_keys.c.tenant,
    api_keys.c.name,
    api_keys.c.scopes,
    api_keys.c.created_at,
    api_keys.c.revoked_at,
)


@dataclass(frozen=True)
class ApiKey:
    """A row of `api_keys`, without the hash."""

    id: str
    tenant: str
    name: str
    scopes: list[str]
    created_at: str
    revoked_at: str | None


class Keys:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, id: str, tenant: str, name: str, scopes: Sequence[str], sha256: str) -> ApiKey:
        row = ApiKey(id, tenant, name, list(scopes), created_at=now(), revoked_at=None)
        values = dict(id=id, tenant=tenant, name=name, scopes=row.scopes, sha256=sha256, created_at=row.created_at)
        with self._engine.begin() as connection:
            connection.execute(insert(api_keys).values(**values))
        return row

    def get(self, id: str) -> ApiKey | None:
        return self._first(select(*_COLUMNS).where(api_keys.c.id == id))

    def of_hash(self, sha256: str) -> ApiKey | None:
        """The key with this hash, if it is not revoked."""
        return self._first(select(*_COLUMNS).where(api_keys.c.sha256 == sha256, api_keys.c.revoked_at.is_(None)))

    def any(self) -> bool:
        """Whether a key has ever been made; a revoked one counts."""
        with self._engine.connect() as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None

    def list(self, tenant: str | None = None) -> list[ApiKey]:
        """The keys of a tenant, or of all of them, oldest first."""
        query = select(*_COLUMNS).order_by(api_keys.c.created_at, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with self._engine.connect() as connection:
            return [ApiKey(**row) for row in connection.execute(query).mappings()]

    def revoke(self, id: str) -> None:
        """Makes a key unknown, if it is not already."""
        with self._engine.begin() as connection:
            live = (api_keys.c.id == id) & api_keys.c.revoked_at.is_(None)
            connection.execute(update(api_keys).where(live).values(revoked_at=now()))

    def _first(self, query: Select[Any]) -> ApiKey | None:
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return ApiKey(**found) if found else None

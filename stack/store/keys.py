"""The rows of API keys: what was told to a user is kept only as its hash."""

from dataclasses import dataclass

from sqlalchemy import Engine

from stack.store.schema import api_keys  # noqa: F401


@dataclass(frozen=True)
class ApiKey:
    id: str
    tenant: str
    name: str
    scopes: list[str]
    created_at: str
    revoked_at: str | None


class Keys:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

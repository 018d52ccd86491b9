"""The rows of models that were added while the stack ran.

Those that an administrator has added are everybody's, as those of the config are; a private one is its tenant's alone.
What is read here are the rows of all tenants, as each has an application, whosever it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, update

from stack.store.connection import hold, now, writing
from stack.store.schema import models

# How long what was read counts: so long other processes may take to see a model that was added or removed.
RECENT_S = 1.0
# Who adds a row holds it, so that no other one of its id comes in between.
_ADDING = "llama-stack-ray: models"


@dataclass(frozen=True)
class AddedModel:
    """A model that `tenant` has added, by its entry in the config's shape.

    From `removed_at` on it is not asked any more; the row goes when its application has. `problem` is why it cannot be
    deployed, if it cannot. A `private` one, which a job of the tenant has trained, does not exist for other tenants.
    """

    id: str
    tenant: str
    entry: dict[str, Any]
    created_at: str
    removed_at: str | None
    problem: str | None
    private: bool = False

    def is_seen_by(self, tenant: str) -> bool:
        return not self.private or self.tenant == tenant


class AddedModels:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._read: tuple[float, dict[str, AddedModel]] | None = None

    def list(self) -> list[AddedModel]:
        """Those of all tenants, the oldest first, also those that are being removed."""
        query = select(models).order_by(models.c.created_at, models.c.id)
        with self._engine.connect() as connection:
            return [AddedModel(**row) for row in connection.execute(query).mappings()]

    def recent(self) -> Mapping[str, AddedModel]:
        """By id, those of all tenants that are not being removed, as they were at most RECENT_S ago."""
        known = self.known()
        if known is None:
            began = monotonic()
            known = {row.id: row for row in self.list() if row.removed_at is None}
            self._read = began, known
        return known

    def known(self) -> Mapping[str, AddedModel] | None:
        """`recent`, if the database need not be asked for it."""
        read = self._read
        return read[1] if read is not None and monotonic() - read[0] < RECENT_S else None

    def add(self, id: str, tenant: str, entry: dict[str, Any], most: int) -> AddedModel | None:
        """Adds a model, and gives what stands under its id, which may be another one; None if there are `most`.

        Private ones do not count: no tenant's keep an administrator from adding one.
        """
        with writing(self._engine) as connection:
            hold(connection, _ADDING)
            rows = [AddedModel(**row) for row in connection.execute(select(models)).mappings()]
            found = next((row for row in rows if row.id == id), None)
            if found is None and sum(not row.private for row in rows) < most:
                found = AddedModel(id, tenant, entry, created_at=now(), removed_at=None, problem=None)
                connection.execute(insert(models).values(**vars(found)))
        self._read = None
        return found

    def remove(self, id: str, tenant: str) -> AddedModel | None:
        """Marks a model that `tenant` sees as one that is being removed, if there is such a one.

        Doing it again changes nothing.
        """
        seen = (models.c.id == id) & (~models.c.private | (models.c.tenant == tenant))
        with self._engine.begin() as connection:
            live = seen & models.c.removed_at.is_(None)
            connection.execute(update(models).where(live).values(removed_at=now()))
            found = connection.execute(select(models).where(seen)).mappings().first()
        self._read = None
        return AddedModel(**found) if found else None

    def set_problem(self, id: str, problem: str | None) -> None:
        with self._engine.begin() as connection:
            connection.execute(update(models).where(models.c.id == id).values(problem=problem))

    def forget(self, id: str) -> None:
        """Deletes the row."""
        with self._engine.begin() as connection:
            connection.execute(delete(models).where(models.c.id == id))
        self._read = None


def add_if_free(connection: Connection, model: AddedModel) -> bool:
    """Adds a row within a `writing` transaction; False, and nothing is changed, where there is one of its id."""
    hold(connection, _ADDING)
    is_free = connection.execute(select(models.c.id).where(models.c.id == model.id)).first() is None
    if is_free:
        connection.execute(insert(models).values(**vars(model)))
    return is_free

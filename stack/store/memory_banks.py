"""The rows of memory banks: what each one is, and what is due in it. What lies in them is in their tables."""

import datetime as dt
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

from sqlalchemy import ColumnElement, Engine, case, delete, func, insert, select, tuple_, update

from stack.store.connection import now
from stack.store.schema import dropped_memory_banks, memory_banks, memory_writers

# How long a row that was read counts for queries: so long another process may answer from a bank that was dropped.
RECENT_S = 1.0
# How many such rows are kept.
MAX_RECENT = 10_000


@dataclass(frozen=True, slots=True)
class MemoryBank:
    """A bank. `config` is that of its kind, by its `type`; `dimensions` is the length of its vectors, if it has some.

    `bytes` is about how large it is. From `due_at` on it is to be maintained, if that is not None.
    `tried_at` is when that was last begun.
    """

    id: str
    tenant: str
    name: str
    url: str | None
    config: dict[str, Any]
    dimensions: int | None
    bytes: int
    created_at: str
    written_at: str | None = None
    due_at: str | None = None
    tried_at: str | None = None


class MemoryBanks:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._read: dict[tuple[str, str], tuple[float, MemoryBank]] = {}

    def add(self, bank: MemoryBank) -> None:
        with self._engine.begin() as connection:
            connection.execute(insert(memory_banks).values(**asdict(bank)))

    def get(self, tenant: str, id: str) -> MemoryBank | None:
        began = monotonic()
        query = select(memory_banks).where(memory_banks.c.tenant == tenant, memory_banks.c.id == id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        if found is None:
            return None
        bank = MemoryBank(**found)
        if bank.written_at is not None:  # who has written the first document into a bank finds it at once
            if len(self._read) >= MAX_RECENT:
                self._read.clear()
            self._read[tenant, id] = began, bank
        return bank

    def recent(self, tenant: str, id: str) -> MemoryBank | None:
        """The row of a bank with documents as it was read at most RECENT_S ago; None if the database must be asked.

        What counts of it for a query does not change.
        """
        read = self._read.get((tenant, id))
        return read[1] if read is not None and monotonic() - read[0] < RECENT_S else None

    def page(self, tenant: str, after: MemoryBank | None, limit: int) -> list[MemoryBank]:
        """Banks, newest first, behind the last one of the page before."""
        columns = memory_banks.c
        query = select(memory_banks).where(columns.tenant == tenant)
        if after is not None:
            query = query.where(tuple_(columns.created_at, columns.id) < (after.created_at, after.id))
        query = query.order_by(columns.created_at.desc(), columns.id.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [MemoryBank(**row) for row in connection.execute(query).mappings()]

    def delete(self, tenant: str, id: str) -> bool:
        """False if it is not there. Until `removed`, it is one of those that are `dropped`."""
        with self._engine.begin() as connection:
            query = delete(memory_banks).where(memory_banks.c.tenant == tenant, memory_banks.c.id == id)
            if connection.execute(query).rowcount == 0:
                return False
            connection.execute(insert(dropped_memory_banks).values(id=id, tenant=tenant))
        self._read.pop((tenant, id), None)
        return True

    def dropped(self) -> list[tuple[str, str]]:
        """The ids of the banks whose files are still to be removed, each with its tenant."""
        with self._engine.connect() as connection:
            return [(bank_id, tenant) for bank_id, tenant in connection.execute(select(dropped_memory_banks))]

    def removed(self, id: str) -> None:
        """Writes down that a dropped bank has no files any more."""
        with self._engine.begin() as connection:
            connection.execute(delete(dropped_memory_banks).where(dropped_memory_banks.c.id == id))

    def bytes_of(self, tenant: str) -> int:
        """About how much a tenant's banks hold."""
        query = select(func.coalesce(func.sum(memory_banks.c.bytes), 0)).where(memory_banks.c.tenant == tenant)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def next_writer(self) -> int:
        """The epoch of a new writer of all banks, which ends those of the writers before it."""
        with self._engine.begin() as connection:
            epoch = int(connection.execute(insert(memory_writers).returning(memory_writers.c.epoch)).scalar_one())
            connection.execute(delete(memory_writers).where(memory_writers.c.epoch < epoch))
            return epoch

    def is_writer(self, epoch: int) -> bool:
        """Whether there is no newer writer than that of this epoch."""
        with self._engine.connect() as connection:
            return bool(connection.execute(select(_is_of(epoch))).scalar_one())

    def begin_write(self, epoch: int, id: str, size: int) -> bool:
        """Writes down what is about to be written into a bank; False if it is gone, or another writer has taken over.

        It is there before the write is, so that nothing is due that no row tells.
        """
        time = now()
        values = {"bytes": memory_banks.c.bytes + size, "written_at": time, "due_at": time}
        with self._engine.begin() as connection:
            query = update(memory_banks).where(memory_banks.c.id == id, _is_of(epoch)).values(**values)
            return connection.execute(query).rowcount == 1

    def take_due(self, limit: int, before: str) -> list[MemoryBank]:
        """Banks of all tenants that are to be maintained, and were last tried before some time: the longest ago first.

        They count as tried from now on, so that those in which it fails do not stand before the others.
        """
        columns = memory_banks.c
        untried = columns.tried_at.is_(None) | (columns.tried_at < before)
        query = select(memory_banks).where(columns.due_at <= now(), untried)
        query = query.order_by(func.coalesce(columns.tried_at, ""), columns.due_at, columns.id).limit(limit)
        with self._engine.begin() as connection:
            banks = [MemoryBank(**row) for row in connection.execute(query).mappings()]
            if banks:
                taken = update(memory_banks).where(columns.id.in_([bank.id for bank in banks]))
                connection.execute(taken.values(tried_at=now()))
            return banks

    def maintained(self, epoch: int, seen: MemoryBank, size: int, due_at: dt.datetime | None) -> None:
        """Writes down what maintenance has found: how large a bank is, and when it is to be maintained again, if ever.

        `seen` is the bank as it was when that began. One into which something was written since stays due, and has the
        size of that, too. Nothing where another writer has taken over.
        """
        columns = memory_banks.c
        untouched = columns.written_at.is_not_distinct_from(seen.written_at)
        again = case((untouched, None if due_at is None else _time(due_at)), else_=columns.due_at)
        values = {"bytes": size + columns.bytes - seen.bytes, "due_at": again}
        with self._engine.begin() as connection:
            query = update(memory_banks).where(columns.id == seen.id, _is_of(epoch))
            connection.execute(query.values(**values))


def _is_of(epoch: int) -> ColumnElement[bool]:
    return select(func.max(memory_writers.c.epoch)).scalar_subquery() == epoch


def _time(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

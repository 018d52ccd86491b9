"""The one writer of all banks: what waits for a bank becomes one commit, and is acknowledged when that is done.

LanceDB takes several writers, but they and its compaction get into each other's way (lancedb#725, #1971). So whatever
changes a bank passes through its lane here, one thing at a time: writes, deletions, maintenance, the end of the bank.
Banks do not wait for each other, but for the threads.
"""

import asyncio
import datetime as dt
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from stack.config import Config
from stack.errors import NotFound, StackError
from stack.memory_banks.rows import Document
from stack.memory_banks.tables import Tables
from stack.store import MemoryBank, Store, now

logger = logging.getLogger("ray.serve")

# Of one commit.
MAX_DOCUMENTS = 2_000
MAX_BYTES = 128 * 2**20
THREADS = 4
# Of the banks in which something is due, as many are looked at in one pass.
AT_ONCE = 100
# What a row takes beside its text and its vector.
ROW_BYTES = 200


class Writer(Protocol):
    """What changes banks. When a method returns, what it has done is durable and seen by every reader.

    `write` writes documents: with `replace` in the place of those that are there, else as new ones, where those that
    are there already, just so, stay as they are. It raises Conflict for an id that is taken by another document, and
    NotFound for one to be replaced that is not there; nothing is written then. `delete` tells which documents it has
    deleted. All raise NotFound for a bank that was dropped, and Unavailable.
    """

    async def write(self, bank: MemoryBank, documents: Sequence[Document], replace: bool) -> None: ...

    async def delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]: ...

    async def drop(self, bank: MemoryBank) -> None:
        """Removes the table of a bank whose row is gone."""


@dataclass(frozen=True, eq=False)
class _Write:
    documents: Sequence[Document]
    replace: bool
    size: int
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class _Call:
    """Anything else that is done in a bank's lane, alone."""

    work: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


_Item = _Write | _Call


class _Lane:
    """What waits for a bank. One thread at a time is at it."""

    def __init__(self) -> None:
        self.waiting: deque[_Item] = deque()
        self._alone = 0  # how many of the first are done one by one

    def take(self) -> list[_Item]:
        """What is to be done next, together."""
        items = [self.waiting.popleft()]
        if self._alone:
            self._alone -= 1
            return items
        while self.waiting and _fits(self.waiting[0], items):
            items.append(self.waiting.popleft())
        return items

    def put_back(self, items: list[_Item]) -> None:
        """Takes back what cannot be done together."""
        self.waiting.extendleft(reversed(items))
        self._alone += len(items)


class BankWriter:
    """Implements Writer, in this process, on threads of its own."""

    def __init__(self, config: Config, store: Store) -> None:
        self._store = store
        self._tables = Tables(config)
        self._lanes: dict[str, _Lane] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="bank-writer")

    async def write(self, bank: MemoryBank, documents: Sequence[Document], replace: bool) -> None:
        await asyncio.wrap_future(self._put(bank, _Write(documents, replace, bytes_in(documents))))

    async def delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]:
        deleted: list[str] = await asyncio.wrap_future(self._put(bank, _Call(lambda: self._delete(bank, document_ids))))
        return deleted

    async def drop(self, bank: MemoryBank) -> None:
        await asyncio.wrap_future(self._put(bank, _Call(lambda: self._tables.remove(bank))))

    def look_after(self) -> int:
        """Maintains the banks that need it, one after another, each between its writes; tells how many.

        Expired documents go, what was written becomes fewer and larger files, the indexes take it in, and old versions
        are cleaned up. A bank where that fails is tried again with the next pass.
        """
        banks = self._store.memory_banks.due(AT_ONCE)
        for bank in banks:
            try:
                self._put(bank, _Call(lambda bank=bank: self._maintain(bank))).result()  # type: ignore[misc]
            except (StackError, OSError, RuntimeError, ValueError) as error:  # LanceDB's own are of the last two
                logger.warning("the memory bank %s cannot be maintained: %s", bank.id, error)
        return len(banks)

    def sweep(self) -> list[str]:
        """Removes the tables of banks that are no more, which a drop that broke off has left. Tells their ids."""
        found = {bank_id: tenant for tenant, bank_id in self._tables.folders()}
        ids = list(found)
        known = set[str]()
        for start in range(0, len(ids), 500):
            known |= self._store.memory_banks.known(ids[start : start + 500])
        left = [_gone(bank_id, tenant) for bank_id, tenant in found.items() if bank_id not in known]
        for bank in left:
            self._put(bank, _Call(lambda bank=bank: self._tables.remove(bank))).result()  # type: ignore[misc]
        return sorted(bank.id for bank in left)

    def close(self) -> None:
        """Ends when what was begun is done."""
        self._threads.shutdown()

    def _put(self, bank: MemoryBank, item: _Item) -> Future[Any]:
        with self._lock:
            lane = self._lanes.get(bank.id)
            is_idle = lane is None
            lane = self._lanes.setdefault(bank.id, lane or _Lane())
            lane.waiting.append(item)
        if is_idle:
            self._start(bank, lane)
        return item.done

    def _start(self, bank: MemoryBank, lane: _Lane) -> None:
        """Has a thread do what is next in a lane."""
        with self._lock:
            items = lane.take()
        # Who has left meanwhile waits for nothing.
        items = [item for item in items if item.done.running() or item.done.set_running_or_notify_cancel()]
        work = self._threads.submit(self._do, bank, items)
        work.add_done_callback(lambda done: self._finish(bank, lane, items, done))

    def _do(self, bank: MemoryBank, items: list[_Item]) -> Any:
        """Does a call, or writes in one commit."""
        if items and isinstance(items[0], _Call):
            return items[0].work()
        writes = [item for item in items if isinstance(item, _Write)]
        return self._write(bank, writes) if writes else None

    def _finish(self, bank: MemoryBank, lane: _Lane, items: list[_Item], work: Future[Any]) -> None:
        """Tells those who wait what came of it. Of several writes that are refused together, each is tried alone."""
        error = work.exception()
        with self._lock:
            if isinstance(error, StackError) and len(items) > 1:
                lane.put_back(items)
                items = []
            is_idle = not lane.waiting
            if is_idle:
                del self._lanes[bank.id]
        for item in items:
            if error is None:
                item.done.set_result(work.result())
            else:
                item.done.set_exception(error)
        if not is_idle:
            self._start(bank, lane)

    def _write(self, bank: MemoryBank, writes: list[_Write]) -> None:
        documents = [document for write in writes for document in write.documents]
        expiries = [document.expires_at for document in documents if document.expires_at is not None]
        size = sum(write.size for write in writes)
        if not self._store.memory_banks.begin_write(bank.id, size, min(expiries, default=None)):
            raise _no_bank(bank)
        self._tables.get_or_create(bank).write(documents, writes[0].replace)

    def _delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]:
        if not self._store.memory_banks.begin_write(bank.id, 0, None):
            raise _no_bank(bank)
        return self._tables.get_or_create(bank).delete(document_ids)

    def _maintain(self, bank: MemoryBank) -> None:
        began_at = now()
        if not self._store.memory_banks.known([bank.id]):
            return  # it was dropped meanwhile
        size, expires_at = 0, None
        if (table := self._tables.get(bank)) is not None:
            table.delete_expired(dt.datetime.now(dt.UTC))
            table.maintain()
            size, expires_at = table.size(), table.next_expiry()
        self._store.memory_banks.maintained(bank, began_at, size, expires_at)


def _fits(item: _Item, others: list[_Item]) -> bool:
    """Whether an item can be done in the same commit as others: writes of one kind, of different documents."""
    first = others[0]
    if not isinstance(item, _Write) or not isinstance(first, _Write) or item.replace != first.replace:
        return False
    writes = [other for other in others if isinstance(other, _Write)]
    taken = {document.document_id for write in writes for document in write.documents}
    return (
        len(taken) + len(item.documents) <= MAX_DOCUMENTS
        and item.size + sum(write.size for write in writes) <= MAX_BYTES
        and taken.isdisjoint(document.document_id for document in item.documents)
    )


def bytes_in(documents: Sequence[Document]) -> int:
    """About how many bytes documents take in a table."""
    total = 0
    for document in documents:
        total += len(document.content) + ROW_BYTES
        total += sum(len(chunk.text) + ROW_BYTES for chunk in document.chunks)
        total += document.vectors.nbytes if document.vectors is not None else 0
    return total


def _no_bank(bank: MemoryBank) -> NotFound:
    return NotFound(f"the memory bank {bank.id!r} was dropped", param="bank_id")


def _gone(bank_id: str, tenant: str) -> MemoryBank:
    """A bank of which there is nothing left but its folder."""
    return MemoryBank(bank_id, tenant, "", None, {}, None, 0, "", written_at="")

"""The one writer of all banks: what waits for a bank becomes one commit, and is acknowledged when that is done.

LanceDB takes several writers, but they and its compaction get into each other's way (lancedb#725, #1971). So whatever
changes a bank passes through its lane here, one thing at a time: writes, deletions, maintenance, the end of the bank.
Banks do not wait for each other. Beside the longest part of a maintenance, which puts files together, new documents are
written that bring no new key of metadata: rows that are added get into nobody's way.

That there is one is a matter of the database: a new writer takes the next epoch, and one of an earlier epoch is refused
before it writes anything and again right before a commit. What stays is the commit itself, some tens of milliseconds on
a local disk: a writer that was replaced between that look and the end of its commit may write beside the new one, and
where both insert the same document in that moment it is there twice. On one machine a lock (memory_writer.py) closes
this, too.
"""

import asyncio
import datetime as dt
import errno
import json
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from stack import disk
from stack.config import Config
from stack.errors import NotFound, StackError, StorageFull, Superseded, Unavailable
from stack.memory_banks.rows import Document
from stack.memory_banks.table import KEEP_VERSIONS, to_write
from stack.memory_banks.tables import OpenBank, Tables
from stack.store import MemoryBank, Store, now

logger = logging.getLogger("ray.serve")

DISK = "the disk of the memory banks"
# Of one commit.
MAX_DOCUMENTS = 2_000
MAX_BYTES = 128 * 2**20
# Of all writes that wait or are under way. One that is larger is taken when nothing else is there.
MAX_WAITING_BYTES = 512 * 2**20
# Of the banks in which something is due, as many are read from the database at once, and as many looked after.
AT_ONCE = 100
BANKS_AT_ONCE = 4
# A query takes 0.15 ms for each commit that has not been put together with others: after so many of a bank, the next
# maintenance does not wait for its time.
CROWDED = 40
# What a row takes beside its text and its vector.
ROW_BYTES = 200


class Writer(Protocol):
    """What changes banks. When a method returns, what it has done is durable and seen by every reader.

    `write` writes documents: with `replace` in the place of those that are there, else as new ones, where those that
    are there already, just so, stay as they are. It raises Conflict for an id that is taken by another document, and
    NotFound for one to be replaced that is not there; nothing is written then. `delete` tells which documents it has
    deleted. All raise NotFound for a bank that was dropped, Unavailable, and StorageFull.
    """

    async def write(self, bank: MemoryBank, documents: Sequence[Document], replace: bool) -> None: ...

    async def delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]: ...

    async def drop(self, bank: MemoryBank) -> None:
        """Removes the table of a bank whose row is gone."""


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@dataclass(frozen=True, eq=False)
class _Write:
    documents: Sequence[Document]
    replace: bool
    size: int
    done: asyncio.Future[Any] = field(default_factory=_future)

    @property
    def ids(self) -> list[str]:
        return [document.document_id for document in self.documents]


@dataclass(frozen=True, eq=False)
class _Call:
    """Anything else that is done in a bank's lane, alone."""

    work: Callable[[], Awaitable[Any]]
    done: asyncio.Future[Any] = field(default_factory=_future)


_Item = _Write | _Call
_Lane = deque[_Item]


class BankWriter:
    """Implements Writer, in this process, on the event loop of who calls it.

    Making one ends all others on the same database, which raise Unavailable from then on.
    """

    def __init__(self, config: Config, store: Store) -> None:
        self._store = store
        self._epoch = store.memory_banks.next_writer()
        self.is_superseded = False  # by another writer, as far as this one has noticed
        self._tables = Tables(config)
        self._lanes: dict[str, _Lane] = {}
        self._waiting_bytes = 0
        self._tasks = set[asyncio.Task[None]]()
        self._commits = Counter[str]()  # of each bank since it was maintained
        self._is_crowded = asyncio.Event()
        self._builds: dict[str, asyncio.Task[None]] = {}  # of the banks whose index of vectors is being built
        self._one_build = asyncio.Lock()
        self._tidying: dict[str, asyncio.Task[None]] = {}  # of the banks whose files are being put together

    async def write(self, bank: MemoryBank, documents: Sequence[Document], replace: bool) -> None:
        size = bytes_in(documents)
        if self._waiting_bytes and self._waiting_bytes + size > MAX_WAITING_BYTES:
            raise Unavailable("the writer of the memory banks has more to write than it can hold; repeat it")
        self._waiting_bytes += size
        try:
            await self._in_lane(bank, _Write(documents, replace, size))
        finally:
            self._waiting_bytes -= size

    async def delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]:
        deleted: list[str] = await self._in_lane(bank, _Call(lambda: self._delete(bank, document_ids)))
        return deleted

    async def drop(self, bank: MemoryBank) -> None:
        await self._in_lane(bank, _Call(lambda: self._remove(bank)))

    async def until_due(self, seconds: float) -> None:
        """Waits so long, or until a bank has so many commits that it slows its queries down."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_crowded.wait()

    async def look_after(self) -> int:
        """Maintains the banks that need it, a few at once, each between its writes; tells how many it has tried.

        Expired documents go, what was written becomes fewer and larger files, the indexes take it in, and old versions
        are cleaned up; those of the last minutes later, in a maintenance of their own. An index of vectors that is to
        be built is only begun. A bank where something fails, which is logged, is tried again by the next call.
        """
        self._is_crowded.clear()
        await self._require_current()
        began_at, tried = now(), 0
        while banks := await asyncio.to_thread(self._store.memory_banks.take_due, AT_ONCE, began_at):
            await self._in_each(banks, self._maintain, "maintained")
            tried += len(banks)
        return tried

    async def until_built(self) -> None:
        """Waits until no index is being built."""
        while self._builds:
            await asyncio.wait(self._builds.values())

    async def sweep(self) -> list[str]:
        """Removes the tables of dropped banks that a drop which broke off has left. Tells their ids.

        Only what the database says was dropped goes: a folder that no row knows may be another stack's, or of a
        database that was restored.
        """
        dropped = await asyncio.to_thread(self._store.memory_banks.dropped)
        left = [_gone(*one) for one in dropped if one[0] not in self._builds]
        return sorted(bank.id for bank in await self._in_each(left, self._remove, "removed"))

    async def _in_each(
        self,
        banks: Sequence[MemoryBank],
        work: Callable[[MemoryBank], Awaitable["asyncio.Task[None] | None"]],
        what: str,
    ) -> list[MemoryBank]:
        """Does some work in the lanes of a few banks at once, and waits for the task that it begins beside them, if it
        does. Tells in which banks nothing has failed."""
        few = asyncio.Semaphore(BANKS_AT_ONCE)

        async def do(bank: MemoryBank) -> None:
            async with few:
                beside = await self._in_lane(bank, _Call(lambda: work(bank)))
                if beside is not None:
                    await asyncio.shield(beside)

        done = []
        errors = await asyncio.gather(*map(do, banks), return_exceptions=True)
        for bank, error in zip(banks, errors, strict=True):
            if error is None:
                done.append(bank)
            else:  # whatever it is: the other banks are looked after all the same
                logger.error("the memory bank %s cannot be %s", bank.id, what, exc_info=error)
        return done

    async def _in_lane(self, bank: MemoryBank, item: _Item) -> Any:
        """What an item gives that is done in a bank's lane. Who leaves before its turn has done nothing."""
        if (lane := self._lanes.get(bank.id)) is not None:
            lane.append(item)
        else:
            self._lanes[bank.id] = deque([item])
            task = asyncio.create_task(self._work(bank))
            self._tasks.add(task)  # the event loop itself holds none
            task.add_done_callback(self._tasks.discard)
        return await item.done

    async def _work(self, bank: MemoryBank) -> None:
        """Does what waits in a bank's lane, until nothing does."""
        lane = self._lanes[bank.id]
        try:
            while lane:
                if items := [item for item in _next(lane) if not item.done.cancelled()]:
                    work = asyncio.create_task(self._do(bank, items))
                    await asyncio.wait([work])
                    _tell(items, work)
        finally:
            del self._lanes[bank.id]

    async def _do(self, bank: MemoryBank, items: Sequence[_Item]) -> Any:
        """Does a call, or writes in one commit."""
        with _telling_full():
            if isinstance(items[0], _Call):
                return await items[0].work()
            return await self._write(bank, [item for item in items if isinstance(item, _Write)])

    async def _write(self, bank: MemoryBank, writes: Sequence[_Write]) -> None:
        opened = await self._begin(bank, sum(write.size for write in writes))
        there = await opened.table.hashes([one for write in writes for one in write.ids])
        ready: dict[_Write, list[Document]] = {}
        for write in writes:
            try:
                ready[write] = to_write(write.documents, there, replace=write.replace)
            except StackError as error:
                _refuse(write, error)
        documents = [one for of_write in ready.values() for one in of_write]
        if bank.id in self._tidying and not await opened.table.only_adds(documents):
            await self._until_tidy(bank)
        await self._require_current()
        await _commit(opened, ready)
        self._commits[bank.id] += 1
        if self._commits[bank.id] >= CROWDED:
            self._is_crowded.set()

    async def _delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]:
        row = await asyncio.to_thread(self._store.memory_banks.get, bank.tenant, bank.id)
        if row is None:
            raise _dropped(bank)
        if row.written_at is None:
            return []
        opened = await self._begin(bank, 0)
        await self._until_tidy(bank)
        await self._require_current()
        return await opened.table.delete(document_ids)

    async def _begin(self, bank: MemoryBank, size: int) -> OpenBank:
        """The bank to be written into, after its row says that it is. Raises NotFound if it was dropped."""
        if not await asyncio.to_thread(self._store.memory_banks.begin_write, self._epoch, bank.id, size):
            await self._require_current()
            raise _dropped(bank)
        return await self._tables.get_or_create(bank)

    async def _require_current(self) -> None:
        """Raises Superseded where another writer has taken over."""
        if not await asyncio.to_thread(self._store.memory_banks.is_writer, self._epoch):
            self.is_superseded = True
            raise Superseded("another writer of the memory banks has taken over; repeat it")

    async def _maintain(self, bank: MemoryBank) -> "asyncio.Task[None] | None":
        """Deletes what has expired, and begins what is done beside the lane."""
        await self._until_tidy(bank)
        await self._require_current()
        self._commits.pop(bank.id, None)
        row = await asyncio.to_thread(self._store.memory_banks.get, bank.tenant, bank.id)
        if row is None:
            return None  # it was dropped meanwhile
        if bank.id in self._builds:
            return None  # it is due until the index is there
        if (opened := await self._tables.get(row)) is None:
            await asyncio.to_thread(self._store.memory_banks.maintained, self._epoch, row, 0, None)
            return None
        due_at = await opened.table.next_expiry()  # asked first: none may expire between this and the deletion
        expired = await opened.table.delete_expired()
        if opened.graph is not None:
            await opened.graph.maintain(opened.table)
        tidying = asyncio.create_task(self._tidy(row, opened, due_at, expired > 0))
        self._tidying[bank.id] = tidying
        return tidying

    async def _tidy(self, bank: MemoryBank, opened: OpenBank, due_at: dt.datetime | None, has_expired: bool) -> None:
        """The part of the maintenance of a bank, as it was then, beside which documents are added: in object storage it
        takes long."""
        try:
            with _telling_full():
                await opened.table.maintain()
            size = await asyncio.to_thread(self._tables.size, bank)
            if has_expired or _is_new(bank):
                due_at = min(filter(None, (due_at, _now() + _until_old())))
            if await opened.table.lacks_index():
                due_at = _now()
                self._begin_build(bank, opened)
            await asyncio.to_thread(self._store.memory_banks.maintained, self._epoch, bank, size, due_at)
        finally:
            del self._tidying[bank.id]

    async def _until_tidy(self, bank: MemoryBank) -> None:
        """Waits until a bank's files are not being put together."""
        if tidying := self._tidying.get(bank.id):
            await asyncio.wait([tidying])

    def _begin_build(self, bank: MemoryBank, opened: OpenBank) -> None:
        """Builds a bank's index of vectors beside its lane, so that writes do not wait for it; one of all at a time."""

        async def build() -> None:
            async with self._one_build:
                await opened.table.index_vectors()

        def end(build: asyncio.Task[None]) -> None:
            del self._builds[bank.id]
            if not build.cancelled() and (error := build.exception()) is not None:
                logger.error("the index of the memory bank %s cannot be built", bank.id, exc_info=error)

        self._builds[bank.id] = asyncio.create_task(build())
        self._builds[bank.id].add_done_callback(end)

    async def _remove(self, bank: MemoryBank) -> None:
        """Removes the files of a bank that was dropped. What writes into it in this lane later finds no row."""
        await self._until_tidy(bank)  # which may begin to build an index
        if bank.id in self._builds:
            return  # it still writes files; a sweep removes them all
        await self._tables.remove(bank)
        await asyncio.to_thread(self._store.memory_banks.removed, bank.id)


async def _commit(opened: OpenBank, ready: dict[_Write, list[Document]]) -> None:
    """Writes all in one commit; where that is refused, each by itself, so that none takes others with it."""
    documents = [one for of_write in ready.values() for one in of_write]
    try:
        # Of a document that is there, its whole graph is.
        if opened.graph is not None and documents:
            await opened.graph.put(documents)
        await opened.table.put(documents)
    except StackError as error:
        if len(ready) == 1:
            _refuse(next(iter(ready)), error)
        else:
            for write, of_write in ready.items():
                await _commit(opened, {write: of_write})


def _next(lane: _Lane) -> list[_Item]:
    """Takes from a lane what is to be done next, together."""
    items = [lane.popleft()]
    while lane and _fits(lane[0], items):
        items.append(lane.popleft())
    return items


def _fits(item: _Item, others: Sequence[_Item]) -> bool:
    """Whether an item can be done in the same commit as others: writes of different documents."""
    writes = [other for other in others if isinstance(other, _Write)]
    if not isinstance(item, _Write) or not writes:
        return False
    taken = {one for write in writes for one in write.ids}
    return (
        len(taken) + len(item.documents) <= MAX_DOCUMENTS
        and item.size + sum(write.size for write in writes) <= MAX_BYTES
        and taken.isdisjoint(item.ids)
    )


def _refuse(write: _Write, error: StackError) -> None:
    if not write.done.done():
        write.done.set_exception(error)


def _tell(items: Sequence[_Item], work: asyncio.Task[Any]) -> None:
    """Tells those who wait, unless they know or have left, what came of it."""
    for item in items:
        if item.done.done():
            continue
        if (error := work.exception()) is not None:
            item.done.set_exception(error)
        else:
            item.done.set_result(work.result())


def bytes_in(documents: Sequence[Document]) -> int:
    """About how many bytes documents take in a table."""
    total = 0
    for document in documents:
        # Each row has the metadata twice: as JSON, and in columns of their own.
        metadata = len(json.dumps(document.metadata, ensure_ascii=False).encode())
        total += (1 + len(document.chunks)) * (2 * metadata + ROW_BYTES)
        total += len(document.content.encode()) + sum(len(chunk.text.encode()) for chunk in document.chunks)
        total += document.vectors.nbytes if document.vectors is not None else 0
        if document.graph is not None:
            total += (len(document.graph.mentions) + len(document.graph.relations)) * ROW_BYTES
    return total


def _is_new(bank: MemoryBank) -> bool:
    """Whether something was written into a bank so lately that what it replaced is still kept."""
    return bank.written_at is not None and dt.datetime.fromisoformat(bank.written_at) > _now() - _until_old()


def _until_old() -> dt.timedelta:
    """After how long the versions that a bank has now are cleaned up, but for the newest."""
    return KEEP_VERSIONS + dt.timedelta(seconds=1)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


@contextmanager
def _telling_full() -> Iterator[None]:
    """Raises StorageFull where the disk is. LanceDB's errors have the number of the system's in their text alone."""
    try:
        with disk.telling_full(DISK):
            yield
    except (OSError, RuntimeError) as error:
        if not any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise StorageFull(f"{DISK} is full") from error


def _dropped(bank: MemoryBank) -> NotFound:
    return NotFound(f"the memory bank {bank.id!r} was dropped", param="bank_id")


def _gone(bank_id: str, tenant: str) -> MemoryBank:
    """A bank of which there may be nothing left but its folder."""
    return MemoryBank(bank_id, tenant, "", None, {}, None, 0, "", written_at="")

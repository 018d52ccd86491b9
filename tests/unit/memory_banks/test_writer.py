"""The one writer of all banks: what it gathers, what it refuses, what it looks after; on both databases."""

import asyncio
import datetime as dt
import errno
import hashlib
import random
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy.exc import SQLAlchemyError

from stack.context import Context
from stack.errors import Conflict, NotFound, StorageFull, Unavailable
from stack.memory_banks.rows import Chunk, Document
from stack.memory_banks.table import BankTable
from stack.memory_banks.tables import Tables
from stack.memory_banks.writer import CROWDED, BankWriter, bytes_in
from stack.store import MemoryBank, Store, now
from tests.unit.memory_banks.documents import DIMENSIONS
from tests.unit.memory_banks.documents import document as with_vectors


def document(document_id: str, text: str = "a text", expires_at: dt.datetime | None = None) -> Document:
    digest = hashlib.sha256(text.encode()).hexdigest()
    chunk = Chunk(text, 0, 0, len(text), len(text.split()), None, ())
    return Document(document_id, f'"{text}"', "text/plain", {}, digest, expires_at, (chunk,), None)


@pytest.fixture
def bank(context: Context) -> MemoryBank:
    return add_bank(context)


def add_bank(context: Context) -> MemoryBank:
    made = MemoryBank(
        f"bank-{uuid.uuid4().hex}", "default", "a", None, {"type": "keyvalue"}, None, bytes=0, created_at=now()
    )
    context.store.memory_banks.add(made)
    return made


@pytest.fixture
def writer(context: Context) -> BankWriter:
    return BankWriter(context.config, context.store)


class Commits:
    """The commits so far: the ids of the documents of each. The first one waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[list[str]] = []
        self.has_begun, self.may_go = asyncio.Event(), asyncio.Event()
        put = BankTable.put

        async def recorded(table: BankTable, documents: Sequence[Document]) -> None:
            self.ids.append([document.document_id for document in documents])
            self.has_begun.set()
            async with asyncio.timeout(30):
                await self.may_go.wait()
            await put(table, documents)

        monkeypatch.setattr(BankTable, "put", recorded)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    return Commits(monkeypatch)


async def ids_in(context: Context, bank: MemoryBank, *ids: str) -> list[str]:
    """Those of these documents that another process would find."""
    row = context.store.memory_banks.get(bank.tenant, bank.id)
    assert row is not None
    opened = await Tables(context.config).get(row)
    return sorted(one.document_id for one in await opened.table.documents(ids)) if opened else []


async def begin(commits: Commits, writer: BankWriter, bank: MemoryBank) -> asyncio.Task[None]:
    """A first write, which is under way until `commits.may_go`."""
    first = asyncio.create_task(writer.write(bank, [document("first")], replace=False))
    async with asyncio.timeout(30):
        await commits.has_begun.wait()
    return first


async def waiting(writer: BankWriter, *writes: Any) -> list[asyncio.Task[Any]]:
    """Calls that wait in their lanes, in this order."""
    tasks = []
    for write in writes:
        tasks.append(asyncio.create_task(write))
        await asyncio.sleep(0)
    return tasks


async def test_writes_that_wait_for_a_bank_become_one_commit(
    context: Context, writer: BankWriter, bank: MemoryBank, commits: Commits
) -> None:
    first = await begin(commits, writer, bank)
    others = await waiting(writer, *(writer.write(bank, [document(f"{n}")], replace=False) for n in range(20)))
    assert not any(task.done() for task in (first, *others))
    commits.may_go.set()
    await asyncio.gather(first, *others)
    assert commits.ids == [["first"], [f"{n}" for n in range(20)]]
    assert len(await ids_in(context, bank, "first", *(f"{n}" for n in range(20)))) == 21


async def test_a_commit_has_so_many_documents_and_bytes_at_most(
    context: Context, writer: BankWriter, bank: MemoryBank, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stack.memory_banks.writer.MAX_DOCUMENTS", 3)
    monkeypatch.setattr("stack.memory_banks.writer.MAX_BYTES", bytes_in([document("a", "x" * 1_000)]) + 100)
    first = await begin(commits, writer, bank)
    texts = {"a": "", "b": "", "c": "", "d": "", "large": "x" * 1_000, "larger": "x" * 5_000, "e": ""}
    writes = [writer.write(bank, [document(id_, text)], replace=False) for id_, text in texts.items()]
    others = await waiting(writer, *writes)
    commits.may_go.set()
    await asyncio.gather(first, *others)
    assert commits.ids == [["first"], ["a", "b", "c"], ["d"], ["large"], ["larger"], ["e"]]
    assert len(await ids_in(context, bank, "first", *texts)) == 8


async def test_the_tables_that_were_asked_for_lately_stay_open(context: Context, writer: BankWriter) -> None:
    rows = []
    for bank in (add_bank(context) for _ in range(3)):
        await writer.write(bank, [document(bank.id)], replace=False)
        row = context.store.memory_banks.get("default", bank.id)
        assert row is not None
        rows.append(row)
    tables = Tables(context.config, most=2)
    first, second = await tables.get(rows[0]), await tables.get(rows[1])
    assert await tables.get(rows[0]) is first
    await tables.get(rows[2])
    assert await tables.get(rows[0]) is first
    again = await tables.get(rows[1])
    assert again is not None
    assert again is not second
    assert await again.table.ids() == [rows[1].id]


async def test_writes_of_the_same_document_are_apart_and_in_their_order(
    context: Context, writer: BankWriter, bank: MemoryBank, commits: Commits
) -> None:
    first = await begin(commits, writer, bank)
    updates = [writer.write(bank, [document("first", f"text {n}")], replace=True) for n in range(3)]
    others = await waiting(writer, *updates)
    commits.may_go.set()
    await asyncio.gather(first, *others)
    assert commits.ids == [["first"]] * 4
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    opened = await Tables(context.config).get(row)
    assert opened is not None
    assert [one.content for one in await opened.table.documents(["first"])] == ['"text 2"']


async def test_a_write_that_is_refused_takes_no_other_one_with_it(
    context: Context, writer: BankWriter, bank: MemoryBank, commits: Commits
) -> None:
    first = await begin(commits, writer, bank)
    good, bad, last = await waiting(
        writer,
        writer.write(bank, [document("good")], replace=False),
        writer.write(bank, [document("with it"), document("first", "another")], replace=False),
        writer.write(bank, [document("last")], replace=False),
    )
    commits.may_go.set()
    await asyncio.gather(first, good, last)
    with pytest.raises(Conflict, match="first"):
        await bad
    assert await ids_in(context, bank, "first", "good", "last", "with it") == ["first", "good", "last"]


async def test_who_leaves_before_the_turn_of_a_write_has_written_nothing(
    context: Context, writer: BankWriter, bank: MemoryBank, commits: Commits
) -> None:
    first = await begin(commits, writer, bank)
    left, stays = await waiting(
        writer,
        writer.write(bank, [document("left")], replace=False),
        writer.write(bank, [document("stays")], replace=False),
    )
    left.cancel()
    await asyncio.wait([left])
    commits.may_go.set()
    await asyncio.gather(first, stays)
    assert await ids_in(context, bank, "first", "left", "stays") == ["first", "stays"]


async def test_banks_do_not_wait_for_each_other(
    context: Context, writer: BankWriter, bank: MemoryBank, commits: Commits
) -> None:
    first = await begin(commits, writer, bank)
    other = add_bank(context)
    assert await writer.delete(other, ["nothing"]) == []
    assert not first.done()
    commits.may_go.set()
    await first


async def broken(*_: Any) -> None:
    raise OSError("the disk is gone")


async def test_what_fails_for_another_reason_is_told_to_all_and_the_bank_goes_on(
    context: Context, writer: BankWriter, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(BankTable, "put", broken)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                await writer.write(bank, [document("a")], replace=False)
    await writer.write(bank, [document("a")], replace=False)
    assert await ids_in(context, bank, "a") == ["a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # As LanceDB tells it.
        RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), structural.rs:191:9"),
    ],
)
async def test_a_disk_that_is_full_is_told(
    writer: BankWriter, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(BankTable, "put", full)
    with pytest.raises(StorageFull, match="the disk of the memory banks is full"):
        await writer.write(bank, [document("a")], replace=False)


async def test_a_bank_that_was_dropped_is_not_made_again_by_a_write_that_comes_late(
    context: Context, writer: BankWriter, bank: MemoryBank, home: Path
) -> None:
    await writer.write(bank, [document("a")], replace=False)
    assert context.store.memory_banks.delete("default", bank.id)
    await writer.drop(bank)
    for late in (writer.write(bank, [document("b")], replace=False), writer.delete(bank, ["a"])):
        with pytest.raises(NotFound):
            await late
    assert not list((home / "memory_banks").rglob(f"{bank.id}*"))


async def test_another_writer_goes_on_with_what_is_there(
    context: Context, writer: BankWriter, bank: MemoryBank
) -> None:
    await writer.write(bank, [document("a")], replace=False)
    other = BankWriter(context.config, context.store)
    await other.write(bank, [document("b")], replace=False)  # the row that it is given is from before the first write
    assert await ids_in(context, bank, "a", "b") == ["a", "b"]


async def test_a_writer_that_was_replaced_writes_no_more(
    context: Context, writer: BankWriter, bank: MemoryBank
) -> None:
    await writer.write(bank, [document("a")], replace=False)
    other = BankWriter(context.config, context.store)
    for late in (writer.write(bank, [document("b")], replace=False), writer.delete(bank, ["a"])):
        with pytest.raises(Unavailable, match="another writer"):
            await late
    assert writer.is_superseded
    assert await ids_in(context, bank, "a", "b") == ["a"]
    await other.write(bank, [document("b")], replace=False)
    assert not other.is_superseded


async def test_a_writer_that_is_replaced_while_it_prepares_a_commit_does_not_make_it(
    context: Context, writer: BankWriter, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that insert the same document, of which each has seen that it is not there."""
    has_looked, may_go, hashes = asyncio.Event(), asyncio.Event(), BankTable.hashes

    async def waits(table: BankTable, document_ids: Sequence[str]) -> dict[str, str]:
        there = await hashes(table, document_ids)
        has_looked.set()
        async with asyncio.timeout(30):
            await may_go.wait()
        return there

    with monkeypatch.context() as slow:
        slow.setattr(BankTable, "hashes", waits)
        first = asyncio.create_task(writer.write(bank, [document("a")], replace=False))
        async with asyncio.timeout(30):
            await has_looked.wait()
    await BankWriter(context.config, context.store).write(bank, [document("a")], replace=False)
    may_go.set()
    with pytest.raises(Unavailable, match="another writer"):
        await first
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    opened = await Tables(context.config).get(row)
    assert opened is not None
    assert (await opened.table.counts()).documents == 1


async def test_expired_documents_go_and_the_others_stay(context: Context, writer: BankWriter, bank: MemoryBank) -> None:
    then = dt.datetime.now(dt.UTC)
    past, future = then - dt.timedelta(seconds=1), then + dt.timedelta(minutes=2)
    await writer.write(bank, [document("old", expires_at=past), document("new", expires_at=future)], replace=False)
    assert await ids_in(context, bank, "old", "new") == ["new"]
    assert await writer.look_after() == 1
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    assert row.due_at is not None
    assert abs(dt.datetime.fromisoformat(row.due_at) - future) < dt.timedelta(seconds=1)
    assert row.bytes > 0
    assert await writer.look_after() == 0


async def test_only_banks_in_which_something_is_due_are_looked_after(
    context: Context, writer: BankWriter, bank: MemoryBank
) -> None:
    assert await writer.look_after() == 0
    await writer.write(bank, [document("a")], replace=False)
    add_bank(context)
    assert await writer.look_after() == 1
    assert await writer.look_after() == 0
    await writer.delete(bank, ["a"])
    assert await writer.look_after() == 1


@pytest.mark.parametrize("error", [RuntimeError("a commit conflict"), KeyError("a column"), SQLAlchemyError("away")])
async def test_a_bank_whose_maintenance_fails_is_told_and_tried_again_and_holds_up_no_other(
    context: Context, writer: BankWriter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Any
) -> None:
    monkeypatch.setattr("stack.memory_banks.writer.AT_ONCE", 2)
    banks = sorted((add_bank(context) for _ in range(5)), key=lambda bank: bank.id)
    for bank in banks:
        await writer.write(bank, [document("a")], replace=False)
    broken, maintain = {bank.id for bank in banks[:3]}, BankTable.maintain
    tried: list[str] = []

    async def fails(table: BankTable) -> None:
        folder = urlsplit(await table.rows.uri()).path.split("/")[-2]
        tried.append(folder)
        if folder in broken:
            raise error
        await maintain(table)

    with monkeypatch.context() as failing:
        failing.setattr(BankTable, "maintain", fails)
        assert await writer.look_after() == 5
        assert sorted(tried) == [bank.id for bank in banks], "each once"
        tried.clear()
        assert await writer.look_after() == 3
        assert set(tried) == broken
    told = [record for record in caplog.records if record.exc_info and record.exc_info[1] is error]
    assert len(told) == 6
    assert await writer.look_after() == 3
    assert await writer.look_after() == 0


async def test_a_bank_whose_files_cannot_be_removed_is_swept_later(
    context: Context, writer: BankWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks = [add_bank(context) for _ in range(2)]
    for bank in banks:
        context.store.memory_banks.delete("default", bank.id)
    remove = Tables.remove

    async def fails(tables: Tables, bank: MemoryBank) -> None:
        if bank.id == banks[0].id:
            raise OSError("the disk is gone")
        await remove(tables, bank)

    with monkeypatch.context() as failing:
        failing.setattr(Tables, "remove", fails)
        assert await writer.sweep() == [banks[1].id]
    assert await writer.sweep() == [banks[0].id]


def test_what_a_document_takes_is_counted_in_bytes_and_with_its_metadata_in_each_row() -> None:
    plain = with_vectors("a", "one. two. three")
    assert bytes_in([with_vectors("a", "one. two. drüü")]) == bytes_in([plain]) + 2, "in the content and in a chunk"
    tagged = replace(plain, metadata={"tag": "ä" * 5_000})
    assert bytes_in([tagged]) - bytes_in([plain]) >= 4 * 2 * 10_000
    assert bytes_in([plain, tagged]) == bytes_in([plain]) + bytes_in([tagged])
    assert bytes_in([plain]) - bytes_in([replace(plain, vectors=None)]) == 3 * DIMENSIONS * 4


async def test_more_than_the_writer_can_hold_is_to_be_repeated(
    context: Context, writer: BankWriter, bank: MemoryBank, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = bytes_in([document("first"), document("n0"), document("n1")])
    monkeypatch.setattr("stack.memory_banks.writer.MAX_WAITING_BYTES", most)
    first = await begin(commits, writer, bank)
    others = await waiting(writer, *(writer.write(bank, [document(f"n{n}")], replace=False) for n in range(2)))
    with pytest.raises(Unavailable, match="more to write than it can hold"):
        await writer.write(bank, [document("n2")], replace=False)
    commits.may_go.set()
    await asyncio.gather(first, *others)
    await writer.write(bank, [document("large", "x" * most)], replace=False)
    assert await ids_in(context, bank, "n0", "n1", "n2", "large") == ["large", "n0", "n1"]


class Waits:
    """Something that waits, once it has begun, until it is let go."""

    def __init__(self) -> None:
        self.has_begun, self.may_go = asyncio.Event(), asyncio.Event()

    async def here(self) -> None:
        self.has_begun.set()
        async with asyncio.timeout(60):
            await self.may_go.wait()

    async def until_begun(self) -> None:
        async with asyncio.timeout(30):
            await self.has_begun.wait()


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The building of an index, which waits until it is let go."""
    waits = Waits()
    build = BankTable.index_vectors

    async def waiting(table: BankTable) -> None:
        await waits.here()
        await build(table)

    monkeypatch.setattr("stack.memory_banks.table.INDEX_FROM", 300)
    monkeypatch.setattr(BankTable, "index_vectors", waiting)
    return waits


async def vector_bank(context: Context, writer: BankWriter, build: Waits) -> MemoryBank:
    """One whose index is being built."""
    bank = MemoryBank(f"bank-{uuid.uuid4().hex}", "default", "a", None, {"type": "vector"}, DIMENSIONS, 0, now())
    context.store.memory_banks.add(bank)
    await writer.write(bank, [with_vectors(f"d{n}", f"the text {n}") for n in range(300)], replace=False)
    assert await writer.look_after() == 1
    await build.until_begun()
    return bank


async def vector_indices(context: Context, bank: MemoryBank) -> list[str]:
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    opened = await Tables(context.config).get(row)
    assert opened is not None
    return [index.name for index in await opened.table.rows.list_indices() if index.name.startswith("vectors")]


async def test_a_bank_is_written_and_others_are_maintained_while_its_index_is_built(
    context: Context, writer: BankWriter, bank: MemoryBank, build: Waits
) -> None:
    large = await vector_bank(context, writer, build)
    await writer.write(large, [with_vectors("late", "zebra")], replace=False)
    assert await writer.delete(large, ["d0"]) == ["d0"]
    await writer.write(bank, [document("a")], replace=False)
    await writer.look_after()
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    assert row.due_at is not None
    assert row.due_at > now(), "it is maintained"
    assert await vector_indices(context, large) == []
    build.may_go.set()
    await writer.until_built()
    assert await vector_indices(context, large) == ["vectors_of_300"]
    assert await ids_in(context, large, "late", "d0", "d1") == ["d1", "late"]
    assert await writer.look_after() == 1, "what was written meanwhile"
    assert await writer.look_after() == 0


async def test_a_bank_that_is_dropped_while_its_index_is_built_leaves_no_files(
    context: Context, writer: BankWriter, build: Waits, home: Path
) -> None:
    large = await vector_bank(context, writer, build)
    context.store.memory_banks.delete("default", large.id)
    await writer.drop(large)
    assert await writer.sweep() == []
    build.may_go.set()
    await writer.until_built()
    assert await writer.sweep() == [large.id]
    assert not list((home / "memory_banks").rglob(f"{large.id}*"))


async def test_an_index_that_cannot_be_built_is_told_and_tried_again(
    context: Context,
    writer: BankWriter,
    build: Waits,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails(_table: BankTable) -> None:
        build.has_begun.set()
        raise RuntimeError("a commit conflict")

    with monkeypatch.context() as failing:
        failing.setattr(BankTable, "index_vectors", fails)
        large = await vector_bank(context, writer, build)
        await writer.until_built()
    assert "cannot be built" in caplog.text
    build.may_go.set()
    assert await writer.look_after() == 1
    await writer.until_built()
    assert await vector_indices(context, large) == ["vectors_of_300"]


@pytest.fixture
def tidying(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The putting together of a bank's files, which waits until it is let go."""
    waits = Waits()
    maintain = BankTable.maintain

    async def waiting(table: BankTable) -> None:
        await waits.here()
        await maintain(table)

    monkeypatch.setattr(BankTable, "maintain", waiting)
    return waits


async def test_documents_are_added_while_a_banks_files_are_put_together_and_nothing_else_is_done(
    context: Context, writer: BankWriter, bank: MemoryBank, tidying: Waits
) -> None:
    await writer.write(bank, [document("a"), document("b"), document("c")], replace=False)
    maintaining = asyncio.create_task(writer.look_after())
    await tidying.until_begun()
    await writer.write(bank, [document("new")], replace=False)
    replaced, deleted, keyed = await waiting(
        writer,
        writer.write(bank, [document("a", "another")], replace=True),
        writer.delete(bank, ["b"]),
        writer.write(bank, [replace(document("d"), metadata={"topic": "health"})], replace=False),
    )
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    assert not any(one.done() for one in (maintaining, replaced, deleted, keyed))
    assert await ids_in(context, bank, "a", "b", "c", "new") == ["a", "b", "c", "new"]
    tidying.may_go.set()
    assert await maintaining == 1
    await asyncio.gather(replaced, deleted, keyed)
    assert await ids_in(context, bank, "a", "b", "c", "d", "new") == ["a", "c", "d", "new"]
    assert await writer.look_after() == 1, "what was written meanwhile"
    assert await writer.look_after() == 0


async def test_a_bank_that_is_dropped_while_its_files_are_put_together_leaves_none(
    context: Context, writer: BankWriter, bank: MemoryBank, tidying: Waits, home: Path
) -> None:
    await writer.write(bank, [document("a")], replace=False)
    maintaining = asyncio.create_task(writer.look_after())
    await tidying.until_begun()
    context.store.memory_banks.delete("default", bank.id)
    (dropped,) = await waiting(writer, writer.drop(bank))
    tidying.may_go.set()
    await asyncio.gather(maintaining, dropped)
    assert not list((home / "memory_banks").rglob(f"{bank.id}*"))


async def test_a_bank_that_is_dropped_right_before_its_index_is_built_leaves_no_files(
    context: Context, writer: BankWriter, tidying: Waits, build: Waits, home: Path
) -> None:
    large = MemoryBank(f"bank-{uuid.uuid4().hex}", "default", "a", None, {"type": "vector"}, DIMENSIONS, 0, now())
    context.store.memory_banks.add(large)
    await writer.write(large, [with_vectors(f"d{n}", f"the text {n}") for n in range(300)], replace=False)
    maintaining = asyncio.create_task(writer.look_after())
    await tidying.until_begun()
    context.store.memory_banks.delete("default", large.id)
    (dropped,) = await waiting(writer, writer.drop(large))
    tidying.may_go.set()
    await asyncio.gather(maintaining, dropped)
    await build.until_begun()
    assert await writer.sweep() == []
    build.may_go.set()
    await writer.until_built()
    assert await writer.sweep() == [large.id]
    assert not list((home / "memory_banks").rglob(f"{large.id}*"))


async def test_files_that_cannot_be_put_together_at_once_are_told(
    context: Context,
    writer: BankWriter,
    bank: MemoryBank,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails(_table: BankTable) -> None:
        raise RuntimeError("a commit conflict")

    await writer.write(bank, [document("a")], replace=False)
    with monkeypatch.context() as failing:
        failing.setattr(BankTable, "maintain", fails)
        assert await writer.look_after() == 1
    assert f"the memory bank {bank.id} cannot be maintained" in caplog.text
    assert await writer.look_after() == 1


async def test_what_is_added_while_files_are_put_together_is_there_once(
    context: Context, writer: BankWriter, bank: MemoryBank
) -> None:
    async def insert(name: str) -> None:
        for number in range(40):
            await writer.write(bank, [document(f"{name}{number}")], replace=False)

    async def maintain() -> None:
        while not inserting.done():
            await writer.look_after()

    await insert("first")
    inserting = asyncio.ensure_future(asyncio.gather(insert("second"), insert("third")))
    await asyncio.gather(inserting, maintain())
    await writer.look_after()
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    opened = await Tables(context.config).get(row)
    assert opened is not None
    assert (await opened.table.counts()).documents == 120
    names = [f"{name}{number}" for name in ("first", "second", "third") for number in range(40)]
    assert await ids_in(context, bank, *names) == sorted(names)


async def test_what_was_deleted_leaves_the_files_and_the_quota_though_nothing_is_written_any_more(
    context: Context, writer: BankWriter, bank: MemoryBank, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stack.memory_banks.table.KEEP_VERSIONS", dt.timedelta(seconds=1))
    monkeypatch.setattr("stack.memory_banks.writer.KEEP_VERSIONS", dt.timedelta(seconds=1))
    secret = random.Random(0).randbytes(100_000).hex()
    await writer.write(bank, [document("a", secret), document("b")], replace=False)
    await writer.delete(bank, ["a"])
    assert await writer.look_after() == 1
    assert context.store.memory_banks.bytes_of("default") > 200_000
    async with asyncio.timeout(60):
        while await writer.look_after() == 0:
            await writer.until_due(0.1)
    assert context.store.memory_banks.bytes_of("default") < 100_000
    assert sum(file.stat().st_size for file in (home / "memory_banks").rglob("*") if file.is_file()) < 100_000
    assert await ids_in(context, bank, "a", "b") == ["b"]
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    assert row.due_at is None, "nothing is left to be cleaned up"


async def test_what_an_interrupted_drop_has_left_is_swept(
    context: Context, writer: BankWriter, bank: MemoryBank, home: Path
) -> None:
    stays = add_bank(context)
    for one in (bank, stays):
        await writer.write(one, [document("a")], replace=False)
    context.store.memory_banks.delete("default", bank.id)
    assert context.store.memory_banks.dropped() == [(bank.id, "default")]
    assert await writer.sweep() == [bank.id]
    assert await writer.sweep() == []
    assert not list((home / "memory_banks").rglob(f"{bank.id}*"))
    assert await ids_in(context, stays, "a") == ["a"]


async def test_a_drop_leaves_nothing_to_be_swept(context: Context, writer: BankWriter, bank: MemoryBank) -> None:
    await writer.write(bank, [document("a")], replace=False)
    context.store.memory_banks.delete("default", bank.id)
    await writer.drop(bank)
    assert context.store.memory_banks.dropped() == []
    assert not context.store.memory_banks.delete("default", bank.id)
    assert context.store.memory_banks.dropped() == []


async def test_folders_that_the_database_does_not_know_are_left_alone(
    context: Context, writer: BankWriter, bank: MemoryBank, home: Path
) -> None:
    await writer.write(bank, [document("a")], replace=False)
    others = home / "memory_banks" / "photos" / "2026" / "one.jpg"
    others.parent.mkdir(parents=True)
    others.write_text("another's")
    fresh = Store(f"sqlite:///{home}/fresh.db")
    assert await BankWriter(context.config, fresh).sweep() == []
    fresh.close()
    assert others.exists()
    assert await ids_in(context, bank, "a") == ["a"]


async def test_nothing_is_opened_before_it_is_needed(context: Context, home: Path) -> None:
    for _ in range(20):
        add_bank(context)
    writer = BankWriter(context.config, context.store)
    assert await writer.look_after() == 0
    assert not (home / "memory_banks").exists()


async def test_a_deletion_leaves_a_bank_alone_into_which_nothing_was_written(
    context: Context, writer: BankWriter, bank: MemoryBank, home: Path
) -> None:
    assert await writer.delete(bank, ["a"]) == []
    row = context.store.memory_banks.get("default", bank.id)
    assert row is not None
    assert row.written_at is None
    assert not (home / "memory_banks").exists()


async def test_many_commits_do_not_wait_for_the_time_of_maintenance(
    context: Context, writer: BankWriter, bank: MemoryBank
) -> None:
    waiting_for_it = asyncio.create_task(writer.until_due(600))
    for number in range(CROWDED):
        assert not waiting_for_it.done()
        await writer.write(bank, [document(f"{number}")], replace=False)
    async with asyncio.timeout(30):
        await waiting_for_it
    assert await writer.look_after() == 1
    again = asyncio.create_task(writer.until_due(600))
    await writer.write(bank, [document("one more")], replace=False)
    assert not again.done()
    again.cancel()

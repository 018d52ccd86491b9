import asyncio
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from lancedb import AsyncTable

from stack.config import Config
from stack.errors import BadInput, Conflict, NotFound
from stack.memory_banks import table as table_module
from stack.memory_banks.keyvalue import by_keys, by_prefix
from stack.memory_banks.search import Bounds, Query, search
from stack.memory_banks.table import Counts, Words, to_write
from stack.memory_banks.tables import Tables
from stack.store import MemoryBank, now
from tests.conftest import CONFIG
from tests.unit.memory_banks.documents import DIMENSIONS, BankTable, document, vector

REPOSITORY = Path(__file__).parents[3]
ODD_IDS = ["日本 'x\" `\\ \n é/🙂", "' OR 1=1 --", "a%_*", "../../etc", "\u202e", "a" * 500, "e\u0301", "é"]


@pytest.fixture
async def bank(tmp_path: Path) -> BankTable:
    return await BankTable.create(str(tmp_path / "bank"), DIMENSIONS, Words())


async def texts(bank: BankTable, document_id: str) -> list[str]:
    return [hit.chunk.text for hit in await by_keys(bank, [document_id], Bounds(max_chunks=1_000))]


async def test_what_was_written_is_read_at_once_by_another_reader(bank: BankTable, tmp_path: Path) -> None:
    reader = await BankTable.open(str(tmp_path / "bank"))
    assert reader.dimensions == DIMENSIONS
    assert await reader.counts() == Counts(0, 0)
    for at in range(5):
        await bank.write([document(f"d{at}", f"the text {at}. more")], replace=False)
        assert await texts(reader, f"d{at}") == [f"the text {at}", "more"]
    assert await reader.counts() == Counts(documents=5, chunks=10)


async def test_documents_come_back_as_they_were_given(bank: BankTable) -> None:
    soon = datetime.now(UTC).replace(microsecond=123) + timedelta(hours=1)
    given = document("a", "one. two", metadata={"n": 1.5, "deep": {"é": [None, True]}}, expires_at=soon)
    await bank.write([given, document("b")], replace=False)
    b, a = await bank.documents(["b", "none", "a", "b"])
    assert (a.document_id, a.content, a.mime_type, a.metadata) == ("a", given.content, "text/plain", given.metadata)
    assert (a.hash, a.expires_at) == (given.hash, soon)
    assert (b.document_id, b.expires_at) == ("b", None)
    assert await bank.documents([]) == []


async def test_chunks_come_back_as_they_were_given(bank: BankTable) -> None:
    given = document("a", "one two. three")
    chunk = replace(given.chunks[0], page=7, headings=("Top", "Über 'uns'"), tokens=12, start=3, end=99)
    await bank.write([replace(given, chunks=(chunk, given.chunks[1]))], replace=False)
    assert [hit.chunk for hit in await by_keys(bank, ["a"], Bounds())] == [chunk, given.chunks[1]]


@pytest.mark.parametrize("document_id", ODD_IDS)
async def test_any_text_is_an_id(bank: BankTable, document_id: str) -> None:
    await bank.write([document(one) for one in ODD_IDS], replace=False)
    await bank.write([document(document_id, "new")], replace=True)
    assert [one.document_id for one in await bank.documents([document_id])] == [document_id]
    assert await texts(bank, document_id) == ["new"]
    assert await bank.counts() == Counts(len(ODD_IDS), 3 * len(ODD_IDS) - 2)
    assert await bank.delete([document_id]) == [document_id]
    assert await bank.counts() == Counts(len(ODD_IDS) - 1, 3 * len(ODD_IDS) - 3)


async def test_an_insert_may_be_repeated_and_changes_nothing(bank: BankTable) -> None:
    await bank.write([document("a"), document("b")], replace=False)
    version = await bank.rows.version()
    await bank.write([document("b"), document("a")], replace=False)
    assert await bank.rows.version() == version
    await bank.write([document("a"), document("c")], replace=False)
    assert await bank.counts() == Counts(3, 9)


async def test_an_insert_of_another_content_is_a_conflict_and_writes_none_of_its_documents(bank: BankTable) -> None:
    await bank.write([document("a")], replace=False)
    with pytest.raises(Conflict, match=r"document 'a' .* allowed: a new id, or /memory_bank/update"):
        await bank.write([document("b"), document("a", "other")], replace=False)
    assert await bank.counts() == Counts(1, 3)


async def test_an_update_leaves_nothing_of_the_old_text(bank: BankTable) -> None:
    await bank.write([document("a", ". ".join(f"old {at}" for at in range(20))), document("b")], replace=False)
    version = await bank.rows.version()
    await bank.write([document("a", "new 0. new 1", metadata={"k": 1})], replace=True)
    assert await texts(bank, "a") == ["new 0", "new 1"]
    assert await search(bank, Query("keyword", "old")) == []
    assert await bank.counts() == Counts(2, 5)
    await bank.write([document("a", "new", metadata={"k": 2})], replace=True)
    # One commit for a new key of metadata, and one for each update.
    assert await bank.rows.version() == version + 3


async def test_an_update_of_what_is_not_there_writes_nothing(bank: BankTable) -> None:
    await bank.write([document("a")], replace=False)
    with pytest.raises(NotFound, match="document 'none' is not in this bank") as refused:
        await bank.write([document("a", "new"), document("none")], replace=True)
    assert refused.value.param == "documents"
    assert await texts(bank, "a") == ["one", "two", "three"]


async def test_an_update_with_the_same_content_begins_its_time_to_live_anew(bank: BankTable) -> None:
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    await bank.write([document("a")], replace=False)
    await bank.write([document("a", expires_at=later)], replace=True)
    assert [one.expires_at for one in await bank.documents(["a"])] == [later]


async def test_an_id_that_comes_twice_is_refused(bank: BankTable) -> None:
    for replacing in (False, True):
        with pytest.raises(BadInput, match="document 'a' comes twice; allowed: each id once"):
            await bank.write([document("a"), document("b"), document("a", "other")], replace=replacing)
    with pytest.raises(BadInput, match="comes twice"):
        await bank.put([document("a"), document("a")])
    assert await bank.counts() == Counts(0, 0)


async def test_vectors_that_are_not_the_banks_are_refused(bank: BankTable) -> None:
    with pytest.raises(BadInput, match=r"shape \(3, 4\); allowed: \(3, 8\), as the bank's have 8 dimensions"):
        await bank.write([document("a", dimensions=4)], replace=False)
    with pytest.raises(BadInput, match="shape None"):
        await bank.write([document("a", dimensions=None)], replace=False)
    vectors = np.ones((3, DIMENSIONS), np.float32)
    vectors[1, 2] = np.nan
    with pytest.raises(BadInput, match="not finite"):
        await bank.write([replace(document("a"), vectors=vectors)], replace=False)
    assert await bank.counts() == Counts(0, 0)


async def test_metadata_has_so_many_keys_in_a_bank_and_no_more(bank: BankTable) -> None:
    await bank.write([document("a", metadata={f"k{at}": at for at in range(400)})], replace=False)
    with pytest.raises(BadInput, match="has 101 keys that are new in this bank, which has 400; allowed: at most 500"):
        await bank.write([document("b", metadata={f"n{at}": at for at in range(101)})], replace=False)
    await bank.write([document("b", metadata={f"k{at}": at for at in range(400)})], replace=False)
    assert await bank.counts() == Counts(2, 6)


async def test_a_document_without_chunks_is_a_document(bank: BankTable) -> None:
    empty = replace(document("a"), chunks=(), vectors=np.zeros((0, DIMENSIONS), np.float32))
    await bank.write([empty, document("b")], replace=False)
    assert await bank.counts() == Counts(2, 3)
    assert [one.document_id for one in await bank.documents(["a"])] == ["a"]


async def test_two_thousand_documents_are_one_commit(bank: BankTable) -> None:
    version = await bank.rows.version()
    await bank.write([document(f"d{at}", f"text {at}") for at in range(2_000)], replace=False)
    assert await bank.rows.version() == version + 1
    await bank.write([document(f"d{at}", f"new {at}. more") for at in range(2_000)], replace=True)
    assert await bank.rows.version() == version + 2
    assert await bank.counts() == Counts(2_000, 4_000)
    assert len(await bank.documents([f"d{at}" for at in range(2_000)])) == 2_000
    assert len(await bank.delete([f"d{at}" for at in range(1, 3_000)])) == 1_999
    assert await bank.counts() == Counts(1, 2)


async def test_new_documents_are_not_compared_with_all_that_there_is(
    bank: BankTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    await bank.write([document("old", expires_at=past)], replace=False)
    with monkeypatch.context() as without_merging:
        without_merging.delattr(AsyncTable, "merge_insert")
        await bank.write([document("a", "one. two", metadata={"k": 1}), document("b")], replace=False)
        with pytest.raises(AttributeError):
            await bank.write([document("old", "new"), document("c")], replace=False)
    # What has expired has rows, which make way.
    await bank.write([document("old", "new"), document("c")], replace=False)
    assert await texts(bank, "a") == ["one", "two"]
    assert await texts(bank, "old") == ["new"]
    assert await bank.rows.count_rows() == 3 + 4 + 2 + 4


async def test_deleting_names_what_was_there(bank: BankTable) -> None:
    await bank.write([document("a"), document("b"), document("c")], replace=False)
    version = await bank.rows.version()
    assert await bank.delete(["none", "c", "a", "c", "b' OR 'a'='a"]) == ["c", "a"]
    assert await bank.rows.version() == version + 1
    assert await bank.delete(["a"]) == []
    assert await bank.rows.version() == version + 1
    assert await bank.counts() == Counts(1, 3)


async def test_what_has_expired_is_not_there_even_before_it_is_swept(bank: BankTable) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    await bank.write([document("old", "same words", expires_at=past), document("new", "same words")], replace=False)
    assert await bank.counts() == Counts(1, 1)
    assert await bank.documents(["old"]) == []
    assert await by_keys(bank, ["old"], Bounds()) == []
    for mode in ("vector", "keyword", "hybrid"):
        hits = await search(bank, Query(mode, "same words", vector("same words"), max_chunks=1))
        assert [hit.document_id for hit in hits] == ["new"], mode
    with pytest.raises(NotFound):
        await bank.write([document("old", "same words")], replace=True)
    assert await bank.delete(["old"]) == []
    # An id is free again when its document has expired.
    await bank.write([document("old", "other words")], replace=False)
    assert await texts(bank, "old") == ["other words"]


async def test_the_sweeper_deletes_what_has_expired_and_nothing_else(bank: BankTable) -> None:
    now = datetime.now(UTC)
    await bank.write(
        [document("old", expires_at=now), document("soon", expires_at=now + timedelta(days=1))], replace=False
    )
    await bank.write([document("ever")], replace=False)
    assert await bank.rows.count_rows() == 12
    assert await bank.delete_expired() == 1
    assert await bank.rows.count_rows() == 8
    version = await bank.rows.version()
    assert await bank.delete_expired() == 0
    assert await bank.rows.version() == version


async def test_a_reader_never_sees_half_an_update(bank: BankTable, tmp_path: Path) -> None:
    reader = await BankTable.open(str(tmp_path / "bank"))

    def at_time(time: int) -> list:
        # The two documents change together, and their lengths change too.
        text = ". ".join(f"word time{time}" for _chunk in range(3 + time % 4))
        return [document("a", text, metadata={"time": time}), document("b", text, metadata={"time": time})]

    async def write() -> None:
        for time in range(1, 40):
            await bank.write(at_time(time), replace=True)
            if time % 10 == 0:
                await bank.maintain()

    seen = Counter()

    async def read() -> None:
        while not writing.done():
            whole = await by_prefix(reader, "", Bounds(max_chunks=1_000))
            by_words = await search(reader, Query("keyword", "word", max_chunks=100))
            for hits in (whole, by_words):
                (time,) = {hit.metadata["time"] for hit in hits}
                assert {hit.chunk.text for hit in hits} == {f"word time{time}"}
                assert len(hits) == 2 * (3 + time % 4)
                seen[time] += 1
            around = await search(reader, Query("hybrid", "word", vector("word"), max_chunks=2, neighbours=9))
            for document_id in ("a", "b"):
                assert len({hit.metadata["time"] for hit in around if hit.document_id == document_id}) <= 1

    await bank.write(at_time(0), replace=False)
    writing = asyncio.create_task(write())
    await asyncio.gather(writing, *(read() for _reader in range(4)))
    assert len(seen) > 5


async def test_many_banks_are_opened_by_their_manifests(tmp_path: Path) -> None:
    await BankTable.create(str(tmp_path / "a"), None, Words())
    with pytest.raises(NotFound, match="are not there"):
        await BankTable.open(str(tmp_path / "b"))
    again = await BankTable.create(str(tmp_path / "a"), None, Words())
    await again.write([document("a", dimensions=None)], replace=False)
    assert (await BankTable.open(str(tmp_path / "a"))).dimensions is None
    assert {index.name for index in await again.rows.list_indices()} == {"words", "documents"}


@pytest.mark.parametrize(("kind", "indices"), [
    ("vector", {"documents", "words"}), ("keyword", {"documents", "words"}), ("keyvalue", {"documents"}),
    ("graph", {"documents"}),
])  # fmt: skip
async def test_words_are_indexed_where_they_are_asked_for(home: Path, kind: str, indices: set[str]) -> None:
    config = Config.parse(CONFIG | {"store": f"sqlite:///{home}/stack.db"}, "the test's")
    bank = MemoryBank(f"bank-{kind}", "acme", "a", None, {"type": kind}, None, bytes=0, created_at=now(), written_at="")
    made = await Tables(config).get_or_create(bank)
    await made.table.put([document("a", dimensions=None)])
    await made.table.maintain()
    opened = await Tables(config).get(bank)
    assert opened is not None
    assert {index.name for index in await opened.table.rows.list_indices()} == indices
    assert await texts(opened.table, "a") == ["one", "two", "three"]


async def test_a_bank_is_opened_again_with_all_that_it_has_got(bank: BankTable, tmp_path: Path) -> None:
    await bank.write([document("a", metadata={"n": 1})], replace=False)
    again = await BankTable.create(str(tmp_path / "bank"), DIMENSIONS, Words())
    await again.write([document("b", metadata={"n": 2, "colour": "red"})], replace=False)
    assert (await again.counts()).documents == 2


@pytest.mark.parametrize("lost", ["table", "words", "documents"])
async def test_a_bank_whose_making_was_cut_off_is_not_there_and_is_made_to_its_end(tmp_path: Path, lost: str) -> None:
    address = str(tmp_path / "bank")
    if lost == "table":
        (tmp_path / "bank" / "bank.lance" / "_transactions").mkdir(parents=True)
    else:
        made = await BankTable.create(address, DIMENSIONS, Words())
        for index in dict.fromkeys((lost, "documents")):  # this one is made last
            await made.rows.drop_index(index)
    with pytest.raises(NotFound):
        await BankTable.open(address)
    bank = await BankTable.create(address, DIMENSIONS, Words())
    assert {index.name for index in await bank.rows.list_indices()} == {"words", "documents"}
    await bank.write([document("a", "one. two")], replace=False)
    assert len(await search(await BankTable.open(address), Query("keyword", "one"))) == 1


async def test_maintenance_changes_nothing_that_is_read(bank: BankTable) -> None:
    for at in range(30):
        await bank.write([document(f"d{at}", f"number {at}. same")], replace=False)
    await bank.write([document("d3", "changed")], replace=True)
    await bank.delete(["d4"])
    queries = [
        Query("keyword", "same", max_chunks=100),
        Query("vector", vector=vector("number"), max_chunks=100),
        Query("keyword", "changed"),
    ]
    before = [{(hit.document_id, hit.chunk) for hit in await search(bank, query)} for query in queries]
    files = (await bank.rows.stats())["fragment_stats"]["num_fragments"]
    await bank.maintain()
    assert (await bank.rows.stats())["fragment_stats"]["num_fragments"] < files
    assert [{(hit.document_id, hit.chunk) for hit in await search(bank, query)} for query in queries] == before
    assert (await bank.rows.index_stats("words")).num_unindexed_rows == 0
    await bank.maintain()


async def indexed(bank: BankTable) -> None:
    if await bank.lacks_index():
        await bank.index_vectors()
    await bank.maintain()


async def test_the_index_of_vectors_is_built_past_a_size_and_built_anew(
    bank: BankTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "INDEX_FROM", 600)
    numbers = random.Random(0)

    def some(begin: int, end: int) -> list:
        words = ["".join(numbers.choices("etaoinsr", k=30)) for _at in range(begin, end)]
        return [document(f"d{at}", word) for at, word in zip(range(begin, end), words, strict=True)]

    async def vector_indices() -> list[str]:
        return [index.name for index in await bank.rows.list_indices() if "vector" in index.columns]

    await bank.write(some(0, 500), replace=False)
    await indexed(bank)
    assert await vector_indices() == []
    await bank.write(some(500, 700), replace=False)
    await indexed(bank)
    assert await vector_indices() == ["vectors_of_700"]
    # A writer that was killed before the old one was dropped.
    await bank.rows.create_index("vector", config=table_module._vector_index(), name="vectors_of_600")
    await indexed(bank)
    assert await vector_indices() == ["vectors_of_700"]
    # A row that is not in the index yet is found as well, and one that is no longer there is not.
    await bank.write([document("z", "zzz"), document("late", "ttttttttttttttt")], replace=False)
    await bank.delete(["d0"])
    (best, *_others) = await search(bank, Query("vector", vector=vector("ttttttttttttttt"), max_chunks=1_000))
    assert best.document_id == "late"
    assert "d0" not in {best.document_id, *(hit.document_id for hit in _others)}
    await bank.write(some(1_000, 3_200), replace=False)
    await indexed(bank)
    assert await vector_indices() == ["vectors_of_2901"]
    assert not await bank.lacks_index()
    (best, *_others) = await search(bank, Query("vector", vector=vector("ttttttttttttttt")))
    assert best.document_id == "late"
    assert best.score == pytest.approx(1, abs=1e-4)


async def test_the_index_finds_nearly_all_of_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "INDEX_FROM", 2_000)
    bank = await BankTable.create(str(tmp_path / "bank"), 48, Words())
    vectors = np.random.default_rng(0).standard_normal((2_050, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    written = document("a", ". ".join(map(str, range(2_000))), dimensions=None)
    await bank.write([replace(written, vectors=vectors[:2_000])], replace=False)
    await indexed(bank)
    found = 0
    for asked in vectors[2_000:]:
        nearest = set(np.argsort(-(vectors[:2_000] @ asked))[:10].tolist())
        hits = await search(bank, Query("vector", vector=asked))
        found += len(nearest & {hit.chunk.position for hit in hits})
    assert found >= 0.95 * 10 * 50


def test_what_a_killed_writer_has_acknowledged_is_there_once(tmp_path: Path) -> None:
    writer = dedent(
        """
        import asyncio, sys
        from stack.memory_banks.table import Words
        from tests.unit.memory_banks.documents import BankTable, DIMENSIONS, document

        async def main():
            bank = await BankTable.create(sys.argv[1], DIMENSIONS, Words())
            for at in range(1_000_000):
                await bank.write([document(f"d{at}", f"text {at}. more")], replace=False)
                print(at, flush=True)
                if at % 5 == 4:
                    await bank.maintain()

        asyncio.run(main())
        """
    )
    address = str(tmp_path / "bank")
    acknowledged = 0
    for acknowledging in (7, 12, 20):
        with subprocess.Popen(
            [sys.executable, "-c", writer, address], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        ) as process:
            assert process.stdout is not None
            for _line in range(acknowledging):
                acknowledged = max(acknowledged, int(process.stdout.readline()))
            process.send_signal(signal.SIGKILL)

    async def read() -> Counter:
        bank = await BankTable.open(address)
        await bank.write([document("after", "it goes on")], replace=False)
        return Counter(hit.document_id for hit in await by_prefix(bank, "d", Bounds(max_chunks=10_000)))

    chunks = asyncio.run(read())
    assert set(chunks.values()) == {2}
    assert {f"d{at}" for at in range(acknowledged + 1)} <= chunks.keys()


def test_what_is_to_be_written_is_what_differs() -> None:
    a, b = document("a"), document("b")
    assert to_write([a, b], {}, replace=False) == [a, b]
    assert to_write([a, b], {"a": a.hash}, replace=False) == [b]
    assert to_write([a], {"a": a.hash}, replace=True) == [a]

"""Inserts of any size: what is accepted, and what a job makes of rows, of other banks, of errors and lost attempts."""

import asyncio
import datetime as dt
import hashlib
import json
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stack import jobs
from stack.api.memory_banks import IngestDocumentsRequest, InsertDocumentsRequest
from stack.api.wire import describe
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StorageFull, Unavailable
from stack.memory_banks import banks, ingestion, serve_writer
from stack.memory_banks.banks import Memory
from stack.memory_banks.rows import Document, StoredDocument
from stack.memory_banks.table import BankTable
from stack.memory_banks.writer import BankWriter
from stack.store import MemoryBank, now
from tests.conftest import CONFIG
from tests.memory import EMBEDDER, VECTOR, document, write_embedder, write_tokenizer
from tests.samples import dataset, write_rows
from tests.scripted_engine import DIMENSIONS
from tests.varied_engine import VariedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking
    from jobs import ingest_documents as driver
    from jobs.driver import Outcome
    from tests.asked_here import lines, work_here, work_of

GRAPH = {"type": "graph", "model": "small", "chunk_size_in_tokens": 8}
DOCUMENTS = {"document_id": "text", "content": "text"}


class Noting:
    """A writer that notes what it writes, and may be away."""

    def __init__(self, writer: BankWriter) -> None:
        self._writer = writer
        self.written: list[list[str]] = []
        self.away_after: int | None = None

    async def write(self, bank: MemoryBank, documents: Sequence[Document], replace: bool) -> None:
        if self.away_after is not None and len(self.written) >= self.away_after:
            raise Unavailable("the writer is being started")
        await self._writer.write(bank, documents, replace)
        self.written.append([one.document_id for one in documents])

    async def delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]:
        return await self._writer.delete(bank, document_ids)

    async def drop(self, bank: MemoryBank) -> None:
        await self._writer.drop(bank)


@pytest.fixture
def engine() -> VariedEngine:
    return VariedEngine()


@pytest.fixture
def context(home: Path, store_url: str, engine: VariedEngine) -> Iterator[Context]:
    write_embedder(home)
    config = CONFIG | {"store": store_url, "embedding_models": [EMBEDDER]}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


@pytest.fixture
def memory(context: Context) -> Memory:
    return Memory.open(context.config, BankWriter(context.config, context.store))


@pytest.fixture
def writer(memory: Memory) -> Noting:
    assert isinstance(memory.writer, BankWriter)
    return Noting(memory.writer)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, engine: VariedEngine, writer: Noting) -> None:
    async def no_pause(_: float) -> None:
        """Nobody waits."""

    async def find() -> Noting:
        return writer

    monkeypatch.setattr(asking, "pause", no_pause)
    monkeypatch.setattr(serve_writer, "find", find)
    work_here(monkeypatch, engine, driver)


def bank(context: Context, config: dict[str, Any] | None = None) -> str:
    config = config or VECTOR
    dimensions = DIMENSIONS if config["type"] == "vector" else None
    made = MemoryBank(f"bank-{uuid.uuid4().hex}", "default", "a", None, config, dimensions, bytes=0, created_at=now())
    context.store.memory_banks.add(made)
    return made.id


def texts(home: Path, count: int, start: int = 0) -> dict[str, Any]:
    rows = [{"document_id": f"d{number}", "content": f"words of the text {number}"} for number in range(start, count)]
    return dataset(write_rows(home / "data" / f"texts-{start}-{count}.jsonl", rows), **DOCUMENTS)


def request(bank_id: str, data: Any = None, **changes: Any) -> IngestDocumentsRequest:
    return IngestDocumentsRequest.model_validate(
        {"job_uuid": "ingest-1", "bank_id": bank_id, "dataset": data} | changes
    )


def ended(context: Context, wanted: IngestDocumentsRequest) -> Outcome:
    job = ingestion.submit(context, wanted)
    with work_of(context, job) as work:
        outcome = driver.ingest(work, IngestDocumentsRequest.model_validate(job.request))
        work.reporter.metrics.flush()
    return outcome


def run(context: Context, wanted: IngestDocumentsRequest) -> dict[str, float]:
    """The metrics of a job that is completed."""
    outcome = ended(context, wanted)
    assert outcome.problem is None
    return ingestion.job_status(context, wanted.job_uuid).metrics


def written(context: Context, memory: Memory, bank_id: str) -> dict[str, StoredDocument]:
    async def found() -> dict[str, StoredDocument]:
        documents = banks.all_documents(memory.tables, banks.find(context, bank_id))
        return {one.document_id: one async for one in documents}

    return asyncio.run(found())


async def insert(context: Context, memory: Memory, bank_id: str, *documents: Any, **more: Any) -> None:
    body = {"bank_id": bank_id, "documents": list(documents)} | more
    await banks.insert(context, memory, InsertDocumentsRequest.model_validate(body))


def errors_of(outcome: Outcome) -> list[dict[str, Any]]:
    return lines(Path(outcome.result["path"].removeprefix("file://")) / "errors.jsonl")


def test_every_row_of_a_data_set_becomes_a_document(context: Context, home: Path, memory: Memory, here: None) -> None:
    bank_id = bank(context)
    metrics = run(context, request(bank_id, texts(home, 10)))
    assert (metrics["documents"], metrics["written"], metrics["failed"]) == (10, 10, 0)
    assert (metrics["chunks"], metrics["tokens"]) == (10, 50)
    found = written(context, memory, bank_id)
    assert set(found) == {f"d{number}" for number in range(10)}
    assert json.loads(found["d3"].content) == "words of the text 3"
    assert (found["d3"].mime_type, found["d3"].metadata, found["d3"].expires_at) == ("text/plain", {}, None)


def test_documents_of_a_batch_are_written_together(context: Context, home: Path, writer: Noting, here: None) -> None:
    run(context, request(bank(context), texts(home, 40)))
    assert sum(map(len, writer.written)) == 40
    assert len(writer.written) < 40


def test_no_more_documents_are_prepared_than_there_is_room_for_until_they_are_written(
    context: Context, home: Path, writer: Noting, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PREPARED_BYTES", 1)
    run(context, request(bank(context), texts(home, 6)))
    assert [len(part) for part in writer.written] == [1] * 6


@pytest.mark.parametrize("kind", ["keyvalue", "keyword"])
def test_banks_of_every_kind_take_documents(
    context: Context, home: Path, memory: Memory, here: None, engine: VariedEngine, kind: str
) -> None:
    bank_id = bank(context, {"type": kind})
    run(context, request(bank_id, texts(home, 5)))
    assert len(written(context, memory, bank_id)) == 5
    assert engine.asked_to_embed == []


def test_a_document_is_as_insert_writes_it(context: Context, home: Path, memory: Memory, here: None) -> None:
    inserted, ingested = bank(context), bank(context)
    asyncio.run(insert(context, memory, inserted, document("a", ["# A", "b"], "text/markdown", year=2020)))
    row = document("a", ["# A", "b"], "text/markdown", year=2020)
    columns = {"document_id": "text", "content": "json", "mime_type": "text", "metadata": "json"}
    run(context, request(ingested, dataset(write_rows(home / "data" / "one.jsonl", [row]), **columns)))
    assert written(context, memory, ingested) == written(context, memory, inserted)


def test_documents_that_are_there_already_are_neither_embedded_nor_written_again(
    context: Context, home: Path, engine: VariedEngine, writer: Noting, here: None
) -> None:
    bank_id = bank(context)
    run(context, request(bank_id, texts(home, 6)))
    embedded = len(engine.asked_to_embed)
    writer.written.clear()
    metrics = run(context, request(bank_id, texts(home, 6), job_uuid="again"))
    assert (metrics["written"], metrics["unchanged"]) == (0, 6)
    assert (len(engine.asked_to_embed), writer.written) == (embedded, [])


def test_an_id_that_is_taken_by_another_document_fails_alone(
    context: Context, home: Path, memory: Memory, here: None
) -> None:
    bank_id = bank(context)
    run(context, request(bank_id, texts(home, 3)))
    rows = [{"document_id": "d1", "content": "other words"}, {"document_id": "new", "content": "a text"}]
    data = dataset(write_rows(home / "data" / "more.jsonl", rows), **DOCUMENTS)
    outcome = ended(context, request(bank_id, data, job_uuid="more"))
    (error,) = errors_of(outcome)
    assert (error["document_id"], error["row"], error["code"]) == ("d1", 1, "conflict")
    assert "another document 'd1'" in error["message"]
    found = written(context, memory, bank_id)
    assert json.loads(found["d1"].content) == "words of the text 1"
    assert "new" in found


def test_a_document_that_was_taken_meanwhile_does_not_keep_the_others_of_its_batch_from_being_written(
    context: Context, home: Path, memory: Memory, writer: Noting, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank_id = bank(context)
    run(context, request(bank_id, texts(home, 1)))

    async def nothing(_: Any, ids: Sequence[str]) -> list[None]:
        return [None] * len(ids)

    monkeypatch.setattr(driver.Ingest, "_look_up", nothing)
    rows = [{"document_id": f"d{number}", "content": "other words"} for number in range(4)]
    outcome = ended(
        context, request(bank_id, dataset(write_rows(home / "data" / "o.jsonl", rows), **DOCUMENTS), job_uuid="more")
    )
    assert [one["document_id"] for one in errors_of(outcome)] == ["d0"]
    assert len(written(context, memory, bank_id)) == 4


def test_a_document_that_cannot_be_read_fails_alone(context: Context, home: Path, memory: Memory, here: None) -> None:
    bank_id = bank(context)
    rows = [
        {"document_id": "empty", "content": " ", "mime_type": "text/plain"},
        {"document_id": "image", "content": "a", "mime_type": "image/png"},
        {"document_id": "fine", "content": "a text", "mime_type": "text/plain"},
    ]
    data = dataset(write_rows(home / "data" / "mixed.jsonl", rows), **DOCUMENTS, mime_type="text")
    outcome = ended(context, request(bank_id, data))
    assert outcome.problem is None
    assert {one["document_id"]: one["code"] for one in errors_of(outcome)} == {
        "empty": "bad_input",
        "image": "bad_input",
    }
    assert set(written(context, memory, bank_id)) == {"fine"}


def test_more_failed_documents_than_allowed_fail_the_job_and_what_was_written_stays(
    context: Context, home: Path, memory: Memory, here: None
) -> None:
    bank_id = bank(context)
    rows = [{"document_id": f"d{number}", "content": "a text" if number else " "} for number in range(3)]
    data = dataset(write_rows(home / "data" / "mixed.jsonl", rows), **DOCUMENTS)
    outcome = ended(context, request(bank_id, data, max_failed_rows=0))
    assert outcome.problem is not None
    assert outcome.problem.startswith("row 1: ")
    assert [one["document_id"] for one in errors_of(outcome)] == ["d0"]
    assert set(written(context, memory, bank_id)) == {"d1", "d2"}


def test_a_job_that_was_lost_goes_on_and_embeds_nothing_twice(
    context: Context, home: Path, memory: Memory, engine: VariedEngine, writer: Noting, here: None
) -> None:
    bank_id = bank(context)
    wanted = request(bank_id, texts(home, 12))
    writer.away_after = 2
    with pytest.raises(Unavailable, match="the writer is being started"):
        run(context, wanted)
    before = set(written(context, memory, bank_id))
    assert 0 < len(before) < 12
    writer.away_after = None
    metrics = run(context, wanted)
    assert (metrics["documents"], metrics["failed"]) == (12, 0)
    assert len(written(context, memory, bank_id)) == 12
    ids = [one for part in writer.written for one in part]
    assert len(ids) == len(set(ids)) == 12


def test_what_a_killed_attempt_has_written_without_knowing_it_is_not_written_again(
    context: Context, home: Path, memory: Memory, writer: Noting, here: None
) -> None:
    bank_id = bank(context)
    wanted = request(bank_id, texts(home, 6))
    run(context, wanted)
    (jobs.work_folder("default", "ingest-1") / "rows.jsonl").unlink()
    metrics = run(context, wanted)
    assert (metrics["written"], metrics["unchanged"], metrics["documents"]) == (0, 6, 6)
    assert sum(map(len, writer.written)) == 6


def test_an_embedding_model_that_is_away_loses_the_attempt(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.fail(Unavailable("the model is being started"))
    with pytest.raises(Unavailable, match="the model is being started"):
        run(context, request(bank(context), texts(home, 3)))


def test_a_graph_banks_model_that_is_away_loses_the_attempt(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    write_tokenizer(home / "models" / "small")
    engine.fail(Unavailable("the model is being started"))
    with pytest.raises(Unavailable, match="the model is being started"):
        run(context, request(bank(context, GRAPH), texts(home, 3)))


def test_a_document_for_which_a_graph_banks_model_is_away_fails_alone_while_others_are_answered_without_json(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    write_tokenizer(home / "models" / "small")
    engine.refusals["the text 1"] = Unavailable("the model is being started")
    outcome = ended(context, request(bank(context, GRAPH), texts(home, 2)))
    assert outcome.problem is None
    assert {one["document_id"]: one["code"] for one in errors_of(outcome)} == {"d0": "bad_input", "d1": "unavailable"}


def test_documents_expire_as_the_request_says(context: Context, home: Path, memory: Memory, here: None) -> None:
    bank_id, begun = bank(context), dt.datetime.now(dt.UTC)
    run(context, request(bank_id, texts(home, 2), ttl_seconds=3_600))
    for one in written(context, memory, bank_id).values():
        assert one.expires_at is not None
        assert dt.timedelta(seconds=3_600) <= one.expires_at - begun < dt.timedelta(seconds=4_200)


def test_another_banks_documents_are_embedded_into_a_bank_of_another_model_with_their_expiry(
    context: Context, home: Path, memory: Memory, here: None
) -> None:
    source, target = bank(context, {"type": "keyword"}), bank(context)
    run(context, request(source, texts(home, 5), ttl_seconds=3_600))
    metrics = run(context, request(target, source_bank_id=source, job_uuid="again"))
    assert (metrics["written"], metrics["chunks"]) == (5, 5)
    assert written(context, memory, target) == written(context, memory, source)


def test_a_bank_is_copied_a_few_documents_at_a_time_each_as_it_is_when_its_turn_comes(
    context: Context, home: Path, memory: Memory, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = bank(context, {"type": "keyvalue"}), bank(context, {"type": "keyvalue"})
    run(context, request(source, texts(home, 10)))  # d0 to d9
    read, sizes = BankTable.documents, list[int]()

    async def deleting_the_last(table: BankTable, ids: Sequence[str]) -> list[StoredDocument]:
        sizes.append(len(ids))
        found = await read(table, ids)
        await memory.writer.delete(banks.find(context, source), ["d9"])
        return found

    monkeypatch.setattr(BankTable, "documents", deleting_the_last)
    assert run(context, request(target, source_bank_id=source, job_uuid="again"))["documents"] == 9
    assert sizes == [banks.PAGE, 2]


def test_a_lost_copy_of_a_bank_goes_on_with_what_the_bank_had(
    context: Context, home: Path, memory: Memory, writer: Noting, here: None
) -> None:
    source, target = bank(context, {"type": "keyvalue"}), bank(context, {"type": "keyvalue"})
    run(context, request(source, texts(home, 9)))
    wanted = request(target, source_bank_id=source, job_uuid="again")
    writer.away_after = len(writer.written) + 1
    with pytest.raises(Unavailable):
        run(context, wanted)
    writer.away_after = None
    asyncio.run(writer.delete(banks.find(context, source), ["d0", "d8"]))
    asyncio.run(insert(context, memory, source, document("a-new-one")))
    assert run(context, wanted)["documents"] == 9
    assert set(written(context, memory, target)) == {f"d{number}" for number in range(9)}


def test_what_was_done_says_where_it_comes_from(context: Context, home: Path, here: None) -> None:
    bank_id = bank(context)
    outcome = ended(context, request(bank_id, texts(home, 4)))
    (file,) = outcome.result["files"]
    kept = json.loads((Path(outcome.result["path"].removeprefix("file://")) / file["name"]).read_text())
    content = (home / "data" / "texts-0-4.jsonl").read_bytes()
    assert (kept["bank_id"], kept["documents_sha256"]) == (bank_id, hashlib.sha256(content).hexdigest())
    assert (kept["kind"], kept["totals"]["written"]) == ("ingest_documents", 4)
    assert ingestion.job_artifacts(context, "ingest-1").files == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": None}, "there is neither of dataset and source_bank_id; allowed: one of them"),
        ({"source_bank_id": "bank-2"}, "there is both of dataset and source_bank_id; allowed: one of them"),
        ({"dataset": None, "source_bank_id": "bank-1"}, "source_bank_id is bank_id, 'bank-1'; allowed: another bank's"),
        ({"ttl_seconds": 0}, "not 0"),
        ({"max_failed_rows": -1}, "not -1"),
        ({"documents": []}, "unknown key 'documents'"),
    ],
    ids=str,
)
def test_a_wrong_job_is_refused_with_what_is_allowed(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        request("bank-1", **({"data": "texts"} | changes if "dataset" not in changes else changes))
    assert words in describe(caught.value)


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ([{"document_id": "a", "content": "b"}] * 2, DOCUMENTS, "the rows 1 and 2 have the same id, 'a'"),
        ([{"id": "a", "text": "b"}], {"id": "text", "text": "text"}, r"columns document_id \(text\) and content"),
        ([{"document_id": "a", "content": 5}], {"document_id": "text", "content": "number"}, "allowed: text, json"),
        ([{"document_id": "a", "content": {"url": 5}}], {"document_id": "text", "content": "json"}, "row 1: content"),
        ([{"document_id": "a" * 301, "content": "b"}], DOCUMENTS, "row 1: document_id"),
        ([], DOCUMENTS, "has no rows"),
    ],
    ids=["twice", "columns", "kind", "content", "id", "empty"],
)
def test_rows_that_are_no_documents_are_refused_before_any_work(
    context: Context, home: Path, rows: list[Any], columns: dict[str, str], words: str
) -> None:
    data = dataset(write_rows(home / "data" / "bad.jsonl", rows), **columns)
    with pytest.raises(BadInput, match=words):
        ingestion.submit(context, request(bank(context), data))
    assert context.store.jobs.get("default", "ingest-1") is None


def test_banks_are_found_before_any_work(context: Context, home: Path) -> None:
    mine, data = bank(context), texts(home, 2)
    with pytest.raises(NotFound, match="no memory bank with the id 'bank-none'"):
        ingestion.submit(context, request("bank-none", data))
    with pytest.raises(NotFound, match="bank-none") as caught:
        ingestion.submit(context, request(mine, source_bank_id="bank-none"))
    assert caught.value.param == "source_bank_id"
    with pytest.raises(BadInput, match="has no documents"):
        ingestion.submit(context, request(mine, source_bank_id=bank(context)))
    other = context.of_tenant("acme")
    with pytest.raises(NotFound, match="no memory bank"):
        ingestion.submit(other, request(mine, data))
    job = ingestion.submit(context, request(mine, data))
    context.store.memory_banks.delete("default", mine)
    with pytest.raises(NotFound, match="no memory bank"):
        ingestion.resources(context, IngestDocumentsRequest.model_validate(job.request))


def test_the_same_request_again_is_the_same_job(context: Context, home: Path) -> None:
    bank_id, data = bank(context), texts(home, 2)
    first = ingestion.submit(context, request(bank_id, data))
    assert ingestion.submit(context, request(bank_id, data)) == first
    assert first.bundles == [{"CPU": 0.25}]
    with pytest.raises(Conflict, match="'ingest-1'"):
        ingestion.submit(context, request(bank_id, data, ttl_seconds=5))


def test_documents_that_would_not_fit_are_refused(context: Context, home: Path) -> None:
    config = context.config.model_copy(update={"max_tenant_bytes": 1_000})
    limited = Context(config, context.store, context.artifacts, context.engine, context.principal)
    with pytest.raises(StorageFull, match="allowed: 1000"):
        ingestion.submit(limited, request(bank(context), texts(home, 10)))

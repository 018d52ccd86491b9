"""Documents of a data set, or of another bank, written into a memory bank: Ray Data reads, cuts and embeds them.

    ray job submit -- python -m jobs.ingest_documents --config jobs/examples/ingest_documents.yaml

The file holds the body of POST /memory_banks/ingest. Whatever is written is durable at once, and is found by queries. A
job that was lost goes on with the documents that it has not written, and those of which it does not know that it has
stay as they are: to write a document again, just so, changes nothing.
"""

import asyncio
import datetime as dt
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import ray.data

from jobs import bank_source, dataset_source, driver, made_data
from jobs.asking import Asker, asked, patiently
from jobs.made_data import Registered
from jobs.room import Room
from jobs.row_log import Bounds, RowLog, complete, write_rows
from jobs.together import Together
from stack import datasets, jobs, made_datasets, quotas
from stack.addresses import address_in
from stack.api.memory_banks import Address, GraphBankConfig, IngestDocumentsRequest, MemoryBankDocument
from stack.config import LanguageModel
from stack.errors import BadInput, StackError, Unavailable
from stack.memory_banks import banks, ingestion, serve_writer
from stack.memory_banks.documents import embed, hash_of, prepare
from stack.memory_banks.extraction import extract
from stack.memory_banks.ingestion import DOCUMENTS, GivenDocument
from stack.memory_banks.rows import Chunk, Document, Known, StoredDocument
from stack.memory_banks.tables import Tables
from stack.memory_banks.writer import Writer, bytes_in
from stack.store import MemoryBank

# How many documents are looked up or written at once, and how many bytes of them are.
MOST_AT_ONCE = 128
WRITE_BYTES = 32 * 2**20
# How many are read, cut and embedded at once, and how many bytes of them are in memory, to the end of their write.
PREPARED_AT_ONCE = 32
PREPARED_BYTES = 256 * 2**20
# For how large a document is taken of which only the address is known.
ADDRESS_BYTES = 16 * 2**20
# What a model answers if it is there at all.
HARMLESS = "Hello"
_COUNTS = ("written", "unchanged", "chunks", "tokens")


@dataclass(frozen=True)
class Source:
    """The documents: how to read those that are not written yet, how many there are in all, and their hash."""

    rows: Callable[[], ray.data.Dataset]
    total: int
    sha256: str


def ingest(work: driver.Work, request: IngestDocumentsRequest) -> driver.Outcome:
    """Reads, cuts and embeds documents, and writes them into a memory bank."""
    context = work.context
    log = RowLog(work.folder / "rows.jsonl")
    source = _source(work, request, log)
    told = (context.config.model_dump(mode="json"), context.tenant, request.model_dump(mode="json"))
    bounds = Bounds(request.max_failed_rows)
    problem = made_data.problem_of(
        lambda: complete(log, lambda: asked(source.rows, Ingest, *told), source.total, work.reporter.metrics, bounds)
    )
    return _outcome(work, request, source, log, problem)


class Ingest(Asker):
    """Writes each row's document into a bank. Of the value of a row nothing goes on but the document's id."""

    harmless: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, config: dict[str, Any], tenant: str, request: dict[str, Any], own: LanguageModel | None = None
    ) -> None:
        super().__init__(config, tenant, own)
        self._request = IngestDocumentsRequest.model_validate(request)
        self._tables = Tables(self._context.config)
        self._writer: Writer | None = None
        self._prepared_at_once = asyncio.Semaphore(PREPARED_AT_ONCE)
        self._room = Room(PREPARED_BYTES)
        self._known: Together[str, Known | None] = Together(self._look_up, MOST_AT_ONCE)
        self._writes: Together[Document, None] = Together(self._write, MOST_AT_ONCE)

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async for told in super().__call__(batch):
            yield told | {"value": [json.dumps({"id": json.loads(value)["id"]}) for value in told["value"]]}

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        if not value:  # what is harmless: where the writer is away, `_gone` says it
            return await self._try_model()
        given = GivenDocument(**value)
        document = given.document()
        known = await self._known.one(document.document_id)
        if known is not None:
            if known.hash != await asyncio.to_thread(hash_of, document):
                raise banks.taken(document.document_id, self._request.bank_id)
            return _result(unchanged=1)
        bank = await asyncio.to_thread(banks.find, self._context, self._request.bank_id)
        taken = _expected_bytes(bank, document)
        await self._room.take(taken)
        try:
            async with self._prepared_at_once:
                (ready,) = await patiently(
                    lambda: prepare(self._context, bank, [document], [self._expires_at(given)], in_job=True)
                )
            taken = self._room.change(taken, bytes_in([ready]))
            await self._writes.one(ready)
        finally:
            self._room.change(taken, 0)
        return _result(written=1, chunks=len(ready.chunks), tokens=sum(chunk.tokens for chunk in ready.chunks))

    async def _try_model(self) -> dict[str, Any]:
        bank = await asyncio.to_thread(banks.find, self._context, self._request.bank_id)
        if bank.config["type"] == "vector":
            await patiently(lambda: embed(self._context, bank, [HARMLESS]))
        if bank.config["type"] == "graph":
            config = GraphBankConfig.model_validate(bank.config)
            chunk = Chunk(HARMLESS, 0, 0, len(HARMLESS), 1, None, ())
            with suppress(BadInput):  # it has answered, if not in JSON
                await patiently(lambda: extract(self._context, config, ["harmless"], [[chunk]]))
        return _result()

    def _expires_at(self, given: GivenDocument) -> dt.datetime | None:
        """Those of another bank expire when they would have there, unless the request says otherwise."""
        if (ttl := self._request.ttl_seconds) is not None:
            return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=ttl)
        return dt.datetime.fromisoformat(given.expires_at) if given.expires_at is not None else None

    async def _look_up(self, ids: Sequence[str]) -> list[Known | None]:
        """What is to know of those of the documents that are in the bank."""

        # Anew, as the bank's row says whether something was ever written into it.
        bank = await asyncio.to_thread(banks.find, self._context, self._request.bank_id)
        known = await banks.known(self._tables, bank, ids)
        return [known.get(one) for one in ids]

    async def _write(self, documents: Sequence[Document]) -> list[None | StackError]:
        """Writes documents in as few commits as may be; where one is refused, each alone, so that the others are
        written. Where the writer is away that is no document's fault: nothing more is asked, the attempt is lost."""
        written: list[None | StackError] = []
        for part in _parts(documents):
            try:
                await self._write_together(part)
                written += [None] * len(part)
            except Unavailable as error:
                self._gone = error
                raise
            except StackError as error:
                written += [error] if len(part) == 1 else [await self._write_alone(one) for one in part]
        return written

    async def _write_alone(self, document: Document) -> None | StackError:
        (outcome,) = await self._write([document])
        return outcome

    async def _write_together(self, documents: Sequence[Document]) -> None:
        await asyncio.to_thread(quotas.require_quota, self._context, bytes_in(documents))
        bank = await asyncio.to_thread(banks.find, self._context, self._request.bank_id)
        if self._writer is None:
            self._writer = await patiently(serve_writer.find)
        writer = self._writer
        await patiently(lambda: writer.write(bank, documents, replace=False))


def errors(log: RowLog) -> Iterator[dict[str, Any]]:
    """The documents that were not written, with the numbers of their rows, and why."""
    for line in log:
        if (error := line["error"]) is not None:
            about = {"document_id": line["value"]["id"], "row": line["row"]}
            yield about | {"code": error["code"], "message": error["message"]}


def _expected_bytes(bank: MemoryBank, document: MemoryBankDocument) -> int:
    """About how many bytes a document will have when it is ready to be written."""
    content = document.content
    address = isinstance(content, Address) or (isinstance(content, str) and address_in(content, "upload") is not None)
    return ADDRESS_BYTES if address else ingestion.bytes_in_bank(bank, sum(map(len, content)), 1)


def _result(**counts: int) -> dict[str, Any]:
    return {"result": json.dumps(counts)}


def _parts(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in parts of about WRITE_BYTES."""
    part: list[Document] = []
    for document in documents:
        if part and bytes_in([*part, document]) > WRITE_BYTES:
            yield part
            part = []
        part.append(document)
    if part:
        yield part


def _source(work: driver.Work, request: IngestDocumentsRequest, log: RowLog) -> Source:
    context = work.context
    if request.source_bank_id is None:
        assert request.dataset is not None
        checked = datasets.resolve(context, request.dataset)
        rows = partial(dataset_source.rows, context, checked, DOCUMENTS, but=log.rows)
        return Source(rows, checked.rows, checked.sha256)
    bank = ingestion.require_documents(context, request.source_bank_id, "source_bank_id")
    file = work.folder / "documents.jsonl"
    documents = banks.all_documents(Tables(context.config), bank)
    total = asyncio.run(bank_source.copy(file, ({"value": asdict(_given(one))} async for one in documents)))
    return Source(partial(bank_source.rows, file, log.rows), total, made_datasets.sha256(file))


def _given(stored: StoredDocument) -> GivenDocument:
    expires_at = stored.expires_at.isoformat() if stored.expires_at is not None else None
    return GivenDocument(stored.document_id, json.loads(stored.content), stored.mime_type, stored.metadata, expires_at)


def _outcome(
    work: driver.Work, request: IngestDocumentsRequest, source: Source, log: RowLog, problem: str | None
) -> driver.Outcome:
    results = made_data.results_folder(work)
    if log.failed:
        write_rows(results / "errors.jsonl", errors(log))
    totals = _totals(log) | {"seconds": log.seconds}
    work.reporter.metrics.log(0, totals.items())
    about = {
        "job_uuid": request.job_uuid,
        "kind": jobs.INGEST,
        "bank_id": request.bank_id,
        "dataset": None if request.dataset is None else made_datasets.address_of(request.dataset),
        "source_bank_id": request.source_bank_id,
        "documents_sha256": source.sha256,
        "code_sha256": made_datasets.code_version(),
    }
    (results / "summary.json").write_text(json.dumps(about | {"totals": totals}, indent=2))
    return made_data.outcome(work, jobs.INGESTIONS, results, Registered({}, problem), about)


def _totals(log: RowLog) -> dict[str, float]:
    sums = dict.fromkeys(_COUNTS, 0.0)
    for line in log:
        if line["error"] is None:
            for name in _COUNTS:
                sums[name] += line["result"].get(name, 0)
    return sums | {"documents": float(len(log.rows)), "failed": float(log.failed)}


if __name__ == "__main__":
    sys.exit(driver.run(IngestDocumentsRequest, ingestion.submit, ingestion.resources, ingest))

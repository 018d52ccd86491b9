"""Memory banks: what is made, written and asked at both ends of the one writer.

A bank is a row of the database and a table of its own. What is written is had, read, cut and embedded here, and then
sent to the writer (stack/memory_banks/writer.py), which answers when it is durable. What is read is read here, from
the table itself, each time in its newest version.
"""

import asyncio
import datetime as dt
import json
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stack import disk, quotas
from stack.api import memory_banks as api
from stack.api.memory_banks import (
    CreateMemoryBankRequest,
    DeleteDocumentsRequest,
    GetDocumentsRequest,
    GraphBankConfig,
    InsertDocumentsRequest,
    MemoryBankDocument,
    QueriedChunk,
    QueryDocumentsRequest,
    QueryDocumentsResponse,
    QueryMode,
    QueryParams,
    UpdateDocumentsRequest,
    VectorBankConfig,
)
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, Unavailable
from stack.memory_banks.documents import embed_query, hash_of, prepare, require_chunk_size
from stack.memory_banks.extraction import set_up
from stack.memory_banks.graph import GraphQuery
from stack.memory_banks.graph import find as find_in_graph
from stack.memory_banks.keyvalue import by_keys, by_prefix
from stack.memory_banks.rows import Hit, Known, StoredDocument
from stack.memory_banks.search import Bounds, Query, search
from stack.memory_banks.tables import OpenBank, Tables
from stack.memory_banks.writer import Writer, bytes_in
from stack.store import MemoryBank, now

logger = logging.getLogger("ray.serve")

ID = "bank-"
# How many documents are in memory at once where they are read with their contents, of up to 32 MiB each.
PAGE = 8
# How a vector bank is asked where a query does not say it.
DEFAULT_MODE = QueryMode.hybrid


@dataclass(frozen=True)
class Memory:
    """How a process reaches the banks: the tables that it reads, and what writes them. Opened once per process."""

    tables: Tables
    writer: Writer

    @classmethod
    def open(cls, config: Config, writer: Writer) -> "Memory":
        return cls(Tables(config), writer)


async def create(context: Context, request: CreateMemoryBankRequest) -> api.MemoryBank:
    """Makes a bank, under an id of its own. Its table comes with what is first written into it.

    Raises BadInput for a config that cannot be served, NotFound for an unknown model, and Unavailable where a model
    whose dimensions the config does not tell cannot be asked for them.
    """
    bank = await new(context, request)
    await asyncio.to_thread(context.store.memory_banks.add, bank)
    return _described(bank)


async def new(context: Context, request: CreateMemoryBankRequest) -> MemoryBank:
    """The row of a new bank, which is not added yet. Raises as `create` does."""
    config = request.config
    dimensions = None
    if isinstance(config, GraphBankConfig):
        config = await set_up(context, config)
    if isinstance(config, VectorBankConfig):
        dimensions = await _dimensions(context, config)
    return MemoryBank(
        f"{ID}{uuid.uuid4().hex}", context.tenant, request.name, request.url, config.model_dump(mode="json"),
        dimensions, bytes=0, created_at=now(),
    )  # fmt: skip


def get(context: Context, bank_id: str) -> api.MemoryBank:
    """Raises NotFound."""
    return _described(find(context, bank_id))


def page(context: Context, after: str | None, limit: int) -> list[api.MemoryBank]:
    """Banks, newest first, behind the one with the id `after`. Raises NotFound."""
    last = find(context, after, "after") if after is not None else None
    return [_described(bank) for bank in context.store.memory_banks.page(context.tenant, last, limit)]


async def drop(context: Context, memory: Memory, bank_id: str) -> str:
    """Forgets a bank and removes all that is in it. Returns its id. Raises NotFound.

    The row goes first: nobody finds the bank any more. Where its files cannot be removed now, a sweep of the writer
    does it later.
    """
    bank = await asyncio.to_thread(find, context, bank_id)
    await asyncio.to_thread(context.store.memory_banks.delete, context.tenant, bank_id)
    memory.tables.forget(bank)
    try:
        await memory.writer.drop(bank)
    except Unavailable as error:
        logger.warning(
            "the files of the memory bank %s, which was dropped, are left to the next sweep: %s", bank_id, error
        )
    return bank_id


async def insert(context: Context, memory: Memory, request: InsertDocumentsRequest) -> None:
    """Writes new documents: when this returns, the next query finds them, and nothing that fails later loses them.

    Documents that are there already, just so, stay as they are, so that a call whose answer was lost can be repeated.
    Raises NotFound for an unknown bank, Conflict for an id that is taken by another document, BadInput for a document
    that cannot be read or is named twice, TooLarge, StorageFull, and Unavailable.
    """
    bank, there = await _begin(context, memory, request.bank_id, request.documents)
    new = [document for document in request.documents if document.document_id not in there]
    await asyncio.to_thread(_require_same, bank, request.documents, there)
    ttl = request.ttl_seconds
    expires_at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=ttl) if ttl is not None else None
    await _write(context, memory, bank, new, [expires_at] * len(new), replace=False)


async def update(context: Context, memory: Memory, request: UpdateDocumentsRequest) -> None:
    """Replaces documents in one commit: a query finds the chunks of the old ones or those of the new ones.

    They expire when the old ones would have. Raises as `insert` does, and NotFound for documents that are not there.
    """
    bank, there = await _begin(context, memory, request.bank_id, request.documents)
    _require_known(bank, [document.document_id for document in request.documents], there, "documents")
    expiries = [there[document.document_id].expires_at for document in request.documents]
    await _write(context, memory, bank, request.documents, expiries, replace=True)


async def get_documents(
    context: Context, memory: Memory, bank_id: str, request: GetDocumentsRequest
) -> AsyncGenerator[list[MemoryBankDocument]]:
    """Documents as they were given, in the order of the ids, a few at a time, each as it is when its turn comes.

    Raises NotFound for the bank, and for those not there. One that is deleted after that is left out.
    """
    bank = await asyncio.to_thread(find, context, bank_id)
    ids = list(dict.fromkeys(request.document_ids))
    async with _reading(context, bank):
        _require_known(bank, ids, await known(memory.tables, bank, ids), "document_ids")
    return _given(context, memory, bank, ids)


async def _given(
    context: Context, memory: Memory, bank: MemoryBank, ids: Sequence[str]
) -> AsyncGenerator[list[MemoryBankDocument]]:
    async with _reading(context, bank):
        async for page in _pages(memory.tables, bank, ids):
            yield await asyncio.to_thread(list, map(given, page))


async def delete_documents(context: Context, memory: Memory, request: DeleteDocumentsRequest) -> None:
    """Deletes documents with their chunks, in one commit. Those that are not there are gone already.

    Raises NotFound for an unknown bank, and Unavailable.
    """
    bank = await asyncio.to_thread(find, context, request.bank_id)
    await memory.writer.delete(bank, list(dict.fromkeys(request.document_ids)))


async def query(context: Context, memory: Memory, request: QueryDocumentsRequest) -> QueryDocumentsResponse:
    """The chunks that answer a query, best first.

    Raises NotFound for an unknown bank, or an embedding model that is no more, BadInput for params that the bank's kind
    does not take and for a text that is too long for the model, Conflict where the bank's vectors do not have the
    length of its model's any more, and Unavailable where the model is away. A bank that another process has dropped
    may still answer for a second.
    """
    bank = context.store.memory_banks.recent(context.tenant, request.bank_id)
    if bank is None:
        bank = await asyncio.to_thread(find, context, request.bank_id)
    _require_allowed(bank, request.params)
    hits = list[Hit]()
    async with _reading(context, bank):
        if (opened := await memory.tables.get(bank)) is not None:
            hits = await _hits(context, bank, opened, request)
    return QueryDocumentsResponse.model_construct(
        chunks=[_chunk(hit) for hit in hits], scores=[hit.score for hit in hits]
    )


async def _begin(
    context: Context, memory: Memory, bank_id: str, documents: Sequence[MemoryBankDocument]
) -> tuple[MemoryBank, dict[str, Known]]:
    """The bank, and what it knows of those of the documents that it has already, by id."""
    ids = [document.document_id for document in documents]
    if len(set(ids)) < len(ids):
        twice = next(one for number, one in enumerate(ids) if one in ids[:number])
        raise BadInput(f"the document {twice!r} is there twice; allowed: each id once in a call", param="documents")
    bank = await asyncio.to_thread(find, context, bank_id)
    async with _reading(context, bank):
        return bank, await known(memory.tables, bank, ids)


@asynccontextmanager
async def _reading(context: Context, bank: MemoryBank) -> AsyncIterator[None]:
    """A bank that is dropped while it is read is NotFound, where LanceDB misses its files."""
    try:
        yield
    except (OSError, RuntimeError, ValueError):  # LanceDB's own
        await asyncio.to_thread(find, context, bank.id)
        raise


async def _write(
    context: Context,
    memory: Memory,
    bank: MemoryBank,
    documents: Sequence[MemoryBankDocument],
    expiries: Sequence[dt.datetime | None],
    *,
    replace: bool,
) -> None:
    if not documents:
        return
    await asyncio.to_thread(require_room, context, 0)  # before the work
    ready = await prepare(context, bank, documents, expiries)
    await asyncio.to_thread(require_room, context, bytes_in(ready))
    await memory.writer.write(bank, ready, replace)


async def _dimensions(context: Context, config: VectorBankConfig) -> int:
    try:
        model = await context.models.find_embedding_model(config.embedding_model)
    except (BadInput, NotFound) as error:
        error.param = "config.embedding_model"
        raise
    await asyncio.to_thread(require_chunk_size, model, config)
    if model.dimensions is not None:
        return model.dimensions
    return int((await context.models.embed(model.id, ["How long is a vector?"])).vectors.shape[1])


def _described(bank: MemoryBank) -> api.MemoryBank:
    return api.MemoryBank.model_validate(
        {"bank_id": bank.id, "name": bank.name, "config": bank.config, "url": bank.url, "created_at": bank.created_at}
    )


def find(context: Context, bank_id: str, field: str = "bank_id") -> MemoryBank:
    """The row of a bank. Raises NotFound."""
    bank = context.store.memory_banks.get(context.tenant, bank_id)
    if bank is None:
        hint = "" if bank_id.startswith(ID) else f"; the ids that /memory_banks/create gives begin with {ID!r}"
        raise NotFound(f"there is no memory bank with the id {bank_id!r}{hint}", param=field)
    return bank


async def known(tables: Tables, bank: MemoryBank, ids: Sequence[str]) -> dict[str, Known]:
    """What is to know of those of these documents that a bank has, by id."""
    opened = await tables.get(bank)
    return await opened.table.known(ids) if opened is not None else {}


async def all_documents(tables: Tables, bank: MemoryBank) -> AsyncIterator[StoredDocument]:
    """All documents of a bank, in the order of their ids, each as it is when its turn comes.

    One that is gone by then is left out, and so is one that has come since the first was read.
    """
    if (opened := await tables.get(bank)) is not None:
        async for page in _pages(tables, bank, await opened.table.ids()):
            for document in page:
                yield document


async def _pages(tables: Tables, bank: MemoryBank, ids: Sequence[str]) -> AsyncIterator[list[StoredDocument]]:
    """These documents, but for those that are gone, so few at a time that their contents fit into memory."""
    for start in range(0, len(ids), PAGE):
        if (opened := await tables.get(bank)) is not None:
            yield await opened.table.documents(ids[start : start + PAGE])


def _require_known(bank: MemoryBank, ids: Sequence[str], there: dict[str, Known], field: str) -> None:
    missing = [one for one in ids if one not in there]
    if missing:
        shown = ", ".join(repr(one) for one in missing[:10]) + (", …" if len(missing) > 10 else "")
        raise NotFound(f"the memory bank {bank.id!r} has no document {shown}", param=field)


def given(stored: StoredDocument) -> MemoryBankDocument:
    """A document as it was given."""
    return MemoryBankDocument(
        document_id=stored.document_id,
        content=json.loads(stored.content),
        mime_type=stored.mime_type,
        metadata=stored.metadata,
    )


def _require_same(bank: MemoryBank, documents: Sequence[MemoryBankDocument], there: Mapping[str, Known]) -> None:
    """Raises Conflict for one of the documents of whose id there is another one."""
    for document in documents:
        known = there.get(document.document_id)
        if known is not None and known.hash != hash_of(document):
            raise taken(document.document_id, bank.id)


def taken(document_id: str, bank_id: str) -> Conflict:
    """Why a document is not inserted of whose id there is another one."""
    return Conflict(
        f"there is another document {document_id!r} in the bank {bank_id!r}; /memory_bank/update replaces it",
        param="documents",
    )


def _require_allowed(bank: MemoryBank, params: QueryParams) -> None:
    """Raises BadInput for params that the bank's kind does not take."""
    kind = bank.config["type"]
    taken = {
        "mode": ("vector", params.mode is not None),
        "prefix": ("keyvalue", params.prefix),
        "entities": ("graph", bool(params.entities)),
        "hops": ("graph", params.hops is not None),
    }
    for field, (of_kind, is_set) in taken.items():
        if is_set and kind != of_kind:
            raise BadInput(
                f"the bank {bank.id!r} is a {kind} bank; {field} is allowed for {of_kind} banks alone",
                param=f"params.{field}",
            )


async def _hits(context: Context, bank: MemoryBank, opened: OpenBank, request: QueryDocumentsRequest) -> list[Hit]:
    params, text = request.params, request.text
    bounds: dict[str, Any] = {one.name: getattr(params, one.name) for one in fields(Bounds)}
    match bank.config["type"]:
        case "vector":
            mode = params.mode or DEFAULT_MODE
            vector = await embed_query(context, bank, text) if mode is not QueryMode.keyword else None
            return await search(opened.table, Query(mode.value, text, vector, **bounds))
        case "keyword":
            return await search(opened.table, Query("keyword", text, **bounds))
        case "graph":
            assert opened.graph is not None
            asked = GraphQuery(text, tuple(params.entities), params.hops or 1, **bounds)
            return await find_in_graph(opened.graph, asked)
        case _ if params.prefix:
            return await by_prefix(opened.table, text, Bounds(**bounds))
        case _:
            return await by_keys(opened.table, [text], Bounds(**bounds))


def _chunk(hit: Hit) -> QueriedChunk:
    """As it is answered; not validated, as it is our own, and there are many in a query."""
    chunk = hit.chunk
    return QueriedChunk.model_construct(
        content=chunk.text,
        token_count=chunk.tokens,
        document_id=hit.document_id,
        position=chunk.position,
        page=chunk.page,
        headings=list(chunk.headings),
        metadata=hit.metadata,
    )


def require_room(context: Context, size: int) -> None:
    """Raises StorageFull unless the tenant may keep so many bytes more, and the banks' disk has them left."""
    quotas.require_quota(context, size)
    if "://" not in (folder := context.config.memory_banks_url):
        disk.require_room(Path(folder), size, "the disk of the memory banks")

"""Memory banks: what is made, written and asked at both ends of the one writer.

A bank is a row of the database and a table of its own. What is written is had, read, cut and embedded here, and then
sent to the writer (stack/memory_banks/writer.py), which answers when it is durable. What is read is read here, from
the table itself, each time in its newest version.
"""

import asyncio
import datetime as dt
import json
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

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
    UpdateDocumentsRequest,
    VectorBankConfig,
)
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound
from stack.memory_banks import search
from stack.memory_banks.documents import embed_query, hash_of, prepare, require_chunk_size
from stack.memory_banks.rows import Hit, StoredDocument
from stack.memory_banks.tables import Tables
from stack.memory_banks.writer import Writer, bytes_in
from stack.store import MemoryBank, now

P = ParamSpec("P")
T = TypeVar("T")
ID = "bank-"
# How a vector bank is asked where a query does not say it.
DEFAULT_MODE = QueryMode.vector
# Readers compute in LanceDB's own threads; these wait for them.
_READERS = ThreadPoolExecutor(32, thread_name_prefix="bank-query")


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

    Raises BadInput for a config that cannot be served, NotFound for an unknown embedding model, and Unavailable where a
    model whose dimensions the config does not tell cannot be asked for them.
    """
    config = request.config
    dimensions = None
    if isinstance(config, GraphBankConfig):
        raise BadInput("banks of the type 'graph' are not served; allowed: vector, keyvalue, keyword", param="config")
    if isinstance(config, VectorBankConfig):
        dimensions = await _dimensions(context, config)
    bank = MemoryBank(
        f"{ID}{uuid.uuid4().hex}", context.tenant, request.name, request.url, config.model_dump(mode="json"),
        dimensions, bytes=0, created_at=now(),
    )  # fmt: skip
    await asyncio.to_thread(context.store.memory_banks.add, bank)
    return _described(bank)


def get(context: Context, bank_id: str) -> api.MemoryBank:
    """Raises NotFound."""
    return _described(_known(context, bank_id))


def page(context: Context, after: str | None, limit: int) -> list[api.MemoryBank]:
    """Banks, newest first, behind the one with the id `after`. Raises NotFound."""
    last = _known(context, after, "after") if after is not None else None
    return [_described(bank) for bank in context.store.memory_banks.page(context.tenant, last, limit)]


async def drop(context: Context, memory: Memory, bank_id: str) -> str:
    """Forgets a bank and removes all that is in it. Returns its id. Raises NotFound.

    The row goes first: nobody finds the bank any more, whatever becomes of its files, which a sweep removes too.
    """
    bank = await asyncio.to_thread(_known, context, bank_id)
    await asyncio.to_thread(context.store.memory_banks.delete, context.tenant, bank_id)
    memory.tables.forget(bank)
    await memory.writer.drop(bank)
    return bank_id


async def insert(context: Context, memory: Memory, request: InsertDocumentsRequest) -> None:
    """Writes new documents: when this returns, the next query finds them, and nothing that fails later loses them.

    Documents that are there already, just so, stay as they are, so that a call whose answer was lost can be repeated.
    Raises NotFound for an unknown bank, Conflict for an id that is taken by another document, BadInput for a document
    that cannot be read or is named twice, TooLarge, StorageFull, and Unavailable.
    """
    bank, known = await _begin(context, memory, request.bank_id, request.documents)
    new = [document for document in request.documents if document.document_id not in known]
    for document in request.documents:
        if document.document_id in known and known[document.document_id].hash != hash_of(document):
            raise Conflict(
                f"there is another document {document.document_id!r} in the bank {bank.id!r}; /memory_bank/update "
                "replaces it",
                param="documents",
            )
    ttl = request.ttl_seconds
    expires_at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=ttl) if ttl is not None else None
    await _write(context, memory, bank, new, [expires_at] * len(new), replace=False)


async def update(context: Context, memory: Memory, request: UpdateDocumentsRequest) -> None:
    """Replaces documents in one commit: a query finds the chunks of the old ones or those of the new ones.

    They expire when the old ones would have. Raises as `insert` does, and NotFound for documents that are not there.
    """
    bank, known = await _begin(context, memory, request.bank_id, request.documents)
    _require_known(bank, [document.document_id for document in request.documents], known, "documents")
    expiries = [known[document.document_id].expires_at for document in request.documents]
    await _write(context, memory, bank, request.documents, expiries, replace=True)


async def get_documents(
    context: Context, memory: Memory, bank_id: str, request: GetDocumentsRequest
) -> list[MemoryBankDocument]:
    """Documents as they were given, in the order of the ids. Raises NotFound for the bank, and for those not there."""
    return await _read(_get_documents, context, memory, bank_id, request)


async def delete_documents(context: Context, memory: Memory, request: DeleteDocumentsRequest) -> None:
    """Deletes documents with their chunks, in one commit. Those that are not there are gone already.

    Raises NotFound for an unknown bank, and Unavailable.
    """
    bank = await asyncio.to_thread(_known, context, request.bank_id)
    await memory.writer.delete(bank, list(dict.fromkeys(request.document_ids)))


async def query(context: Context, memory: Memory, request: QueryDocumentsRequest) -> QueryDocumentsResponse:
    """The chunks that answer a query, best first.

    Raises NotFound for an unknown bank, BadInput for params that its kind does not take, Conflict where the bank's
    vectors are not those of its embedding model any more.
    """
    bank = await asyncio.to_thread(_known, context, request.bank_id)
    asked = _query(bank, request)
    vector = None
    if asked.mode in (QueryMode.vector, QueryMode.hybrid):
        vector = await embed_query(context, bank, request.text)
    hits = await _read(_search, memory, bank, asked, vector)
    return QueryDocumentsResponse(chunks=[_chunk(hit) for hit in hits], scores=[hit.score for hit in hits])


async def _begin(
    context: Context, memory: Memory, bank_id: str, documents: Sequence[MemoryBankDocument]
) -> tuple[MemoryBank, dict[str, StoredDocument]]:
    """The bank, and those of the documents that it has already, by id."""
    ids = [document.document_id for document in documents]
    if len(set(ids)) < len(ids):
        twice = next(one for number, one in enumerate(ids) if one in ids[:number])
        raise BadInput(f"the document {twice!r} is there twice; allowed: each id once in a call", param="documents")
    bank = await asyncio.to_thread(_known, context, bank_id)
    return bank, await _read(_stored, memory, bank, ids)


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
    await asyncio.to_thread(_require_room, context, 0)  # before the work
    ready = await prepare(context, bank, documents, expiries)
    await asyncio.to_thread(_require_room, context, bytes_in(ready))
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


def _known(context: Context, bank_id: str, field: str = "bank_id") -> MemoryBank:
    bank = context.store.memory_banks.get(context.tenant, bank_id)
    if bank is None:
        hint = "" if bank_id.startswith(ID) else f"; the ids that /memory_banks/create gives begin with {ID!r}"
        raise NotFound(f"there is no memory bank with the id {bank_id!r}{hint}", param=field)
    return bank


def _stored(memory: Memory, bank: MemoryBank, ids: Sequence[str]) -> dict[str, StoredDocument]:
    table = memory.tables.get(bank)
    return {document.document_id: document for document in table.documents(ids)} if table is not None else {}


def _require_known(bank: MemoryBank, ids: Sequence[str], known: dict[str, StoredDocument], field: str) -> None:
    missing = [one for one in ids if one not in known]
    if missing:
        shown = ", ".join(repr(one) for one in missing[:10]) + (", …" if len(missing) > 10 else "")
        raise NotFound(f"the memory bank {bank.id!r} has no document {shown}", param=field)


def _get_documents(
    context: Context, memory: Memory, bank_id: str, request: GetDocumentsRequest
) -> list[MemoryBankDocument]:
    bank = _known(context, bank_id)
    ids = list(dict.fromkeys(request.document_ids))
    known = _stored(memory, bank, ids)
    _require_known(bank, ids, known, "document_ids")
    return [_given(known[one]) for one in ids]


def _given(stored: StoredDocument) -> MemoryBankDocument:
    return MemoryBankDocument(
        document_id=stored.document_id,
        content=json.loads(stored.content),
        mime_type=stored.mime_type,
        metadata=stored.metadata,
    )


def _query(bank: MemoryBank, request: QueryDocumentsRequest) -> search.Query:
    """What is asked of the bank's table. Raises BadInput for params that the bank's kind does not take."""
    params, kind = request.params, bank.config["type"]
    if kind != "vector" and params.mode is not None:
        raise BadInput(f"the bank {bank.id!r} is a {kind} bank, which has no modes", param="params.mode")
    if kind != "keyvalue" and params.prefix:
        raise BadInput(
            f"the bank {bank.id!r} is a {kind} bank; prefix is allowed for keyvalue banks alone", param="params.prefix"
        )
    return search.Query(
        text=request.text,
        mode=(params.mode or DEFAULT_MODE).value if kind == "vector" else kind,
        max_chunks=params.max_chunks,
        max_tokens=params.max_tokens,
        score_threshold=params.score_threshold,
        filter=params.filter,
        neighbours=params.neighbours,
        prefix=params.prefix,
    )


def _search(memory: Memory, bank: MemoryBank, asked: search.Query, vector: NDArray[np.float32] | None) -> list[Hit]:
    table = memory.tables.get(bank)
    return search.search(table, asked, vector) if table is not None else []


def _chunk(hit: Hit) -> QueriedChunk:
    chunk = hit.chunk
    return QueriedChunk(
        content=chunk.text,
        token_count=chunk.tokens,
        document_id=hit.document_id,
        position=chunk.position,
        page=chunk.page,
        headings=list(chunk.headings),
        metadata=hit.metadata,
    )


def _require_room(context: Context, size: int) -> None:
    """Raises StorageFull unless the tenant may keep so many bytes more, and the banks' disk has them left."""
    quotas.require_quota(context, size)
    if "://" not in (folder := context.config.memory_banks_url):
        disk.require_room(Path(folder), size, "the disk of the memory banks")


async def _read(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function gives that waits for a table, in a thread of the readers."""
    return await asyncio.get_running_loop().run_in_executor(_READERS, partial(work, *args, **kwargs))

"""The LanceDB table of one bank.

A document is several rows of the same table, which one commit writes: its own (position -1: what was given) and one for
each of its chunks (positions from 0). Only a chunk's row has a text and a vector, so no index holds documents' rows and
no search finds them. LanceDB writes each commit as a new version, and a query reads one version from its begin to its
end: it sees all of a commit or nothing. What a commit has returned from is in files, whatever becomes of this process.
(On a local disk LanceDB 0.40 does not wait for the disk itself: a machine without power may lose the last commits.)

There is one writer at a time, which the caller sees to. Readers are many, in any process: with a consistency interval
of zero each query looks for a newer version first, so what was acknowledged is seen by the next query.

All is async, by LanceDB's own async API, whose work runs in threads of its own. Its sync API sends each call to one
event loop in the background: 32 readers get half as many answers from it.

A query takes about 0.15 ms for each commit that has not been put together with others, so `maintain` is to be called
after some twenty of them.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.expr import Expr, col, lit
from lancedb.index import FTS, BTree, HnswSq

from stack.api.memory_banks import Language
from stack.errors import BadInput, Conflict, NotFound
from stack.memory_banks import arrow, filters
from stack.memory_banks.arrow import DOCUMENT
from stack.memory_banks.rows import Document, Known, StoredDocument

TABLE = "bank"
# Each key of metadata is a column of the table.
MAX_KEYS = 500
# Chunks from which on an approximate index is worth building. Exact search takes 0.7 ms for each 1,000 vectors of 384
# dimensions on two cores; HNSW with scalar quantization takes 3 ms among 100,000 and finds 98% of the ten nearest.
# IVF-PQ takes 11 ms and finds 84%, or 13 ms and all of them when it compares 50 as they are.
INDEX_FROM = 10_000
# An index whose table has grown so many times is built anew: its parts have become too large.
REBUILD_AT = 4
# How long a version stays after a newer one has come: longer than any query takes that still reads it, which would
# fail without its files. Each maintenance reads the manifests of all versions that are kept, so that in object storage
# it takes as much longer as this is longer.
KEEP_VERSIONS = timedelta(minutes=3)
_WORDS_INDEX, _IDS_INDEX = "words", "documents"
_VECTOR_INDEX = "vectors_of_"


@dataclass(frozen=True, slots=True)
class Words:
    """How texts are cut into the words that a keyword search looks for.

    With `stem`, words of the language are found in all their forms, and its stop words are not looked for.
    """

    language: Language = Language.english
    stem: bool = True


@dataclass(frozen=True, slots=True)
class Counts:
    documents: int
    chunks: int


class BankTable:
    """One bank. `rows` is the table of LanceDB; `dimensions` are those of its vectors, None without vectors."""

    def __init__(self, rows: lancedb.AsyncTable, dimensions: int | None) -> None:
        self.rows = rows
        self.dimensions = dimensions

    @classmethod
    async def create(
        cls, address: str, dimensions: int | None, words: Words | None, storage_options: Mapping[str, str] | None = None
    ) -> Self:
        """Makes the table in a folder or at an address of object storage; one that is there already is opened.

        Without `words` it cannot be asked by keyword.
        """
        connection = await connect(address, storage_options)
        try:
            rows = await open_table(connection, TABLE)
        except NotFound:
            rows = await connection.create_table(TABLE, schema=arrow.schema(dimensions), exist_ok=True)
        indices = {index.name for index in await rows.list_indices()}
        if words is not None and _WORDS_INDEX not in indices:
            await rows.create_index("text", config=_words_index(words), name=_WORDS_INDEX)
        if _IDS_INDEX not in indices:  # as the last: where it is, all is
            await rows.create_index("document_id", config=BTree(), name=_IDS_INDEX)
        return cls(rows, dimensions)

    @classmethod
    async def open(cls, address: str, storage_options: Mapping[str, str] | None = None) -> Self:
        """Opens the table, which reads its newest manifest and no rows.

        Raises NotFound where there is none, and for one whose making has not ended, in which nothing is yet.
        """
        rows = await open_table(await connect(address, storage_options), TABLE)
        if _IDS_INDEX not in {index.name for index in await rows.list_indices()}:
            raise NotFound("this bank has not been made to its end")
        schema = await rows.schema()
        vector = schema.field("vector").type if "vector" in schema.names else None
        return cls(rows, None if vector is None else vector.list_size)

    async def hashes(self, document_ids: Sequence[str]) -> dict[str, str]:
        """The hashes of those of the documents that are there, by id. What has expired is not there."""
        found = await self._documents(document_ids, ["document_id", "hash"])
        return dict(zip(found["document_id"].to_pylist(), found["hash"].to_pylist(), strict=True))

    async def known(self, document_ids: Sequence[str]) -> dict[str, Known]:
        """What is to know of those of the documents that are there, by id, without reading them."""
        found = await self._documents(document_ids, ["document_id", "hash", "expires_at"])
        return {
            row["document_id"]: Known(
                row["hash"], None if row["expires_at"] == arrow.NEVER else arrow.time(row["expires_at"])
            )
            for row in found.to_pylist()
        }

    async def put(self, documents: Sequence[Document]) -> None:
        """Writes documents in one commit, each in the place of one with its id, if there is one.

        Raises BadInput for an id that comes twice, for vectors that are not the bank's, and for metadata with more new
        keys than a bank may have.
        """
        if not documents:
            return
        _require_once([document.document_id for document in documents])
        for document in documents:
            self._require_vectors(document)
        schema = await self._with_columns(documents)
        rows = await asyncio.to_thread(arrow.rows, documents, schema, await self.rows.version())
        # "null" lets documents' own rows be without a vector; all others have been looked at.
        if not await self._has_rows(documents):
            await self.rows.add(rows, on_bad_vectors="null")
            return
        # It joins the whole table: 100 ms where there are 12,000 rows, and adding to them takes 5.
        merge = self.rows.merge_insert(["document_id", "position"])
        merge = merge.when_matched_update_all().when_not_matched_insert_all()
        # The chunks of the old text that the new one has no longer.
        ids = _any_of([document.document_id for document in documents])
        await merge.when_not_matched_by_source_delete(ids).execute(rows, on_bad_vectors="null")

    async def only_adds(self, documents: Sequence[Document]) -> bool:
        """Whether `put` of these would add rows, and change nothing that is there: neither rows nor columns."""
        columns = {filters.column(key) for document in documents for key in document.metadata}
        return columns <= await self.columns() and not await self._has_rows(documents)

    async def delete(self, document_ids: Sequence[str]) -> list[str]:
        """Deletes documents in one commit. Returns the ids of those that were there."""
        there = await self.hashes(document_ids)
        if there:
            await self.rows.delete(_any_of(list(there)))
        return [document_id for document_id in dict.fromkeys(document_ids) if document_id in there]

    async def documents(self, document_ids: Sequence[str]) -> list[StoredDocument]:
        """Those of the documents that are there, in the order asked for, each once."""
        found = arrow.stored(await self._documents(document_ids, arrow.DOCUMENT_COLUMNS))
        by_id = {document.document_id: document for document in found}
        return [by_id[document_id] for document_id in dict.fromkeys(document_ids) if document_id in by_id]

    async def ids(self) -> list[str]:
        """The ids of all documents that are there, sorted."""
        query = self.rows.query().where((col("position") == lit(DOCUMENT)) & unexpired()).select(["document_id"])
        return sorted((await query.to_arrow())["document_id"].to_pylist())

    async def next_expiry(self) -> datetime | None:
        """When the first of the documents expires that do, of those that have not; None where none does."""
        does = (col("position") == lit(DOCUMENT)) & (col("expires_at") < lit(arrow.NEVER)) & unexpired()
        times = (await self.rows.query().where(does).select(["expires_at"]).to_arrow())["expires_at"].to_numpy()
        return arrow.time(int(times.min())) if len(times) else None

    async def counts(self) -> Counts:
        """How many documents and chunks there are, without those that have expired."""
        query = self.rows.query().where(unexpired()).select(["position"])
        positions = (await query.to_arrow())["position"].to_numpy()
        documents = int(np.count_nonzero(positions == DOCUMENT))
        return Counts(documents, len(positions) - documents)

    async def delete_expired(self) -> int:
        """Deletes the documents that have expired, in one commit. Returns how many there were."""
        expired = col("expires_at") <= lit(arrow.microseconds(datetime.now(UTC)))
        found = (
            await self.rows.query().where(expired & (col("position") == lit(DOCUMENT))).select(["position"]).to_arrow()
        )
        if found.num_rows:
            await self.rows.delete(expired)
        return int(found.num_rows)

    async def maintain(self) -> None:
        """Puts small files together, brings the indices up to date, drops old versions.

        Beside it rows may be added (`only_adds`). Of it and any other write the one that commits last might fail.
        """
        for replaced in (await self._built_for())[:-1]:
            await self.rows.drop_index(f"{_VECTOR_INDEX}{replaced}")
        await self.rows.optimize(cleanup_older_than=KEEP_VERSIONS)

    async def lacks_index(self) -> bool:
        """Whether there are enough vectors for an approximate index, or many more than it was built for."""
        if self.dimensions is None:
            return False
        return await self._chunks() >= max(INDEX_FROM, REBUILD_AT * max(await self._built_for(), default=0))

    async def index_vectors(self) -> None:
        """Builds the approximate index of vectors; `maintain` drops the one that it replaces.

        It takes minutes for a large bank. It may run beside writes, and must not beside `maintain`, which puts the
        files together that it reads.
        """
        name = f"{_VECTOR_INDEX}{await self._chunks()}"
        await self.rows.create_index("vector", config=_vector_index(), name=name)

    async def columns(self) -> frozenset[str]:
        return frozenset((await self.rows.schema()).names)

    async def _documents(self, document_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """The named columns of the documents' own rows."""
        if not document_ids:
            return pa.table({name: [] for name in columns})
        asked = _any_of(document_ids) & (col("position") == lit(DOCUMENT)) & unexpired()
        return await self.rows.query().where(asked).select(list(columns)).to_arrow()

    async def _has_rows(self, documents: Sequence[Document]) -> bool:
        """Whether there are rows of these documents, of those among them that have expired too."""
        ids = _any_of([document.document_id for document in documents])
        return bool(await self.rows.query().where(ids).select(["position"]).limit(1).to_list())

    async def _with_columns(self, documents: Sequence[Document]) -> pa.Schema:
        """The schema, with a column for each key of the documents' metadata.

        Columns are added in a commit of their own, which writes no rows and changes nothing for readers.
        """
        schema = await self.rows.schema()
        wanted = {filters.column(key) for document in documents for key in document.metadata}
        new = sorted(wanted.difference(schema.names))
        if not new:
            return schema
        keys = sum(name.startswith(filters.PREFIX) for name in schema.names)
        if keys + len(new) > MAX_KEYS:
            raise BadInput(
                f"the documents' metadata has {len(new)} keys that are new in this bank, which has {keys}; "
                f"allowed: at most {MAX_KEYS} in all",
                param="documents",
            )
        await self.rows.add_columns(pa.schema([pa.field(name, pa.string()) for name in new]))
        return await self.rows.schema()

    def _require_vectors(self, document: Document) -> None:
        if self.dimensions is None:
            return
        expected = (len(document.chunks), self.dimensions)
        shape = None if document.vectors is None else document.vectors.shape
        if document.vectors is None or shape != expected:
            raise BadInput(
                f"the vectors of document {document.document_id!r} have the shape {shape}; "
                f"allowed: {expected}, as the bank's have {self.dimensions} dimensions",
                param="documents",
            )
        if not np.isfinite(document.vectors).all():
            raise BadInput(
                f"a vector of document {document.document_id!r} has numbers that are not finite; allowed: finite ones",
                param="documents",
            )

    async def _chunks(self) -> int:
        """How many chunks there are, those of expired documents among them."""
        return await self.rows.count_rows(f"position <> {DOCUMENT}")

    async def _built_for(self) -> list[int]:
        """For how many chunks each index of vectors was built, the newest last."""
        names = [index.name for index in await self.rows.list_indices()]
        return sorted(int(name.removeprefix(_VECTOR_INDEX)) for name in names if name.startswith(_VECTOR_INDEX))


def to_write(documents: Sequence[Document], there: Mapping[str, str], *, replace: bool) -> list[Document]:
    """Those of the documents that are to be written, where `there` has the hashes of those in the bank.

    What is to be inserted and is in the bank as it is need not be written again: a client may repeat what it has no
    answer for. What is to be replaced is: where it was given as an address, another content may lie there now.
    Raises Conflict for one that is there with another content and not to be replaced, and NotFound for one that is to
    be replaced and is not there.
    """
    _require_once([document.document_id for document in documents])
    for document in documents:
        known = there.get(document.document_id)
        if replace and known is None:
            raise NotFound(
                f"document {document.document_id!r} is not in this bank; allowed: ids of documents in it",
                param="documents",
            )
        if not replace and known not in (None, document.hash):
            raise Conflict(
                f"document {document.document_id!r} is in this bank with another content; "
                "allowed: a new id, or /memory_bank/update, which replaces it",
                param="documents",
            )
    return [document for document in documents if replace or document.document_id not in there]


def unexpired() -> Expr:
    """Rows that have not expired by now."""
    return col("expires_at") > lit(arrow.microseconds(datetime.now(UTC)))


def _any_of(document_ids: Sequence[str]) -> Expr:
    return col("document_id").isin([lit(document_id) for document_id in document_ids])


def _require_once(document_ids: Sequence[str]) -> None:
    twice = [document_id for document_id, count in Counter(document_ids).items() if count > 1]
    if twice:
        raise BadInput(f"document {twice[0]!r} comes twice; allowed: each id once in a call", param="documents")


async def connect(address: str, storage_options: Mapping[str, str] | None) -> lancedb.AsyncConnection:
    return await lancedb.connect_async(
        address,
        storage_options=None if storage_options is None else dict(storage_options),
        read_consistency_interval=timedelta(0),
    )


async def open_table(connection: lancedb.AsyncConnection, name: str) -> lancedb.AsyncTable:
    """A table as it is. Raises NotFound where there is none, or a folder without one, of which the making was cut off.

    (To make it if it is not there does not do: LanceDB refuses a table that has got columns since.)
    """
    try:
        return await connection.open_table(name)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        raise NotFound(f"the files of the table {name!r} are not there") from error


def _words_index(words: Words) -> FTS:
    # ICU finds the words of Chinese, Japanese and Thai too, which have no spaces between them.
    return FTS(base_tokenizer="icu/split", language=words.language, stem=words.stem, remove_stop_words=words.stem)


def _vector_index() -> HnswSq:
    return HnswSq(distance_type="cosine")

"""Documents as rows of a table of Arrow, and rows as what was found.

A document is a row of its own, which keeps what was given, and a row for each of its chunks. What a query asks of a
chunk's row is in few columns, as each is read on its own: `place` is the whole of Chunk but its text and position.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import JsonValue

from stack.memory_banks import filters
from stack.memory_banks.rows import Chunk, Document, Hit, StoredDocument

# The position of a document's own row.
DOCUMENT = -1
# When what never expires does: expressions of LanceDB cannot ask for NULL.
NEVER = datetime(9999, 12, 31, tzinfo=UTC)
# What a query reads of chunks, and what is read of documents. The content of documents is in no query's way.
CHUNK_COLUMNS = ("document_id", "position", "written", "expires_at", "metadata", "text", "place")
DOCUMENT_COLUMNS = ("document_id", "content", "mime_type", "metadata", "hash", "expires_at")


@dataclass(frozen=True, slots=True)
class Found:
    """A hit, with what tells whether it may be shown: which commit wrote it, and when it expires."""

    hit: Hit
    written: int
    expires_at: datetime

    @property
    def key(self) -> tuple[str, int]:
        return self.hit.document_id, self.hit.chunk.position


def schema(dimensions: int | None) -> pa.Schema:
    """The columns of a bank without any metadata; keys of metadata add one each (stack/memory_banks/filters.py)."""
    fields = [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("written", pa.int64(), nullable=False),  # the version of the table that its commit began from
        pa.field("expires_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),  # as JSON
        pa.field("text", pa.string()),  # of chunks
        pa.field("place", pa.string()),  # of chunks, as JSON
        pa.field("content", pa.string()),  # of documents, as JSON
        pa.field("mime_type", pa.string()),  # of documents
        pa.field("hash", pa.string()),  # of documents
    ]
    if dimensions is not None:
        fields.append(pa.field("vector", pa.list_(pa.float32(), dimensions)))  # of chunks
    return pa.schema(fields)


def rows(documents: Sequence[Document], columns: pa.Schema, written: int) -> pa.Table:
    """All rows of the documents, each document's own row before those of its chunks."""
    listed = [row for document in documents for row in _rows_of(document, written)]
    table = {
        name: pa.array([row.get(name) for row in listed], columns.field(name).type)
        for name in columns.names
        if name != "vector"
    }
    if "vector" in columns.names:
        table["vector"] = _vectors(documents, columns.field("vector").type)
    return pa.table([table[name] for name in columns.names], schema=columns)


def found(table: pa.Table, scores: NDArray[np.floating[Any]]) -> list[Found]:
    """The chunks of a table with CHUNK_COLUMNS, with a score each."""
    return [_found(row, float(score)) for row, score in zip(table.to_pylist(), scores, strict=True)]


def stored(table: pa.Table) -> list[StoredDocument]:
    """The documents of a table with DOCUMENT_COLUMNS."""
    return [_stored(row) for row in table.to_pylist()]


def _rows_of(document: Document, written: int) -> list[dict[str, Any]]:
    common = {
        "document_id": document.document_id,
        "written": written,
        "expires_at": document.expires_at or NEVER,
        "metadata": json.dumps(document.metadata, ensure_ascii=False),
        **filters.values(document.metadata),
    }
    given = {"content": document.content, "mime_type": document.mime_type, "hash": document.hash}
    chunks = [
        {**common, "position": chunk.position, "text": chunk.text, "place": _place(chunk)} for chunk in document.chunks
    ]
    return [{**common, "position": DOCUMENT, **given}, *chunks]


def _vectors(documents: Sequence[Document], type_: pa.DataType) -> pa.Array:
    """The vectors of the rows: none for a document's own."""
    none = np.zeros((1, type_.list_size), np.float32)
    parts = [part for document in documents for part in (none, document.vectors)]
    of_document = np.concatenate([_first_of(1 + len(document.chunks)) for document in documents])
    values = np.concatenate(parts, dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=type_, mask=pa.array(of_document))


def _first_of(count: int) -> NDArray[np.bool_]:
    return np.arange(count) == 0


def _place(chunk: Chunk) -> str:
    place = {"start": chunk.start, "end": chunk.end, "tokens": chunk.tokens, "page": chunk.page}
    return json.dumps({**place, "headings": chunk.headings}, ensure_ascii=False)


def _found(row: Mapping[str, Any], score: float) -> Found:
    place = json.loads(row["place"])
    chunk = Chunk(
        text=row["text"],
        position=row["position"],
        start=place["start"],
        end=place["end"],
        tokens=place["tokens"],
        page=place["page"],
        headings=tuple(place["headings"]),
    )
    return Found(Hit(row["document_id"], chunk, json.loads(row["metadata"]), score), row["written"], row["expires_at"])


def _stored(row: Mapping[str, Any]) -> StoredDocument:
    metadata: dict[str, JsonValue] = json.loads(row["metadata"])
    expires_at = row["expires_at"]
    return StoredDocument(
        document_id=row["document_id"],
        content=row["content"],
        mime_type=row["mime_type"],
        metadata=metadata,
        hash=row["hash"],
        expires_at=None if expires_at >= NEVER else expires_at,
    )

"""Documents as rows of a table of Arrow, and rows as what was found.

A document is a row of its own, which keeps what was given, and a row for each of its chunks. What a query answers of a
chunk is in two columns, as each costs a query 0.2 ms: its text, and `about`, an object of JSON with the other fields of
Chunk, the document's id and metadata, when it expires, and as `written` the version of the table from which its commit
began.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import repeat
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import JsonValue

from stack.memory_banks import filters
from stack.memory_banks.rows import Chunk, Document, Hit, StoredDocument

# The position of a document's own row.
DOCUMENT = -1
# When what never expires does: expressions of LanceDB cannot ask for NULL.
NEVER = 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# What a query reads of chunks, and what is read of documents. The content of documents is in no query's way.
CHUNK_COLUMNS = ("text", "about")
DOCUMENT_COLUMNS = ("document_id", "content", "mime_type", "metadata", "hash", "expires_at")


@dataclass(frozen=True, slots=True)
class Found:
    """A chunk's row as it was read, in the order of CHUNK_COLUMNS, with its score."""

    text: str
    about: dict[str, Any]
    score: float

    @property
    def document_id(self) -> str:
        return cast(str, self.about["document_id"])

    @property
    def key(self) -> tuple[str, int]:
        return self.document_id, self.about["position"]

    @property
    def written(self) -> int:
        return cast(int, self.about["written"])

    @property
    def expires_at(self) -> int:
        return cast(int, self.about["expires_at"])

    def hit(self) -> Hit:
        about = self.about
        chunk = Chunk(
            text=self.text,
            position=about["position"],
            start=about["start"],
            end=about["end"],
            tokens=about["tokens"],
            page=about["page"],
            headings=tuple(about["headings"]),
        )
        return Hit(self.document_id, chunk, about["metadata"], self.score)


def schema(dimensions: int | None) -> pa.Schema:
    """The columns of a bank without any metadata; keys of metadata add one each (stack/memory_banks/filters.py)."""
    fields = [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("expires_at", pa.int64(), nullable=False),  # as `microseconds`
        pa.field("text", pa.string()),  # of chunks
        pa.field("about", pa.string()),  # of chunks, as JSON: all else that an answer or a search needs of them
        pa.field("content", pa.string()),  # of documents, as JSON
        pa.field("mime_type", pa.string()),  # of documents
        pa.field("metadata", pa.string()),  # of documents, as JSON
        pa.field("hash", pa.string()),  # of documents
        pa.field("writing", pa.string()),  # of documents
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


def found(table: pa.Table, scores: Iterable[float]) -> list[Found]:
    """The chunks of a table that has CHUNK_COLUMNS, with a score each."""
    texts, abouts = (table[name].to_pylist() for name in CHUNK_COLUMNS)
    return [Found(*row) for row in zip(texts, map(json.loads, abouts), scores, strict=True)]


def stored(table: pa.Table) -> list[StoredDocument]:
    """The documents of a table with DOCUMENT_COLUMNS."""
    return [_stored(row) for row in table.to_pylist()]


def microseconds(time: datetime) -> int:
    """A time as a number of microseconds since 1970, which is read many times faster than Arrow's times are."""
    return (time - _EPOCH) // _MICROSECOND


def time(microseconds: int) -> datetime:
    """The time of so many microseconds since 1970."""
    return _EPOCH + microseconds * _MICROSECOND


def _rows_of(document: Document, written: int) -> list[dict[str, Any]]:
    expires_at = NEVER if document.expires_at is None else microseconds(document.expires_at)
    common = {
        "document_id": document.document_id,
        "expires_at": expires_at,
        **filters.values(document.metadata),
    }
    given = {
        "position": DOCUMENT,
        "content": document.content,
        "mime_type": document.mime_type,
        "metadata": _json(document.metadata),
        "hash": document.hash,
        "writing": document.writing,
    }
    of_all = {
        "document_id": document.document_id,
        "written": written,
        "expires_at": expires_at,
        "metadata": document.metadata,
    }
    chunks = [
        {**common, "position": chunk.position, "text": chunk.text, "about": _json({**_place(chunk), **of_all})}
        for chunk in document.chunks
    ]
    return [{**common, **given}, *chunks]


def _vectors(documents: Sequence[Document], type_: pa.DataType) -> pa.Array:
    """The vectors of the rows: none for a document's own."""
    none = np.zeros((1, type_.list_size), np.float32)
    parts: list[NDArray[np.float32]] = []
    of_documents: list[bool] = []
    for document in documents:
        assert document.vectors is not None
        parts += (none, document.vectors)
        of_documents += [True, *repeat(False, len(document.chunks))]
    values = np.concatenate(parts, dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=type_, mask=pa.array(of_documents))


def _place(chunk: Chunk) -> dict[str, Any]:
    place = {"position": chunk.position, "start": chunk.start, "end": chunk.end}
    return {**place, "tokens": chunk.tokens, "page": chunk.page, "headings": chunk.headings}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _stored(row: Mapping[str, Any]) -> StoredDocument:
    metadata: dict[str, JsonValue] = json.loads(row["metadata"])
    expires_at = row["expires_at"]
    return StoredDocument(
        document_id=row["document_id"],
        content=row["content"],
        mime_type=row["mime_type"],
        metadata=metadata,
        hash=row["hash"],
        expires_at=None if expires_at == NEVER else time(expires_at),
    )

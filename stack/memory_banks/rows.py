"""What is written into memory banks and found in them."""

import uuid
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: the characters `start` to `end` of its text as it was read."""

    text: str
    position: int  # of the chunk in its document, from 0
    start: int
    end: int
    tokens: int  # of the bank's tokenizer (vector and graph banks) or words (the others)
    page: int | None  # of a PDF, from 1
    headings: tuple[str, ...]  # those that it stands under, outermost first


@dataclass(frozen=True, slots=True)
class Mention:
    """An entity that a chunk speaks of, by its name; `key` is the same for each spelling of it."""

    key: str
    name: str
    kind: str
    position: int  # of the chunk


@dataclass(frozen=True, slots=True)
class Relation:
    """How a chunk relates two entities, by their keys."""

    source: str
    target: str
    label: str
    position: int  # of the chunk


@dataclass(frozen=True, slots=True)
class Graph:
    """What was extracted from a document."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A document ready to be written: read, cut and embedded."""

    document_id: str
    content: str  # as JSON, what was given: a string, a list of strings, or {"uri": ...}
    mime_type: str
    metadata: dict[str, JsonValue]
    hash: str  # sha256 of content, mime type and metadata
    expires_at: datetime | None
    chunks: tuple[Chunk, ...]
    vectors: NDArray[np.float32] | None  # (chunks, dimensions); vector banks only
    graph: Graph | None = None  # graph banks only
    # The id of this making of it: of the same address, another content may be had the next time.
    writing: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as it was given, without what was made of it."""

    document_id: str
    content: str  # as JSON
    mime_type: str
    metadata: dict[str, JsonValue]
    hash: str
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Known:
    """What tells whether a document that is there is the same as another one, and for how long it is there."""

    hash: str
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that answers a query. What `score` means, its mode says: stack/memory_banks/search.py."""

    document_id: str
    chunk: Chunk
    metadata: dict[str, JsonValue]
    score: float

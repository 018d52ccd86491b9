"""Documents as the tests write them: a text is cut at its full stops, and its vector counts a few letters."""

import hashlib
from collections.abc import Sequence
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from stack.memory_banks import table
from stack.memory_banks.rows import Chunk, Document

DIMENSIONS = 8


class BankTable(table.BankTable):
    """The table of a bank, for tests without the writer of all banks."""

    async def write(self, documents: Sequence[Document], *, replace: bool) -> None:
        """Writes documents in one commit: to be inserted, or (`replace`) to take the place of those with their ids."""
        there = await self.hashes([document.document_id for document in documents])
        await self.put(table.to_write(documents, there, replace=replace))


def document(
    document_id: str,
    text: str = "one. two. three",
    *,
    metadata: dict | None = None,
    expires_at: datetime | None = None,
    dimensions: int | None = DIMENSIONS,
) -> Document:
    parts = text.split(". ")
    return Document(
        document_id=document_id,
        content=f'"{text}"',
        mime_type="text/plain",
        metadata=metadata or {},
        hash=hashlib.sha256(f"{text}{metadata}".encode()).hexdigest(),
        expires_at=expires_at,
        chunks=tuple(Chunk(part, at, at, at + len(part), len(part.split()), None, ()) for at, part in enumerate(parts)),
        vectors=None if dimensions is None else np.stack([vector(part, dimensions) for part in parts]),
    )


def vector(text: str, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """Texts of the same letters are near each other."""
    counts = np.array([text.count(letter) for letter in "etaoinsr"][:dimensions], np.float32)
    return counts + np.float32(0.01)

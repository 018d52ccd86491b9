"""The ids of a data set's rows, of which no two may be the same: kept on the disk, not in memory."""

import sqlite3
from contextlib import ExitStack, closing
from typing import Self

from stack import uploads
from stack.errors import BadInput


class SeenIds:
    """The ids that were seen so far, in a file that is made for the first one, and gone at the end."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(self, number: int, id: str) -> None:
        """Adds the id of the row of this number. Raises BadInput, naming both rows, where one has it already."""
        seen = self._connection or self._open()
        if not seen.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (id, number)).rowcount:
            (first,) = seen.execute("SELECT number FROM ids WHERE id = ?", (id,)).fetchone()
            raise BadInput(f"the rows {first} and {number} have the same id, {id[:80]!r}")

    def _open(self) -> sqlite3.Connection:
        file = self._opened.enter_context(uploads.scratch()) / "ids.db"
        self._connection = self._opened.enter_context(closing(sqlite3.connect(file)))
        # Nothing of it is to outlive this process.
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        return self._connection

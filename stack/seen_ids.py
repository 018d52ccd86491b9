"""The ids of a data set's rows, of which no two may be the same: kept on the disk, not in memory."""

import sqlite3
from pathlib import Path
from typing import Self

from stack.errors import BadInput


class SeenIds:
    """The ids that were seen so far, in a file of a folder, which is made for the first one."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "ids.db"
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def add(self, number: int, id: str) -> None:
        """Adds the id of the row of this number. Raises BadInput, naming both rows, where one has it already."""
        seen = self._connection or self._open()
        if not seen.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (id, number)).rowcount:
            (first,) = seen.execute("SELECT number FROM ids WHERE id = ?", (id,)).fetchone()
            raise BadInput(f"the rows {first} and {number} have the same id, {id[:80]!r}")

    def _open(self) -> sqlite3.Connection:
        self._connection = sqlite3.connect(self._file)
        # Nothing of it is to outlive this process.
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        return self._connection

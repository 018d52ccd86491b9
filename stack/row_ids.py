"""The ids of a data set's rows: what stands in the column `id`, of type text or number, or else a row's number.

No two rows may have the same. They are compared on the disk, not in memory.
"""

import sqlite3
from contextlib import ExitStack, closing
from typing import Any, Self

from stack import uploads
from stack.api.datasets import TrainEvalDataset
from stack.errors import BadInput

ID = "id"
MAX_ID = 1_000


def id_of(number: int, row: dict[str, Any], dataset: TrainEvalDataset, column: str = ID) -> str:
    """The id of a row, in the column of ids. Raises BadInput for one that is none."""
    if column not in dataset.columns:
        return str(number)
    value = row[column]
    name = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not 0 < len(name) <= MAX_ID:
        raise BadInput(f"row {number}: the id has {len(name)} characters; allowed: 1 to {MAX_ID}")
    return name


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
        key = id.encode("utf-8", "surrogatepass")  # JSON can hold halves of letters, which SQLite's texts cannot
        if not seen.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, number)).rowcount:
            (first,) = seen.execute("SELECT number FROM ids WHERE id = ?", (key,)).fetchone()
            raise BadInput(f"the rows {first} and {number} have the same id, {id[:80]!r}")

    def _open(self) -> sqlite3.Connection:
        file = self._opened.enter_context(uploads.scratch()) / "ids.db"
        self._connection = self._opened.enter_context(closing(sqlite3.connect(file)))
        # Nothing of it is to outlive this process.
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        return self._connection

"""Lists in pages, newest first: rows in the falling order of their times and, where those are equal, of their ids."""

from typing import Any

from sqlalchemy import ColumnElement


def is_behind(time: Any, id: Any, last_time: str, last_id: str) -> ColumnElement[bool]:
    """Whether a row comes behind the last one of a page. The bound on the time alone is what an index on it needs."""
    behind: ColumnElement[bool] = (time <= last_time) & ((time < last_time) | (id < last_id))
    return behind

"""How the database is opened: its engine, and the time as it is written."""

import datetime as dt
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url

BUSY_S = 20


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def connect(url: str) -> Engine:
    """The engine of a database: `sqlite:///file`, or `postgresql+psycopg://user@host/name`."""
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
    engine = create_engine(url)
    if database := make_url(url).database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """Many processes read and write at once: a write-ahead log, and waiting instead of failing on a lock."""
    connection.execute(f"PRAGMA busy_timeout = {BUSY_S * 1_000}")
    # The switch to the write-ahead log does not heed the timeout: of several first openers, all but one must ask again.
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    # FULL: what was acknowledged survives a power cut too, at the cost of one sync a transaction.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")

"""How the database is opened: its engine, and the time as it is written."""

import datetime as dt
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import make_url

# How long a writer waits for SQLite's lock: a driver whose heartbeat has to try again is not late by that yet.
BUSY_S = 8
CONNECT_S = 5  # to a server that does not even refuse


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return past(0)


def past(seconds: float) -> str:
    """The time so long ago, as `now` has it."""
    time = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def connect(url: str) -> Engine:
    """The engine of a database: `sqlite:///file`, or `postgresql://user@host/name`.

    Its errors do not show the values of their statements, which are users' data.
    """
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    if not url.startswith("sqlite"):
        # What the queries are written for, whatever the server's own default is.
        return create_engine(
            url, hide_parameters=True, isolation_level="READ COMMITTED", pool_pre_ping=True, pool_size=10,
            max_overflow=20, connect_args={"connect_timeout": CONNECT_S},
        )  # fmt: skip
    # A transaction takes SQLite's one lock with its first write, and waits for it there: one that reads first and wants
    # the lock later would fail at once if another had written in between.
    engine = create_engine(url, hide_parameters=True, connect_args={"isolation_level": "IMMEDIATE"})
    if database := make_url(url).database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    event.listen(engine, "connect", _set_up_sqlite)
    return engine


@contextmanager
def writing(engine: Engine, wait_s: int = BUSY_S) -> Iterator[Connection]:
    """A transaction that reads, and writes by what it has read.

    In SQLite it is the only one that writes, from its start. In PostgreSQL it sees what others have committed before
    each of its queries: it must first lock the rows that it goes by (`with_for_update`), or `hold` a name.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {wait_s * 1_000}")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_S * 1_000}")
        yield connection


def hold(connection: Connection, name: str) -> None:
    """Waits until no other transaction holds `name`, and holds it to the end of this one, which is a `writing` one."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


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

"""What of a database's errors is a state that passes, by their classes and codes: the words differ by language."""

import sqlite3

from sqlalchemy import exc

from stack.errors import StackError, StorageFull, Unavailable

# The primary result codes of SQLite (https://www.sqlite.org/rescode.html) where the database cannot be used now.
_SQLITE_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}
# Of PostgreSQL's (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_DISK_FULL = "53100"
_PROGRAM_LIMIT_EXCEEDED = "54"  # a class of codes: a statement too large, which will never be right


def passing(error: exc.SQLAlchemyError) -> StackError | None:
    """Unavailable for a database that is busy or away, StorageFull for one without room; None for a fault of ours."""
    if isinstance(error, exc.TimeoutError):
        return Unavailable("all connections to the database are in use")
    if not isinstance(error, exc.DBAPIError):
        return None
    away = Unavailable("the database does not answer")
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # of an extended code, the primary one
        if code == sqlite3.SQLITE_FULL:
            return StorageFull("the disk of the database is full")
        return away if code in _SQLITE_AWAY else None
    sqlstate = getattr(error.orig, "sqlstate", None) or ""  # none where no connection came about
    if sqlstate == _DISK_FULL:
        return StorageFull("the disk of the database is full")
    if isinstance(error, exc.OperationalError | exc.InterfaceError) and not sqlstate.startswith(
        _PROGRAM_LIMIT_EXCEEDED
    ):
        return away
    return away if error.connection_invalidated else None


def reason(error: exc.SQLAlchemyError) -> str:
    """The database's own words in one line, without the statement and without what was to be written."""
    own = getattr(error, "orig", None) or error
    # PostgreSQL adds the line of the statement and the values of a key that is taken.
    primary = getattr(getattr(own, "diag", None), "message_primary", None)
    return " ".join(str(primary or own).split())

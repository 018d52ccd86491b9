"""What passes of a database's errors, by what real databases raise, and what their words show."""

from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, exc, text
from sqlalchemy.pool import QueuePool

from stack.errors import StackError, StorageFull, Unavailable
from stack.store import Store, faults
from stack.store.connection import connect
from tests import postgres


def raised(engine: Engine, statement: str, **values: object) -> exc.SQLAlchemyError:
    with pytest.raises(exc.SQLAlchemyError) as caught, engine.begin() as connection:
        connection.execute(text(statement), values)
    return caught.value


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("53100", StorageFull),  # disk_full
        ("57P01", Unavailable),  # admin_shutdown
        ("53300", Unavailable),  # too_many_connections
        ("55P03", Unavailable),  # lock_not_available
        ("40P01", Unavailable),  # deadlock_detected
        ("40001", Unavailable),  # serialization_failure
        ("54001", None),  # statement_too_complex
        ("42P01", None),  # undefined_table
        ("23505", None),  # unique_violation
    ],
)
def test_postgresqls_errors_are_told_by_their_codes(
    postgres_server: postgres.Server, code: str, expected: type[StackError] | None
) -> None:
    with postgres_server.database() as url:
        store = Store(url)
        error = raised(store.engine, f"DO $$ BEGIN RAISE EXCEPTION 'full and locked' USING ERRCODE = '{code}'; END $$")
        store.close()
    passing = faults.passing(error)
    assert (type(passing) if passing else None) == expected


def test_a_postgresql_that_is_nowhere_is_unavailable(tmp_path: Path) -> None:
    engine = connect(f"postgresql://nobody@/none?host={tmp_path}")
    assert isinstance(faults.passing(raised(engine, "SELECT 1")), Unavailable)


def test_a_full_sqlite_is_storage_full(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/a.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE a (b)")
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 2")  # of this connection, which the pool gives again
    error = raised(engine, "INSERT INTO a VALUES (:content)", content="locked" * 10_000)
    engine.dispose()
    assert isinstance(faults.passing(error), StorageFull)


def test_a_sqlite_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}")
    assert isinstance(faults.passing(raised(engine, "SELECT 1")), Unavailable)


def test_connections_that_are_all_in_use_are_unavailable(tmp_path: Path) -> None:
    engine = create_engine(
        f"sqlite:///{tmp_path}/a.db", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0
    )
    with engine.connect():
        error = raised(engine, "SELECT 1")
    engine.dispose()
    assert isinstance(faults.passing(error), Unavailable)


def test_a_fault_of_ours_does_not_pass(store: Store) -> None:
    for statement in ("SELECT * FROM locked", "SELECT 'full", "INSERT INTO jobs (uuid) VALUES ('full')"):
        assert faults.passing(raised(store.engine, statement)) is None


def test_the_values_of_a_statement_stand_in_no_error(store: Store) -> None:
    error = raised(store.engine, "SELECT * FROM nowhere WHERE a = :a", a="what only ann may see")
    assert "nowhere" in str(error)
    assert "ann" not in str(error)


def test_the_reason_is_the_databases_own_words_in_one_line(store: Store) -> None:
    reason = faults.reason(raised(store.engine, "SELECT * FROM nowhere WHERE a = :a", a="what only ann may see"))
    assert "nowhere" in reason
    for words in ("WHERE", "ann", "\n"):
        assert words not in reason


def test_the_reason_does_not_show_a_key_that_is_taken(store: Store) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE names (name TEXT PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO names VALUES ('what only ann may see')")
    reason = faults.reason(raised(store.engine, "INSERT INTO names VALUES (:name)", name="what only ann may see"))
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE names")
    assert "names" in reason
    assert "ann" not in reason

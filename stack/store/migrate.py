"""Brings a database's schema up to date, by the steps in stack/store/migrations."""

import threading
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from stack.errors import BadInput
from stack.store.connection import hold, writing
from stack.store.schema import schema

# The newest step. Every process asks whether a store has it as it opens the store, without loading alembic.
HEAD = "0009"
# The tables of the first release, which wrote down no revision.
FIRST = "0001"
FIRST_TABLES = {"adapters", "datasets", "jobs", "metrics"}
MIGRATIONS = Path(__file__).with_name("migrations")
# How long a process waits for another that is at it.
WAIT_S = 3_600
# alembic keeps what it is working on in its modules: in a process there is one migration at a time.
_alembic = threading.Lock()


def migrate(engine: Engine) -> None:
    """Brings a new or old database up to date: all of it or, if that fails, nothing.

    Of several processes one does it, and the others wait. Raises BadInput for a database that this version of the
    stack does not know.
    """
    with engine.connect() as connection:
        if revision(connection) == HEAD:
            return
    with _alembic, writing(engine, WAIT_S) as connection:
        hold(connection, "llama-stack-ray: migration")
        found = revision(connection)  # once more: another process may have been faster
        if found != HEAD:
            _upgrade(connection, found)


def revision(connection: Connection) -> str | None:
    """The last step that a database has taken, None if there is none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    known = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    if found is not None and found not in known:
        raise BadInput(
            f"the database is of a newer version of the stack (its revision is {found!r}, and the newest known here is "
            f"{HEAD!r}): install that version, or name another database",
            param="store",
        )
    if found is None and _is_of_first_release(connection):
        command.stamp(config, FIRST)
    command.upgrade(config, "head")


def _is_of_first_release(connection: Connection) -> bool:
    """Whether a database without a revision was made by the first release; False if it is empty. Raises BadInput."""
    tables = set(inspect(connection).get_table_names())
    if tables >= FIRST_TABLES:
        columns = {column["name"] for column in inspect(connection).get_columns("jobs")}
        if "submission_id" in columns and "tenant" not in columns:
            return True
    if ours := sorted(tables & set(schema.tables)):
        raise BadInput(
            f"the database has tables that no release of the stack has made ({', '.join(ours)}): name another database",
            param="store",
        )
    return False

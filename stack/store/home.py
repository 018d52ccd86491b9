"""The row that says which folder is the STACK_HOME of a cluster's nodes."""

from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError

from stack.store.schema import home

_ONLY = 1  # the key of the one row


class Home:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def id(self) -> str | None:
        """The id of the folder; None before the first start on several nodes."""
        with self._engine.connect() as connection:
            return connection.execute(select(home.c.id)).scalar()

    def settle(self, id: str) -> None:
        """Writes an id down, if there is none: of several at once, the database takes one."""
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(home).values(only=_ONLY, id=id))
        except IntegrityError:
            if self.id() is None:
                raise

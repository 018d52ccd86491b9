"""Brings a database's schema up to date."""

from sqlalchemy import Engine
from sqlalchemy.schema import CreateIndex, CreateTable

from stack.store.schema import schema


def migrate(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in schema.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))
            for index in sorted(table.indexes, key=lambda index: str(index.name)):
                connection.execute(CreateIndex(index, if_not_exists=True))

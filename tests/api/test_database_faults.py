"""What clients see of a database that is away, busy or full: that it passes, and nothing of what it was asked."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from stack import keys
from stack.config import Config
from stack.context import Context
from tests import postgres
from tests.api.conftest import HERE, URL, gateway
from tests.api.envelope import error_of
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

SECRET = "what only ann may see"
# What a PostgreSQL whose disk is full answers to a write.
FULL = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'pas de place' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON experiments FOR EACH ROW EXECUTE FUNCTION refuse();
"""


@contextmanager
def opened(store_url: str) -> Iterator[tuple[TestClient, Context]]:
    """The gateway on a database."""

    async def ready() -> dict[str, str]:
        return {}

    context = Context.open(Config.parse(CONFIG | {"store": store_url}, "the tests' config"), engine=ScriptedEngine())
    app = gateway.create_app(context, ready)
    with TestClient(app, raise_server_exceptions=False, client=HERE, base_url=URL) as client:
        yield client, context
    context.close()


def asked(client: TestClient) -> list[Any]:
    """A request that reads and one that writes."""
    return [client.get("/post_training/jobs"), client.post("/experiments/create", json={"name": SECRET})]


def require_away(client: TestClient) -> None:
    for reply in asked(client):
        assert error_of(reply, 503)["code"] == "unavailable"
        assert int(reply.headers["retry-after"]) > 0
        assert SECRET not in reply.text


@pytest.mark.parametrize("keys_are_known", [True, False])
def test_a_postgresql_that_is_stopped_is_503_until_it_is_back(
    home: Path, monkeypatch: pytest.MonkeyPatch, keys_are_known: bool
) -> None:
    with postgres.private() as server, opened(server.url) as (client, _):
        assert [reply.status_code for reply in asked(client)] == [200, 200]
        seconds = keys.monotonic() + (0 if keys_are_known else 3)
        monkeypatch.setattr(keys, "monotonic", lambda: seconds)
        server.stop()
        require_away(client)  # its connections break off, and
        require_away(client)  # there is nobody to connect to
        assert client.get("/health").status_code == 200
        server.start()
        assert [reply.status_code for reply in asked(client)] == [200, 200]


def test_a_postgresql_whose_disk_is_full_is_507_and_can_still_be_read(
    home: Path, postgres_server: postgres.Server
) -> None:
    with postgres_server.empty_database() as store_url, opened(store_url) as (client, context):
        with context.store.engine.begin() as connection:
            connection.exec_driver_sql(FULL)
        read, written = asked(client)
        assert read.status_code == 200
        assert error_of(written, 507)["code"] == "storage_full"


def test_a_log_tells_what_is_wrong_without_what_was_to_be_written(
    client: TestClient, context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    engine = context.store.engine
    engine.dispose()
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 10"))
    with engine.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")
        with caplog.at_level(logging.DEBUG):
            reply = client.post("/experiments/create", json={"name": SECRET})
    error_of(reply, 503)
    assert "database is locked" in caplog.text
    assert SECRET not in caplog.text

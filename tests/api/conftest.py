"""The gateway's application in this process, on a scripted engine."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stack.context import Context
from tests.samples import dataset, dialogs, write_rows
from tests.scripted_deployer import RUNNING, ScriptedDeployer
from tests.scripted_sessions import ScriptedSessions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps import gateway

# Where the gateway is, and who asks it.
URL = "http://127.0.0.1:8321"
HERE = ("127.0.0.1", 50_000)


@pytest.fixture
def waiting_for() -> dict[str, str]:
    """What is not ready; tests put something in."""
    return {}


@pytest.fixture
def deployer() -> ScriptedDeployer:
    return ScriptedDeployer({"gateway": RUNNING, "small": RUNNING})


@pytest.fixture
def sessions() -> ScriptedSessions:
    return ScriptedSessions()


@pytest.fixture
def app(
    context: Context, waiting_for: dict[str, str], deployer: ScriptedDeployer, sessions: ScriptedSessions
) -> FastAPI:
    async def ready() -> dict[str, str]:
        return waiting_for

    return gateway.create_app(context, ready, deployer, sessions=sessions)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False, client=HERE, base_url=URL) as client:
        yield client


@pytest.fixture
def data(home: Path) -> dict[str, Any]:
    """The description of a data set of 4 rows."""
    return dataset(write_rows(home / "data" / "train.jsonl", dialogs(4)))

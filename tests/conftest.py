"""What the tests share: a home folder of their own and a context on a scripted engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack.config import Config
from stack.context import Context
from stack.store import Store
from tests.running_stack import stack as stack  # for all folders: one stack a session
from tests.s3 import s3 as s3
from tests.s3 import s3_server as s3_server
from tests.scripted_engine import ScriptedEngine

CONFIG: dict[str, Any] = {
    "max_body_bytes": 64 * 1024,
    "max_dataset_bytes": 64 * 1024,
    "models": [{"id": "small", "path": "models/small", "context": 256, "adapter_rank": 16}],
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """STACK_HOME, in a temporary folder, with a data folder."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "models" / "small").mkdir(parents=True)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    (home / "models" / "small" / "config.json").write_text(json.dumps(shape))
    monkeypatch.setenv("STACK_HOME", str(home))
    monkeypatch.delenv("STACK_CONFIG", raising=False)
    return home


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/stack.db")
    yield store
    store.close()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def context(home: Path, engine: ScriptedEngine) -> Iterator[Context]:
    context = Context.open(Config.parse(CONFIG, "the tests' config"), engine=engine)
    yield context
    context.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a stack of their own come before the one of the session: a machine has room for one."""
    items.sort(key=lambda item: "stack" in getattr(item, "fixturenames", ()))

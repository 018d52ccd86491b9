"""What the tests share: a home folder of their own and a context on a scripted engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack.config import Config
from stack.context import Context
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
    monkeypatch.setenv("STACK_HOME", str(home))
    monkeypatch.delenv("STACK_CONFIG", raising=False)
    return home


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def context(home: Path, engine: ScriptedEngine) -> Iterator[Context]:
    context = Context.open(Config.parse(CONFIG, "the tests' config"), engine=engine)
    yield context
    context.close()

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from stack.agentic_system.tools.keys import VARIABLES
from tests.unit.agentic_system.tools.elsewhere import Elsewhere, there
from tests.unit.test_fetcher import Authority


@pytest.fixture(scope="package")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def elsewhere(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    """Starts a server that answers so; gives its address, and what it is asked. The tools' fetcher finds it."""
    with ExitStack() as servers:
        yield lambda answer: servers.enter_context(there(authority, monkeypatch, answer))


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)

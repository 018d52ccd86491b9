from collections.abc import Iterator
from contextlib import ExitStack

import pytest

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

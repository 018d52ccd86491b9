"""A model that answers by a script, and agents that ask it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_agents import Agents, Model, Tool, open_context

MakeAgents = Callable[..., Agents]


@pytest.fixture
def model() -> Model:
    return Model("Paris")


@pytest.fixture
async def agents_of(home: Path, new_sqlite_file: Path, model: Model, tmp_path: Path) -> AsyncIterator[MakeAgents]:
    """Makes agents with these tools, by a config with what is given."""
    opened: list[Agents] = []

    def make(*tools: Tool, **config: Any) -> Agents:
        file = tmp_path / f"stack{len(opened)}.db"
        file.write_bytes(new_sqlite_file.read_bytes())
        opened.append(Agents(open_context(f"sqlite:///{file}", model, **config), *tools))
        return opened[-1]

    yield make
    for agents in opened:
        await agents.sessions.close()
        agents.context.close()

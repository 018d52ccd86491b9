"""What a gateway keeps of turns that actors run, and how long it waits for one. No Ray is started."""

import asyncio
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack.agentic_system import replay
from stack.agentic_system.events import Stream
from stack.context import Context
from stack.errors import Conflict, Unavailable
from stack.store.turns import NewTurn, Turn
from tests.scripted_agents import Model, open_context

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray Serve's own use of pydantic
    from serve_apps import ray_sessions
    from serve_apps.ray_sessions import RaySessions


class Method:
    """A method of a handle. It answers with None, or never."""

    def __init__(self, *, is_answered: bool) -> None:
        self._is_answered = is_answered
        self.calls = 0

    def remote(self, *_: Any) -> "asyncio.Future[None]":
        self.calls += 1
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._is_answered:
            answer.set_result(None)
        return answer


class PoolHandle:
    """A pool without actors: sessions wait."""

    def __init__(self) -> None:
        self.start, self.known = Method(is_answered=True), Method(is_answered=True)
        self.find = Method(is_answered=False)


@pytest.fixture
def context(home: Path, new_sqlite_file: Path, tmp_path: Path) -> Iterator[Context]:
    file = tmp_path / "stack.db"
    file.write_bytes(new_sqlite_file.read_bytes())
    opened = open_context(f"sqlite:///{file}", Model("Paris"))
    yield opened
    opened.close()


@pytest.fixture
def turn(context: Context) -> Turn:
    agent = context.store.agents.add("default", {})
    session = context.store.agents.add_session("default", agent.id, "talk")
    assert session is not None
    request: dict[str, list[str]] = {"messages": [], "attachments": []}
    turn = context.store.turns.accept(NewTurn("default", agent.id, session.id, 1, request, {}), 1)
    assert isinstance(turn, Turn)
    return turn


@pytest.fixture
def pool() -> PoolHandle:
    return PoolHandle()


@pytest.fixture
def sessions(pool: PoolHandle) -> RaySessions:
    return RaySessions(pool)


async def read(sessions: RaySessions, context: Context, turn_id: str) -> list[str]:
    return [one.id async for one in sessions.events(context, turn_id)]


async def test_what_is_known_of_a_turn_that_was_started_is_kept_for_a_while_only(
    sessions: RaySessions, pool: PoolHandle, context: Context, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_sessions, "KEPT_S", 0)
    await sessions.start(context, turn, {})
    await asyncio.to_thread(context.store.turns.cancel, "default", turn.id)
    with pytest.raises(Conflict, match="the turn was cancelled"):
        await read(sessions, context, turn.id)
    assert pool.find.calls == 0


@pytest.mark.parametrize("operation", ["cancel", "go_on"])
async def test_nothing_is_kept_of_turns_whose_events_nobody_is_about_to_read(
    sessions: RaySessions, pool: PoolHandle, context: Context, turn: Turn, operation: str
) -> None:
    if operation == "cancel":
        await sessions.cancel(context, turn.id)
    else:
        await sessions.go_on(context, turn.id, {})
    assert pool.start.calls == 1
    await asyncio.to_thread(context.store.turns.cancel, "default", turn.id)
    with pytest.raises(Conflict, match="the turn was cancelled"):
        await read(sessions, context, turn.id)
    assert pool.find.calls == 0


async def test_an_actor_is_not_waited_for_for_ever(
    sessions: RaySessions, context: Context, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_sessions, "FIND_S", 0.01)
    await sessions.start(context, turn, {})
    with pytest.raises(Unavailable, match=r"no actor has got free for the turn within 0\.01 s"):
        await read(sessions, context, turn.id)


async def test_turns_are_retold_beside_the_event_loop(
    sessions: RaySessions, context: Context, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One can be of many megabytes."""
    threads = []

    def whole(*arguments: Any) -> Stream:
        threads.append(threading.current_thread())
        return made(*arguments)

    made = replay.whole
    monkeypatch.setattr(replay, "whole", whole)
    await asyncio.to_thread(context.store.turns.cancel, "default", turn.id)
    with pytest.raises(Conflict):
        await read(sessions, context, turn.id)
    assert threading.main_thread() not in threads
    assert len(threads) == 1

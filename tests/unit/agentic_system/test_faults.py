"""What goes wrong while a turn ends, or is told of: the session goes on, and nothing is done twice."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from stack.agentic_system import accepting
from stack.agentic_system import session as session_module
from stack.agentic_system.local_sessions import LocalSessions
from stack.agentic_system.tools.tool import Call
from stack.api.agentic_system import CancelTurnRequest, TurnState
from stack.context import Context
from stack.errors import Conflict, Unavailable
from stack.store.turns import Journal, Turn
from tests.scripted_agents import Agents, Model, Tool, call, said, seen
from tests.unit.agentic_system.conftest import MakeAgents


async def cancel(agents: Agents, turn: Turn) -> None:
    request = CancelTurnRequest(agent_id=turn.agent_id, turn_id=turn.id)
    await accepting.cancel_turn(agents.context, agents.sessions, request)


async def test_a_cancel_while_the_failure_of_a_turn_is_written_holds_up_nothing(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, is_free = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    fail = Journal.fail

    def slow(rows: Journal, error: dict[str, object]) -> Turn:
        loop.call_soon_threadsafe(writing.set)
        is_free.wait(10)
        return fail(rows, error)

    monkeypatch.setattr(Journal, "fail", slow)
    model.fail_for = lambda body: Unavailable("it is away") if body["messages"][-1]["content"] == "First?" else None
    agents = agents_of()
    session = await agents.session()
    first = await agents.begin(session, "First?")
    await writing.wait()
    await agents.sessions.cancel(agents.context, first.id)
    is_free.set()
    assert said(await agents.turn(session, "Second?")) == "Paris"
    assert (await agents.look(first)).state == TurnState.failed
    await agents.sessions.until_idle()


async def test_a_turn_that_was_cancelled_cancels_nothing_of_the_next(agents_of: MakeAgents, model: Model) -> None:
    """What the next turn waits for is given up elsewhere: that is this turn's failure, and the session lives on."""
    model.hang_for = lambda body: body["messages"][-1]["content"] == "First!"
    model.fail_for = lambda body: (asyncio.CancelledError() if body["messages"][-1]["content"] == "Second?" else None)
    agents = agents_of()
    session = await agents.session()
    first = await agents.begin(session, "First!")
    second = await agents.begin(session, "Second?")
    await seen(agents, first, "step_progress")
    await cancel(agents, first)
    with pytest.raises(Unavailable, match="given up"):
        await agents.events(second)
    assert said(await agents.turn(session, "Third?")) == "Paris"
    assert [(await agents.look(turn)).state for turn in (first, second)] == [TurnState.cancelled, TurnState.failed]


@pytest.mark.parametrize("times", [1, 1_000])
async def test_a_journal_that_no_thread_can_write_is_waited_for_and_then_left(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(session_module, "RETRY_S", 0.001)
    left = times
    agents = agents_of()
    turns = agents.context.store.turns
    journal = turns.journal

    @contextmanager
    def breaking(turn: Turn) -> Iterator[Journal]:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("can't start new thread")
        with journal(turn) as rows:
            yield rows

    monkeypatch.setattr(turns, "journal", breaking)
    turn = await agents.begin(await agents.session(), "Where?")
    if times > 1:
        with pytest.raises(Unavailable, match="goes on later"):
            await agents.events(turn)
        await agents.sessions.until_idle()
        assert (await agents.look(turn)).state == TurnState.running, "another one has to take it up"
        left = 0
    await agents.events(turn)
    assert said(await agents.look(turn)) == "Paris"


async def test_a_session_that_fails_by_our_fault_is_left_and_not_held(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = agents_of()
    turns = agents.context.store.turns
    with monkeypatch.context() as patch:
        patch.setattr(turns, "next_of", lambda _: 1 / 0)
        turn = await agents.begin(await agents.session(), "Where?")
        with pytest.raises(Unavailable, match="goes on later"):
            await agents.events(turn)
        await agents.sessions.until_idle()
    await agents.events(turn)
    assert said(await agents.look(turn)) == "Paris"


class LateSessions(LocalSessions):
    """A pool that has told an actor of a turn, and then does not answer in time."""

    tells = True

    async def start(self, context: Context, turn: Turn, keys: Mapping[str, str]) -> None:
        if self.tells:
            await super().start(context, turn, keys)
            async for _ in self.events(context, turn.id):
                break
            await asyncio.to_thread(self._wait_until_taken, context, turn)
        raise Unavailable("the pool of sessions has not answered")

    def _wait_until_taken(self, context: Context, turn: Turn) -> None:
        self.taken.wait(10)

    taken: threading.Event


async def test_what_is_run_in_spite_of_an_error_is_not_refused(agents_of: MakeAgents, model: Model) -> None:
    taken, is_free = threading.Event(), asyncio.Event()

    async def pay(_: Call) -> str:
        taken.set()
        await is_free.wait()
        return "paid"

    tool = Tool("pay", pay)
    model.script = [call("pay"), "Paid."]
    agents = agents_of(tool)
    sessions = agents.sessions = LateSessions(agents.place)
    sessions.taken = taken
    turn = await agents.begin(await agents.session(), "Pay!")
    is_free.set()
    await agents.events(turn)
    whole = await agents.look(turn)
    assert (whole.state, said(whole), len(tool.called)) == (TurnState.completed, "Paid.", 1)


async def test_what_is_refused_is_not_run(agents_of: MakeAgents, model: Model) -> None:
    agents = agents_of()
    sessions = agents.sessions = LateSessions(agents.place)
    sessions.tells = False
    session = await agents.session()
    with pytest.raises(Unavailable, match="has not answered"):
        await agents.begin(session, "Where?")
    await agents.restart()
    await agents.sessions.until_idle()
    assert not model.asked
    assert said(await agents.turn(session, "And there?")) == "Paris"


async def test_a_cancel_that_reaches_only_the_row_ends_the_turn_at_the_next_step(
    agents_of: MakeAgents, model: Model
) -> None:
    begun, is_free = asyncio.Event(), asyncio.Event()

    async def wait(_: Call) -> str:
        begun.set()
        await is_free.wait()
        return "at last"

    model.script = [call("wait"), call("wait"), "Never."]
    tool = Tool("wait", wait)
    agents = agents_of(tool)
    session = await agents.session()
    turn = await agents.begin(session, "Go!")
    await begun.wait()
    assert await asyncio.to_thread(agents.context.store.turns.cancel, "default", turn.id) == TurnState.running
    is_free.set()
    with pytest.raises(Conflict, match="cancelled"):
        await agents.events(turn)
    whole = await agents.look(turn)
    assert whole.state == TurnState.cancelled
    assert len(tool.called) == len(model.asked) == 1
    model.say = lambda _: "Paris"
    assert said(await agents.turn(session, "And now?")) == "Paris"

"""Sessions in this process: turns behind one another, what the client runs and approves of, cancelling, resuming."""

import asyncio
import itertools
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy.exc import OperationalError

from stack.agentic_system import accepting
from stack.agentic_system import agents as agents_api
from stack.agentic_system import session as session_module
from stack.agentic_system.prompt import UNANSWERED
from stack.agentic_system.tool_calls import DENIED_BY_USER, UNKNOWN
from stack.agentic_system.tools.tool import Call
from stack.api.agentic_system import ApproveTurnRequest, CancelTurnRequest, TurnState
from stack.errors import BadInput, Conflict, NotFound, TooManyRequests, Unavailable
from stack.store.turns import Journal, Turn, Turns
from tests.scripted_agents import (
    Agents,
    Body,
    Model,
    Tool,
    answer_of,
    call,
    contents,
    function,
    payload_of,
    said,
    seen,
)
from tests.unit.agentic_system.conftest import MakeAgents


async def approve(agents: Agents, turn: Turn, approvals: dict[str, bool]) -> None:
    request = ApproveTurnRequest(agent_id=turn.agent_id, turn_id=turn.id, approvals=approvals)
    await accepting.approve_turn(agents.context, agents.sessions, request, {})


async def cancel(agents: Agents, turn: Turn) -> None:
    request = CancelTurnRequest(agent_id=turn.agent_id, turn_id=turn.id)
    await accepting.cancel_turn(agents.context, agents.sessions, request)


def hanging() -> tuple[Tool, asyncio.Event, asyncio.Event]:
    """A tool that hangs, when it has begun, and when it has stopped."""
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def hang(_: Call) -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return "never"

    return Tool("hang", hang), begun, stopped


# What the client runs


async def test_a_clients_function_takes_two_turns(agents_of: MakeAgents, model: Model) -> None:
    model.script = [call("locate", city="Oslo"), "It is in Norway.", "You are welcome."]
    agents = agents_of()
    session = await agents.session([function("locate", {"city": {"param_type": "string"}})])
    first = await agents.turn(session, "Where is Oslo?")
    assert first.output_message is not None
    (asked,) = first.output_message.tool_calls
    assert (asked.tool_name, asked.arguments) == ("locate", {"city": "Oslo"})
    assert [step.step_type for step in first.steps] == ["inference"]
    second = await agents.turn(session, answer_of(asked.call_id, "locate", "Norway"))
    assert said(second) == "It is in Norway."
    roles = [message["role"] for message in model.bodies[1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool"]
    assert model.bodies[1]["messages"][-1]["content"] == "<tool_output>\nNorway\n</tool_output>"
    await agents.turn(session, "Thanks!")
    roles = [message["role"] for message in model.bodies[2]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]


async def test_a_call_that_the_client_does_not_answer_is_told_as_such(agents_of: MakeAgents, model: Model) -> None:
    model.script = [call("locate"), "Never mind."]
    agents = agents_of()
    session = await agents.session([function("locate")])
    await agents.turn(session, "Where is Oslo?")
    await agents.turn(session, "I have found it.")
    told = model.bodies[1]["messages"]
    assert [message["role"] for message in told] == ["system", "user", "assistant", "tool", "user"]
    assert told[3]["content"] == UNANSWERED


async def test_of_mixed_calls_those_of_the_server_are_run_first(agents_of: MakeAgents, model: Model) -> None:
    model.script = [call("weather") + "\n" + call("locate"), "Rain in Norway."]
    tool = Tool("weather")
    agents = agents_of(tool)
    session = await agents.session([function("locate")])
    first = await agents.turn(session, "Where and how?")
    assert [step.step_type for step in first.steps] == ["inference", "tool_execution"]
    assert len(tool.called) == 1
    assert first.output_message is not None
    (asked,) = first.output_message.tool_calls
    assert asked.tool_name == "locate"
    second = await agents.turn(session, answer_of(asked.call_id, "locate", "Norway"))
    assert said(second) == "Rain in Norway."
    assert [message["role"] for message in model.bodies[1]["messages"]] == [
        "system", "user", "assistant", "tool", "tool"
    ]  # fmt: skip


# Approval


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("approves", [False, True])
async def test_calls_await_approval(agents_of: MakeAgents, model: Model, approves: bool, dies: bool) -> None:
    model.script = [call("pay", sum=3) + "\n" + call("look"), "So be it."]
    pay, look = Tool("pay", parameters={"sum": {"param_type": "int"}}), Tool("look")
    agents = agents_of(pay, look)
    turn = await agents.begin(await agents.session(approval=["pay"]), "Pay!")
    before = await agents.events(turn)
    asked = payload_of(before[-1])
    assert asked["event_type"] == "turn_awaiting_approval"
    ((call_id, name),) = [(one["call_id"], one["tool_name"]) for one in asked["tool_calls"]]
    assert name == "pay"
    whole = await agents.look(turn)
    assert whole.state == TurnState.awaiting_approval
    assert [one.call_id for one in whole.awaiting] == [call_id]
    assert not pay.called
    assert not look.called, "it waits for the other"
    again = [event.id for event in await agents.events(turn)]  # from its rows
    assert again == ["start", "1.1.0", "1.1.1", "1.1.2", "1.end", "2.approval"]
    if dies:
        await agents.restart()
    await approve(agents, turn, {call_id: approves})
    events = await agents.events(turn, before[-1].id)
    assert payload_of(events[0])["event_type"] == "step_start"
    whole = await agents.look(turn)
    assert said(whole) == "So be it."
    assert contents(whole) == ['pay says {"sum": 3}' if approves else DENIED_BY_USER, "look says {}"]
    assert len(pay.called) == approves
    assert len(look.called) == 1


async def test_a_turn_that_awaits_approval_can_be_cancelled_and_holds_up_the_next(
    agents_of: MakeAgents, model: Model
) -> None:
    model.say = lambda body: call("pay") if body["messages"][-1]["content"] == "Pay!" else "Hello."
    pay = Tool("pay")
    agents = agents_of(pay)
    session = await agents.session(approval=["pay"])
    first = await agents.begin(session, "Pay!")
    await seen(agents, first, "turn_awaiting_approval")
    second = await agents.begin(session, "Hello!")
    assert (await agents.look(second)).state == TurnState.queued
    await cancel(agents, first)
    assert said(await agents.turn(session, "Hello again!")) == "Hello."
    assert said(await agents.look(second)) == "Hello."
    assert (await agents.look(first)).state == TurnState.cancelled
    assert not pay.called


# Cancelling


async def test_a_turn_is_cancelled_while_a_tool_runs(agents_of: MakeAgents, model: Model) -> None:
    tool, begun, stopped = hanging()
    model.script = [call("hang"), "Never."]
    agents = agents_of(tool)
    turn = await agents.begin(await agents.session(), "Go!")
    await begun.wait()
    await cancel(agents, turn)
    with pytest.raises(Conflict, match="cancelled") as caught:
        await agents.events(turn)
    assert caught.value.code == "cancelled"
    assert stopped.is_set()
    assert tool.closed == 1
    assert (await agents.look(turn)).state == TurnState.cancelled
    with pytest.raises(Conflict, match="cancelled"):
        await agents.events(turn)  # from its rows


async def test_a_turn_is_cancelled_while_the_model_speaks(agents_of: MakeAgents, model: Model) -> None:
    model.hang_for = lambda _: True
    model.say = lambda _: ("I", " say")
    agents = agents_of()
    turn = await agents.begin(await agents.session(), "Go!")
    await seen(agents, turn, "step_progress")
    await cancel(agents, turn)
    with pytest.raises(Conflict, match="cancelled"):
        await agents.events(turn)


async def test_a_cancelled_turn_is_no_part_of_the_conversation(agents_of: MakeAgents, model: Model) -> None:
    model.hang_for = lambda body: body["messages"][-1]["content"] == "Forget this!"
    agents = agents_of()
    session = await agents.session()
    turn = await agents.begin(session, "Forget this!")
    await seen(agents, turn, "step_progress")
    await cancel(agents, turn)
    await agents.turn(session, "Where?")
    assert [message["content"] for message in model.bodies[-1]["messages"]] == ["Be brief.", "Where?"]


async def test_a_turn_that_waits_is_cancelled(agents_of: MakeAgents, model: Model) -> None:
    tool, begun, _ = hanging()
    model.script = [call("hang")]
    agents = agents_of(tool)
    session = await agents.session()
    first = await agents.begin(session, "Go!")
    await begun.wait()
    second = await agents.begin(session, "And then?")
    reading = asyncio.ensure_future(agents.events(second))
    await cancel(agents, second)
    with pytest.raises(Conflict, match="cancelled"):
        await reading
    await cancel(agents, first)
    assert len(model.asked) == 1


# Turns behind one another


async def test_what_cancels_a_turn_that_waits_leaves_the_next_alone(agents_of: MakeAgents, model: Model) -> None:
    """The turn is cancelled in its row while whoever runs the session is about to take it."""
    model.say = lambda _: "Done."
    agents = agents_of()
    session = await agents.session()
    turns = agents.context.store.turns
    take = turns.take

    def late(id: str, owner: str) -> Turn | None:  # as it is called there
        if id == first.id:
            turns.cancel("default", id)
            asyncio.run_coroutine_threadsafe(agents.sessions.cancel(agents.context, id), loop).result()
        return take(id, owner)

    loop = asyncio.get_running_loop()
    turns.take = late  # type: ignore[method-assign]
    first = await agents.begin(session, "Forget this!")
    second = await agents.begin(session, "Do this!")
    assert said(await agents.turn(session, "And this!")) == "Done."
    assert (await agents.look(first)).state == TurnState.cancelled
    assert (await agents.look(second)).state == TurnState.completed
    with pytest.raises(Conflict, match="cancelled"):
        await agents.events(first)


async def test_a_second_turn_waits_and_too_many_are_refused(agents_of: MakeAgents, model: Model) -> None:
    is_free = asyncio.Event()

    async def wait(_: Call) -> str:
        await is_free.wait()
        return "at last"

    model.say = lambda body: call("wait") if body["messages"][-1]["content"] == "Wait!" else "Done."
    agents = agents_of(Tool("wait", wait), agents={"max_queued_turns": 1})
    session = await agents.session()
    first = await agents.begin(session, "Wait!")
    await seen(agents, first, "step_start")
    with pytest.raises(Conflict):
        await agents.begin(session, "Now!", wait=False)
    second = await agents.begin(session, "Then?")
    with pytest.raises(TooManyRequests):
        await agents.begin(session, "And then?")
    assert payload_of(await seen(agents, second, "turn_start"))["turn_id"] == second.id
    assert (await agents.look(second)).state == TurnState.queued
    is_free.set()
    await agents.events(second)
    assert (await agents.look(first)).state == TurnState.completed
    assert [message["content"] for message in model.bodies[-1]["messages"]][-2:] == ["Done.", "Then?"]


async def test_sessions_run_side_by_side(agents_of: MakeAgents, model: Model) -> None:
    both = asyncio.Barrier(2)

    async def meet(_: Call) -> str:
        await both.wait()
        return "met"

    model.script = [call("meet"), "Met."]
    agents = agents_of(Tool("meet", meet))
    sessions = [await agents.session() for _ in range(2)]
    turns = await asyncio.gather(*(agents.turn(session, "Meet!") for session in sessions))
    assert [said(turn) for turn in turns] == ["Met.", "Met."]


async def test_the_model_is_told_of_the_turns_before_as_far_as_there_is_room(
    agents_of: MakeAgents, model: Model
) -> None:
    model.say = lambda body: f"answer {len(body['messages'])}"
    agents = agents_of()
    session = await agents.session()
    for number in range(8):
        turn = await agents.turn(session, f"question {number} " + "word " * 600)
        assert turn.state == TurnState.completed
        if number == 4:
            await agents.restart()  # and then it is read again
    told = [message["content"].split(" word")[0] for message in model.bodies[-1]["messages"]]
    assert told[0] == "Be brief."
    assert told[-1] == "question 7"
    assert 3 <= len(told) < 10, "whole turns, the latest ones"
    assert told[1].startswith("question")
    numbers = [int(one.split()[1]) for one in told if one.startswith("question")]
    assert numbers == list(range(8 - len(numbers), 8))


# Resuming


async def test_events_go_on_behind_each_of_them(agents_of: MakeAgents, model: Model) -> None:
    model.script = [call("look") + "\n" + call("look"), "All is well."]
    agents = agents_of(Tool("look"))
    turn = await agents.begin(await agents.session(), "Look!")
    events = await agents.events(turn)
    ends = {event.id: event for event in events if event.id.endswith("end") or event.id.endswith(".0")}
    await agents.restart()
    for at, event in enumerate(events):
        # From the rows: a step's progress is told shorter, and from its beginning alone; its end has all of it.
        rest = await agents.events(turn, event.id)
        assert [one for one in rest if one.id in ends] == [one for one in events[at + 1 :] if one.id in ends]
    for wrong in ("nothing", "9.1.1", "0.1.1", "-1.1.1", "end.1"):
        with pytest.raises(BadInput, match="no event"):
            await agents.events(turn, wrong)


async def test_nothing_is_missed_by_asking_late(agents_of: MakeAgents, model: Model) -> None:
    agents = agents_of()
    turn = await agents.begin(await agents.session(), "Where?")
    late = agents.sessions.events(agents.context, turn.id)
    await agents.events(turn)
    assert [event.id async for event in late] == ["start", "1.1.0", "1.1.1", "1.end", "end"]


async def test_a_turn_under_way_is_read_by_several_from_wherever_they_are(agents_of: MakeAgents, model: Model) -> None:
    is_free = asyncio.Event()

    async def wait(_: Call) -> str:
        await is_free.wait()
        return "at last"

    model.say = lambda body: call("wait") if len(body["messages"]) == 2 else ("It", " is", " so.")
    agents = agents_of(Tool("wait", wait))
    turn = await agents.begin(await agents.session(), "Wait!")
    first = asyncio.ensure_future(agents.events(turn))
    last = (await seen(agents, turn, "step_progress")).id
    second = asyncio.ensure_future(agents.events(turn, last))
    is_free.set()
    whole, rest = await first, await second
    ids = [event.id for event in whole]
    assert rest == whole[ids.index(last) + 1 :]


async def test_a_turn_goes_on_after_a_restart(agents_of: MakeAgents, model: Model) -> None:
    tool, begun, _ = hanging()
    model.script = [call("hang"), "It is not known."]
    agents = agents_of(tool)
    turn = await agents.begin(await agents.session(), "Go!")
    reading = asyncio.ensure_future(agents.events(turn))
    await begun.wait()
    await agents.restart()
    with pytest.raises(Unavailable, match="goes on later"):
        await reading
    events = await agents.events(turn)
    whole = await agents.look(turn)
    assert contents(whole) == [UNKNOWN]
    assert said(whole) == "It is not known."
    assert len(tool.called) == 1
    assert payload_of(events[-1])["event_type"] == "turn_complete"


@contextmanager
def broken(turns: Turns, monkeypatch: pytest.MonkeyPatch, times: Collection[int]) -> Iterator[None]:
    """A database that is away at the transactions of these numbers in the journal."""
    count, journal = itertools.count(), turns.journal

    @contextmanager
    def breaking(turn: Turn) -> Iterator[Journal]:
        if next(count) in times:
            raise OperationalError("", {}, sqlite3.OperationalError("disk I/O error"))
        with journal(turn) as rows:
            yield rows

    with monkeypatch.context() as patch:
        patch.setattr(turns, "journal", breaking)
        yield


async def test_a_database_that_is_away_for_a_time_is_waited_for(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "RETRY_S", 0.01)
    model.script = [call("look"), "Paris."]
    tool = Tool("look")
    agents = agents_of(tool)
    shield = {"shield_type": "code_scanner_guard", "on_violation_action": 2}
    session = await agents.session(output_shields=[shield])
    with broken(agents.context.store.turns, monkeypatch, {1, 4, 5, 7, 9}):
        turn = await agents.begin(session, "Look!")
        events = await agents.events(turn)
    assert said(await agents.look(turn)) == "Paris."
    told = [payload_of(event) for event in events]
    deltas = [one["model_response_text_delta"] for one in told if "model_response_text_delta" in one]
    assert deltas in (["Paris."], []), "what was lost with an attempt is not told"
    ended = [one for one in told if one["event_type"] == "step_complete"]
    assert [one["step_type"] for one in ended] == ["inference", "tool_execution", "inference", "shield_call"]
    assert len({event.id for event in events}) == len(events)
    assert len(tool.called) <= 1


async def test_a_database_that_stays_away_is_told(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "RETRY_S", 0.001)
    agents = agents_of()
    session = await agents.session()
    with broken(agents.context.store.turns, monkeypatch, range(1_000)):
        turn = await agents.begin(session, "Where?")
        with pytest.raises(Unavailable, match="goes on later"):
            await agents.events(turn)
    assert payload_of((await agents.events(turn))[-1])["event_type"] == "turn_complete"
    assert said(await agents.look(turn)) == "Paris"


async def test_events_of_a_turn_that_nobody_runs_have_it_run(agents_of: MakeAgents) -> None:
    agents = agents_of()
    session = await agents.session()
    sessions, agents.sessions = agents.sessions, agents_of().sessions
    turn = await agents.begin(session, "Where?")  # told to a process that does not know the database
    agents.sessions = sessions
    assert payload_of((await agents.events(turn))[-1])["event_type"] == "turn_complete"


async def test_a_deleted_session_ends_what_runs_in_it(agents_of: MakeAgents, model: Model) -> None:
    tool, begun, stopped = hanging()
    model.script = [call("hang")]
    agents = agents_of(tool)
    session = await agents.session()
    turn = await agents.begin(session, "Go!")
    reading = asyncio.ensure_future(agents.events(turn))
    await begun.wait()
    await agents_api.delete_session(agents.context, agents.sessions, *session)
    with pytest.raises(Conflict, match="deleted"):
        await reading
    assert stopped.is_set()
    with pytest.raises(NotFound):
        await agents.events(turn)


async def test_another_tenants_turn_is_not_found(agents_of: MakeAgents) -> None:
    agents = agents_of()
    turn = await agents.begin(await agents.session(), "Where?")
    await agents.events(turn)
    others = agents.context.of_tenant("others")
    with pytest.raises(NotFound):
        await anext(agents.sessions.events(others, turn.id))


async def test_a_turn_fails_by_what_its_model_fails_by(agents_of: MakeAgents, model: Model) -> None:
    def fail(_: Body) -> BaseException | None:
        return Unavailable("the model is away")

    agents = agents_of()
    session = await agents.session()
    model.fail_for = fail
    turn = await agents.begin(session, "Where?")
    with pytest.raises(Unavailable, match="the model is away"):
        await agents.events(turn)
    whole = await agents.look(turn)
    assert whole.state == TurnState.failed
    assert whole.error is not None
    assert whole.error.code == "unavailable"
    with pytest.raises(Unavailable, match="the model is away"):
        await agents.events(turn)
    model.fail_for = lambda _: None
    assert said(await agents.turn(session, "And now?")) == "Paris"

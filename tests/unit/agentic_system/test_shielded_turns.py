"""Shields of agents and of their tools: what they judge, and what becomes of a violation.

The shield is the code scanner, which needs no model: it finds code that runs a shell.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from stack import safety as agents_safety
from stack.agentic_system import accepting
from stack.agentic_system.sessions import Event
from stack.agentic_system.tools.tool import Call
from stack.agentic_system.withheld import UNJUDGED
from stack.api.agentic_system import CancelTurnRequest, TurnState
from stack.errors import Conflict, StackError, Unavailable
from tests.scripted_agents import Body, Model, Tool, answer_of, call, contents, function, payload_of, said
from tests.unit.agentic_system.conftest import MakeAgents

EVIL = "import os\nos.system('rm -r ' + folder)"
IGNORE, WARN, RAISE = 0, 1, 2


SHIELDS = [{"id": name, "type": "code_scanner_guard"} for name in ("code_scanner_guard", "second", "third")]


def shield(action: int, name: str = "code_scanner_guard") -> dict[str, Any]:
    return {"shield_type": name, "on_violation_action": action}


@pytest.mark.parametrize("action", [IGNORE, WARN])
async def test_a_violation_of_the_input_is_told_and_the_turn_goes_on(
    agents_of: MakeAgents, caplog: pytest.LogCaptureFixture, action: int
) -> None:
    agents = agents_of()
    session = await agents.session(input_shields=[shield(action)])
    with caplog.at_level(logging.INFO, "ray.serve"):
        turn = await agents.turn(session, EVIL)
    assert said(turn) == "Paris"
    step = turn.steps[0]
    assert step.step_type == "shield_call"
    assert step.response.is_violation
    levels = [record.levelno for record in caplog.records if "verdict=violation" in record.message]
    assert levels == [logging.WARNING if action == WARN else logging.INFO]


async def test_a_violation_of_the_input_ends_the_turn(agents_of: MakeAgents, model: Model) -> None:
    agents = agents_of()
    turn = await agents.turn(await agents.session(input_shields=[shield(RAISE)]), EVIL)
    assert turn.state == TurnState.completed
    (step,) = turn.steps
    assert step.step_type == "shield_call"
    assert said(turn) == step.response.violation_return_message
    assert not model.asked


async def test_each_shield_is_a_step_and_the_first_violation_ends_the_turn(agents_of: MakeAgents, model: Model) -> None:
    agents = agents_of(shields=SHIELDS)
    shields = [shield(WARN), shield(RAISE, "second"), shield(RAISE, "third")]
    turn = await agents.turn(await agents.session(input_shields=shields), EVIL)
    assert [step.step_type for step in turn.steps] == ["shield_call"] * 2
    assert not model.asked


async def test_of_a_conversation_only_what_is_new_is_judged(agents_of: MakeAgents, model: Model) -> None:
    model.say = lambda _: "Paris"
    agents = agents_of()
    session = await agents.session()
    await agents.turn(session, EVIL)
    turn = await agents.turn(session, "Where?", input_shields=[shield(RAISE)], output_shields=[shield(RAISE)])
    assert said(turn) == "Paris"


@pytest.mark.parametrize("action", [IGNORE, WARN])
async def test_a_violation_of_the_output_is_told(agents_of: MakeAgents, model: Model, action: int) -> None:
    model.script = [EVIL]
    agents = agents_of()
    turn = await agents.turn(await agents.session(output_shields=[shield(action)]), "Write!")
    assert said(turn) == EVIL
    step = turn.steps[-1]
    assert step.step_type == "shield_call"
    assert step.response.is_violation


async def test_nobody_sees_an_answer_that_a_shield_does_not_let_pass(agents_of: MakeAgents, model: Model) -> None:
    model.say = lambda _: tuple(EVIL)
    agents = agents_of(shields=SHIELDS)
    turn = await agents.begin(await agents.session(output_shields=[shield(WARN), shield(RAISE, "second")]), "Write!")
    events = await agents.events(turn)
    whole = await agents.look(turn)
    judged = whole.steps[-1]
    assert judged.step_type == "shield_call"
    assert said(whole) == judged.response.violation_return_message
    step = whole.steps[0]
    assert step.step_type == "inference"
    assert step.model_response.content == said(whole)
    await agents.restart()
    again = await agents.events(turn)
    told = [*(event.data for event in events), *(event.data for event in again), whole.model_dump_json()]
    assert not any("rm -r" in one for one in told)
    assert not any("model_response_text_delta" in event.data for event in events)
    assert [event.id for event in events] == [event.id for event in again if "step_progress" not in event.data]
    # Nor is the model told of it in the next turn.
    model.say = lambda _: "Paris"
    await agents.turn((turn.agent_id, turn.session_id), "Where?")
    assert "rm -r" not in str(model.bodies[-1])


async def test_an_answer_is_held_back_until_it_has_passed(agents_of: MakeAgents, model: Model) -> None:
    model.script = [call("look"), "Paris is big."]
    agents = agents_of(Tool("look"))
    session = await agents.session(output_shields=[shield(RAISE)])
    turn = await agents.begin(session, "Where?")
    events = [payload_of(event) for event in await agents.events(turn)]
    kinds = [one["event_type"] for one in events if one["event_type"] != "step_progress"]
    assert kinds == ["turn_start", *["step_start", "step_complete"] * 4, "turn_complete"]
    deltas = [one["model_response_text_delta"] for one in events if "model_response_text_delta" in one]
    assert deltas == ["Paris is big."]


async def test_an_answer_that_is_not_judged_yet_is_held_back_after_a_restart_too(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.script = [EVIL]
    agents = agents_of()
    judging, is_free = asyncio.Event(), asyncio.Event()
    judge = agents_safety.judge

    async def slow(*given: Any) -> Any:
        judging.set()
        await is_free.wait()
        return await judge(*given)

    monkeypatch.setattr(agents_safety, "judge", slow)
    turn = await agents.begin(await agents.session(output_shields=[shield(RAISE)]), "Write!")
    await judging.wait()
    judging.clear()
    await agents.restart()
    reading = asyncio.ensure_future(agents.events(turn))
    await judging.wait()
    stream = agents.sessions.events(agents.context, turn.id)
    seen_so_far = [await anext(stream) for _ in range(2)]
    assert [event.id for event in seen_so_far] == ["start", "1.1.0"]
    is_free.set()
    assert "rm -r" not in str(await reading)
    assert "rm -r" not in str([event async for event in stream])


async def test_an_answer_that_cannot_be_judged_is_not_shown(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("the shield is away")

    monkeypatch.setattr(agents_safety, "judge", away)
    model.script = [EVIL]
    agents = agents_of()
    turn = await agents.begin(await agents.session(output_shields=[shield(RAISE)]), "Write!")
    told = await until(agents.sessions.events(agents.context, turn.id), Unavailable)
    await agents.restart()
    told += await until(agents.sessions.events(agents.context, turn.id), Unavailable)
    assert UNJUDGED in told
    assert "rm -r" not in told
    assert "rm -r" not in (await agents.look(turn)).model_dump_json()


async def until(events: AsyncGenerator[Event], error: type[StackError]) -> str:
    """All that is told before an error."""
    told = ""
    try:
        async for event in events:
            told += event.data
    except error:
        return told
    raise AssertionError("the turn has not ended by an error")


async def test_what_has_come_of_an_answer_is_not_shown_where_the_turn_is_cancelled(
    agents_of: MakeAgents, model: Model
) -> None:
    model.say = lambda _: (EVIL, "more")
    is_there = asyncio.Event()

    def hang(_: Body) -> bool:
        is_there.set()
        return True

    model.hang_for = hang
    agents = agents_of()
    turn = await agents.begin(await agents.session(output_shields=[shield(RAISE)]), "Write!")
    events = agents.sessions.events(agents.context, turn.id)
    await is_there.wait()
    await accepting.cancel_turn(
        agents.context, agents.sessions, CancelTurnRequest(agent_id=turn.agent_id, turn_id=turn.id)
    )
    assert "rm -r" not in await until(events, Conflict)


async def test_a_shield_that_cannot_judge_fails_the_turn(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("the shield is away")

    monkeypatch.setattr(agents_safety, "judge", away)
    agents = agents_of()
    turn = await agents.begin(await agents.session(input_shields=[shield(WARN)]), "Where?")
    with pytest.raises(Unavailable, match="the shield is away"):
        await agents.events(turn)
    assert not model.asked


# Of tools


def guarded(tool: Tool, **shields: Any) -> dict[str, Any]:
    return tool.config | shields


@pytest.mark.parametrize(("action", "runs"), [(IGNORE, True), (WARN, True), (RAISE, False)])
async def test_a_tools_arguments_are_judged(agents_of: MakeAgents, model: Model, action: int, runs: bool) -> None:
    tool = Tool("run", parameters={"code": {"param_type": "string"}})
    model.script = [call("run", code=EVIL), "So be it."]
    agents = agents_of(tool)
    session = await agents.session()
    turn = await agents.turn(session, "Run!", tools=[guarded(tool, input_shields=[shield(action)])])
    assert bool(tool.called) is runs
    (content,) = contents(turn)
    assert content.startswith("run says" if runs else "The shield 'code_scanner_guard' does not pass the arguments")
    assert said(turn) == "So be it."


@pytest.mark.parametrize(("action", "passes"), [(IGNORE, True), (WARN, True), (RAISE, False)])
async def test_a_tools_output_is_judged(agents_of: MakeAgents, model: Model, action: int, passes: bool) -> None:
    async def answer(asked: Call) -> str:
        asked.tell(EVIL)
        return EVIL

    tool = Tool("read", answer)
    model.script = [call("read"), "So be it."]
    agents = agents_of(tool)
    session = await agents.session()
    turn = await agents.begin(session, "Read!", tools=[guarded(tool, output_shields=[shield(action)])])
    events = await agents.events(turn)
    (content,) = contents(await agents.look(turn))
    assert (content == EVIL) is passes
    assert ("rm -r" in str(events)) is passes
    assert ("rm -r" in str(model.bodies[-1])) is passes


@pytest.mark.parametrize("is_about_output", [False, True])
async def test_what_a_shield_cannot_judge_is_not_run_or_not_told(
    agents_of: MakeAgents, model: Model, monkeypatch: pytest.MonkeyPatch, is_about_output: bool
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("it is away")

    monkeypatch.setattr(agents_safety, "judge", away)
    tool = Tool("read")
    side = "output_shields" if is_about_output else "input_shields"
    model.script = [call("read"), "So be it."]
    agents = agents_of(tool)
    turn = await agents.turn(await agents.session(), "Read!", tools=[guarded(tool, **{side: [shield(WARN)]})])
    (content,) = contents(turn)
    assert "could not judge" in content
    assert len(tool.called) == is_about_output


async def test_the_shields_of_a_clients_function(agents_of: MakeAgents, model: Model) -> None:
    """Its arguments are judged before the client is asked, what it answers before the model is."""
    parameters = {"code": {"param_type": "string"}}
    tool = function("run", parameters, input_shields=[shield(RAISE)], output_shields=[shield(RAISE)])
    model.script = [call("run", code=EVIL), call("run", code="1 + 1"), "never"]
    agents = agents_of()
    session = await agents.session([tool])
    turn = await agents.turn(session, "Run!")
    assert [step.step_type for step in turn.steps] == ["inference", "tool_execution"] * 2
    assert "does not pass the arguments" in contents(turn)[0]
    assert turn.output_message is not None
    (asked,) = turn.output_message.tool_calls
    assert asked.arguments == {"code": "1 + 1"}
    turn = await agents.turn(session, answer_of(asked.call_id, "run", EVIL))
    assert [step.step_type for step in turn.steps] == ["shield_call"]
    assert len(model.asked) == 2


# Words beside calls


async def test_words_beside_a_call_of_the_client_are_judged(agents_of: MakeAgents, model: Model) -> None:
    model.script = [f"{EVIL}\n{call('locate')}", "never"]
    agents = agents_of()
    session = await agents.session([function("locate")], output_shields=[shield(RAISE)])
    turn = await agents.begin(session, "Where?")
    events = await agents.events(turn)
    whole = await agents.look(turn)
    assert [step.step_type for step in whole.steps] == ["inference", "shield_call"]
    assert whole.output_message is not None
    assert not whole.output_message.tool_calls
    assert "rm -r" not in str(events) + whole.model_dump_json()


async def test_words_beside_a_call_that_is_run_are_judged_before(agents_of: MakeAgents, model: Model) -> None:
    tool = Tool("look")
    model.script = [f"{EVIL}\n{call('look')}", "never"]
    agents = agents_of(tool)
    turn = await agents.begin(await agents.session(output_shields=[shield(RAISE)]), "Look!")
    events = await agents.events(turn)
    whole = await agents.look(turn)
    assert "rm -r" not in str(events) + whole.model_dump_json()
    assert not tool.called
    model.script = [f"I look.\n{call('look')}", "Seen."]
    whole = await agents.turn(await agents.session(output_shields=[shield(RAISE)]), "Look!")
    kinds = ["inference", "shield_call", "tool_execution", "inference", "shield_call"]
    assert [step.step_type for step in whole.steps] == kinds
    assert said(whole) == "Seen."

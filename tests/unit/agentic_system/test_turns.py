"""Turns of sessions that run in this process, on a scripted model and scripted tools."""

from stack.api.agentic_system import TurnState
from tests.scripted_agents import Model, Tool, call, payload_of
from tests.unit.agentic_system.conftest import MakeAgents


async def test_a_question_is_answered(agents_of: MakeAgents, model: Model) -> None:
    agents = agents_of()
    turn = await agents.turn(await agents.session(), "Where?")
    assert turn.state == TurnState.completed
    assert turn.output_message is not None
    assert turn.output_message.content == "Paris"
    assert [step.step_type for step in turn.steps] == ["inference"]
    assert [message["role"] for message in model.bodies[0]["messages"]] == ["system", "user"]


async def test_a_tool_is_run_and_the_model_told_what_it_gave(agents_of: MakeAgents, model: Model) -> None:
    tool = Tool("weather", parameters={"city": {"param_type": "string"}})
    model.script = [call("weather", city="Oslo"), "It rains."]
    agents = agents_of(tool)
    turn = await agents.turn(await agents.session(), "And there?")
    assert turn.output_message is not None
    assert turn.output_message.content == "It rains."
    assert [step.step_type for step in turn.steps] == ["inference", "tool_execution", "inference"]
    executed = turn.steps[1]
    assert executed.step_type == "tool_execution"
    assert executed.tool_responses[0].content == 'weather says {"city": "Oslo"}'
    told = model.bodies[1]["messages"][-1]
    assert told["role"] == "tool"
    assert told["content"] == '<tool_output>\nweather says {"city": "Oslo"}\n</tool_output>'
    assert tool.closed == 1


async def test_events_of_a_turn(agents_of: MakeAgents, model: Model) -> None:
    model.script = [call("weather"), "It rains."]
    agents = agents_of(Tool("weather"))
    turn = await agents.begin(await agents.session(), "And there?")
    events = await agents.events(turn)
    kinds = [payload_of(event)["event_type"] for event in events]
    assert kinds[0] == "turn_start"
    assert kinds[-1] == "turn_complete"
    assert [kind for kind in kinds if not kind.endswith("progress")] == [
        "turn_start", *["step_start", "step_complete"] * 3, "turn_complete"
    ]  # fmt: skip
    ids = [event.id for event in events]
    assert len(set(ids)) == len(ids)
    assert payload_of(events[-1])["turn"]["output_message"]["content"] == "It rains."

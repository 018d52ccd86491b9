"""kill -9 of everything that a turn runs on: it goes on behind the last step that has ended, and ends once."""

from typing import Any

import httpx
import pytest

from tests.agent_clients import CODE, Agent, calls
from tests.running_stack import SCRIPTED, Stack, wait_for

pytestmark = pytest.mark.long
GATEWAY = "ServeReplica:gateway:Gateway"
POOL = "ServeReplica:gateway:SessionPool"
ENGINE = "ray::SharedEngine"
ACTOR = "ray::SessionActor"
# The tool is run once, whatever happens behind it; the model's answer to what it says is one token a second.
SLOWLY = calls("code_interpreter", code="print('fault:slow')")
TOKENS = 3


@pytest.fixture(autouse=True)
def scripted(stack: Stack) -> None:
    """Has a replica of the scripted model started."""
    wait_for(lambda: answers(stack), 240)


def answers(stack: Stack) -> bool:
    body = {"model": SCRIPTED, "messages": [{"role": "user", "content": "Hello"}]}
    try:
        with stack.client() as client:
            return client.post("/v1/chat/completions", json=body).status_code == 200
    except httpx.TransportError:
        return False


def until_the_last_step(agent: Agent) -> str:
    """Begins a turn, and leaves it while its last step is under way. Returns its id."""
    events = agent.events(SLOWLY, sampling_params={"strategy": "greedy", "max_tokens": TOKENS})
    _, start = next(events)
    assert any(event_id == "3.1.1" for event_id, _ in events)
    events.close()
    return str(start["turn_id"])


def ended(stack: Stack, agent: Agent, turn_id: str) -> dict[str, Any]:
    """The turn once it has ended, by a connection of its own."""

    def look() -> dict[str, Any] | None:
        try:
            with stack.client() as client:
                agent.client = client
                turn = agent.get_turn(turn_id)
        except httpx.TransportError:
            return None
        assert turn["state"] in ("running", "queued", "completed"), turn
        return turn if turn["state"] == "completed" else None

    found: dict[str, Any] = wait_for(look, 120)
    return found


def assert_whole(turn: dict[str, Any]) -> None:
    assert [step["step_type"] for step in turn["steps"]] == ["inference", "tool_execution", "inference"]
    assert turn["output_message"]["content"] == "Paris is big."


@pytest.mark.parametrize("part", [ACTOR, POOL, ENGINE, GATEWAY])
def test_a_turn_survives_a_part_of_the_stack(stack: Stack, part: str) -> None:
    with stack.client() as client:
        agent = Agent(client, SCRIPTED, tools=[CODE])
        turn_id = until_the_last_step(agent)
        stack.kill_9(part)
    assert_whole(ended(stack, agent, turn_id))
    wait_for(lambda: answers(stack), 120)
    with stack.client() as client:
        agent.client = client
        assert agent.turn("And now?")["output_message"]["content"] == "Paris is big."
        told = [event_id for event_id, _ in agent.events_of(turn_id, after="2.end")]
        assert told[-2:] == ["3.end", "end"]


def test_turns_survive_all_of_ray(stack: Stack) -> None:
    with stack.client() as client:
        agent = Agent(client, SCRIPTED, tools=[CODE])
        waiting = Agent(client, SCRIPTED, tools=[CODE])
        turn_id = until_the_last_step(agent)
        waiting_id = until_the_last_step(waiting)
    stack.kill()
    stack.start()
    wait_for(lambda: answers(stack), 240)
    assert_whole(ended(stack, agent, turn_id))
    assert_whole(ended(stack, waiting, waiting_id))

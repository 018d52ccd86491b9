"""Turns of agents, which are run by actors of Ray, on the real model and on a scripted one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from llama_stack import LlamaStack

from tests.agent_clients import CODE, Agent, calls
from tests.memory import document
from tests.running_stack import MODEL, SCRIPTED, Stack, wait_for

ACTOR = "ray::SessionActor"
MOST_BYTES = 120e6  # of an actor, which it shares with nothing
WEATHER = {
    "type": "function_call",
    "function_name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"city": {"param_type": "string", "description": "The city", "required": True}},
}
CURIE = "Marie Curie was born in Warsaw."
# Its answer to what the code says is one token a second.
SLOWLY = calls("code_interpreter", code="print('fault:slow')")
MakeAgent = Callable[..., Agent]


@pytest.fixture
def agent_of(client: httpx.Client) -> MakeAgent:
    return lambda model=SCRIPTED, **config: Agent(client, model, **config)


@pytest.fixture(scope="module", autouse=True)
def scripted(stack: Stack) -> None:
    """Has a replica of the scripted model started, which nobody may have asked before."""
    body = {"model": SCRIPTED, "messages": [{"role": "user", "content": "Hello"}]}
    with stack.client() as client:
        wait_for(lambda: client.post("/v1/chat/completions", json=body).status_code == 200, 120)


def kinds(turn: dict[str, Any]) -> list[str]:
    return [step["step_type"] for step in turn["steps"]]


def test_a_calculator(agent_of: MakeAgent) -> None:
    turn = agent_of(tools=[CODE]).turn(calls("code_interpreter", code="print(6 * 7)"))
    assert kinds(turn) == ["inference", "tool_execution", "inference"]
    (response,) = turn["steps"][1]["tool_responses"]
    assert response["content"].strip() == "42"
    assert turn["output_message"]["content"] == "Paris is big."


def test_a_calculator_by_the_real_model(agent_of: MakeAgent) -> None:
    """It has to call the tool, and would call it for ever: a bound of the turn ends that."""
    sampling = {"strategy": "greedy", "max_tokens": 60}
    agent = agent_of(MODEL, tools=[CODE], tool_choice="required", sampling_params=sampling)
    turn = agent.turn("What is 6 * 7?")
    assert kinds(turn)[:2] == ["inference", "tool_execution"]
    (call,) = turn["steps"][1]["tool_calls"]
    (response,) = turn["steps"][1]["tool_responses"]
    assert (call["tool_name"], set(call["arguments"])) == ("code_interpreter", {"code"})
    assert response["content"].strip() == "42"
    assert kinds(turn)[-1] == "inference"
    assert turn["output_message"]["content"]


def test_a_function_of_the_client_over_two_turns(agent_of: MakeAgent) -> None:
    sampling = {"strategy": "greedy", "max_tokens": 60}
    agent = agent_of(MODEL, tools=[WEATHER], tool_choice="required", sampling_params=sampling)
    turn = agent.turn("How is the weather in Paris?")
    (call,) = turn["output_message"]["tool_calls"]
    assert (call["tool_name"], set(call["arguments"])) == ("get_weather", {"city"})
    answer = {"role": "ipython", "call_id": call["call_id"], "tool_name": "get_weather", "content": "It is sunny."}
    turn = agent.turn(answer, tool_choice="auto")
    assert set(kinds(turn)) == {"inference"}
    assert turn["output_message"]["content"]
    told = agent.post(f"session/get?agent_id={agent.id}&session_id={agent.session}")
    assert [one["turn_id"] for one in told["turns"]][-1] == turn["turn_id"]


def test_what_banks_know_is_cited(agent_of: MakeAgent) -> None:
    agent = agent_of()
    bank = agent.client.post("/memory_banks/create", json={"name": "lives", "config": {"type": "keyword"}}).json()
    documents = [document("curie", CURIE), document("river", "The Danube flows through Vienna.")]
    given = {"bank_id": bank["bank_id"], "documents": documents}
    assert agent.client.post("/memory_bank/insert", json=given).status_code == 200
    memory = {"type": "memory", "memory_bank_configs": [{"type": "keyword", "bank_id": bank["bank_id"]}]}
    attached = {"content": "Irène Curie was born in Paris.", "mime_type": "text/plain"}
    agent = agent_of(MODEL, tools=[memory], sampling_params={"strategy": "greedy", "max_tokens": 20})
    turn = agent.turn("Where was Curie born?", attachments=[attached])
    assert kinds(turn) == ["memory_retrieval", "inference"]
    step = turn["steps"][0]
    assert CURIE in step["inserted_context"]
    assert "Irène" in step["inserted_context"]
    assert "Danube" not in step["inserted_context"]
    cited = {(one["bank_id"], one["document_id"]) for one in step["citations"]}
    assert (bank["bank_id"], "curie") in cited
    assert len(cited) == 2


def test_the_rfcs_client(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=120) as http:
        rfc = LlamaStack(base_url=stack.url, http_client=http)
        config: Any = {"model": MODEL, "instructions": "Be brief.", "sampling_params": {"max_tokens": 8}}
        agent_id = rfc.agentic_system.create(agent_config=config).agent_id
        session_id = rfc.agentic_system.sessions.create(agent_id=agent_id, session_name="talk").session_id
        asked: Any = {"agent_id": agent_id, "session_id": session_id}
        messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
        chunks: Any = rfc.agentic_system.turns.create(**asked, messages=messages, stream=True)
        payloads: list[Any] = [chunk.event.payload for chunk in chunks]
        names = [payload.event_type for payload in payloads]
        assert [name for name in names if name != "step_progress"] == [
            "turn_start", "step_start", "step_complete", "turn_complete"
        ]  # fmt: skip
        said = "".join(
            payload.text_delta_model_response or "" for payload in payloads if "progress" in payload.event_type
        )
        turn = payloads[-1].turn
        assert turn.output_message.content
        assert said == turn.output_message.content
        whole: Any = rfc.agentic_system.turns.create(**asked, messages=messages)
        session = rfc.agentic_system.sessions.retrieve(**asked)
        assert len(session.turns) == 2
        assert rfc.agentic_system.turns.retrieve(agent_id=agent_id, turn_id=turn.turn_id).turn_id == turn.turn_id
        rfc.agentic_system.sessions.delete(**asked)
        rfc.agentic_system.delete(agent_id=agent_id)
        assert whole


def test_a_turn_goes_on_when_its_actor_is_killed(stack: Stack, agent_of: MakeAgent) -> None:
    agent = agent_of(tools=[CODE])
    told = []
    for event in agent.events(SLOWLY):
        told.append(event)
        if event[0] == "3.1.1":  # the tool has run, and the model answers
            stack.kill_9(ACTOR)
    ids = [event_id for event_id, _ in told]
    payload = told[-1][1]
    assert payload["event_type"] == "turn_complete"
    assert "3.2.0" in ids, "the step that was broken off has begun again"
    assert not [one for one in ids if one.startswith(("1.2", "2.2"))], "those that had ended have not"
    assert kinds(payload["turn"]) == ["inference", "tool_execution", "inference"]
    assert payload["turn"]["output_message"]["content"] == "Paris is big."
    assert agent.turn("And now?")["output_message"]["content"] == "Paris is big."


def test_another_connection_goes_on_with_the_events(agent_of: MakeAgent) -> None:
    agent = agent_of(tools=[CODE])
    events = agent.events(SLOWLY)
    _, start = next(events)
    seen = []
    for event_id, _ in events:
        seen.append(event_id)
        if event_id == "3.1.1":
            break
    events.close()  # the client leaves, which does not end the turn
    rest = list(agent.events_of(start["turn_id"], after=seen[-1]))
    assert [event_id for event_id, _ in rest] == ["3.1.2", "3.1.3", "3.end", "end"]
    assert next(agent.events_of(start["turn_id"]))[0] == "start"


def test_a_turn_is_cancelled_and_the_next_one_run(agent_of: MakeAgent) -> None:
    agent = agent_of()
    events = agent.events("fault:hang-after-1")
    _, start = next(events)
    for event_id, _ in events:
        if event_id == "1.1.1":
            asked = agent.post("turn/cancel", agent_id=agent.id, turn_id=start["turn_id"])
            assert asked["state"] == "running"
            break
    (_, last) = list(events)[-1]
    assert last["error"]["code"] == "cancelled"
    assert agent.get_turn(start["turn_id"])["state"] == "cancelled"
    assert agent.turn("And now?")["output_message"]["content"] == "Paris is big."


def test_turns_of_several_sessions_run_at_once_and_actors_without_work_end(stack: Stack, agent_of: MakeAgent) -> None:
    agent = agent_of(MODEL, sampling_params={"strategy": "greedy", "max_tokens": 20})
    sessions = [agent.new_session() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        turns = list(threads.map(lambda one: agent.turn("Count to ten.", session_id=one), sessions))
    assert [turn["session_id"] for turn in turns] == sessions
    assert all(process.memory_full_info().uss < MOST_BYTES for process in stack.processes(ACTOR))
    wait_for(lambda: len(stack.processes(ACTOR)) == 1, 60, lambda: stack.processes(ACTOR))
    assert agent.turn("Again.")["output_message"]["content"]

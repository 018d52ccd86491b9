"""Turns over HTTP as they are run: by sessions of this process, on a scripted model."""

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from llama_stack import LlamaStack

from serve_apps import gateway
from stack.context import Context
from stack.errors import Unavailable
from tests.api.conftest import HERE, URL
from tests.api.envelope import checked, error_of
from tests.api.test_agentic_system import Agent, events_of, types_of
from tests.scripted_agents import Body, Model, call, function, open_context

CONFIG: dict[str, Any] = {"model": "small", "instructions": "Be brief."}
WEATHER = function("get_weather", {"city": {"param_type": "string"}})
SECONDS = 30


@pytest.fixture
def model() -> Model:
    return Model("Paris")


@pytest.fixture
def context(home: Path, store_url: str, model: Model) -> Iterator[Context]:
    context = open_context(store_url, model)
    yield context
    context.close()


@pytest.fixture
def app(context: Context) -> FastAPI:
    async def ready() -> dict[str, str]:
        return {}

    return gateway.create_app(context, ready)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False, client=HERE, base_url=URL) as client:
        yield client


def is_progress(event: tuple[str | None, Any]) -> bool:
    return bool(event[1]["event"]["payload"]["event_type"] == "step_progress")


def text_of(event: Any) -> str:
    """What is new of the model's text in an event."""
    return str(event["event"]["payload"].get("model_response_text_delta", ""))


def test_a_turn_is_answered(client: TestClient) -> None:
    turn = Agent(client, CONFIG).turn().json()
    assert (turn["state"], turn["output_message"]["content"]) == ("completed", "Paris")


def test_the_events_of_a_turn_are_as_documented_and_can_be_resumed_anywhere(
    app: FastAPI, client: TestClient, model: Model
) -> None:
    model.say = lambda _: ("It ", "rains ", "here.")
    agent = Agent(
        client, CONFIG | {"output_shields": [{"shield_type": "code_scanner_guard", "on_violation_action": 1}]}
    )
    events = events_of(agent.turn(stream=True))
    document = app.openapi()
    schema = document["components"]["schemas"]["AgenticSystemTurnResponseStreamChunk"]
    validator = jsonschema_rs.validator_for({"components": document["components"], **schema})
    for _, event in events:
        validator.validate(event)
    assert types_of(events)[0] == "turn_start"
    payloads = [event["event"]["payload"] for _, event in events]
    text = "".join(text_of(event) for _, event in events)
    assert text == payloads[-1]["turn"]["output_message"]["content"] == "It rains here."
    turn_id = payloads[0]["turn_id"]
    first = next(number for number, one in enumerate(events) if is_progress(one))
    before_it = {place for place, _ in events[:first]}
    for number, (place, _) in enumerate(events):
        assert place is not None
        rest = events_of(agent.get("turn/events", turn_id=turn_id, after=place)) if place != "end" else []
        # Progress is told again from the beginning of its step alone; else the end of the step has all of it.
        assert [one for one in rest if not is_progress(one)] == [
            one for one in events[number + 1 :] if not is_progress(one)
        ]
        told = "".join(text_of(event) for _, event in rest)
        assert told == ("It rains here." if place in before_it else "")
    ((_, last),) = events_of(agent.get("turn/events", turn_id=turn_id, after="9.9.9"))
    assert checked(last)["param"] == "after"


def test_a_function_is_called_by_the_client_over_two_turns(client: TestClient, model: Model) -> None:
    agent = Agent(client, CONFIG | {"tools": [WEATHER]})
    model.script = [call("get_weather", city="Paris"), "It is sunny."]
    first = agent.turn().json()
    (called,) = first["output_message"]["tool_calls"]
    assert (called["tool_name"], called["arguments"]) == ("get_weather", {"city": "Paris"})
    answer = {"role": "ipython", "call_id": called["call_id"], "tool_name": "get_weather", "content": "sunny"}
    second = agent.turn(messages=[answer]).json()
    assert second["output_message"]["content"] == "It is sunny."
    assert [turn["turn_id"] for turn in agent.get_session({}).json()["turns"]] == [first["turn_id"], second["turn_id"]]


def test_a_model_that_is_away_fails_the_turn_and_the_request(client: TestClient, model: Model) -> None:
    agent = Agent(client, CONFIG)
    model.fail_for = lambda _: Unavailable("the model is away")
    assert "the model is away" in error_of(agent.turn(), 503)["message"]
    events = events_of(agent.turn(stream=True))
    assert checked(events[-1][1])["code"] == "unavailable"
    assert [turn["state"] for turn in agent.get_session({}).json()["turns"]] == ["failed", "failed"]


class Held:
    """A model that begins to answer, and does not end. `asked` is set then."""

    def __init__(self, model: Model) -> None:
        self.asked = threading.Event()
        model.hang_for = self._hangs

    def _hangs(self, _: Body) -> bool:
        self.asked.set()
        return True


def in_thread(agent: Agent, replies: list[Any], **fields: Any) -> threading.Thread:
    """A turn that is asked for meanwhile."""
    thread = threading.Thread(target=lambda: replies.append(agent.turn(**fields)))
    thread.start()
    return thread


@pytest.mark.parametrize("stream", [True, False])
def test_a_turn_that_runs_is_cancelled(client: TestClient, model: Model, stream: bool) -> None:
    agent, held, replies = Agent(client, CONFIG), Held(model), list[Any]()
    thread = in_thread(agent, replies, stream=stream)
    assert held.asked.wait(SECONDS)
    (turn,) = agent.get_session({}).json()["turns"]
    assert turn["state"] == "running"
    assert error_of(agent.turn(wait=False), 409)["code"] == "busy"
    assert agent.post("turn/cancel", turn_id=turn["turn_id"]).status_code == 200
    thread.join(SECONDS)
    (reply,) = replies
    error = checked(events_of(reply)[-1][1]) if stream else error_of(reply, 409)
    assert error["code"] == "cancelled"
    assert agent.get("turn/get", turn_id=turn["turn_id"]).json()["state"] == "cancelled"
    model.hang_for = lambda _: False
    assert agent.turn().json()["state"] == "completed"


@pytest.mark.parametrize("path", ["session/delete", "delete"])
def test_what_runs_in_a_session_that_is_deleted_ends(client: TestClient, model: Model, path: str) -> None:
    agent, held, replies = Agent(client, CONFIG), Held(model), list[Any]()
    thread = in_thread(agent, replies, stream=True)
    assert held.asked.wait(SECONDS)
    reply = agent.post(path, **({"session_id": agent.session} if path == "session/delete" else {}))
    assert reply.status_code == 200
    thread.join(SECONDS)
    assert checked(events_of(replies[0])[-1][1])["code"] == "cancelled"
    error_of(agent.get_session({}), 404)


def test_turns_of_a_session_are_run_one_after_another(client: TestClient, model: Model) -> None:
    agent, replies = Agent(client, CONFIG), list[Any]()
    model.say = lambda _: "Paris"
    threads = [in_thread(agent, replies, messages=[{"role": "user", "content": str(n)}]) for n in range(4)]
    for thread in threads:
        thread.join(SECONDS)
    assert [reply.json()["state"] for reply in replies] == ["completed"] * 4
    turns = agent.get_session({}).json()["turns"]
    assert all(one["completed_at"] <= other["started_at"] for one, other in pairwise(turns))
    assert [len(body["messages"]) for body in model.bodies] == [2, 4, 6, 8]


@pytest.fixture
def http(client: TestClient) -> Iterator[httpx.Client]:
    """What other clients take to reach the gateway."""

    def to_gateway(request: httpx.Request) -> httpx.Response:
        sent = {"content": request.content, "headers": dict(request.headers)}
        reply = client.request(request.method, request.url.raw_path.decode(), **sent)  # type: ignore[arg-type]
        return httpx.Response(reply.status_code, content=reply.content, headers=dict(reply.headers))

    with httpx.Client(base_url=URL, transport=httpx.MockTransport(to_gateway)) as http:
        yield http


def test_the_specifications_client(client: TestClient, http: httpx.Client, model: Model) -> None:
    model.script = [call("get_weather", city="Paris"), "It is sunny."]
    system = LlamaStack(base_url=URL, http_client=http).agentic_system
    tool: Any = WEATHER | {"description": "The forecast."}
    config: Any = {"model": "small", "instructions": "Be brief.", "tools": [tool]}
    agent_id = system.create(agent_config=config).agent_id
    session_id = system.sessions.create(agent_id=agent_id, session_name="talk").session_id
    ids: Any = dict(agent_id=agent_id, session_id=session_id)
    asked: Any = [{"role": "user", "content": "How is the weather?"}]
    events = list(system.turns.create(**ids, messages=asked, stream=True))
    payloads: list[Any] = [event.event.payload for event in events]
    assert payloads[0].event_type == "turn_start"
    turn = payloads[-1].turn
    (called,) = turn.output_message.tool_calls
    answer: Any = {"role": "ipython", "call_id": called.call_id, "tool_name": "get_weather", "content": "sunny"}
    events = list(system.turns.create(**ids, messages=[answer], stream=True))
    payloads = [event.event.payload for event in events]
    assert payloads[-1].turn.output_message.content == "It is sunny."
    text = "".join(getattr(one, "text_delta_model_response", None) or "" for one in payloads)
    assert text == "It is sunny."
    found: Any = system.turns.retrieve(agent_id=agent_id, turn_id=turn.turn_id)
    assert found.output_message.tool_calls[0].call_id == called.call_id
    step_id = found.steps[0].step_id
    step: Any = system.steps.retrieve(agent_id=agent_id, turn_id=turn.turn_id, step_id=step_id)
    assert step.step.step_id == step_id
    session: Any = system.sessions.retrieve(**ids)
    assert [one.turn_id for one in session.turns] == [turn.turn_id, payloads[0].turn_id]
    system.sessions.delete(**ids)
    system.delete(agent_id=agent_id)
    error_of(client.get("/agentic_system/get", params={"agent_id": agent_id}), 404)

"""The routes of the agentic system: agents, sessions, turns and their events. Turns are run by a script."""

import asyncio
import json
import logging
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stack.agentic_system.accepting import accept
from stack.agentic_system.agents import create, create_session, get_turn
from stack.agentic_system.masked import masked
from stack.api.agentic_system import AgentConfig, AgenticSystemTurnCreateRequest, CreateAgenticSystemSessionRequest
from stack.api.messages import ToolCall
from stack.context import Context
from stack.errors import BadInput, Conflict, Unavailable
from stack.store import MemoryBank, now
from stack.store.schema import steps, tool_runs, turns
from stack.store.turns import NewTurn, Turn
from tests import threads
from tests.api.conftest import HERE
from tests.api.envelope import checked, error_of
from tests.scripted_sessions import TEXT, ScriptedSessions

FUNCTION = {
    "type": "function_call",
    "function_name": "get_weather",
    "description": "The forecast.",
    "parameters": {"city": {"param_type": "string", "description": "Where.", "required": True}},
}
SHIELD = {"shield_type": "code_scanner_guard", "on_violation_action": 2}
CONFIG: dict[str, Any] = {"model": "small", "instructions": "Be brief."}
FULL: dict[str, Any] = CONFIG | {
    "sampling_params": {"strategy": "top_p", "temperature": 0.5, "top_p": 0.9},
    "tools": [
        {"type": "brave_search", "engine": "brave", "input_shields": [SHIELD]},
        {"type": "wolfram_alpha"},
        {"type": "code_interpreter", "enable_inline_code_execution": False},
        FUNCTION | {"remote_execution": {"url": "https://example.com/weather", "method": "GET"}, "idempotent": True},
    ],
    "tool_choice": "auto",
    "tool_prompt_format": "function_tag",
    "input_shields": [SHIELD],
    "output_shields": [SHIELD],
    "approval": ["get_weather"],
}
SAID = [{"role": "user", "content": "What is the capital of France?"}]
CALL = ToolCall(call_id="call-1", tool_name="get_weather", arguments={"city": "Paris", "days": None})
ANSWER = {"role": "ipython", "call_id": "call-1", "tool_name": "get_weather", "content": "sunny"}


def memory(**bank: Any) -> dict[str, Any]:
    return {"type": "memory", "memory_bank_configs": [bank] if bank else []}


class Agent:
    """An agent with one session, as a client has them."""

    def __init__(self, client: TestClient, config: dict[str, Any]) -> None:
        self.client = client
        self.id = made(client, "/agentic_system/create", agent_config=config)["agent_id"]
        self.session = self.new_session()

    def new_session(self) -> str:
        body = dict(agent_id=self.id, session_name="talk")
        return str(made(self.client, "/agentic_system/session/create", **body)["session_id"])

    def turn(self, **fields: Any) -> Any:
        body = dict(agent_id=self.id, session_id=self.session, messages=SAID) | fields
        return self.client.post("/agentic_system/turn/create", json=body)

    def get(self, path: str, **ids: str) -> Any:
        return self.client.get(f"/agentic_system/{path}", params={"agent_id": self.id} | ids)

    def get_session(self, body: Any = None) -> Any:
        ids = dict(agent_id=self.id, session_id=self.session)
        return self.client.post("/agentic_system/session/get", params=ids, json=body)

    def post(self, path: str, **fields: Any) -> Any:
        return self.client.post(f"/agentic_system/{path}", json=dict(agent_id=self.id) | fields)


def made(client: TestClient, path: str, **body: Any) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events_of(reply: Any) -> list[tuple[str | None, Any]]:
    """The events of a stream, each with its id."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in reply.text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        found.append((fields.get("id"), json.loads(fields["data"])))
    return found


def types_of(events: list[tuple[str | None, Any]]) -> list[str]:
    return [event["event"]["payload"]["event_type"] for _, event in events]


@pytest.fixture
def agent(client: TestClient) -> Agent:
    return Agent(client, CONFIG | {"tools": [FUNCTION]})


# Agents


@pytest.mark.parametrize("config", [CONFIG, FULL])
def test_an_agent_is_as_it_was_made(client: TestClient, config: dict[str, Any]) -> None:
    agent_id = made(client, "/agentic_system/create", agent_config=config)["agent_id"]
    found = client.get("/agentic_system/get", params={"agent_id": agent_id}).json()
    assert (found["agent_id"], found["version"]) == (agent_id, 1)
    for key, value in config.items():
        if key != "tools":
            assert found["agent_config"][key] == value
    for given, kept in zip(config.get("tools", []), found["agent_config"]["tools"], strict=True):
        assert {key: kept[key] for key in given} == given


def test_a_body_may_be_wrapped(client: TestClient) -> None:
    agent_id = made(client, "/agentic_system/create", request={"agent_config": CONFIG})["agent_id"]
    assert client.get("/agentic_system/get", params={"agent_id": agent_id}).status_code == 200


def test_an_update_makes_another_version_and_turns_tell_theirs(agent: Agent) -> None:
    first = agent.turn().json()
    changed = agent.post("update", agent_config=CONFIG | {"instructions": "Be long."}).json()
    assert (changed["version"], changed["agent_config"]["instructions"]) == (2, "Be long.")
    assert agent.get("get").json() == changed
    assert agent.get("get", version="1").json()["agent_config"]["instructions"] == "Be brief."
    assert "its newest is 2" in error_of(agent.get("get", version="3"), 404)["message"]
    assert [first["agent_version"], agent.turn().json()["agent_version"]] == [1, 2]


def test_agents_and_sessions_are_listed_newest_first_a_page_at_a_time(client: TestClient) -> None:
    agents = [Agent(client, CONFIG) for _ in range(3)]

    def pages(path: str, key: str, **params: str) -> list[str]:
        seen: list[str] = []
        while page := client.get(path, params=params | {"limit": "2"} | ({"after": seen[-1]} if seen else {})).json():
            assert len(page) <= 2
            seen += [entry[key] for entry in page]
        return seen

    assert set(pages("/agentic_system/list", "agent_id")) == {agent.id for agent in agents}
    mine = {agents[0].session, *(agents[0].new_session() for _ in range(3))}
    sessions = pages("/agentic_system/session/list", "session_id", agent_id=agents[0].id)
    assert (set(sessions), len(sessions)) == (mine, 4)
    error_of(client.get("/agentic_system/list", params={"after": "none"}), 404)
    foreign = {"agent_id": agents[0].id, "after": agents[1].session}
    assert error_of(client.get("/agentic_system/session/list", params=foreign), 404)["param"] == "after"


def accept_turn(context: Context, agent: Agent, session_id: str) -> None:
    request = {"messages": SAID, "attachments": []}
    turn = context.store.turns.accept(NewTurn("default", agent.id, session_id, 1, request, CONFIG), 1)
    assert isinstance(turn, Turn)


def test_a_session_that_cannot_be_ended_keeps_no_other_from_its_end(
    agent: Agent, sessions: ScriptedSessions, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    async def away(_: Context, session_id: str) -> None:
        told.append(session_id)
        raise Unavailable("the pool is away")

    monkeypatch.setattr(sessions, "end", away)
    busy = [agent.session, agent.new_session()]
    for session_id in busy:
        accept_turn(context, agent, session_id)
    error_of(agent.post("delete"), 503)
    assert sorted(told) == sorted(busy)


def test_a_deleted_agent_is_gone_with_its_sessions(agent: Agent, sessions: ScriptedSessions, context: Context) -> None:
    turn_id = agent.turn().json()["turn_id"]
    busy = agent.new_session()
    accept_turn(context, agent, busy)
    reply = agent.post("delete")
    assert (reply.status_code, reply.json()) == (200, None)
    assert sessions.ended == [busy], "where nothing runs, there is nothing to end"
    error_of(agent.get("get"), 404)
    error_of(agent.get_session({}), 404)
    error_of(agent.get("turn/get", turn_id=turn_id), 404)
    error_of(agent.post("delete"), 404)


# What a config names


@pytest.mark.parametrize(
    ("changed", "param", "words"),
    [
        ({"tools": [FUNCTION, FUNCTION]}, "agent_config.tools", "more than one tool 'get_weather'"),
        ({"tools": [FUNCTION | {"function_name": "photogen"}]}, "agent_config.tools", "name of a built-in tool"),
        ({"tools": [{"type": "nonsense"}]}, "agent_config.tools.0", "nonsense"),
        ({"tools": [{"type": "brave_search", "engine": "google"}]}, None, "'bing' or 'brave'"),
        ({"tools": [{"type": "photogen"}]}, "agent_config.tools.0", "agents.photogen"),
        (
            {"tools": [{"type": "mcp", "server": "files", "allowed_tools": ["read"]}]},
            "agent_config.tools.0",
            "there is no MCP server 'files'",
        ),
        (
            {"tools": [FUNCTION | {"remote_execution": {"url": "file:///etc/passwd", "method": "GET"}}]},
            "agent_config.tools.0",
            "https",
        ),
        (
            {"tools": [FUNCTION | {"output_shields": [SHIELD | {"shield_type": "nonsense"}]}]},
            "agent_config.tools.0.output_shields.0.shield_type",
            "there is no such shield",
        ),
        (
            {"input_shields": [SHIELD, SHIELD]},
            "agent_config.input_shields.1.shield_type",
            "as agent_config.input_shields.0",
        ),
        ({"approval": ["get_weather"]}, "agent_config.approval.0", "there are: none"),
        ({"tool_choice": "required"}, "agent_config.tool_choice", "allowed: 'auto'"),
        ({"color": "blue"}, "agent_config", "unknown key 'color'"),
    ],
)
def test_what_cannot_be_used_is_named(
    client: TestClient, changed: dict[str, Any], param: str | None, words: str
) -> None:
    reply = client.post("/agentic_system/create", json={"agent_config": CONFIG | changed})
    error = error_of(reply, 400)
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param
    assert client.get("/agentic_system/list").json() == []


def test_an_unknown_model_is_404_and_its_place_named(client: TestClient) -> None:
    error = error_of(client.post("/agentic_system/create", json={"agent_config": CONFIG | {"model": "big"}}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "agent_config.model")


def test_the_banks_of_a_memory_tool_must_be_there_and_of_their_kind(client: TestClient) -> None:
    bank_id = made(client, "/memory_banks/create", name="a", config={"type": "keyvalue"})["bank_id"]
    fits = memory(type="keyvalue", bank_id=bank_id, keys=["a"])
    agent = Agent(client, CONFIG | {"tools": [fits]})
    assert agent.turn().status_code == 200
    for tool, status, place in (
        (memory(type="vector", bank_id=bank_id), 400, "type"),
        (memory(type="vector", bank_id="bank-none"), 404, "bank_id"),
    ):
        error = error_of(agent.post("update", agent_config=CONFIG | {"tools": [tool]}), status)
        assert error["param"] == f"agent_config.tools.0.memory_bank_configs.0.{place}"
        assert error_of(agent.turn(tools=[tool]), status)["param"] == f"tools.0.memory_bank_configs.0.{place}"
    asks = fits | {"query_generator_config": {"type": "llm", "model": "big", "template": "{messages}"}}
    error = error_of(agent.turn(tools=[asks]), 404)
    assert error["param"] == "tools.0.query_generator_config.model"
    error_of(agent.turn(tools=[fits, fits]), 400)


# Turns


def test_a_turn_is_answered_whole_and_found_again(agent: Agent) -> None:
    turn = agent.turn().json()
    assert turn["output_message"]["content"] == TEXT
    assert (turn["state"], turn["session_id"], turn["input_messages"]) == ("completed", agent.session, SAID)
    assert turn["started_at"] <= turn["completed_at"]
    (step,) = turn["steps"]
    assert (step["step_type"], step["turn_id"], step["model_response"]["content"]) == (
        "inference",
        turn["turn_id"],
        TEXT,
    )
    assert agent.get("turn/get", turn_id=turn["turn_id"]).json() == turn
    found = agent.get("step/get", turn_id=turn["turn_id"], step_id=step["step_id"]).json()
    assert found == {"step": step}


def test_a_turn_is_streamed_with_ids(agent: Agent) -> None:
    events = events_of(agent.turn(stream=True))
    assert types_of(events) == ["turn_start", "step_start", "step_progress", "step_complete", "turn_complete"]
    assert [place for place, _ in events] == ["start", "1.1.0", "1.1.1", "1.end", "end"]
    payloads = [event["event"]["payload"] for _, event in events]
    turn_id, step_id = payloads[0]["turn_id"], payloads[1]["step_id"]
    assert payloads[2] == {
        "event_type": "step_progress", "step_type": "inference", "step_id": step_id, "model_response_text_delta": TEXT,
    }  # fmt: skip
    assert payloads[3]["step_details"]["step_id"] == step_id
    assert payloads[4]["turn"] == agent.get("turn/get", turn_id=turn_id).json()


def test_null_arguments_of_calls_are_kept(agent: Agent, sessions: ScriptedSessions) -> None:
    sessions.calls = [CALL]
    turn = agent.turn().json()
    assert turn["output_message"]["tool_calls"][0]["arguments"] == {"city": "Paris", "days": None}
    for found in (agent.get("turn/get", turn_id=turn["turn_id"]).json(), agent.get_session({}).json()["turns"][0]):
        assert found == turn
    last = events_of(agent.turn(stream=True))[-1][1]["event"]["payload"]["turn"]
    assert last["output_message"]["tool_calls"][0]["arguments"] == {"city": "Paris", "days": None}


def test_events_go_on_behind_one_of_them(agent: Agent) -> None:
    turn_id = agent.turn().json()["turn_id"]
    every = events_of(agent.get("turn/events", turn_id=turn_id))
    assert types_of(every)[0] == "turn_start"
    assert types_of(every)[-1] == "turn_complete"
    assert events_of(agent.get("turn/events", turn_id=turn_id, after="1.1.0")) == every[2:]
    params = dict(agent_id=agent.id, turn_id=turn_id)
    resumed = agent.client.get("/agentic_system/turn/events", params=params, headers={"last-event-id": "1.end"})
    assert events_of(resumed) == every[4:]
    ((_, last),) = events_of(agent.get("turn/events", turn_id=turn_id, after="nonsense"))
    assert checked(last)["param"] == "after"


def test_a_turn_that_fails_ends_its_stream_with_the_error(agent: Agent, sessions: ScriptedSessions) -> None:
    sessions.fault = Unavailable("the model is away", code="away")
    events = events_of(agent.turn(stream=True))
    assert types_of(events[:-1]) == ["turn_start", "step_start", "step_progress", "step_complete"]
    error = checked(events[-1][1])
    assert (error["code"], error["message"]) == ("away", "the model is away")
    turn = agent.get("turn/get", turn_id=events[0][1]["event"]["payload"]["turn_id"]).json()
    assert (turn["state"], turn["error"]) == ("failed", {"code": "away", "message": "the model is away"})
    assert "output_message" not in turn
    assert checked(agent.turn().json())["code"] == "away"


def test_a_turn_that_cannot_be_started_is_cancelled(agent: Agent, sessions: ScriptedSessions) -> None:
    sessions.cannot_start = Unavailable("no room for a session")
    error_of(agent.turn(), 503)
    (turn,) = agent.get_session({}).json()["turns"]
    assert turn["state"] == "cancelled"


def test_what_a_turn_has_takes_the_place_of_the_agents(client: TestClient, context: Context) -> None:
    agent = Agent(client, FULL)
    changed = {
        "instructions": "Be long.",
        "sampling_params": {"strategy": "greedy", "max_tokens": 5},
        "tool_prompt_format": "json",
        "input_shields": [SHIELD | {"on_violation_action": 1}],
    }
    turn_id = agent.turn(**changed).json()["turn_id"]
    row = context.store.turns.get("default", turn_id)
    assert row is not None
    for key in ("instructions", "tool_prompt_format"):
        assert row.config[key] == changed[key]
    assert row.config["sampling_params"]["max_tokens"] == 5
    assert [shield["on_violation_action"] for shield in row.config["input_shields"]] == [1]
    assert [shield["shield_type"] for shield in row.config["output_shields"]] == ["code_scanner_guard"]
    assert [tool["type"] for tool in row.config["tools"]] == [tool["type"] for tool in FULL["tools"]]
    assert row.config["approval"] == ["get_weather"]
    fewer = context.store.turns.get("default", agent.turn(tools=[{"type": "wolfram_alpha"}]).json()["turn_id"])
    assert fewer is not None
    assert ([tool["type"] for tool in fewer.config["tools"]], fewer.config["approval"]) == (["wolfram_alpha"], [])


def test_lists_that_are_empty_and_fields_that_are_null_change_nothing(client: TestClient, context: Context) -> None:
    """Of shields above all: llama-toolchain's client sends empty lists with every turn."""
    agent = Agent(client, FULL)
    kept = context.store.turns.get("default", agent.turn().json()["turn_id"])
    empty: dict[str, Any] = dict(
        tools=[], input_shields=[], output_shields=[], instructions=None, attachments=None, tool_choice=None
    )
    sent = context.store.turns.get("default", agent.turn(**empty).json()["turn_id"])
    assert kept is not None
    assert sent is not None
    assert (sent.config, sent.request["attachments"]) == (kept.config, [])


@pytest.mark.parametrize("content", ["https://example.com/a", {"uri": "https://example.com/a"}])
def test_an_address_may_be_wrapped(agent: Agent, context: Context, content: Any) -> None:
    turn_id = agent.turn(attachments=[{"content": content, "mime_type": "text/plain"}]).json()["turn_id"]
    row = context.store.turns.get("default", turn_id)
    assert row is not None
    assert row.request["attachments"] == [{"content": "https://example.com/a", "mime_type": "text/plain"}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages.0", "'assistant'"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages.0", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is required"),
        ({"messages": [ANSWER]}, "messages.0.call_id", "no open call 'call-1'"),
        ({"messages": [*SAID, ANSWER]}, "messages.1", "behind a user message"),
        ({"attachments": [{"content": "a", "mime_type": "text/plain"}] * 21}, "attachments", "at most 20"),
        ({"attachments": [{"content": "a", "mime_type": ""}]}, "attachments.0.mime_type", "at least 3"),
        ({"attachments": [{"content": {"a": 1}, "mime_type": "text/plain"}]}, None, "attachments.0.content"),
        ({"tools": [{"type": "photogen"}]}, "tools.0", "agents.photogen"),
        ({"output_shields": [SHIELD | {"shield_type": "none"}]}, "output_shields.0.shield_type", "no such shield"),
        ({"approval": ["brave_search"]}, "approval.0", "there are: get_weather"),
        ({"tool_choice": "required", "tools": [memory()]}, "tool_choice", "allowed: 'auto'"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature", "greater than or equal to 0"),
        ({"model": "small"}, None, "unknown key 'model'"),
    ],
)
def test_a_turn_that_cannot_be_is_refused_and_leaves_nothing(
    agent: Agent, fields: dict[str, Any], param: str | None, words: str
) -> None:
    error = error_of(agent.turn(**fields), 400)
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param
    assert agent.get_session({}).json()["turns"] == []


# Calls that the client answers


def test_a_client_answers_the_calls_of_the_last_turn(agent: Agent, sessions: ScriptedSessions) -> None:
    sessions.calls = [CALL, CALL.model_copy(update={"call_id": "call-2"})]
    first = agent.turn().json()
    assert [call["call_id"] for call in first["output_message"]["tool_calls"]] == ["call-1", "call-2"]
    other = ANSWER | {"call_id": "call-2"}
    for messages, place, words in (
        ([ANSWER, ANSWER], "messages.1.call_id", "answered twice"),
        ([ANSWER, ANSWER | {"call_id": "call-3"}], "messages.1.call_id", "there are: call-1, call-2"),
        ([ANSWER | {"tool_name": "other"}], "messages.0.tool_name", "is of 'get_weather'"),
    ):
        error = error_of(agent.turn(messages=messages), 400)
        assert (error["param"], words in error["message"]) == (place, True)
    sessions.calls = []
    assert agent.turn(messages=[ANSWER, other, *SAID]).json()["state"] == "completed"
    error = error_of(agent.turn(messages=[ANSWER]), 400)
    assert error["code"] == "no_such_call"


def waiting(agent: Agent, context: Context, **fields: Any) -> str:
    """The id of another turn of the agent's session, which nobody runs."""
    body = dict(agent_id=agent.id, session_id=agent.session, messages=SAID) | fields
    return accept(context, AgenticSystemTurnCreateRequest.model_validate(body)).id


def test_calls_of_a_turn_that_has_not_ended_cannot_be_answered(agent: Agent, context: Context) -> None:
    turn_id = waiting(agent, context)
    error = error_of(agent.turn(messages=[ANSWER]), 409)
    assert f"the turn {turn_id!r} is queued" in error["message"]


def test_of_answers_at_once_to_one_call_one_is_taken(
    agent: Agent, context: Context, sessions: ScriptedSessions
) -> None:
    sessions.calls = [CALL]
    assert agent.turn().status_code == 200

    def answer() -> str:
        try:
            return waiting(agent, context, messages=[ANSWER])
        except (BadInput, Conflict) as error:
            return error.code

    answers = threads.at_once(*[answer] * 5)
    assert answers.count("conflict") == 4
    assert len(agent.get_session({}).json()["turns"]) == 2


# Turns that wait, are cancelled, or await approval


def test_a_turn_waits_or_is_refused_when_asked(agent: Agent, context: Context) -> None:
    waiting(agent, context)
    error = error_of(agent.turn(wait=False), 409)
    assert error["code"] == "busy"
    for _ in range(context.config.agents.max_queued_turns):
        waiting(agent, context)
    reply = agent.turn()
    assert "17 turns" in error_of(reply, 429)["message"]
    assert int(reply.headers["retry-after"]) > 0
    agent.session = agent.new_session()
    assert agent.turn(wait=False).status_code == 200


def test_a_turn_is_cancelled(agent: Agent, context: Context, sessions: ScriptedSessions) -> None:
    waits, runs = waiting(agent, context), waiting(agent, context)
    assert context.store.turns.take(runs, "one") is not None
    assert agent.post("turn/cancel", turn_id=waits).json() == {"turn_id": waits, "state": "cancelled"}
    assert agent.post("turn/cancel", turn_id=runs).json() == {"turn_id": runs, "state": "running"}
    assert sessions.cancelled == [waits, runs]
    found = agent.get("turn/get", turn_id=waits).json()
    assert (found["state"], found["steps"], found["output_attachments"]) == ("cancelled", [], [])
    ended = agent.turn().json()["turn_id"]
    assert agent.post("turn/cancel", turn_id=ended).json()["state"] == "completed"
    assert error_of(agent.post("turn/cancel", turn_id="none"), 404)["param"] == "turn_id"


def test_a_turn_awaits_approval_and_goes_on(agent: Agent, sessions: ScriptedSessions) -> None:
    sessions.calls = [CALL, CALL.model_copy(update={"call_id": "call-2"})]
    events = events_of(agent.turn(stream=True, approval=["get_weather"]))
    assert types_of(events)[-1] == "turn_awaiting_approval"
    asked = events[-1][1]["event"]["payload"]
    assert [call["call_id"] for call in asked["tool_calls"]] == ["call-1", "call-2"]
    turn_id = asked["turn_id"]
    turn = agent.get("turn/get", turn_id=turn_id).json()
    assert (turn["state"], turn["awaiting"]) == ("awaiting_approval", asked["tool_calls"])
    assert [step["step_type"] for step in turn["steps"]] == ["inference"]

    def approve(**approvals: bool) -> Any:
        return agent.post("turn/approve", turn_id=turn_id, approvals=approvals)

    error = error_of(approve(**{"call-3": True}), 400)
    assert (error["param"], "call-1, call-2" in error["message"]) == ("approvals.call-3", True)
    assert approve(**{"call-1": True}).json()["state"] == "awaiting_approval"
    error_of(approve(**{"call-1": False}), 400)
    assert approve(**{"call-2": False}).json()["state"] == "queued"
    assert [one for one, _ in sessions.gone_on] == [turn_id]
    assert "it is completed" in error_of(approve(**{"call-2": True}), 409)["message"]
    assert types_of(events_of(agent.get("turn/events", turn_id=turn_id)))[-1] == "turn_complete"
    error_of(agent.post("turn/approve", turn_id=turn_id, approvals={}), 400)


def test_an_unfinished_step_is_not_shown(agent: Agent, context: Context, sessions: ScriptedSessions) -> None:
    sessions.calls = [CALL]
    turn_id = agent.turn(approval=["get_weather"]).json()["turn_id"]
    step = context.store.turns.steps_of([turn_id])[-1]
    error = error_of(agent.get("step/get", turn_id=turn_id, step_id=step.id), 409)
    assert error["code"] == "not_ended"


# Sessions


def test_a_session_shows_its_turns_or_some_of_them(agent: Agent) -> None:
    there = [agent.turn().json() for _ in range(3)]
    for body in (None, {}, {"turn_ids": None}):
        found = agent.get_session(body).json()
        assert found == {
            "session_id": agent.session, "session_name": "talk", "turns": there, "started_at": found["started_at"],
        }  # fmt: skip
    wanted = [there[2]["turn_id"], there[0]["turn_id"]]
    assert agent.get_session({"turn_ids": wanted}).json()["turns"] == [there[2], there[0]]
    assert agent.get_session({"turn_ids": []}).json()["turns"] == []
    error = error_of(agent.get_session({"turn_ids": [wanted[0], "none"]}), 404)
    assert (error["param"], "'none'" in error["message"]) == ("turn_ids", True)


def test_a_session_shows_its_bank_as_long_as_that_is_there(agent: Agent, context: Context) -> None:
    bank_id = "bank-0"
    bank = MemoryBank(bank_id, "default", "files", None, {"type": "keyvalue"}, None, bytes=0, created_at=now())
    context.store.agents.give_bank(agent.session, bank)
    assert agent.get_session({}).json()["memory_bank"]["bank_id"] == bank_id
    made(agent.client, "/memory_banks/drop", bank_id=bank_id)
    assert "memory_bank" not in agent.get_session({}).json()


def test_a_deleted_session_is_gone_with_its_bank(agent: Agent, context: Context, sessions: ScriptedSessions) -> None:
    bank = MemoryBank("bank-0", "default", "files", None, {"type": "keyvalue"}, None, bytes=0, created_at=now())
    context.store.agents.give_bank(agent.session, bank)
    turn_id = agent.turn().json()["turn_id"]
    other = agent.new_session()
    assert agent.post("session/delete", session_id=agent.session).status_code == 200
    assert sessions.ended == [agent.session]
    error_of(agent.client.get("/memory_banks/get", params={"bank_id": "bank-0"}), 404)
    error_of(agent.get("turn/get", turn_id=turn_id), 404)
    error_of(agent.post("session/delete", session_id=agent.session), 404)
    assert error_of(agent.turn(), 404)["param"] == "session_id"
    agent.session = other
    assert agent.turn().status_code == 200


def test_what_is_of_another_agent_is_not_there(client: TestClient, agent: Agent) -> None:
    other = Agent(client, CONFIG)
    turn = agent.turn().json()
    step_id = turn["steps"][0]["step_id"]
    assert error_of(other.turn(session_id=agent.session), 404)["param"] == "session_id"
    assert error_of(other.get("turn/get", turn_id=turn["turn_id"]), 404)["param"] == "turn_id"
    assert error_of(other.get("turn/events", turn_id=turn["turn_id"]), 404)["param"] == "turn_id"
    assert error_of(other.get("step/get", turn_id=turn["turn_id"], step_id=step_id), 404)["param"] == "turn_id"
    assert error_of(other.post("turn/cancel", turn_id=turn["turn_id"]), 404)["param"] == "turn_id"
    assert error_of(other.post("session/delete", session_id=agent.session), 404)["param"] == "session_id"
    mine = other.turn().json()
    error = error_of(agent.get("step/get", turn_id=turn["turn_id"], step_id=mine["steps"][0]["step_id"]), 404)
    assert error["param"] == "step_id"
    for path, ids in (("turn/get", {"turn_id": "a"}), ("step/get", {"turn_id": "a", "step_id": "b"})):
        reply = client.get(f"/agentic_system/{path}", params={"agent_id": "none"} | ids)
        assert error_of(reply, 404)["param"] == "agent_id"


# Keys of tools


def test_what_may_be_secret_in_headers_is_not_shown(client: TestClient) -> None:
    headers = {"Authorization": "Bearer hush-hush", "X-Key": "{{key:mine}}", "Accept": "text/plain"}
    execution = {"url": "https://example.com/weather", "method": "GET", "headers": headers}
    config = CONFIG | {"tools": [FUNCTION | {"remote_execution": execution}]}
    agent = Agent(client, config)
    third = {"shield_type": "third", "on_violation_action": 2, "execution_config": execution}
    assert "hush-hush" not in str(masked({"output_shields": [third], "tools": [{"input_shields": [third]}]}))
    updated = agent.post("update", agent_config=config)
    for reply in (agent.get("get"), agent.get("get", version="1"), updated):
        assert reply.status_code == 200, reply.text
        assert "hush-hush" not in reply.text
        shown = reply.json()["agent_config"]["tools"][0]["remote_execution"]["headers"]
        assert shown == headers | {"Authorization": "********"}
    again = agent.post("update", agent_config=updated.json()["agent_config"])
    error = error_of(again, 400)
    assert error["param"] == "agent_config.tools.0"
    assert "Authorization" in error["message"]


def test_provider_data_is_handed_on_and_kept_nowhere(
    agent: Agent, context: Context, sessions: ScriptedSessions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    keys = {"BRAVE_SEARCH_KEY": "hush-hush"}
    headers = {"X-LlamaStack-ProviderData": json.dumps(keys)}
    body = dict(agent_id=agent.id, session_id=agent.session, messages=SAID, approval=["get_weather"])
    sessions.calls = [CALL]
    turn_id = agent.client.post("/agentic_system/turn/create", json=body, headers=headers).json()["turn_id"]
    assert sessions.started == [(turn_id, keys)]
    decided = dict(agent_id=agent.id, turn_id=turn_id, approvals={"call-1": True})
    assert agent.client.post("/agentic_system/turn/approve", json=decided, headers=headers).status_code == 200
    assert sessions.gone_on == [(turn_id, keys)]
    assert "hush-hush" not in caplog.text
    with context.store.engine.connect() as connection:
        for table in (turns, steps, tool_runs):
            assert "hush-hush" not in str(connection.execute(table.select()).all())


@pytest.mark.parametrize(
    "value",
    [
        "hush-hush", "[]", '{"key": 5}', '{"key": null}', '{"key": {"hush": "hush"}}', "[" * 5_000,
        json.dumps({f"key-{number}": "hush-hush" for number in range(101)}), json.dumps({"key": "h" * 20_000}),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_provider_data_that_is_wrong_is_refused_and_not_shown(agent: Agent, value: str) -> None:
    body = dict(agent_id=agent.id, session_id=agent.session, messages=SAID)
    headers = {"X-LlamaStack-ProviderData": value}
    error = error_of(agent.client.post("/agentic_system/turn/create", json=body, headers=headers), 400)
    assert "X-LlamaStack-ProviderData" in error["message"]
    assert "hush" not in error["message"]
    assert agent.get_session({}).json()["turns"] == []


# Clients that leave


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_no_turn(
    app: FastAPI, context: Context, sessions: ScriptedSessions, stream: bool
) -> None:
    sessions.holds = True
    agent_id = await create(context, AgentConfig.model_validate(CONFIG))
    request = CreateAgenticSystemSessionRequest(agent_id=agent_id, session_name="talk")
    session_id = await asyncio.to_thread(create_session, context, request)
    body = dict(agent_id=agent_id, session_id=session_id, messages=SAID, stream=stream)
    arrived: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if arrived:
            return arrived.pop(0)
        await sessions.watched.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    path = "/agentic_system/turn/create"
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")], "client": HERE, "server": HERE,
        "scheme": "http", "root_path": "", "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), timeout=30)
    ((turn_id, _),) = sessions.started
    assert (sessions.left, sessions.cancelled) == ([turn_id], [])
    turn = context.store.turns.get("default", turn_id)
    assert turn is not None
    assert (turn.state, turn.cancelled_at) == ("queued", None)
    sessions.run(context.store, turn_id)
    assert get_turn(context, agent_id, turn_id).state == "completed"

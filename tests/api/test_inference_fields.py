"""Every field of the specification's chat and text completions, at the Llama Stack door."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from stack.inference import END_OF_MESSAGE_TOKEN
from tests.api.envelope import error_of, events_of
from tests.scripted_engine import ScriptedEngine

CHAT = ("/inference/chat_completion", {"model": "small", "messages": [{"role": "user", "content": "Where?"}]})
TEXT = ("/inference/completion", {"model": "small", "content": "The capital is"})
CHATS = ("/batch_inference/chat_completion", {"model": "small", "messages_batch": [CHAT[1]["messages"]]})
TEXTS = ("/batch_inference/completion", {"model": "small", "content_batch": ["The capital is"]})
WEATHER = {
    "tool_name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"city": {"param_type": "str", "description": "Its name"}, "days": {"param_type": "int"}},
}
CALLED = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'
SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "repetition_penalty")

routes = pytest.mark.parametrize(("path", "body"), [CHAT, TEXT], ids=["chat", "text"])
all_routes = pytest.mark.parametrize(
    ("path", "body"), [CHAT, TEXT, CHATS, TEXTS], ids=["chat", "text", "chats", "texts"]
)


def ask(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(client: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a chat or the chunks of a text."""
    events = events_of(client.post(path, json=body | {"stream": True}))
    return [event.get("event", event) for event in events]


# Sampling


@all_routes
@pytest.mark.parametrize(
    ("params", "asked"),
    [
        ({"strategy": "greedy"}, {"temperature": 0}),
        ({"strategy": "greedy", "temperature": 0.7, "top_p": 0.5, "top_k": 5}, {"temperature": 0}),
        ({"strategy": "top_p", "top_p": 0.9}, {"top_p": 0.9}),
        ({"strategy": "top_p", "top_p": 0.9, "temperature": 0.7, "top_k": 5}, {"top_p": 0.9, "temperature": 0.7}),
        ({"strategy": "top_p"}, {"top_p": 1.0}),
        ({"strategy": "top_k", "top_k": 5}, {"top_k": 5}),
        ({"strategy": "top_k", "top_k": 5, "temperature": 0.7, "top_p": 0.9}, {"top_k": 5, "temperature": 0.7}),
        ({"strategy": "greedy", "repetition_penalty": 1.2}, {"temperature": 0, "repetition_penalty": 1.2}),
        ({"strategy": "greedy", "max_tokens": 9}, {"temperature": 0, "max_tokens": 9}),
        # 0 means unset.
        (
            {"strategy": "greedy", "temperature": 0, "top_p": 0, "top_k": 0, "max_tokens": 0, "repetition_penalty": 0},
            {"temperature": 0},
        ),
        ({"strategy": "top_p", "top_p": 0, "max_tokens": 0, "top_k": 0, "repetition_penalty": 0}, {"top_p": 1.0}),
        ({"strategy": "top_k", "top_k": 5, "top_p": 0, "max_tokens": 0, "repetition_penalty": 0}, {"top_k": 5}),
    ],
)
def test_sampling_parameters(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any], params: Any, asked: dict[str, Any]
) -> None:
    ask(client, path, body | {"sampling_params": params})
    given = {name: engine.asked[0].body.get(name) for name in SAMPLING}
    assert {name: value for name, value in given.items() if value is not None} == asked


@all_routes
def test_without_sampling_parameters_the_likeliest_tokens_are_taken(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    ask(client, path, body)
    assert engine.asked[0].body["temperature"] == 0


def test_a_text_is_continued_as_far_as_the_context_goes(client: TestClient, engine: ScriptedEngine) -> None:
    """An engine would stop after 16 tokens if nothing were said."""
    for more in ({}, {"sampling_params": {"strategy": "greedy", "max_tokens": 0}}):
        ask(client, TEXT[0], TEXT[1] | more)
    assert all(asked.body["max_tokens"] is None and "max_tokens" in asked.body for asked in engine.asked)


# Logprobs


@routes
@pytest.mark.parametrize(
    ("top_k", "likeliest"),
    [
        (0, {"Paris": -0.25}),
        (1, {"Paris": -0.25}),
        (3, {"Paris": -0.25, " other": -1.5, " third": -3.0}),
    ],
)
def test_logprobs_are_those_of_the_likeliest_tokens_whole_and_streamed(
    client: TestClient, path: str, body: dict[str, Any], top_k: int, likeliest: dict[str, float]
) -> None:
    body = body | {"logprobs": {"top_k": top_k}}
    whole = ask(client, path, body)["logprobs"]
    parts = [logprobs for event in streamed(client, path, body) for logprobs in event.get("logprobs", [])]
    assert whole[0] == {"logprobs_by_token": likeliest}
    assert len(whole) == 3
    assert parts == whole


@routes
def test_without_logprobs_there_are_none(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    assert "logprobs" not in ask(client, path, body)
    assert not any("logprobs" in event for event in streamed(client, path, body))
    assert not any("logprobs" in asked.body for asked in engine.asked)


# Stop reasons


@routes
@pytest.mark.parametrize(
    ("finish", "token", "reason"),
    [
        ("stop", None, "end_of_turn"),
        ("stop", END_OF_MESSAGE_TOKEN, "end_of_message"),
        ("length", None, "out_of_tokens"),
    ],
)
def test_stop_reasons_whole_and_streamed(
    client: TestClient,
    engine: ScriptedEngine,
    path: str,
    body: dict[str, Any],
    finish: str,
    token: int | None,
    reason: str,
) -> None:
    engine.finish_reason, engine.stop_reason = finish, token
    assert ask(client, path, body)["completion_message"]["stop_reason"] == reason
    events = streamed(client, path, body)
    assert [event.get("stop_reason") for event in events] == [None] * (len(events) - 1) + [reason]


# Messages


def test_messages_of_all_roles(client: TestClient, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "system", "content": ["Be ", "brief."]},
        {"role": "user", "content": "Weather?", "context": ["It is ", "May."]},
        {
            "role": "assistant",
            "content": "",
            "stop_reason": "end_of_turn",
            "tool_calls": [{"call_id": "1", "tool_name": "get_weather", "arguments": {"city": "Paris", "days": None}}],
        },
        {"role": "ipython", "call_id": "1", "tool_name": "get_weather", "content": ["18 ", "degrees"]},
        {"role": "assistant", "content": "18 degrees.", "stop_reason": "out_of_tokens", "tool_calls": []},
        {"role": "user", "content": "And in Rome?"},
    ]
    ask(client, CHAT[0], CHAT[1] | {"messages": messages})
    asked = engine.asked[0].body["messages"]
    assert asked[0]["role"] == "system"
    assert "Be brief." in asked[0]["content"]
    assert {"role": "user", "content": "Weather?\n\nIt is May."} in asked
    words = [message["content"] for message in asked]
    assert any("get_weather" in word and '"city": "Paris"' in word for word in words)
    assert any("18 degrees" in word for word in words)
    assert asked[-1] == {"role": "user", "content": "And in Rome?"}


# Tools


@pytest.mark.parametrize("prompt_format", ["json", "function_tag"])
def test_a_call_is_found_streamed_and_not(client: TestClient, engine: ScriptedEngine, prompt_format: str) -> None:
    written = CALLED if prompt_format == "json" else '<function=get_weather>{"city": "Paris", "days": 3}</function>'
    engine.tokens = tuple(written[at : at + 4] for at in range(0, len(written), 4))
    body = CHAT[1] | {"tools": [WEATHER], "tool_prompt_format": prompt_format}
    message = ask(client, CHAT[0], body)["completion_message"]
    (call,) = message["tool_calls"]
    assert message["content"] == ""
    assert (call["tool_name"], call["arguments"]) == ("get_weather", {"city": "Paris", "days": 3})
    events = streamed(client, CHAT[0], body)
    assert [events[0]["event_type"], events[-1]["event_type"]] == ["start", "complete"]
    assert {event["event_type"] for event in events[1:-1]} == {"progress"}
    deltas = [event["delta"] for event in events[1:-1]]
    statuses = [delta["parse_status"] for delta in deltas]
    assert (statuses[0], statuses[-1]) == ("started", "success")
    assert set(statuses[1:-1]) == {"in_progress"}
    assert deltas[-1]["content"]["arguments"] == call["arguments"]
    first = engine.asked[0].body["messages"]
    assert "get_weather" in str(first)
    assert ("<function=" in str(first)) == (prompt_format == "function_tag")


def test_a_broken_call_is_a_failure_and_stays_as_text(client: TestClient, engine: ScriptedEngine) -> None:
    engine.tokens = (CALLED[:20], CALLED[20:40])
    body = CHAT[1] | {"tools": [WEATHER]}
    message = ask(client, CHAT[0], body)["completion_message"]
    assert (message["content"], message["tool_calls"]) == (CALLED[:40], [])
    deltas = [event["delta"] for event in streamed(client, CHAT[0], body)]
    assert {"content": CALLED[:40], "parse_status": "failure"} in deltas


def test_a_required_call_is_a_constraint_on_the_tokens(client: TestClient, engine: ScriptedEngine) -> None:
    ask(client, CHAT[0], CHAT[1] | {"tools": [WEATHER], "tool_choice": "required"})
    assert "get_weather" in str(engine.asked[0].body["structured_outputs"])
    engine.asked.clear()
    ask(client, CHAT[0], CHAT[1] | {"tools": [WEATHER], "tool_choice": "auto"})
    assert "structured_outputs" not in engine.asked[0].body


@pytest.mark.parametrize("name", ["brave_search", "wolfram_alpha", "photogen", "code_interpreter"])
def test_built_in_tools_need_no_description(client: TestClient, engine: ScriptedEngine, name: str) -> None:
    ask(client, CHAT[0], CHAT[1] | {"tools": [{"tool_name": name}]})
    assert name in str(engine.asked[0].body["messages"])


def test_calls_are_found_in_each_row_of_a_batch(client: TestClient, engine: ScriptedEngine) -> None:
    engine.tokens = (CALLED,)
    body = CHATS[1] | {"messages_batch": [CHAT[1]["messages"]] * 2, "tools": [WEATHER]}
    answer = ask(client, CHATS[0], body)
    calls = [message["tool_calls"][0] for message in answer["completion_message_batch"]]
    assert [call["arguments"] for call in calls] == [{"city": "Paris", "days": 3}] * 2
    error = error_of(client.post(CHATS[0], json=CHATS[1] | {"tool_choice": "required"}), 400)
    assert error["param"] == "tools"

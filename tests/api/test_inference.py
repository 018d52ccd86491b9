"""Both doors of inference: chats and texts, whole and streamed, wrapped and flat."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from stack.context import Context
from tests import samples
from tests.api.envelope import error_of, events_of
from tests.scripted_engine import ScriptedEngine

QUESTION = {"role": "user", "content": "What is the capital of France?"}
TEXT = "Paris is big."
CHAT: dict[str, Any] = {"model": "small", "messages": [QUESTION]}
# The routes with a body that each takes.
STACK_CHAT = ("/inference/chat_completion", CHAT)
STACK_TEXT = ("/inference/completion", {"model": "small", "content": "The capital is"})
OPENAI_CHAT = ("/v1/chat/completions", CHAT)
OPENAI_TEXT = ("/v1/completions", {"model": "small", "prompt": "The capital is"})
ROUTES = [STACK_CHAT, STACK_TEXT, OPENAI_CHAT, OPENAI_TEXT]
every_route = pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
flat_and_wrapped = pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])


# The Llama Stack door


@flat_and_wrapped
@pytest.mark.parametrize(("path", "body"), [STACK_CHAT, STACK_TEXT], ids=["chat", "text"])
def test_the_stack_door_answers_with_a_completion_message(
    client: TestClient, path: str, body: dict[str, Any], wrapped: bool
) -> None:
    reply = client.post(path, json={"request": body} if wrapped else body)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    message = {"role": "assistant", "content": TEXT, "stop_reason": "end_of_turn", "tool_calls": []}
    assert reply.json() == {"completion_message": message}


@flat_and_wrapped
def test_the_stack_door_streams_a_chat_as_events(client: TestClient, wrapped: bool) -> None:
    body = CHAT | {"stream": True}
    events = events_of(client.post("/inference/chat_completion", json={"request": body} if wrapped else body))
    assert events == [
        {"event": {"event_type": "start", "delta": ""}},
        {"event": {"event_type": "progress", "delta": "Paris"}},
        {"event": {"event_type": "progress", "delta": " is"}},
        {"event": {"event_type": "progress", "delta": " big."}},
        {"event": {"event_type": "complete", "delta": "", "stop_reason": "end_of_turn"}},
    ]


@flat_and_wrapped
def test_the_stack_door_streams_a_text_in_chunks(client: TestClient, wrapped: bool) -> None:
    body = STACK_TEXT[1] | {"stream": True}
    chunks = events_of(client.post("/inference/completion", json={"request": body} if wrapped else body))
    assert [chunk["delta"] for chunk in chunks] == ["Paris", " is", " big.", ""]
    assert [chunk.get("stop_reason") for chunk in chunks] == [None, None, None, "end_of_turn"]


@pytest.mark.parametrize(("path", "body"), [STACK_CHAT, STACK_TEXT], ids=["chat", "text"])
def test_the_stack_door_reports_logprobs(client: TestClient, path: str, body: dict[str, Any]) -> None:
    logprobs = client.post(path, json=body | {"logprobs": {"top_k": 2}}).json()["logprobs"]
    assert len(logprobs) == 3
    assert logprobs[0] == {"logprobs_by_token": {"Paris": -0.25, " other": -1.5}}


def test_the_stack_door_asks_the_engine_in_openais_shape(client: TestClient, engine: ScriptedEngine) -> None:
    sampling = {"strategy": "top_p", "top_p": 0.5, "temperature": 0.7, "max_tokens": 0, "top_k": 0}
    client.post("/inference/chat_completion", json=CHAT | {"sampling_params": sampling})
    (asked,) = engine.asked
    expected = CHAT | {"top_p": 0.5, "temperature": 0.7, "stream": False}
    assert (asked.model.id, asked.endpoint, asked.body) == ("small", "chat", expected)


# The OpenAI door


def test_the_openai_door_answers_as_the_engine_does(client: TestClient) -> None:
    chat = client.post("/v1/chat/completions", json=CHAT).json()
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": TEXT}
    assert chat["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    text = client.post("/v1/completions", json=OPENAI_TEXT[1]).json()
    assert text["choices"][0]["text"] == TEXT


@pytest.mark.parametrize(("path", "body"), [OPENAI_CHAT, OPENAI_TEXT], ids=["chat", "text"])
def test_the_openai_door_streams_as_the_engine_does(client: TestClient, path: str, body: dict[str, Any]) -> None:
    *chunks, last = events_of(client.post(path, json=body | {"stream": True}))
    assert last == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices]
    assert "".join(texts) == TEXT
    assert choices[-1]["finish_reason"] == "stop"


def test_the_openai_door_passes_on_what_was_sent_and_nothing_else(client: TestClient, engine: ScriptedEngine) -> None:
    body = CHAT | {"stop": ["\n"], "seed": 7, "min_p": 0.1}
    client.post("/v1/chat/completions", json=body)
    client.post("/v1/completions", json=OPENAI_TEXT[1] | {"echo": True})
    assert [asked.body for asked in engine.asked] == [body, OPENAI_TEXT[1] | {"echo": True}]
    assert [asked.endpoint for asked in engine.asked] == ["chat", "completions"]


def test_the_openai_door_keeps_the_parts_and_fields_of_a_message(client: TestClient, engine: ScriptedEngine) -> None:
    parts = [{"type": "text", "text": "Where?"}]
    messages = [{"role": "user", "content": parts, "name": "ann"}]
    client.post("/v1/chat/completions", json={"model": "small", "messages": messages})
    assert engine.asked[0].body["messages"] == messages


# Both doors


@every_route
def test_a_stream_says_that_it_must_not_be_cached_or_buffered(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    reply = client.post(path, json=body | {"stream": True})
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"


@every_route
@whole_and_streamed
def test_an_adapter_is_asked_like_any_model(
    client: TestClient, context: Context, engine: ScriptedEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    assert client.post(path, json=body | {"model": "small:tune-1", "stream": stream}).status_code == 200
    (asked,) = engine.asked
    assert (asked.model.id, asked.model.base.id, asked.model.is_adapter) == ("small:tune-1", "small", True)


@every_route
@whole_and_streamed
def test_an_unknown_model_is_404_with_the_known_ones(
    client: TestClient, context: Context, path: str, body: dict[str, Any], stream: bool
) -> None:
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    error = error_of(client.post(path, json=body | {"model": "gpt-5", "stream": stream}), 404)
    assert error["message"] == "there is no model 'gpt-5'; there are: small, small:tune-1"
    assert (error["code"], error["type"], error["param"]) == ("model_not_found", "invalid_request_error", "model")


NUMBER = 10**30
TEXT_PART = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
BAD_STACK_CHATS: list[tuple[dict[str, Any], str | None, list[str]]] = [
    ({"messages": []}, "messages", ["at least 1 item"]),
    ({"messages": [QUESTION] * 1_001}, "messages", ["at most 1000"]),
    ({"messages": "hello"}, "messages", ["valid list", "'hello'"]),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0", ["'robot'", "'user', 'system'"]),
    ({"messages": [{"content": "a"}]}, "messages.0", ["'role'"]),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0", ["None"]),
    ({"messages": [QUESTION | {"nmae": "b"}]}, "messages.0", ["unknown key 'nmae'", "role, content, context"]),
    ({"model": ""}, "model", ["at least 1 character"]),
    ({"model": 5}, "model", ["valid string", "5"]),
    ({"model": "x" * 301}, "model", ["at most 300 characters"]),
    ({"stream": "maybe"}, "stream", ["valid boolean", "'maybe'"]),
    ({"maxtokens": 5}, None, ["unknown key 'maxtokens'", "model, messages, sampling_params"]),
    ({"sampling_params": {"max_tokens": -1}}, "sampling_params.max_tokens", ["greater than or equal to 0", "-1"]),
    ({"sampling_params": {"max_tokens": NUMBER}}, "sampling_params.max_tokens", ["1000000"]),
    ({"sampling_params": {"max_tokens": 1e400}}, "sampling_params.max_tokens", ["inf"]),
    ({"sampling_params": {"temperature": -0.1}}, "sampling_params.temperature", ["greater than or equal to 0", "-0.1"]),
    ({"sampling_params": {"temperature": float("nan")}}, "sampling_params.temperature", ["nan"]),
    ({"sampling_params": {"strategy": "beam"}}, "sampling_params.strategy", ["'greedy', 'top_p' or 'top_k'", "'beam'"]),
    ({"sampling_params": {"strategy": "top_k"}}, "sampling_params.top_k", ["at least 1"]),
    ({"sampling_params": {"topp": 1}}, "sampling_params", ["unknown key 'topp'", "top_p"]),
    ({"logprobs": {"top_k": 21}}, "logprobs.top_k", ["less than or equal to 20", "21"]),
    ({"tools": [{"tool_name": "a b"}]}, "tools", ["'a b'"]),
    ({"tool_choice": "required"}, "tools", ["at least one tool"]),
    ({"tool_choice": "never"}, "tool_choice", ["'auto' or 'required'", "'never'"]),
]
BAD_OPENAI_CHATS: list[tuple[dict[str, Any], str | None, list[str]]] = [
    ({"messages": []}, "messages", ["at least 1 item"]),
    ({"messages": [QUESTION] * 1_001}, "messages", ["at most 1000"]),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", ["5"]),
    ({"messages": [{"content": "a"}]}, "messages.0", ["role should be", "'user'"]),
    ({"model": None}, "model", ["valid string", "None"]),
    ({"max_tokens": -1}, "max_tokens", ["greater than or equal to 1", "-1"]),
    ({"max_tokens": 0}, "max_tokens", ["greater than or equal to 1", "0"]),
    ({"max_completion_tokens": NUMBER}, "max_completion_tokens", ["1000000"]),
    ({"temperature": -1}, "temperature", ["greater than or equal to 0", "-1"]),
    ({"temperature": float("inf")}, "temperature", ["inf"]),
    ({"top_p": 0}, "top_p", ["greater than 0"]),
    ({"top_p": 1.01}, "top_p", ["less than or equal to 1", "1.01"]),
    ({"n": 0}, "n", ["greater than or equal to 1"]),
    ({"n": 1_000_000}, "n", ["less than or equal to 16", "1000000"]),
    ({"stop": ["x"] * 17}, "stop", ["at most 16"]),
    ({"stop": "x" * 1_001}, "stop", ["at most 1000 characters"]),
    ({"seed": 0.5}, "seed", ["0.5"]),
    ({"frequency_penalty": 3}, "frequency_penalty", ["less than or equal to 2", "3"]),
    ({"presence_penalty": -3}, "presence_penalty", ["greater than or equal to -2", "-3"]),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["less than or equal to 20", "21"]),
    ({"stream": 5}, "stream", ["valid boolean", "5"]),
    ({"messages": [QUESTION | {"role": "robot"}]}, "messages.0", ["'robot'", "'user'", "'assistant' or 'tool'"]),
    ({"messages": [QUESTION | {"nmae": "b"}]}, "messages.0", ["unknown key 'nmae'", "role, content, name"]),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content", ["'small' takes text only"]),
    ({"messages": [{"role": "user", "content": [TEXT_PART] * 101}]}, "messages.0.content", ["at most 100"]),
    ({"seed": NUMBER}, "seed", ["less than 9223372036854775808"]),
    ({"best_of": 1_000}, None, ["unknown key 'best_of'", "model, stream"]),
    ({"prompt_logprobs": 1_000}, None, ["unknown key 'prompt_logprobs'", "top_logprobs"]),
    ({"stream_options": {"include_usage": True}}, None, ["stream_options need stream: true"]),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", ["unknown key 'usage'", "include_usage"]),
    ({"top_logprobs": 2}, None, ["top_logprobs need logprobs: true"]),
]
BAD_INPUT = [
    *(("/inference/chat_completion", CHAT | change, param, words) for change, param, words in BAD_STACK_CHATS),
    *(("/v1/chat/completions", CHAT | change, param, words) for change, param, words in BAD_OPENAI_CHATS),
    ("/inference/completion", {"model": "small"}, "content", ["is required"]),
    ("/inference/completion", STACK_TEXT[1] | {"prompt": "a"}, None, ["unknown key 'prompt'", "content"]),
    ("/inference/completion", STACK_TEXT[1] | {"content": ["x"] * 101}, "content", ["at most 100"]),
    ("/v1/completions", {"model": "small"}, "prompt", ["is required"]),
    ("/v1/completions", OPENAI_TEXT[1] | {"prompt": []}, "prompt", ["at least 1 item"]),
    ("/v1/completions", OPENAI_TEXT[1] | {"prompt": [-1]}, "prompt", ["greater than or equal to 0", "-1"]),
    ("/v1/completions", OPENAI_TEXT[1] | {"prompt": ["a"] * 33, "n": 2}, None, ["66 sequences", "at most 64"]),
    ("/v1/completions", OPENAI_TEXT[1] | {"suffix": "a"}, None, ["unknown key 'suffix'", "prompt"]),
    ("/v1/completions", OPENAI_TEXT[1] | {"logprobs": -1}, "logprobs", ["greater than or equal to 0", "-1"]),
    ("/v1/completions", OPENAI_TEXT[1] | {"prompt": ["x"] * 65}, "prompt", ["at most 64"]),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"), BAD_INPUT, ids=[f"{path} {param}" for path, _, param, _ in BAD_INPUT]
)
def test_bad_input_is_400_with_the_field_the_value_and_what_is_allowed(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any], param: str | None, words: list[str]
) -> None:
    reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = error_of(reply, 400)
    for word in words:
        assert word in error["message"]
    assert (error["code"], error["type"]) == ("bad_input", "invalid_request_error")
    assert (error["param"] or "").startswith(param or "")
    assert bool(error["param"]) == bool(param), error["param"]
    assert len(error["message"]) < 2_000
    assert engine.asked == []


def test_bad_input_is_told_alike_flat_and_wrapped(client: TestClient) -> None:
    body = CHAT | {"sampling_params": {"temperature": -1}}
    flat, wrapped = (
        error_of(client.post("/inference/chat_completion", json=one), 400) for one in (body, {"request": body})
    )
    assert (flat["message"], flat["param"]) == (wrapped["message"], wrapped["param"])

"""What our own OpenAPI document allows, and what it does not, at both doors: no request makes the server fail.

The requests are drawn by schemathesis, the same ones each time.
"""

import gc
import json
import logging
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema_rs
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies

from stack.config import Config
from stack.context import Context
from tests.api.envelope import error_of, events_of
from tests.api.test_gateway import JSON, POSTS
from tests.api.test_inference import CHAT, STACK_TEXT
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it warns of as it is imported
    import schemathesis
    from schemathesis import Case, GenerationMode

APIS = ("/inference/", "/batch_inference/", "/synthetic_data_generation/", "/reward_scoring/", "/safety/", "/v1/")
FUZZED = [path for path in POSTS if path.startswith(APIS) and "/job" not in path]
FUZZED += ["/agentic_system/create", "/agentic_system/turn/create"]
# Nothing is kept for another run, and a request that fails is told as it was drawn: to make it smaller takes minutes.
SETTINGS = settings(
    max_examples=15,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
CHECKS = [schemathesis.checks.content_type_conformance, schemathesis.checks.response_schema_conformance]
KNOWN = {"/inference/embeddings": "embedder", "/v1/embeddings": "embedder", "/reward_scoring/score": "reward"}


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    models = {
        "embedding_models": [{"id": "embedder", "path": "models/embedder"}],
        "reward_models": [{"kind": "classifier", "id": "reward", "path": "models/reward"}],
    }
    context = Context.open(Config.parse(CONFIG | models | {"store": store_url}, "the tests' config"), engine=engine)
    yield context
    context.close()


@pytest.mark.parametrize("path", FUZZED)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_body_makes_the_server_fail(app: FastAPI, client: TestClient, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_dict(app.openapi())[path]["POST"]

    @seed(4)
    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        reply = client.post(path, content=content_of(path, case), headers=JSON)
        assert reply.status_code in (200, 400, 404, 413), reply.text
        if reply.headers["content-type"].startswith("text/event-stream"):
            assert "text/event-stream" in documented(app, path)
            assert '"error"' not in reply.text
            return
        if reply.status_code != 200:
            error_of(reply, reply.status_code)
        case.validate_response(reply, checks=CHECKS)

    ask()


def content_of(path: str, case: Case) -> bytes:
    """The body of a case, whose model is mostly one that is there."""
    body = case.body
    if isinstance(body, schemathesis.core.NotSet):
        return b""
    if isinstance(body, bytes):
        return body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) != 1:
        body = body | {"model": KNOWN.get(path, "small")}
    return json.dumps(body, default=repr).encode()


def documented(app: FastAPI, path: str) -> dict[str, Any]:
    """The types of the answers of a route, with their schemas."""
    types: dict[str, Any] = app.openapi()["paths"][path]["post"]["responses"]["200"]["content"]
    return types


@pytest.mark.parametrize("path", ["/inference/chat_completion", "/inference/completion", "/v1/chat/completions"])
def test_the_events_of_a_stream_are_as_documented(app: FastAPI, client: TestClient, path: str) -> None:
    body = CHAT if "chat" in path else STACK_TEXT[1]
    events = events_of(client.post(path, json=body | {"stream": True}))
    schema = documented(app, path)["text/event-stream"]["schema"]
    validator = jsonschema_rs.validator_for({"components": app.openapi()["components"], **schema})
    for event in events:
        if event != "[DONE]":
            validator.validate(event)


@seed(4)
@settings(SETTINGS, max_examples=100)
@given(name=strategies.text(max_size=400))
def test_no_name_of_a_model_makes_the_server_fail(client: TestClient, name: str) -> None:
    reply = client.get(f"/v1/models/{quote(name, safe='')}")
    error_of(reply, 400 if "\0" in name else 404)


# Values that no field takes, or that one takes where another does not.
ODD: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1e308,
    "",
    "x" * 5_000,
    "\0",
    "\ud800",
    [],
    [[]],
    {},
    {"a": {}},
    [None] * 2_000,
]
PLAIN: dict[str, dict[str, Any]] = {
    "/inference/chat_completion": CHAT | {"sampling_params": {"strategy": "greedy"}, "tools": [{"tool_name": "a"}]},
    "/inference/completion": STACK_TEXT[1] | {"logprobs": {"top_k": 1}},
    "/synthetic_data_generation/generate": {
        "dialogs": CHAT["messages"],
        "filtering_function": "top_k_top_p",
        "model": "small",
        "reward_model": "reward",
        "num_generations": 2,
        "sampling_params": {"strategy": "top_p", "temperature": 1},
        "threshold": 0,
        "seed": 1,
    },
    "/v1/chat/completions": CHAT
    | {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "stop": ["a"],
        "logit_bias": {"1": 1},
        "response_format": {"type": "text"},
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {
        "model": "small",
        "prompt": ["a"],
        "structured_outputs": {"json": {"type": "object", "properties": {"a": {"pattern": "a{1,2}"}}}},
        "n": 1,
    },
}


@pytest.mark.parametrize("path", PLAIN)
def test_an_odd_value_in_any_place_makes_no_server_fail(client: TestClient, path: str) -> None:
    assert client.post(path, json=PLAIN[path]).status_code == 200
    for place in places(PLAIN[path]):
        for odd in ODD:
            reply = client.post(path, content=json.dumps(changed(PLAIN[path], place, odd)), headers=JSON)
            assert reply.status_code in (200, 400, 404), (place, odd, reply.text)
            if reply.status_code != 200:
                assert len(error_of(reply, reply.status_code)["message"]) < 2_000


def places(value: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values within a value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*so_far, key)
        yield from places(value[key], (*so_far, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of a value with another one at a place."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


def test_thousands_of_bad_requests_leave_no_memory_taken(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # pytest keeps what is logged, as the client does each request

    def ask(number: int) -> None:
        name = f"name-{number}" * 20
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", CHAT | {"model": name}),
            ("/v1/chat/completions", CHAT | {name: 1}),
            ("/v1/chat/completions", CHAT | {"structured_outputs": {"regex": f"({name}){{1,9999}}"}}),
            ("/v1/completions", {"model": "small", "prompt": [-1, name] * 50}),
            ("/inference/chat_completion", CHAT | {"messages": [{"role": name, "content": name}] * 20}),
            ("/inference/completion", {"model": name, "content": name}),
            ("/v1/embeddings", {"model": name, "input": name}),
            ("/batch_inference/chat_completion", {"model": name, "messages_batch": name}),
        ]
        path, body = bodies[number % len(bodies)]
        error_of(client.post(path, json=body), 404 if body.get("model") == name and path != bodies[7][0] else 400)

    for number in range(200):  # what is made once, and caches that are bounded
        ask(number)
    tracemalloc.start()
    try:
        taken = []
        for number in range(200, 2_200):
            ask(number)
            if number in (1_199, 2_199):
                gc.collect()
                taken.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert taken[1] - taken[0] < 100_000, "1,000 requests have left so many bytes taken"

"""Batch inference over HTTP: answers that the specification's client can read, rows that fail, and who leaves."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from llama_stack import LlamaStack

from stack.errors import BadInput, Unavailable
from tests.api.conftest import HERE, URL
from tests.api.envelope import checked, error_of
from tests.scripted_engine import ScriptedEngine

QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris is big.", "stop_reason": "end_of_turn", "tool_calls": []}
NOTHING = {"role": "assistant", "content": "", "stop_reason": "out_of_tokens", "tool_calls": []}
CHATS = ("/batch_inference/chat_completion", {"model": "small", "messages_batch": [[QUESTION], [QUESTION]]})
TEXTS = ("/batch_inference/completion", {"model": "small", "content_batch": ["The capital is", ["a", "b"]]})
both = pytest.mark.parametrize(("path", "body"), [CHATS, TEXTS], ids=["chats", "texts"])


@both
@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_every_row_is_answered(client: TestClient, path: str, body: dict[str, Any], wrapped: bool) -> None:
    reply = client.post(path, json={"request": body} if wrapped else body)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"completion_message_batch": [ANSWER, ANSWER], "errors": []}


@both
def test_logprobs_come_beside_the_answers(client: TestClient, path: str, body: dict[str, Any]) -> None:
    batch = client.post(path, json=body | {"logprobs": {"top_k": 2}}).json()["logprobs_batch"]
    assert [len(logprobs) for logprobs in batch] == [3, 3]
    assert batch[0][0] == {"logprobs_by_token": {"Paris": -0.25, " other": -1.5}}


def test_a_bad_row_fails_alone_with_its_index(client: TestClient, engine: ScriptedEngine) -> None:
    rows = [[QUESTION], [{"role": "user", "content": 5}], [QUESTION], "nonsense"]
    reply = client.post("/batch_inference/chat_completion", json={"model": "small", "messages_batch": rows})
    assert reply.status_code == 200
    assert reply.json()["completion_message_batch"] == [ANSWER, NOTHING, ANSWER, NOTHING]
    first, second = reply.json()["errors"]
    assert (first["index"], second["index"]) == (1, 3)
    assert first["error"]["param"] == "messages_batch.1.0.content"
    assert "not 5" in first["error"]["message"]
    assert second["error"]["param"] == "messages_batch.3"
    for one in (first, second):
        # As in the envelope, but for the id of the request, which its answer has.
        checked({"error": {"param": None, **one["error"], "request_id": reply.headers["x-request-id"]}})
    assert len(engine.asked) == 2


@both
def test_rows_that_are_all_bad_are_told_with_200(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail(BadInput("the prompt is too long"))
    reply = client.post(path, json=body)
    assert reply.status_code == 200
    assert reply.json()["completion_message_batch"] == [NOTHING, NOTHING]
    assert [one["error"]["message"] for one in reply.json()["errors"]] == ["the prompt is too long"] * 2


@both
def test_an_engine_that_answers_no_row_is_503_with_when_to_ask_again(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail(Unavailable("the model does not start"))
    reply = client.post(path, json=body)
    assert error_of(reply, 503)["message"] == "the model does not start"
    assert int(reply.headers["retry-after"]) > 0


@both
@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"model": "big"}, 404, "model"),
        ({"sampling_params": {"strategy": "top_k"}}, 400, "sampling_params.top_k"),
        ({"sampling_params": {"strategy": "beam"}}, 400, "sampling_params.strategy"),
        ({"logprobs": {"top_k": 21}}, 400, "logprobs.top_k"),
        ({"messages_batch": [], "content_batch": []}, 400, None),
        ({"messages_batch": {}, "content_batch": {}}, 400, None),
        ({"stream": True}, 400, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_for_all_rows_is_an_error(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any], wrong: Any, status: int, param: Any
) -> None:
    known = {key: value for key, value in wrong.items() if key in body or not key.endswith("_batch")}
    error = error_of(client.post(path, json=body | known), status)
    assert param is None or error["param"] == param
    assert engine.asked == []


def test_more_rows_than_allowed_are_refused_before_anything_is_asked(
    client: TestClient, engine: ScriptedEngine
) -> None:
    error = error_of(client.post("/batch_inference/completion", json=TEXTS[1] | {"content_batch": ["a"] * 257}), 400)
    assert (error["param"], error["message"]) == (
        "content_batch",
        "content_batch: has 257 entries; allowed: at most 256",
    )
    assert engine.asked == []
    reply = client.post("/batch_inference/completion", json=TEXTS[1] | {"content_batch": ["a"] * 256})
    assert len(reply.json()["completion_message_batch"]) == 256


def test_the_specifications_client_reads_the_answers(client: TestClient) -> None:
    def to_gateway(request: httpx.Request) -> httpx.Response:
        reply = client.post(request.url.path, content=request.content, headers=dict(request.headers))
        return httpx.Response(reply.status_code, content=reply.content, headers=dict(reply.headers))

    with httpx.Client(base_url=URL, transport=httpx.MockTransport(to_gateway)) as http:
        stack = LlamaStack(base_url=URL, http_client=http)
        batches: Any = [[QUESTION], [], [QUESTION]]
        chats = stack.batch_inference.chat_completion(model="small", messages_batch=batches)
        assert [one.content for one in chats.completion_message_batch] == ["Paris is big.", "", "Paris is big."]
        assert [one.stop_reason for one in chats.completion_message_batch] == [
            "end_of_turn", "out_of_tokens", "end_of_turn",
        ]  # fmt: skip
        assert [one["index"] for one in chats.model_extra["errors"]] == [1]  # type: ignore[index]
        texts = stack.batch_inference.completion(model="small", content_batch=["a", ["b", "c"]])
        assert [one.content for one in texts.completion_message_batch] == ["Paris is big."] * 2


@both
async def test_a_client_that_leaves_takes_all_rows_along(
    app: FastAPI, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    engine.fail("hang")
    generate, all_asked = engine.generate, asyncio.Event()

    def watched(*asked: Any) -> Any:
        if len(engine.asked) == 1:
            all_asked.set()
        return generate(*asked)

    monkeypatch.setattr(engine, "generate", watched)
    arrived: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if arrived:
            return arrived.pop(0)
        await all_asked.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": headers, "client": HERE, "server": HERE, "scheme": "http", "root_path": "", "http_version": "1.1",
        "asgi": {"version": "3.0"},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), timeout=30)
    assert engine.closed_early.is_set()
    assert sent[0]["status"] == 499

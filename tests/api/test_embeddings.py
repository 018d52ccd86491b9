"""Embeddings at both doors."""

import asyncio
import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from llama_stack import LlamaStack

from stack.api.embeddings import EmbeddingsResponse, OpenAIEmbeddingsResponse
from stack.config import Config
from stack.context import Context
from stack.errors import EngineFailed, StackError, Unavailable
from tests.api.conftest import HERE, URL
from tests.api.envelope import error_of
from tests.conftest import CONFIG
from tests.scripted_engine import DIMENSIONS, MAX_WORDS, ScriptedEngine, vector_of

EMBEDDING_MODELS: list[dict[str, Any]] = [
    {"id": "embedder", "path": "models/embedder"},
    {"id": "declared", "path": "models/embedder", "dimensions": DIMENSIONS},
    {"id": "nested", "path": "models/embedder", "matryoshka": True},
]
STACK = ("/inference/embeddings", {"model": "embedder", "contents": ["a text"]})
OPENAI = ("/v1/embeddings", {"model": "embedder", "input": ["a text"]})
both_doors = pytest.mark.parametrize(
    ("path", "field"), [("/inference/embeddings", "contents"), ("/v1/embeddings", "input")], ids=["stack", "openai"]
)
LONG = "word " * (MAX_WORDS + 1)


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "embedding_models": EMBEDDING_MODELS, "max_body_bytes": 16 * 2**20}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


def close(vector: list[float], text: str) -> bool:
    return vector == pytest.approx(vector_of(text), abs=1e-6)


# Answers


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_the_stack_door_has_a_vector_for_each_text(client: TestClient, wrapped: bool) -> None:
    body = {"model": "embedder", "contents": ["one", ["in ", "parts"], "one"]}
    reply = client.post("/inference/embeddings", json={"request": body} if wrapped else body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    first, second, third = EmbeddingsResponse.model_validate(reply.json()).embeddings
    assert close(first, "one")
    assert close(second, "in parts")
    assert third == first


@pytest.mark.parametrize(
    ("given", "texts", "tokens"),
    [
        ("one text", ["one text"], 2),
        (["one", "two of them"], ["one", "two of them"], 4),
        ([5, 6, 7], ["5 6 7"], 3),
        ([[5, 6], [7]], ["5 6", "7"], 3),
    ],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
def test_the_openai_door_takes_its_four_kinds_of_input(
    client: TestClient, given: Any, texts: list[str], tokens: int
) -> None:
    reply = client.post("/v1/embeddings", json={"model": "embedder", "input": given})
    assert reply.status_code == 200, reply.text
    answer = OpenAIEmbeddingsResponse.model_validate(reply.json())
    assert (answer.object, answer.model) == ("list", "embedder")
    assert [one.index for one in answer.data] == list(range(len(texts)))
    assert all(
        isinstance(one.embedding, list) and close(one.embedding, text)
        for one, text in zip(answer.data, texts, strict=True)
    )
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def test_base64_holds_the_same_numbers_as_little_endian_float32(client: TestClient) -> None:
    body = {"model": "embedder", "input": ["one", "two"]}
    lists = client.post("/v1/embeddings", json=body | {"encoding_format": "float"}).json()
    written = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    for one, other in zip(lists["data"], written["data"], strict=True):
        assert list(struct.unpack(f"<{DIMENSIONS}f", base64.b64decode(other["embedding"]))) == one["embedding"]
    assert lists["usage"] == written["usage"]


@both_doors
def test_a_text_over_the_models_length_is_refused_with_both_lengths(client: TestClient, path: str, field: str) -> None:
    error = error_of(client.post(path, json={"model": "embedder", field: ["short", LONG]}), 400)
    assert "text 1 has 21 tokens" in error["message"]
    assert str(MAX_WORDS) in error["message"]
    assert error["param"] == field


@both_doors
def test_it_is_cut_where_that_is_asked_for(client: TestClient, engine: ScriptedEngine, path: str, field: str) -> None:
    reply = client.post(path, json={"model": "embedder", field: ["short", LONG], "truncate": True})
    assert reply.status_code == 200, reply.text
    (asked,) = engine.asked_to_embed
    assert (asked.model.id, asked.texts, asked.truncate) == ("embedder", ["short", LONG], True)


@pytest.fixture
def http(client: TestClient) -> Iterator[httpx.Client]:
    """What other clients take to reach the gateway."""

    def to_gateway(request: httpx.Request) -> httpx.Response:
        reply = client.post(request.url.path, content=request.content, headers=dict(request.headers))
        return httpx.Response(reply.status_code, content=reply.content, headers=dict(reply.headers))

    with httpx.Client(base_url=URL, transport=httpx.MockTransport(to_gateway)) as http:
        yield http


def test_the_specifications_client_reads_the_vectors(http: httpx.Client) -> None:
    stack = LlamaStack(base_url=URL, http_client=http)
    answer = stack.inference.embeddings.create(model="embedder", contents=["one", ["in ", "parts"]])
    assert close(answer.embeddings[0], "one")
    assert close(answer.embeddings[1], "in parts")


def test_openais_client_reads_the_vectors(http: httpx.Client) -> None:
    api = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", http_client=http, max_retries=0)
    encodings: list[Any] = [{}, {"encoding_format": "float"}]  # the client's own default is base64, which it decodes
    for encoding in encodings:
        answer = api.embeddings.create(model="embedder", input=["one", "two"], **encoding)
        assert all(close(one.embedding, text) for one, text in zip(answer.data, ("one", "two"), strict=True))
        assert answer.usage.total_tokens == 2
    with pytest.raises(openai.BadRequestError, match="cannot be shortened"):
        api.embeddings.create(model="embedder", input="one", dimensions=3)


# Dimensions


@pytest.mark.parametrize("format", ["float", "base64"])
def test_vectors_that_may_be_are_shortened_and_have_the_length_one(client: TestClient, format: str) -> None:
    body = {"model": "nested", "input": "one", "dimensions": 3, "encoding_format": format}
    (data,) = client.post("/v1/embeddings", json=body).json()["data"]
    given = data["embedding"]
    vector = given if format == "float" else list(struct.unpack("<3f", base64.b64decode(given)))
    beginning = vector_of("one")[:3]
    length = sum(number**2 for number in beginning) ** 0.5
    assert vector == pytest.approx([number / length for number in beginning], abs=1e-6)


@pytest.mark.parametrize("model", [model["id"] for model in EMBEDDING_MODELS])
def test_all_dimensions_may_be_asked_for(client: TestClient, model: str) -> None:
    reply = client.post("/v1/embeddings", json={"model": model, "input": "one", "dimensions": DIMENSIONS})
    assert close(reply.json()["data"][0]["embedding"], "one")


@pytest.mark.parametrize(
    ("model", "dimensions", "words"),
    [
        ("embedder", 3, ["dimensions is 3", f"{DIMENSIONS} alone", "cannot be shortened"]),
        ("declared", 3, ["dimensions is 3", f"{DIMENSIONS} alone"]),
        ("declared", 9, ["dimensions is 9", f"{DIMENSIONS} alone"]),
        ("nested", 9, ["dimensions is 9", f"1 to {DIMENSIONS}"]),
        ("nested", 0, ["dimensions", "greater than or equal to 1"]),
    ],
)
def test_other_dimensions_are_refused_with_the_reason(
    client: TestClient, model: str, dimensions: int, words: list[str]
) -> None:
    body = {"model": model, "input": "one", "dimensions": dimensions}
    error = error_of(client.post("/v1/embeddings", json=body), 400)
    assert error["param"] == "dimensions"
    for word in words:
        assert word in error["message"]


def test_where_the_dimensions_are_known_nothing_is_computed_for_a_refusal(
    client: TestClient, engine: ScriptedEngine
) -> None:
    error_of(client.post("/v1/embeddings", json={"model": "declared", "input": "one", "dimensions": 3}), 400)
    assert engine.asked_to_embed == []


# Models


def test_models_are_listed_with_the_embedding_models(client: TestClient) -> None:
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed == ["small", "embedder", "declared", "nested"]
    assert client.get("/v1/models/embedder").json()["id"] == "embedder"


@both_doors
def test_a_model_of_the_wrong_kind_is_400_and_the_right_ones_are_named(
    client: TestClient, path: str, field: str
) -> None:
    error = error_of(client.post(path, json={"model": "small", field: ["a"]}), 400)
    assert error["param"] == "model"
    assert "'small' makes text and no embeddings; models for that: embedder, declared, nested" in error["message"]
    error = error_of(client.post(path, json={"model": "none", field: ["a"]}), 404)
    assert error["code"] == "model_not_found"
    assert "embedder" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/inference/chat_completion", {"messages": [{"role": "user", "content": "a"}]}),
        ("/inference/completion", {"content": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ],
)
def test_an_embedding_model_is_asked_for_no_text(client: TestClient, path: str, body: dict[str, Any]) -> None:
    error = error_of(client.post(path, json=body | {"model": "embedder"}), 400)
    assert error["param"] == "model"
    assert error["message"] == "the model 'embedder' makes embeddings and no text; models for that: small"


# Bad input


@both_doors
@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], []),
        ([""], ["text 0 is empty"]),
        (["a", ""], ["text 1 is empty"]),
        (["a"] * 2_049, ["2049", "2048"]),
        (["a", "b" * 200_001], ["text 1 has 200001", "200000"]),
        (["a" * 200_000] * 10 + ["a"], ["2000001", "2000000"]),
        (["a", 5], []),
        (["a", None], []),
        ([{"text": "a"}], []),
        ([{"content": "a", "mime_type": "text/plain"}], []),
        ({"0": "a"}, []),
        (5, []),
        (None, []),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_texts_are_bounded(
    client: TestClient, engine: ScriptedEngine, path: str, field: str, texts: Any, words: list[str]
) -> None:
    error = error_of(client.post(path, json={"model": "embedder", field: texts}), 400)
    assert field in f"{error['param']} {error['message']}"
    assert len(error["message"]) < 1_000
    for word in words:
        assert word in error["message"]
    assert engine.asked_to_embed == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", ["text 0 is empty"]),
        ([[]], ["text 0 is empty"]),
        ([[5], []], ["text 1 is empty"]),
        ([5, "a"], ["text 0", "integers from 0"]),
        (["a", [5]], ["text 1 is not a text"]),
        ([[5], "a"], ["text 1 is not a list of tokens"]),
        ([-1], ["text 0", "integers from 0"]),
        ([1.5], ["text 0", "integers from 0"]),
        ([True], ["text 0", "integers from 0"]),
        ([[5, 10_000_001]], ["text 0", "10000000"]),
        ([5] * 200_001, ["text 0 has 200001", "200000"]),
        ([None], ["text 0 is not a list of tokens"]),
        ([[[5]]], ["text 0 is not a list of tokens"]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_tokens_are_bounded(client: TestClient, given: Any, words: list[str]) -> None:
    error = error_of(client.post("/v1/embeddings", json={"model": "embedder", "input": given}), 400)
    assert error["param"] == "input"
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([["a"] * 101], ["contents.0", "101", "100"]),
        ([["a", ["b"]]], ["contents.0.1"]),
        ([[]], ["text 0 is empty"]),
        ([["", ""]], ["text 0 is empty"]),
        ([["a" * 150_000] * 2], ["text 0 has 300000"]),
        (
            [{"content": "a", "mime_type": "text/plain"}],
            ["contents.0", "a text, or a list of texts that are its parts"],
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_texts_in_parts_are_bounded(client: TestClient, contents: Any, words: list[str]) -> None:
    error = error_of(client.post("/inference/embeddings", json={"model": "embedder", "contents": contents}), 400)
    for word in words:
        assert word in f"{error['param']}: {error['message']}"


@pytest.mark.parametrize("given", [b'"a\\ud83d"', b'["a", "\\ud83d"]'])
@both_doors
def test_half_a_character_is_400(client: TestClient, path: str, field: str, given: bytes) -> None:
    body = b'{"model": "embedder", "%s": %s}' % (field.encode(), given)
    error_of(client.post(path, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"user": "a" * 1_001}, "user"),
        ({"truncate": "perhaps"}, "truncate"),
    ],
)
def test_what_the_openai_door_does_not_know_is_refused_by_name(
    client: TestClient, more: dict[str, Any], word: str
) -> None:
    error = error_of(client.post("/v1/embeddings", json=OPENAI[1] | more), 400)
    assert word in f"{error['param']} {error['message']}"


# Faults


@pytest.mark.parametrize(("path", "body"), [STACK, OPENAI], ids=["stack", "openai"])
@pytest.mark.parametrize(
    ("fault", "status", "retry_after"),
    [(EngineFailed("the model failed"), 500, None), (Unavailable("the model cannot answer now"), 503, "5")],
    ids=["failed", "away"],
)
def test_a_fault_of_the_model_has_its_status(
    client: TestClient,
    engine: ScriptedEngine,
    path: str,
    body: dict[str, Any],
    fault: StackError,
    status: int,
    retry_after: str | None,
) -> None:
    engine.fail(fault)
    reply = client.post(path, json=body)
    assert error_of(reply, status)["message"] == fault.message
    assert reply.headers.get("retry-after") == retry_after


@pytest.mark.parametrize(("path", "body"), [STACK, OPENAI], ids=["stack", "openai"])
async def test_a_client_that_leaves_ends_the_work(
    app: FastAPI, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    engine.fail("hang")
    embed, asked = engine.embed, asyncio.Event()

    async def watched(*args: Any) -> Any:
        asked.set()
        return await embed(*args)

    monkeypatch.setattr(engine, "embed", watched)
    arrived: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if arrived:
            return arrived.pop(0)
        await asked.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")], "client": HERE, "server": HERE,
        "scheme": "http", "root_path": "", "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), timeout=30)
    assert engine.closed_early.is_set()

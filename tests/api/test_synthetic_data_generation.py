"""Synthetic data generation over HTTP, also by the specification's own client."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from llama_stack import LlamaStack

from stack.config import Config
from stack.context import Context
from stack.errors import Unavailable
from tests.api.conftest import HERE, URL
from tests.api.envelope import error_of
from tests.conftest import CONFIG
from tests.varied_engine import VariedEngine

PATH = "/synthetic_data_generation/generate"
REWARD_MODELS = [{"kind": "classifier", "id": "reward", "path": "models/reward", "max_tokens": 16}]
QUESTION: dict[str, Any] = {"role": "user", "content": "Where?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "There."}
ATTACHMENT = {"content": "https://example.com/a.txt", "mime_type": "text/plain"}
BODY: dict[str, Any] = {"dialogs": [QUESTION, QUESTION], "filtering_function": "top_k", "model": "small"}


@pytest.fixture
def engine() -> VariedEngine:
    engine = VariedEngine()
    engine.logits_of = lambda text: [float(len(text.split()))]
    return engine


@pytest.fixture
def context(home: Path, store_url: str, engine: VariedEngine) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "reward_models": REWARD_MODELS}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_the_best_generation_to_each_dialog_is_kept(client: TestClient, wrapped: bool) -> None:
    reply = client.post(PATH, json={"request": BODY} if wrapped else BODY)
    assert reply.status_code == 200, reply.text
    rows = reply.json()["synthetic_data"]
    assert [row["dialog"] for row in rows] == [[QUESTION], [QUESTION]]
    for row in rows:
        (best,) = row["scored_generations"]
        assert best["message"]["role"] == "assistant"
        assert best["score"] == len(best["message"]["content"].split()) + 1
    statistics = reply.json()["statistics"]
    assert (statistics["generated"], statistics["kept"], statistics["failed"]) == (8, 2, 0)
    assert reply.json()["errors"] == []


def test_the_specifications_own_client_reads_the_data(client: TestClient) -> None:
    def to_gateway(request: httpx.Request) -> httpx.Response:
        reply = client.post(request.url.path, content=request.content, headers=dict(request.headers))
        return httpx.Response(reply.status_code, content=reply.content, headers=dict(reply.headers))

    dialogs: Any = [QUESTION, QUESTION]
    with httpx.Client(base_url=URL, transport=httpx.MockTransport(to_gateway)) as http:
        made = LlamaStack(base_url=URL, http_client=http).synthetic_data_generation.generate(
            dialogs=dialogs, filtering_function="none", model="small"
        )
    assert len(made.synthetic_data) == 2
    assert [len(row.scored_generations) for row in made.synthetic_data] == [4, 4]
    assert made.statistics is not None
    assert made.statistics["generated"] == 8


def test_a_dialog_that_is_too_long_is_told_alone(client: TestClient) -> None:
    long = [QUESTION | {"content": "x " * 20}]
    reply = client.post(PATH, json=BODY | {"dialogs": [[QUESTION], long]})
    assert reply.status_code == 200
    (error,) = reply.json()["errors"]
    assert (error["index"], error["error"]["param"]) == (1, "dialogs.1")
    assert "allowed: at most 16" in error["error"]["message"]
    assert [len(row["scored_generations"]) for row in reply.json()["synthetic_data"]] == [1, 0]


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"dialogs": []}, 400, "dialogs", "at least 1 item"),
        ({"dialogs": [{"role": "assistant", "content": "a"}]}, 400, None, "the dialog 0 ends with"),
        ({"dialogs": [*[QUESTION, ANSWER] * 500, QUESTION]}, 400, None, "1001 messages; allowed: at most 1000"),
        ({"dialogs": [QUESTION | {"content": ATTACHMENT}]}, 400, None, "the dialog 0 has an attachment"),
        ({"filtering_function": "best"}, 400, "filtering_function", "'sigmoid', not 'best'"),
        ({"num_generations": 0}, 400, "num_generations", "not 0"),
        ({"num_generations": 10_000}, 400, "num_generations", "not 10000"),
        ({"model": "big"}, 404, "model", "there is no model 'big'; there are: small"),
        ({"reward_model": "big"}, 404, "reward_model", "there are: reward"),
    ],
)
def test_a_bad_request_says_what_is_allowed(
    client: TestClient, change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = error_of(client.post(PATH, json=BODY | change), status)
    assert error["param"] == param
    assert words in error["message"]


def test_a_reward_model_that_is_down_is_503_and_named(
    client: TestClient, engine: VariedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("it is being started", retry_after=30)

    monkeypatch.setattr(engine, "classify", away)
    reply = client.post(PATH, json=BODY)
    assert "the reward model 'reward' cannot score now" in error_of(reply, 503)["message"]
    assert reply.headers["retry-after"] == "30"


async def test_who_leaves_takes_all_generations_along(app: FastAPI, engine: VariedEngine) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def hang(*_: Any) -> Any:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    engine.classify = hang  # type: ignore[method-assign]
    messages = iter([{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}])

    async def receive() -> Any:
        if (message := next(messages, None)) is not None:
            return message
        await asked.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        """Nobody reads it."""

    scope = {
        "type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")], "client": HERE,
        "server": ("127.0.0.1", 8321), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    await app(scope, receive, send)
    await asyncio.wait_for(left.wait(), 10)

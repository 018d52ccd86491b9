"""Reward scoring over HTTP, also by the specification's own client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from llama_stack import LlamaStack

from stack.config import Config
from stack.context import Context
from stack.errors import EngineFailed, StackError, TooManyRequests, Unavailable
from tests.api.conftest import URL
from tests.api.envelope import error_of
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

REWARD_MODELS = [
    {"kind": "classifier", "id": "reward", "path": "models/reward", "max_tokens": 16},
    {"kind": "judge", "id": "judge", "model": "small", "rubric": "Is it right?"},
]
PATH = "/reward_scoring/score"
QUESTION: dict[str, Any] = {"role": "user", "content": "Where?"}
GOOD: dict[str, Any] = {"role": "assistant", "content": "In Paris", "stop_reason": "end_of_turn", "tool_calls": []}
BAD: dict[str, Any] = GOOD | {"content": "Paris"}
BODY = {"model": "reward", "dialog_generations": [{"dialog": [QUESTION], "sampled_generations": [GOOD, BAD]}]}


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    engine.logits_of = lambda text: [len(text.split()) - 1.5]
    config = CONFIG | {"store": store_url, "reward_models": REWARD_MODELS}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_each_generation_has_a_score(client: TestClient, wrapped: bool) -> None:
    reply = client.post(PATH, json={"request": BODY} if wrapped else BODY)
    assert reply.status_code == 200, reply.text
    scored = [{"message": GOOD, "score": 1.5}, {"message": BAD, "score": 0.5}]
    assert reply.json() == {"scored_generations": [{"dialog": [QUESTION], "scored_generations": scored}]}


def test_those_below_a_threshold_are_left_out(client: TestClient) -> None:
    reply = client.post(PATH, json=BODY | {"threshold": 1}).json()
    assert [one["message"] for one in reply["scored_generations"][0]["scored_generations"]] == [GOOD]
    reply = client.post(PATH, json=BODY | {"threshold": 2}).json()
    assert reply == {"scored_generations": [{"dialog": [QUESTION], "scored_generations": []}]}


def test_the_specifications_own_client_reads_the_scores(client: TestClient) -> None:
    def to_gateway(request: httpx.Request) -> httpx.Response:
        reply = client.post(request.url.path, content=request.content, headers=dict(request.headers))
        return httpx.Response(reply.status_code, content=reply.content, headers=dict(reply.headers))

    dialogs: Any = [{"dialog": [QUESTION], "sampled_generations": [GOOD, BAD]}] * 2
    with httpx.Client(base_url=URL, transport=httpx.MockTransport(to_gateway)) as http:
        scored = LlamaStack(base_url=URL, http_client=http).reward_scoring.score(
            model="reward", dialog_generations=dialogs
        )
    assert len(scored.scored_generations) == 2
    assert [one.score for one in scored.scored_generations[1].scored_generations] == [1.5, 0.5]
    assert scored.scored_generations[1].scored_generations[0].message.content == "In Paris"
    assert scored.scored_generations[1].dialog[0].content == "Where?"


def test_reward_models_are_listed_with_the_others(client: TestClient) -> None:
    ids = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert ids == ["small", "reward", "judge"]
    assert client.get("/v1/models/judge").json()["id"] == "judge"


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "big"}, 404, "model", "there is no reward model 'big'; there are: reward, judge"),
        ({"model": "small"}, 400, "model", "models for that: reward, judge"),
        ({"dialog_generations": []}, 400, "dialog_generations", "at least 1 item"),
        ({"threshold": "high"}, 400, "threshold", "not 'high'"),
        ({"treshold": 1}, 400, None, "unknown key 'treshold'; allowed: dialog_generations, model, threshold"),
        (
            {"dialog_generations": [{"dialog": [QUESTION], "sampled_generations": [GOOD, {"role": "judge"}]}]},
            400,
            "dialog_generations.0.sampled_generations.1",
            "'role' is 'judge'",
        ),
        (
            {"dialog_generations": [{"dialog": [QUESTION], "sampled_generations": [GOOD | {"content": "a " * 20}]}]},
            400,
            "dialog_generations.0.sampled_generations.0",
            "tokens; allowed: at most 16",
        ),
    ],
)
def test_a_bad_request_says_what_is_allowed(
    client: TestClient, change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    reply = client.post(PATH, json=BODY | change)
    error = error_of(reply, status)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fault", "status"),
    [(Unavailable("it starts"), 503), (TooManyRequests("full"), 429), (EngineFailed("it died"), 500)],
)
def test_what_the_engine_cannot_do_is_told(
    client: TestClient, engine: ScriptedEngine, fault: StackError, status: int
) -> None:
    engine.fail(fault)
    assert error_of(client.post(PATH, json=BODY), status)["message"] == fault.message


def test_a_judge_that_gives_no_rating_is_told_with_the_generation(client: TestClient) -> None:
    error = error_of(client.post(PATH, json=BODY | {"model": "judge"}), 400)
    assert error["param"].startswith("dialog_generations.0.sampled_generations.")
    assert "the judge 'judge' gives no rating from 1 to 5: it would begin with 'Paris'" in error["message"]

"""What clients see of a model that is not there yet, dies, hangs, or has too much to do: on the scripted engine."""

import json
import threading
from typing import Any

import httpx
import psutil
import pytest

from tests.running_stack import MODEL, SCRIPTED, Stack, command_of, wait_for

pytestmark = pytest.mark.alone

CHAT = "/v1/chat/completions"
START_S = 180


def body(text: str, tokens: int = 3, stream: bool = False, model: str = SCRIPTED) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": stream}


def post(client: httpx.Client, text: str, **fields: Any) -> httpx.Response:
    return client.post(CHAT, json=body(text, **fields))


@pytest.fixture
def model(client: httpx.Client) -> None:
    """The model has a replica. Until then each request says that it is started, and when to ask again."""

    def answers() -> bool:
        reply = post(client, "hello")
        if reply.status_code == 200:
            return True
        assert reply.status_code == 503, reply.text
        assert int(reply.headers["retry-after"]) > 0
        return False

    wait_for(answers, START_S)


def test_a_model_without_replicas_starts_one_when_it_is_asked(client: httpx.Client, model: None) -> None:
    assert post(client, "hello").json()["choices"][0]["message"]["content"] == "Paris is big."
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/inference/chat_completion"])
def test_a_replica_that_dies_in_a_stream_ends_it_with_an_error(client: httpx.Client, model: None, path: str) -> None:
    asked = {key: value for key, value in body("fault:die-after-2", stream=True).items() if key != "max_tokens"}
    lines = client.post(path, json=asked).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "Paris" in lines[0] + lines[1]
    assert events[-1]["error"]["code"] in ("unavailable", "engine_failed")
    assert events[-1]["error"]["request_id"]


def test_a_replica_that_dies_before_its_answer_is_an_error_and_another_one_starts(
    client: httpx.Client, model: None
) -> None:
    reply = post(client, "fault:die-before-first", stream=True)
    assert reply.status_code in (500, 503), reply.text
    assert reply.json()["error"]["message"]
    wait_for(lambda: post(client, "hello").status_code == 200, START_S)


def test_an_error_of_the_engine_is_told_at_once_or_in_the_stream(client: httpx.Client, model: None) -> None:
    assert post(client, "fault:error").status_code == 500
    text = post(client, "fault:error-after-2", stream=True).text
    assert "Paris" in text
    assert "told to fail" in text.strip().split("\n\n")[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_hangs_is_given_up_after_the_models_time(
    client: httpx.Client, model: None, stream: bool
) -> None:
    reply = post(client, "fault:hang", stream=stream)
    assert reply.status_code == 503, reply.text
    assert "within 8 s" in reply.json()["error"]["message"]
    # Its place is free again: both places of the replica are taken and given back.
    assert [post(client, "hello").status_code for _ in range(3)] == [200] * 3


def test_more_requests_than_wait_are_refused_at_once_and_the_others_answered(
    client: httpx.Client, stack: Any, model: None
) -> None:
    replies: list[httpx.Response] = []

    def one() -> None:
        with stack.client() as mine:
            replies.append(post(mine, "hello", tokens=60))  # 1.2 seconds

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [reply for reply in replies if reply.status_code == 429]
    answered = [reply for reply in replies if reply.status_code == 200]
    assert len(refused) + len(answered) == 12, [reply.text for reply in replies]
    assert len(answered) >= 2
    assert refused
    for reply in refused:
        assert reply.headers["retry-after"] == "1"
        assert reply.elapsed.total_seconds() < 1.0
    first = min(reply.elapsed.total_seconds() for reply in answered)
    assert min(reply.elapsed.total_seconds() for reply in refused) < first


def test_clients_that_leave_give_their_places_back(client: httpx.Client, model: None) -> None:
    for _ in range(4):
        with client.stream("POST", CHAT, json=body("hello", tokens=1_000, stream=True)) as reply:
            assert next(reply.iter_lines()).startswith("data: ")
    # Each of them would have taken a place for 20 seconds, of which there are two.
    replies = [post(client, "hello") for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200] * 3
    assert replies[0].elapsed.total_seconds() < 2


def test_an_engine_ends_with_its_replica_which_is_killed(client: httpx.Client, stack: Stack) -> None:
    """Its successor, which starts meanwhile, would not have the memory that an engine without a replica keeps."""
    replica = f"ServeReplica:{MODEL}:"
    engines = [
        engine
        for engine in stack.processes("VLLM::EngineCore")
        if (parent := engine.parent()) is not None and replica in command_of(parent)
    ]
    assert engines
    stack.kill_9(replica)
    _, left = psutil.wait_procs(engines, timeout=20)
    assert not left
    wait_for(lambda: post(client, "hello", model=MODEL).status_code == 200, START_S)

"""Batches on the real model: by plain HTTP, and by the specification's own client."""

from typing import Any

import httpx
import pytest
from llama_stack import LlamaStack

from tests.ray.test_abort import TOKENS, Counters
from tests.ray.test_inference import ANSWER, COUNTING, FOUR_TOKENS, GREEDY, QUESTION
from tests.running_stack import MODEL, Stack, wait_for

pytestmark = pytest.mark.alone


def batch(client: httpx.Client, *rows: Any, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages_batch": rows, "sampling_params": GREEDY} | more
    reply = client.post("/batch_inference/chat_completion", json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def test_a_batch_is_answered_as_its_rows_are_alone(client: httpx.Client) -> None:
    questions = [QUESTION, {"role": "user", "content": "Name a colour."}, {"role": "user", "content": "Count to 3."}]
    answer = batch(client, *([question] for question in questions), logprobs={"top_k": 1})
    assert answer["errors"] == []
    assert answer["completion_message_batch"][0]["content"] == ANSWER
    assert all(logprobs[0]["logprobs_by_token"] for logprobs in answer["logprobs_batch"])
    for question, message in zip(questions, answer["completion_message_batch"], strict=True):
        body = {"model": MODEL, "messages": [question], "sampling_params": GREEDY}
        alone = client.post("/inference/chat_completion", json=body).json()["completion_message"]
        assert message["role"] == "assistant"
        # The last bits of a number depend on what it is computed beside, so later words may differ.
        assert message["content"][:10] == alone["content"][:10]


def test_rows_that_are_bad_or_too_long_fail_alone(client: httpx.Client) -> None:
    too_long = [{"role": "user", "content": "word " * 3_000}]
    answer = batch(client, [QUESTION], too_long, [QUESTION], [{"role": "user"}])
    assert [message["content"] for message in answer["completion_message_batch"]] == [ANSWER, "", ANSWER, ""]
    first, second = answer["errors"]
    assert (first["index"], second["index"]) == (1, 3)
    assert "2048" in first["error"]["message"]
    assert second["error"]["param"] == "messages_batch.3.0.content"


def test_a_batch_may_be_greater_than_what_is_asked_at_once(client: httpx.Client) -> None:
    rows = [[QUESTION]] * 100
    answer = batch(client, *rows, sampling_params={"strategy": "greedy", "max_tokens": 2})
    assert answer["errors"] == []
    assert {message["content"] for message in answer["completion_message_batch"]} == {"The capital"}


def test_the_rfc_client(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=300) as http:
        client = LlamaStack(base_url=stack.url, http_client=http)
        rows: Any = [[QUESTION], [], [QUESTION]]
        chats = client.batch_inference.chat_completion(model=MODEL, messages_batch=rows, sampling_params=GREEDY)
        assert [message.content for message in chats.completion_message_batch] == [ANSWER, "", ANSWER]
        texts = client.batch_inference.completion(
            model=MODEL, content_batch=[COUNTING, ["One, two, ", "three, four,"]], sampling_params=FOUR_TOKENS
        )
        assert all("five" in message.content for message in texts.completion_message_batch)
        assert {message.stop_reason for message in texts.completion_message_batch} == {"out_of_tokens"}


def test_leaving_a_batch_ends_its_generations(stack: Stack, client: httpx.Client) -> None:
    counters = Counters(stack)
    before = counters.generated_tokens()
    story = {"role": "user", "content": "Write the numbers from 1 to 1000, one after the other: 1, 2, 3,"}
    body = {
        "model": MODEL,
        "messages_batch": [[story]] * 4,
        "sampling_params": {"strategy": "greedy", "max_tokens": TOKENS},
    }
    with pytest.raises(httpx.ReadTimeout):
        client.post("/batch_inference/chat_completion", json=body, timeout=3)

    wait_for(lambda: counters.show_idleness(client), 60)
    assert counters.generated_tokens() - before < TOKENS


def test_a_text_attachment_is_read(client: httpx.Client) -> None:
    attachment = {"content": "The capital of Freedonia is Fredville.", "mime_type": "text/plain"}
    asked = {"role": "user", "content": ["What is the capital of Freedonia?", attachment]}
    body = {"model": MODEL, "messages": [asked], "sampling_params": GREEDY}
    reply = client.post("/inference/chat_completion", json=body)
    assert reply.status_code == 200, reply.text
    assert "Fredville" in reply.json()["completion_message"]["content"]


def test_an_image_is_refused_by_a_model_of_text_alone(client: httpx.Client) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "takes text only" in reply.json()["error"]["message"]

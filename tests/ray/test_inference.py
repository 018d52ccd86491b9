"""The real model at both doors: by plain HTTP, by the RFC's own client, and by OpenAI's."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from llama_stack import AsyncLlamaStack, LlamaStack

from scripts.bench_servers import command_of, processes_of
from tests.running_stack import MODEL, Stack

QUESTION = {"role": "user", "content": "What is the capital of France?"}
GREEDY = {"strategy": "greedy", "max_tokens": 32}
COUNTING = "One, two, three, four,"
FOUR_TOKENS = {"strategy": "greedy", "max_tokens": 4}
ANSWER = "The capital of France is Paris."


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def test_chat_completion_answers_paris(client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [QUESTION], "sampling_params": GREEDY}
    reply = client.post("/inference/chat_completion", json=body)
    assert reply.status_code == 200, reply.text
    message = reply.json()["completion_message"]
    assert message == {"role": "assistant", "content": ANSWER, "stop_reason": "end_of_turn", "tool_calls": []}


def test_chat_completion_streams_the_same_answer_with_logprobs(client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [QUESTION], "sampling_params": GREEDY, "stream": True, "logprobs": {"top_k": 2}}
    reply = client.post("/inference/chat_completion", json={"request": body})
    assert reply.headers["content-type"].startswith("text/event-stream")
    kinds = [event["event"] for event in events(reply.text)]
    assert [kinds[0]["event_type"], kinds[-1]["event_type"]] == ["start", "complete"]
    assert kinds[-1]["stop_reason"] == "end_of_turn"
    assert "".join(kind["delta"] for kind in kinds) == ANSWER
    first = next(kind["logprobs"][0]["logprobs_by_token"] for kind in kinds if kind.get("logprobs"))
    assert len(first) == 2
    assert all(value <= 0 for value in first.values())


def test_an_answer_out_of_tokens_says_so(client: httpx.Client) -> None:
    body = {"model": MODEL, "messages": [QUESTION], "sampling_params": {"strategy": "greedy", "max_tokens": 3}}
    message = client.post("/inference/chat_completion", json=body).json()["completion_message"]
    assert (message["content"], message["stop_reason"]) == ("The capital of", "out_of_tokens")


def test_completion_continues_a_text_streamed_and_not(client: httpx.Client) -> None:
    body = {
        "model": MODEL,
        "content": "One, two, three, four,",
        "sampling_params": {"strategy": "greedy", "max_tokens": 4},
    }
    whole = client.post("/inference/completion", json=body).json()["completion_message"]
    assert "five" in whole["content"]
    chunks = events(client.post("/inference/completion", json=body | {"stream": True}).text)
    assert "".join(str(chunk["delta"]) for chunk in chunks) == whole["content"]
    assert chunks[-1]["stop_reason"] == "out_of_tokens"


def test_a_prompt_over_the_context_is_refused_with_both_lengths(client: httpx.Client) -> None:
    message = {"role": "user", "content": "word " * 3_000}
    reply = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [message]})
    assert reply.status_code == 400
    assert "2048" in reply.json()["error"]["message"]


def test_long_prompts_with_a_seed_that_come_together_are_answered(client: httpx.Client) -> None:
    """vLLM's engine died of it on CPU where it read a prompt in parts."""

    def ask(number: int) -> httpx.Response:
        body = {"model": MODEL, "prompt": f"{number}. " + "word " * 1_500, "seed": number, "temperature": 1.0}
        return client.post("/v1/completions", json=body | {"max_tokens": 2})

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(8)))
    assert [reply.status_code for reply in replies] == [200] * 8, replies[0].text


@pytest.mark.parametrize(
    "wrong",
    [
        {"tool_choice": "auto"},
        {"stream_options": {"include_usage": True}},
        {"top_logprobs": 2},
        {"chat_template": "{{ x }}"},
        {"prompt_logprobs": 10**9},
        {"max_tokens": 100_000},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_the_engine_would_choke_on_is_refused(client: httpx.Client, wrong: dict[str, object]) -> None:
    reply = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [QUESTION], **wrong})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]


def test_an_unknown_model_is_404_with_the_known_ones(client: httpx.Client) -> None:
    for path in ("/inference/chat_completion", "/v1/chat/completions"):
        reply = client.post(path, json={"model": "gpt-5", "messages": [QUESTION]})
        assert reply.status_code == 404
        assert MODEL in reply.json()["error"]["message"]


def test_the_rfc_client(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=120) as http:
        client = LlamaStack(base_url=stack.url, http_client=http)
        answer = client.inference.chat_completion(messages=[QUESTION], model=MODEL, sampling_params=GREEDY)
        assert answer.completion_message.content == ANSWER
        stream = client.inference.chat_completion(messages=[QUESTION], model=MODEL, sampling_params=GREEDY, stream=True)
        assert "".join(str(chunk.event.delta) for chunk in stream) == ANSWER
        completed = client.inference.completion(content=COUNTING, model=MODEL, sampling_params=FOUR_TOKENS)
        assert "five" in completed.completion_message.content


def test_the_rfc_client_async(stack: Stack) -> None:
    async def talk() -> None:
        async with httpx.AsyncClient(base_url=stack.url, timeout=120) as http:
            client = AsyncLlamaStack(base_url=stack.url, http_client=http)
            answer = await client.inference.chat_completion(messages=[QUESTION], model=MODEL, sampling_params=GREEDY)
            assert answer.completion_message.content == ANSWER
            stream = await client.inference.chat_completion(
                messages=[QUESTION], model=MODEL, sampling_params=GREEDY, stream=True
            )
            assert "".join([str(chunk.event.delta) async for chunk in stream]) == ANSWER
            completed = await client.inference.completion(content=COUNTING, model=MODEL, sampling_params=FOUR_TOKENS)
            assert "five" in completed.completion_message.content

    asyncio.run(talk())


def test_the_openai_client(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        assert MODEL in [model.id for model in client.models.list()]
        assert client.models.retrieve(MODEL).id == MODEL
        answer = client.chat.completions.create(model=MODEL, messages=[QUESTION], temperature=0)
        assert answer.choices[0].message.content == ANSWER
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8
        stream = client.chat.completions.create(
            model=MODEL, messages=[QUESTION], temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
        assert chunks[-1].usage is not None
        completed = client.completions.create(model=MODEL, prompt=COUNTING, max_tokens=4, temperature=0)
        assert "five" in completed.choices[0].text
        with pytest.raises(openai.NotFoundError, match=MODEL):
            client.chat.completions.create(model="gpt-5", messages=[QUESTION])


def test_the_openai_client_async(stack: Stack) -> None:
    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=MODEL, messages=[QUESTION], temperature=0) for _ in range(4))
            )
            assert {answer.choices[0].message.content for answer in answers} == {ANSWER}
            stream = await client.chat.completions.create(model=MODEL, messages=[QUESTION], temperature=0, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER

    asyncio.run(talk())


def test_the_engine_computes_in_its_own_process(stack: Stack) -> None:
    titles = [command_of(process) for process in processes_of(stack.home)]
    assert [title for title in titles if "VLLM::EngineCore" in title]
    assert [title for title in titles if "VLLM::Worker" in title] == []


def test_the_gateway_answers_after_a_flood_of_bad_input(client: httpx.Client) -> None:
    bodies: list[bytes] = [b"{", b"[]", b"null", b'"', b"\xff\xfe", b'{"model": 5}', b'{"request": {"request": {}}}']
    for path in ("/inference/chat_completion", "/inference/completion", "/v1/chat/completions", "/datasets/create"):
        for body in bodies:
            reply = client.post(path, content=body, headers={"content-type": "application/json"})
            assert reply.status_code == 400, (path, body, reply.text)
            assert reply.json()["error"]["message"]
    assert client.get("/health").json()["status"] == "ready"

"""The scripted engine: its answers, its pace, and its faults."""

import asyncio
import json
import subprocess
import sys
import warnings
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_apps.scripted_answers import Answer, answer_to, as_many
from stack.errors import BadInput

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray and vLLM themselves warn of as they are imported
    from ray.serve.llm.openai_api_models import (
        ChatCompletionRequest,
        CompletionRequest,
        EmbeddingRequest,
        ErrorResponse,
    )

    from serve_apps.scripted_engine import Counts, Fault, ScriptedEngine, build

ASK = {"model": "small", "messages": [{"role": "user", "content": "Where?"}]}


def engine(tokens_per_second: float = 10_000) -> ScriptedEngine:
    return ScriptedEngine(tokens_per_second=tokens_per_second)


def saying(text: Any, **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(ASK | {"messages": [{"role": "user", "content": text}]} | fields)


async def events(items: AsyncGenerator[Any]) -> list[Any]:
    """The data of the events, in order; "[DONE]" as it is."""
    lines = "".join([item async for item in items]).split("\n\n")
    assert lines.pop() == ""
    return [line[6:] if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_stream_has_an_event_for_each_token_and_ends_with_its_usage() -> None:
    body = saying("Where?", max_tokens=5, stream=True, stream_options={"include_usage": True})
    *tokens, end, usage, done = await events(engine().chat(body))
    assert [event["choices"][0]["delta"]["content"] for event in tokens] == ["Paris", " is", " big.", "Paris", " is"]
    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 5
    assert done == "[DONE]"


async def test_without_a_limit_it_says_its_script_once_and_no_usage_that_was_not_asked_for() -> None:
    *tokens, end, _ = await events(engine().chat(saying("Where?", stream=True)))
    assert [event["choices"][0]["delta"]["content"] for event in tokens] == ["Paris", " is", " big."]
    assert end["choices"][0]["finish_reason"] == "stop"


async def test_it_says_what_it_is_told_to_and_no_word_that_only_looks_like_that() -> None:
    text = 'Call it, please. say:{"name": "f",\n"parameters": {}}'
    token, end, _ = await events(engine().chat(saying(text, stream=True, max_tokens=2)))
    assert token["choices"][0]["delta"]["content"] == '{"name": "f",\n"parameters": {}}'
    assert end["choices"][0]["finish_reason"] == "stop"
    for other in ("essay:no", "Say:no", "say:"):
        first, *_ = await events(engine().chat(saying(other, stream=True)))
        assert first["choices"][0]["delta"]["content"] == "Paris"


async def test_a_whole_answer_is_one_response() -> None:
    (response,) = [item async for item in engine().chat(saying("Where?", max_completion_tokens=2))]
    assert response.choices[0].message.content == "Paris is"
    assert response.usage.completion_tokens == 2
    request = CompletionRequest(model="small", prompt=["a", "b"], max_tokens=3, n=2, logprobs=1)
    (response,) = [item async for item in engine().completions(request)]
    assert [choice.text for choice in response.choices] == ["Paris is big."] * 4
    assert response.choices[0].logprobs.token_logprobs == [-0.25] * 3


async def test_completions_are_streamed() -> None:
    *tokens, _, _ = await events(engine().completions(CompletionRequest(model="small", prompt="a", stream=True)))
    assert len(tokens) == 16, "OpenAI's own limit where none is given"
    assert tokens[1]["choices"][0]["text"] == " is"


async def test_every_text_has_an_embedding() -> None:
    for given, count in (("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2]], 2)):
        request = EmbeddingRequest.__args__[0](model="small", input=given)
        (response,) = [item async for item in engine().embeddings(request)]
        assert [one.index for one in response.data] == list(range(count))


async def test_tokens_come_at_their_rate_and_do_not_drift() -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    stream = engine(tokens_per_second=100).chat(saying("Where?", max_tokens=20, stream=True))
    for number in range(20):
        await anext(stream)
        assert loop.time() - start >= (number + 1) / 100 - 0.001, "a token came before its time"
        await asyncio.sleep(0.005)  # a reader that takes its time does not delay what follows
    await stream.aclose()


@pytest.mark.parametrize("rate", [0, -1, "50", None, 2_000_000])
def test_a_rate_that_is_none_is_refused(rate: object) -> None:
    with pytest.raises(BadInput, match=r"tokens_per_second is .*; allowed: a number above 0"):
        build({"tokens_per_second": rate})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("fault:die-before-first", Fault("die")),
        ("please fault:die-after-3, will you", Fault("die", 3)),
        ("fault:hang", Fault("hang")),
        ("fault:error-after-1", Fault("error", 1)),
        ("fault:slow", Fault("slow")),
        ("default:hang-glider is no fault:", None),
        ("fault:hangs", None),
    ],
)
def test_a_fault_is_asked_for_by_a_word(text: str, fault: Fault | None) -> None:
    assert Fault.asked_for(text) == fault


async def test_an_engine_that_hangs_says_nothing_more_and_counts_who_leaves() -> None:
    scripted = engine()
    parts = [{"type": "text", "text": "fault:hang-after-2"}]
    stream = scripted.chat(saying(parts, stream=True))
    assert [await anext(stream) for _ in range(2)]
    third = asyncio.ensure_future(anext(stream))
    assert not (await asyncio.wait([third], timeout=0.1))[0]
    assert scripted.counts == Counts(started=1, running=1, aborted=0)
    third.cancel()
    with pytest.raises(asyncio.CancelledError):
        await third
    assert scripted.counts == Counts(started=1, running=0, aborted=1)


async def test_who_leaves_early_is_counted_and_who_has_read_it_all_is_not() -> None:
    scripted = engine()
    stream = scripted.chat(saying("Where?", stream=True))
    await anext(stream)
    await stream.aclose()
    assert scripted.counts == Counts(started=1, running=0, aborted=1)
    whole = scripted.chat(saying("Where?"))
    await anext(whole)
    await whole.aclose()
    assert scripted.counts == Counts(started=2, running=0, aborted=1)


async def test_an_error_ends_a_stream_and_is_the_response_of_what_is_not_streamed() -> None:
    token, error, done = await events(engine().chat(saying("fault:error-after-1", stream=True)))
    assert (token["choices"][0]["delta"]["content"], error["error"]["code"], done) == ("Paris", 500, "[DONE]")
    (response,) = [item async for item in engine().chat(saying("fault:error"))]
    assert isinstance(response, ErrorResponse)


def test_an_engine_that_dies_takes_its_process_with_it() -> None:
    program = (
        "import asyncio\nfrom serve_apps.scripted_engine import Fault\n"
        "asyncio.run(Fault('die').happen(is_stream=True))\nprint('alive')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, "alive" in ended.stdout) == (1, False)


def test_as_many_tokens_as_are_wanted() -> None:
    assert as_many(4) == ("Paris", " is", " big.", "Paris")
    answer = answer_to("chat", ASK | {"n": 2, "logprobs": True, "top_logprobs": 2})
    assert answer == Answer("chat", "small", as_many(3), "stop", choices=2, logprobs=2)
    assert [choice["index"] for choice in answer.whole()["choices"]] == [0, 1]
    first = json.loads(next(answer.events()).split("\n\n")[1].removeprefix("data: "))
    assert first["choices"][0]["index"] == 1
    assert first["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1] == {"token": " other", "logprob": -1.5}


def test_the_tokens_of_a_chat_s_prompt_are_told_where_they_are_asked_for() -> None:
    """Those of a prompt that goes on begin with those of the prompt."""
    told = answer_to("chat", ASK | {"return_token_ids": True}).whole()["prompt_token_ids"]
    longer = answer_to("chat", ASK | {"return_token_ids": True, "prompt_logprobs": 0}).whole()
    assert longer["prompt_token_ids"][: len(told)] == told
    assert len(longer["prompt_token_ids"]) == len(longer["prompt_logprobs"]) > len(told)
    assert "prompt_token_ids" not in answer_to("chat", ASK).whole()

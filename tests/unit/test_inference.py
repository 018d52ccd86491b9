"""Inference: requests in OpenAI's shape, and OpenAI's answers in the Llama Stack's."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from stack import inference
from stack.api.inference import ChatCompletionRequest, CompletionRequest, SamplingParams
from stack.api.messages import Message
from stack.api.wire import describe
from stack.context import Context
from stack.errors import BadInput, EngineFailed, NotFound, StackError, Unavailable
from tests.scripted_engine import ScriptedEngine

TEXT = "Paris is big."
CALL = {"call_id": "1", "tool_name": "brave_search", "arguments": {"query": "a"}}


def chat(**changes: Any) -> ChatCompletionRequest:
    body = {"model": "small", "messages": [{"role": "user", "content": "Where?"}]}
    return ChatCompletionRequest.model_validate(body | changes)


def text(**changes: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "small", "content": "The capital is"} | changes)


async def listed(items: AsyncIterator[Any]) -> list[dict[str, Any]]:
    return [json.loads(item.model_dump_json(exclude_none=True)) async for item in items]


async def collect(items: AsyncIterator[Any], came: list[str]) -> None:
    async for item in items:
        came.append(item.model_dump_json())  # noqa: PERF401  what came before a fault must be kept


# Requests


@pytest.mark.parametrize(
    ("params", "body"),
    [
        ({}, {"temperature": 0}),
        ({"strategy": "greedy"}, {"temperature": 0}),
        ({"strategy": "greedy", "temperature": 0.7}, {"temperature": 0}),
        ({"strategy": "greedy", "top_p": 0.5, "top_k": 5}, {"temperature": 0}),
        ({"strategy": "top_p"}, {"top_p": 1.0}),
        ({"strategy": "top_p", "top_p": 0}, {"top_p": 1.0}),
        ({"strategy": "top_p", "top_p": 0.9, "temperature": 0.7}, {"top_p": 0.9, "temperature": 0.7}),
        ({"strategy": "top_p", "top_p": 0.9, "top_k": 5}, {"top_p": 0.9}),
        ({"strategy": "top_k", "top_k": 5}, {"top_k": 5}),
        ({"strategy": "top_k", "top_k": 5, "temperature": 0}, {"top_k": 5, "temperature": 0}),
        ({"max_tokens": 0, "top_k": 0, "top_p": 0, "repetition_penalty": 0}, {"temperature": 0}),
        ({"max_tokens": 9, "repetition_penalty": 1.1}, {"temperature": 0, "max_tokens": 9, "repetition_penalty": 1.1}),
    ],
)
def test_sampling_parameters_of_each_strategy(params: dict[str, Any], body: dict[str, Any]) -> None:
    assert inference.sampling_body(SamplingParams.model_validate(params)) == body


@pytest.mark.parametrize("params", [{}, {"top_k": 0}, {"top_k": None}])
def test_the_strategy_top_k_needs_a_top_k(params: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="at least 1") as caught:
        inference.sampling_body(SamplingParams.model_validate({"strategy": "top_k"} | params))
    assert caught.value.param == "sampling_params.top_k"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"strategy": "beam"}, ["strategy", "'beam'", "'greedy', 'top_p' or 'top_k'"]),
        ({"temperature": -0.1}, ["temperature", "greater than or equal to 0", "-0.1"]),
        ({"temperature": 11}, ["temperature", "less than or equal to 10", "11"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"temperature": float("inf")}, ["temperature", "inf"]),
        ({"top_p": 1.1}, ["top_p", "less than or equal to 1", "1.1"]),
        ({"top_k": -1}, ["top_k", "greater than or equal to 0", "-1"]),
        ({"max_tokens": -5}, ["max_tokens", "greater than or equal to 0", "-5"]),
        ({"max_tokens": 10**30}, ["max_tokens", "less than or equal to 1000000"]),
        ({"max_tokens": 1.5}, ["max_tokens", "1.5"]),
        ({"repetition_penalty": -1}, ["repetition_penalty", "-1"]),
        ({"maxtokens": 5}, ["unknown key 'maxtokens'", "max_tokens"]),
    ],
)
def test_sampling_parameters_out_of_bounds_are_refused(params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams.model_validate(params)
    for word in words:
        assert word in describe(caught.value)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": ["Be ", "brief."]}, {"role": "system", "content": "Be brief."}),
        ({"role": "user", "content": "Where?"}, {"role": "user", "content": "Where?"}),
        ({"role": "user", "content": ["Whe", "re?"]}, {"role": "user", "content": "Where?"}),
        ({"role": "user", "content": "Where?", "context": "A map."}, {"role": "user", "content": "Where?\n\nA map."}),
        (
            {"role": "user", "content": "Where?", "context": ["A ", "map."]},
            {"role": "user", "content": "Where?\n\nA map."},
        ),
        ({"role": "user", "content": "Where?", "context": ""}, {"role": "user", "content": "Where?"}),
        ({"role": "user", "content": "Where?", "context": []}, {"role": "user", "content": "Where?"}),
        (
            {"role": "assistant", "content": "There.", "stop_reason": "out_of_tokens"},
            {"role": "assistant", "content": "There."},
        ),
        (
            {"role": "ipython", "call_id": "7", "tool_name": "brave_search", "content": ["a", "b"]},
            {"role": "tool", "tool_call_id": "7", "name": "brave_search", "content": "ab"},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "brave_search", "arguments": '{"query": "a"}'}}
                ],
            },
        ),
    ],
)
def test_messages_in_openais_shape(message: dict[str, Any], expected: dict[str, Any]) -> None:
    (parsed,) = chat(messages=[message]).messages
    assert inference.openai_message(parsed) == expected


def test_a_chat_in_openais_shape() -> None:
    request = chat(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}],
        sampling_params={"strategy": "top_p", "top_p": 0.9, "temperature": 0.7, "max_tokens": 32},
        stream=True,
        logprobs={"top_k": 2},
    )
    assert inference.chat_body(request) == {
        "model": "small",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}],
        "top_p": 0.9,
        "temperature": 0.7,
        "max_tokens": 32,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 2,
    }


def test_a_chat_asks_for_nothing_that_was_not_asked_for() -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "Where?"}], "temperature": 0, "stream": False}
    assert inference.chat_body(chat()) == body


def test_a_text_in_openais_shape() -> None:
    request = text(content=["The capital", " is"], sampling_params={"max_tokens": 5}, logprobs={"top_k": 3})
    expected = {"model": "small", "prompt": "The capital is", "temperature": 0, "max_tokens": 5, "stream": False}
    assert inference.completion_body(request) == expected | {"logprobs": 3}


def test_a_text_without_max_tokens_may_fill_the_context() -> None:
    assert inference.completion_body(text())["max_tokens"] is None


def test_tools_in_openais_shape() -> None:
    parameters = {
        "city": {"param_type": "str", "description": "Where"},
        "days": {"param_type": "int", "required": False},
    }
    tools = [{"tool_name": "get_weather", "parameters": parameters}, {"tool_name": "brave_search"}]
    body = inference.chat_body(chat(tools=tools))
    weather, search = (tool["function"] for tool in body["tools"])
    assert weather["parameters"]["properties"]["days"] == {"type": "integer"}
    assert weather["parameters"]["required"] == ["city"]
    assert search["parameters"]["required"] == ["query"]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("auto", True)


def test_a_call_that_is_required_is_one_call() -> None:
    body = inference.chat_body(chat(tools=[{"tool_name": "brave_search"}], tool_choice="required"))
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)


def test_a_tool_whose_parameters_have_no_type_that_is_known_is_refused() -> None:
    request = chat(tools=[{"tool_name": "sing", "parameters": {"loud": {"param_type": "opera"}}}])
    with pytest.raises(BadInput, match="opera"):
        inference.chat_body(request)


# Answers


async def test_a_chat_is_answered(context: Context, engine: ScriptedEngine) -> None:
    answer = await inference.chat_completion(context, chat())
    message = {"role": "assistant", "content": TEXT, "stop_reason": "end_of_turn", "tool_calls": []}
    assert answer.model_dump(mode="json", exclude_none=True) == {"completion_message": message}
    (asked,) = engine.asked
    assert (asked.model.id, asked.endpoint, asked.body) == ("small", "chat", inference.chat_body(chat()))


async def test_a_text_is_continued(context: Context, engine: ScriptedEngine) -> None:
    answer = await inference.completion(context, text())
    assert (answer.completion_message.content, answer.logprobs) == (TEXT, None)
    (asked,) = engine.asked
    assert (asked.endpoint, asked.body) == ("completions", inference.completion_body(text()))


async def test_a_chat_is_streamed_as_start_progress_and_complete(context: Context) -> None:
    events = await listed(await inference.stream_chat_completion(context, chat(stream=True)))
    assert events == [
        {"event": {"event_type": "start", "delta": ""}},
        {"event": {"event_type": "progress", "delta": "Paris"}},
        {"event": {"event_type": "progress", "delta": " is"}},
        {"event": {"event_type": "progress", "delta": " big."}},
        {"event": {"event_type": "complete", "delta": "", "stop_reason": "end_of_turn"}},
    ]


async def test_a_text_is_streamed_in_chunks(context: Context) -> None:
    chunks = await listed(await inference.stream_completion(context, text(stream=True)))
    deltas = [{"delta": "Paris"}, {"delta": " is"}, {"delta": " big."}]
    assert chunks == [*deltas, {"delta": "", "stop_reason": "end_of_turn"}]


@pytest.mark.parametrize(("finish", "reason"), [("stop", "end_of_turn"), ("length", "out_of_tokens")])
async def test_stop_reasons(context: Context, engine: ScriptedEngine, finish: str, reason: str) -> None:
    engine.finish_reason = finish
    assert (await inference.chat_completion(context, chat())).completion_message.stop_reason == reason
    assert (await inference.completion(context, text())).completion_message.stop_reason == reason
    events = await listed(await inference.stream_chat_completion(context, chat(stream=True)))
    assert events[-1]["event"]["stop_reason"] == reason
    chunks = await listed(await inference.stream_completion(context, text(stream=True)))
    assert chunks[-1]["stop_reason"] == reason


@pytest.mark.parametrize(
    ("top_k", "likeliest"),
    [(0, {"Paris": -0.25}), (1, {"Paris": -0.25}), (2, {"Paris": -0.25, " other": -1.5})],
)
async def test_logprobs_are_told_by_token(context: Context, top_k: int, likeliest: dict[str, float]) -> None:
    asked = {"logprobs": {"top_k": top_k}}
    chatted = await inference.chat_completion(context, chat(**asked))
    completed = await inference.completion(context, text(**asked))
    for logprobs in (chatted.logprobs, completed.logprobs):
        assert logprobs is not None
        assert len(logprobs) == 3
        assert logprobs[0].logprobs_by_token == likeliest


@pytest.mark.parametrize(("top_k", "likeliest"), [(0, {"Paris": -0.25}), (2, {"Paris": -0.25, " other": -1.5})])
async def test_logprobs_are_streamed_with_their_tokens(
    context: Context, top_k: int, likeliest: dict[str, float]
) -> None:
    asked = {"logprobs": {"top_k": top_k}, "stream": True}
    events = await listed(await inference.stream_chat_completion(context, chat(**asked)))
    assert events[1]["event"]["logprobs"] == [{"logprobs_by_token": likeliest}]
    assert sum(len(event["event"].get("logprobs", [])) for event in events) == 3
    chunks = await listed(await inference.stream_completion(context, text(**asked)))
    assert chunks[0]["logprobs"] == [{"logprobs_by_token": likeliest}]
    assert sum(len(chunk.get("logprobs", [])) for chunk in chunks) == 3


async def test_an_empty_answer_is_an_answer(context: Context, engine: ScriptedEngine) -> None:
    engine.tokens = ()
    assert (await inference.chat_completion(context, chat())).completion_message.content == ""
    events = await listed(await inference.stream_chat_completion(context, chat(stream=True)))
    assert [event["event"]["event_type"] for event in events] == ["start", "complete"]


# Failures


async def test_an_unknown_model_is_not_found(context: Context, engine: ScriptedEngine) -> None:
    for call in (inference.chat_completion, inference.stream_chat_completion):
        with pytest.raises(NotFound, match="there is no model 'big'; there are: small"):
            await call(context, chat(model="big"))
    assert engine.asked == []


@pytest.mark.parametrize("fault", [Unavailable("not now"), BadInput("too long"), EngineFailed("broken")])
async def test_a_fault_before_the_first_token_is_raised_before_the_stream(
    context: Context, engine: ScriptedEngine, fault: StackError
) -> None:
    engine.fail(fault)
    with pytest.raises(type(fault), match=fault.message):
        await inference.stream_chat_completion(context, chat(stream=True))
    with pytest.raises(type(fault), match=fault.message):
        await inference.stream_completion(context, text(stream=True))
    with pytest.raises(type(fault), match=fault.message):
        await inference.chat_completion(context, chat())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", "the engine died"),
        ("break off", "broke off"),
        (Unavailable("the replica is gone"), "the replica is gone"),
    ],
    ids=["error event", "break off", "raised"],
)
async def test_a_fault_in_a_stream_is_raised_after_what_came(
    context: Context, engine: ScriptedEngine, fault: Any, message: str
) -> None:
    engine.fail(fault, after=2)
    streams = [
        await inference.stream_chat_completion(context, chat(stream=True)),
        await inference.stream_completion(context, text(stream=True)),
    ]
    for stream in streams:
        came: list[str] = []
        with pytest.raises(StackError, match=message):
            await collect(stream, came)
        assert sum("Paris" in item or " is" in item for item in came) == 2
        assert not any("end_of_turn" in item for item in came)


async def test_a_stream_that_is_closed_closes_the_generation(context: Context, engine: ScriptedEngine) -> None:
    stream = await inference.stream_chat_completion(context, chat(stream=True))
    await anext(stream)
    await anext(stream)
    assert not engine.closed_early.is_set()
    await stream.aclose()
    assert engine.closed_early.is_set()


async def test_a_stream_that_is_read_to_its_end_is_not_aborted(context: Context, engine: ScriptedEngine) -> None:
    await listed(await inference.stream_chat_completion(context, chat(stream=True)))
    await listed(await inference.stream_completion(context, text(stream=True)))
    assert not engine.closed_early.is_set()


def test_every_kind_of_message_has_an_openai_shape() -> None:
    kinds: list[Message] = list(
        chat(
            messages=[
                {"role": "system", "content": "a"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "a"},
                {"role": "ipython", "content": "a", "call_id": "1", "tool_name": "t"},
            ]
        ).messages
    )
    assert [inference.openai_message(kind)["role"] for kind in kinds] == ["system", "user", "assistant", "tool"]


# Tool calls

CALLED = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}'
BROKEN = '{"name": "get_weather", "parameters": {"city": '
WEATHER = {
    "tool_name": "get_weather",
    "parameters": {"city": {"param_type": "str"}, "days": {"param_type": "int", "required": False}},
}


def in_pieces(text: str, size: int) -> tuple[str, ...]:
    return tuple(text[at : at + size] for at in range(0, len(text), size))


@pytest.mark.parametrize("size", [1, 7, 1_000])
async def test_a_call_is_found_in_an_answer(context: Context, engine: ScriptedEngine, size: int) -> None:
    engine.tokens = in_pieces(CALLED, size)
    message = (await inference.chat_completion(context, chat(tools=[WEATHER]))).completion_message
    (call,) = message.tool_calls
    assert (call.tool_name, call.arguments) == ("get_weather", {"city": "Paris", "days": 3})
    assert (message.content, message.stop_reason) == ("", "end_of_turn")
    assert call.call_id


@pytest.mark.parametrize("size", [1, 7, 1_000])
async def test_a_call_is_streamed_with_its_status(context: Context, engine: ScriptedEngine, size: int) -> None:
    engine.tokens = in_pieces(CALLED, size)
    events = await listed(await inference.stream_chat_completion(context, chat(tools=[WEATHER], stream=True)))
    deltas = [event["event"]["delta"] for event in events]
    statuses = [delta["parse_status"] for delta in deltas if isinstance(delta, dict)]
    assert (statuses[0], statuses[-1]) == ("started", "success")
    assert set(statuses[1:-1]) == {"in_progress"}
    written = "".join(
        delta["content"] for delta in deltas if isinstance(delta, dict) and isinstance(delta["content"], str)
    )
    assert written == CALLED
    (call,) = (delta["content"] for delta in deltas if isinstance(delta, dict) and isinstance(delta["content"], dict))
    assert (call["tool_name"], call["arguments"]) == ("get_weather", {"city": "Paris", "days": 3})
    assert [delta for delta in deltas if isinstance(delta, str)] == ["", ""]


async def test_a_broken_call_is_a_failure_and_kept_as_text(context: Context, engine: ScriptedEngine) -> None:
    engine.tokens = in_pieces(BROKEN, 5)
    message = (await inference.chat_completion(context, chat(tools=[WEATHER]))).completion_message
    assert (message.content, message.tool_calls) == (BROKEN, [])
    events = await listed(await inference.stream_chat_completion(context, chat(tools=[WEATHER], stream=True)))
    failed = [event["event"]["delta"] for event in events if isinstance(event["event"]["delta"], dict)][-1]
    assert failed == {"content": BROKEN, "parse_status": "failure"}


async def test_what_is_known_of_tokens_stands_once_with_what_they_brought(
    context: Context, engine: ScriptedEngine
) -> None:
    engine.tokens = in_pieces(CALLED, 9)
    request = chat(tools=[WEATHER], stream=True, logprobs={"top_k": 1})
    events = await listed(await inference.stream_chat_completion(context, request))
    tokens = [next(iter(one["logprobs_by_token"])) for e in events for one in e["event"].get("logprobs") or []]
    assert tokens == list(engine.tokens)


async def test_llama_3s_end_of_message_is_told_from_its_end_of_turn(context: Context, engine: ScriptedEngine) -> None:
    request = chat()
    engine.stop_reason = inference.END_OF_MESSAGE_TOKEN
    assert (await inference.chat_completion(context, request)).completion_message.stop_reason == "end_of_message"
    events = await listed(await inference.stream_chat_completion(context, chat(stream=True)))
    assert events[-1]["event"]["stop_reason"] == "end_of_message"


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_an_answer_that_was_cut_is_not_taken_for_a_whole_one(
    context: Context, engine: ScriptedEngine, reason: str
) -> None:
    engine.finish_reason = reason
    with pytest.raises(EngineFailed, match=reason):
        await inference.chat_completion(context, chat())
    with pytest.raises(EngineFailed, match=reason):
        await listed(await inference.stream_chat_completion(context, chat(stream=True)))


async def test_nothing_is_fetched_for_a_text_that_is_refused_anyway(context: Context) -> None:
    elsewhere = [{"content": "https://example.invalid/a.txt", "mime_type": "text/plain"}]
    with pytest.raises(NotFound):
        await inference.completion(context, text(content=elsewhere, model="large"))
    with pytest.raises(BadInput, match="top_k"):
        await inference.completion(context, text(content=elsewhere, sampling_params={"strategy": "top_k"}))

"""OpenAI's chat completions: passed on as they are, or with the calls found in them."""

import json
from typing import Any

import pytest

from stack import openai_chats
from stack.context import Context
from tests.scripted_engine import ScriptedEngine
from tests.unit.test_chats import WEATHER, body

CALLED = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
BROKEN = '{"name": "get_weather", "parameters": {"city": '
ARGUMENTS = {"city": "Paris"}


def in_pieces(text: str, size: int) -> tuple[str, ...]:
    return tuple(text[at : at + size] for at in range(0, len(text), size))


async def chunks(context: Context, **fields: Any) -> list[dict[str, Any]]:
    stream = await openai_chats.stream(context, body(stream=True, **fields))
    text = b"".join([item async for item in stream]).decode()
    *events, done, after = text.split("\n\n")
    assert (done, after) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> tuple[str, list[dict[str, Any]], str]:
    """The text, the calls and the finish reason of one choice."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    return text, calls, choices[-1]["finish_reason"]


async def test_an_answer_without_tools_is_the_engines_own(context: Context) -> None:
    answer = json.loads(await openai_chats.answer(context, body()))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Paris is big."}
    text, calls, reason = joined(await chunks(context))
    assert (text, calls, reason) == ("Paris is big.", [], "stop")


async def test_an_answer_that_calls_nothing_is_text(context: Context) -> None:
    answer = json.loads(await openai_chats.answer(context, body(tools=[WEATHER])))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Paris is big."}
    assert answer["choices"][0]["finish_reason"] == "stop"
    text, calls, reason = joined(await chunks(context, tools=[WEATHER]))
    assert (text, calls, reason) == ("Paris is big.", [], "stop")


@pytest.mark.parametrize("size", [1, 8, 1_000])
async def test_a_call_takes_the_place_of_its_words(context: Context, engine: ScriptedEngine, size: int) -> None:
    engine.tokens = in_pieces(CALLED, size)
    (choice,) = json.loads(await openai_chats.answer(context, body(tools=[WEATHER])))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert (call["type"], call["function"]["name"]) == ("function", "get_weather")
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS

    text, calls, reason = joined(await chunks(context, tools=[WEATHER]))
    assert (text, len(calls), reason) == ("", 1, "tool_calls")
    assert (calls[0]["index"], calls[0]["type"], calls[0]["function"]["name"]) == (0, "function", "get_weather")
    assert calls[0]["id"]
    assert json.loads(calls[0]["function"]["arguments"]) == ARGUMENTS


async def test_several_calls_that_are_required_are_numbered(context: Context, engine: ScriptedEngine) -> None:
    engine.tokens = in_pieces(f"[{CALLED}, {CALLED}]", 6)
    asked = {"tools": [WEATHER], "tool_choice": "required"}
    (choice,) = json.loads(await openai_chats.answer(context, body(**asked)))["choices"]
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    _, calls, reason = joined(await chunks(context, **asked))
    assert ([call["index"] for call in calls], reason) == ([0, 1], "tool_calls")


async def test_each_choice_has_its_own_calls(context: Context, engine: ScriptedEngine) -> None:
    engine.tokens = in_pieces(CALLED, 5)
    choices = json.loads(await openai_chats.answer(context, body(tools=[WEATHER], n=2)))["choices"]
    assert [len(choice["message"]["tool_calls"]) for choice in choices] == [1, 1]
    streamed = await chunks(context, tools=[WEATHER], n=2)
    assert [len(joined(streamed, index)[1]) for index in (0, 1)] == [1, 1]


@pytest.mark.parametrize("size", [1, 1_000])
async def test_a_broken_call_stays_text(context: Context, engine: ScriptedEngine, size: int) -> None:
    engine.tokens = in_pieces(BROKEN, size)
    (choice,) = json.loads(await openai_chats.answer(context, body(tools=[WEATHER])))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (BROKEN, "stop")
    text, calls, reason = joined(await chunks(context, tools=[WEATHER]))
    assert (text, calls, reason) == (BROKEN, [], "stop")


async def test_a_call_cut_off_by_the_length_stays_text_and_says_so(context: Context, engine: ScriptedEngine) -> None:
    engine.tokens, engine.finish_reason = in_pieces(BROKEN, 4), "length"
    (choice,) = json.loads(await openai_chats.answer(context, body(tools=[WEATHER])))["choices"]
    assert choice["finish_reason"] == "length"
    assert joined(await chunks(context, tools=[WEATHER]))[2] == "length"


async def test_usage_and_the_first_chunks_role_are_kept(context: Context, engine: ScriptedEngine) -> None:
    engine.tokens = in_pieces(CALLED, 8)
    streamed = await chunks(context, tools=[WEATHER], stream_options={"include_usage": True})
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert streamed[-1]["usage"]["completion_tokens"] == len(engine.tokens)

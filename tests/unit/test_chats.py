"""A chat as the engine is asked: what passes as it is, and what becomes of tools."""

from typing import Any

import pytest

from stack import chats
from stack.context import Context
from stack.errors import BadInput, NotFound
from tests.scripted_engine import ScriptedEngine

QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
TURN = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [QUESTION], **fields}


async def test_text_alone_passes_as_it_is(context: Context) -> None:
    asked = body(temperature=0.5, response_format={"type": "json_object"})
    chat = await chats.prepare(context, asked)
    assert chat.body is asked
    assert chat.use is None


async def test_tools_are_put_into_words(context: Context) -> None:
    chat = await chats.prepare(context, body(tools=[WEATHER], tool_choice="auto", seed=3))
    assert chat.use is not None
    assert (chat.use.choice, [tool.name for tool in chat.use.tools]) == ("auto", ["get_weather"])
    assert chat.body["seed"] == 3
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & chat.body.keys()
    assert "get_weather" in str(chat.body["messages"])


async def test_earlier_calls_are_put_into_words_without_tools(context: Context) -> None:
    chat = await chats.prepare(context, body(messages=TURN))
    assert "tool" not in [message["role"] for message in chat.body["messages"]]
    assert "sunny" in str(chat.body["messages"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_call_that_must_come_is_a_constraint(context: Context, choice: Any) -> None:
    chat = await chats.prepare(context, body(tools=[WEATHER], tool_choice=choice))
    assert "get_weather" in str(chat.body["structured_outputs"]["json"])


async def test_tools_that_are_not_to_be_used_leave_the_format_to_the_answer(context: Context) -> None:
    asked = body(tools=[WEATHER], tool_choice="none", response_format={"type": "json_object"})
    chat = await chats.prepare(context, asked)
    assert chat.body["response_format"] == {"type": "json_object"}
    assert "get_weather" not in str(chat.body["messages"])


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tool_choice": "required"}, "tools", "at least one tool"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "sing"}}},
            "tool_choice",
            "get_weather",
        ),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format", "leave one out"),
        ({"tools": [WEATHER], "structured_outputs": {"regex": "a+"}}, "structured_outputs", "leave one out"),
    ],
)
async def test_what_cannot_be_had_is_refused(context: Context, fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        await chats.prepare(context, body(**fields))
    assert caught.value.param == param


async def test_an_unknown_model_is_not_found(context: Context) -> None:
    with pytest.raises(NotFound):
        await chats.prepare(context, body(tools=[WEATHER]) | {"model": "large"})


def test_call_ids_differ() -> None:
    assert len({chats.new_call_id() for _ in range(1_000)}) == 1_000


@pytest.mark.parametrize(("choice", "param"), [("required", "tools"), ("auto", "structured_outputs")])
async def test_what_the_engine_refuses_of_required_tools_is_blamed_on_them(
    context: Context, engine: ScriptedEngine, choice: str, param: str
) -> None:
    engine.fail(BadInput("the JSON schema takes too long", param="structured_outputs"))
    for stream, ask in ((False, chats.answer), (True, chats.stream)):
        chat = await chats.prepare(context, body(tools=[WEATHER], tool_choice=choice, stream=stream))
        with pytest.raises(BadInput, match="too long") as caught:
            await ask(context, chat)
        assert caught.value.param == param

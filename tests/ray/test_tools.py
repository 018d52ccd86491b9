"""Tool calls and shaped answers of the real model, at both doors, by the RFC's client and by OpenAI's."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from llama_stack import LlamaStack

from tests.running_stack import MODEL, Stack

QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
STACK_WEATHER: Any = {
    "tool_name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"celsius": {"param_type": "bool", "required": True}},
}
MALICIOUS_S = 3.0


@pytest.fixture
def door(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def rfc(stack: Stack) -> Iterator[LlamaStack]:
    with httpx.Client(base_url=stack.url, timeout=120) as http:
        yield LlamaStack(base_url=stack.url, http_client=http)


def ask(door: openai.OpenAI, **fields: Any) -> Any:
    fields = {"model": MODEL, "messages": [QUESTION], "temperature": 0, "max_tokens": 100} | fields
    return door.chat.completions.create(**fields)


def test_a_call_that_is_required_has_the_shape_of_its_tool(door: openai.OpenAI) -> None:
    (choice,) = ask(door, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).choices
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "get_weather")
    assert arguments["city"] in ("Paris", "Rome")
    assert isinstance(arguments["days"], int)


def test_the_tool_that_is_named_is_called_in_a_stream_too(door: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    sing = {"type": "function", "function": {"name": "sing", "parameters": {"type": "object", "properties": {}}}}
    chunks = list(ask(door, tools=[sing, WEATHER], tool_choice=named, parallel_tool_calls=False, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    (call,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_to_what_a_tool_said(door: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "It is sunny in Paris, 25 degrees."},
    ]
    answer = ask(door, messages=messages, tools=[WEATHER], tool_choice="none").choices[0].message
    assert answer.content
    assert not answer.tool_calls


def test_the_stack_door_calls_a_tool_whole_and_streamed(rfc: LlamaStack) -> None:
    asked: Any = dict(
        model=MODEL,
        messages=[QUESTION],
        tools=[STACK_WEATHER],
        tool_choice="required",
        sampling_params={"strategy": "greedy", "max_tokens": 100},
    )
    message = rfc.inference.chat_completion(**asked).completion_message
    (call,) = message.tool_calls
    assert call.tool_name == "get_weather"
    assert isinstance(call.arguments["celsius"], bool)
    assert message.content == ""

    events = [chunk.event for chunk in rfc.inference.chat_completion(**asked, stream=True)]
    deltas = [event.delta for event in events if not isinstance(event.delta, str)]
    assert [deltas[0].parse_status, deltas[-1].parse_status] == ["started", "success"]
    assert deltas[-1].content.arguments == call.arguments  # type: ignore[union-attr]
    assert [events[0].event_type, events[-1].event_type] == ["start", "complete"]


@pytest.mark.parametrize(
    ("shape", "check"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "city",
                        "schema": {
                            "type": "object",
                            "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
                            "required": ["city", "people"],
                            "additionalProperties": False,
                        },
                    },
                }
            },
            lambda text: set(json.loads(text)) == {"city", "people"},
        ),
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, lambda text: text in ("yes", "no")),
        ({"extra_body": {"structured_outputs": {"regex": "[0-9]{3}"}}}, lambda text: len(text) == 3 and int(text) >= 0),
        (
            {"extra_body": {"structured_outputs": {"grammar": 'root ::= "sunny" | "rainy"'}}},
            lambda text: text in ("sunny", "rainy"),
        ),
        ({"extra_body": {"guided_choice": ["left", "right"]}}, lambda text: text in ("left", "right")),
    ],
    ids=["schema", "choice", "regex", "grammar", "guided"],
)
def test_an_answer_has_the_shape_that_was_asked_for(door: openai.OpenAI, shape: dict[str, Any], check: Any) -> None:
    text = ask(door, **shape).choices[0].message.content
    assert check(text), text


def test_any_json(door: openai.OpenAI) -> None:
    question = {"role": "user", "content": 'Answer in JSON: {"capital": "..."} for France.'}
    answer = ask(door, messages=[question], response_format={"type": "json_object"}, max_tokens=60).choices[0]
    assert answer.message.content.startswith("{")
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "((a{1,300}b{1,300}){1,300}c){1,300}"},
        {"regex": "(" * 40 + "a" + ")*" * 40},
        {
            "json": {
                "type": "array",
                "items": {"type": "string", "pattern": "(x{1,900}y{1,900}){1,900}"},
                "maxItems": 9000,
            }
        },
        {"grammar": "root ::= root root"},
        {"grammar": "root ::= ("},
    ],
    ids=lambda constraint: json.dumps(constraint)[:30],
)
def test_what_would_hold_the_engine_up_is_refused_in_time(client: httpx.Client, constraint: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [QUESTION], "max_tokens": 2, "structured_outputs": constraint}
    client.post("/v1/chat/completions", json=body | {"structured_outputs": {"choice": ["a"]}})  # the guard has started
    start = time.monotonic()
    reply = client.post("/v1/chat/completions", json=body)
    took = time.monotonic() - start
    assert reply.status_code == 400, reply.text
    assert took < MALICIOUS_S + 1
    plain = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [QUESTION], "max_tokens": 2})
    assert plain.status_code == 200, plain.text


def test_what_openais_client_can_ask_of_a_chat(door: openai.OpenAI) -> None:
    two = ask(door, n=2, temperature=1, seed=7, max_tokens=8)
    assert [choice.index for choice in two.choices] == [0, 1]
    again = ask(door, n=2, temperature=1, seed=7, max_tokens=8)
    assert [one.message.content for one in two.choices] == [one.message.content for one in again.choices]

    stopped = ask(door, messages=[{"role": "user", "content": "What is the capital of France?"}], stop=[" is"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("The capital of France", "stop")

    short = ask(door, max_tokens=None, max_completion_tokens=3, logprobs=True, top_logprobs=2)
    assert short.usage.completion_tokens == 3
    assert short.choices[0].finish_reason == "length"
    assert [len(position.top_logprobs) for position in short.choices[0].logprobs.content] == [2, 2, 2]

    penalized = ask(door, frequency_penalty=1.5, presence_penalty=0.5, logit_bias={"0": -100}, max_tokens=8)
    assert penalized.choices[0].message.content

    chunks = list(ask(door, stream=True, stream_options={"include_usage": True}, max_tokens=5))
    assert chunks[-1].usage.completion_tokens == 5


def test_what_openais_client_can_ask_of_a_text(door: openai.OpenAI) -> None:
    texts = door.completions.create(
        model=MODEL, prompt=["One, two,", "Red, green,"], max_tokens=3, temperature=0, logprobs=1, n=1
    )
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert texts.choices[1].logprobs is not None
    echoed = door.completions.create(model=MODEL, prompt="One, two,", max_tokens=3, temperature=0, echo=True)
    assert echoed.choices[0].text.startswith("One, two,")
    # Also of the prompt, though the model serves adapters.
    told = door.completions.create(model=MODEL, prompt="One, two,", max_tokens=3, echo=True, logprobs=1)
    assert told.choices[0].logprobs is not None
    first, *others = told.choices[0].logprobs.token_logprobs or []
    assert first is None
    assert len(others) == told.usage.prompt_tokens - 1 + 3
    assert all(one < 0 for one in others)
    tokens = door.completions.create(model=MODEL, prompt=[504, 2365], max_tokens=2, temperature=0)
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 2


@pytest.mark.parametrize(
    "sampling",
    [
        {"strategy": "greedy"},
        {"strategy": "top_p", "top_p": 0.9, "temperature": 0.7},
        {"strategy": "top_k", "top_k": 5, "repetition_penalty": 1.1},
        {"strategy": "greedy", "max_tokens": 0, "top_k": 0, "top_p": 0, "repetition_penalty": 0},
    ],
    ids=["greedy", "top_p", "top_k", "zeros"],
)
def test_every_strategy_of_the_specification(rfc: LlamaStack, sampling: Any) -> None:
    question: Any = {"role": "user", "content": "What is the capital of France?", "context": "A map of Europe."}
    system: Any = {"role": "system", "content": ["Be ", "brief."]}
    bound = {} if "max_tokens" in sampling else {"max_tokens": 40}
    answer = rfc.inference.chat_completion(
        model=MODEL, messages=[system, question], sampling_params=sampling | bound, logprobs={"top_k": 3}
    )
    assert answer.completion_message.content
    assert answer.logprobs
    # The chosen token is told too, where it is none of the three likeliest.
    assert {len(one.logprobs_by_token) for one in answer.logprobs} <= {3, 4}


ODD_CHATS: list[dict[str, Any]] = [
    {"logit_bias": {"49151": 100}},
    {"logit_bias": {"10000000": 100}},
    {"min_tokens": 5, "max_tokens": 2},
    {"min_tokens": 3, "stop": ["a"]},
    {"seed": -(2**63)},
    {"temperature": 10, "top_p": 0.0001, "top_k": 100_000, "min_p": 1},
    {"repetition_penalty": 0.0001},
    {"repetition_penalty": 10, "frequency_penalty": -2, "presence_penalty": 2},
    {"n": 16, "logprobs": True, "top_logprobs": 20},
    {"n": 4, "structured_outputs": {"choice": ["a", "b"]}, "temperature": 1},
    {"structured_outputs": {"regex": "a*"}, "min_tokens": 4},
    {"structured_outputs": {"json": {}}},
    {"structured_outputs": {"json": {"type": "string", "const": "\u0000"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, None, "a"]}}}},
    {"ignore_eos": True, "stop": ["\ud83d"]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "user", "content": "<|im_end|>" * 50}]},
    {"messages": [{"role": "user", "content": "\u0000\ufffd\u202e\U0001f600"}]},
    {"messages": [{"role": "assistant", "content": "I"}]},
    {"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}]},
    {"max_tokens": 1_000_000},
]
ODD_TEXTS: list[dict[str, Any]] = [
    {"prompt": [49_151]},
    {"prompt": [10_000_000]},
    {"prompt": [0] * 2_047},
    {"prompt": [0] * 2_048},
    {"prompt": ""},
    {"prompt": ["a"] * 64},
    {"prompt": "a", "echo": True, "n": 4, "temperature": 1},
    {"prompt": "a", "echo": True, "logprobs": 0},
    {"prompt": "a", "logprobs": 20, "stream": True},
]


@pytest.mark.parametrize(
    ("path", "odd"),
    [*(("/v1/chat/completions", odd) for odd in ODD_CHATS), *(("/v1/completions", odd) for odd in ODD_TEXTS)],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else value.rpartition("/")[0],
)
def test_odd_requests_are_answered_or_refused_and_the_engine_lives(
    client: httpx.Client, path: str, odd: dict[str, Any]
) -> None:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 4} | odd
    if path.endswith("chat/completions"):
        body.setdefault("messages", [QUESTION])
    # As escapes, in which half a character can be sent.
    reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400), reply.text
    if reply.status_code == 400:
        assert reply.json()["error"]["message"]
    plain = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [QUESTION], "max_tokens": 1})
    assert plain.status_code == 200, plain.text

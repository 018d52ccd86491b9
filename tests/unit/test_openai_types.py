"""The OpenAI door's requests: what is taken reaches the engine as it was sent, and what is not is refused by name."""

import time
from typing import Any

import pytest
from pydantic import ValidationError

from stack.api.openai import OpenAIChatCompletionRequest, OpenAICompletionRequest
from stack.api.wire import describe

QUESTION = {"role": "user", "content": "Where?"}
CHAT: dict[str, Any] = {"model": "small", "messages": [QUESTION]}
TEXT: dict[str, Any] = {"model": "small", "prompt": "The capital is"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "get_weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA} | fields}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def some_of(*names: str, mode: str = "auto") -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def said(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", **fields}]}


def asked(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **fields}]}


def engine_body(body: dict[str, Any]) -> dict[str, Any]:
    return OpenAIChatCompletionRequest.model_validate(body).model_dump(exclude_unset=True)


def refusal(body: dict[str, Any]) -> str:
    kind = OpenAICompletionRequest if "prompt" in body else OpenAIChatCompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return describe(caught.value)


CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
PART = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}}
INLINE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TAKEN: list[dict[str, Any]] = [
    {"messages": [{"role": "developer", "content": "Be short."}, {"role": "system", "content": [PART], "name": "s"}]},
    asked(content=[PART, IMAGE, INLINE], name="ann"),
    said(content=None, tool_calls=[CALL]) | {"tools": [tool()]},
    said(tool_calls=[CALL, CALL | {"id": "call_2"}], content="Let me see."),
    {"messages": [{"role": "tool", "content": "sunny", "tool_call_id": "call_1"}]},
    {"messages": [{"role": "tool", "content": [PART], "tool_call_id": "call_1", "name": "get_weather"}]},
    {"tools": [tool(), tool("other", description="d", strict=True)], "parallel_tool_calls": False},
    *({"tools": [tool()], "tool_choice": choice} for choice in ("none", "auto", "required", named("get_weather"))),
    {"tool_choice": "none"},
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "place", "description": "d", "schema": SCHEMA, "strict": True},
        }
    },
    *(
        {"structured_outputs": constraint}
        for constraint in (
            {"json": SCHEMA},
            {"regex": "[a-z]+"},
            {"choice": ["yes", "no"]},
            {"grammar": 'root ::= "a"'},
            {"json_object": True},
        )
    ),
    {"logprobs": True, "top_logprobs": 20, "n": 16, "seed": -1, "frequency_penalty": -2, "presence_penalty": 2},
    {"stop": ["a"] * 16, "stop_token_ids": [1, 2], "logit_bias": {"5": -100, "6": 100.0}},
    {"stop": "a", "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 5},
    {"max_tokens": 5, "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0},
    {"ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False, "add_special_tokens": True},
    {"user": "ann"},
]


@pytest.mark.parametrize("fields", TAKEN, ids=str)
def test_what_is_taken_reaches_the_engine_as_it_was_sent(fields: dict[str, Any]) -> None:
    assert engine_body(CHAT | fields) == CHAT | fields


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2, 3], [[1, 2], [3]]], ids=str)
def test_prompts_of_all_kinds_reach_the_engine_as_they_were_sent(prompt: Any) -> None:
    body = TEXT | {"prompt": prompt, "echo": True, "logprobs": 5, "structured_outputs": {"regex": "a"}}
    assert OpenAICompletionRequest.model_validate(body).model_dump(exclude_unset=True) == body


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"metadata": {"a": "b"}},
        {"store": False},
        {"service_tier": "auto"},
        {"safety_identifier": "a"},
        {"prompt_cache_key": "a"},
    ],
    ids=str,
)
def test_what_is_taken_and_changes_nothing_does_not_reach_the_engine(fields: dict[str, Any]) -> None:
    assert engine_body(CHAT | fields) == CHAT


@pytest.mark.parametrize("kind", [OpenAIChatCompletionRequest, OpenAICompletionRequest])
def test_null_is_as_if_not_given(kind: type[OpenAIChatCompletionRequest | OpenAICompletionRequest]) -> None:
    body = CHAT if kind is OpenAIChatCompletionRequest else TEXT
    nulls = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    assert len(nulls) > 20
    assert kind.model_validate(nulls | body).model_dump(exclude_unset=True) == body


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "Paris."}
    empty = dict.fromkeys(("name", "refusal", "annotations", "audio", "function_call", "reasoning"))
    empty |= {"tool_calls": []}
    assert engine_body(CHAT | {"messages": [QUESTION, answer | empty, QUESTION]})["messages"] == [
        QUESTION,
        answer,
        QUESTION,
    ]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_choice_of_some_tools_becomes_a_request_with_these_alone(mode: str) -> None:
    body = engine_body(CHAT | {"tools": [tool("a"), tool("b"), tool("c")], "tool_choice": some_of("c", "a", mode=mode)})
    assert body == CHAT | {"tools": [tool("a"), tool("c")], "tool_choice": mode}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": '{"type": "object"}'}, {"json": {"type": "object"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, {"json": {"type": "object"}}),
    ],
    ids=str,
)
def test_constraints_by_earlier_names_and_as_text_are_the_same(
    fields: dict[str, Any], constraint: dict[str, Any]
) -> None:
    assert engine_body(CHAT | fields) == CHAT | {"structured_outputs": constraint}
    body = OpenAICompletionRequest.model_validate(TEXT | fields).model_dump(exclude_unset=True)
    assert body == TEXT | {"structured_outputs": constraint}


REFUSED: list[tuple[dict[str, Any], str]] = [
    # Messages
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0: role should be 'developer', 'system', 'user'"),
    ({"messages": [{"content": "a"}]}, "messages.0: role should be "),
    ({"messages": ["a"]}, "messages.0: role should be "),
    ({"messages": [QUESTION] * 1_001}, "messages: has 1001 entries; allowed: at most 1000"),
    (asked(), "messages.0.content: is required"),
    (asked(content=None), "messages.0.content: should be a text or a list of parts, not None"),
    (asked(content=[]), "messages.0.content: List should have at least 1 item"),
    (asked(content=[PART] * 101), "messages.0.content: has 101 entries; allowed: at most 100"),
    (asked(content=["a"]), "messages.0.content.0: type should be 'text' or 'image_url', not 'a'"),
    (asked(content=[{"type": "input_audio"}]), "messages.0.content.0: type should be 'text' or 'image_url'"),
    (asked(content=[{"type": "text"}]), "messages.0.content.0.text: is required"),
    (asked(content=[PART | {"cache": 1}]), "messages.0.content.0: unknown key 'cache'; allowed: type, text"),
    (asked(content="x" * 1_000_001), "messages.0.content: String should have at most 1000000 characters"),
    (asked(content="a", nmae="b"), "messages.0: unknown key 'nmae'; allowed: role, content, name"),
    (asked(content=[{"type": "image_url", "image_url": {"url": "file:///a"}}]), "content.0.image_url.url: "),
    (asked(content=[{"type": "image_url", "image_url": "https://a"}]), "messages.0.content.0.image_url: "),
    (
        asked(content=[{"type": "image_url", "image_url": {"url": "https://a", "detail": "most"}}]),
        "messages.0.content.0.image_url.detail: Input should be 'auto', 'low' or 'high', not 'most'",
    ),
    ({"messages": [{"role": "system", "content": [IMAGE]}]}, "messages.0.content.0: unknown key 'image_url'"),
    (said(), "messages.0: has neither content nor tool_calls"),
    (said(content=None, tool_calls=[]), "messages.0: has neither content nor tool_calls"),
    ({"model": None}, "model: Input should be a valid string, not None"),
    ({"messages": None}, "messages: Input should be a valid list, not None"),
    (said(content="a", refusal="no"), "messages.0.refusal: Input should be None, not 'no'"),
    (said(content="a", annotations=["x"]), "messages.0.annotations: "),
    (said(tool_calls=[CALL] * 129), "messages.0.tool_calls: has 129 entries; allowed: at most 128"),
    (
        said(tool_calls=[CALL | {"function": {"name": "a", "arguments": {}}}]),
        "messages.0.tool_calls.0.function.arguments: Input should be a valid string, not {}",
    ),
    (said(tool_calls=[CALL | {"function": {"name": "a b", "arguments": ""}}]), "tool_calls.0.function.name: "),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.tool_call_id: is required"),
    # Tools
    ({"tools": []}, "tools: List should have at least 1 item"),
    ({"tools": [tool(f"t{number}") for number in range(129)]}, "tools: has 129 entries; allowed: at most 128"),
    ({"tools": [tool("a b")]}, "tools.0.function.name: String should match pattern '^[a-zA-Z0-9_-]{1,64}$', not 'a b'"),
    ({"tools": [tool("x" * 65)]}, "tools.0.function.name: "),
    ({"tools": [tool(parameters=5)]}, "tools.0.function.parameters: Input should be a valid dictionary, not 5"),
    ({"tools": [tool(parameters={"$ref": "http://a"})]}, "tools.0.function.parameters: $ref is 'http://a'; allowed:"),
    ({"tools": [{"type": "code"}]}, "tools.0.type: Input should be 'function', not 'code'"),
    ({"tools": [tool(), tool()]}, "tools hold several functions named 'get_weather'; allowed: one of each name"),
    ({"tool_choice": "auto"}, "tool_choice needs tools"),
    ({"tools": [tool()], "tool_choice": "never"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
    ({"tools": [tool()], "tool_choice": named("b")}, "tool_choice names 'b', which is not in tools: get_weather"),
    ({"tools": [tool()], "tool_choice": some_of("b")}, "tool_choice names 'b', which is not in tools: get_weather"),
    ({"tools": [tool()], "tool_choice": some_of()}, "tool_choice.allowed_tools.tools: List should have at least 1"),
    ({"tools": [tool()], "tool_choice": {"type": "custom"}}, "tool_choice.type: Input should be 'function'"),
    ({"tools": [tool()], "tool_choice": 5}, "tool_choice: Input should be 'none', 'auto' or 'required', not 5"),
    # Constraints
    ({"response_format": "json"}, "response_format: "),
    ({"response_format": {"type": "xml"}}, "response_format.type: Input should be 'text', 'json_object' or"),
    ({"response_format": {"type": "json_schema"}}, "response_format: json_schema is needed with the type"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
        "response_format: json_schema is needed with the type",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema: is required",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/a"}}}},
        "response_format.json_schema.schema: $ref is '#/a', which is not in the schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "json_schema": {}}}},
        "response_format.json_schema: unknown key 'json_schema'; allowed: name, description, schema, strict",
    ),
    ({"structured_outputs": {}}, "structured_outputs: holds nothing; allowed: one of json, regex, choice, grammar"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs: holds regex and choice; allowed:"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json: the schema is not JSON"),
    ({"structured_outputs": {"json": "5"}}, "structured_outputs.json: Input should be a valid dictionary, not 5"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: List should have at least 1 item"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0: String should have at least 1 character"),
    ({"structured_outputs": {"choice": ["a"] * 1_001}}, "structured_outputs.choice: has 1001 entries"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object: Input should be True"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs: unknown key 'structural_tag'; allowed:"),
    ({"guided_regex": "(a{1,1000}){1,1000}"}, "structured_outputs.regex: the regular expression"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "structured_outputs: holds regex and choice"),
    ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "holds both structured_outputs and guided_regex"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "b"}},
        "holds both response_format and structured_outputs; allowed: one of them",
    ),
    # Sampling
    ({"n": 17}, "n: Input should be less than or equal to 16, not 17"),
    ({"stop": ["a"] * 17}, "stop: has 17 entries; allowed: at most 16"),
    ({"stop": ["a", ""]}, "stop.1: String should have at least 1 character, not ''"),
    ({"stop_token_ids": [1] * 17}, "stop_token_ids: has 17 entries; allowed: at most 16"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a: String should match pattern"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5: Input should be less than or equal to 100, not 101"),
    ({"logit_bias": {str(token): 1 for token in range(1_025)}}, "logit_bias: has 1025 entries; allowed: at most 1024"),
    ({"top_logprobs": 2}, "top_logprobs need logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20, not 21"),
    ({"stream_options": {"include_usage": True}}, "stream_options need stream: true"),
    ({"metadata": {"a": 5}}, "metadata.a: Input should be a valid string, not 5"),
    ({"metadata": {str(key): "" for key in range(17)}}, "metadata: has 17 entries; allowed: at most 16"),
    ({"store": True}, "store: Input should be False, not True"),
    ({"service_tier": "flex"}, "service_tier: Input should be 'auto' or 'default', not 'flex'"),
    *(
        ({name: value}, f"unknown key {name!r}; allowed: model, stream")
        for name, value in {
            "best_of": 2,
            "functions": [],
            "function_call": "auto",
            "modalities": ["text"],
            "audio": {},
            "prediction": {},
            "chat_template": "a",
            "chat_template_kwargs": {},
            "prompt_logprobs": 1,
            "use_beam_search": True,
            "priority": 1,
            "vllm_xargs": {},
        }.items()
    ),
]
TEXTS_REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"unknown key {name!r}; allowed: model")
        for name, value in {"suffix": "a", "best_of": 2}.items()
    ),
    ({"prompt": []}, "prompt: List should have at least 1 item"),
    ({"prompt": [[]]}, "prompt.0: List should have at least 1 item"),
    ({"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0, not -1"),
    ({"prompt": None}, "prompt: should be a text, a list of texts, or tokens, not None"),
    ({"prompt": {"a": 1}}, "prompt: should be a text, a list of texts, or tokens, not {'a': 1}"),
    ({"prompt": ["a", 5]}, "prompt.1: Input should be a valid string, not 5"),
    ({"prompt": [5, "a"]}, "prompt.1: Input should be a valid integer"),
    ({"prompt": [-1] * 1_000_000}, "prompt.0: Input should be greater than or equal to 0, not -1"),
    ({"prompt": [1] * 1_000_001}, "prompt: has 1000001 entries; allowed: at most 1000000"),
    ({"prompt": ["a"] * 65}, "prompt: has 65 entries; allowed: at most 64"),
    ({"prompt": [[1]] * 33, "n": 2}, "asks for 66 sequences; allowed: at most 64"),
    ({"prompt": ["a"] * 33, "n": 2}, "asks for 66 sequences; allowed: at most 64"),
    ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20, not 21"),
]


@pytest.mark.parametrize(
    ("body", "words"),
    [(CHAT | fields, words) for fields, words in REFUSED] + [(TEXT | fields, words) for fields, words in TEXTS_REFUSED],
    ids=[words for _, words in REFUSED + TEXTS_REFUSED],
)
def test_what_is_refused_is_named_with_what_is_allowed(body: dict[str, Any], words: str) -> None:
    told = refusal(body)
    assert words in told
    assert len(told) < 2_000


def test_a_long_chat_is_checked_in_far_less_than_a_millisecond() -> None:
    turns = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "word " * 200}] * 10
    body = CHAT | {"messages": turns, "stream": True, "max_tokens": 128}
    spent = []
    for _ in range(100):
        begin = time.thread_time()
        engine_body(body)
        spent.append(time.thread_time() - begin)
    assert min(spent) < 0.001

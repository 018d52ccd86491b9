"""Wire types of the OpenAI door: the fields that are served, each with its bound. Others are refused by name.

What `model_dump(exclude_unset=True)` of a request gives is what engines are asked with: OpenAI's shape with vLLM's
additions. Fields that OpenAI keeps for itself and that change nothing here are taken and not passed on: `metadata`,
`store` (false), `service_tier` (auto or default), `safety_identifier` and `prompt_cache_key`.
"""

import operator
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from stack.api.inference import MAX_MESSAGES, MAX_TOKENS
from stack.api.messages import MAX_ATTACHMENT_CHARACTERS, MAX_CHARACTERS, MAX_PARTS
from stack.api.schemas import Choices, Grammar, JsonSchema, JsonSchemaOrText, Regex
from stack.api.wire import ModelId, Wire, at_most

MAX_SEQUENCES = 64
MAX_STOPS = 16
MAX_TOOLS = 128
MAX_BIASES = 1_024

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Stop = Annotated[str, Field(min_length=1, max_length=1_000)]
Token = Annotated[int, Field(ge=0, le=10_000_000)]
ShortText = Annotated[str, Field(max_length=200)]
Description = Annotated[str, Field(max_length=10_000)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
# Left out where it is null, which vLLM does not take.
Name = Annotated[ShortText | None, Field(exclude_if=operator.not_)]
# The key of what OpenAI's client sends back of an earlier answer, where it is empty; it tells an engine nothing.
Empty = Annotated[None, Field(exclude=True)]


# What constrains an answer


class StructuredOutputs(Wire):
    """What an answer must be like, in vLLM's terms: exactly one of these.

    `json` is a JSON schema, as an object or as its text; `grammar` one in EBNF (GBNF's dialect) or Lark's.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    json_schema: JsonSchemaOrText | None = Field(None, alias="json")
    regex: Regex | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        given = list(self.model_dump(exclude_none=True))
        if len(given) != 1:
            allowed = ", ".join(self._keys)
            raise ValueError(f"holds {' and '.join(given) or 'nothing'}; allowed: one of {allowed}")
        return self


class JsonSchemaFormat(Wire):
    """A schema that an answer must fit. `strict` says nothing more: an answer always fits."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: FunctionName
    description: Description | None = None
    json_schema: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is needed with the type 'json_schema', and with no other")
        return self


def _is_text(response_format: ResponseFormat | None) -> bool:
    """Whether it asks for what an answer is anyway; then there is nothing that an engine has to heed."""
    return response_format is None or response_format.type == "text"


# What both kinds of completion have in common


class StreamOptions(Wire):
    include_usage: bool = False


_REQUIRED = ("model", "messages", "prompt")
# vLLM's names of constraints in earlier releases, and what they are called now.
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}


class Sampled(Wire):
    """What both kinds of completion have in common. `top_k` and below are vLLM's additions. null is as if not given.

    `guided_json`, `guided_regex`, `guided_choice` and `guided_grammar` are taken as those of `structured_outputs`.
    """

    model: ModelId
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Stop | Annotated[list[Stop], at_most(MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,8}$")], Annotated[float, Field(ge=-100, le=100)]],
            at_most(MAX_BIASES),
        ]
        | None
    ) = None
    response_format: Annotated[ResponseFormat | None, Field(exclude_if=_is_text)] = None
    user: Annotated[str, Field(max_length=1_000)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], at_most(MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict) or None not in value.values():
            return value
        return {key: one for key, one in value.items() if one is not None or key in _REQUIRED}

    @model_validator(mode="before")
    @classmethod
    def _rename_guided(cls, value: Any) -> Any:
        if not isinstance(value, dict) or _GUIDED.keys().isdisjoint(value):
            return value
        guided = {kind: value[name] for name, kind in _GUIDED.items() if name in value}
        if value.get("structured_outputs") is not None:
            raise ValueError(f"holds both structured_outputs and guided_{next(iter(guided))}; allowed: one of them")
        return {key: one for key, one in value.items() if key not in _GUIDED} | {"structured_outputs": guided}

    @model_validator(mode="after")
    def _fits_together(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream: true")
        if self.structured_outputs is not None and not _is_text(self.response_format):
            raise ValueError("holds both response_format and structured_outputs; allowed: one of them")
        return self


# Messages


class OpenAITextPart(Wire):
    type: Literal["text"]
    text: Text


class OpenAIImageUrl(Wire):
    """An image: its address, or itself in a `data:` address."""

    url: Annotated[str, Field(max_length=MAX_ATTACHMENT_CHARACTERS, pattern=r"^(https?://|data:image/)")]
    detail: Literal["auto", "low", "high"] | None = None


class OpenAIImagePart(Wire):
    type: Literal["image_url"]
    image_url: OpenAIImageUrl


def _tag(key: str, tags: dict[str, str]) -> Callable[[Any], str | None]:
    """The tag of an object in a union, by the value of one of its keys.

    Tags stand in brackets, which keeps them out of the place that an error names.
    """

    def tag(value: Any) -> str | None:
        kind = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return tags.get(kind) if isinstance(kind, str) else None

    return tag


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(parts)" if isinstance(value, list) else None


_EITHER = Discriminator(_kind, "content", "should be a text or a list of parts")
TextContent = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[Annotated[list[OpenAITextPart], Field(min_length=1), at_most(MAX_PARTS)], Tag("(parts)")],
    _EITHER,
]
OpenAIPart = Annotated[
    Annotated[OpenAITextPart, Tag("(text)")] | Annotated[OpenAIImagePart, Tag("(image)")],
    Discriminator(
        _tag("type", {"text": "(text)", "image_url": "(image)"}), "part", "type should be 'text' or 'image_url'"
    ),
]
UserContent = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[Annotated[list[OpenAIPart], Field(min_length=1), at_most(MAX_PARTS)], Tag("(parts)")],
    _EITHER,
]


class OpenAISystemMessage(Wire):
    role: Literal["developer", "system"]
    content: TextContent
    name: Name = None


class OpenAIUserMessage(Wire):
    role: Literal["user"]
    content: UserContent
    name: Name = None


class OpenAIFunctionCall(Wire):
    """`arguments` is JSON as the model has written it, which may be broken."""

    name: FunctionName
    arguments: Text


class OpenAIToolCall(Wire):
    id: ShortText
    type: Literal["function"] = "function"
    function: OpenAIFunctionCall


class OpenAIAssistantMessage(Wire):
    """What the model has said. Its content may be missing where it has called tools."""

    role: Literal["assistant"]
    content: TextContent | None = None
    name: Name = None
    tool_calls: Annotated[list[OpenAIToolCall] | None, at_most(MAX_TOOLS), Field(exclude_if=operator.not_)] = None
    refusal: Empty = None
    annotations: Annotated[list[Any] | None, Field(max_length=0, exclude=True)] = None
    audio: Empty = None
    function_call: Empty = None
    reasoning: Empty = None
    reasoning_content: Empty = None

    @model_validator(mode="after")
    def _says_something(self) -> "OpenAIAssistantMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("has neither content nor tool_calls")
        return self


class OpenAIToolMessage(Wire):
    """What a tool has given for the call of this id."""

    role: Literal["tool"]
    content: TextContent
    tool_call_id: ShortText
    name: Name = None


_ROLES = {
    "developer": "(system)",
    "system": "(system)",
    "user": "(user)",
    "assistant": "(assistant)",
    "tool": "(tool)",
}
OpenAIMessage = Annotated[
    Annotated[OpenAISystemMessage, Tag("(system)")]
    | Annotated[OpenAIUserMessage, Tag("(user)")]
    | Annotated[OpenAIAssistantMessage, Tag("(assistant)")]
    | Annotated[OpenAIToolMessage, Tag("(tool)")],
    Discriminator(_tag("role", _ROLES), "role", "role should be 'developer', 'system', 'user', 'assistant' or 'tool'"),
]


# Tools


class OpenAIFunction(Wire):
    """A function that the model may call; `parameters` is the JSON schema of its arguments, an object."""

    name: FunctionName
    description: Description | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class OpenAITool(Wire):
    type: Literal["function"]
    function: OpenAIFunction


class OpenAIFunctionReference(Wire):
    name: FunctionName


class OpenAIToolReference(Wire):
    type: Literal["function"]
    function: OpenAIFunctionReference


class OpenAIAllowed(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[OpenAIToolReference], Field(min_length=1), at_most(MAX_TOOLS)]


class OpenAIAllowedTools(Wire):
    """Some of the tools: the model may (auto) or must (required) call them, and no others.

    A request with such a choice becomes one with these tools alone.
    """

    type: Literal["allowed_tools"]
    allowed_tools: OpenAIAllowed


def _choice_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None and not isinstance(value, dict):
        return "(mode)"
    return "(allowed)" if kind == "allowed_tools" else "(named)"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(mode)")]
    | Annotated[OpenAIToolReference, Tag("(named)")]
    | Annotated[OpenAIAllowedTools, Tag("(allowed)")],
    Discriminator(_choice_kind),
]


# Requests


class OpenAIChatCompletionRequest(Sampled):
    messages: Annotated[list[OpenAIMessage], Field(min_length=1), at_most(MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[OpenAITool], Field(min_length=1), at_most(MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
        at_most(16),
        Field(exclude=True),
    ] = None
    store: Annotated[Literal[False] | None, Field(exclude=True)] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Field(exclude=True)] = None
    safety_identifier: Annotated[str | None, Field(max_length=200, exclude=True)] = None
    prompt_cache_key: Annotated[str | None, Field(max_length=200, exclude=True)] = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "OpenAIChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs need logprobs: true")
        return self

    @model_validator(mode="after")
    def _tools_fit_together(self) -> "OpenAIChatCompletionRequest":
        if self.tools is None:
            if self.tool_choice not in (None, "none"):
                raise ValueError("tool_choice needs tools")
            return self
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"tools hold several functions named {twice!r}; allowed: one of each name")
        chosen = self._chosen()
        if unknown := [name for name in chosen if name not in names]:
            raise ValueError(f"tool_choice names {unknown[0]!r}, which is not in tools: {', '.join(names[:10])}")
        if not isinstance(self.tool_choice, OpenAIAllowedTools):
            return self
        tools = [tool for tool in self.tools if tool.function.name in chosen]
        return self.model_copy(update={"tools": tools, "tool_choice": self.tool_choice.allowed_tools.mode})

    def _chosen(self) -> list[str]:
        """The names in `tool_choice`."""
        match self.tool_choice:
            case OpenAIToolReference():
                return [self.tool_choice.function.name]
            case OpenAIAllowedTools():
                return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
            case _:
                return []


def _prompt_kind(value: Any) -> str | None:
    if not isinstance(value, list):
        return "(text)" if isinstance(value, str) else None
    first = value[0] if value else None
    if isinstance(first, list):
        return "(lists of tokens)"
    return "(tokens)" if isinstance(first, int) else "(texts)"


# Of a long list the first error is told, and not each.
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True), at_most(MAX_TOKENS)]
Prompt = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[Annotated[list[Text], Field(min_length=1), at_most(MAX_SEQUENCES)], Tag("(texts)")]
    | Annotated[Tokens, Tag("(tokens)")]
    | Annotated[Annotated[list[Tokens], Field(min_length=1), at_most(MAX_SEQUENCES)], Tag("(lists of tokens)")],
    Discriminator(_prompt_kind, "prompt", "should be a text, a list of texts, or tokens"),
]


class OpenAICompletionRequest(Sampled):
    """`prompt` is a text, several texts, the tokens of one, or the tokens of several."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _sequences_are_bounded(self) -> "OpenAICompletionRequest":
        texts = len(self.prompt) if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else 1
        if texts * (self.n or 1) > MAX_SEQUENCES:
            raise ValueError(f"asks for {texts * (self.n or 1)} sequences; allowed: at most {MAX_SEQUENCES}")
        return self


# Answers. They pass through as the engine gives them, with further fields of its own: these types document them.


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class OpenAIUsage(Answer):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int = 0


class OpenAILogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None = None


class OpenAITokenLogprob(OpenAILogprob):
    top_logprobs: list[OpenAILogprob] = []


class OpenAIChatLogprobs(Answer):
    content: list[OpenAITokenLogprob] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class OpenAIAnswerMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[OpenAIToolCall] | None = None


class OpenAIChatChoice(Answer):
    index: int
    message: OpenAIAnswerMessage
    logprobs: OpenAIChatLogprobs | None = None
    finish_reason: FinishReason


class OpenAIChatCompletion(Answer):
    """A model's answer to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = 0
    model: str = ""
    choices: list[OpenAIChatChoice]
    usage: OpenAIUsage | None = None


class OpenAIFunctionCallDelta(Answer):
    name: str | None = None
    arguments: str | None = None


class OpenAIToolCallDelta(Answer):
    """A part of a tool call: the first one has its id and name, the others go on with its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: OpenAIFunctionCallDelta | None = None


class OpenAIDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[OpenAIToolCallDelta] | None = None


class OpenAIChatChunkChoice(Answer):
    index: int
    delta: OpenAIDelta
    logprobs: OpenAIChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class OpenAIChatCompletionChunk(Answer):
    """One server-sent event of a streamed answer. With `include_usage` the last one has no choices but the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = 0
    model: str = ""
    choices: list[OpenAIChatChunkChoice]
    usage: OpenAIUsage | None = None


class OpenAITextLogprobs(Answer):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []


class OpenAITextChoice(Answer):
    index: int
    text: str
    logprobs: OpenAITextLogprobs | None = None
    finish_reason: FinishReason | None = None


class OpenAICompletion(Answer):
    """The continuation of a text; in a stream, each server-sent event is one with a part of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = 0
    model: str = ""
    choices: list[OpenAITextChoice]
    usage: OpenAIUsage | None = None


class OpenAIModel(Wire):
    """A model that can be asked. `root` is the base model of an adapter."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "llama-stack-ray"
    root: str


class OpenAIModelList(Wire):
    object: str = "list"
    data: list[OpenAIModel]

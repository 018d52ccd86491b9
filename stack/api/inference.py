"""Wire types of the inference API."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stack.api.messages import CompletionMessage, Content, Message, StopReason, ToolCall, ToolName
from stack.api.wire import ModelId, Request, Wire, at_most

MAX_MESSAGES = 1_000
MAX_TOKENS = 1_000_000


class SamplingStrategy(StrEnum):
    greedy = "greedy"
    top_p = "top_p"
    top_k = "top_k"


class SamplingParams(Wire):
    """How tokens are chosen. 0 means unset for `max_tokens`, `top_k`, `top_p` and `repetition_penalty`.

    Without `max_tokens` the model may fill the rest of its context.
    """

    strategy: SamplingStrategy = SamplingStrategy.greedy
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100_000)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=10)] | None = None


class LogProbConfig(Wire):
    """How many of the likeliest tokens are reported at each position."""

    top_k: Annotated[int, Field(ge=0, le=20)] = 0


class ToolChoice(StrEnum):
    auto = "auto"
    required = "required"


class ToolPromptFormat(StrEnum):
    json = "json"
    function_tag = "function_tag"


class ToolParamDefinition(Wire):
    param_type: Annotated[str, Field(max_length=100)]
    description: Annotated[str, Field(max_length=10_000)] | None = None
    required: bool = True


class ToolDefinition(Wire):
    tool_name: ToolName
    description: Annotated[str, Field(max_length=10_000)] | None = None
    parameters: Annotated[dict[str, ToolParamDefinition], at_most(100)] | None = None


class ChatCompletionRequest(Request):
    model: ModelId
    messages: Annotated[list[Message], Field(min_length=1), at_most(MAX_MESSAGES)]
    sampling_params: SamplingParams = SamplingParams()
    tools: Annotated[list[ToolDefinition], at_most(128)] = []
    tool_choice: ToolChoice = ToolChoice.auto
    tool_prompt_format: ToolPromptFormat = ToolPromptFormat.json
    stream: bool = False
    logprobs: LogProbConfig | None = None


class CompletionRequest(Request):
    model: ModelId
    content: Content
    sampling_params: SamplingParams = SamplingParams()
    stream: bool = False
    logprobs: LogProbConfig | None = None


class TokenLogProbs(Wire):
    """The natural logarithms of the probabilities of the chosen token and the likeliest ones, at one position.

    Tokens are told by their texts: of several with the same one, the likeliest counts.
    """

    logprobs_by_token: dict[str, float]


class ChatCompletionResponse(Wire):
    completion_message: CompletionMessage
    logprobs: list[TokenLogProbs] | None = None


class ToolCallParseStatus(StrEnum):
    started = "started"
    in_progress = "in_progress"
    failure = "failure"
    success = "success"


class ToolCallDelta(Wire):
    content: str | ToolCall
    parse_status: ToolCallParseStatus


class ChatCompletionResponseEventType(StrEnum):
    start = "start"
    progress = "progress"
    complete = "complete"


class ChatCompletionResponseEvent(Wire):
    event_type: ChatCompletionResponseEventType
    delta: str | ToolCallDelta
    logprobs: list[TokenLogProbs] | None = None
    stop_reason: StopReason | None = None


class ChatCompletionResponseStreamChunk(Wire):
    event: ChatCompletionResponseEvent


class CompletionResponse(Wire):
    completion_message: CompletionMessage
    logprobs: list[TokenLogProbs] | None = None


class CompletionResponseStreamChunk(Wire):
    delta: str
    stop_reason: StopReason | None = None
    logprobs: list[TokenLogProbs] | None = None

"""Wire types of the OpenAI door: the fields that are served, each with its bound. Others are refused by name."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stack.api.inference import MAX_MESSAGES, MAX_TOKENS
from stack.api.messages import MAX_CHARACTERS, MAX_PARTS
from stack.api.wire import ModelId, Wire, at_most

MAX_SEQUENCES = 64

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Stop = Annotated[str, Field(max_length=1_000)]
Token = Annotated[int, Field(ge=0, le=10_000_000)]


class StreamOptions(Wire):
    include_usage: bool = False


class Sampled(Wire):
    """What both kinds of completion have in common. `top_k`, `min_p` and below are vLLM's additions."""

    model: ModelId
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Stop | Annotated[list[Stop], at_most(16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    user: Annotated[str, Field(max_length=1_000)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream: true")
        return self


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class OpenAIMessage(Wire):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], at_most(MAX_PARTS)]
    name: Annotated[str, Field(max_length=200)] | None = None
    tool_call_id: Annotated[str, Field(max_length=200)] | None = None


class OpenAIChatCompletionRequest(Sampled):
    messages: Annotated[list[OpenAIMessage], Field(min_length=1), at_most(MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "OpenAIChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs need logprobs: true")
        return self


class OpenAICompletionRequest(Sampled):
    """`prompt` is a text, several texts, or the tokens of one."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1), at_most(MAX_SEQUENCES)]
        | Annotated[list[Token], Field(min_length=1), at_most(MAX_TOKENS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _sequences_are_bounded(self) -> "OpenAICompletionRequest":
        texts = len(self.prompt) if isinstance(self.prompt, list) and isinstance(self.prompt[0], str) else 1
        if texts * (self.n or 1) > MAX_SEQUENCES:
            raise ValueError(f"asks for {texts * (self.n or 1)} sequences; allowed: at most {MAX_SEQUENCES}")
        return self


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

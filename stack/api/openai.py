"""Wire types of the OpenAI door: the fields that are bounded here. What else vLLM takes passes through to it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from stack.api.inference import MAX_MESSAGES, MAX_TOKENS
from stack.api.messages import MAX_CHARACTERS
from stack.api.wire import ModelId

Stop = Annotated[str, Field(max_length=1_000)]


class Sampled(BaseModel):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    model: ModelId
    stream: bool = False
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None


class OpenAIMessage(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    role: Annotated[str, Field(max_length=50)]
    content: Annotated[str, Field(max_length=MAX_CHARACTERS)] | list[dict[str, Any]] | None = None


class OpenAIChatCompletionRequest(Sampled):
    messages: Annotated[list[OpenAIMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class OpenAICompletionRequest(Sampled):
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | Annotated[list[Any], Field(max_length=10_000)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class OpenAIModel(BaseModel):
    """A model that can be asked. `root` is the base model of an adapter."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "llama-stack-ray"
    root: str


class OpenAIModelList(BaseModel):
    object: str = "list"
    data: list[OpenAIModel]

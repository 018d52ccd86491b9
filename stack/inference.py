"""Chat and text completion, in the Llama Stack's terms, on engines that speak OpenAI's."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from stack.api.inference import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseEvent,
    ChatCompletionResponseEventType,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
    SamplingParams,
    SamplingStrategy,
    TokenLogProbs,
)
from stack.api.messages import (
    CompletionMessage,
    Message,
    StopReason,
    SystemMessage,
    ToolResponseMessage,
    UserMessage,
    text_of,
)
from stack.context import Context
from stack.errors import BadInput


async def chat_completion(context: Context, request: ChatCompletionRequest) -> ChatCompletionResponse:
    """The model's answer to a conversation, whole. Raises NotFound for an unknown model, BadInput, Unavailable."""
    answer = json.loads(await context.models.answer("chat", chat_body(request)))
    choice = answer["choices"][0]
    message = CompletionMessage(
        content=choice["message"]["content"] or "", stop_reason=_stop_reason(choice["finish_reason"])
    )
    return ChatCompletionResponse(
        completion_message=message, logprobs=_chat_logprobs(choice) if request.logprobs else None
    )


async def stream_chat_completion(
    context: Context, request: ChatCompletionRequest
) -> AsyncGenerator[ChatCompletionResponseStreamChunk]:
    """The model's answer as events: a start, progress with new text, and one that completes it with the stop reason.

    Raises as `chat_completion` does before it returns; what fails later is raised by the iterator.
    """
    items = await context.models.stream("chat", chat_body(request))
    return _chat_events(items, wants_logprobs=request.logprobs is not None)


async def completion(context: Context, request: CompletionRequest) -> CompletionResponse:
    """The continuation of a text, whole. Raises as `chat_completion` does."""
    answer = json.loads(await context.models.answer("completions", completion_body(request)))
    choice = answer["choices"][0]
    message = CompletionMessage(content=choice["text"], stop_reason=_stop_reason(choice["finish_reason"]))
    return CompletionResponse(completion_message=message, logprobs=_text_logprobs(choice) if request.logprobs else None)


async def stream_completion(
    context: Context, request: CompletionRequest
) -> AsyncGenerator[CompletionResponseStreamChunk]:
    """The continuation of a text in chunks, of which the last one has the stop reason."""
    items = await context.models.stream("completions", completion_body(request))
    return _text_chunks(items, wants_logprobs=request.logprobs is not None)


def chat_body(request: ChatCompletionRequest) -> dict[str, Any]:
    """The request in OpenAI's shape."""
    if request.tools:
        raise BadInput("tools cannot be used yet; leave them out", param="tools")
    body = dict(sampling_body(request.sampling_params), model=request.model, stream=request.stream)
    body["messages"] = [openai_message(message) for message in request.messages]
    if request.logprobs:
        body |= dict(logprobs=True, top_logprobs=request.logprobs.top_k)
    return body


def completion_body(request: CompletionRequest) -> dict[str, Any]:
    """The request in OpenAI's shape."""
    body = dict(sampling_body(request.sampling_params), model=request.model, stream=request.stream)
    body["prompt"] = text_of(request.content)
    # A completion's default length at the OpenAI door is 16 tokens; here unset means what the context has room for.
    body.setdefault("max_tokens", None)
    if request.logprobs:
        body["logprobs"] = request.logprobs.top_k
    return body


def openai_message(message: Message) -> dict[str, Any]:
    """A message in OpenAI's shape."""
    text = text_of(message.content)
    match message:
        case UserMessage():
            return dict(role="user", content=f"{text}\n\n{text_of(message.context)}" if message.context else text)
        case SystemMessage():
            return dict(role="system", content=text)
        case ToolResponseMessage():
            return dict(role="tool", tool_call_id=message.call_id, content=text)
        case CompletionMessage():
            if message.tool_calls:
                raise BadInput("tool calls cannot be used yet; leave them out", param="messages")
            return dict(role="assistant", content=text)


def sampling_body(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters in OpenAI's and vLLM's shape."""
    body: dict[str, Any] = {}
    match params.strategy:
        case SamplingStrategy.greedy:
            body["temperature"] = 0
        case SamplingStrategy.top_p:
            body["top_p"] = params.top_p or 1.0
        case SamplingStrategy.top_k:
            if not params.top_k:
                raise BadInput("the strategy top_k needs a top_k of at least 1", param="sampling_params.top_k")
            body["top_k"] = params.top_k
    if params.strategy != SamplingStrategy.greedy and params.temperature is not None:
        body["temperature"] = params.temperature
    if params.max_tokens:
        body["max_tokens"] = params.max_tokens
    if params.repetition_penalty:
        body["repetition_penalty"] = params.repetition_penalty
    return body


def _stop_reason(finish_reason: str) -> StopReason:
    return StopReason.out_of_tokens if finish_reason == "length" else StopReason.end_of_turn


def _chat_logprobs(choice: dict[str, Any]) -> list[TokenLogProbs]:
    positions = (choice.get("logprobs") or {}).get("content") or []
    likeliest = (position["top_logprobs"] or [position] for position in positions)
    return [TokenLogProbs(logprobs_by_token={one["token"]: one["logprob"] for one in top}) for top in likeliest]


def _text_logprobs(choice: dict[str, Any]) -> list[TokenLogProbs]:
    logprobs = choice.get("logprobs") or {}
    tokens = zip(logprobs.get("tokens") or [], logprobs.get("token_logprobs") or [], strict=True)
    chosen = [{token: value} for token, value in tokens]
    likeliest = logprobs.get("top_logprobs") or chosen
    return [TokenLogProbs(logprobs_by_token=top or one) for top, one in zip(likeliest, chosen, strict=True)]


async def _chat_events(
    items: AsyncGenerator[bytes], wants_logprobs: bool
) -> AsyncGenerator[ChatCompletionResponseStreamChunk]:
    kinds = ChatCompletionResponseEventType
    stop_reason = StopReason.end_of_turn
    async with aclosing(items):
        yield _event(kinds.start, "")
        async for choice in _choices(items):
            text = choice["delta"].get("content")
            logprobs = (_chat_logprobs(choice) or None) if wants_logprobs else None
            if text or logprobs:
                yield _event(kinds.progress, text or "", logprobs=logprobs)
            if choice.get("finish_reason"):
                stop_reason = _stop_reason(choice["finish_reason"])
        yield _event(kinds.complete, "", stop_reason=stop_reason)


async def _text_chunks(
    items: AsyncGenerator[bytes], wants_logprobs: bool
) -> AsyncGenerator[CompletionResponseStreamChunk]:
    stop_reason = StopReason.end_of_turn
    async with aclosing(items):
        async for choice in _choices(items):
            logprobs = (_text_logprobs(choice) or None) if wants_logprobs else None
            if choice["text"] or logprobs:
                yield CompletionResponseStreamChunk(delta=choice["text"], logprobs=logprobs)
            if choice.get("finish_reason"):
                stop_reason = _stop_reason(choice["finish_reason"])
        yield CompletionResponseStreamChunk(delta="", stop_reason=stop_reason)


def _event(kind: ChatCompletionResponseEventType, text: str, **fields: Any) -> ChatCompletionResponseStreamChunk:
    return ChatCompletionResponseStreamChunk(event=ChatCompletionResponseEvent(event_type=kind, delta=text, **fields))


async def _choices(items: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The first choice of each of OpenAI's streamed chunks."""
    async for item in items:
        for event in item.decode().split("\n\n"):
            if not event:
                continue
            data = event.removeprefix("data: ")
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if chunk["choices"]:
                yield chunk["choices"][0]

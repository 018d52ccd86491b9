"""Chat and text completion, in the Llama Stack's terms, on engines that speak OpenAI's."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from stack import chats, safety
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
    ToolCallDelta,
    ToolCallParseStatus,
    ToolChoice,
    ToolDefinition,
)
from stack.api.messages import (
    CompletionMessage,
    Message,
    StopReason,
    SystemMessage,
    ToolCall,
    ToolResponseMessage,
    UserMessage,
    text_of,
)
from stack.attachments import openai_content, resolve_text
from stack.chats import Chat
from stack.context import Context
from stack.errors import BadInput, EngineFailed
from stack.prompt_formats import (
    BUILTIN,
    CallFailed,
    CallParsed,
    CallProgress,
    CallStarted,
    Piece,
    Text,
    ToolStyle,
    builtin_tool,
    typed_schema,
)

# Llama 3's <|eom_id|>, with which it ends a message that a tool has to answer before its turn is over.
END_OF_MESSAGE_TOKEN = 128_008


async def chat_completion(context: Context, request: ChatCompletionRequest) -> ChatCompletionResponse:
    """The model's answer to a conversation, whole.

    Raises NotFound for an unknown model, BadInput, ShieldViolation, TooManyRequests, Unavailable. A tool call that
    cannot be read stays in the message's content.
    """
    found = await ask_chat(context, request)
    return ChatCompletionResponse(completion_message=found.message, logprobs=found.logprobs)


@dataclass(frozen=True)
class Answer:
    """One answer of a model, with the tokens that were read for it and written, and what was asked for of these."""

    message: CompletionMessage
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[TokenLogProbs] | None = None


async def ask_chat(context: Context, request: ChatCompletionRequest) -> Answer:
    """The same as `chat_completion`, with the tokens."""
    chat = await _prepared(context, request)
    answer = json.loads(await chats.answer(context, chat))
    choice = answer["choices"][0]
    pieces = _pieces(chat, choice["message"]["content"] or "")
    message = CompletionMessage(
        content="".join(piece.text for piece in pieces if isinstance(piece, Text | CallFailed)),
        stop_reason=_stop_reason(choice),
        tool_calls=[_tool_call(piece) for piece in pieces if isinstance(piece, CallParsed)],
    )
    return _answer(message, answer["usage"], _chat_logprobs(choice) if request.logprobs else None)


async def ask_text(context: Context, request: CompletionRequest) -> Answer:
    """The same as `completion`, with the tokens."""
    body = completion_body(await _as_text(context, request))
    answer = json.loads(await safety.answer(context, "completions", body))
    choice = answer["choices"][0]
    message = CompletionMessage(content=choice["text"], stop_reason=_stop_reason(choice))
    return _answer(message, answer["usage"], _text_logprobs(choice) if request.logprobs else None)


async def answer_chat(context: Context, body: dict[str, Any]) -> Answer:
    """The answer to a chat in OpenAI's shape that offers no tools. Raises as `chat_completion` does."""
    chat = await chats.prepare(context, body)
    answer = json.loads(await chats.answer(context, chat))
    choice = answer["choices"][0]
    message = CompletionMessage(content=choice["message"]["content"] or "", stop_reason=_stop_reason(choice))
    return _answer(message, answer["usage"])


async def stream_chat_completion(
    context: Context, request: ChatCompletionRequest
) -> AsyncGenerator[ChatCompletionResponseStreamChunk]:
    """The model's answer as events: a start, progress with new text or tool calls, and one that completes it.

    The last one has the stop reason. Raises as `chat_completion` does before it returns; what fails later is raised by
    the iterator.
    """
    chat = await _prepared(context, request)
    items = await chats.stream(context, chat)
    return _chat_events(chat, items, wants_logprobs=request.logprobs is not None)


@dataclass(frozen=True)
class End:
    """The end of a streamed answer: why it is over, and the tokens that were read for it and written."""

    stop_reason: StopReason
    prompt_tokens: int
    completion_tokens: int


async def stream_pieces(
    context: Context, body: dict[str, Any], style: ToolStyle = "json"
) -> AsyncGenerator[Piece | End]:
    """The answer to a chat in OpenAI's shape as its texts and calls, and then its end.

    Raises as `chat_completion` does before it returns; what fails later is raised by the iterator.
    """
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    chat = await chats.prepare(context, streamed, style)
    return _pieces_as_they_come(chat, await chats.stream(context, chat))


async def completion(context: Context, request: CompletionRequest) -> CompletionResponse:
    """The continuation of a text, whole. Raises as `chat_completion` does."""
    found = await ask_text(context, request)
    return CompletionResponse(completion_message=found.message, logprobs=found.logprobs)


async def stream_completion(
    context: Context, request: CompletionRequest
) -> AsyncGenerator[CompletionResponseStreamChunk]:
    """The continuation of a text in chunks, of which the last one has the stop reason."""
    body = completion_body(await _as_text(context, request))
    items = await safety.stream(context, "completions", body)
    return _text_chunks(items, wants_logprobs=request.logprobs is not None)


def chat_body(request: ChatCompletionRequest) -> dict[str, Any]:
    """The request in OpenAI's shape."""
    body = dict(sampling_body(request.sampling_params), model=request.model, stream=request.stream)
    body["messages"] = [openai_message(message) for message in request.messages]
    if request.tools or request.tool_choice == ToolChoice.required:
        body |= dict(tools=[openai_tool(tool) for tool in request.tools], tool_choice=request.tool_choice.value)
        # The specification's models write one call in a turn.
        body["parallel_tool_calls"] = request.tool_choice != ToolChoice.required
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
    content = openai_content(message.content)
    match message:
        case UserMessage():
            return dict(role="user", content=openai_content(message.content, message.context))
        case SystemMessage():
            return dict(role="system", content=content)
        case ToolResponseMessage():
            return dict(role="tool", tool_call_id=message.call_id, name=str(message.tool_name), content=content)
        case CompletionMessage():
            answer: dict[str, Any] = dict(role="assistant", content=content)
            if message.tool_calls:
                answer["tool_calls"] = [_openai_call(call) for call in message.tool_calls]
            return answer


def openai_tool(tool: ToolDefinition) -> dict[str, Any]:
    """A tool in OpenAI's shape. A built-in one need not be described."""
    known = builtin_tool(tool.tool_name) if tool.tool_name in BUILTIN and not tool.parameters else None
    return dict(
        type="function",
        function=dict(
            name=str(tool.tool_name),
            description=tool.description or (known.description if known else None),
            parameters=known.parameters if known else typed_schema(tool.parameters or {}),
        ),
    )


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


async def _as_text(context: Context, request: CompletionRequest) -> CompletionRequest:
    """The request with its attachments in place, as text."""
    if isinstance(request.content, str):
        return request
    # Nothing is fetched for what is refused anyway.
    await context.models.find(request.model)
    sampling_body(request.sampling_params)
    return request.model_copy(update={"content": await resolve_text(request.content)})


async def _prepared(context: Context, request: ChatCompletionRequest) -> Chat:
    return await chats.prepare(context, chat_body(request), request.tool_prompt_format.value)


def _answer(message: CompletionMessage, usage: dict[str, Any], logprobs: list[TokenLogProbs] | None = None) -> Answer:
    return Answer(message, usage["prompt_tokens"], usage["completion_tokens"], logprobs)


def _openai_call(call: ToolCall) -> dict[str, Any]:
    function = dict(name=str(call.tool_name), arguments=json.dumps(call.arguments, ensure_ascii=False))
    return dict(id=call.call_id, type="function", function=function)


def _pieces(chat: Chat, text: str) -> list[Piece]:
    """An answer's texts and calls."""
    if chat.use is None:
        return [Text(text)]
    parser = chat.parser()
    return [*parser.feed(text), *parser.close()]


def _tool_call(piece: CallParsed) -> ToolCall:
    return ToolCall(call_id=piece.id, tool_name=piece.name, arguments=piece.arguments)


def _stop_reason(choice: dict[str, Any]) -> StopReason:
    reason = choice["finish_reason"]
    if reason == "length":
        return StopReason.out_of_tokens
    if reason != "stop":  # abort, error: what is there is not the whole answer
        raise EngineFailed(f"the model ended its answer by {reason!r}")
    # Which of the stop tokens it was is vLLM's addition to OpenAI's shape.
    return StopReason.end_of_message if choice.get("stop_reason") == END_OF_MESSAGE_TOKEN else StopReason.end_of_turn


def _chat_logprobs(choice: dict[str, Any]) -> list[TokenLogProbs]:
    positions = (choice.get("logprobs") or {}).get("content") or []
    return [
        _likeliest([(one["token"], one["logprob"]) for one in (position, *position["top_logprobs"])])
        for position in positions
    ]


def _text_logprobs(choice: dict[str, Any]) -> list[TokenLogProbs]:
    logprobs = choice.get("logprobs") or {}
    chosen = list(zip(logprobs.get("tokens") or [], logprobs.get("token_logprobs") or [], strict=True))
    tops = logprobs.get("top_logprobs") or [None] * len(chosen)
    return [_likeliest([one, *(top or {}).items()]) for one, top in zip(chosen, tops, strict=True)]


def _likeliest(tokens: list[tuple[str, float]]) -> TokenLogProbs:
    """Of tokens with the same text, such as parts of one character, the likeliest counts."""
    by_token: dict[str, float] = {}
    for token, logprob in tokens:
        by_token[token] = max(logprob, by_token.get(token, logprob))
    return TokenLogProbs(logprobs_by_token=by_token)


async def _chat_events(
    chat: Chat, items: AsyncGenerator[bytes], wants_logprobs: bool
) -> AsyncGenerator[ChatCompletionResponseStreamChunk]:
    kinds = ChatCompletionResponseEventType
    stop_reason = StopReason.end_of_turn
    parser = chat.parser() if chat.use is not None else None
    async with aclosing(items):
        yield _event(kinds.start, "")
        async for choice in _choices(items):
            text = choice["delta"].get("content") or ""
            logprobs = (_chat_logprobs(choice) or None) if wants_logprobs else None
            deltas = [text] if parser is None else [_delta(piece) for piece in parser.feed(text)]
            # What is known of the tokens stands with the first of what they brought.
            for delta in deltas or [""]:
                if delta or logprobs:
                    yield _event(kinds.progress, delta, logprobs=logprobs)
                logprobs = None
            if choice.get("finish_reason"):
                stop_reason = _stop_reason(choice)
        for piece in parser.close() if parser is not None else ():
            yield _event(kinds.progress, _delta(piece))
        yield _event(kinds.complete, "", stop_reason=stop_reason)


async def _pieces_as_they_come(chat: Chat, items: AsyncGenerator[bytes]) -> AsyncGenerator[Piece | End]:
    stop_reason = StopReason.end_of_turn
    usage: dict[str, Any] = {}
    parser = chat.parser() if chat.use is not None else None
    async with aclosing(items):
        async for chunk in _chunks(items):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"][:1]:
                text = choice["delta"].get("content") or ""
                for piece in parser.feed(text) if parser is not None else [Text(text)] if text else []:
                    yield piece
                if choice.get("finish_reason"):
                    stop_reason = _stop_reason(choice)
        for piece in parser.close() if parser is not None else ():
            yield piece
        yield End(stop_reason, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def _delta(piece: Piece) -> str | ToolCallDelta:
    status = ToolCallParseStatus
    match piece:
        case Text(text):
            return text
        case CallStarted():
            return ToolCallDelta(content="", parse_status=status.started)
        case CallProgress(_, text):
            return ToolCallDelta(content=text, parse_status=status.in_progress)
        case CallParsed():
            return ToolCallDelta(content=_tool_call(piece), parse_status=status.success)
        case CallFailed(_, text):
            return ToolCallDelta(content=text, parse_status=status.failure)


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
                stop_reason = _stop_reason(choice)
        yield CompletionResponseStreamChunk(delta="", stop_reason=stop_reason)


def _event(
    kind: ChatCompletionResponseEventType, delta: str | ToolCallDelta, **fields: Any
) -> ChatCompletionResponseStreamChunk:
    return ChatCompletionResponseStreamChunk(event=ChatCompletionResponseEvent(event_type=kind, delta=delta, **fields))


async def _choices(items: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The first choice of each of OpenAI's streamed chunks."""
    async for chunk in _chunks(items):
        if chunk["choices"]:
            yield chunk["choices"][0]


async def _chunks(items: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """OpenAI's streamed chunks."""
    async for item in items:
        for event in item.decode().split("\n\n"):
            if not event:
                continue
            data = event.removeprefix("data: ")
            if data == "[DONE]":
                return
            yield json.loads(data)

"""Chat completions in OpenAI's shapes: an engine's answer passes through, unless there are tool calls to be found."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stack import chats
from stack.chats import Chat
from stack.context import Context
from stack.prompt_formats import AnswerParser, CallFailed, CallParsed, Piece, Text

_DONE = b"data: [DONE]\n\n"


async def answer(context: Context, body: dict[str, Any]) -> bytes:
    """The JSON of a chat completion. Raises NotFound for an unknown model, BadInput, TooManyRequests, Unavailable."""
    chat = await chats.prepare(context, body)
    given = await chats.answer(context, chat)
    if chat.use is None:
        return given
    completion = json.loads(given)
    for choice in completion["choices"]:
        _find_calls(chat, choice)
    return json.dumps(completion).encode()


async def stream(context: Context, body: dict[str, Any]) -> AsyncGenerator[bytes]:
    """The server-sent events of a chat completion. Raises as `answer` does before it returns."""
    chat = await chats.prepare(context, body)
    given = await chats.stream(context, chat)
    return given if chat.use is None else _with_calls(chat, given)


def _find_calls(chat: Chat, choice: dict[str, Any]) -> None:
    parser = chat.parser()
    pieces = [*parser.feed(choice["message"].get("content") or ""), *parser.close()]
    text = "".join(piece.text for piece in pieces if isinstance(piece, Text | CallFailed))
    calls = [_call(piece) for piece in pieces if isinstance(piece, CallParsed)]
    choice["message"] |= {"content": text or (None if calls else ""), "tool_calls": calls}
    if not calls:
        del choice["message"]["tool_calls"]
    elif choice["finish_reason"] == "stop":
        choice["finish_reason"] = "tool_calls"


async def _with_calls(chat: Chat, given: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    choices: dict[int, _StreamedChoice] = {}
    async with aclosing(given):
        async for item in given:
            events = [_rewritten(chat, choices, event) for event in item.split(b"\n\n") if event]
            if ready := b"".join(events):
                yield ready


def _rewritten(chat: Chat, choices: dict[int, "_StreamedChoice"], event: bytes) -> bytes:
    """An event of the engine with calls in the place of the text that they are written in."""
    if event + b"\n\n" == _DONE:
        return _DONE
    chunk = json.loads(event.removeprefix(b"data: "))
    for choice in chunk["choices"]:
        known = choices.setdefault(choice["index"], _StreamedChoice(chat.parser()))
        known.rewrite(choice)
    said = [choice for choice in chunk["choices"] if _says_something(choice)]
    if chunk["choices"] and not said:
        return b""
    return b"data: " + json.dumps(chunk | {"choices": said}).encode() + b"\n\n"


def _says_something(choice: dict[str, Any]) -> bool:
    """Whether a chunk is worth sending: while a call is read, there is nothing to say."""
    return bool(choice["delta"] or choice.get("finish_reason") or choice.get("logprobs"))


class _StreamedChoice:
    """One of the answers of a stream: what its parser has found so far."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._calls = 0

    def rewrite(self, choice: dict[str, Any]) -> None:
        """Puts what was found by now into the chunk's delta. A call comes as a whole, once it is known to be one."""
        delta = choice["delta"]
        pieces = self._parser.feed(delta.pop("content", None) or "")
        if choice.get("finish_reason"):
            pieces += self._parser.close()
        self._put(delta, pieces)
        if choice.get("finish_reason") == "stop" and self._calls:
            choice["finish_reason"] = "tool_calls"

    def _put(self, delta: dict[str, Any], pieces: list[Piece]) -> None:
        text = "".join(piece.text for piece in pieces if isinstance(piece, Text | CallFailed))
        if text or delta.get("role"):
            delta["content"] = text
        calls = [_call(piece) for piece in pieces if isinstance(piece, CallParsed)]
        if calls:
            delta["tool_calls"] = [{"index": self._calls + at, **call} for at, call in enumerate(calls)]
            self._calls += len(calls)


def _call(piece: CallParsed) -> dict[str, Any]:
    function = {"name": piece.name, "arguments": json.dumps(piece.arguments, ensure_ascii=False)}
    return {"id": piece.id, "type": "function", "function": function}

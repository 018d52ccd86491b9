"""What all formats need to know of messages in OpenAI's shape."""

import json
from dataclasses import dataclass
from typing import Any

from stack.errors import BadInput

Message = dict[str, Any]


@dataclass(frozen=True)
class EarlierCall:
    """A call that the model made earlier in the conversation."""

    id: str | None
    name: str
    arguments: dict[str, Any]


def text_of(message: Message) -> str:
    """The text of a message. A list of parts is one text, put together without anything between. Raises BadInput."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_text_of_part(part) for part in content)


def _text_of_part(part: dict[str, Any]) -> str:
    if part.get("type") != "text":
        raise BadInput(
            f"content of type {part.get('type')!r} cannot be used with this model; allowed: text", param="messages"
        )
    text: str = part["text"]
    return text


def earlier_calls(message: Message) -> list[EarlierCall]:
    """The calls of an assistant's message. Raises BadInput where the arguments are not a JSON object."""
    return [_earlier(call) for call in message.get("tool_calls") or ()]


def _earlier(call: dict[str, Any]) -> EarlierCall:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadInput("a tool call of an earlier message has no function with a name", param="messages")
    written = function.get("arguments") or "{}"
    try:
        arguments = json.loads(written) if isinstance(written, str) else written
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no half of a character
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise BadInput(
            f"the arguments of the call of {function['name']!r} are not a JSON object: {str(written)[:80]!r}",
            param="messages",
        )
    return EarlierCall(call.get("id"), function["name"], arguments)


def json_text(value: Any) -> str:
    """JSON as models see it: one line, letters of all languages as they are."""
    return json.dumps(value, ensure_ascii=False)

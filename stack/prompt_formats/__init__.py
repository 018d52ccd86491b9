"""Chats with tools in the words of a model family, and a model's words back into calls of tools.

tools.py      what a request says of tools: definitions, built-in tools, whether one must be called
messages.py   what all formats need to know of messages in OpenAI's shape
llama3.py     prompts of Llama 3.1 and 3.2
hermes.py     models whose chat template knows tools (Hermes, Qwen)
plain.py      models whose chat template knows none
templates.py  messages for a chat template, where nobody asks
forced.py     the JSON schema of calls that must be made
answers.py    an answer's text and calls as they come, cut anywhere
frames.py     where a call begins and ends
calls.py      the words of a call, read
arguments.py  a call's arguments as its tool's schema has them
pieces.py     what an answer comes apart into
"""

from datetime import UTC, date, datetime
from typing import Any

from stack.prompt_formats.answers import AnswerParser, split_answer
from stack.prompt_formats.hermes import hermes_body
from stack.prompt_formats.llama3 import llama3_body
from stack.prompt_formats.pieces import CallFailed, CallParsed, CallProgress, CallStarted, Piece, Text
from stack.prompt_formats.plain import plain_body
from stack.prompt_formats.templates import template_messages
from stack.prompt_formats.tools import BUILTIN, PromptFormat, Tool, ToolStyle, ToolUse, builtin_tool, typed_schema

__all__ = [
    "BUILTIN",
    "AnswerParser",
    "CallFailed",
    "CallParsed",
    "CallProgress",
    "CallStarted",
    "Piece",
    "PromptFormat",
    "Text",
    "Tool",
    "ToolStyle",
    "ToolUse",
    "builtin_tool",
    "chat_body",
    "split_answer",
    "template_messages",
    "typed_schema",
]


def chat_body(
    format: PromptFormat, messages: list[dict[str, Any]], use: ToolUse, *, today: date | None = None
) -> dict[str, Any]:
    """The fields of the engine's body that say what was said and which tools there are.

    `messages` are OpenAI's, and stay as they are. Llama 3 is told the date: today's in UTC, unless it is given. Raises
    BadInput for messages that the format cannot say and for a choice of tools that none can meet.
    """
    match format:
        case "llama3":
            return llama3_body(messages, use, today or datetime.now(UTC).date())
        case "hermes":
            return hermes_body(messages, use)
        case "plain":
            return plain_body(messages, use)

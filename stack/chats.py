"""Chats in OpenAI's terms, which both doors turn theirs into: tools, earlier calls and attachments, made ready for an
engine that knows none of them.

The engine gets plain messages in the words of its model's family (stack/prompt_formats.py), and a constraint where a
tool must be called. What it answers is read by an AnswerParser.
"""

import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stack import attachments, safety
from stack.context import Context
from stack.errors import BadInput
from stack.prompt_formats import AnswerParser, PromptFormat, Tool, ToolStyle, ToolUse, chat_body

_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_CONSTRAINTS = ("response_format", "structured_outputs")


@dataclass(frozen=True)
class Chat:
    """What an engine is asked. Where `use` is None, its answer is text alone and can be passed on as it is.

    `asked` are the messages as they were sent, with all attachments in place: what shields judge.
    """

    body: dict[str, Any]
    asked: list[dict[str, Any]]
    prompt_format: PromptFormat = "plain"
    use: ToolUse | None = None

    def parser(self) -> AnswerParser:
        """Of one answer (choice)."""
        assert self.use is not None
        return AnswerParser(self.prompt_format, self.use, new_call_id)


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


async def prepare(context: Context, body: dict[str, Any], style: ToolStyle = "json") -> Chat:
    """A chat in OpenAI's shape, with all that it allows, as an engine is asked.

    `style` is how models without a way of their own are told to write calls. Raises NotFound for an unknown model and
    BadInput for what cannot be had together.
    """
    if not any(key in body for key in _OF_TOOLS) and all(_is_text_alone(one) for one in body["messages"]):
        return Chat(body, body["messages"])
    messages = await attachments.resolve(context, body["model"], body["messages"])
    use = _use(body, style)
    rest = {key: value for key, value in body.items() if key not in _OF_TOOLS} | {"messages": messages}
    if not use.callable and not any(_is_of_tools(message) for message in messages):
        return Chat(rest, messages)
    if use.callable and (constraint := next((one for one in _CONSTRAINTS if rest.get(one)), None)):
        raise BadInput(
            f"{constraint} and tools cannot both shape an answer; leave one out, or set tool_choice to 'none'",
            param=constraint,
        )
    prompt_format = (await context.models.find(body["model"])).base.prompt_format
    return Chat(rest | chat_body(prompt_format, messages, use), messages, prompt_format, use)


async def answer(context: Context, chat: Chat) -> bytes:
    """The engine's answer, whole: JSON in OpenAI's shape. Raises as stack.safety.answer does."""
    with _tools_named(chat):
        return await safety.answer(context, "chat", chat.body, chat.asked)


async def stream(context: Context, chat: Chat) -> AsyncGenerator[bytes]:
    """The engine's answer as server-sent events. Raises as stack.safety.stream does."""
    with _tools_named(chat):
        return await safety.stream(context, "chat", chat.body, chat.asked)


@contextmanager
def _tools_named(chat: Chat) -> Iterator[None]:
    """A constraint that nobody wrote but this module is refused by the name of what it was made of: the tools."""
    try:
        yield
    except BadInput as error:
        if error.param == "structured_outputs" and chat.use is not None and chat.use.is_forced:
            raise BadInput(f"the tools' parameters: {error.message}", param="tools") from error
        raise


def _is_text_alone(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("content"), str) and not _is_of_tools(message)


def _is_of_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _use(body: Mapping[str, Any], style: ToolStyle) -> ToolUse:
    """What a request says of tools."""
    tools = tuple(_tool(one["function"]) for one in body.get("tools") or ())
    choice = body.get("tool_choice") or ("auto" if tools else "none")
    name = choice if isinstance(choice, str) else choice["function"]["name"]
    parallel = body.get("parallel_tool_calls")
    return ToolUse(tools, name, style, parallel is None or parallel)


def _tool(function: Mapping[str, Any]) -> Tool:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(function["name"], function.get("description"), parameters)

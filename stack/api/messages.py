"""Messages, their content, and tool calls: what chats, agents and data sets are made of."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from stack.api.wire import Wire, at_most

MAX_CHARACTERS = 1_000_000
MAX_PARTS = 100

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
# A list is one text in parts: they are put together without anything between them.
Content = Text | Annotated[list[Text], at_most(MAX_PARTS)]


def text_of(content: str | list[str]) -> str:
    return content if isinstance(content, str) else "".join(content)


class StopReason(StrEnum):
    end_of_turn = "end_of_turn"
    end_of_message = "end_of_message"
    out_of_tokens = "out_of_tokens"


class BuiltinTool(StrEnum):
    brave_search = "brave_search"
    wolfram_alpha = "wolfram_alpha"
    photogen = "photogen"
    code_interpreter = "code_interpreter"


ToolName = BuiltinTool | Annotated[str, Field(min_length=1, max_length=200)]


class ToolCall(Wire):
    call_id: Annotated[str, Field(max_length=200)]
    tool_name: ToolName
    arguments: Annotated[dict[str, Any], at_most(100)]


class UserMessage(Wire):
    """What a person says; `context` is retrieved text that is put after it, behind an empty line."""

    role: Literal["user"] = "user"
    content: Content
    context: Content | None = None


class SystemMessage(Wire):
    role: Literal["system"] = "system"
    content: Content


class ToolResponseMessage(Wire):
    role: Literal["ipython"] = "ipython"
    call_id: Annotated[str, Field(max_length=200)]
    tool_name: ToolName
    content: Content


class CompletionMessage(Wire):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: Content
    stop_reason: StopReason = StopReason.end_of_turn
    tool_calls: Annotated[list[ToolCall], at_most(100)] = []


Message = Annotated[UserMessage | SystemMessage | ToolResponseMessage | CompletionMessage, Field(discriminator="role")]

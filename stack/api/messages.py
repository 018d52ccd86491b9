"""Messages, their content, and tool calls: what chats, agents and data sets are made of."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from stack.api.wire import Wire, at_most
from stack.errors import BadInput

MAX_CHARACTERS = 1_000_000
MAX_PARTS = 100
# Of an attachment's content, which may be an image as a data: address.
MAX_ATTACHMENT_CHARACTERS = 16_000_000

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]


def _without_wrapper(value: Any) -> Any:
    """An address as older clients send it, which is an object with the key `uri`, as the text that it is."""
    return value["uri"] if isinstance(value, dict) and value.keys() == {"uri"} else value


class Attachment(Wire):
    """A text or an image that comes with a message: by value, as a data: address, or at an https address.

    A text without blanks that begins with data: or https:// is an address. A list is one text in parts.
    """

    content: Annotated[
        Annotated[str, Field(max_length=MAX_ATTACHMENT_CHARACTERS)] | Annotated[list[Text], at_most(MAX_PARTS)],
        BeforeValidator(_without_wrapper),
    ]
    mime_type: Annotated[str, Field(min_length=3, max_length=200)]


def _kind(value: Any) -> str | None:
    """The tag of a content or of a part of one; brackets keep it out of the place that an error names."""
    if isinstance(value, str):
        return "(text)"
    if isinstance(value, dict | Attachment):
        return "(attachment)"
    return "(parts)" if isinstance(value, list) else None


def _part_kind(value: Any) -> str | None:
    kind = _kind(value)
    return None if kind == "(parts)" else kind


Part = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[Attachment, Tag("(attachment)")],
    Discriminator(_part_kind, "part", "should be a text or an attachment"),
]
# The texts of a list are put together without anything between them.
Content = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[Attachment, Tag("(attachment)")]
    | Annotated[Annotated[list[Part], at_most(MAX_PARTS)], Tag("(parts)")],
    Discriminator(_kind, "content", "should be a text, an attachment, or a list of these"),
]


def text_of(content: str | Attachment | list[str | Attachment]) -> str:
    """A content that is text. Raises BadInput for one with attachments, where only text can be used."""
    parts = content if isinstance(content, list) else [content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise BadInput("an attachment cannot be used here; allowed: text", param="content")
    return "".join(texts)


class StopReason(StrEnum):
    end_of_turn = "end_of_turn"
    end_of_message = "end_of_message"
    out_of_tokens = "out_of_tokens"


class BuiltinTool(StrEnum):
    brave_search = "brave_search"
    wolfram_alpha = "wolfram_alpha"
    photogen = "photogen"
    code_interpreter = "code_interpreter"


ToolName = BuiltinTool | Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_.:-]+$")]


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

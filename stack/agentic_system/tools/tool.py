"""What a tool is to the loop that calls it.

A tool is made for one turn, from its definition in the agent's config, and closed at the turn's end. It is called with
arguments that fit its definition's schema, may be called several times side by side, and may be cancelled at any await:
by the time limit of calls, by the turn's end, or because the turn is cancelled.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from stack.api.messages import Attachment
from stack.prompt_formats import Tool as Definition

# Of an output, about 5,000 tokens. A tool cuts what is longer, where it knows best what to leave out (see `cut`); the
# loop cuts the rest off.
MAX_CHARACTERS = 20_000
CUT = "\n[… {} characters are left out …]\n"


class ToolFailed(Exception):
    """A call that has failed. `message` is what the model is told of it: no secret, no path of this machine."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True)
class File:
    """An attachment of the turn, as a file that a tool can read. `name` is safe as a file name, and one of a kind."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Output:
    """What a call gives: what the model is told, and files, which become output_attachments of the turn."""

    content: str
    attachments: tuple[Attachment, ...] = ()


@dataclass(frozen=True)
class Call:
    """A call to run.

    `arguments` fit the schema of the tool. `keys` are secrets by name, of the config and of the request's provider
    data: never stored, never logged. `tell` takes new text of the output as it comes, for whoever watches; what the
    model is told is the output alone.
    """

    call_id: str
    arguments: dict[str, Any]
    keys: Mapping[str, str] = field(repr=False)
    tell: Callable[[str], None]


class Tool(Protocol):
    """One tool of one turn."""

    @property
    def name(self) -> str:
        """As the model calls it: its definition's."""
        ...

    @property
    def is_idempotent(self) -> bool:
        """Whether a call that may have happened already can be run again."""
        ...

    @property
    def turn(self) -> asyncio.Lock | None:
        """Held by each of its calls, where only one can be run at a time: waiting for it is none of a call's time."""
        ...

    def definition(self) -> Definition:
        """What the model is told of it: for built-in ones stack.prompt_formats.builtin_tool(name)."""
        ...

    async def run(self, call: Call) -> Output:
        """Raises ToolFailed. Being cancelled, it ends all that it has begun before it returns."""
        ...

    async def close(self) -> None:
        """Ends what it keeps between calls, at the end of the turn. It is not called again."""
        ...


class Stateless:
    """What a tool is that keeps nothing between calls: they run side by side, and nothing is left at the end."""

    turn = None

    async def close(self) -> None:
        """There is nothing to end."""


def cut(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text, or its beginning and end where it is longer than so many characters, and how many are left out."""
    if len(text) <= limit:
        return text
    room = limit - len(CUT.format(len(text)))
    head = room * 2 // 3
    tail = room - head
    return text[:head] + CUT.format(len(text) - room) + text[len(text) - tail :]

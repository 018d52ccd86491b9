"""What an answer comes apart into."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """Ordinary content."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A call begins. Calls are counted from 0."""

    index: int


@dataclass(frozen=True)
class CallProgress:
    """Characters of a call as the model writes them."""

    index: int
    text: str


@dataclass(frozen=True)
class CallParsed:
    """A call is complete: its tool is there and its arguments are what the tool's schema asks for."""

    index: int
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CallFailed:
    """A call that cannot be made: all that the model wrote of it."""

    index: int
    text: str


Piece = Text | CallStarted | CallProgress | CallParsed | CallFailed

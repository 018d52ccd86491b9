"""Where turns are run: what the API asks of it, whether that is in this process or in actors of Ray.

All of it goes by rows. A turn that is told here is in its row already, and what is told of it is read from there: that
something was told twice, or not at all because a process has died, changes nothing of what becomes of the turn.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from stack.context import Context
from stack.store.turns import Turn


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a turn. `id` is its place: a stream can be resumed behind it.

    `data` is an AgenticSystemTurnResponseStreamChunk as JSON, made once for all that read it.
    """

    id: str
    data: str


class Sessions(Protocol):
    """The running sessions. The `keys` are secrets for tools, by name: they are never stored and never logged."""

    async def start(self, context: Context, turn: Turn, keys: Mapping[str, str]) -> None:
        """Has a turn run that was accepted (queued), after those before it in its session. Raises Unavailable."""
        ...

    def events(self, context: Context, turn_id: str, after: str | None = None) -> AsyncGenerator[Event]:
        """The events of a turn behind the one with the id `after`, those that have been and those that come.

        They end with the turn, or where it awaits approval. The iterator raises StackError for a turn that fails or is
        cancelled, and BadInput for an `after` that is no id of its events.
        """
        ...

    async def cancel(self, context: Context, turn_id: str) -> None:
        """Stops a turn whose row says that it is to end, if it is run somewhere."""
        ...

    async def go_on(self, context: Context, turn_id: str, keys: Mapping[str, str]) -> None:
        """Has a turn run on whose calls the client has decided about. Raises Unavailable."""
        ...

    async def end(self, context: Context, session_id: str) -> None:
        """Stops all of a session that was deleted."""
        ...

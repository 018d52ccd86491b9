"""The turns of a session before the one that is run, as the model is told of them: read once, then kept."""

import asyncio
from collections.abc import Iterable

from stack.agentic_system import prompt
from stack.agentic_system.prompt import Message
from stack.context import Context
from stack.store.turns import Before, Step, Turn

# How many turns before one are read: the model's context has room for few of them.
MAX_TURNS = 50


class History:
    """The turns of one session, each as messages; `add` keeps it up to date without a look at the database."""

    def __init__(self) -> None:
        self._turns: list[list[Message]] = []
        self._last: int | None = None  # the number of the turn that they end with

    async def before(self, context: Context, turn: Turn, model: str) -> list[list[Message]]:
        """The turns before one that are complete, or were broken off when they had begun to run tools, oldest first: as
        many as the model's context has room for."""
        if self._last != turn.number - 1:
            rows = await asyncio.to_thread(context.store.turns.ended_before, turn, MAX_TURNS)
            self._turns = [_told(row) for row in rows]
        left = (await context.models.find(model)).base.context
        for at in range(len(self._turns) - 1, -1, -1):
            left -= prompt.tokens_of(self._turns[at])
            if left < 0:
                del self._turns[: at + 1]
                break
        self._last = turn.number - 1
        return self._turns

    def add(self, turn: Turn, steps: Iterable[Step]) -> None:
        """A turn is complete, whose `before` was asked for."""
        self._turns.append(_told(Before(turn.request["messages"], list(steps), turn.output_message, {})))
        self._last = turn.number


def _told(turn: Before) -> list[Message]:
    details = [step.details for step in turn.steps if step.details is not None]
    if turn.output_message is not None:
        return prompt.of_turn(turn.messages, details, turn.output_message)
    return prompt.of_broken_turn(turn.messages, details, turn.outcomes)

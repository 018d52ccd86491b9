"""Calls of Ray's actors, as those of Ray Serve are: awaited, cancelled, and with the errors of the stack."""

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from stack.errors import StackError

# Of all actors of agents.
NAMESPACE = "agents"
# An actor that nobody has called for so long is not needed: who would call it has died, or has another config.
ABANDONED_S = 600.0


class Call:
    """A call of an actor that is under way: it can be awaited, which raises the StackError of the actor and RayError,
    and cancelled."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()

    def cancel(self) -> None:
        """What the actor does for it is cancelled there."""
        ray.cancel(self._reference)

    async def _answer(self) -> Any:
        try:
            return await self._reference
        except RayTaskError as error:
            if isinstance(error.cause, StackError):
                raise error.cause from error
            raise


async def answer_of(reference: Any) -> Any:
    """What a call gives. It is cancelled with the wait."""
    call = Call(reference)
    try:
        return await call
    except asyncio.CancelledError:
        call.cancel()
        raise


class Calls:
    """The calls that an actor has under way. Without any, it ends once it is ABANDONED_S since the last one.

    Its method `leave` is called then.
    """

    def __init__(self) -> None:
        self.count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0

    @contextmanager
    def one(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(ABANDONED_S, self._look)
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            self._last = loop.time()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        left = ABANDONED_S - (loop.time() - self._last)
        if not self.count and left <= 0:
            ray.get_runtime_context().current_actor.leave.remote()
        self._timer = loop.call_later(max(left, ABANDONED_S / 10), self._look)

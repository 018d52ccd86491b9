"""Does for several at once what each of them waits for: one look-up, one write."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from stack.errors import StackError

T = TypeVar("T")
R = TypeVar("R")


class Together(Generic[T, R]):
    """What comes while `do` is at others waits, and is done next, all together, but for more than `most`.

    `do` gives what comes of each, in their order; a StackError among it is raised to who waits for that one, and
    whatever it raises to all of them. So nobody waits for company, and the slower it is, the more is done at once.
    """

    def __init__(self, do: Callable[[list[T]], Awaitable[Sequence[R | StackError]]], most: int) -> None:
        self._do = do
        self._most = most
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._turn = asyncio.Lock()

    async def one(self, item: T) -> R:
        """What comes of an item."""
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        async with self._turn:
            if not done.done():  # it is among the first that wait, as turns are taken in the order of asking
                await self._next()
        return done.result()

    async def _next(self) -> None:
        taken, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        (found,) = await asyncio.gather(self._do([item for item, _ in taken]), return_exceptions=True)
        outcomes = [found] * len(taken) if isinstance(found, BaseException) else found
        for (_, done), one in zip(taken, outcomes, strict=True):
            if isinstance(one, BaseException):
                done.set_exception(one)
            else:
                done.set_result(one)

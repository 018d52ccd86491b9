"""The actors that a pool (serve_apps/actor_pool.py) gives to sessions: what it asks of them, and whether they hang."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayError

from serve_apps.actor_calls import Call
from stack.errors import StackError

# How often an actor that has a session is asked whether it is there, how long it may take to say so, and how often in
# succession it may not. One that does not is killed, as the bounds of its turn are watched by what hangs in it.
LOOK_S = 10.0
ANSWER_S = 5.0
MISSES = 3

Keys = Mapping[str, str]


@dataclass(frozen=True)
class Member:
    """An actor that has started. One of another config than the pool's is not given to any other session."""

    name: str
    handle: Any
    is_current: bool = True


class Silent(Exception):
    """An actor that does not answer any more."""


class Actors(Protocol):
    """What actors are started by, and found."""

    async def most_at_once(self) -> int:
        """How many may be started at the same time."""
        ...

    async def launch(self, name: str) -> Any:
        """Starts one, and returns its handle once a turn can be run at once. Raises RayError and StackError."""
        ...

    async def running(self) -> list[tuple[str, Any]]:
        """The names and handles of those that there are already."""
        ...

    async def kill(self, handle: Any) -> None:
        """Ends one at once, whatever it does, if it is there at all."""
        ...


async def until_free(member: Member) -> None:
    """Returns when an actor's session has nothing to be run. Raises RayError, and Silent if it hangs."""
    lasting = asyncio.ensure_future(Call(member.handle.lasts.remote()))
    misses = 0
    try:
        while not lasting.done():
            await asyncio.wait([lasting], timeout=LOOK_S)
            if not lasting.done():
                misses = 0 if await _answers(member) else misses + 1
                if misses == MISSES:
                    raise Silent(f"it has not answered {MISSES} times, each within {ANSWER_S:g} s")
        lasting.result()
    finally:
        lasting.cancel()


async def _answers(member: Member) -> bool:
    """Whether an actor is there and does not hang. That one has died, `lasts` says."""
    try:
        async with asyncio.timeout(ANSWER_S):
            await Call(member.handle.seat.remote())
    except TimeoutError:
        return False
    except (RayError, StackError):
        return True
    return True

"""Sessions that are run by Ray's actors, as the gateway has them."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve_apps.actor_calls import Call, answer_of
from serve_apps.pool_members import Member
from stack.agentic_system.events import event, started
from stack.agentic_system.replay import found, retold
from stack.agentic_system.sessions import Event
from stack.api.agentic_system import TurnState
from stack.channel import Receiver
from stack.context import Context
from stack.errors import BadInput, NotFound, StackError, Unavailable
from stack.serve_engine import while_it_lasts
from stack.store.turns import Turn

# How long the pool may take to answer: it may have died, or be updated, and on a busy node its next replica takes a
# minute to start.
POOL_S = 120.0
AGAIN_S = 0.25
# How long those who read a turn's events wait for an actor that runs it.
FIND_S = 300.0
# For so long after a turn was started, it is known here where: who starts it asks for its events at once.
KEPT_S = 10.0


@dataclass(frozen=True)
class _Started:
    session_id: str
    member: Member | None


class RaySessions:
    """Implements stack.agentic_system.sessions.Sessions. `pool` is the handle of serve_apps/session_pool.py."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._receiver = Receiver(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        # Turns that were started just now and whose events nobody has asked for yet.
        self._started: dict[str, _Started] = {}

    async def start(self, context: Context, turn: Turn, keys: Mapping[str, str]) -> None:
        """Has a turn run that was accepted. Raises TooManyRequests where too many sessions wait, and Unavailable."""
        member = await self._start(context, turn, keys)
        self._started[turn.id] = _Started(turn.session_id, member)
        asyncio.get_running_loop().call_later(KEPT_S, self._started.pop, turn.id, None)

    async def _start(self, context: Context, turn: Turn, keys: Mapping[str, str]) -> Member | None:
        member: Member | None = await self._ask(
            "start", context.tenant, turn.session_id, turn.id, dict(keys), within=POOL_S
        )
        return member

    def events(self, context: Context, turn_id: str, after: str | None = None) -> AsyncGenerator[Event]:
        """The events of a turn behind the one with the id `after`. The iterator raises NotFound.

        Where the actor dies, they go on with those of the next one.
        """
        return self._events(context, turn_id, after, self._started.pop(turn_id, None))

    async def _events(
        self, context: Context, turn_id: str, after: str | None, begun: _Started | None
    ) -> AsyncGenerator[Event]:
        turn: Turn | None = None
        if begun is not None:
            session_id, member = begun.session_id, begun.member
        else:
            turn = await found(context, turn_id)
            session_id, member = turn.session_id, None
        if after is None:  # it says nothing more, and whoever waits for an actor knows by it that the turn has begun
            after = "start"
            yield event(after, started(turn_id))
        lost = None
        while turn is None or not (turn.has_ended or turn.state == TurnState.awaiting_approval):
            member = member or await self._find(context, session_id, lost)
            try:
                async with aclosing(self._told(context, member, session_id, turn_id, after)) as events:
                    async for one in events:
                        after = one.id
                        yield one
                if after == "end" or after.endswith(".approval"):
                    return
            except RayActorError:
                lost = member.name
            except (StackError, ConnectionError, RayError) as error:
                if isinstance(error, BadInput) and error.param == "after":  # there is no such event
                    raise
                # What the turn failed by is in its row. If it has not, it has left this actor, or this client reads
                # more slowly than the model writes.
                await asyncio.sleep(AGAIN_S)
            turn, member = await found(context, turn_id), None
        async with aclosing((await retold(context, turn)).read(after)) as events:
            async for one in events:
                yield one

    async def cancel(self, context: Context, turn_id: str) -> None:
        """Stops a turn whose row says that it is to end."""
        turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
        if turn is None:
            return
        member: Member | None = await self._ask("known", turn.session_id, within=POOL_S)
        if member is not None:
            await _tell(member.handle.cancel.remote(turn_id))
        elif not turn.has_ended:  # nobody runs it: it ends when it is taken
            await self._start(context, turn, {})

    async def go_on(self, context: Context, turn_id: str, keys: Mapping[str, str]) -> None:
        """Has a turn run on whose calls the client has decided about. Raises as `start` does."""
        turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
        if turn is not None and not turn.has_ended:
            await self._start(context, turn, keys)

    async def end(self, context: Context, session_id: str) -> None:  # noqa: ARG002  # the protocol's
        """Stops all of a session that was deleted."""
        member: Member | None = await self._ask("known", session_id, within=POOL_S)
        if member is not None:
            await _tell(member.handle.end.remote(session_id))

    async def _find(self, context: Context, session_id: str, lost: str | None) -> Member:
        try:
            async with asyncio.timeout(FIND_S):
                member: Member = await self._ask("find", context.tenant, session_id, lost)
        except TimeoutError as error:
            raise Unavailable(
                f"no actor has got free for the turn within {FIND_S:g} s; it is run once one has, and its events can "
                "be asked for again"
            ) from error
        return member

    async def _told(
        self, context: Context, member: Member, session_id: str, turn_id: str, after: str
    ) -> AsyncGenerator[Event]:
        """What an actor tells of a turn, until it tells no more."""
        stream = await self._receiver.open()
        asked = (context.tenant, session_id, turn_id, after, stream.target)
        try:
            items = while_it_lasts(Call(member.handle.events.remote(*asked)), stream, None)
            async with aclosing(items):
                async for item in items:
                    for line in item.decode().split("\n")[:-1]:
                        event_id, _, data = line.partition(" ")
                        yield Event(event_id, data) if data else await _large_event(context, turn_id, event_id)
        finally:
            self._receiver.close(stream)

    async def _ask(self, method: str, *arguments: Any, within: float | None = None) -> Any:
        """Asks the pool; where it dies meanwhile, its next replica is asked. Raises StackError of it, and Unavailable.

        All that it is asked can be repeated.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        while True:
            call = getattr(self._pool, method).remote(*arguments)
            try:
                async with asyncio.timeout(within):
                    return await call
            except asyncio.CancelledError:
                call.cancel()
                raise
            except RayTaskError as error:  # before TimeoutError, which it may be too, where the replica raised it
                if isinstance(error.cause, StackError):
                    raise error.cause from error
                raise
            except TimeoutError as error:
                call.cancel()
                raise Unavailable(f"the pool of sessions has not answered within {within} s") from error
            except (RayError, RayServeException, ConnectionError) as error:
                if loop.time() - start > POOL_S:
                    raise Unavailable("the pool of sessions does not answer now") from error
                await asyncio.sleep(AGAIN_S)


async def _tell(reference: Any) -> None:
    """Tells an actor something that does not matter where it has died."""
    try:
        await answer_of(reference)
    except RayActorError:
        return


async def _large_event(context: Context, turn_id: str, id: str) -> Event:
    """An event of a turn that is in its rows: the end of a step, or of the turn."""
    stream = await retold(context, await found(context, turn_id))
    async with aclosing(stream.read()) as events:
        async for one in events:
            if one.id == id:
                return one
    raise NotFound(f"the turn has no event {id!r} any more", param="after")

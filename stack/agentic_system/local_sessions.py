"""Sessions that are run in this process. It implements stack.agentic_system.sessions.Sessions.

A session is here as long as a turn of it is run or waits, or somebody reads its events. What a process has left undone
is gone on with when a turn of the same session is told of, or by `recover`.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from weakref import WeakValueDictionary

from stack.agentic_system import replay
from stack.agentic_system.events import Stream
from stack.agentic_system.loop import Place
from stack.agentic_system.session import Session
from stack.agentic_system.sessions import Event
from stack.api.agentic_system import TurnState
from stack.context import Context
from stack.errors import Conflict, NotFound, Unavailable
from stack.store.turns import Turn


class LocalSessions:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._owner = f"process-{uuid.uuid4().hex}"
        self._sessions: dict[str, Session] = {}
        self._streams = WeakValueDictionary[tuple[str, str], Stream]()  # by tenant and turn, as long as they are used
        self._is_closed = False
        self._one_left = asyncio.Event()

    async def start(self, context: Context, turn: Turn, keys: Mapping[str, str]) -> None:
        """Has a turn run that was accepted, after those before it in its session. Raises Unavailable."""
        self.tell(context.tenant, turn.session_id, turn.id, keys)

    def tell(self, tenant: str, session_id: str, turn_id: str, keys: Mapping[str, str]) -> Stream:
        """The same, of a turn of which no more is known. Gives its stream, which others find as long as it is kept."""
        stream = self._streams[tenant, turn_id] = self._of(tenant, session_id).start(turn_id, keys)
        return stream

    def has_stream(self, tenant: str, turn_id: str) -> bool:
        """Whether there is the stream of a turn that is run here, or was just now."""
        stream = self._streams.get((tenant, turn_id))
        return stream is not None and not stream.is_left

    def wake(self, tenant: str, session_id: str) -> None:
        """Has all turns run of a session that can be. Raises Unavailable."""
        self._of(tenant, session_id).wake()

    @property
    def is_idle(self) -> bool:
        return not self._sessions

    async def until_idle(self) -> None:
        """Returns when no session has anything to do."""
        while self._sessions:
            self._one_left.clear()
            await self._one_left.wait()

    def events(self, context: Context, turn_id: str, after: str | None = None) -> AsyncGenerator[Event]:
        """The events of a turn behind the one with the id `after`. The iterator raises NotFound.

        The stream of a turn that is run by now is taken hold of here: nothing of it is missed by asking late for it.
        """
        stream = self._streams.get((context.tenant, turn_id))
        return self._events(context, turn_id, after, stream if stream is not None and not stream.is_left else None)

    async def _events(
        self, context: Context, turn_id: str, after: str | None, stream: Stream | None
    ) -> AsyncGenerator[Event]:
        if stream is None:
            stream = await self._stream(context, turn_id)
        async with aclosing(stream.read(after)) as events:
            async for event in events:
                yield event

    async def cancel(self, context: Context, turn_id: str) -> None:
        """Stops a turn whose row says that it is to end."""
        turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
        if turn is None:
            return
        if (session := self._sessions.get(turn.session_id)) is not None:
            await session.cancel(turn_id)
        elif not turn.has_ended:
            self._of(context.tenant, turn.session_id).wake()  # nobody runs it: it ends when it is taken

    async def go_on(self, context: Context, turn_id: str, keys: Mapping[str, str]) -> None:
        """Has a turn run on whose calls the client has decided about. Raises Unavailable."""
        turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
        if turn is not None and not turn.has_ended:
            self.tell(context.tenant, turn.session_id, turn.id, keys)

    async def end(self, context: Context, session_id: str) -> None:  # noqa: ARG002  # the protocol's
        """Stops all of a session that was deleted."""
        if (session := self._sessions.pop(session_id, None)) is not None:
            await session.stop(Conflict("the session was deleted", code="cancelled"))
            self._one_left.set()

    async def recover(self) -> None:
        """Goes on with what was left undone, of all tenants."""
        for due in await asyncio.to_thread(self._place.context.store.turns.due):
            self._of(due.tenant, due.session_id).wake()

    async def close(self) -> None:
        """Leaves all turns where they are, to whoever takes them next."""
        self._is_closed = True
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.stop(Unavailable("what runs the turn is stopped; it goes on later"))

    async def _stream(self, context: Context, turn_id: str) -> Stream:
        turn = await self._found(context, turn_id)
        if (session := self._sessions.get(turn.session_id)) is not None and (stream := session.stream(turn_id)):
            return stream
        if turn.has_ended or turn.state == TurnState.awaiting_approval:
            return await self._retold(context, turn)
        stream = self._of(context.tenant, turn.session_id).watch(turn_id)
        # It may have ended after its row was read, and before its stream was there to be told.
        turn = await self._found(context, turn_id)
        if turn.has_ended or turn.state == TurnState.awaiting_approval:
            return await self._retold(context, turn)
        return stream

    async def _found(self, context: Context, turn_id: str) -> Turn:
        turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
        if turn is None:
            raise NotFound(f"there is no turn with the id {turn_id!r}", param="turn_id")
        return turn

    async def _retold(self, context: Context, turn: Turn) -> Stream:
        turns = context.store.turns
        steps, runs = await asyncio.to_thread(lambda: (turns.steps_of([turn.id]), turns.runs_of(turn.id)))
        return replay.whole(turn, steps, runs)

    def _of(self, tenant: str, session_id: str) -> Session:
        if self._is_closed:
            raise Unavailable("what runs turns is stopped")
        if session_id not in self._sessions:
            self._sessions[session_id] = Session(self._place, tenant, session_id, self._owner, self._forget)
        return self._sessions[session_id]

    def _forget(self, session: Session) -> None:
        if session.is_idle and self._sessions.get(session.id) is session:
            del self._sessions[session.id]
            self._one_left.set()

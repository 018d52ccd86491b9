"""The actor of a session: it runs the turns of one session at a time, and leaves it when there are none left.

It is one of the pool (serve_apps/session_pool.py), which gives it a session. What it imports is little, so that there
can be many: models and memory banks are asked by another actor (serve_apps/shared_engine.py).
"""

from collections import deque
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass

import ray
from ray.actor import exit_actor

from serve_apps.actor_calls import Calls
from serve_apps.shared_engine import ActorEngine, fingerprint
from stack.agentic_system.events import Stream
from stack.agentic_system.local_sessions import LocalSessions
from stack.agentic_system.loop import Place
from stack.agentic_system.toolbox import open_tools
from stack.channel import Sender, Target
from stack.config import Config
from stack.context import Context
from stack.errors import Conflict, StackError
from stack.models import Ended, Failure

# An event that is larger goes as its id alone: all of it is in the rows of the turn, where whoever reads has it from.
MAX_EVENT_BYTES = 2**20
NOT_HERE = "not_here"
MAX_RECENT = 2


@dataclass(frozen=True)
class Seat:
    """Which session an actor has, and of which config the actor is."""

    tenant: str | None
    session_id: str | None
    fingerprint: str


class SessionActor:
    def __init__(self, config: Config) -> None:
        self._engine = ActorEngine(config)
        self._context = Context.open(config, self._engine)
        self._fingerprint = fingerprint(config)
        place = Place(self._context, self._engine.retrieve, open_tools)
        # Its turns are those of an owner of its name, by which the pool knows whose they are.
        self._sessions = LocalSessions(place, ray.get_runtime_context().get_actor_name())
        self._sender = Sender()
        # A turn that has ended before anybody reads its events: all of them can be read for a while.
        self._recent: deque[Stream] = deque(maxlen=MAX_RECENT)
        self._tenant: str | None = None
        self._session_id: str | None = None
        self._calls = Calls()

    async def ready(self) -> None:
        """Returns once a turn can be run at once."""
        with self._calls.one():
            await self._engine.ready()

    async def seat(self) -> Seat:
        """Which session it has; what answers is not busy for long."""
        with self._calls.one():
            return Seat(self._tenant, self._session_id, self._fingerprint)

    async def take(self, tenant: str, session_id: str, keys: Mapping[str, Mapping[str, str]]) -> bool:
        """Takes a session, and runs what is to be run of it: False if it has one. `keys` are those of its turns."""
        if self._session_id is not None:
            return False
        self._tenant, self._session_id = tenant, session_id
        for turn_id, of_turn in keys.items():
            self._recent.append(self._sessions.tell(tenant, session_id, turn_id, of_turn))
        self._sessions.wake(tenant, session_id)
        return True

    async def lasts(self) -> None:
        """Returns when the session has nothing to be run. From then on the actor has none."""
        with self._calls.one():
            await self._sessions.until_idle()
            self._tenant = self._session_id = None

    async def start(self, session_id: str, turn_id: str, keys: Mapping[str, str]) -> bool:
        """Has a turn run of the session that the actor has; False if that is not this one."""
        if self._session_id != session_id or self._tenant is None:
            return False
        self._recent.append(self._sessions.tell(self._tenant, session_id, turn_id, keys))
        return True

    async def events(self, tenant: str, session_id: str, turn_id: str, after: str | None, target: Target) -> Ended:
        """Sends the events of a turn of the session, one a line: the id and, behind a blank, the data.

        Raises Conflict with the code NOT_HERE if the actor does not have the session, nor had the turn just now.
        """
        if self._session_id != session_id and not self._sessions.has_stream(tenant, turn_id):
            raise Conflict(f"the actor does not have the session {session_id!r}", code=NOT_HERE)
        sent = 0
        with self._calls.one():
            outlet = await self._sender.open(target)
            try:
                events = self._sessions.events(self._context.of_tenant(tenant), turn_id, after)
                async with aclosing(events):
                    async for event in events:
                        line = f"{event.id} {event.data}\n".encode()
                        if len(line) > MAX_EVENT_BYTES:
                            line = f"{event.id}\n".encode()
                        await outlet.send(line)
                        sent += len(line)
            except StackError as error:
                return Ended(sent, Failure(error.status, error.message, error.param))
        return Ended(sent)

    async def cancel(self, turn_id: str) -> None:
        """Stops a turn whose row says that it is to end, if it is one of the session."""
        if self._tenant is not None:
            await self._sessions.cancel(self._context.of_tenant(self._tenant), turn_id)

    async def end(self, session_id: str) -> None:
        """Stops all of a session that was deleted."""
        if self._tenant is not None:
            await self._sessions.end(self._context.of_tenant(self._tenant), session_id)

    async def leave(self) -> None:
        """Ends the actor, unless it has something to do."""
        if not self._calls.count and self._sessions.is_idle:
            exit_actor()  # type: ignore[no-untyped-call]

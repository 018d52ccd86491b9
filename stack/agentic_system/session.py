"""One session: its turns are run one at a time, in their order, for as long as there are some to be run.

What is to be run stands in rows, so that a session needs to be told no more than that it shall look.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from sqlalchemy.exc import SQLAlchemyError

from stack.agentic_system.events import Stream
from stack.agentic_system.history import History
from stack.agentic_system.journal import JournalLost
from stack.agentic_system.loop import Place
from stack.agentic_system.replay import begun, error_of
from stack.agentic_system.turns import TurnRun
from stack.api.agentic_system import TurnState
from stack.errors import Conflict, StackError, Unavailable
from stack.store.faults import reason
from stack.store.turns import Turn

logger = logging.getLogger("ray.serve")

# How often the database is tried again in which a turn cannot be written, and after how long at first.
RETRIES = 6
RETRY_S = 0.25
ELSEWHERE = "the turn is run elsewhere now; its events can be asked for again"


class Session:
    """The turns of one session. `when_idle` is called when there is nothing to run any more."""

    def __init__(
        self, place: Place, tenant: str, session_id: str, owner: str, when_idle: Callable[["Session"], None]
    ) -> None:
        self.id = session_id
        self._place = place
        self._context = place.context.of_tenant(tenant)
        self._owner = owner
        self._when_idle = when_idle
        self._streams: dict[str, Stream] = {}
        self._keys: dict[str, Mapping[str, str]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._has_more = False
        self._current: str | None = None  # the turn that is run, or is about to be
        self._run: TurnRun | None = None
        self._is_to_cancel = False
        self._past = History()

    def start(self, turn_id: str, keys: Mapping[str, str]) -> Stream:
        """Has a turn run when its time comes. The turn is in its row."""
        self._keys[turn_id] = keys
        return self.watch(turn_id)

    def watch(self, turn_id: str) -> Stream:
        """The stream of a turn that has not ended, which is run if nobody does."""
        stream = self._streams.setdefault(turn_id, begun(turn_id))
        self.wake()
        return stream

    def stream(self, turn_id: str) -> Stream | None:
        return self._streams.get(turn_id)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is run and nobody waits."""
        return self._worker is None and not self._streams

    def wake(self) -> None:
        """Looks whether there is something to run."""
        self._has_more = True
        if self._worker is None:
            self._worker = asyncio.ensure_future(self._work())

    async def cancel(self, turn_id: str) -> None:
        """Ends a turn whose row says that it is to end. It does not wait for that end."""
        if turn_id == self._current:
            self._is_to_cancel = True
            if self._run is not None:
                self._run.cancel()
            return
        self._keys.pop(turn_id, None)
        if (stream := self._streams.get(turn_id)) is not None:
            await self._tell_if_ended(turn_id, stream)

    async def stop(self, error: StackError) -> None:
        """Stops what is run, and leaves it to whoever takes it next. Those who read events are told the error."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        self._leave(error)

    def _leave(self, error: StackError) -> None:
        for stream in self._streams.values():
            stream.leave(error)
        self._streams.clear()

    async def _work(self) -> None:
        """Runs what there is to be run, and says when there is nothing more: also where that is by a fault of ours, as
        then another one has to take the session up."""
        task = asyncio.current_task()
        try:
            while self._has_more:
                self._has_more = False
                await self._run_all()
        except (Exception, asyncio.CancelledError):
            if task is not None and task.cancelling():
                raise  # it is stopped
            logger.exception("the session %s is left", self.id)
            self._leave(Unavailable("what runs the turn has failed; it goes on later"))
        finally:
            self._worker = None
        self._when_idle(self)

    async def _run_all(self) -> None:
        """Runs all turns that can be run. A database that is away is waited for, for some seconds.

        Where another owner has taken a turn, the session is left to it, with all that waits in it: who takes back what
        was taken from him breaks off the other's step each time, until the turn fails by that.
        """
        failures = 0
        while failures <= RETRIES:
            try:
                while (turn := await self._taken()) is not None:
                    await self._run_turn(turn)
                    failures = 0
                for turn_id, stream in list(self._streams.items()):  # of turns that were cancelled while they waited
                    await self._tell_if_ended(turn_id, stream)
                return
            except Conflict:  # superseded
                self._current, self._has_more = None, False
                self._leave(Unavailable(ELSEWHERE))
                return
            except (SQLAlchemyError, JournalLost) as error:
                why = reason(error) if isinstance(error, SQLAlchemyError) else str(error)
                logger.warning("the journal of the session %s cannot be written: %s", self.id, why)
                await asyncio.sleep(RETRY_S * 2**failures)
                failures += 1
        self._leave(Unavailable("the journal of the turn cannot be written now; it goes on later"))

    async def _taken(self) -> Turn | None:
        """The next turn, taken; None where there is none, or it awaits approval.

        Raises Conflict with the code "superseded" where another cluster runs it.
        """
        while (turn := await asyncio.to_thread(self._context.store.turns.next_of, self.id)) is not None:
            if turn.state == TurnState.awaiting_approval:
                break
            self._current, self._is_to_cancel = turn.id, False
            if (taken := await asyncio.to_thread(self._context.store.turns.take, turn.id, self._owner)) is not None:
                return taken
        self._current = None
        return None

    async def _run_turn(self, turn: Turn) -> None:
        """Runs a turn that was taken. Raises Conflict with the code "superseded" where it is run elsewhere by now."""
        stream = self._streams.setdefault(turn.id, begun(turn.id))
        run = TurnRun(self._place, turn, stream, self._past, self._keys.get(turn.id, {}))
        self._run = run
        if self._is_to_cancel:
            run.cancel()
        try:
            turn = await run.run()
        finally:
            self._current, self._run, self._is_to_cancel = None, None, False
        if run.is_cancelled and turn.state == TurnState.awaiting_approval:
            # It was to end, and had asked for an approval before it was told.
            await asyncio.to_thread(self._context.store.turns.cancel, turn.tenant, turn.id)
        self._streams.pop(turn.id, None)
        self._keys.pop(turn.id, None)

    async def _tell_if_ended(self, turn_id: str, stream: Stream) -> None:
        turn = await asyncio.to_thread(self._context.store.turns.get, self._context.tenant, turn_id)
        if turn is not None and not turn.has_ended:
            return
        error = error_of(turn) if turn is not None else Conflict("the turn was deleted", code="cancelled")
        if error is not None:
            stream.finish(error)
        else:
            stream.leave(Unavailable(ELSEWHERE))
        self._streams.pop(turn_id, None)
        self._keys.pop(turn_id, None)

"""Which actor a session has: they are started, given to sessions, and ended.

A session has an actor while there is something to be run in it. Which one that is only the pool says, so that there is
one. A few actors wait for sessions, as starting one takes seconds; one that has got free is given to the next session,
or ends after a while. An actor that dies is replaced by another, which goes on by the journal; and once a second the
pool looks for turns that nobody runs, as whoever was to tell of them has died. The actors outlive the pool: a new
replica finds them by their names.

Where another cluster works by the same database, the turns that it runs are left to it as long as its pool says that
it lives.
"""

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from sqlalchemy.exc import SQLAlchemyError

from serve_apps.actor_calls import ABANDONED_S, Call
from serve_apps.pool_members import Actors, Keys, Member, Silent, until_free
from serve_apps.session_actor import Seat
from serve_apps.shared_engine import fingerprint
from stack.config import Config
from stack.errors import StackError, TooManyRequests, Unavailable
from stack.store import Store, faults
from stack.store.clusters import HEARD_S
from stack.store.turns import Due

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
# How often the pool says that its cluster lives.
TELL_S = HEARD_S / 4
MAX_WAITING = 1_000
PREFIX = "session:"
# How long a waiting actor may take to take a session, until the session is said to wait.
TAKEN_S = 0.2
# How often actors are told that they are needed, and approvals are looked for that were not given in time.
ROUND_S = ABANDONED_S / 10
# How long an actor may take to answer that has no session, or another pool's.
WITHIN_S = 15.0
# How long a new pool waits for all actors to say which sessions they have. Those of slower ones wait for these alone.
ADOPT_S = 2.0
# How long a session waits for its next actor where its second one dies, and at most: twice as long each time. One that
# has lived for longer than that has not died of how the session began.
DELAY_S = 1.0
MAX_DELAY_S = 30.0


@dataclass
class Claim:
    """A session that has an actor, or waits for one. `keys` are those of its turns, for the next one if it dies.

    `deaths` is how many have died with the session, one soon after the other.
    `is_over` is set when the session does not have the actor any more.
    """

    tenant: str
    session_id: str
    keys: dict[str, Keys] = field(repr=False)
    deaths: int = 0
    member: "asyncio.Future[Member]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_over: asyncio.Event = field(default_factory=asyncio.Event)


class Pool:
    """Actors of a cluster, free ones and those of sessions. It looks after them while `watch` runs."""

    def __init__(self, config: Config, store: Store, actors: Actors, cluster: str) -> None:
        self._config = config
        self._fingerprint = fingerprint(config)
        self._store = store
        self._actors = actors
        self._cluster = cluster
        self._free: dict[Member, float] = {}  # since when, in the order of that
        self._claims: dict[str, Claim] = {}
        self._waiting: list[Claim] = []
        self._starting = 0
        self._most_starting = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_looked = asyncio.Event()
        # Actors of another pool that have not said yet which session they have: set once that is known.
        self._unheard: dict[str, asyncio.Event] = {}

    async def start(self, tenant: str, session_id: str, turn_id: str, keys: Keys) -> Member | None:
        """Has a turn run whose row is there. Returns the session's actor, or None where it waits for one.

        Raises TooManyRequests where too many sessions wait.
        """
        await self._look_first(session_id)
        while (claim := self._claims.get(session_id)) is not None:
            claim.keys[turn_id] = keys
            if not claim.member.done():
                return None
            member = claim.member.result()
            if await self._told(member, session_id, turn_id, keys):
                return member
            await claim.is_over.wait()
        claim = self._claim(tenant, session_id, {turn_id: keys})
        await asyncio.wait([claim.member], timeout=TAKEN_S)
        return claim.member.result() if claim.member.done() else None

    async def find(self, tenant: str, session_id: str, lost: str | None) -> Member:
        """The actor of a session that has something to be run, once it has one: another one than that named `lost`.

        It has none while another cluster runs its turn. Raises TooManyRequests where too many sessions wait, and
        Unavailable.
        """
        await self._look_first(session_id)
        while True:
            if session_id not in self._claims and await self._is_elsewhere(session_id):
                await asyncio.sleep(INTERVAL_S)
                continue
            claim = self._claims.get(session_id) or self._claim(tenant, session_id, {})
            member = await asyncio.shield(claim.member)
            if member.name != lost:
                return member
            await claim.is_over.wait()

    async def known(self, session_id: str) -> Member | None:
        """The actor of a session, if it has one."""
        await self._has_looked.wait()
        claim = self._claims.get(session_id)
        return claim.member.result() if claim is not None and claim.member.done() else None

    async def _look_first(self, session_id: str) -> None:
        """Returns once it is known whether an actor of another pool has the session. Raises Unavailable."""
        await self._has_looked.wait()
        while self._unheard and session_id not in self._claims:
            with _looking_up():
                owner = await asyncio.to_thread(self._store.turns.owner_of, session_id)
            heard = self._unheard.get(owner) if owner is not None else None
            if heard is None:
                return
            await heard.wait()

    async def _is_elsewhere(self, session_id: str) -> bool:
        with _looking_up():
            return await asyncio.to_thread(self._store.turns.is_elsewhere, session_id, self._cluster)

    # Claims and members

    def _claim(self, tenant: str, session_id: str, keys: dict[str, Keys]) -> Claim:
        if len(self._waiting) >= MAX_WAITING:
            raise TooManyRequests(f"{MAX_WAITING} sessions wait for an actor", retry_after=5)
        claim = self._claims[session_id] = Claim(tenant, session_id, keys)
        self._waiting.append(claim)
        self._fill()
        return claim

    def _fill(self) -> None:
        """Gives free actors to those that wait, and starts as many as are missing."""
        while self._waiting and self._free:
            member, _ = self._free.popitem()  # the one that got free last: the others may end
            self._do(self._attend(self._waiting.pop(0), member))
        missing = len(self._waiting) + self._config.agents.warm - len(self._free)
        while self._starting < min(missing, self._most_starting):
            self._starting += 1
            self._do(self._start_one())

    async def _attend(self, claim: Claim, member: Member, *, is_taken: bool = False) -> None:
        """Gives an actor to a session, for as long as there is something to be run in it."""
        begin = asyncio.get_running_loop().time()
        try:
            if not is_taken and not await self._taken(claim, member):
                self._waiting.insert(0, claim)  # the actor has another session, which another pool has given it
                return
            if not claim.member.done():
                claim.member.set_result(member)
            await until_free(member)
        except Exception as error:  # whatever it is, the session must not be without an actor for ever
            if isinstance(error, RayError | StackError | Silent):
                logger.warning("the actor %s of the session %s is lost: %s", member.name, claim.session_id, error)
            else:
                logger.exception("the actor %s of the session %s is given up", member.name, claim.session_id)
            self._do(self._actors.kill(member.handle))
            self._give_up(claim, asyncio.get_running_loop().time() - begin)
        else:
            self._end(claim)
            self._release(member)
        finally:
            self._fill()

    async def _taken(self, claim: Claim, member: Member) -> bool:
        given = dict(claim.keys)
        taken: bool = await Call(member.handle.take.remote(claim.tenant, claim.session_id, given))
        if taken:
            for turn_id in claim.keys.keys() - given.keys():  # they have come meanwhile
                await self._told(member, claim.session_id, turn_id, claim.keys[turn_id])
        return taken

    async def _told(self, member: Member, session_id: str, turn_id: str, keys: Keys) -> bool:
        """Whether an actor has the session, and runs a turn of it."""
        try:
            told: bool = await Call(member.handle.start.remote(session_id, turn_id, keys))
        except RayError:  # it has died, which `_attend` is told, too
            return False
        return told

    def _give_up(self, claim: Claim, lasted: float) -> None:
        """The session gets another actor: at once where it loses the first, later and later where it loses more."""
        if not claim.member.done():
            self._waiting.insert(0, claim)
            return
        self._end(claim)
        deaths = claim.deaths + 1 if lasted <= MAX_DELAY_S else 1
        again = Claim(claim.tenant, claim.session_id, claim.keys, deaths)
        self._claims[claim.session_id] = again
        if deaths == 1:
            self._waiting.insert(0, again)
        else:
            self._do(self._wait_later(again, min(MAX_DELAY_S, DELAY_S * 2 ** (deaths - 2))))

    async def _wait_later(self, claim: Claim, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._waiting.append(claim)
        self._fill()

    def _end(self, claim: Claim) -> None:
        if self._claims.get(claim.session_id) is claim:
            del self._claims[claim.session_id]
        claim.is_over.set()

    def _release(self, member: Member) -> None:
        if member.is_current:
            self._free[member] = asyncio.get_running_loop().time()
        else:
            member.handle.leave.remote()

    async def _start_one(self) -> None:
        name = f"{PREFIX}{uuid.uuid4().hex}@{self._cluster}"  # which is the owner of the turns that it takes
        try:
            handle = await self._actors.launch(name)
        except (RayError, StackError) as error:  # the watcher has it tried again
            logger.warning("an actor for sessions cannot be started: %s", error)
            return
        finally:
            self._starting -= 1
        self._release(Member(name, handle))
        self._fill()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("what the pool of sessions did has failed", exc_info=error)

    # What is looked after

    async def watch(self) -> None:
        """Looks after the actors, and for turns that nobody runs, again and again."""
        await self._adopt()
        self._has_looked.set()
        self._most_starting = await self._actors.most_at_once()
        before: set[Due] = set()
        told = -TELL_S
        last_round = asyncio.get_running_loop().time()
        while True:
            try:
                if (now := asyncio.get_running_loop().time()) - told >= TELL_S:
                    await asyncio.to_thread(self._store.clusters.tell, self._cluster)
                    told = now
                due = set(await asyncio.to_thread(self._store.turns.due, self._cluster))
                # Of one that was accepted just now, the gateway is about to tell.
                self._take_up(due & before)
                before = due
            except SQLAlchemyError as error:  # the database is away
                logger.warning("turns that nobody runs cannot be looked for: %s", faults.reason(error))
            now = asyncio.get_running_loop().time()
            self._end_superfluous(now)
            if now - last_round > ROUND_S:
                last_round = now
                await self._go_round()
            self._fill()
            await asyncio.sleep(INTERVAL_S)

    async def _go_round(self) -> None:
        self._most_starting = await self._actors.most_at_once()
        for member in self._free:
            self._do(self._ping(member))
        try:
            await asyncio.to_thread(self._store.turns.end_unanswered, self._config.agents.approval_s)
        except SQLAlchemyError as error:
            logger.warning("turns that await approval cannot be looked for: %s", faults.reason(error))

    async def _adopt(self) -> None:
        """Finds the actors that another pool has started, and waits a while for what they say."""
        found = await self._actors.running()
        self._unheard = {name: asyncio.Event() for name, _ in found}
        for name, handle in found:
            self._do(self._adopt_one(name, handle))
        waiting = [asyncio.ensure_future(heard.wait()) for heard in self._unheard.values()]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=ADOPT_S)
            for one in late:
                one.cancel()

    async def _adopt_one(self, name: str, handle: Any) -> None:
        try:
            async with asyncio.timeout(WITHIN_S):
                seat: Seat = await Call(handle.seat.remote())
        except (RayError, StackError, TimeoutError) as error:
            logger.warning("the actor %s does not say which session it has, and is given up: %s", name, error)
            await self._actors.kill(handle)
        else:
            self._take_over(Member(name, handle, seat.fingerprint == self._fingerprint), seat)
        finally:
            self._unheard.pop(name).set()
        self._fill()

    def _take_over(self, member: Member, seat: Seat) -> None:
        """Takes over an actor of another pool, with the session that it has."""
        if seat.session_id is None or seat.tenant is None:
            self._release(member)
        elif (claim := self._claims.get(seat.session_id)) is None:
            claim = self._claims[seat.session_id] = Claim(seat.tenant, seat.session_id, {})
            claim.member.set_result(member)
            self._do(self._attend(claim, member, is_taken=True))
        else:  # another has been given the session: what this one writes is not written, and it leaves it by that
            self._do(self._leave_alone(member))

    async def _leave_alone(self, member: Member) -> None:
        try:
            await until_free(member)
        except (RayError, StackError, Silent):
            await self._actors.kill(member.handle)
        else:
            self._release(member)

    def _take_up(self, due: set[Due]) -> None:
        for one in sorted(due, key=lambda one: one.turn_id):
            if one.owner in self._unheard:
                continue
            if one.session_id not in self._claims and len(self._waiting) < MAX_WAITING:
                self._claim(one.tenant, one.session_id, {})

    def _end_superfluous(self, now: float) -> None:
        """Ends actors that have had nothing to do for long, beyond those that shall wait."""
        for member, since in list(self._free.items())[: max(0, len(self._free) - self._config.agents.warm)]:
            if now - since >= self._config.agents.idle_s:
                del self._free[member]
                member.handle.leave.remote()

    async def _ping(self, member: Member) -> None:
        """Tells an actor that it is still needed."""
        try:
            async with asyncio.timeout(WITHIN_S):
                await Call(member.handle.ready.remote())  # which keeps what it asks the models by, too
        except (RayError, StackError, TimeoutError):
            if self._free.pop(member, None) is not None:
                await self._actors.kill(member.handle)


@contextmanager
def _looking_up() -> Iterator[None]:
    """Raises Unavailable where the database is away."""
    try:
        yield
    except SQLAlchemyError as error:
        raise Unavailable(f"whether the session is run cannot be looked up: {faults.reason(error)}") from error

"""Which actor a session has: free ones, waiting sessions, deaths, and what another pool has left. No Ray is started."""

import asyncio
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from serve_apps import actor_pool, pool_members
from serve_apps.actor_pool import Pool
from serve_apps.placement import NOT_HEAD, NOT_SPOT
from serve_apps.pool_members import Keys
from serve_apps.session_actor import Seat
from serve_apps.shared_engine import fingerprint
from stack.config import Config
from stack.errors import TooManyRequests
from stack.store import Store
from stack.store import clusters as clusters_module
from stack.store.connection import past
from stack.store.turns import Due, NewTurn, Step, Turn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray Serve's own use of pydantic
    from serve_apps.session_pool import RayActors

MODEL = {"id": "small", "path": "models/small", "context": 256}
CONFIG = Config.parse({"models": [MODEL], "agents": {"warm": 1, "idle_s": 0}}, "the tests' config")
WITHOUT_WARM = Config.parse({"models": [MODEL], "agents": {"warm": 0}}, "the tests' config")
KEYS = {"BRAVE_SEARCH_KEY": "hush"}
CLUSTER = "session_1"


class Method:
    """A method of an actor's handle."""

    def __init__(self, called: Callable[..., Awaitable[Any]]) -> None:
        self.remote = lambda *arguments: asyncio.ensure_future(called(*arguments))


class Actor:
    """Does what an actor of a session does, but for running turns: a session lasts until it is told to be over."""

    def __init__(self, of: str = fingerprint(CONFIG)) -> None:
        self.of = of
        self.session_id: str | None = None
        self.told: list[tuple[str, Keys]] = []
        self.taken, self.left = asyncio.Event(), asyncio.Event()
        self._over = asyncio.Event()
        self.dead = asyncio.Event()
        self._is_there = asyncio.Event()
        self._is_there.set()
        for name in ("ready", "seat", "take", "lasts", "start", "leave"):
            setattr(self, name, Method(getattr(self, f"_{name}")))

    def end_session(self) -> None:
        self.session_id = None
        self._over.set()

    def die(self) -> None:
        self.dead.set()
        self._over.set()

    def hang(self) -> None:
        """It does nothing any more, and is not dead, until it is told to `go_on`."""
        self._is_there.clear()

    def go_on(self) -> None:
        self._is_there.set()

    def _live(self) -> None:
        if self.dead.is_set():
            raise ActorDiedError

    async def _ready(self) -> None:
        await self._is_there.wait()
        self._live()

    async def _seat(self) -> Seat:
        await self._is_there.wait()
        self._live()
        return Seat("default", self.session_id, self.of)

    async def _take(self, _: str, session_id: str, keys: dict[str, Keys]) -> bool:
        self._live()
        if self.session_id is not None:
            return False
        self.session_id = session_id
        self._over.clear()
        self.taken.set()
        self.told += keys.items()
        return True

    async def _lasts(self) -> None:
        await self._over.wait()
        self._live()

    async def _start(self, session_id: str, turn_id: str, keys: Keys) -> bool:
        self._live()
        if self.session_id != session_id:
            return False
        self.told.append((turn_id, keys))
        return True

    async def _leave(self) -> None:
        self.left.set()


class Actors:
    """Implements Actors: each starts when it is let."""

    def __init__(self, *there: Actor) -> None:
        self.there = there
        self.made: list[Actor] = []
        self.failures: list[Exception] = []
        self.permits = asyncio.Semaphore(0)

    async def most_at_once(self) -> int:
        return 2

    async def launch(self, _: str) -> Actor:
        await self.permits.acquire()
        if self.failures:
            raise self.failures.pop()
        self.made.append(Actor())
        return self.made[-1]

    async def kill(self, handle: Actor) -> None:
        handle.die()

    async def running(self) -> list[tuple[str, Actor]]:
        return [(f"session:{number}", actor) for number, actor in enumerate(self.there)]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "INTERVAL_S", 0.001)


@pytest.fixture
def rows(new_sqlite_file: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copy(new_sqlite_file, tmp_path / "stack.db")
    store = Store(f"sqlite:///{tmp_path}/stack.db")
    yield store
    store.close()


@asynccontextmanager
async def running(rows: Store, actors: Actors, config: Config = CONFIG) -> AsyncIterator[Pool]:
    pool = Pool(config, rows, actors, CLUSTER)
    mine = asyncio.all_tasks()
    watching = asyncio.ensure_future(pool.watch())
    try:
        async with asyncio.timeout(20):
            yield pool
    finally:
        others = {watching, *asyncio.all_tasks()} - mine
        for task in others:
            task.cancel()
        await asyncio.wait(others)


async def test_a_session_has_one_actor_as_long_as_it_lasts(rows: Store) -> None:
    actors = Actors()
    async with running(rows, actors) as pool:
        actors.permits.release()
        first = await pool.find("default", "one", None)
        assert await pool.start("default", "one", "turn-1", KEYS) == first
        assert await pool.find("default", "one", None) == first
        assert await pool.known("one") == first
        (actor,) = actors.made
        assert actor.told == [("turn-1", KEYS)]
        actor.end_session()
        again = await pool.start("default", "two", "turn-2", {})
        assert again == first, "one that has got free is given to the next session"
        assert actor.session_id == "two"
        assert await pool.known("one") is None


async def test_sessions_wait_for_actors_in_their_order(rows: Store) -> None:
    actors = Actors()
    async with running(rows, actors) as pool:
        assert await pool.start("default", "one", "turn-1", KEYS) is None
        assert await pool.start("default", "one", "turn-2", {}) is None
        assert await pool.start("default", "two", "turn-3", {}) is None
        assert await pool.known("one") is None
        actors.permits.release()
        await pool.find("default", "one", None)
        (actor,) = actors.made
        assert actor.told == [("turn-1", KEYS), ("turn-2", {})]
        actor.end_session()
        await pool.find("default", "two", None)
        assert actor.session_id == "two"


async def test_too_many_do_not_wait(rows: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "MAX_WAITING", 1)
    async with running(rows, Actors()) as pool:
        assert await pool.start("default", "one", "turn-1", {}) is None
        with pytest.raises(TooManyRequests, match="1 sessions wait"):
            await pool.start("default", "two", "turn-2", {})


async def test_who_has_lost_an_actor_gets_another_with_the_same_keys(rows: Store) -> None:
    actors = Actors()
    async with running(rows, actors) as pool:
        actors.permits.release()
        await pool.start("default", "one", "turn-1", KEYS)
        lost = await pool.find("default", "one", None)
        actors.made[0].die()
        actors.permits.release()
        found = await pool.find("default", "one", lost.name)
        assert found != lost
        assert actors.made[1].told == [("turn-1", KEYS)]


async def test_an_actor_that_dies_free_is_not_given_to_a_session_twice(rows: Store) -> None:
    actors = Actors()
    async with running(rows, actors) as pool:
        actors.permits.release()
        await pool.find("default", "one", None)
        actors.made[0].end_session()
        await asyncio.sleep(0)
        actors.made[0].die()
        actors.permits.release()
        await pool.find("default", "two", None)
        assert actors.made[1].session_id == "two"


async def test_one_that_another_pool_has_given_away_is_left_to_it(rows: Store) -> None:
    actors = Actors(Actor())
    async with running(rows, actors) as pool:
        actors.there[0].session_id = "another pool's"
        actors.permits.release()
        await pool.find("default", "one", None)
        assert actors.made[0].session_id == "one"


async def test_a_pool_finds_what_another_has_left(rows: Store) -> None:
    free, busy, of_another_config, silent = Actor(), Actor(), Actor("another"), Actor()
    busy.session_id = "one"
    silent.die()
    actors = Actors(free, busy, of_another_config, silent)
    async with running(rows, actors) as pool:
        kept = await pool.find("default", "one", None)
        assert kept.handle is busy
        assert (await pool.find("default", "two", None)).handle is free
        assert of_another_config.left.is_set()
        assert not busy.left.is_set()


async def test_an_actor_of_another_config_ends_when_its_session_does(rows: Store) -> None:
    old = Actor("another")
    old.session_id = "one"
    async with running(rows, Actors(old)) as pool:
        member = await pool.find("default", "one", None)
        old.end_session()
        waiting = asyncio.ensure_future(pool.find("default", "one", member.name))
        await old.left.wait()
        waiting.cancel()


async def test_those_that_are_superfluous_end(rows: Store) -> None:
    there = [Actor() for _ in range(3)]
    async with running(rows, Actors(*there)) as pool:
        await there[0].left.wait()
        await there[1].left.wait()
        assert (await pool.find("default", "one", None)).handle is there[2]


async def test_turns_that_nobody_runs_are_found(rows: Store) -> None:
    agent = rows.agents.add("default", {})
    session = rows.agents.add_session("default", agent.id, "talk")
    assert session is not None
    rows.turns.accept(NewTurn("default", agent.id, session.id, 1, {}, {}), 1)
    actor = Actor(fingerprint(WITHOUT_WARM))
    async with running(rows, Actors(actor), WITHOUT_WARM):
        await actor.taken.wait()
        assert actor.session_id == session.id


async def test_a_session_that_kills_its_actors_waits_for_the_next(rows: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "DELAY_S", 1_000)
    monkeypatch.setattr(actor_pool, "MAX_DELAY_S", 1_000)
    actors = Actors()
    async with running(rows, actors) as pool:
        lost = None
        for number in range(2):
            actors.permits.release()
            lost = (await pool.find("default", "one", lost)).name
            actors.made[number].die()
        assert lost is not None
        waiting = asyncio.ensure_future(pool.find("default", "one", lost))
        actors.permits.release()
        await asyncio.wait([waiting], timeout=0.2)
        assert await pool.known("one") is None, "though there is a free one"
        assert (await pool.find("default", "two", None)).handle is actors.made[2]
        assert not waiting.done()


async def test_it_waits_longer_each_time_and_gets_one_in_the_end(rows: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    sleep = asyncio.sleep
    monkeypatch.setattr(actor_pool, "DELAY_S", 100)
    monkeypatch.setattr(actor_pool, "MAX_DELAY_S", 300)

    async def slept(seconds: float) -> None:
        if seconds >= 100:
            delays.append(seconds)
        await sleep(0.001)

    monkeypatch.setattr(asyncio, "sleep", slept)
    actors = Actors()
    async with running(rows, actors) as pool:
        lost = None
        for number in range(5):
            actors.permits.release()
            lost = (await pool.find("default", "one", lost)).name
            actors.made[number].die()
        actors.permits.release()
        await pool.find("default", "one", lost)
    assert delays == [100, 200, 300, 300]


async def test_one_that_hangs_is_killed_and_its_session_gets_another(
    rows: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_members, "LOOK_S", 0.01)
    actors = Actors()
    async with running(rows, actors) as pool:
        actors.permits.release()
        lost = await pool.start("default", "one", "turn-1", KEYS) or await pool.find("default", "one", None)
        monkeypatch.setattr(pool_members, "ANSWER_S", 0.01)
        actors.made[0].hang()
        actors.permits.release()
        await pool.find("default", "one", lost.name)
        await actors.made[0].dead.wait()
        assert actors.made[1].told == [("turn-1", KEYS)]


async def test_whatever_keeps_actors_from_starting_others_are_started(
    rows: Store, caplog: pytest.LogCaptureFixture
) -> None:
    actors = Actors()
    actors.failures = [ValueError("no such thing") for _ in range(4)]  # more than may start at once
    async with running(rows, actors) as pool:
        for _ in range(5):
            actors.permits.release()
        await pool.find("default", "one", None)
    assert "no such thing" in caplog.text


async def test_whatever_an_actor_fails_by_its_session_gets_another(rows: Store) -> None:
    async def fails(*_: Any) -> None:
        raise ValueError("no such thing")

    actors = Actors(Actor())
    actors.there[0].lasts = Method(fails)  # type: ignore[attr-defined]
    async with running(rows, actors) as pool:
        lost = await pool.find("default", "one", None)
        actors.permits.release()
        found = await pool.find("default", "one", lost.name)
        assert found.handle is actors.made[0]
        await actors.there[0].dead.wait()


async def test_a_turn_that_another_living_cluster_runs_is_left_alone_until_it_falls_silent(
    rows: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = rows.turns.accept(accepted(rows), 1)
    waiting = accepted(rows)
    assert isinstance(turn, Turn)
    rows.clusters.tell("session_0")
    assert rows.turns.take(turn.id, "session:0@session_0") is not None
    actors = Actors(Actor(fingerprint(WITHOUT_WARM)), Actor(fingerprint(WITHOUT_WARM)))
    async with running(rows, actors, WITHOUT_WARM) as pool:
        reading = asyncio.ensure_future(pool.find("default", turn.session_id, None))
        assert isinstance(await asyncio.to_thread(rows.turns.accept, waiting, 1), Turn)
        other = await pool.find("default", waiting.session_id, None)
        looks = Looks(rows, monkeypatch)
        await looks.have_been(3)
        assert await pool.known(turn.session_id) is None
        assert not reading.done()
        assert {CLUSTER, "session_0"} == rows.clusters.others(None)
        monkeypatch.setattr(clusters_module, "HEARD_S", 0)
        member = await reading
        assert member != other
        assert member.handle.session_id == turn.session_id


async def test_a_turn_of_this_cluster_whose_actor_is_not_there_is_taken_up(rows: Store) -> None:
    turn = rows.turns.accept(accepted(rows), 1)
    assert isinstance(turn, Turn)
    rows.clusters.tell(CLUSTER)
    assert rows.turns.take(turn.id, f"session:gone@{CLUSTER}") is not None
    actor = Actor(fingerprint(WITHOUT_WARM))
    async with running(rows, Actors(actor), WITHOUT_WARM):
        await actor.taken.wait()
        assert actor.session_id == turn.session_id


class Looks:
    """Counts how often a pool looks for turns that nobody runs."""

    def __init__(self, rows: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self._looked = threading.Semaphore(0)
        self._due = rows.turns.due
        monkeypatch.setattr(rows.turns, "due", self._look)

    def _look(self, cluster: str) -> list[Due]:
        found = self._due(cluster)
        self._looked.release()
        return found

    async def have_been(self, times: int) -> None:
        for _ in range(times):
            await asyncio.to_thread(self._looked.acquire)


def accepted(rows: Store) -> NewTurn:
    agent = rows.agents.add("default", {})
    session = rows.agents.add_session("default", agent.id, "talk")
    assert session is not None
    return NewTurn("default", agent.id, session.id, 1, {}, {})


async def test_one_that_is_slow_to_say_what_it_has_holds_up_its_own_session_alone(
    rows: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_pool, "ADOPT_S", 0.001)
    new = accepted(rows)
    turn = rows.turns.accept(new, 1)
    assert isinstance(turn, Turn)
    rows.turns.take(turn.id, "session:0")
    slow, free = Actor(), Actor()
    slow.session_id = new.session_id
    slow.hang()
    async with running(rows, Actors(slow, free)) as pool:
        found = asyncio.ensure_future(pool.find("default", new.session_id, None))
        assert (await pool.find("default", "another", None)).handle is free
        free.end_session()
        for number in range(3):  # meanwhile the watcher looks for turns that nobody runs
            await pool.find("default", f"another {number}", None)
            free.end_session()
            await asyncio.to_thread(rows.turns.due)
        assert not found.done()
        slow.go_on()
        assert (await found).handle is slow


async def test_one_that_never_says_what_it_has_is_killed(rows: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "ADOPT_S", 0.001)
    monkeypatch.setattr(actor_pool, "WITHIN_S", 0.05)
    new = accepted(rows)
    turn = rows.turns.accept(new, 1)
    assert isinstance(turn, Turn)
    rows.turns.take(turn.id, "session:0")
    silent = Actor()
    silent.session_id = new.session_id
    silent.hang()
    actors = Actors(silent)
    actors.permits.release()
    async with running(rows, actors) as pool:
        found = await pool.find("default", new.session_id, None)
        assert found.handle is actors.made[0]
        assert silent.dead.is_set()


async def test_approval_that_does_not_come_is_not_waited_for_for_ever(
    rows: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_pool, "ROUND_S", 0)
    new = accepted(rows)
    turns = [rows.turns.accept(new, 2) for _ in range(2)]
    assert isinstance(turns[0], Turn)
    taken = rows.turns.take(turns[0].id, "somebody")
    assert taken is not None
    step = Step("step-1", taken.id, 1, "tool_execution", {}, 1, None, past(100), None)
    with rows.turns.journal(taken) as journal:
        journal.add_step(step)
        journal.ask_approval(step, ["call-1"])
    config = Config.parse({"models": [MODEL], "agents": {"warm": 0, "approval_s": 99}}, "the tests' config")
    actor = Actor(fingerprint(config))
    async with running(rows, Actors(actor), config):
        await actor.taken.wait()
        assert actor.session_id == new.session_id, "the next one is run"
    ended = rows.turns.get("default", taken.id)
    assert ended is not None
    assert ended.state == "cancelled"


async def test_an_actor_that_does_not_get_ready_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor()
    actor.die()
    killed: list[Actor] = []
    actors = RayActors(CONFIG)
    monkeypatch.setattr(actors, "_started", lambda _: actor)
    monkeypatch.setattr(ray, "kill", killed.append)
    with pytest.raises(ActorDiedError):
        await actors.launch("session:1")
    assert killed == [actor]


def test_actors_are_started_neither_on_spot_nodes_nor_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Class:
        def options(self, **options: Any) -> "Class":
            asked.update(options)
            return self

        def remote(self, _: Config) -> Actor:
            return Actor()

    monkeypatch.setattr(ray, "remote", lambda _: Class())
    RayActors(CONFIG)._started("session:1")
    assert asked["label_selector"] == NOT_SPOT | NOT_HEAD
    assert asked["num_cpus"] == 0


def test_what_an_actor_imports_is_little() -> None:
    """There may be very many."""
    large = ["torch", "transformers", "ray.serve", "vllm", "lancedb", "pyarrow", "pandas", "fastapi", "mcp", "alembic"]
    large += ["s3fs", "botocore", "aiohttp"]
    opened = "stack.artifacts.Artifacts('s3://bucket/artifacts', cache='/cache')"
    code = f"import sys, serve_apps.session_actor, stack.artifacts; {opened}; print(set({large}) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

"""What runs a turn is killed anywhere, and the turn goes on from its rows: as if nothing had been, and nothing twice.

A kill is at an await of whoever runs the turn, or before or behind a transaction of its journal, whose answer is lost.
"""

import asyncio
import itertools
import tempfile
from collections.abc import Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import SQLAlchemyError

from stack.agentic_system.events import Stream
from stack.agentic_system.history import History
from stack.agentic_system.replay import begun, whole
from stack.agentic_system.sessions import Event
from stack.agentic_system.tool_calls import UNKNOWN
from stack.agentic_system.turns import TurnRun
from stack.api import agentic_system as api
from stack.api.agentic_system import TurnState
from stack.store.turns import Journal, Turn, Turns
from tests.scripted_agents import Agents, Model, Tool, call, open_context, payload_of

Kill = tuple[Literal["await", "before", "behind"], int]
# As many as there are in the turn.
AWAITS, WRITES = 24, 8
SCANNER = {"shield_type": "code_scanner_guard"}
KINDS = [
    "shield_call", "inference", "tool_execution", "inference", "tool_execution", "inference", "shield_call",
]  # fmt: skip


class Killed(SQLAlchemyError):
    """The database is lost to the process."""


class Dying:
    """Awaits a coroutine, whose task is cancelled at its await of a number, from 0."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int | None) -> None:
        self._steps = coroutine.__await__()
        self._at = at
        self.awaits = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        go_on = partial(self._steps.send, None)
        while True:
            try:
                waiting = go_on()
            except StopIteration as ended:
                return ended.value
            if self.awaits == self._at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            self.awaits += 1
            try:
                yield waiting
                go_on = partial(self._steps.send, None)
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is the coroutine's
                go_on = partial(self._steps.throw, error)


async def awaited(dying: Dying) -> None:
    with suppress(asyncio.CancelledError):
        await dying


@contextmanager
def dying_journal(turns: Turns, kind: str, at: int) -> Iterator[None]:
    """The transaction of a number is not written, or is written and its answer is lost. None is written behind it."""
    count = itertools.count()
    journal = turns.journal

    @contextmanager
    def dying(turn: Turn) -> Iterator[Journal]:
        number = next(count)
        if number > at or (number == at and kind == "before"):
            raise Killed
        with journal(turn) as rows:
            yield rows
        if number == at:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "journal", dying)
        yield


class Reader:
    """A client that reads a turn's events, some of each life, and goes on behind the last one in the next."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def read(self, stream: Stream, most: int) -> None:
        async for event in stream.read(self.events[-1].id if self.events else None):
            assert event.id not in {one.id for one in self.events}, "an event comes once"
            self.events.append(event)
            most -= 1
            if not most:
                break

    def check(self, turn: api.Turn) -> None:
        """The events tell the whole turn, step by step, whatever was lost between."""
        payloads = [payload_of(event) for event in self.events]
        assert payloads[0]["event_type"] == "turn_start"
        assert payloads[-1]["event_type"] == "turn_complete"
        assert payloads[-1]["turn"] == turn.model_dump(mode="json", exclude_none=True)
        ended = [one["step_details"] for one in payloads if one["event_type"] == "step_complete"]
        assert ended == [step.model_dump(mode="json", exclude_none=True) for step in turn.steps]
        under_way = ""
        for payload in payloads:
            match payload["event_type"]:
                case "step_start":
                    under_way = payload["step_id"]
                case "step_progress":
                    assert payload["step_id"] == under_way
                case "step_complete":
                    assert payload["step_details"]["step_id"] == under_way


class Life:
    """A turn that pays twice and looks once, and is judged before and behind."""

    def __init__(self, agents: Agents, turn: Turn) -> None:
        self.agents = agents
        self.turn = turn
        self.reader = Reader()

    @property
    def turns(self) -> Turns:
        return self.agents.context.store.turns

    async def live(self, kill: Kill | None, reads: int) -> int:
        """One process takes the turn, and dies, or runs it to its end. Returns how often it has waited."""
        taken = self.turns.take(self.turn.id, "a process")
        assert taken is not None
        stream = begun(taken.id)
        run = TurnRun(self.agents.place, taken, stream, History(), {})
        reading = asyncio.ensure_future(self.reader.read(stream, reads))
        try:
            if kill is None or kill[0] == "await":
                dying = Dying(run.run(), kill[1] if kill else None)
                await asyncio.wait([asyncio.ensure_future(awaited(dying))])
                return dying.awaits
            with dying_journal(self.turns, *kill), suppress(Killed):
                await run.run()
            return 0
        finally:
            await asyncio.sleep(0)
            reading.cancel()
            (problem,) = await asyncio.gather(reading, return_exceptions=True)
            assert problem is None or isinstance(problem, asyncio.CancelledError), problem

    @property
    def has_ended(self) -> bool:
        turn = self.turns.get(self.turn.tenant, self.turn.id)
        assert turn is not None
        return turn.has_ended

    async def end(self) -> api.Turn:
        """The turn as it is shown; the reader has read the rest."""
        row = self.turns.get(self.turn.tenant, self.turn.id)
        assert row is not None
        await self.reader.read(whole(row, self.turns.steps_of([row.id]), self.turns.runs_of(row.id)), 1_000)
        return await self.agents.look(self.turn)


async def living(folder: Path, empty: Path, pay: Tool, look: Tool) -> Life:
    model = Model(
        call("pay", sum=1) + "\n" + call("look"), call("pay", sum=2), "All is paid."
    )  # fmt: skip
    file = folder / "stack.db"
    file.write_bytes(empty.read_bytes())
    agents = Agents(open_context(f"sqlite:///{file}", model), pay, look)
    shields = {"input_shields": [SCANNER | {"on_violation_action": 1}]}
    shields["output_shields"] = [SCANNER | {"on_violation_action": 2}]
    session = await agents.session(**shields)
    agents.sessions = Idle()  # type: ignore[assignment]
    return Life(agents, await agents.begin(session, "Pay!"))


class Idle:
    """Sessions that run nothing."""

    async def start(self, *_: Any) -> None:
        pass


def tools() -> tuple[Tool, Tool]:
    return Tool("pay", parameters={"sum": {"param_type": "int"}}), Tool("look", is_idempotent=True)


def check(turn: api.Turn, pay: Tool, look: Tool) -> None:
    """The turn is as it would have been, and nothing was paid twice."""
    assert turn.state == TurnState.completed, turn.error
    assert turn.output_message is not None
    assert turn.output_message.content == "All is paid."
    assert [step.step_type for step in turn.steps] == KINDS
    executed = [step for step in turn.steps if step.step_type == "tool_execution"]
    calls = [one for step in executed for one in step.tool_calls]
    said = {one.call_id: one.content for step in executed for one in step.tool_responses}
    assert [(str(one.tool_name), one.arguments) for one in calls] == [
        ("pay", {"sum": 1}), ("look", {}), ("pay", {"sum": 2})
    ]  # fmt: skip
    paid = [one.call_id for one in pay.called]
    assert len(set(paid)) == len(paid), "no side effect happens twice"
    for one in calls:
        if one.tool_name == "look":
            assert said[one.call_id] == "look says {}"
            assert any(call.call_id == one.call_id for call in look.called)
        elif said[one.call_id] != UNKNOWN:
            assert str(said[one.call_id]).startswith("pay says")
            assert one.call_id in paid
    assert set(paid) <= {one.call_id for one in calls}, "what was paid is told"


def run_through(home: Path, empty: Path, killed: Sequence[Kill], reads: int) -> None:
    """A turn of which one life after another is killed, and the last is not."""

    async def run() -> None:
        pay, look = tools()
        with tempfile.TemporaryDirectory(dir=home) as folder:
            life = await living(Path(folder), empty, pay, look)
            try:
                for kill in [*killed, None]:
                    if not life.has_ended:
                        await life.live(kill, reads)
                turn = await life.end()
                check(turn, pay, look)
                life.reader.check(turn)
            finally:
                life.agents.context.close()

    asyncio.run(run())


def test_a_turn_goes_on_wherever_it_is_killed(home: Path, new_sqlite_file: Path) -> None:
    for at in range(AWAITS):
        run_through(home, new_sqlite_file, [("await", at)], reads=1_000)
    for at in range(WRITES):
        run_through(home, new_sqlite_file, [("before", at)], reads=1_000)
        run_through(home, new_sqlite_file, [("behind", at)], reads=1_000)


kills = st.one_of(
    st.tuples(st.just("await"), st.integers(0, AWAITS)),
    st.tuples(st.sampled_from(("before", "behind")), st.integers(0, WRITES)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(kills, min_size=2, max_size=4), st.integers(1, 40))
def test_a_turn_goes_on_however_often_it_is_killed(
    home: Path, new_sqlite_file: Path, killed: list[Kill], reads: int
) -> None:
    run_through(home, new_sqlite_file, killed, reads)

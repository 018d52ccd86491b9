"""The journal of a turn: what is written together, and by whom."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stack.agentic_system.journal import Journal
from stack.api.agentic_system import StepType, TurnState
from stack.errors import Conflict
from stack.store import Store
from stack.store.turns import Journal as Transaction
from stack.store.turns import NewTurn, Turn, Turns


def taken(store: Store, owner: str = "one") -> Turn:
    """A turn of a session of an agent, taken by an owner."""
    agent = store.agents.add("default", {})
    session = store.agents.add_session("default", agent.id, "a session")
    assert session is not None
    request: dict[str, Any] = {"messages": [], "attachments": []}
    turn = store.turns.accept(NewTurn("default", agent.id, session.id, 1, request, {}), 1)
    assert isinstance(turn, Turn)
    return again(store, turn, owner)


def again(store: Store, turn: Turn, owner: str) -> Turn:
    found = store.turns.take(turn.id, owner)
    assert found is not None
    return found


async def test_what_waits_is_written_together_and_then_told(store: Store) -> None:
    journal = Journal(store, taken(store))
    told: list[str] = []
    journal.begin_step(StepType.inference, {"final": False})
    await journal.commit()
    journal.end_step({"model_response": {}}, {"tokens": 3})
    journal.then(lambda: told.append("ended"))
    journal.begin_step(StepType.tool_execution, {})
    journal.begin_runs(["c1", "c2"])
    journal.then(lambda: told.append("begun"))
    (step,) = store.turns.steps_of([journal.turn.id])
    assert not step.has_ended
    assert not told
    await journal.commit()
    assert told == ["ended", "begun"]
    assert store.turns.steps_of([journal.turn.id]) == journal.steps
    assert journal.steps[0].about == {"final": False, "tokens": 3, "epoch": 1}
    assert {run.call_id for run in store.turns.runs_of(journal.turn.id)} == {"c1", "c2"}


async def test_another_owner_reads_what_was_written_and_goes_on(store: Store) -> None:
    first = Journal(store, taken(store))
    first.begin_step(StepType.inference, {"final": False})
    await first.commit()
    second = Journal(store, again(store, first.turn, "two"))
    second.load()
    assert second.steps == first.steps
    step = second.begin_step(StepType.inference, {"final": True})
    assert (step.number, step.attempt, step.about) == (1, 2, {"final": False})
    await second.commit()
    assert store.turns.steps_of([first.turn.id]) == [step]


async def test_an_old_owner_can_write_nothing_more(store: Store) -> None:
    old = Journal(store, taken(store))
    old.begin_step(StepType.inference, {})
    await old.commit()
    new = Journal(store, again(store, old.turn, "two"))
    new.load()
    before = store.turns.steps_of([old.turn.id])
    told: list[str] = []
    for write in (
        lambda: old.end_step({"model_response": {}}, {}),
        lambda: old.complete({"content": "mine"}, []),
        lambda: old.fail({"code": "x", "message": "mine"}),
        old.cancel,
    ):
        write()
        old.then(lambda: told.append("it is true"))
        with pytest.raises(Conflict) as error:
            await old.commit()
        assert error.value.code == "superseded"
    assert store.turns.steps_of([old.turn.id]) == before
    assert not told
    turn = store.turns.get("default", old.turn.id)
    assert turn is not None
    assert (turn.state, turn.owner, turn.output_message) == (TurnState.running, "two", None)
    new.begin_step(StepType.inference, {})
    new.complete({"content": "mine"}, [])
    await new.commit()
    assert new.turn.state == TurnState.completed


async def test_the_owner_of_a_deleted_turn_can_write_nothing_more(store: Store) -> None:
    journal = Journal(store, taken(store))
    store.agents.delete_session("default", journal.turn.session_id)
    journal.begin_step(StepType.inference, {})
    with pytest.raises(Conflict) as error:
        await journal.commit()
    assert error.value.code == "superseded"


@contextmanager
def slow(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event, list[int]]]:
    """Transactions that wait: when the first has begun, until it may go on, and how many there were."""
    begun, is_free, count = threading.Event(), threading.Event(), [0]
    journal = turns.journal

    @contextmanager
    def waiting(turn: Turn) -> Iterator[Transaction]:
        count[0] += 1
        begun.set()
        assert is_free.wait(10)
        with journal(turn) as rows:
            yield rows

    with monkeypatch.context() as patch:
        patch.setattr(turns, "journal", waiting)
        try:
            yield begun, is_free, count
        finally:
            is_free.set()


async def test_a_commit_is_finished_though_it_is_cancelled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(store, taken(store))
    told: list[str] = []
    with slow(store.turns, monkeypatch) as (begun, is_free, _):
        journal.begin_step(StepType.inference, {})
        journal.then(lambda: told.append("begun"))
        commit = asyncio.ensure_future(journal.commit())
        await asyncio.to_thread(begun.wait, 10)
        commit.cancel()
        await asyncio.sleep(0)
        assert not commit.done()
        is_free.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
    assert told == ["begun"]
    assert store.turns.steps_of([journal.turn.id]) == journal.steps


async def test_what_comes_while_a_commit_is_under_way_is_one_commit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(store, taken(store))
    journal.begin_step(StepType.tool_execution, {})
    journal.begin_runs(["c0", "c1", "c2", "c3"])
    await journal.commit()
    with slow(store.turns, monkeypatch) as (begun, is_free, count):

        async def end(call_id: str) -> None:
            journal.end_run(call_id, {"content": call_id})
            await journal.commit()

        first = asyncio.ensure_future(end("c0"))
        await asyncio.to_thread(begun.wait, 10)
        others = [asyncio.ensure_future(end(one)) for one in ("c1", "c2", "c3")]
        await asyncio.sleep(0)
        is_free.set()
        await asyncio.gather(first, *others)
        assert count == [2]
    assert [run.response for run in store.turns.runs_of(journal.turn.id)] == [
        {"content": f"c{number}"} for number in range(4)
    ]

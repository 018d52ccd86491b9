"""The rows of agents, sessions and turns: who may write what, in which order, and what a deletion takes along."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from sqlalchemy import update

from stack.api.agentic_system import StepType, TurnState
from stack.errors import Conflict
from stack.store import MemoryBank, Store, now
from stack.store import clusters as clusters_module
from stack.store.clusters import HEARD_S
from stack.store.connection import past
from stack.store.schema import agent_sessions, agent_versions, agents, clusters, steps, tool_runs, turns
from stack.store.turns import APPROVED, DENIED, Journal, NewTurn, Refused, Step, Turn
from tests import threads

CONFIG = {"model": "small", "instructions": "Be brief."}
REQUEST = {"messages": [{"role": "user", "content": "a\0b \U0001f600"}], "attachments": []}
MOST = 1_000


def session_in(store: Store, tenant: str = "default") -> str:
    """The id of a new session of a new agent."""
    agent = store.agents.add(tenant, CONFIG)
    session = store.agents.add_session(tenant, agent.id, "talk")
    assert session is not None
    return session.id


def new_turn(store: Store, session_id: str, tenant: str = "default") -> NewTurn:
    session = store.agents.get_session(tenant, session_id)
    assert session is not None
    return NewTurn(tenant, session.agent_id, session_id, 1, REQUEST, CONFIG)


def accepted(store: Store, session_id: str, tenant: str = "default") -> Turn:
    turn = store.turns.accept(new_turn(store, session_id, tenant), MOST)
    assert isinstance(turn, Turn)
    return turn


def running(store: Store, session_id: str) -> Turn:
    turn = store.turns.take(accepted(store, session_id).id, "one")
    assert turn is not None
    return turn


def new_step(turn: Turn, number: int = 1, kind: StepType = StepType.tool_execution) -> Step:
    return Step(uuid.uuid4().hex, turn.id, number, kind.value, {"final": True}, 1, None, now(), None)


def begin(store: Store, turn: Turn, number: int = 1) -> Step:
    """A step of a turn, which is written down."""
    step = new_step(turn, number)
    with store.turns.journal(turn) as journal:
        journal.add_step(step)
    return step


def ask(store: Store, turn: Turn, *call_ids: str) -> Step:
    step = begin(store, turn)
    with store.turns.journal(turn) as journal:
        journal.ask_approval(step, call_ids)
    return step


def rows_in(store: Store) -> dict[str, int]:
    """How many rows there are of all that is an agent's."""
    tables = (agents, agent_versions, agent_sessions, turns, steps, tool_runs)
    with store.engine.connect() as connection:
        return {table.name: len(connection.execute(table.select()).all()) for table in tables}


# Agents and sessions


def test_an_agent_is_as_it_was_in_each_version(store: Store) -> None:
    agent = store.agents.add("default", CONFIG)
    changed = store.agents.add_version("default", agent.id, CONFIG | {"instructions": "Be long."})
    assert changed is not None
    assert changed.version == 2
    assert store.agents.get("default", agent.id) == changed
    first = store.agents.get("default", agent.id, 1)
    assert first is not None
    assert first.config == CONFIG
    assert store.agents.get("default", agent.id, 3) is None


def test_changes_at_once_are_versions_one_after_another(store: Store) -> None:
    agent = store.agents.add("default", CONFIG)
    change = partial(store.agents.add_version, "default", agent.id, CONFIG)
    versions = [one.version for one in threads.at_once(*[change] * 6) if one]
    assert sorted(versions) == [2, 3, 4, 5, 6, 7]


def test_what_is_anothers_is_not_there(store: Store) -> None:
    agent = store.agents.add("acme", CONFIG)
    session_id = session_in(store, "acme")
    turn = accepted(store, session_id, "acme")
    assert store.agents.get("default", agent.id) is None
    assert store.agents.find("default", agent.id) is None
    assert store.agents.add_version("default", agent.id, CONFIG) is None
    assert store.agents.delete("default", agent.id) is None
    assert store.agents.add_session("default", agent.id, "talk") is None
    assert store.agents.get_session("default", session_id) is None
    assert store.agents.delete_session("default", session_id) is None
    assert store.agents.page("default", None, 10) == []
    assert store.agents.page_of_sessions("default", agent.id, None, 10) == []
    assert store.turns.get("default", turn.id) is None
    assert store.turns.cancel("default", turn.id) is None
    mine = NewTurn("default", turn.agent_id, session_id, 1, REQUEST, CONFIG)
    assert store.turns.accept(mine, MOST) is Refused.gone
    assert rows_in(store)["turns"] == 1


def test_pages_go_through_all_newest_first(store: Store) -> None:
    made = [store.agents.add("default", CONFIG) for _ in range(5)]
    seen, after = list[str](), None
    while page := store.agents.page("default", after, 2):
        seen += [agent.id for agent in page]
        after = page[-1]
    assert seen == [one.id for one in sorted(made, key=lambda one: (one.created_at, one.id), reverse=True)]
    sessions = [store.agents.add_session("default", made[0].id, "talk") for _ in range(3)]
    first = store.agents.page_of_sessions("default", made[0].id, None, 2)
    rest = store.agents.page_of_sessions("default", made[0].id, first[-1], 2)
    assert {one.id for one in [*first, *rest]} == {one.id for one in sessions if one}
    assert len(first) == 2


def bank(tenant: str = "default", id: str = "bank-1") -> MemoryBank:
    return MemoryBank(id, tenant, "attachments", None, {"type": "keyword"}, None, bytes=0, created_at=now())


def test_a_session_is_given_one_bank_however_often(store: Store) -> None:
    session_id = session_in(store)
    assert store.agents.give_bank("nowhere", bank()) is None
    assert store.agents.give_bank(session_id, bank(tenant="acme")) is None
    given = threads.at_once(*(partial(store.agents.give_bank, session_id, bank(id=f"bank-{n}")) for n in range(4)))
    assert len(set(given)) == 1
    assert [one.id for one in store.memory_banks.page("default", None, 10)] == given[:1]
    session = store.agents.get_session("default", session_id)
    assert session is not None
    assert session.memory_bank_id == given[0]


def with_everything(store: Store, session_id: str) -> Turn:
    """A turn with steps, one of which has calls."""
    turn = running(store, session_id)
    step = begin(store, turn)
    with store.turns.journal(turn) as journal:
        journal.begin_runs(step, ["call-1", "call-2"])
    return turn


def test_a_deleted_session_takes_all_along_and_leaves_the_others(store: Store) -> None:
    gone, stays = session_in(store), session_in(store)
    turn, other = with_everything(store, gone), with_everything(store, stays)
    store.agents.give_bank(gone, bank(id="gone"))
    store.agents.give_bank(stays, bank(id="stays"))
    deleted = store.agents.delete_session("default", gone)
    assert deleted is not None
    assert deleted.memory_bank_id == "gone"
    assert rows_in(store) == dict(agents=2, agent_versions=2, agent_sessions=1, turns=1, steps=1, tool_runs=2)
    assert [one.id for one in store.memory_banks.page("default", None, 10)] == ["stays"]
    assert store.memory_banks.dropped() == [("gone", "default")]
    with pytest.raises(Conflict) as refused:
        begin(store, turn, 2)
    assert refused.value.code == "superseded"
    begin(store, other, 2)


def test_a_deleted_agent_takes_its_sessions_along(store: Store) -> None:
    agent = store.agents.add("default", CONFIG)
    sessions = [store.agents.add_session("default", agent.id, "talk") for _ in range(2)]
    for session in sessions:
        assert session is not None
        with_everything(store, session.id)
    idle = store.agents.add_session("default", agent.id, "talk")
    assert idle is not None
    write_in(store, with_everything(store, idle.id), ENDS["completed"])
    with_everything(store, session_in(store))
    busy = store.agents.delete("default", agent.id)
    assert busy == sorted(one.id for one in sessions if one), "where nothing runs, nothing is to end"
    assert rows_in(store) == dict(agents=1, agent_versions=1, agent_sessions=1, turns=1, steps=1, tool_runs=2)


def test_a_session_that_is_deleted_while_it_is_used_breaks_nothing(store: Store) -> None:
    session_id = session_in(store)
    turn = running(store, session_id)

    def write() -> None:
        for number in range(1, 20):
            try:
                begin(store, turn, number)
            except Conflict:
                return

    def accept() -> None:
        new = NewTurn("default", turn.agent_id, session_id, 1, REQUEST, CONFIG)
        while store.turns.accept(new, MOST) is not Refused.gone:
            pass

    def drop() -> None:
        assert store.agents.delete_session("default", session_id) is not None

    threads.at_once(write, accept, drop)
    assert rows_in(store) == dict(agents=1, agent_versions=1, agent_sessions=0, turns=0, steps=0, tool_runs=0)


# Accepting


def test_a_turn_is_read_as_it_was_written(store: Store) -> None:
    turn = accepted(store, session_in(store))
    assert store.turns.get("default", turn.id) == turn
    assert (turn.number, turn.state, turn.epoch, turn.request) == (1, "queued", 0, REQUEST)


def test_turns_at_once_are_numbered_one_after_another(store: Store) -> None:
    session_id = session_in(store)
    found = threads.at_once(*[partial(accepted, store, session_id)] * 6)
    assert sorted(turn.number for turn in found) == [1, 2, 3, 4, 5, 6]
    assert [turn.number for turn in store.turns.of_session(session_id)] == [1, 2, 3, 4, 5, 6]
    last = store.turns.last_of(session_id)
    assert last is not None
    assert last.number == 6


def test_no_more_than_most_turns_wait_however_many_come_at_once(store: Store) -> None:
    session_id = session_in(store)
    new = new_turn(store, session_id)
    found = threads.at_once(*[lambda: store.turns.accept(new, 3)] * 6)
    assert sum(one is Refused.full for one in found) == 3
    first = store.turns.next_of(session_id)
    assert first is not None
    store.turns.cancel("default", first.id)
    assert isinstance(store.turns.accept(new, 3), Turn)


def test_a_turn_behind_another_than_the_last_is_refused(store: Store) -> None:
    session_id = session_in(store)
    new = new_turn(store, session_id)
    assert isinstance(store.turns.accept(new, MOST, behind=0), Turn)
    assert store.turns.accept(new, MOST, behind=0) is Refused.moved
    assert isinstance(store.turns.accept(new, MOST, behind=1), Turn)


def test_some_turns_of_a_session(store: Store) -> None:
    session_id, other = session_in(store), session_in(store)
    mine = [accepted(store, session_id) for _ in range(3)]
    foreign = accepted(store, other)
    found = store.turns.of_session(session_id, [mine[2].id, mine[0].id, foreign.id])
    assert found == [mine[0], mine[2]]
    assert store.turns.of_session(session_id, []) == []


# The journal


def test_steps_are_written_before_and_after(store: Store) -> None:
    turn = running(store, session_in(store))
    assert turn.started_at is not None
    step = begin(store, turn)
    assert store.turns.steps_of([turn.id]) == [step]
    ended = replace(step, details={"model_response": {"content": "a\0"}}, completed_at=now())
    with store.turns.journal(turn) as journal:
        journal.save_step(ended)
    assert store.turns.steps_of([turn.id]) == [ended]
    assert (step.has_ended, ended.has_ended) == (False, True)
    assert store.turns.step(turn.id, step.id) == ended
    assert store.turns.step("another", step.id) is None
    with store.turns.journal(turn) as journal:
        done = journal.complete({"content": "a"}, [{"content": "b", "mime_type": "text/plain"}])
    assert store.turns.get("default", turn.id) == done
    assert (done.state, done.has_ended) == ("completed", True)


def test_runs_are_written_before_and_after(store: Store) -> None:
    turn = running(store, session_in(store))
    step = begin(store, turn)
    with store.turns.journal(turn) as journal:
        journal.begin_runs(step, ["b", "a"])
        journal.end_run(step, "a", {"content": "4"})
    first, second = store.turns.runs_of(turn.id)
    assert (first.call_id, first.response, second.call_id, second.response) == ("a", {"content": "4"}, "b", None)
    assert first.began_at
    assert first.ended_at
    assert second.began_at
    assert not second.ended_at
    with store.turns.journal(turn) as journal:
        journal.begin_runs(step, ["b"])
        journal.end_run(step, "b", {"content": "5"})
    assert [run.response for run in store.turns.runs_of(turn.id)] == [{"content": "4"}, {"content": "5"}]


def test_what_one_transaction_writes_is_written_together_or_not_at_all(store: Store) -> None:
    turn = running(store, session_in(store))
    step = new_step(turn)

    def write_and_fail() -> None:
        with store.turns.journal(turn) as journal:
            journal.add_step(step)
            raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        write_and_fail()
    assert store.turns.steps_of([turn.id]) == []


def write_all(store: Store, turn: Turn) -> list[Callable[[Journal], Any]]:
    """All that an owner can write."""
    step = begin(store, turn)
    return [
        lambda journal: journal.add_step(new_step(turn, 2)),
        lambda journal: journal.save_step(replace(step, attempt=2)),
        lambda journal: journal.begin_runs(step, ["a"]),
        lambda journal: journal.end_run(step, "a", {}),
        lambda journal: journal.ask_approval(step, ["a"]),
        *ENDS.values(),
    ]


ENDS: dict[str, Callable[[Journal], Any]] = {
    "completed": lambda journal: journal.complete({"content": "a"}),
    "failed": lambda journal: journal.fail({"code": "away", "message": "The model is away."}),
    "cancelled": lambda journal: journal.cancelled(),
}


def write_in(store: Store, turn: Turn, write: Callable[[Journal], Any]) -> None:
    with store.turns.journal(turn) as journal:
        write(journal)


def test_an_owner_that_was_given_up_can_write_nothing_more(store: Store) -> None:
    turn = running(store, session_in(store))
    of_first = write_all(store, turn)
    second = store.turns.take(turn.id, "two")
    assert second is not None
    assert (second.epoch, second.owner, second.started_at) == (2, "two", turn.started_at)
    before = rows_in(store), store.turns.get("default", turn.id), store.turns.steps_of([turn.id])
    for write in of_first:
        with pytest.raises(Conflict) as refused:
            write_in(store, turn, write)
        assert refused.value.code == "superseded"
    assert (rows_in(store), store.turns.get("default", turn.id), store.turns.steps_of([turn.id])) == before
    write_in(store, second, ENDS["completed"])


@pytest.mark.parametrize("state", ENDS)
def test_a_turn_that_has_ended_is_not_written_any_more(store: Store, state: str) -> None:
    turn = running(store, session_in(store))
    every = write_all(store, turn)
    write_in(store, turn, ENDS[state])
    for write in every:
        with pytest.raises(Conflict):
            write_in(store, turn, write)
    assert store.turns.take(turn.id, "two") is None
    found = store.turns.get("default", turn.id)
    assert found is not None
    assert (found.state, found.has_ended) == (state, True)


def test_of_owners_that_take_a_turn_at_once_one_has_it(store: Store) -> None:
    turn = accepted(store, session_in(store))
    owners = threads.at_once(*(partial(store.turns.take, turn.id, f"owner-{n}") for n in range(5)))
    assert sorted(one.epoch for one in owners if one) == [1, 2, 3, 4, 5]

    def begins(owner: Turn) -> bool:
        try:
            begin(store, owner)
        except Conflict:
            return False
        return True

    assert [owner.epoch for owner in owners if owner and begins(owner)] == [5]


def test_the_turns_before_one_that_are_complete_or_have_run_tools(store: Store) -> None:
    session_id = session_in(store)
    turns_there = []
    for state in ("completed", "failed", "completed", "completed"):
        turn = with_everything(store, session_id)
        if state == "failed":
            with store.turns.journal(turn) as journal:
                journal.end_run(store.turns.steps_of([turn.id])[0], "call-1", {"content": "done", "attachments": []})
        write_in(store, turn, ENDS[state])
        turns_there.append(turn.id)
    write_in(store, running(store, session_id), ENDS["failed"])  # it has done nothing
    last = accepted(store, session_id)
    found = store.turns.ended_before(last, 2)
    assert [[step.turn_id for step in one.steps] for one in found] == [[one] for one in turns_there[2:]]
    found = store.turns.ended_before(last, 10)
    assert [[step.turn_id for step in one.steps] for one in found] == [[one] for one in turns_there]
    assert [one.output_message is None for one in found] == [False, True, False, False]
    assert [one.outcomes for one in found] == [{}, {"call-1": "done", "call-2": None}, {}, {}]
    assert found[0].messages == last.request["messages"]


def test_how_large_the_turns_of_a_session_are(store: Store) -> None:
    session_id = session_in(store)
    assert store.turns.size_of(session_id) == 0
    first, second = (with_everything(store, session_id) for _ in range(2))
    before = store.turns.size_of(session_id)
    with store.turns.journal(first) as journal:
        (step,) = store.turns.steps_of([first.id])
        journal.save_step(replace(step, details={"said": "x" * 1_000}))
    assert 1_000 < store.turns.size_of(session_id) - before < 1_100
    assert store.turns.size_of(session_id, [second.id]) < before


# What is due


def test_a_session_is_due_with_its_first_turn(store: Store) -> None:
    first, second = session_in(store), session_in(store, "acme")
    session_in(store)  # idle
    mine = [accepted(store, first) for _ in range(2)]
    theirs = accepted(store, second, "acme")
    due = {one.session_id: one for one in store.turns.due()}
    assert {key: (one.tenant, one.turn_id, one.state, one.owner) for key, one in due.items()} == {
        first: ("default", mine[0].id, "queued", None),
        second: ("acme", theirs.id, "queued", None),
    }
    turn = store.turns.take(mine[0].id, "one")
    assert turn is not None
    assert ("running", "one") in {(one.state, one.owner) for one in store.turns.due()}
    write_in(store, turn, ENDS["completed"])
    store.turns.cancel("acme", theirs.id)
    assert [one.turn_id for one in store.turns.due()] == [mine[1].id]
    first_left = store.turns.next_of(first)
    assert first_left is not None
    assert first_left.id == mine[1].id


def test_a_session_that_awaits_approval_is_not_due(store: Store) -> None:
    session_id = session_in(store)
    turn = running(store, session_id)
    ask(store, turn, "a")
    accepted(store, session_id)
    assert store.turns.due() == []
    assert store.turns.take(turn.id, "two") is None
    first_left = store.turns.next_of(session_id)
    assert first_left is not None
    assert first_left.id == turn.id


# Two clusters by one database


def fall_silent(store: Store, cluster: str) -> None:
    with store.engine.begin() as connection:
        silent = update(clusters).where(clusters.c.id == cluster).values(told_at=past(HEARD_S + 1))
        connection.execute(silent)


def test_clusters_live_as_long_as_they_say_so(store: Store) -> None:
    for cluster in ("old", "new", "old"):
        store.clusters.tell(cluster)
    assert store.clusters.others("new") == {"old"}
    assert store.clusters.others(None) == {"old", "new"}
    fall_silent(store, "old")
    assert store.clusters.others("new") == set()
    store.clusters.tell("old")
    assert store.clusters.others("new") == {"old"}


def test_a_cluster_that_is_silent_for_long_is_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.clusters.tell("old")
    fall_silent(store, "old")
    monkeypatch.setattr(clusters_module, "KEPT_S", HEARD_S)
    store.clusters.tell("new")
    with store.engine.connect() as connection:
        assert [row.id for row in connection.execute(clusters.select())] == ["new"]


def test_a_turn_that_another_living_cluster_runs_is_left_to_it(store: Store) -> None:
    session_id = session_in(store)
    turn = accepted(store, session_id)
    store.clusters.tell("old")
    assert store.turns.due("new") == [], "it is about to be run by the cluster that has accepted it"
    with store.engine.begin() as connection:
        connection.execute(update(turns).values(accepted_at=past(HEARD_S + 1)))
    assert [one.turn_id for one in store.turns.due("new")] == [turn.id], "nobody has"
    assert not store.turns.is_elsewhere(session_id, "new")
    taken = store.turns.take(turn.id, "one@old")
    assert taken is not None
    for owner in ("one@new", "a process"):
        with pytest.raises(Conflict) as refused:
            store.turns.take(turn.id, owner)
        assert refused.value.code == "superseded"
    assert store.turns.is_elsewhere(session_id, "new")
    assert store.turns.due("new") == []
    begin(store, taken)

    # Whoever is of the same cluster knows whether the owner lives.
    assert not store.turns.is_elsewhere(session_id, "old")
    assert [one.turn_id for one in store.turns.due("old")] == [turn.id]
    again = store.turns.take(turn.id, "two@old")
    assert again is not None
    assert again.epoch == 2

    fall_silent(store, "old")
    assert not store.turns.is_elsewhere(session_id, "new")
    assert [one.turn_id for one in store.turns.due("new")] == [turn.id]
    last = store.turns.take(turn.id, "one@new")
    assert last is not None
    assert last.epoch == 3


def test_a_turn_that_was_approved_is_run_by_any_cluster(store: Store) -> None:
    session_id = session_in(store)
    store.clusters.tell("old")
    turn = store.turns.take(accepted(store, session_id).id, "one@old")
    assert turn is not None
    ask(store, turn, "a")
    store.turns.approve("default", turn.id, {"a": True})
    assert not store.turns.is_elsewhere(session_id, "new")
    assert [one.turn_id for one in store.turns.due("new")] == [turn.id]
    assert store.turns.take(turn.id, "one@new") is not None


# Cancelling and approving


def test_a_turn_that_waits_is_cancelled_at_once(store: Store) -> None:
    turn = accepted(store, session_in(store))
    assert store.turns.cancel("default", turn.id) == TurnState.cancelled
    found = store.turns.get("default", turn.id)
    assert found is not None
    assert found.state == "cancelled"
    assert found.completed_at
    assert store.turns.take(turn.id, "one") is None
    assert store.turns.cancel("default", turn.id) == TurnState.cancelled
    assert store.turns.get("default", turn.id) == found


def test_a_turn_that_runs_is_told_to_end(store: Store) -> None:
    turn = running(store, session_in(store))
    assert store.turns.cancel("default", turn.id) == TurnState.running
    found = store.turns.get("default", turn.id)
    assert found is not None
    assert found.cancelled_at
    assert not found.completed_at
    again = store.turns.take(turn.id, "two")
    assert again is not None
    assert again.cancelled_at, "whoever takes it over knows"
    write_in(store, again, ENDS["cancelled"])
    assert store.turns.cancel("default", turn.id) == TurnState.cancelled


def test_a_turn_goes_on_when_all_its_calls_are_decided(store: Store) -> None:
    turn = running(store, session_in(store))
    assert store.turns.approve("default", turn.id, {"a": True}) is None
    step = ask(store, turn, "a", "b")
    assert store.turns.approve("acme", turn.id, {"a": True}) is None
    assert store.turns.approve("default", turn.id, {"a": True, "nothing": True}) == TurnState.awaiting_approval
    # What is decided stays so.
    assert store.turns.approve("default", turn.id, {"a": False}) == TurnState.awaiting_approval
    assert store.turns.approve("default", turn.id, {"b": False}) == TurnState.queued
    assert store.turns.approve("default", turn.id, {"b": True}) is None
    assert [(run.call_id, run.approval, run.began_at) for run in store.turns.runs_of(turn.id)] == [
        ("a", APPROVED, None),
        ("b", DENIED, None),
    ]
    again = store.turns.take(turn.id, "two")
    assert again is not None
    write_in(store, again, lambda journal: journal.begin_runs(step, ["a"]))
    assert [run.approval for run in store.turns.runs_of(turn.id)] == [APPROVED, DENIED]


def test_a_turn_that_awaits_approval_can_be_cancelled(store: Store) -> None:
    turn = running(store, session_in(store))
    ask(store, turn, "a")
    assert store.turns.cancel("default", turn.id) == TurnState.cancelled
    assert store.turns.approve("default", turn.id, {"a": True}) is None


def test_turns_whose_approval_does_not_come_end(store: Store) -> None:
    waits, runs = running(store, session_in(store)), running(store, session_in(store))
    ask(store, waits, "a")
    begin(store, runs)
    assert store.turns.end_unanswered(100) == []
    assert store.turns.end_unanswered(-100) == [waits.id]
    ended = store.turns.get("default", waits.id)
    assert ended is not None
    assert ended.completed_at
    assert (ended.state, ended.cancelled_at) == (TurnState.cancelled, ended.completed_at)
    assert store.turns.approve("default", waits.id, {"a": True}) is None
    again = store.turns.get("default", runs.id)
    assert again is not None
    assert again.state == TurnState.running

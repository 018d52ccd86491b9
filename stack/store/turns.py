"""The rows of turns and of their steps: the journal, by which a turn goes on where it was, whoever runs it.

A turn is run by the owner that took it last; that of another living cluster (stack/store/clusters.py) is left to it.
Each `take` raises the turn's epoch, and whatever an owner writes is written only while the epoch is still its own: one
that was given up for dead and lives on can write nothing more. It finds that out by the error Conflict with the code
"superseded"; so it does where the turn was deleted.
"""

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Text, cast, exists, func, insert, select, update

from stack.api.agentic_system import TurnState
from stack.errors import Conflict
from stack.store.clusters import HEARD_S, cluster_of, others
from stack.store.connection import now, past, writing
from stack.store.schema import agent_sessions, steps, tool_runs, turns

UNFINISHED = (TurnState.queued, TurnState.running, TurnState.awaiting_approval)
# What the approval of a call is.
ASKED, APPROVED, DENIED = "asked", "approved", "denied"
_GLIMPSE = (turns.c.id, turns.c.number, turns.c.state, turns.c.owner, turns.c.output_message)


@dataclass(frozen=True, slots=True)
class Turn:
    """A row of `turns`. `request` holds `messages` and `attachments`; `config` is the AgentConfig that it runs with."""

    id: str
    tenant: str
    agent_id: str
    session_id: str
    number: int
    agent_version: int
    request: dict[str, Any]
    config: dict[str, Any]
    state: str
    epoch: int
    owner: str | None
    accepted_at: str
    started_at: str | None
    cancelled_at: str | None
    completed_at: str | None
    output_message: dict[str, Any] | None
    output_attachments: list[dict[str, Any]]
    error: dict[str, Any] | None

    @property
    def has_ended(self) -> bool:
        return self.state not in UNFINISHED


@dataclass(frozen=True, slots=True)
class NewTurn:
    """What is known of a turn when it is accepted."""

    tenant: str
    agent_id: str
    session_id: str
    agent_version: int
    request: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """A row of `steps`. It has `details` once it has ended: the step's own fields, as the wire type has them."""

    id: str
    turn_id: str
    number: int
    kind: str
    about: dict[str, Any]
    attempt: int
    details: dict[str, Any] | None
    started_at: str
    completed_at: str | None

    @property
    def has_ended(self) -> bool:
        return self.completed_at is not None


@dataclass(frozen=True, slots=True)
class ToolRun:
    """A row of `tool_runs`: what is known of a call. `response` is what it gave."""

    step_id: str
    call_id: str
    began_at: str | None
    ended_at: str | None
    response: dict[str, Any] | None
    approval: str | None


@dataclass(frozen=True, slots=True)
class Glimpse:
    """Of a row of `turns`, what is little."""

    id: str
    number: int
    state: str
    owner: str | None
    output_message: dict[str, Any] | None

    @property
    def has_ended(self) -> bool:
        return self.state not in UNFINISHED


@dataclass(frozen=True, slots=True)
class Before:
    """A turn that has ended, as much as those after it are told: what was asked, its steps, and its answer.

    One that is not complete has no answer. Then `outcomes` has of each call that had begun what it gave, as far as that
    is known.
    """

    messages: list[dict[str, Any]]
    steps: list[Step]
    output_message: dict[str, Any] | None
    outcomes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Due:
    """A session that has something to run: the first of its turns that have not ended, and who has taken it last."""

    tenant: str
    session_id: str
    turn_id: str
    state: str
    owner: str | None


class Refused(StrEnum):
    """Why a turn is not accepted: its session is not there, has got another turn meanwhile, or has its fill."""

    gone = "gone"
    moved = "moved"
    full = "full"


class Turns:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # Accepting, looking up, cancelling, approving

    def accept(self, new: NewTurn, most: int, behind: int | None = None) -> Turn | Refused:
        """Adds a turn to the end of a session, of whose turns no more than `most` may be unfinished by that.

        If `behind` is given, the last turn of the session must be that one.
        """
        with writing(self._engine) as connection:
            mine = (agent_sessions.c.tenant == new.tenant) & (agent_sessions.c.id == new.session_id)
            last = connection.execute(select(agent_sessions.c.turns).where(mine).with_for_update()).scalar()
            if last is None:
                return Refused.gone
            if behind not in (None, last):
                return Refused.moved
            if _unfinished(connection, new.session_id) >= most:
                return Refused.full
            turn = Turn(
                id=uuid.uuid4().hex, **asdict(new), number=last + 1, state=TurnState.queued.value, epoch=0, owner=None,
                accepted_at=now(), started_at=None, cancelled_at=None, completed_at=None, output_message=None,
                output_attachments=[], error=None,
            )  # fmt: skip
            connection.execute(insert(turns).values(**asdict(turn)))
            connection.execute(update(agent_sessions).where(mine).values(turns=turn.number))
        return turn

    def get(self, tenant: str, id: str) -> Turn | None:
        query = select(turns).where(turns.c.tenant == tenant, turns.c.id == id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return Turn(**found) if found else None

    def last_of(self, session_id: str) -> Glimpse | None:
        """The turn of a session that was accepted last."""
        query = select(*_GLIMPSE).where(turns.c.session_id == session_id).order_by(turns.c.number.desc()).limit(1)
        with self._engine.connect() as connection:
            found = connection.execute(query).first()
        return Glimpse(*found) if found else None

    def of_session(self, session_id: str, ids: Collection[str] | None = None) -> list[Turn]:
        """The turns of a session, or some of them, in their order."""
        query = select(turns).where(turns.c.session_id == session_id).order_by(turns.c.number)
        if ids is not None:
            query = query.where(turns.c.id.in_(ids))
        with self._engine.connect() as connection:
            return [Turn(**row) for row in connection.execute(query).mappings()]

    def size_of(self, session_id: str, ids: Collection[str] | None = None) -> int:
        """About how many characters the turns of `of_session` have, with their steps."""
        mine = turns.c.session_id == session_id
        if ids is not None:
            mine &= turns.c.id.in_(ids)
        columns = (turns.c.request, turns.c.output_message, turns.c.output_attachments)
        own = select(*(func.sum(_length(column)) for column in columns)).where(mine)
        details = select(func.sum(_length(steps.c.details))).where(steps.c.turn_id.in_(select(turns.c.id).where(mine)))
        with self._engine.connect() as connection:
            sizes = [*connection.execute(own).one(), connection.execute(details).scalar()]
        return sum(int(size) for size in sizes if size is not None)

    def steps_of(self, turn_ids: Collection[str]) -> list[Step]:
        """The steps of turns, in their order within each."""
        query = select(steps).where(steps.c.turn_id.in_(turn_ids)).order_by(steps.c.turn_id, steps.c.number)
        with self._engine.connect() as connection:
            return [Step(**row) for row in connection.execute(query).mappings()]

    def ended_before(self, turn: Turn, most: int) -> list[Before]:
        """The last turns of a session before one of it, at most so many, in their order: those that are complete, and
        those that were broken off and had begun to run tools."""
        run = select(tool_runs.c.call_id).join(steps, steps.c.id == tool_runs.c.step_id)
        has_run = run.where(steps.c.turn_id == turns.c.id, tool_runs.c.began_at.is_not(None)).exists()
        is_complete = turns.c.state == TurnState.completed
        is_broken_off = turns.c.state.in_((TurnState.failed, TurnState.cancelled)) & has_run
        query = select(turns.c.id, turns.c.output_message)
        query = query.where(turns.c.session_id == turn.session_id, turns.c.number < turn.number)
        query = query.where(is_complete | is_broken_off).order_by(turns.c.number.desc()).limit(most)
        with self._engine.connect() as connection:
            found = connection.execute(query).all()
            # One by one, as there may be large attachments beside the messages.
            requests = (select(turns.c.request).where(turns.c.id == one.id) for one in found)
            messages = [connection.execute(one).scalar_one()["messages"] for one in requests]
        steps_by_turn: dict[str, list[Step]] = {one.id: [] for one in found}
        for step in self.steps_of(steps_by_turn):
            steps_by_turn[step.turn_id].append(step)
        outcomes = self._outcomes([one.id for one in found if one.output_message is None])
        return [
            Before(its, steps_by_turn[one.id], one.output_message, outcomes.get(one.id, {}))
            for one, its in zip(reversed(found), reversed(messages), strict=True)
        ]

    def _outcomes(self, turn_ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """What the calls of turns that had begun have told; None for those of which it is not known."""
        query = select(steps.c.turn_id, tool_runs.c.call_id, tool_runs.c.response).join(
            steps, steps.c.id == tool_runs.c.step_id
        )
        query = query.where(steps.c.turn_id.in_(turn_ids), tool_runs.c.began_at.is_not(None))
        outcomes: dict[str, dict[str, Any]] = {}
        with self._engine.connect() as connection:
            for turn_id, call_id, response in connection.execute(query):
                outcomes.setdefault(turn_id, {})[call_id] = response["content"] if response is not None else None
        return outcomes

    def step(self, turn_id: str, id: str) -> Step | None:
        query = select(steps).where(steps.c.turn_id == turn_id, steps.c.id == id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return Step(**found) if found else None

    def runs_of(self, turn_id: str) -> list[ToolRun]:
        """What is known of the calls of a turn."""
        query = select(tool_runs).join(steps, steps.c.id == tool_runs.c.step_id).where(steps.c.turn_id == turn_id)
        query = query.order_by(steps.c.number, tool_runs.c.call_id)
        with self._engine.connect() as connection:
            return [ToolRun(**row) for row in connection.execute(query).mappings()]

    def cancel(self, tenant: str, id: str) -> TurnState | None:
        """Ends a turn that nobody runs, and notes for one that is run that it is to end; None if it is not there.

        Returns the state that it is in by that: one that is run stays `running` until its owner has stopped.
        """
        with writing(self._engine) as connection:
            query = select(turns.c.state).where(turns.c.tenant == tenant, turns.c.id == id).with_for_update()
            state = connection.execute(query).scalar()
            if state is None:
                return None
            time = now()
            if state == TurnState.running:
                _write(connection, id, cancelled_at=time)
            elif state in UNFINISHED:
                state = TurnState.cancelled
                _write(connection, id, state=state.value, cancelled_at=time, completed_at=time)
            return TurnState(state)

    def withdraw(self, tenant: str, id: str) -> bool:
        """Cancels a turn that nobody has taken yet; False for one that was."""
        mine = (turns.c.tenant == tenant) & (turns.c.id == id) & (turns.c.state == TurnState.queued)
        time = now()
        ended = dict(state=TurnState.cancelled.value, cancelled_at=time, completed_at=time)
        with writing(self._engine) as connection:
            done = connection.execute(update(turns).where(mine, turns.c.epoch == 0).values(**ended))
        return done.rowcount > 0

    def approve(self, tenant: str, id: str, approvals: Mapping[str, bool]) -> TurnState | None:
        """Writes down what the client says of calls that await it; once all are decided, the turn is queued again.

        Returns the turn's state then; None if it does not await anything (any more).
        """
        with writing(self._engine) as connection:
            query = select(turns.c.state).where(turns.c.tenant == tenant, turns.c.id == id).with_for_update()
            if connection.execute(query).scalar() != TurnState.awaiting_approval:
                return None
            of_turn = tool_runs.c.step_id.in_(select(steps.c.id).where(steps.c.turn_id == id))
            awaited = of_turn & (tool_runs.c.approval == ASKED)
            for decision in (True, False):
                calls = [call_id for call_id, is_approved in approvals.items() if is_approved is decision]
                decided = update(tool_runs).where(awaited, tool_runs.c.call_id.in_(calls))
                connection.execute(decided.values(approval=APPROVED if decision else DENIED))
            if connection.execute(select(tool_runs.c.call_id).where(awaited).limit(1)).first() is not None:
                return TurnState.awaiting_approval
            _write(connection, id, state=TurnState.queued.value)
            return TurnState.queued

    def end_unanswered(self, seconds: float) -> list[str]:
        """Ends turns that have awaited approval for so long, cancelled. Returns their ids."""
        asked_since = exists().where(steps.c.turn_id == turns.c.id, steps.c.started_at >= past(seconds))
        query = select(turns.c.id).where(turns.c.state == TurnState.awaiting_approval, ~asked_since)
        with self._engine.connect() as connection:  # there are none as a rule: nobody is kept from writing by looking
            if connection.execute(query.limit(1)).first() is None:
                return []
        with writing(self._engine) as connection:
            ids = list(connection.execute(query.order_by(turns.c.id).with_for_update()).scalars())
            time = now()
            for turn_id in ids:
                _write(connection, turn_id, state=TurnState.cancelled.value, cancelled_at=time, completed_at=time)
        return ids

    # What whoever runs turns does

    def due(self, cluster: str | None = None) -> list[Due]:
        """The sessions of all tenants that have a turn to be run, or one that is run.

        Where another cluster than this one lives, those that it runs are left out, and those whose turn was accepted
        just now: the cluster that has accepted it has the keys that came with it, and may need a while to begin.
        """
        first = select(turns.c.session_id, func.min(turns.c.number).label("number"))
        first_of = first.where(turns.c.state.in_(UNFINISHED)).group_by(turns.c.session_id).subquery()
        query = select(turns.c.tenant, turns.c.session_id, turns.c.id, turns.c.state, turns.c.owner)
        query = query.add_columns(turns.c.epoch, turns.c.accepted_at)
        same = (first_of.c.session_id == turns.c.session_id) & (first_of.c.number == turns.c.number)
        query = query.join(first_of, same).where(turns.c.state != TurnState.awaiting_approval)
        with self._engine.connect() as connection:
            found = connection.execute(query.order_by(turns.c.accepted_at, turns.c.id)).all()
            living = others(connection, cluster)
        lately = past(HEARD_S)
        return [
            Due(*row[:5])
            for row in found
            if not _is_run_by(living, row.state, row.owner)
            and not (living and row.epoch == 0 and row.accepted_at >= lately)
        ]

    def next_of(self, session_id: str) -> Glimpse | None:
        """The first turn of a session that has not ended."""
        query = select(*_GLIMPSE).where(turns.c.state.in_(UNFINISHED), turns.c.session_id == session_id)
        with self._engine.connect() as connection:
            found = connection.execute(query.order_by(turns.c.number).limit(1)).first()
        return Glimpse(*found) if found else None

    def owner_of(self, session_id: str) -> str | None:
        """Who has taken the first turn of a session that has not ended, if anybody has."""
        query = select(turns.c.owner).where(turns.c.state.in_(UNFINISHED), turns.c.session_id == session_id)
        with self._engine.connect() as connection:
            return connection.execute(query.order_by(turns.c.number).limit(1)).scalar()

    def is_elsewhere(self, session_id: str, cluster: str) -> bool:
        """Whether the first turn of a session that has not ended is run by another living cluster than this one."""
        first = self.next_of(session_id)
        if first is None or first.owner is None:
            return False
        with self._engine.connect() as connection:
            return _is_run_by(others(connection, cluster), first.state, first.owner)

    def take(self, id: str, owner: str) -> Turn | None:
        """queued or running -> running, by a new owner; None if the turn has ended, awaits approval, or is gone.

        Raises Conflict with the code "superseded" where it is run by another living cluster than the owner's.
        """
        with writing(self._engine) as connection:
            query = select(turns).where(turns.c.id == id).with_for_update()
            found = connection.execute(query).mappings().first()
            if found is None or found["state"] not in (TurnState.queued, TurnState.running):
                return None
            if _is_run_by(others(connection, cluster_of(owner)), found["state"], found["owner"]):
                raise Conflict(f"the turn {id!r} is run by another cluster", code="superseded")
            taken: dict[str, Any] = dict(state=TurnState.running.value, epoch=found["epoch"] + 1, owner=owner)
            taken["started_at"] = found["started_at"] or now()
            _write(connection, id, **taken)
        return Turn(**{**found, **taken})

    @contextmanager
    def journal(self, turn: Turn) -> Iterator["Journal"]:
        """A transaction in the journal of a turn, which is run by the owner that `turn` was taken by.

        Raises Conflict with the code "superseded" where it is not any more: then nothing is written.
        """
        with writing(self._engine) as connection:
            query = select(turns.c.epoch, turns.c.state, turns.c.cancelled_at).where(turns.c.id == turn.id)
            query = query.with_for_update()
            found = connection.execute(query).first()
            if found is None or (found.epoch, found.state) != (turn.epoch, TurnState.running):
                raise Conflict(f"the turn {turn.id!r} is not run from here any more", code="superseded")
            yield Journal(connection, turn, is_to_end=found.cancelled_at is not None)


class Journal:
    """What a turn's owner writes in one transaction: the end of a step and the beginning of the next, say.

    `is_to_end` says that the turn's end was asked for.
    """

    def __init__(self, connection: Connection, turn: Turn, *, is_to_end: bool) -> None:
        self._connection = connection
        self._turn = turn
        self.is_to_end = is_to_end

    def add_step(self, step: Step) -> None:
        """A step begins for the first time."""
        self._connection.execute(insert(steps).values(**asdict(step)))

    def save_step(self, step: Step) -> None:
        """A step that is there begins again, or has ended, or has other details."""
        values = dict(
            attempt=step.attempt, about=step.about, details=step.details, started_at=step.started_at,
            completed_at=step.completed_at,
        )  # fmt: skip
        self._connection.execute(update(steps).where(steps.c.id == step.id).values(**values))

    def begin_runs(self, step: Step, call_ids: Sequence[str]) -> None:
        """Calls begin, the first time or again."""
        query = select(tool_runs.c.call_id).where(tool_runs.c.step_id == step.id, tool_runs.c.call_id.in_(call_ids))
        known = set(self._connection.execute(query).scalars())
        began_at = now()
        if known:
            again = update(tool_runs).where(tool_runs.c.step_id == step.id, tool_runs.c.call_id.in_(known))
            self._connection.execute(again.values(began_at=began_at))
        rows = [dict(step_id=step.id, call_id=one, began_at=began_at) for one in call_ids if one not in known]
        if rows:
            self._connection.execute(insert(tool_runs), rows)

    def end_run(self, step: Step, call_id: str, response: dict[str, Any]) -> None:
        """What a call has given."""
        mine = (tool_runs.c.step_id == step.id) & (tool_runs.c.call_id == call_id)
        self._connection.execute(update(tool_runs).where(mine).values(ended_at=now(), response=response))

    def ask_approval(self, step: Step, call_ids: Sequence[str]) -> Turn:
        """running -> awaiting_approval: the client is to say of these calls of a step whether they are run."""
        rows = [dict(step_id=step.id, call_id=call_id, approval=ASKED) for call_id in call_ids]
        self._connection.execute(insert(tool_runs), rows)
        return self._set(state=TurnState.awaiting_approval.value)

    def complete(self, output_message: dict[str, Any], output_attachments: Sequence[dict[str, Any]] = ()) -> Turn:
        """running -> completed."""
        return self._end(
            TurnState.completed, output_message=output_message, output_attachments=list(output_attachments)
        )

    def fail(self, error: dict[str, Any]) -> Turn:
        """running -> failed. `error` holds `code` and `message`."""
        return self._end(TurnState.failed, error=error)

    def cancelled(self) -> Turn:
        """running -> cancelled, once what the owner did has stopped."""
        return self._end(TurnState.cancelled)

    def _end(self, state: TurnState, **values: Any) -> Turn:
        return self._set(state=state.value, completed_at=now(), **values)

    def _set(self, **values: Any) -> Turn:
        _write(self._connection, self._turn.id, **values)
        return replace(self._turn, **values)


def _is_run_by(living: Collection[str], state: str, owner: str | None) -> bool:
    """Whether a turn of this state and owner is run by one of these clusters."""
    return state == TurnState.running and cluster_of(owner) in living


def _unfinished(connection: Connection, session_id: str) -> int:
    query = select(func.count()).select_from(turns)
    query = query.where(turns.c.state.in_(UNFINISHED), turns.c.session_id == session_id)
    return int(connection.execute(query).scalar_one())


def _length(column: ColumnElement[Any]) -> ColumnElement[int]:
    return func.length(cast(column, Text))


def _write(connection: Connection, id: str, **values: Any) -> None:
    connection.execute(update(turns).where(turns.c.id == id).values(**values))

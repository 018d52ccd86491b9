"""Sessions that run turns in this process, by a script: as the real ones they write rows, but ask no model."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from stack.agentic_system.events import event
from stack.agentic_system.sessions import Event
from stack.agentic_system.shown import awaited, shown_step, shown_turn
from stack.api.agentic_system import (
    AgenticSystemTurnResponseAwaitingApprovalPayload,
    AgenticSystemTurnResponseStepCompletePayload,
    AgenticSystemTurnResponseStepProgressPayload,
    AgenticSystemTurnResponseStepStartPayload,
    AgenticSystemTurnResponseTurnCompletePayload,
    AgenticSystemTurnResponseTurnStartPayload,
    StepType,
    TurnState,
)
from stack.api.messages import CompletionMessage, ToolCall
from stack.context import Context
from stack.errors import BadInput, StackError
from stack.store import Store, now
from stack.store.turns import Step, Turn

TEXT = "Paris"


class ScriptedSessions:
    """Each turn has one step, in which the model says TEXT, and has the `calls`, which are left to the client.

    Those of `approval` await it. With `holds` turns stay queued until `run`. `fault` is what a turn fails by.
    """

    def __init__(self) -> None:
        self.calls: Sequence[ToolCall] = ()
        self.holds = False
        self.cannot_start: StackError | None = None
        self.fault: StackError | None = None
        self.started: list[tuple[str, Mapping[str, str]]] = []
        self.gone_on: list[tuple[str, Mapping[str, str]]] = []
        self.cancelled: list[str] = []
        self.ended: list[str] = []
        self.watched = asyncio.Event()  # set once somebody waits for what is still to come
        self.left: list[str] = []  # the turns whose events were left before their end

    async def start(self, context: Context, turn: Turn, keys: Mapping[str, str]) -> None:
        self.started.append((turn.id, keys))
        if self.cannot_start is not None:
            raise self.cannot_start
        if not self.holds:
            await asyncio.to_thread(self.run, context.store, turn.id)

    async def go_on(self, context: Context, turn_id: str, keys: Mapping[str, str]) -> None:
        self.gone_on.append((turn_id, keys))
        await asyncio.to_thread(self._complete, context.store, turn_id)

    async def cancel(self, context: Context, turn_id: str) -> None:
        self.cancelled.append(turn_id)

    async def end(self, context: Context, session_id: str) -> None:
        self.ended.append(session_id)

    async def events(self, context: Context, turn_id: str, after: str | None = None) -> AsyncGenerator[Event]:
        events = await asyncio.to_thread(self._events, context, turn_id)
        ids = [event.id for event in events]
        if after is not None and after not in ids:
            raise BadInput(f"the turn has no event {after!r}", param="after")
        for one in events[ids.index(after) + 1 if after is not None else 0 :]:
            yield one
        turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
        assert turn is not None
        if turn.error is not None:
            raise StackError(turn.error["message"], code=turn.error["code"])
        if turn.state in (TurnState.queued, TurnState.running):
            self.watched.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.left.append(turn_id)

    def run(self, store: Store, turn_id: str) -> None:
        turn = store.turns.take(turn_id, "the script")
        assert turn is not None
        message = CompletionMessage(content=TEXT, tool_calls=list(self.calls)).model_dump(mode="json")
        with store.turns.journal(turn) as journal:
            journal.add_step(_step(turn, 1, StepType.inference, {"model_response": message}))
            if self.fault is not None:
                journal.fail({"code": self.fault.code, "message": self.fault.message})
            elif asked := [call.call_id for call in self.calls if call.tool_name in turn.config["approval"]]:
                step = _step(turn, 2, StepType.tool_execution, None)
                journal.add_step(step)
                journal.ask_approval(step, asked)
            else:
                journal.complete(message)

    def _complete(self, store: Store, turn_id: str) -> None:
        turn = store.turns.take(turn_id, "the script, again")
        assert turn is not None
        with store.turns.journal(turn) as journal:
            journal.complete(CompletionMessage(content=TEXT).model_dump(mode="json"))

    def _events(self, context: Context, turn_id: str) -> list[Event]:
        """Those that have been."""
        turn, kind = context.store.turns.get(context.tenant, turn_id), StepType.inference
        assert turn is not None
        steps, runs = context.store.turns.steps_of([turn_id]), context.store.turns.runs_of(turn_id)
        events = [_event("start", AgenticSystemTurnResponseTurnStartPayload(turn_id=turn_id))]
        for step in steps[:1]:
            begun = AgenticSystemTurnResponseStepStartPayload(step_type=kind, step_id=step.id)
            said = AgenticSystemTurnResponseStepProgressPayload(
                step_type=kind, step_id=step.id, model_response_text_delta=TEXT
            )
            ended = AgenticSystemTurnResponseStepCompletePayload(step_type=kind, step_details=shown_step(step))
            events += [_event("1.1.0", begun), _event("1.1.1", said), _event("1.end", ended)]
        if turn.state == TurnState.awaiting_approval:
            calls = awaited([shown_step(step) for step in steps if step.has_ended], runs)
            asked = AgenticSystemTurnResponseAwaitingApprovalPayload(turn_id=turn_id, tool_calls=calls)
            events.append(_event("2.approval", asked))
        if turn.state == TurnState.completed:
            done = AgenticSystemTurnResponseTurnCompletePayload(turn=shown_turn(turn, steps, runs))
            events.append(_event("end", done))
        return events


def _event(place: str, payload: BaseModel) -> Event:
    return event(place, payload.model_dump(mode="json", exclude_none=True))


def _step(turn: Turn, number: int, kind: StepType, details: dict[str, Any] | None) -> Step:
    """A step that has ended, if it has details."""
    return Step(uuid.uuid4().hex, turn.id, number, kind.value, {}, 1, details, now(), now() if details else None)

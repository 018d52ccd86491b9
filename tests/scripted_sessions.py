"""Sessions that run turns in this process, by a script: as the real ones they write rows, but ask no model."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

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
from stack.store import Store
from stack.store.turns import Turn

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
        for event in events[ids.index(after) + 1 if after is not None else 0 :]:
            yield event
        turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
        assert turn is not None
        if turn.error is not None:
            raise StackError(turn.error["message"], code=turn.error["code"])
        try:
            await asyncio.Event().wait() if turn.state in (TurnState.queued, TurnState.running) else None
        finally:
            self.left += [] if turn.has_ended else [turn_id]

    def run(self, store: Store, turn_id: str) -> None:
        turn = store.turns.take(turn_id, "the script")
        assert turn is not None
        step = store.turns.begin_step(turn, 1, StepType.inference, {})
        message = CompletionMessage(content=TEXT, tool_calls=list(self.calls))
        store.turns.end_step(turn, step, {"model_response": message.model_dump(mode="json")})
        if self.fault is not None:
            store.turns.fail(turn, {"code": self.fault.code, "message": self.fault.message})
        elif asked := [call.call_id for call in self.calls if call.tool_name in turn.config["approval"]]:
            step = store.turns.begin_step(turn, 2, StepType.tool_execution, {})
            store.turns.ask_approval(turn, step, asked)
        else:
            store.turns.complete(turn, message.model_dump(mode="json"))

    def _complete(self, store: Store, turn_id: str) -> None:
        turn = store.turns.take(turn_id, "the script, again")
        assert turn is not None
        store.turns.complete(turn, CompletionMessage(content=TEXT).model_dump(mode="json"))

    def _events(self, context: Context, turn_id: str) -> list[Event]:
        """Those that have been."""
        turn, kind = context.store.turns.get(context.tenant, turn_id), StepType.inference
        assert turn is not None
        steps, runs = context.store.turns.steps_of([turn_id]), context.store.turns.runs_of(turn_id)
        events = [Event("start", AgenticSystemTurnResponseTurnStartPayload(turn_id=turn_id))]
        for step in steps[:1]:
            about = dict(step_type=kind, step_id=step.id)
            events += [
                Event("1.1.0", AgenticSystemTurnResponseStepStartPayload.model_validate(about)),
                Event(
                    "1.1.1",
                    AgenticSystemTurnResponseStepProgressPayload.model_validate(
                        about | {"model_response_text_delta": TEXT}
                    ),
                ),
                Event(
                    "1.end",
                    AgenticSystemTurnResponseStepCompletePayload(step_type=kind, step_details=shown_step(step)),
                ),
            ]
        if turn.state == TurnState.awaiting_approval:
            calls = awaited([shown_step(step) for step in steps if step.has_ended], runs)
            asked = AgenticSystemTurnResponseAwaitingApprovalPayload(turn_id=turn_id, tool_calls=calls)
            events.append(Event("asked", asked))
        if turn.state == TurnState.completed:
            done = AgenticSystemTurnResponseTurnCompletePayload(turn=shown_turn(turn, steps, runs))
            events.append(Event("end", done))
        return events

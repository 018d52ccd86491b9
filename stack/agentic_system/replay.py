"""A turn's events made from its rows: of a turn that has ended, that awaits approval, or that goes on elsewhere."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stack import errors
from stack.agentic_system.events import Progress, Stream, awaiting, started
from stack.agentic_system.shown import awaited, shown_step, shown_turn
from stack.api.agentic_system import TurnState
from stack.context import Context
from stack.errors import Conflict, NotFound, StackError
from stack.store.turns import Step, ToolRun, Turn

_ERRORS = (
    errors.BadInput, errors.ShieldViolation, errors.NotFound, errors.Conflict, errors.TooLarge, errors.TooManyRequests,
    errors.EngineFailed, errors.Unavailable, errors.StorageFull,
)  # fmt: skip
_BY_CODE: Mapping[str, type[StackError]] = {one.code: one for one in _ERRORS}


def retell(stream: Stream, steps: Iterable[Step], *, with_progress: bool = False) -> None:
    """Puts the events of a turn's steps that have ended into its stream, which has nothing but its start.

    With progress, what a step has told bit by bit is one event of each text and call. It is not for turns that go on:
    an answer that no shield has judged yet would be told.
    """
    for step in steps:
        if step.has_ended:
            progress = Progress(stream, step.number, step.attempt, step.kind, step.id)
            progress.begin()
            details = details_of(step)
            if with_progress:
                _tell_progress(progress, details)
            progress.end(details)
    stream.retold()


def _tell_progress(progress: Progress, details: dict[str, Any]) -> None:
    if (said := details.get("model_response")) is not None:
        if isinstance(said["content"], str):
            progress.model_text(said["content"])
        for call in said["tool_calls"]:
            progress.call(call, "success")
    for response in details.get("tool_responses", ()):
        if isinstance(response["content"], str):
            progress.tool_text(response["call_id"], response["content"])


def whole(turn: Turn, steps: Sequence[Step], runs: Iterable[ToolRun]) -> Stream:
    """The stream of a turn that nobody runs: it has ended, or awaits approval.

    A reader may come this late to a turn that was fast, and must not miss what it says.
    """
    stream = begun(turn.id)
    retell(stream, steps, with_progress=True)
    if turn.state == TurnState.awaiting_approval:
        calls = awaited([shown_step(step) for step in steps if step.has_ended], runs)
        tell_awaiting(stream, turn.id, steps[-1].number, [one.model_dump(mode="json") for one in calls])
    else:
        tell_end(stream, turn, steps)
    return stream


async def found(context: Context, turn_id: str) -> Turn:
    """The row of a turn. Raises NotFound."""
    turn = await asyncio.to_thread(context.store.turns.get, context.tenant, turn_id)
    if turn is None:
        raise NotFound(f"there is no turn with the id {turn_id!r}", param="turn_id")
    return turn


async def retold(context: Context, turn: Turn) -> Stream:
    """The same as `whole`, of what the rows say. A turn can be large: it is made in a thread."""
    turns = context.store.turns
    return await asyncio.to_thread(lambda: whole(turn, turns.steps_of([turn.id]), turns.runs_of(turn.id)))


def begun(turn_id: str) -> Stream:
    stream = Stream()
    stream.put("start", started(turn_id))
    return stream


def tell_awaiting(stream: Stream, turn_id: str, step: int, calls: list[dict[str, Any]]) -> None:
    stream.put(f"{step}.approval", awaiting(turn_id, calls))
    stream.leave()


def tell_end(stream: Stream, turn: Turn, steps: Sequence[Step], error: StackError | None = None) -> None:
    """The end of a turn: an event where it is complete, else an error, the one that it failed by or one like it."""
    if turn.state == TurnState.completed:
        told = shown_turn(turn, steps).model_dump(mode="json", exclude_none=True)
        stream.put("end", {"event_type": "turn_complete", "turn": told})
    stream.finish(error or error_of(turn))


def error_of(turn: Turn) -> StackError | None:
    """What the readers of an ended turn's events are told in the place of its end, if it is not complete."""
    if turn.state == TurnState.cancelled:
        return Conflict("the turn was cancelled", code="cancelled")
    if turn.error is None:
        return None
    kind = _BY_CODE.get(turn.error["code"], StackError)
    return kind(turn.error["message"], code=turn.error["code"])


def details_of(step: Step) -> dict[str, Any]:
    """A step that has ended as its wire type has it, as JSON."""
    assert step.details is not None, "the step has not ended"
    return {
        "step_type": step.kind,
        "turn_id": step.turn_id,
        "step_id": step.id,
        "started_at": step.started_at,
        "completed_at": step.completed_at,
        **step.details,
    }

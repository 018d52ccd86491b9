"""Rows of turns and steps as the API shows them."""

from collections.abc import Iterable, Sequence

from pydantic import TypeAdapter

from stack.api import agentic_system as api
from stack.api.messages import ToolCall
from stack.store.turns import ASKED, Step, ToolRun, Turn

_STEP: TypeAdapter[api.Step] = TypeAdapter(api.Step)


def shown_step(step: Step) -> api.Step:
    """A step that has ended."""
    assert step.details is not None, "the step has not ended"
    return _STEP.validate_python(
        {
            **step.details,
            "step_type": step.kind,
            "turn_id": step.turn_id,
            "step_id": step.id,
            "started_at": step.started_at,
            "completed_at": step.completed_at,
        }
    )


def shown_turn(turn: Turn, steps: Iterable[Step], runs: Iterable[ToolRun] = ()) -> api.Turn:
    """A turn with those of its steps that have ended, and of its calls those that await the client's approval."""
    ended = [shown_step(step) for step in steps if step.has_ended]
    return api.Turn.model_validate(
        {
            "turn_id": turn.id,
            "session_id": turn.session_id,
            "input_messages": turn.request["messages"],
            "steps": ended,
            "output_message": turn.output_message,
            "output_attachments": turn.output_attachments,
            "started_at": turn.started_at or turn.accepted_at,
            "completed_at": turn.completed_at,
            "state": turn.state,
            "agent_version": turn.agent_version,
            "error": turn.error,
            "awaiting": awaited(ended, runs),
        }
    )


def awaited(steps: Sequence[api.Step], runs: Iterable[ToolRun]) -> list[ToolCall]:
    """The calls that the client is to approve of: some of those of the last answer of the model."""
    asked = {run.call_id for run in runs if run.approval == ASKED}
    answers = [step for step in steps if isinstance(step, api.InferenceStep)]
    return [call for call in answers[-1].model_response.tool_calls if call.call_id in asked] if answers else []

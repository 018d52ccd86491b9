"""How turns come about: what a client asks of a session, checked, written down, and handed on to where it is run."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from stack.agentic_system import agents
from stack.agentic_system.checks import require_fitting, require_runnable, require_tools
from stack.agentic_system.sessions import Event, Sessions
from stack.api import agentic_system as api
from stack.api.agent_tools import names_of
from stack.api.agentic_system import (
    MAX_TURNS,
    AgentConfig,
    AgenticSystemTurnCreateRequest,
    ApproveTurnRequest,
    CancelTurnRequest,
    TurnState,
    TurnStateResponse,
)
from stack.api.messages import CompletionMessage, ToolCall, ToolResponseMessage
from stack.context import Context
from stack.errors import BadInput, Conflict, StackError, TooManyRequests
from stack.safety import require_shields
from stack.store.turns import ASKED, Glimpse, NewTurn, Refused, Turn

# What a turn can have in the place of its agent's.
OVERRIDES = (
    "instructions", "sampling_params", "tools", "tool_choice", "tool_prompt_format", "input_shields", "output_shields",
    "approval",
)  # fmt: skip
# Of these, what takes the place of the agent's only where there is something in it.
UNLESS_EMPTY = ("tools", "input_shields", "output_shields")


async def create_turn(
    context: Context, sessions: Sessions, request: AgenticSystemTurnCreateRequest, keys: Mapping[str, str]
) -> Turn:
    """Accepts a turn, which is run from then on, whether anybody watches it or not. `keys` are secrets for its tools.

    Raises NotFound for an unknown agent or session, BadInput for messages that do not fit the session and overrides
    that cannot be used, Conflict for a turn that would have to wait and shall not, TooManyRequests where too many wait
    already, and Unavailable where it cannot be run: then nobody runs it later either.
    """
    await require_runnable(context.config.agents, request.tools or [], "tools")
    turn = await asyncio.to_thread(accept, context, request)
    try:
        await sessions.start(context, turn, keys)
    except StackError:
        # What was told in spite of the error may have taken the turn: then it is run, and must not be asked for again.
        if await asyncio.to_thread(context.store.turns.withdraw, context.tenant, turn.id):
            raise
    return turn


def accept(context: Context, request: AgenticSystemTurnCreateRequest) -> Turn:
    """The row of a new turn, which nobody is told of. Raises as `create_turn` does, but for tools that cannot run."""
    session = agents.find_session(context, request.agent_id, request.session_id)
    if session.turns >= MAX_TURNS:
        raise Conflict(f"the session has {MAX_TURNS} turns, the most that one can have", code="session_full")
    agent = agents.find(context, request.agent_id)
    config = _merged(context, AgentConfig.model_validate(agent.config), request)
    most = context.config.agents.max_queued_turns + 1 if request.wait else 1
    dumped = request.model_dump(mode="json", include={"messages", "attachments"})
    dumped["attachments"] = dumped["attachments"] or []
    new = NewTurn(
        context.tenant, request.agent_id, request.session_id, agent.version, dumped, config.model_dump(mode="json")
    )
    while True:
        behind = _require_fitting_messages(context, request)
        match context.store.turns.accept(new, most, behind):
            case Turn() as turn:
                return turn
            case Refused.gone:
                agents.find_session(context, request.agent_id, request.session_id)  # which raises NotFound
            case Refused.full:
                raise _full(request, most)
            case Refused.moved:
                pass  # another turn was accepted meanwhile: its messages may answer the same calls


async def whole_turn(context: Context, sessions: Sessions, turn: Turn) -> api.Turn:
    """A turn once it has ended, or awaits approval. Raises StackError if it has failed or was cancelled."""
    async with aclosing(sessions.events(context, turn.id)) as events:
        async for _ in events:
            pass
    return await asyncio.to_thread(agents.get_turn, context, turn.agent_id, turn.id)


async def turn_events(
    context: Context, sessions: Sessions, agent_id: str, turn_id: str, after: str | None
) -> AsyncGenerator[Event]:
    """The events of a turn behind the one with the id `after`, to its end. Raises NotFound."""
    turn = await asyncio.to_thread(agents.find_turn, context, agent_id, turn_id)
    return sessions.events(context, turn.id, after)


async def cancel_turn(context: Context, sessions: Sessions, request: CancelTurnRequest) -> TurnStateResponse:
    """Ends a turn. One that is run stays `running` until all that it does has stopped. Raises NotFound."""
    await asyncio.to_thread(agents.find_turn, context, request.agent_id, request.turn_id)
    state = await asyncio.to_thread(context.store.turns.cancel, context.tenant, request.turn_id)
    if state is None:
        raise agents.no_turn(request.agent_id, request.turn_id)
    if state in (TurnState.running, TurnState.cancelled):
        await sessions.cancel(context, request.turn_id)
    return TurnStateResponse(turn_id=request.turn_id, state=state)


async def approve_turn(
    context: Context, sessions: Sessions, request: ApproveTurnRequest, keys: Mapping[str, str]
) -> TurnStateResponse:
    """Decides about calls that a turn awaits; when all are decided, it goes on.

    Raises NotFound, Conflict for a turn that awaits nothing, and BadInput for calls that it does not await.
    """
    state = await asyncio.to_thread(_approve, context, request)
    if state != TurnState.awaiting_approval:
        await sessions.go_on(context, request.turn_id, keys)
    return TurnStateResponse(turn_id=request.turn_id, state=state)


def _approve(context: Context, request: ApproveTurnRequest) -> TurnState:
    turn = agents.find_turn(context, request.agent_id, request.turn_id)
    awaited = [run.call_id for run in context.store.turns.runs_of(turn.id) if run.approval == ASKED]
    if turn.state == TurnState.awaiting_approval:
        for call_id in request.approvals:
            if call_id not in awaited:
                raise BadInput(
                    f"the turn does not await approval of a call {call_id!r}; it awaits: {', '.join(awaited)}",
                    param=f"approvals.{call_id}",
                )
        if state := context.store.turns.approve(context.tenant, turn.id, request.approvals):
            return state
    raise Conflict(f"the turn {turn.id!r} does not await approval; it is {_state_of(context, turn)}", param="turn_id")


def _state_of(context: Context, turn: Turn) -> str:
    now = context.store.turns.get(context.tenant, turn.id)
    return now.state if now is not None else "deleted"


def _merged(context: Context, config: AgentConfig, request: AgenticSystemTurnCreateRequest) -> AgentConfig:
    """The agent's config with what the request has in its place, of which that is checked."""
    given = {field: value for field in OVERRIDES if (value := getattr(request, field)) is not None}
    given = {field: value for field, value in given.items() if value or field not in UNLESS_EMPTY}
    if not given:
        return config
    require_tools(context, request.tools or [], "tools")
    require_shields(context, request.input_shields or [], "input_shields")
    require_shields(context, request.output_shields or [], "output_shields")
    merged = config.model_copy(update=given)
    if "tools" in given and "approval" not in given:  # the agent's, of those tools that there still are
        names = {name for tool in merged.tools for name in names_of(tool)}
        merged = merged.model_copy(update={"approval": [name for name in merged.approval if name in names]})
    require_fitting(merged, "")
    return merged


def _require_fitting_messages(context: Context, request: AgenticSystemTurnCreateRequest) -> int | None:
    """The number of the session's last turn, if the messages answer calls of it; None if they answer none.

    Raises BadInput for an answer to a call that is not open, and for two to one.
    """
    messages = request.messages
    answers = [message for message in messages if isinstance(message, ToolResponseMessage)]
    for at, message in enumerate(messages[len(answers) :], len(answers)):
        if isinstance(message, ToolResponseMessage):
            raise BadInput(
                "a tool response stands behind a user message; allowed: first the responses, then what the user says",
                param=f"messages.{at}",
            )
    if not answers:
        return None
    last = context.store.turns.last_of(request.session_id)
    if last is not None and not last.has_ended:
        raise Conflict(
            f"the turn {last.id!r} is {last.state}; calls of tools can be answered when it has ended",
            param="messages.0",
        )
    open_calls = _open_calls(last)
    for at, answer in enumerate(answers):
        _require_open(answer, open_calls, at, answers[:at])
    return last.number if last is not None else 0


def _require_open(
    answer: ToolResponseMessage, open_calls: Mapping[str, ToolCall], at: int, before: list[ToolResponseMessage]
) -> None:
    call = open_calls.get(answer.call_id)
    if any(other.call_id == answer.call_id for other in before):
        raise BadInput(f"the call {answer.call_id!r} is answered twice; allowed: once", param=f"messages.{at}.call_id")
    if call is None:
        known = ", ".join(open_calls) or "none"
        raise BadInput(
            f"there is no open call {answer.call_id!r} in the session's last turn; there are: {known}",
            param=f"messages.{at}.call_id",
            code="no_such_call",
        )
    if str(answer.tool_name) != str(call.tool_name):
        raise BadInput(
            f"tool_name is {str(answer.tool_name)!r}; the call {answer.call_id!r} is of {str(call.tool_name)!r}",
            param=f"messages.{at}.tool_name",
        )


def _open_calls(turn: Glimpse | None) -> dict[str, ToolCall]:
    """The calls that a turn has left to the client, by their ids."""
    if turn is None or turn.output_message is None:
        return {}
    return {call.call_id: call for call in CompletionMessage.model_validate(turn.output_message).tool_calls}


def _full(request: AgenticSystemTurnCreateRequest, most: int) -> StackError:
    session = f"the session {request.session_id!r}"
    if not request.wait:
        return Conflict(f"{session} has a turn that has not ended; with `wait` this one would wait", code="busy")
    return TooManyRequests(f"{most} turns of {session} have not ended; allowed: {most}")

"""The agentic system: agents, sessions, and turns, whose events are streamed."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import TypeAdapter

from serve_apps.routes.common import ContextOf, answer_to, event_stream, kept_alive, needs, streams
from stack.agentic_system import accepting, agents
from stack.agentic_system.sessions import Event, Sessions
from stack.api.agentic_system import (
    AgentEntry,
    AgenticSystemCreateResponse,
    AgenticSystemSessionCreateResponse,
    AgenticSystemStepResponse,
    AgenticSystemTurnCreateRequest,
    AgenticSystemTurnResponseStreamChunk,
    AgentVersion,
    ApproveTurnRequest,
    CancelTurnRequest,
    CreateAgenticSystemRequest,
    CreateAgenticSystemSessionRequest,
    DeleteAgenticSystemRequest,
    DeleteAgenticSystemSessionRequest,
    GetAgenticSystemSessionRequest,
    Session,
    SessionEntry,
    Turn,
    TurnStateResponse,
    UpdateAgenticSystemRequest,
)
from stack.api.wire import at_most
from stack.errors import BadInput

router = APIRouter(prefix="/agentic_system", tags=["agentic system"], dependencies=[needs("agents")])

MAX_PROVIDER_DATA = 16 * 2**10
_KEYS: TypeAdapter[dict[str, str]] = TypeAdapter(Annotated[dict[str, str], at_most(100)])

OwnId = Annotated[str, Query(max_length=100)]
After = Annotated[str | None, Query(max_length=100, description="the id of the last one of the page before")]
Limit = Annotated[int, Query(ge=1, le=1_000)]
Version = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="the newest, where it is not given")]
AfterEvent = Annotated[str | None, Query(max_length=100, description="the id of the last event that was received")]
LastEventId = Annotated[str | None, Header(max_length=100)]


def _sessions(request: Request) -> Sessions:
    sessions: Sessions = request.app.state.sessions
    return sessions


SessionsOf = Annotated[Sessions, Depends(_sessions)]


def _keys(x_llamastack_providerdata: Annotated[str | None, Header()] = None) -> dict[str, str]:
    """The secrets that a request brings for tools, by name. No error shows any of them, and nothing keeps them."""
    if x_llamastack_providerdata is None:
        return {}
    if len(x_llamastack_providerdata) > MAX_PROVIDER_DATA:
        raise BadInput(
            f"the header X-LlamaStack-ProviderData has {len(x_llamastack_providerdata)} characters; allowed: at most "
            f"{MAX_PROVIDER_DATA}"
        )
    try:
        return _KEYS.validate_python(json.loads(x_llamastack_providerdata), strict=True)
    except (ValueError, RecursionError):
        raise BadInput(
            "the header X-LlamaStack-ProviderData is not what it should be; allowed: a JSON object of at most 100 "
            "names and texts"
        ) from None


KeysOf = Annotated[dict[str, str], Depends(_keys)]


@router.post("/create")
async def create(context: ContextOf, body: CreateAgenticSystemRequest) -> AgenticSystemCreateResponse:
    """Makes an agent. Its id is made here."""
    return AgenticSystemCreateResponse(agent_id=await agents.create(context, body.agent_config))


@router.post("/update", response_model_exclude_none=True)
async def update(context: ContextOf, body: UpdateAgenticSystemRequest) -> AgentVersion:
    """Gives an agent another config, for the turns that are accepted from now on."""
    return await agents.update(context, body)


@router.get("/get", response_model_exclude_none=True)
def get(context: ContextOf, agent_id: OwnId, version: Version = None) -> AgentVersion:
    """An agent, as it is or as it was in a version."""
    return agents.get(context, agent_id, version)


@router.get("/list")
def list_agents(context: ContextOf, after: After = None, limit: Limit = 100) -> list[AgentEntry]:
    """Agents, newest first, a page at a time."""
    return agents.page(context, after, limit)


@router.post("/delete")
async def delete(context: ContextOf, sessions: SessionsOf, body: DeleteAgenticSystemRequest) -> None:
    """Deletes an agent with its sessions, and ends what runs in them."""
    await agents.delete(context, sessions, body.agent_id)


@router.post("/session/create")
def create_session(context: ContextOf, body: CreateAgenticSystemSessionRequest) -> AgenticSystemSessionCreateResponse:
    """Makes a session of an agent. Its id is made here."""
    return AgenticSystemSessionCreateResponse(session_id=agents.create_session(context, body))


@router.post("/session/get", response_model_exclude_none=True)
def get_session(
    context: ContextOf, agent_id: OwnId, session_id: OwnId, body: GetAgenticSystemSessionRequest | None = None
) -> Session:
    """A session with its turns, or with those that are asked for."""
    return agents.get_session(context, agent_id, session_id, body or GetAgenticSystemSessionRequest())


@router.get("/session/list")
def list_sessions(context: ContextOf, agent_id: OwnId, after: After = None, limit: Limit = 100) -> list[SessionEntry]:
    """The sessions of an agent, newest first, a page at a time."""
    return agents.page_of_sessions(context, agent_id, after, limit)


@router.post("/session/delete")
async def delete_session(context: ContextOf, sessions: SessionsOf, body: DeleteAgenticSystemSessionRequest) -> None:
    """Deletes a session with its turns and its memory bank, and ends what runs in it."""
    await agents.delete_session(context, sessions, body.agent_id, body.session_id)


@router.post(
    "/turn/create",
    response_model=Turn | AgenticSystemTurnResponseStreamChunk,
    responses=streams(AgenticSystemTurnResponseStreamChunk),
)
async def create_turn(
    request: Request, context: ContextOf, sessions: SessionsOf, keys: KeysOf, body: AgenticSystemTurnCreateRequest
) -> Response:
    """Has an agent answer in a session; with `stream`, as server-sent events. A client that leaves does not end it."""
    turn = await accepting.create_turn(context, sessions, body, keys)
    if body.stream:
        return event_stream(request, kept_alive(_as_events(sessions.events(context, turn.id))))
    return await answer_to(request, accepting.whole_turn(context, sessions, turn))


@router.get("/turn/get", response_model_exclude_none=True)
def get_turn(context: ContextOf, agent_id: OwnId, turn_id: OwnId) -> Turn:
    """A turn, as far as it is: its state, and the steps that have ended."""
    return agents.get_turn(context, agent_id, turn_id)


@router.get(
    "/turn/events",
    response_model=AgenticSystemTurnResponseStreamChunk,
    responses=streams(AgenticSystemTurnResponseStreamChunk),
)
async def turn_events(
    request: Request,
    context: ContextOf,
    sessions: SessionsOf,
    agent_id: OwnId,
    turn_id: OwnId,
    after: AfterEvent = None,
    last_event_id: LastEventId = None,
) -> Response:
    """The events of a turn, from its start or behind one of them: those that have been, and those that come."""
    events = await accepting.turn_events(context, sessions, agent_id, turn_id, after or last_event_id)
    return event_stream(request, kept_alive(_as_events(events)))


@router.post("/turn/cancel")
async def cancel_turn(context: ContextOf, sessions: SessionsOf, body: CancelTurnRequest) -> TurnStateResponse:
    """Ends a turn. It is `running` until what it does has stopped."""
    return await accepting.cancel_turn(context, sessions, body)


@router.post("/turn/approve")
async def approve_turn(
    context: ContextOf, sessions: SessionsOf, keys: KeysOf, body: ApproveTurnRequest
) -> TurnStateResponse:
    """Says which of the calls that a turn awaits are to be run. It goes on when all of them are decided."""
    return await accepting.approve_turn(context, sessions, body, keys)


@router.get("/step/get", response_model_exclude_none=True)
def get_step(context: ContextOf, agent_id: OwnId, turn_id: OwnId, step_id: OwnId) -> AgenticSystemStepResponse:
    """A step that has ended."""
    return AgenticSystemStepResponse(step=agents.get_step(context, agent_id, turn_id, step_id))


async def _as_events(events: AsyncGenerator[Event]) -> AsyncGenerator[bytes]:
    """A turn's events as server-sent ones, each with the id behind which the stream can be resumed."""
    async with aclosing(events):
        async for event in events:
            yield f"id: {event.id}\ndata: {event.data}\n\n".encode()

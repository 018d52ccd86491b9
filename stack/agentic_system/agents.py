"""Agents and their sessions: what is made, changed and looked up. How turns come about is in accepting.py."""

import asyncio
from collections.abc import Iterable

from stack.agentic_system.checks import require_usable
from stack.agentic_system.masked import masked
from stack.agentic_system.sessions import Sessions
from stack.agentic_system.shown import shown_step, shown_turn
from stack.api import agentic_system as api
from stack.api.agentic_system import (
    AgentConfig,
    AgentEntry,
    CreateAgenticSystemSessionRequest,
    GetAgenticSystemSessionRequest,
    SessionEntry,
    TurnState,
    UpdateAgenticSystemRequest,
)
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound
from stack.memory_banks import banks
from stack.store.agentic_system import AgentSession, AgentVersion
from stack.store.turns import Step, Turn

# How many sessions of a deleted agent are told of it side by side.
ENDS_AT_ONCE = 16
# What the turns of a session can have together in one answer.
MAX_SESSION_CHARACTERS = 64_000_000


async def create(context: Context, config: AgentConfig) -> str:
    """Makes an agent, and returns its id. Raises NotFound and BadInput for what its config names and cannot be used."""
    await require_usable(context, config)
    agent = await asyncio.to_thread(context.store.agents.add, context.tenant, config.model_dump(mode="json"))
    return agent.id


async def update(context: Context, request: UpdateAgenticSystemRequest) -> api.AgentVersion:
    """Another version of an agent, for the turns that are accepted from now on. Raises as `create` does."""
    agent_id, config = request.agent_id, request.agent_config
    await asyncio.to_thread(find, context, agent_id)
    await require_usable(context, config)
    add = context.store.agents.add_version
    version = await asyncio.to_thread(add, context.tenant, agent_id, config.model_dump(mode="json"))
    if version is None:
        raise _no_agent(agent_id)
    return _shown(version)


def get(context: Context, agent_id: str, version: int | None = None) -> api.AgentVersion:
    """An agent as it is, or as it was in a version. Raises NotFound."""
    return _shown(find(context, agent_id, version))


def page(context: Context, after: str | None, limit: int) -> list[AgentEntry]:
    """Agents, newest first, behind the one with the id `after`. Raises NotFound."""
    last = None
    if after is not None and (last := context.store.agents.find(context.tenant, after)) is None:
        raise _no_agent(after, "after")
    return [
        AgentEntry(agent_id=agent.id, version=agent.version, created_at=agent.created_at)
        for agent in context.store.agents.page(context.tenant, last, limit)
    ]


async def delete(context: Context, sessions: Sessions, agent_id: str) -> None:
    """Deletes an agent with its sessions, and ends what runs in these. Raises NotFound."""
    deleted = await asyncio.to_thread(context.store.agents.delete, context.tenant, agent_id)
    if deleted is None:
        raise _no_agent(agent_id)
    slots = asyncio.Semaphore(ENDS_AT_ONCE)

    async def end(session_id: str) -> None:
        async with slots:
            await sessions.end(context, session_id)

    ended = await asyncio.gather(*map(end, deleted), return_exceptions=True)
    if failed := [one for one in ended if isinstance(one, BaseException)]:
        raise failed[0]


def create_session(context: Context, request: CreateAgenticSystemSessionRequest) -> str:
    """Makes a session of an agent, and returns its id. Raises NotFound."""
    session = context.store.agents.add_session(context.tenant, request.agent_id, request.session_name)
    if session is None:
        raise _no_agent(request.agent_id)
    return session.id


def get_session(
    context: Context, agent_id: str, session_id: str, request: GetAgenticSystemSessionRequest
) -> api.Session:
    """A session with its turns, or with some of them, in the order in which they are asked for.

    Raises NotFound for the session, and for turns that it does not have, and BadInput where they are too large
    for one answer.
    """
    session = find_session(context, agent_id, session_id)
    wanted = request.turn_ids
    if (size := context.store.turns.size_of(session_id, wanted)) > MAX_SESSION_CHARACTERS:
        raise BadInput(
            f"the turns have {size} characters together; allowed: {MAX_SESSION_CHARACTERS}. Name fewer of them in "
            "turn_ids, or look them up one by one",
            param="turn_ids",
        )
    turns = context.store.turns.of_session(session_id, wanted)
    if wanted is not None:
        turns = _in_order(turns, wanted, session_id)
    bank_id = session.memory_bank_id
    return api.Session(
        session_id=session.id,
        session_name=session.name,
        turns=_all_shown(context, turns),
        started_at=session.created_at,
        memory_bank=banks.get(context, bank_id) if bank_id and _is_there(context, bank_id) else None,
    )


def page_of_sessions(context: Context, agent_id: str, after: str | None, limit: int) -> list[SessionEntry]:
    """The sessions of an agent, newest first, behind the one with the id `after`. Raises NotFound."""
    find(context, agent_id)
    last = find_session(context, agent_id, after, "after") if after is not None else None
    return [
        SessionEntry(
            session_id=session.id, session_name=session.name, started_at=session.created_at, turns=session.turns
        )
        for session in context.store.agents.page_of_sessions(context.tenant, agent_id, last, limit)
    ]


async def delete_session(context: Context, sessions: Sessions, agent_id: str, session_id: str) -> None:
    """Deletes a session with its turns and its bank, and ends what runs in it. Raises NotFound."""
    await asyncio.to_thread(find_session, context, agent_id, session_id)
    if await asyncio.to_thread(context.store.agents.delete_session, context.tenant, session_id) is None:
        raise _no_session(agent_id, session_id)
    await sessions.end(context, session_id)


def get_turn(context: Context, agent_id: str, turn_id: str) -> api.Turn:
    """A turn, as far as it is. Raises NotFound."""
    return _all_shown(context, [find_turn(context, agent_id, turn_id)])[0]


def get_step(context: Context, agent_id: str, turn_id: str, step_id: str) -> api.Step:
    """A step of a turn. Raises NotFound, and Conflict for one that has not ended yet."""
    find_turn(context, agent_id, turn_id)
    step = context.store.turns.step(turn_id, step_id)
    if step is None:
        raise NotFound(f"the turn {turn_id!r} has no step with the id {step_id!r}", param="step_id")
    if not step.has_ended:
        raise Conflict(f"the step {step_id!r} has not ended yet", param="step_id", code="not_ended")
    return shown_step(step)


def find(context: Context, agent_id: str, version: int | None = None) -> AgentVersion:
    """The newest version of an agent, or this one. Raises NotFound."""
    found = context.store.agents.get(context.tenant, agent_id, version)
    if found is None and version is not None:
        newest = find(context, agent_id).version
        raise NotFound(f"the agent {agent_id!r} has no version {version}; its newest is {newest}", param="version")
    if found is None:
        raise _no_agent(agent_id)
    return found


def find_session(context: Context, agent_id: str, session_id: str, field: str = "session_id") -> AgentSession:
    """The row of a session. Raises NotFound."""
    session = context.store.agents.get_session(context.tenant, session_id)
    if session is None or session.agent_id != agent_id:
        if context.store.agents.find(context.tenant, agent_id) is None:
            raise _no_agent(agent_id)
        raise _no_session(agent_id, session_id, field)
    return session


def find_turn(context: Context, agent_id: str, turn_id: str) -> Turn:
    """The row of a turn. Raises NotFound."""
    turn = context.store.turns.get(context.tenant, turn_id)
    if turn is None or turn.agent_id != agent_id:
        if context.store.agents.find(context.tenant, agent_id) is None:
            raise _no_agent(agent_id)
        raise no_turn(agent_id, turn_id)
    return turn


def no_turn(agent_id: str, turn_id: str) -> NotFound:
    return NotFound(f"the agent {agent_id!r} has no turn with the id {turn_id!r}", param="turn_id")


def _shown(version: AgentVersion) -> api.AgentVersion:
    return api.AgentVersion.model_validate(
        {
            "agent_id": version.agent_id,
            "version": version.version,
            "agent_config": masked(version.config),
            "created_at": version.created_at,
        }
    )


def _all_shown(context: Context, turns: list[Turn]) -> list[api.Turn]:
    by_turn: dict[str, list[Step]] = {turn.id: [] for turn in turns}
    for step in context.store.turns.steps_of(by_turn):
        by_turn[step.turn_id].append(step)
    waiting = {turn.id for turn in turns if turn.state == TurnState.awaiting_approval}
    runs = {turn_id: context.store.turns.runs_of(turn_id) for turn_id in waiting}
    return [shown_turn(turn, by_turn[turn.id], runs.get(turn.id, ())) for turn in turns]


def _in_order(turns: Iterable[Turn], wanted: Iterable[str], session_id: str) -> list[Turn]:
    known = {turn.id: turn for turn in turns}
    for turn_id in wanted:
        if turn_id not in known:
            raise NotFound(f"the session {session_id!r} has no turn with the id {turn_id!r}", param="turn_ids")
    return [known[turn_id] for turn_id in dict.fromkeys(wanted)]


def _is_there(context: Context, bank_id: str) -> bool:
    """Whether a session's bank is: it can be dropped as any other."""
    return context.store.memory_banks.get(context.tenant, bank_id) is not None


def _no_agent(agent_id: str, field: str = "agent_id") -> NotFound:
    return NotFound(f"there is no agent with the id {agent_id!r}", param=field)


def _no_session(agent_id: str, session_id: str, field: str = "session_id") -> NotFound:
    return NotFound(f"the agent {agent_id!r} has no session with the id {session_id!r}", param=field)

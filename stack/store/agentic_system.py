"""The rows of agents, of their versions, and of their sessions. Those of turns are in stack/store/turns.py."""

import uuid
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, delete, insert, select, update

from stack.store.connection import now, writing
from stack.store.memory_banks import MemoryBank
from stack.store.paging import is_behind
from stack.store.schema import (
    agent_sessions,
    agent_versions,
    agents,
    dropped_memory_banks,
    memory_banks,
    steps,
    tool_runs,
    turns,
)
from stack.store.turns import UNFINISHED


@dataclass(frozen=True, slots=True)
class Agent:
    """A row of `agents`."""

    id: str
    tenant: str
    version: int
    created_at: str


@dataclass(frozen=True, slots=True)
class AgentVersion:
    """A row of `agent_versions`: an agent's config, from when it was made until the next one."""

    agent_id: str
    version: int
    config: dict[str, Any]
    created_at: str


@dataclass(frozen=True, slots=True)
class AgentSession:
    """A row of `agent_sessions`. `turns` is how many were accepted."""

    id: str
    tenant: str
    agent_id: str
    name: str
    created_at: str
    memory_bank_id: str | None
    turns: int


class Agents:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, tenant: str, config: dict[str, Any]) -> Agent:
        """Another agent, in its first version."""
        agent = Agent(uuid.uuid4().hex, tenant, 1, now())
        with self._engine.begin() as connection:
            connection.execute(insert(agents).values(**asdict(agent)))
            _add_version(connection, AgentVersion(agent.id, 1, config, agent.created_at))
        return agent

    def add_version(self, tenant: str, id: str, config: dict[str, Any]) -> AgentVersion | None:
        """Another version of an agent; None if it is not there."""
        with writing(self._engine) as connection:
            agent = _taken_agent(connection, tenant, id)
            if agent is None:
                return None
            version = AgentVersion(id, agent.version + 1, config, now())
            connection.execute(update(agents).where(agents.c.id == id).values(version=version.version))
            _add_version(connection, version)
            return version

    def get(self, tenant: str, id: str, version: int | None = None) -> AgentVersion | None:
        """An agent's newest version, or this one."""
        columns = agent_versions.c
        wanted = columns.version == (agents.c.version if version is None else version)
        query = select(agent_versions).join(agents, agents.c.id == columns.agent_id)
        query = query.where(agents.c.tenant == tenant, agents.c.id == id, wanted)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return AgentVersion(**found) if found else None

    def page(self, tenant: str, after: Agent | None, limit: int) -> list[Agent]:
        """Agents, newest first, behind this one."""
        query = select(agents).where(agents.c.tenant == tenant)
        if after is not None:
            query = query.where(is_behind(agents.c.created_at, agents.c.id, after.created_at, after.id))
        query = query.order_by(agents.c.created_at.desc(), agents.c.id.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [Agent(**row) for row in connection.execute(query).mappings()]

    def find(self, tenant: str, id: str) -> Agent | None:
        """The row of an agent, without its config."""
        query = select(agents).where(agents.c.tenant == tenant, agents.c.id == id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return Agent(**found) if found else None

    def delete(self, tenant: str, id: str) -> list[str] | None:
        """Deletes an agent with its sessions; None if it is not there.

        Returns the ids of the sessions with a turn that had not ended.
        """
        with writing(self._engine) as connection:
            if _taken_agent(connection, tenant, id) is None:
                return None
            _, busy = _delete_sessions(connection, agent_sessions.c.agent_id == id)
            connection.execute(delete(agent_versions).where(agent_versions.c.agent_id == id))
            connection.execute(delete(agents).where(agents.c.id == id))
            return busy

    # Sessions

    def add_session(self, tenant: str, agent_id: str, name: str) -> AgentSession | None:
        """Another session of an agent; None if that is not there."""
        session = AgentSession(uuid.uuid4().hex, tenant, agent_id, name, now(), memory_bank_id=None, turns=0)
        with writing(self._engine) as connection:
            if _taken_agent(connection, tenant, agent_id) is None:
                return None
            connection.execute(insert(agent_sessions).values(**asdict(session)))
        return session

    def get_session(self, tenant: str, id: str) -> AgentSession | None:
        query = select(agent_sessions).where(agent_sessions.c.tenant == tenant, agent_sessions.c.id == id)
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return AgentSession(**found) if found else None

    def page_of_sessions(
        self, tenant: str, agent_id: str, after: AgentSession | None, limit: int
    ) -> list[AgentSession]:
        """The sessions of an agent, newest first, behind this one."""
        columns = agent_sessions.c
        query = select(agent_sessions).where(columns.tenant == tenant, columns.agent_id == agent_id)
        if after is not None:
            query = query.where(is_behind(columns.created_at, columns.id, after.created_at, after.id))
        query = query.order_by(columns.created_at.desc(), columns.id.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [AgentSession(**row) for row in connection.execute(query).mappings()]

    def give_bank(self, session_id: str, bank: MemoryBank) -> str | None:
        """Makes a bank and gives it to a session that has none; the id of the one that it has then.

        None if the session is not there.
        """
        with writing(self._engine) as connection:
            mine = (agent_sessions.c.id == session_id) & (agent_sessions.c.tenant == bank.tenant)
            query = select(agent_sessions.c.memory_bank_id).where(mine).with_for_update()
            found = connection.execute(query).first()
            if found is None:
                return None
            if found.memory_bank_id is None:
                connection.execute(insert(memory_banks).values(**asdict(bank)))
                connection.execute(update(agent_sessions).where(mine).values(memory_bank_id=bank.id))
            return found.memory_bank_id or bank.id

    def delete_session(self, tenant: str, id: str) -> AgentSession | None:
        """Deletes a session with its turns and its bank; None if it is not there."""
        with writing(self._engine) as connection:
            mine = (agent_sessions.c.tenant == tenant) & (agent_sessions.c.id == id)
            deleted, _ = _delete_sessions(connection, mine)
            return deleted[0] if deleted else None


def _add_version(connection: Connection, version: AgentVersion) -> None:
    connection.execute(insert(agent_versions).values(**asdict(version)))


def _taken_agent(connection: Connection, tenant: str, id: str) -> Agent | None:
    """An agent, which nobody changes or deletes until this transaction ends."""
    query = select(agents).where(agents.c.tenant == tenant, agents.c.id == id).with_for_update()
    found = connection.execute(query).mappings().first()
    return Agent(**found) if found else None


def _delete_sessions(connection: Connection, which: ColumnElement[bool]) -> tuple[list[AgentSession], list[str]]:
    """Deletes sessions with all that is theirs. The files of their banks are left to the banks' writer.

    Returns them, and the ids of those with a turn that had not ended.
    """
    query = select(agent_sessions).where(which).order_by(agent_sessions.c.id).with_for_update()
    found = [AgentSession(**row) for row in connection.execute(query).mappings()]
    of_session = turns.c.session_id.in_(select(agent_sessions.c.id).where(which))
    # Whoever writes into a turn's journal has taken the turn first: now nobody does any more.
    taken = select(turns.c.id, turns.c.session_id, turns.c.state).where(of_session).order_by(turns.c.id)
    rows = connection.execute(taken.with_for_update()).all()
    busy = {row.session_id for row in rows if row.state in UNFINISHED}
    of_turn = steps.c.turn_id.in_(select(turns.c.id).where(of_session))
    connection.execute(delete(tool_runs).where(tool_runs.c.step_id.in_(select(steps.c.id).where(of_turn))))
    connection.execute(delete(steps).where(of_turn))
    connection.execute(delete(turns).where(of_session))
    given = select(agent_sessions.c.memory_bank_id).where(which)
    banks = select(memory_banks.c.id, memory_banks.c.tenant).where(memory_banks.c.id.in_(given))
    connection.execute(insert(dropped_memory_banks).from_select(["id", "tenant"], banks))
    connection.execute(delete(memory_banks).where(memory_banks.c.id.in_(given)))
    connection.execute(delete(agent_sessions).where(which))
    return found, sorted(busy)

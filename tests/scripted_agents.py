"""What tests of turns share: a model that answers by a script, tools that do as they are told, and turns of these."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from serve_apps.scripted_answers import answer_to
from stack.agentic_system import accepting, agents, look_ups
from stack.agentic_system.local_sessions import LocalSessions
from stack.agentic_system.loop import Place
from stack.agentic_system.sessions import Event
from stack.agentic_system.tools.tool import Call, File, Output
from stack.agents_config import AgentsConfig
from stack.api import agentic_system as api
from stack.api.agent_tools import AgentTool, FunctionCallToolDefinition, names_of
from stack.api.agentic_system import (
    AgentConfig,
    AgenticSystemTurnCreateRequest,
    CreateAgenticSystemSessionRequest,
)
from stack.config import Config
from stack.context import Context
from stack.memory_banks.banks import Memory
from stack.memory_banks.writer import BankWriter
from stack.models import Endpoint
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats import typed_schema
from stack.store.turns import Turn
from tests.scripted_engine import ScriptedEngine

MODEL = {"id": "small", "path": "models/small", "context": 4_096, "prompt_format": "hermes"}
REMOTE = {"url": "https://tools.test/run", "method": "POST"}
Body = dict[str, Any]


def call(name: str, **arguments: Any) -> str:
    """A call of a tool, as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Model(ScriptedEngine):
    """A model that says what `say` makes of a request's body: a text, or tokens.

    By default it says the texts of `script` in turn: the one at the number of its own messages in the conversation.
    """

    def __init__(self, *script: str) -> None:
        super().__init__()
        self.script = list(script)
        self.say: Callable[[Body], str | tuple[str, ...]] = self._by_script
        self.hang_for: Callable[[Body], bool] = lambda body: False

    def _by_script(self, body: Body) -> str:
        said = [message for message in body["messages"] if message["role"] == "assistant"]
        return self.script[len(said)]

    async def _generate(self, endpoint: Endpoint, body: Body) -> AsyncGenerator[bytes]:
        if (fault := self.fail_for(body)) is not None:
            raise fault
        said = self.say(body)
        tokens = (said,) if isinstance(said, str) else said
        answer = answer_to(endpoint, body, tokens, self.finish_reason, self.stop_reason)
        for item in self._items(answer, bool(body.get("stream"))):
            await asyncio.sleep(0)  # as one that is elsewhere
            yield item.encode()
            if self.hang_for(body):
                await asyncio.Event().wait()

    @property
    def bodies(self) -> list[Body]:
        """What it was asked."""
        return [asked.body for asked in self.asked]


class Tool:
    """A tool that gives what `does` makes of its calls. `called` are the calls that were begun, in their order."""

    def __init__(
        self,
        name: str,
        does: Callable[[Call], Awaitable[str | Output]] | None = None,
        parameters: Mapping[str, Any] | None = None,
        is_idempotent: bool = False,
    ) -> None:
        self.name = name
        self.is_idempotent = is_idempotent
        self.does = does or self._echo
        self.parameters = parameters or {}
        self.called: list[Call] = []
        self.closed = 0
        self.turn: asyncio.Lock | None = None

    def definition(self) -> Definition:
        config = FunctionCallToolDefinition.model_validate(self.config)
        return Definition(self.name, "", typed_schema(config.parameters))

    @property
    def config(self) -> dict[str, Any]:
        """It in an agent's config."""
        return function(self.name, self.parameters) | {"remote_execution": REMOTE}

    async def run(self, call: Call) -> Output:
        self.called.append(call)
        given = await self.does(call)
        return Output(given) if isinstance(given, str) else given

    async def close(self) -> None:
        self.closed += 1

    async def _echo(self, call: Call) -> str:
        await asyncio.sleep(0)
        return f"{self.name} says {json.dumps(call.arguments)}"


def function(name: str, parameters: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A function of the client in an agent's config."""
    return {"type": "function_call", "function_name": name, "description": "", "parameters": parameters or {}} | more


class Agents:
    """Agents whose tools are these, in sessions of this process; `restart` is a process that dies, and another one."""

    def __init__(self, context: Context, *tools: Tool) -> None:
        self.context = context
        self.tools = {tool.name: tool for tool in tools}
        self.memory = Memory.open(context.config, BankWriter(context.config, context.store))
        self.files: Sequence[File] = ()
        self.place = Place(context, look_ups.here(lambda: self.memory), self._open)
        self.sessions = LocalSessions(self.place)

    @asynccontextmanager
    async def _open(
        self, _: AgentsConfig, definitions: Sequence[AgentTool], files: Sequence[File], *, is_resumed: bool
    ) -> AsyncIterator[Mapping[str, Tool]]:
        self.files = files
        names = [name for one in definitions for name in names_of(one)]
        opened = {name: self.tools[name] for name in names if name in self.tools}
        try:
            yield opened
        finally:
            for tool in opened.values():
                await tool.close()

    async def session(self, tools: Sequence[dict[str, Any]] = (), **config: Any) -> tuple[str, str]:
        """An agent, and a session of it."""
        own = [tool.config for tool in self.tools.values()]
        given = {"model": "small", "instructions": "Be brief.", "tools": [*own, *tools]} | config
        agent_id = await agents.create(self.context, AgentConfig.model_validate(given))
        request = CreateAgenticSystemSessionRequest(agent_id=agent_id, session_name="a session")
        return agent_id, await asyncio.to_thread(agents.create_session, self.context, request)

    async def begin(
        self, session: tuple[str, str], *messages: Any, keys: Mapping[str, str] | None = None, **more: Any
    ) -> Turn:
        """A turn that is accepted, and run. Texts are what the user says."""
        told = [{"role": "user", "content": one} if isinstance(one, str) else one for one in messages]
        given = {"agent_id": session[0], "session_id": session[1], "messages": told} | more
        request = AgenticSystemTurnCreateRequest.model_validate(given)
        return await accepting.create_turn(self.context, self.sessions, request, keys or {})

    async def turn(self, session: tuple[str, str], *messages: Any, **more: Any) -> api.Turn:
        """A turn, once it has ended or awaits approval. Raises what it failed by."""
        return await accepting.whole_turn(self.context, self.sessions, await self.begin(session, *messages, **more))

    async def events(self, turn: Turn, after: str | None = None) -> list[Event]:
        return [event async for event in self.sessions.events(self.context, turn.id, after)]

    async def look(self, turn: Turn) -> api.Turn:
        return await asyncio.to_thread(agents.get_turn, self.context, turn.agent_id, turn.id)

    async def restart(self) -> None:
        await self.sessions.close()
        self.sessions = LocalSessions(self.place)
        await self.sessions.recover()


def answer_of(call_id: str, name: str, content: Any) -> dict[str, Any]:
    """What the client's function has answered."""
    return {"role": "ipython", "call_id": call_id, "tool_name": name, "content": content}


def payload_of(event: Event) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(event.data)["event"]["payload"]
    return payload


def said(turn: api.Turn) -> str:
    """The text of a turn's answer."""
    assert turn.output_message is not None, turn
    assert isinstance(turn.output_message.content, str)
    return turn.output_message.content


def contents(turn: api.Turn) -> list[Any]:
    """What the turn's tools have given, in the order of the calls."""
    executed = [step for step in turn.steps if step.step_type == "tool_execution"]
    return [one.content for step in executed for one in step.tool_responses]


async def seen(agents: Agents, turn: Turn, kind: str) -> Event:
    """The first event of a kind, as soon as it is there."""
    async with aclosing(agents.sessions.events(agents.context, turn.id)) as events:
        async for event in events:
            if payload_of(event)["event_type"] == kind:
                return event
    raise AssertionError(f"the turn has ended without an event of the kind {kind}")


def config_of(**more: Any) -> dict[str, Any]:
    return {"models": [MODEL], **more}


def open_context(store_url: str, model: Model, **more: Any) -> Context:
    return Context.open(Config.parse(config_of(store=store_url, **more), "the tests' config"), engine=model)

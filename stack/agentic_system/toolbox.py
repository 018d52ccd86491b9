"""What a turn can do: its tools, made from their definitions, opened at its start and closed at its end.

A tool that the client runs is none of them: a function without `remote_execution`, and a code interpreter without
inline execution. Nor is memory, which is asked before the model is.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from stack.agentic_system.tools import asking, code_interpreter
from stack.agentic_system.tools.code_interpreter import CodeInterpreter
from stack.agentic_system.tools.function_call import remote_builtin, remote_function
from stack.agentic_system.tools.mcp_servers import Server, tools_of
from stack.agentic_system.tools.photogen import Photogen, RemotePhotogen
from stack.agentic_system.tools.search import Search
from stack.agentic_system.tools.templates import require_fillable
from stack.agentic_system.tools.tool import File, Tool
from stack.agentic_system.tools.wolfram_alpha import WolframAlpha
from stack.agents_config import AgentsConfig, McpServer
from stack.api.agent_tools import (
    AgentTool,
    CodeInterpreterToolDefinition,
    FunctionCallToolDefinition,
    McpToolDefinition,
    MemoryToolDefinition,
    PhotogenToolDefinition,
    SearchToolDefinition,
    WolframAlphaToolDefinition,
)
from stack.errors import BadInput


@asynccontextmanager
async def open_tools(
    config: AgentsConfig, definitions: Sequence[AgentTool], files: Sequence[File] = (), *, is_resumed: bool = False
) -> AsyncGenerator[Mapping[str, Tool]]:
    """The tools that are run here, by the names that the model calls them by, while the turn lasts.

    `files` are the turn's attachments, for tools that read files. `is_resumed` says that the turn has run before, with
    other tools than these, whose state is gone. Raises BadInput for a definition that cannot be met, and Unavailable
    where an MCP server cannot be asked for its tools.
    """
    async with AsyncExitStack() as opened:
        tools = [one for definition in definitions if (one := _tool(config, definition, files, is_resumed))]
        mcp = [definition for definition in definitions if isinstance(definition, McpToolDefinition)]
        servers = {one.server: Server(one.server, _mcp_server(config, one.server)) for one in mcp}
        for tool in tools:
            opened.push_async_callback(tool.close)
        for server in servers.values():
            opened.push_async_callback(server.close)
        try:
            async with asyncio.TaskGroup() as group:  # so that several take as long as the slowest
                found = [group.create_task(tools_of(servers[one.server], one)) for one in mcp]
        except ExceptionGroup as failed:  # by the first one, for which the others were given up
            raise failed.exceptions[0] from failed
        tools += [tool for task in found for tool in task.result()]
        yield {tool.name: tool for tool in tools}


async def require_openable(config: AgentsConfig, definitions: Sequence[AgentTool]) -> None:
    """Raises BadInput for a definition of which can be told, before any turn, that it cannot be met here."""
    for definition in definitions:
        if isinstance(definition, McpToolDefinition):
            _mcp_server(config, definition.server)
        elif isinstance(_tool(config, definition, (), False), CodeInterpreter):
            await asyncio.to_thread(code_interpreter.require)


def _tool(config: AgentsConfig, definition: AgentTool, files: Sequence[File], is_resumed: bool) -> Tool | None:
    """The tool of a definition; None for what is run elsewhere or otherwise."""
    match definition:
        case FunctionCallToolDefinition(remote_execution=None) | MemoryToolDefinition() | McpToolDefinition():
            return None
        case FunctionCallToolDefinition(remote_execution=execution):
            assert execution is not None
            return remote_function(definition, execution, config.remote_keys)
        case CodeInterpreterToolDefinition(enable_inline_code_execution=False):
            return None
        case PhotogenToolDefinition(remote_execution=execution) if execution is not None:
            require_fillable(execution, ["query"], asking.FETCHER)
            return RemotePhotogen(execution, config.remote_keys)
        case (
            SearchToolDefinition(remote_execution=execution)
            | WolframAlphaToolDefinition(remote_execution=execution)
            | CodeInterpreterToolDefinition(remote_execution=execution)
        ) if execution is not None:
            return remote_builtin(definition.type, execution, config.remote_keys)
        case SearchToolDefinition():
            return Search(definition.engine)
        case WolframAlphaToolDefinition():
            return WolframAlpha()
        case PhotogenToolDefinition():
            if config.photogen is None:
                raise BadInput(
                    "the tool photogen cannot be used: the config names no image model (agents.photogen); allowed: "
                    "a remote_execution",
                    param="tools",
                )
            return Photogen(config.photogen)
        case CodeInterpreterToolDefinition():
            seconds = min(code_interpreter.CELL_S, config.tool_timeout_s / 2)
            return CodeInterpreter(files, seconds=seconds, at_once=config.max_sandboxes, is_resumed=is_resumed)


def _mcp_server(config: AgentsConfig, name: str) -> McpServer:
    if name not in config.mcp_servers:
        listed = ", ".join(config.mcp_servers) or "none, as the config lists no mcp_servers"
        raise BadInput(f"there is no MCP server {name!r}; allowed: {listed}", param="tools")
    return config.mcp_servers[name]

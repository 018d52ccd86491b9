"""Whether what an agent's config names can be used: it is found out when the agent is made, not in its turns."""

from collections.abc import Sequence

from stack.api.agent_tools import (
    AgentTool,
    GraphBank,
    KeyValueBank,
    KeywordBank,
    LlmQueryGenerator,
    McpToolDefinition,
    MemoryToolDefinition,
    PhotogenToolDefinition,
    VectorBank,
    names_of,
)
from stack.api.agentic_system import AgentConfig
from stack.api.inference import ToolChoice
from stack.api.safety import RestAPIExecutionConfig
from stack.context import Context
from stack.errors import BadInput, NotFound
from stack.memory_banks.banks import find
from stack.safety import require_shields


def require_usable(context: Context, config: AgentConfig, place: str = "agent_config.") -> None:
    """Raises NotFound for a model or a bank that is not there, and BadInput for what else cannot be used.

    `place` is how the place of the config's fields begins, which the errors name.
    """
    require_model(context, config.model, f"{place}model")
    require_tools(context, config.tools, f"{place}tools")
    for field in ("input_shields", "output_shields"):
        require_shields(context, getattr(config, field), f"{place}{field}")
    require_fitting(config, place)


def require_fitting(config: AgentConfig, place: str) -> None:
    """Raises BadInput where a field goes by tools that the config does not have."""
    names = [name for tool in config.tools for name in names_of(tool)]
    for at, name in enumerate(config.approval):
        if name not in names:
            raise BadInput(
                f"approval names {name!r}, which is no tool that the model calls; there are: "
                + (", ".join(names) or "none"),
                param=f"{place}approval.{at}",
            )
    if config.tool_choice == ToolChoice.required and not names:
        raise BadInput(
            "tool_choice is 'required', and there is no tool that the model could call; allowed: 'auto'",
            param=f"{place}tool_choice",
        )


def require_model(context: Context, model: str, place: str) -> None:
    try:
        context.models.get(model)
    except (BadInput, NotFound) as error:
        error.param = place
        raise


def require_tools(context: Context, tools: Sequence[AgentTool], place: str) -> None:
    for at, tool in enumerate(tools):
        require_shields(context, tool.input_shields, f"{place}.{at}.input_shields")
        require_shields(context, tool.output_shields, f"{place}.{at}.output_shields")
        match tool:
            case MemoryToolDefinition():
                _require_memory(context, tool, f"{place}.{at}")
            case McpToolDefinition():
                _require_server(context, tool, f"{place}.{at}.server")
            case PhotogenToolDefinition(remote_execution=None) if context.config.agents.photogen is None:
                raise BadInput(
                    "the tool photogen needs an image model, and the config has none (agents.photogen)",
                    param=f"{place}.{at}",
                )
            case _ if tool.remote_execution is not None:
                _require_address(tool.remote_execution, f"{place}.{at}.remote_execution.url")


def _require_address(remote: RestAPIExecutionConfig, place: str) -> None:
    if not remote.url.startswith(("https://", "http://")):
        kind = remote.url.split(":")[0]
        raise BadInput(f"url begins with {kind!r}; a tool is run at an address of https:// or http://", param=place)


def _require_server(context: Context, tool: McpToolDefinition, place: str) -> None:
    servers = context.config.agents.mcp_servers
    if tool.server not in servers:
        known = ", ".join(servers) or "none, as the config lists no agents.mcp_servers"
        raise BadInput(f"there is no MCP server {tool.server!r}; there are: {known}", param=place)


def _require_memory(context: Context, tool: MemoryToolDefinition, place: str) -> None:
    if isinstance(tool.query_generator_config, LlmQueryGenerator):
        require_model(context, tool.query_generator_config.model, f"{place}.query_generator_config.model")
    for at, choice in enumerate(tool.memory_bank_configs):
        _require_bank(context, choice, f"{place}.memory_bank_configs.{at}")


def _require_bank(context: Context, choice: VectorBank | KeyValueBank | KeywordBank | GraphBank, place: str) -> None:
    kind = find(context, choice.bank_id, f"{place}.bank_id").config["type"]
    if kind != choice.type:
        raise BadInput(
            f"the bank {choice.bank_id!r} is a {kind} bank, and no {choice.type} bank", param=f"{place}.type"
        )

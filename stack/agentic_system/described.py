"""What a turn's model is told of the tools, and whether a call is one that it was told of."""

from collections.abc import Mapping
from typing import Any

from stack.agentic_system.plan import is_clients
from stack.agentic_system.tools.tool import Tool
from stack.api.agent_tools import AgentTool, FunctionCallToolDefinition, names_of
from stack.api.agentic_system import AgentConfig
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats import builtin_tool, typed_schema
from stack.prompt_formats.arguments import Misfit, typed_arguments


def definitions(config: AgentConfig, tools: Mapping[str, Tool]) -> dict[str, Definition]:
    """The tools that the model can call, by name, in the order of the config: those that are run here, `tools`, and
    those of the client. Raises BadInput for a parameter of a type that is not known."""
    told = {}
    for tool in config.tools:
        for name in names_of(tool):
            told[name] = _clients(tool, name) if is_clients(tool) else tools[name].definition()
    return told


def openai_tools(told: Mapping[str, Definition]) -> list[dict[str, Any]]:
    """The same in OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {"name": one.name, "description": one.description, "parameters": one.parameters},
        }
        for one in told.values()
    ]


def fitting_arguments(told: Mapping[str, Definition], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with the types of its tool's schema. Raises Misfit for a call that cannot be made."""
    if name not in told:
        raise Misfit(f"there is no tool {name!r}; there are: {', '.join(told) or 'none'}")
    try:
        return typed_arguments(arguments, told[name].parameters)
    except Misfit as error:
        raise Misfit(f"the arguments do not fit the tool: {error}") from error


def _clients(tool: AgentTool, name: str) -> Definition:
    if isinstance(tool, FunctionCallToolDefinition):
        return Definition(name, tool.description, typed_schema(tool.parameters))
    return builtin_tool(name)

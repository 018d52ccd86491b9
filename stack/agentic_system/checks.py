"""Whether what an agent's config names can be used: it is found out when the agent is made, not in its turns."""

import asyncio
from collections.abc import Sequence

from stack.agentic_system.masked import require_unmasked
from stack.agentic_system.toolbox import require_openable
from stack.agents_config import AgentsConfig
from stack.api.agent_tools import (
    AgentTool,
    GraphBank,
    KeyValueBank,
    KeywordBank,
    LlmQueryGenerator,
    MemoryToolDefinition,
    VectorBank,
    names_of,
)
from stack.api.agentic_system import AgentConfig
from stack.api.inference import ToolChoice
from stack.context import Context
from stack.errors import BadInput, NotFound
from stack.memory_banks.banks import find
from stack.safety import require_shields


async def require_usable(context: Context, config: AgentConfig) -> None:
    """Raises NotFound for a model or a bank that is not there, and BadInput for what else cannot be used.

    The errors name places in `agent_config`.
    """
    await asyncio.to_thread(_require_known, context, config)
    await require_runnable(context.config.agents, config.tools, "agent_config.tools")


def _require_known(context: Context, config: AgentConfig) -> None:
    require_model(context, config.model, "agent_config.model")
    require_tools(context, config.tools, "agent_config.tools")
    for field in ("input_shields", "output_shields"):
        require_unmasked([one.model_dump(mode="json") for one in getattr(config, field)], f"agent_config.{field}")
        require_shields(context, getattr(config, field), f"agent_config.{field}")
    require_fitting(config, "agent_config.")


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


async def require_runnable(config: AgentsConfig, tools: Sequence[AgentTool], place: str) -> None:
    """Raises BadInput for a tool that cannot be run here, whatever it is called with."""
    for at, tool in enumerate(tools):
        try:
            await require_openable(config, [tool])
        except BadInput as error:
            error.param = f"{place}.{at}"
            raise


def require_model(context: Context, model: str, place: str) -> None:
    try:
        context.models.get(model)
    except (BadInput, NotFound) as error:
        error.param = place
        raise


def require_tools(context: Context, tools: Sequence[AgentTool], place: str) -> None:
    for at, tool in enumerate(tools):
        require_unmasked(tool.model_dump(mode="json"), f"{place}.{at}")
        require_shields(context, tool.input_shields, f"{place}.{at}.input_shields")
        require_shields(context, tool.output_shields, f"{place}.{at}.output_shields")
        if isinstance(tool, MemoryToolDefinition):
            _require_memory(context, tool, f"{place}.{at}")


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

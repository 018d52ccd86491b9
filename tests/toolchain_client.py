"""What somebody does with the client of llama-toolchain 0.0.17: a program for a Python that finds it.

usage: python toolchain_client.py URL MODEL

It prints a JSON value a line: what the client has made of each event of a turn whose function it runs itself, then the
same of a turn about an attachment.
"""

import asyncio
import json
import sys

from llama_models.llama3.api.datatypes import URL, ToolParamDefinition, UserMessage
from llama_toolchain.agentic_system.api import AgentConfig, Attachment, MemoryToolDefinition
from llama_toolchain.agentic_system.client import AgenticSystemClient
from llama_toolchain.agentic_system.event_logger import EventLogger
from llama_toolchain.agentic_system.execute_with_custom_tools import AgentWithCustomToolExecutor
from llama_toolchain.safety.api import BuiltinShield, ShieldDefinition
from llama_toolchain.tools.custom.datatypes import SingleMessageCustomTool

DOCUMENT = "data:text/plain,The%20potion%20has%20to%20be%20stirred%20for%20a%20month."


class BoilingPoint(SingleMessageCustomTool):
    def get_name(self):
        return "get_boiling_point"

    def get_description(self):
        return "The boiling point of a liquid."

    def get_params_definition(self):
        return {"liquid_name": ToolParamDefinition(param_type="str", description="The liquid.", required=True)}

    async def run_impl(self, liquid_name):
        return {"liquid": liquid_name, "celsius": 99}


async def begin(client, model, tools, shields):
    config = AgentConfig(model=model, instructions="Be brief.", tools=tools, input_shields=shields)
    agent = await client.create_agentic_system(config)
    return config, agent, await client.create_agentic_system_session(agent.agent_id, "a talk")


async def turn(client, model, definitions, custom_tools, question, shields=(), attachments=None):
    config, agent, session = await begin(client, model, definitions, list(shields))
    executor = AgentWithCustomToolExecutor(client, agent.agent_id, session.session_id, config, custom_tools)
    chunks = executor.execute_turn([UserMessage(content=question)], attachments=attachments)
    async for event, log in EventLogger().log(chunks):
        payload = event.payload if hasattr(event, "payload") else event
        print(json.dumps({"type": type(payload).__name__, "value": json.loads(payload.json()), "log": str(log)}))


async def main(url, model):
    client = AgenticSystemClient(url)
    tool = BoilingPoint()
    shield = ShieldDefinition(shield_type=BuiltinShield.code_scanner_guard)
    await turn(client, model, [tool.get_tool_definition()], [tool], "How hot is it when polyjuice boils?", [shield])
    attachment = Attachment(content=URL(uri=DOCUMENT), mime_type="text/plain")
    memory = MemoryToolDefinition(max_tokens_in_context=2048, memory_bank_configs=[])
    await turn(client, model, [memory], [], "How long is it stirred?", attachments=[attachment])


asyncio.run(main(*sys.argv[1:]))

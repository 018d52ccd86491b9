"""Which tools a turn has, by the definitions of its agent."""

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from stack.agentic_system.toolbox import open_tools, require_openable
from stack.agentic_system.tools import asking
from stack.agentic_system.tools.code_interpreter import CodeInterpreter
from stack.agentic_system.tools.function_call import RemoteFunction
from stack.agentic_system.tools.photogen import Photogen, RemotePhotogen
from stack.agentic_system.tools.search import Search
from stack.agentic_system.tools.wolfram_alpha import WolframAlpha
from stack.agents_config import AgentsConfig
from stack.api.agent_tools import AgentTools, names_of
from stack.errors import BadInput, StackError, Unavailable
from tests.unit.agentic_system.tools.elsewhere import call

TESTS = {"type": "stdio", "command": [sys.executable, str(Path(__file__).parent / "tools" / "mcp_server.py"), "stdio"]}
BROKEN = {"type": "stdio", "command": ["/none/there"]}
ELSEWHERE = {"url": "https://api.example.org/", "method": "POST"}
CONFIG = AgentsConfig.model_validate(
    {"photogen": "http://images/v1", "mcp_servers": {"tests": TESTS, "broken": BROKEN}}
)


def tools(*definitions: dict[str, Any]) -> AgentTools:
    return TypeAdapter(AgentTools).validate_python(list(definitions))


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "function_name": name, "description": "", "parameters": {}} | more


def mcp(server: str, *names: str) -> dict[str, Any]:
    return {"type": "mcp", "server": server, "allowed_tools": list(names)}


async def test_each_definition_that_is_run_here_is_a_tool_under_the_name_that_the_model_calls_it_by() -> None:
    definitions = tools(
        {"type": "brave_search", "engine": "bing"},
        {"type": "wolfram_alpha"},
        {"type": "photogen"},
        {"type": "code_interpreter"},
        function("weather", remote_execution=ELSEWHERE),
        mcp("tests", "add", "picture"),
        mcp("tests", "files"),
    )
    await require_openable(CONFIG, definitions)
    async with open_tools(CONFIG, definitions) as opened:
        assert list(opened) == [name for definition in definitions for name in names_of(definition)]
        assert all(tool.name == tool.definition().name == name for name, tool in opened.items())
        kinds = [type(opened[name]) for name in ("brave_search", "wolfram_alpha", "photogen", "code_interpreter")]
        assert kinds == [Search, WolframAlpha, Photogen, CodeInterpreter]
        assert isinstance(opened["brave_search"], Search)
        assert opened["brave_search"].engine == "bing"
        assert isinstance(opened["weather"], RemoteFunction)
        assert (await opened["add"].run(call(a=1, b=2))).content == "3"


async def test_what_the_client_runs_and_memory_are_none() -> None:
    definitions = tools(
        function("weather"),
        {"type": "code_interpreter", "enable_inline_code_execution": False},
        {"type": "memory", "memory_bank_configs": []},
    )
    await require_openable(CONFIG, definitions)
    async with open_tools(CONFIG, definitions) as opened:
        assert opened == {}


async def test_built_in_tools_can_be_run_elsewhere_also_those_that_the_config_has_not() -> None:
    definitions = tools(
        {"type": "brave_search", "engine": "brave", "remote_execution": ELSEWHERE},
        {"type": "wolfram_alpha", "remote_execution": ELSEWHERE},
        {"type": "photogen", "remote_execution": ELSEWHERE},
        {"type": "code_interpreter", "remote_execution": ELSEWHERE},
    )
    await require_openable(AgentsConfig(), definitions)
    async with open_tools(AgentsConfig(), definitions) as opened:
        assert [type(tool) for tool in opened.values()] == [
            RemoteFunction,
            RemoteFunction,
            RemotePhotogen,
            RemoteFunction,
        ]
        assert list(opened["code_interpreter"].definition().parameters["properties"]) == ["code"]


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ({"type": "photogen"}, r"the config names no image model \(agents.photogen\)"),
        (mcp("other", "add"), "there is no MCP server 'other'; allowed: none, as the config lists no mcp_servers"),
        (function("f", remote_execution=ELSEWHERE | {"url": "https://{{host}}/"}), "names the argument 'host'"),
        ({"type": "photogen", "remote_execution": ELSEWHERE | {"url": "http://example.org/"}}, "allowed: https"),
        ({"type": "wolfram_alpha", "remote_execution": ELSEWHERE | {"body": {"q": "{{q}}"}}}, "allowed: query"),
    ],
)
async def test_what_cannot_be_met_is_refused_before_any_turn_and_in_one(definition: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        await require_openable(AgentsConfig(), tools(definition))
    with pytest.raises(BadInput, match=words):
        async with open_tools(AgentsConfig(), tools(definition)):
            pass


@pytest.mark.parametrize(
    ("definitions", "error"),
    [
        ([mcp("tests", "add"), mcp("broken", "x")], Unavailable),
        ([mcp("broken", "x"), mcp("tests", "add")], Unavailable),
        ([mcp("tests", "add"), mcp("tests", "none")], BadInput),
    ],
)
async def test_a_server_that_is_not_as_it_should_ends_what_was_opened(
    definitions: list[dict[str, Any]], error: type[StackError]
) -> None:
    with pytest.raises(error, match=r"the MCP server '(broken|tests)'"):
        async with open_tools(CONFIG, tools(*definitions)):
            pass


def test_addresses_of_the_config_alone_may_be_inside() -> None:
    assert asking.INNER_FETCHER.takes_http
    assert asking.INNER_FETCHER.ports is None
    assert not asking.FETCHER.takes_http

"""A function that is called by a request to the address of its `remote_execution`.

The request is what stack/agentic_system/tools/templates.py makes of the arguments; the answer is text or JSON.
Addresses are public ones, by https, without redirects: whoever makes an agent cannot reach what only the server can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from stack.agentic_system.tools import asking, keys
from stack.agentic_system.tools.answers import text_of
from stack.agentic_system.tools.templates import fill, require_fillable
from stack.agentic_system.tools.tool import Call, Output, Stateless, ToolFailed, cut
from stack.agents_config import RemoteKey
from stack.api.agent_tools import FunctionCallToolDefinition
from stack.api.safety import RestAPIExecutionConfig, RestAPIMethod
from stack.fetcher import Answer
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats import builtin_tool, typed_schema

MAX_ERROR_CHARACTERS = 2_000
NO_KEYS: Mapping[str, RemoteKey] = MappingProxyType({})


@dataclass(frozen=True)
class RemoteFunction(Stateless):
    """Implements stack.agentic_system.tools.tool.Tool, for functions and for built-in tools that are run elsewhere."""

    described: Definition
    execution: RestAPIExecutionConfig
    is_idempotent: bool = False
    operators: Mapping[str, RemoteKey] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.described.name

    def definition(self) -> Definition:
        return self.described

    async def run(self, call: Call) -> Output:
        key_of = keys.remote(call, self.execution, self.operators)
        answer = await asking.ask(asking.FETCHER, fill(self.execution, call.arguments, key_of))
        text = text_of(answer)
        require_ok(answer, text)
        return Output(cut(text) or f"It is done: status {answer.status}, without an answer.")


def remote_function(
    definition: FunctionCallToolDefinition,
    execution: RestAPIExecutionConfig,
    operators: Mapping[str, RemoteKey] = NO_KEYS,
) -> RemoteFunction:
    """A function as a tool; `operators` are the config's remote_keys.

    Raises BadInput for an execution that no call could be sent by.
    """
    require_fillable(execution, definition.parameters, asking.FETCHER)
    described = Definition(definition.function_name, definition.description, typed_schema(definition.parameters))
    is_safe = execution.method is RestAPIMethod.GET
    return RemoteFunction(described, execution, definition.idempotent or is_safe, operators)


def remote_builtin(
    name: str, execution: RestAPIExecutionConfig, operators: Mapping[str, RemoteKey] = NO_KEYS
) -> RemoteFunction:
    """A built-in tool as one that is run elsewhere; its argument is `query`, or the code interpreter's `code`."""
    described = builtin_tool(name)
    require_fillable(execution, described.parameters["properties"], asking.FETCHER)
    return RemoteFunction(described, execution, execution.method is RestAPIMethod.GET, operators)


def require_ok(answer: Answer, text: str) -> None:
    """Raises ToolFailed for another status than those of success, with what the far side says of it."""
    if not 200 <= answer.status < 300:
        said = f": {cut(text, MAX_ERROR_CHARACTERS)}" if text else ""
        raise ToolFailed(f"it answers with the status {answer.status}{said}")

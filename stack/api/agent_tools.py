"""Wire types of the tools that agents have: what each is, with shields and limits of its own."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stack.api.inference import ToolParamDefinition
from stack.api.memory_banks import BankId, DocumentId, EntityName
from stack.api.messages import BuiltinTool
from stack.api.safety import MAX_SHIELDS, RestAPIExecutionConfig, ShieldDefinition
from stack.api.wire import ModelId, Wire, at_most, without_nul

MAX_TOOLS = 128
MAX_BANKS = 100

# As the model calls it.
FunctionName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_.:-]+$")]
Description = Annotated[str, Field(max_length=10_000)]
Shields = Annotated[list[ShieldDefinition], at_most(MAX_SHIELDS)]
ServerName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Tool(Wire):
    """A tool. `input_shields` judge the arguments of its calls, `output_shields` what it answers."""

    input_shields: Shields = []
    output_shields: Shields = []


class _RemoteTool(_Tool):
    """One that may be run elsewhere: where there is a `remote_execution`, by a request to that address."""

    remote_execution: RestAPIExecutionConfig | None = None


class SearchToolDefinition(_RemoteTool):
    """A search of the web."""

    type: Literal["brave_search"]
    engine: Literal["bing", "brave"]


class WolframAlphaToolDefinition(_RemoteTool):
    """Questions to Wolfram Alpha."""

    type: Literal["wolfram_alpha"]


class PhotogenToolDefinition(_RemoteTool):
    """Images made from descriptions, by an image model of the config."""

    type: Literal["photogen"]


class CodeInterpreterToolDefinition(_RemoteTool):
    """Python in a sandbox. Without inline execution the client runs the code, as it does a function."""

    type: Literal["code_interpreter"]
    enable_inline_code_execution: bool = True


class FunctionCallToolDefinition(_RemoteTool):
    """A function. Without `remote_execution` the client runs it: the turn ends with the call, the next has the answer.

    One that is `idempotent` may be run again where it is not known whether it has run, as after a crash.
    """

    type: Literal["function_call"]
    function_name: FunctionName
    description: Description
    parameters: Annotated[dict[Annotated[str, Field(max_length=200)], ToolParamDefinition], at_most(100)]
    idempotent: bool = False


class VectorBank(Wire):
    type: Literal["vector"]
    bank_id: BankId


class KeyValueBank(Wire):
    """Documents are found by these ids, whatever the query is."""

    type: Literal["keyvalue"]
    bank_id: BankId
    keys: Annotated[list[DocumentId], at_most(MAX_BANKS)]


class KeywordBank(Wire):
    type: Literal["keyword"]
    bank_id: BankId


class GraphBank(Wire):
    """The entities that are looked for; where there are none, those that the query names."""

    type: Literal["graph"]
    bank_id: BankId
    entities: Annotated[list[EntityName], at_most(100)]


MemoryBankChoice = Annotated[VectorBank | KeyValueBank | KeywordBank | GraphBank, Field(discriminator="type")]


class DefaultQueryGenerator(Wire):
    """The query is what the messages say, with `sep` between them."""

    type: Literal["default"]
    sep: Annotated[str, Field(max_length=100), AfterValidator(without_nul)] = " "


class LlmQueryGenerator(Wire):
    """The query is what a `model` answers to the `template`, with the messages in the place of `{messages}`."""

    type: Literal["llm"]
    model: ModelId
    template: Annotated[str, Field(min_length=1, max_length=20_000)]


class CustomQueryGenerator(Wire):
    """The client makes the query: it is the `context` of the last user message."""

    type: Literal["custom"]


QueryGenerator = Annotated[
    DefaultQueryGenerator | LlmQueryGenerator | CustomQueryGenerator, Field(discriminator="type")
]


class MemoryToolDefinition(_Tool):
    """Retrieval from memory banks, before the model is asked.

    The best chunks of all the banks, at most `max_chunks` of at most `max_tokens_in_context` together, become context
    of the last user message.
    """

    type: Literal["memory"]
    memory_bank_configs: Annotated[list[MemoryBankChoice], at_most(MAX_BANKS)]
    query_generator_config: QueryGenerator = DefaultQueryGenerator(type="default")
    max_tokens_in_context: Annotated[int, Field(ge=1, le=1_000_000)] = 4_096
    max_chunks: Annotated[int, Field(ge=1, le=1_000)] = 10


class McpToolDefinition(_Tool):
    """Tools of an MCP server, one of the config's: those that are named, under their own names.

    The `idempotent_tools` among them may be run again where it is not known whether they have run, as after a crash.
    What the server itself says of that is not believed.
    """

    type: Literal["mcp"]
    server: ServerName
    allowed_tools: Annotated[list[FunctionName], Field(min_length=1), at_most(MAX_TOOLS)]
    idempotent_tools: Annotated[list[FunctionName], at_most(MAX_TOOLS)] = []

    @model_validator(mode="after")
    def _are_allowed(self) -> Self:
        for name in self.idempotent_tools:
            if name not in self.allowed_tools:
                raise ValueError(f"idempotent_tools names {name!r}, which is none of allowed_tools")
        return self


AgentTool = Annotated[
    SearchToolDefinition
    | WolframAlphaToolDefinition
    | PhotogenToolDefinition
    | CodeInterpreterToolDefinition
    | FunctionCallToolDefinition
    | MemoryToolDefinition
    | McpToolDefinition,
    Field(discriminator="type"),
]


def names_of(tool: AgentTool) -> list[str]:
    """The names by which the model calls a tool; none of one that it does not call."""
    match tool:
        case FunctionCallToolDefinition():
            return [tool.function_name]
        case McpToolDefinition():
            return tool.allowed_tools
        case MemoryToolDefinition():
            return []
        case _:
            return [BuiltinTool(tool.type).value]


def _fit(tools: list[AgentTool]) -> list[AgentTool]:
    """Refuses tools that the model could not tell apart, and more of them than it can be told of."""
    names = [name for tool in tools for name in names_of(tool)]
    if len(names) > MAX_TOOLS:
        raise ValueError(f"has {len(names)} tools, with those of MCP servers; allowed: at most {MAX_TOOLS}")
    known = set[str]()
    for tool in tools:
        own = names_of(tool)
        for name in own:
            if name in known or own.count(name) > 1:
                raise ValueError(f"has more than one tool {name!r}; allowed: each name once")
            if isinstance(tool, FunctionCallToolDefinition | McpToolDefinition) and name in set(BuiltinTool):
                raise ValueError(f"has a function {name!r}, which is the name of a built-in tool")
        known.update(own)
    if sum(isinstance(tool, MemoryToolDefinition) for tool in tools) > 1:
        raise ValueError("has more than one tool of the type memory; allowed: one, with all banks")
    return tools


AgentTools = Annotated[list[AgentTool], at_most(MAX_TOOLS), AfterValidator(_fit)]

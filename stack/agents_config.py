"""The part of the config that is of agents: the bounds of their turns, and what their tools reach."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stack.api.agent_tools import ServerName
from stack.api.wire import Wire, at_most, without_nul

# A variable of the environment; what it holds never stands in a config.
Variable = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# Without a user and a password.
Address = Annotated[str, Field(max_length=4_000, pattern=r"^https?://[^\s/?#@]+([/?]\S*)?$")]


class HttpMcpServer(Wire):
    """An MCP server that speaks streamable HTTP; `token` names the variable that holds its bearer token."""

    type: Literal["http"]
    address: Address
    token: Variable | None = None


class StdioMcpServer(Wire):
    """An MCP server that is started as a command, with those `variables` of the environment and few more."""

    type: Literal["stdio"]
    command: Annotated[
        list[Annotated[str, Field(max_length=4_000), AfterValidator(without_nul)]], Field(min_length=1), at_most(100)
    ]
    variables: Annotated[list[Variable], at_most(100)] = []


McpServer = Annotated[HttpMcpServer | StdioMcpServer, Field(discriminator="type")]


class RemoteKey(Wire):
    """A secret of the operator's, in the environment, which headers of remote executions at these `hosts` can name."""

    variable: Variable
    hosts: Annotated[
        list[Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9.-]+$")]], Field(min_length=1), at_most(100)
    ]


class AgentsConfig(Wire):
    """The bounds of turns, and what tools reach.

    A turn that has made `max_steps` steps or `max_tool_calls` calls, or has had `max_tokens` tokens of the model or
    `max_seconds`, is brought to its end: the model is asked once more, without tools. A call of a tool has
    `tool_timeout_s`; of the code interpreter, `max_sandboxes` run at once on a machine. A turn that awaits approval for
    `approval_s` is cancelled. In a session one turn runs, and `max_queued_turns` more may wait. A session's actor ends
    when it has had nothing to do for `idle_s`, and `warm` actors wait for sessions.

    `photogen` is the image model of the tool of that name: an address that speaks OpenAI's image API, as its clients'
    base_url, or the id of an application of Ray Serve. `mcp_servers` are those whose tools agents may name. Keys of
    services stand in the environment: BRAVE_SEARCH_KEY, BING_SEARCH_KEY, WOLFRAM_ALPHA_KEY, PHOTOGEN_KEY.
    `remote_keys` are those that headers of a tool's remote_execution can name, as {{key:name}}, beside the keys that a
    request brings itself.
    """

    max_steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    max_tool_calls: Annotated[int, Field(ge=0, le=10_000)] = 50
    max_tokens: Annotated[int, Field(ge=1, le=100_000_000)] = 100_000
    max_seconds: Annotated[float, Field(ge=1, le=86_400)] = 600
    tool_timeout_s: Annotated[float, Field(ge=0.1, le=3_600)] = 60
    max_sandboxes: Annotated[int, Field(ge=1, le=1_000)] = 16
    approval_s: Annotated[float, Field(ge=1, le=2_592_000)] = 86_400
    idle_s: Annotated[float, Field(ge=0, le=86_400)] = 60
    warm: Annotated[int, Field(ge=0, le=1_000)] = 1
    max_queued_turns: Annotated[int, Field(ge=0, le=1_000)] = 16
    photogen: Annotated[str, Field(min_length=1, max_length=4_000), AfterValidator(without_nul)] | None = None
    mcp_servers: Annotated[dict[ServerName, McpServer], at_most(100)] = {}
    remote_keys: Annotated[dict[ServerName, RemoteKey], at_most(100)] = {}

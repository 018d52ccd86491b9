"""Tools of MCP servers (Model Context Protocol), which the config lists and an agent's definition names.

An agent has those tools of a server that its definition allows, under the server's names and with its schemas. A
server is opened at the turn's start, and again for a later call where it has died meanwhile; it is closed at the turn's
end. What a tool gives is text, images and files; what it gives in structure is told where it gives no text.
"""

import asyncio
import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stack.agentic_system.tools.answers import plain
from stack.agentic_system.tools.photogen import image_attachment
from stack.agentic_system.tools.tool import Call, Output, Stateless, ToolFailed, cut
from stack.agents_config import McpServer
from stack.api.agent_tools import McpToolDefinition
from stack.api.messages import Attachment
from stack.api.schemas import check_schema
from stack.attachments import MAX_IMAGE_BYTES
from stack.errors import BadInput, Unavailable
from stack.prompt_formats import Tool as Definition

if TYPE_CHECKING:
    import mcp_types as types

    from stack.agentic_system.tools import mcp_client

MAX_ATTACHMENTS = 8
MAX_DESCRIPTION_CHARACTERS = 10_000
MAX_ERROR_CHARACTERS = 2_000
_MIME_TYPE = re.compile(r"[\w.+-]{1,100}/[\w.+-]{1,100}")


class Server:
    """A server for one turn. `name` is the config's."""

    def __init__(self, name: str, config: McpServer) -> None:
        self.name = name
        self._config = config
        self._opening = asyncio.Lock()
        self._session: mcp_client.Session | None = None

    async def tools(self) -> list["types.Tool"]:
        """What it has. Raises Unavailable where it cannot be asked."""
        await asyncio.to_thread(_load)  # a large package, only where it is needed
        from stack.agentic_system.tools.mcp_client import SessionFailed

        try:
            return await (await self._open()).tools()
        except SessionFailed as error:
            raise Unavailable(f"the MCP server {self.name!r} cannot be used: {_shown(error.message)}") from error

    async def call(self, tool: str, arguments: dict[str, Any]) -> "types.CallToolResult":
        """A tool's result. Raises ToolFailed where the server does not give one."""
        from stack.agentic_system.tools.mcp_client import SessionFailed

        session = None
        try:
            session = await self._open()
            return await session.call(tool, arguments)
        except SessionFailed as error:
            if error.is_gone and session is not None:
                await self._forget(session)
            raise ToolFailed(f"the MCP server {self.name!r} has failed: {_shown(error.message)}") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._forget(self._session)

    async def _open(self) -> "mcp_client.Session":
        from stack.agentic_system.tools.mcp_client import Session

        async with self._opening:
            if self._session is None:
                self._session = await Session.open(self._config)
            return self._session

    async def _forget(self, session: "mcp_client.Session") -> None:
        """So that the next call opens another one."""
        if self._session is session:
            self._session = None
        await session.close()


@dataclass(frozen=True)
class McpTool(Stateless):
    """Implements stack.agentic_system.tools.tool.Tool. Its server is closed by whoever has opened it."""

    server: Server
    described: Definition
    is_idempotent: bool

    @property
    def name(self) -> str:
        return self.described.name

    def definition(self) -> Definition:
        return self.described

    async def run(self, call: Call) -> Output:
        result = await self.server.call(self.name, call.arguments)
        return await asyncio.to_thread(output_of, result)  # which may be many megabytes of images


async def tools_of(server: Server, definition: McpToolDefinition) -> list[McpTool]:
    """The tools that a definition allows. Raises BadInput for those that the server does not have, or not as it may."""
    there = {tool.name: tool for tool in await server.tools()}
    if missing := [name for name in definition.allowed_tools if name not in there]:
        listed = ", ".join(sorted(there)[:20]) or "none"
        raise BadInput(
            f"the MCP server {server.name!r} has no tool {missing[0]!r}; there are: {_shown(listed)}", param="tools"
        )
    return [_tool(server, there[name], name in definition.idempotent_tools) for name in definition.allowed_tools]


def output_of(result: "types.CallToolResult") -> Output:
    """What a tool gives, as the model is told it. Raises ToolFailed for what the tool says is an error."""
    texts: list[str] = []
    attachments: list[Attachment] = []
    for block in result.content:
        text, attachment = _read(block)
        if attachment is not None and len(attachments) == MAX_ATTACHMENTS:
            text, attachment = f"[{attachment.mime_type}, left out: there are more than {MAX_ATTACHMENTS}]", None
        texts.append(text)
        attachments += [attachment] if attachment is not None else []
    has_text = any(block.type in ("text", "resource") for block in result.content)
    if not has_text and result.structured_content is not None:
        texts.insert(0, json.dumps(result.structured_content, ensure_ascii=False))
    text = plain("\n".join(text for text in texts if text))
    if result.is_error:
        raise ToolFailed(cut(text, MAX_ERROR_CHARACTERS) or "it has failed, and does not say why")
    return Output(cut(text) or "It is done, and gives nothing.", tuple(attachments))


def _read(block: "types.ContentBlock") -> tuple[str, Attachment | None]:
    """A part of a result: the text that the model is told, and the file that the user gets."""
    match block.type:
        case "text":
            return block.text, None
        case "image":
            try:
                image = image_attachment(block.data)
            except ToolFailed as error:
                return f"[an image, left out: {error.message}]", None
            return f"[an image, {image.mime_type}; the user sees it]", image
        case "audio":
            return _file(block.data, block.mime_type)
        case "resource_link":
            return f"{block.name}: {block.uri}", None
        case "resource":
            resource = block.resource
            if hasattr(resource, "text"):
                return resource.text, None
            return _file(resource.blob, resource.mime_type or "")


def _file(encoded: str, mime_type: str) -> tuple[str, Attachment | None]:
    kind = mime_type if _MIME_TYPE.fullmatch(mime_type) else "application/octet-stream"
    if len(encoded) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        return f"[{kind}, left out: it has more than {MAX_IMAGE_BYTES} bytes]", None
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return f"[{kind}, left out: it is not in base64]", None
    whole = Attachment(content=f"data:{kind};base64,{base64.b64encode(content).decode()}", mime_type=kind)
    return f"[{kind}, {len(content)} bytes; the user has it]", whole


def _tool(server: Server, tool: "types.Tool", is_idempotent: bool) -> McpTool:
    try:
        schema = check_schema(tool.input_schema)
    except ValueError as error:
        raise BadInput(
            f"the tool {tool.name!r} of the MCP server {server.name!r} cannot be used: {error}", param="tools"
        ) from error
    description = cut(plain(tool.description or ""), MAX_DESCRIPTION_CHARACTERS)
    return McpTool(server, Definition(tool.name, description, {"properties": {}, **schema}), is_idempotent)


def _shown(message: str) -> str:
    return cut(plain(message), MAX_ERROR_CHARACTERS)


def _load() -> None:
    from stack.agentic_system.tools import mcp_client  # noqa: F401

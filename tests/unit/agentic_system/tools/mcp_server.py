"""A small MCP server for the tests, over standard input and output, or at a port by streamable HTTP.

python mcp_server.py stdio | http FD (that of a listening socket) [json]
"""

import asyncio
import base64
import json
import os
import socket
import sys
from typing import Any

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp_types import (
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    TextContent,
    TextResourceContents,
    ToolAnnotations,
)

server = MCPServer("tests")
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8d"
        "b00000000049454e44ae426082"
    )
).decode()


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(a: int, b: int) -> str:
    """Adds two numbers."""
    return str(a + b)


@server.tool()
def weather(city: str) -> dict[str, Any]:
    """The weather, in structure."""
    return {"city": city, "celsius": 21}


@server.tool()
def picture(count: int = 1) -> CallToolResult:
    image = ImageContent(data=PIXEL, mime_type="image/png")
    return CallToolResult(content=[TextContent(text="here"), *([image] * count)])


@server.tool()
def files() -> CallToolResult:
    text = TextResourceContents(uri="file:///a.txt", text="a text", mime_type="text/plain")
    blob = BlobResourceContents(uri="file:///a.bin", blob=base64.b64encode(b"\0\1").decode(), mime_type="a b/c")
    return CallToolResult(content=[EmbeddedResource(resource=text), EmbeddedResource(resource=blob)])


@server.tool()
def structure() -> CallToolResult:
    return CallToolResult(content=[], structured_content={"a": [1]})


@server.tool()
def fails(reason: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(text=reason)], is_error=True)


@server.tool()
def raises() -> str:
    raise ValueError("it is broken")


@server.tool()
def flood(characters: int) -> CallToolResult:
    return CallToolResult(content=[TextContent(text="x" * characters)])


@server.tool()
async def hang() -> str:
    await asyncio.Event().wait()
    return "never"


@server.tool()
def die() -> str:
    os._exit(3)


@server.tool()
def environment() -> str:
    return json.dumps(dict(os.environ))


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        app = server.streamable_http_app(json_response="json" in sys.argv)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([socket.socket(fileno=int(sys.argv[2]))])

"""Tools of real MCP servers, over both transports: what they give, and what becomes of those that do not behave."""

import asyncio
import base64
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stack.agentic_system.tools import mcp_client
from stack.agentic_system.tools.mcp_servers import McpTool, Server, tools_of
from stack.agentic_system.tools.tool import MAX_CHARACTERS, ToolFailed
from stack.agents_config import HttpMcpServer, McpServer, StdioMcpServer
from stack.api.agent_tools import McpToolDefinition
from stack.errors import BadInput, Unavailable
from tests.unit.agentic_system.tools.elsewhere import call

PROGRAM = str(Path(__file__).parent / "mcp_server.py")
STDIO = StdioMcpServer(type="stdio", command=[sys.executable, PROGRAM, "stdio"])


@contextlib.contextmanager
def over_http(*options: str) -> Iterator[tuple[HttpMcpServer, "subprocess.Popen[bytes]"]]:
    """A server at a port that listens before it runs, so that nobody needs to wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, PROGRAM, "http", str(listening.fileno()), *options]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()])
        port = listening.getsockname()[1]
    try:
        yield HttpMcpServer(type="http", address=f"http://127.0.0.1:{port}/mcp"), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def http_server() -> Iterator[McpServer]:
    with over_http() as (server, _):
        yield server


@pytest.fixture(params=["stdio", "http"])
def config(request: pytest.FixtureRequest, http_server: McpServer) -> McpServer:
    return STDIO if request.param == "stdio" else http_server


@contextlib.asynccontextmanager
async def opened(config: McpServer, *names: str, idempotent: Sequence[str] = ()) -> AsyncIterator[dict[str, McpTool]]:
    server = Server("tests", config)
    try:
        definition = McpToolDefinition(
            type="mcp", server="tests", allowed_tools=list(names), idempotent_tools=list(idempotent)
        )
        yield {tool.name: tool for tool in await tools_of(server, definition)}
    finally:
        await server.close()


async def test_allowed_tools_are_there_with_their_schemas_and_are_called(config: McpServer) -> None:
    async with opened(config, "add", "weather", "hang", idempotent=["weather"]) as tools:
        assert list(tools) == ["add", "weather", "hang"]
        described = tools["add"].definition()
        assert (described.name, described.description) == ("add", "Adds two numbers.")
        assert described.parameters["type"] == "object"
        assert {name: one["type"] for name, one in described.parameters["properties"].items()} == {
            "a": "integer",
            "b": "integer",
        }
        assert described.parameters["required"] == ["a", "b"]
        assert [tools[name].is_idempotent for name in ("add", "weather")] == [False, True], "not by what it hints"
        outputs = await asyncio.gather(*(tools["add"].run(call(a=one, b=1)) for one in range(10)))
        assert [output.content for output in outputs] == [str(one + 1) for one in range(10)]
        assert json.loads((await tools["weather"].run(call(city="Köln"))).content) == {"city": "Köln", "celsius": 21}


async def test_images_files_and_structures_are_given(config: McpServer) -> None:
    async with opened(config, "picture", "files", "structure") as tools:
        output = await tools["picture"].run(call(count=10))
        assert len(output.attachments) == 8
        assert output.attachments[0].mime_type == "image/png"
        assert str(output.attachments[0].content).startswith("data:image/png;base64,")
        assert output.content.startswith("here\n[an image, image/png; the user sees it]")
        assert output.content.count("left out: there are more than 8") == 2
        output = await tools["files"].run(call())
        assert output.content == "a text\n[application/octet-stream, 2 bytes; the user has it]"
        (file,) = output.attachments
        assert file.content == f"data:application/octet-stream;base64,{base64.b64encode(bytes([0, 1])).decode()}"
        assert (await tools["structure"].run(call())).content == '{"a": [1]}'


async def test_errors_of_tools_fail_the_call_with_what_they_say(config: McpServer) -> None:
    async with opened(config, "fails", "raises", "add") as tools:
        with pytest.raises(ToolFailed, match="no such city"):
            await tools["fails"].run(call(reason="no such city"))
        with pytest.raises(ToolFailed) as caught:
            await tools["fails"].run(call(reason="x" * 100_000))
        assert len(caught.value.message) < 3_000
        with pytest.raises(ToolFailed):
            await tools["raises"].run(call())
        with pytest.raises(ToolFailed):
            await tools["add"].run(call(a="one"))
        assert (await tools["add"].run(call(a=1, b=2))).content == "3"


async def test_a_flood_is_cut_and_one_beyond_all_bounds_fails_the_call_alone(
    config: McpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_client, "MAX_MESSAGE_BYTES", 300_000)
    async with opened(config, "flood", "add") as tools:
        assert len((await tools["flood"].run(call(characters=200_000))).content) <= MAX_CHARACTERS
        with pytest.raises(ToolFailed, match="the MCP server 'tests' has failed"):
            await tools["flood"].run(call(characters=1_000_000))
        assert (await tools["add"].run(call(a=1, b=2))).content == "3"


async def test_a_call_that_hangs_can_be_cancelled_and_others_go_on(config: McpServer) -> None:
    async with opened(config, "hang", "add") as tools:
        hanging = asyncio.create_task(tools["hang"].run(call()))
        assert (await tools["add"].run(call(a=1, b=2))).content == "3"
        assert not hanging.done()
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert (await tools["add"].run(call(a=2, b=2))).content == "4"


async def test_a_turn_that_ends_while_a_call_hangs_ends_the_call(config: McpServer) -> None:
    async with opened(config, "hang", "add") as tools:
        hanging = asyncio.create_task(tools["hang"].run(call()))
        await tools["add"].run(call(a=1, b=2))
    with pytest.raises(ToolFailed, match="it has gone"):
        await hanging


async def test_a_process_that_dies_fails_the_call_and_is_started_again_for_the_next() -> None:
    async with opened(STDIO, "die", "add") as tools:
        with pytest.raises(ToolFailed, match="the MCP server 'tests' has failed: it has gone"):
            await tools["die"].run(call())
        assert (await tools["add"].run(call(a=1, b=2))).content == "3"


@pytest.mark.parametrize("options", [(), ("json",)])
async def test_a_server_by_http_that_dies_fails_its_calls(options: tuple[str, ...]) -> None:
    with over_http(*options) as (config, process):
        async with opened(config, "hang", "add") as tools:
            assert (await tools["add"].run(call(a=1, b=2))).content == "3"
            hanging = asyncio.create_task(tools["hang"].run(call()))
            await tools["add"].run(call(a=1, b=2))
            process.kill()
            with pytest.raises(ToolFailed, match="the MCP server 'tests' has failed"):
                await hanging
            for _ in range(2):
                with pytest.raises(ToolFailed, match="the MCP server 'tests' has failed"):
                    await tools["add"].run(call(a=1, b=2))


async def test_a_process_knows_little_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    monkeypatch.setenv("FOR_IT", "yes")
    config = STDIO.model_copy(update={"variables": ["FOR_IT", "NOT_THERE"]})
    async with opened(config, "environment") as tools:
        environment = json.loads((await tools["environment"].run(call())).content)
    assert environment["FOR_IT"] == "yes"
    assert set(environment) <= {"FOR_IT", "PATH", "HOME", "LANG", "LC_CTYPE"}


async def test_a_process_ends_with_the_turn_even_if_it_does_not_want_to(tmp_path: Path) -> None:
    """It takes no notice of its end of input, and has a child that keeps its output open."""
    pids = tmp_path / "pids"
    program = f"""
import os, runpy, signal, subprocess, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
sys.argv = ["", "stdio"]
threading.Thread(target=threading.Event().wait).start()
runpy.run_path({PROGRAM!r}, run_name="__main__")
"""
    config = StdioMcpServer(type="stdio", command=[sys.executable, "-c", program])
    async with opened(config, "add") as tools:
        assert (await tools["add"].run(call(a=1, b=2))).content == "3"
    for pid in pids.read_text().split():
        with contextlib.suppress(FileNotFoundError):  # it may be there until its parent looks
            assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


async def test_a_process_ends_with_us_even_if_we_are_killed(tmp_path: Path) -> None:
    """It takes no notice of its end of input, and has a child."""
    server = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"])
print(os.getpid(), child.pid, file=open(sys.argv[1], "w"))
child.wait()
"""
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    command = [sys.executable, "-c", server, str(pids)]
    ours = f"""
import asyncio
from stack.agentic_system.tools.mcp_client import Session
from stack.agents_config import StdioMcpServer
asyncio.run(Session.open(StdioMcpServer(type="stdio", command={command!r})))
"""
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", ours)
    started = [int(pid) for pid in (await asyncio.to_thread(pids.read_text)).split()]
    ends = [os.pidfd_open(pid) for pid in started]
    try:
        assert not select.select(ends, [], [], 0)[0]
        starter.kill()
        await starter.wait()
        for end in ends:  # readable from its end on
            assert select.select([end], [], [], 20)[0]
    finally:
        for end in ends:
            os.close(end)


async def test_the_token_of_the_config_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        seen.put_nowait(head)
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    monkeypatch.setenv("TESTS_TOKEN", "hunter2")
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        config = HttpMcpServer(type="http", address=f"http://127.0.0.1:{port}/mcp", token="TESTS_TOKEN")
        with pytest.raises(Unavailable, match="the MCP server 'tests' cannot be used") as caught:
            async with opened(config, "add"):
                pass
    assert "authorization: bearer hunter2" in seen.get_nowait().lower()
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/none/there"], "No such file"),
        ([sys.executable, "-c", "print('no MCP')"], "cannot be opened"),
        ([sys.executable, "-c", "import time; time.sleep(1000)"], "has not answered within"),
        ([sys.executable, "-c", "print('x' * 10**6, flush=True); input()"], "cannot be opened"),
    ],
)
async def test_a_server_that_cannot_be_opened_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, command: list[str], words: str
) -> None:
    monkeypatch.setattr(mcp_client, "OPEN_SECONDS", 3.0)
    monkeypatch.setattr(mcp_client, "MAX_MESSAGE_BYTES", 300_000)
    with pytest.raises(Unavailable, match=words):
        async with opened(StdioMcpServer(type="stdio", command=command), "add"):
            pass


async def test_nobody_at_its_address_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(Unavailable, match="the MCP server 'tests' cannot be used"):
        async with opened(HttpMcpServer(type="http", address=f"http://127.0.0.1:{port}/mcp"), "add"):
            pass


async def test_redirects_to_elsewhere_are_not_followed() -> None:
    async def redirects(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.2:9/\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(redirects, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="cannot be used"):
            async with opened(HttpMcpServer(type="http", address=f"http://127.0.0.1:{port}/mcp"), "add"):
                pass


async def test_a_tool_that_is_not_there_is_bad_input(http_server: McpServer) -> None:
    with pytest.raises(BadInput, match="the MCP server 'tests' has no tool 'subtract'; there are: add, "):
        async with opened(http_server, "add", "subtract"):
            pass


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "https://elsewhere.org/"}}}, r"\$ref"),
        ({"type": "object", "properties": {"a": {"pattern": "a" * 5_000}}}, "regular expression"),
        ({"type": "object", "properties": {str(number): {} for number in range(10_000)}}, "more than 5000 values"),
    ],
)
async def test_a_schema_beyond_the_bounds_is_refused(tmp_path: Path, schema: dict[str, Any], words: str) -> None:
    program = tmp_path / "server.py"
    program.write_text(f"""
import sys, json
no = {{"code": -32601, "message": "no"}}
for line in sys.stdin:
    asked = json.loads(line)
    if asked["method"] == "initialize":
        answer = {{"protocolVersion": "2025-06-18", "capabilities": {{"tools": {{}}}},
                   "serverInfo": {{"name": "x", "version": "1"}}}}
    elif asked["method"] == "tools/list":
        answer = {{"tools": [{{"name": "add", "inputSchema": {schema!r}}}]}}
    elif "id" in asked:
        print(json.dumps({{"jsonrpc": "2.0", "id": asked["id"], "error": no}}), flush=True)
        continue
    else:
        continue
    print(json.dumps({{"jsonrpc": "2.0", "id": asked["id"], "result": answer}}), flush=True)
""")
    with pytest.raises(BadInput, match=f"the tool 'add' of the MCP server 'tests' cannot be used: .*{words}"):
        async with opened(StdioMcpServer(type="stdio", command=[sys.executable, str(program)]), "add"):
            pass


def test_the_package_is_imported_only_where_it_is_needed() -> None:
    program = "import sys; import stack.agentic_system.toolbox; assert 'mcp' not in sys.modules, 'mcp'"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})

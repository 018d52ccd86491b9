"""A session with an MCP server, by streamable HTTP or with a process of ours, by the `mcp` package.

Only mcp_servers.py imports this, and only for agents that have such tools: the package is large.

What a server sends is bounded: a message of more than MAX_MESSAGE_BYTES ends the wait for it. Its results are not
compared with the schemas that it gave for them, whose patterns could keep us busy for ever.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from asyncio import FIRST_COMPLETED
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio
import httpx2
import mcp_types as types
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from stack.agents_config import HttpMcpServer, McpServer, StdioMcpServer

# An image of 10 MiB in base64, and some more.
MAX_MESSAGE_BYTES = 16 * 2**20
MAX_PAGES = 20
OPEN_SECONDS = 20.0
CLOSE_SECONDS = 5.0
# How long a server may take to end when its input has.
EXIT_SECONDS = 1.0
# Of an answer by HTTP; the loop's limit of a call comes before.
READ_SECONDS = 3_600.0
# What a process of ours knows of our environment, beside the variables of its config.
_VARIABLES = ("HOME", "LANG", "PATH")

# What starts a server: beside it, of its process group and nobody's child, something waits for the end of a pipe that
# we hold. It comes with our own end, however that comes, and is the end of the whole group. The server becomes the
# process itself; the shell's own variables are none of its business.
_SHELL = "/bin/sh"
_WITH_US = """
( ( read -r _ < "/dev/fd/$0"; kill -KILL 0 ) > /dev/null 2>&1 & )
unset PWD OLDPWD
exec "$@"
"""

T = TypeVar("T")


class SessionFailed(Exception):
    """What a server has not done as it should; `is_gone`: the session is of no more use."""

    def __init__(self, message: str, is_gone: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.is_gone = is_gone


class Session:
    """An open session. A task of its own holds it, from its opening to its end, and may end before it is closed."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._is_closing = asyncio.Event()
        self._keeper = asyncio.create_task(self._keep())

    @classmethod
    async def open(cls, server: McpServer) -> "Session":
        """Raises SessionFailed where the server is not there, does not speak MCP, or not in time."""
        session = cls(server)
        try:
            await asyncio.wait((session._ready, session._keeper), timeout=OPEN_SECONDS, return_when=FIRST_COMPLETED)
        except asyncio.CancelledError:
            await session.close()
            raise
        if not session._ready.done():
            await session.close()
            raise SessionFailed(f"it cannot be opened: {session._reason()}", is_gone=True)
        return session

    async def tools(self) -> list[types.Tool]:
        """The tools that the server says it has. Raises SessionFailed."""
        tools: list[types.Tool] = []
        cursor = None
        for _ in range(MAX_PAGES):
            params = types.PaginatedRequestParams(cursor=cursor)
            page = await self._answer(self._client.session.list_tools(params=params))
            tools += page.tools
            cursor = page.next_cursor
            if cursor is None:
                return tools
        raise SessionFailed(f"it lists its tools on more than {MAX_PAGES} pages")

    async def call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """A tool's result, be it an error of the tool. Raises SessionFailed."""
        request = types.CallToolRequest(params=types.CallToolRequestParams(name=name, arguments=arguments))
        return await self._answer(self._client.session.send_request(request, types.CallToolResult))

    async def close(self) -> None:
        """Ends the session, and the process where there is one."""
        self._is_closing.set()
        if not self._ready.done():
            self._keeper.cancel()
        await asyncio.wait((self._keeper,), timeout=CLOSE_SECONDS)
        if not self._keeper.done():
            self._keeper.cancel()
            await asyncio.wait((self._keeper,), timeout=CLOSE_SECONDS)
        if self._keeper.done() and not self._keeper.cancelled():
            self._keeper.exception()  # it was told where it mattered

    @property
    def _client(self) -> Client:
        return self._ready.result()

    async def _keep(self) -> None:
        """Holds the session: what opens it closes it, in one task, as its task groups want it."""
        server = self._server
        transport = _process(server) if isinstance(server, StdioMcpServer) else _http(server)
        async with Client(transport, cache=None) as client:
            self._ready.set_result(client)
            await self._is_closing.wait()

    async def _answer(self, question: Coroutine[Any, Any, T]) -> T:
        """What is answered while the session lasts."""
        asking = asyncio.create_task(question)
        try:
            await asyncio.wait((asking, self._keeper), return_when=FIRST_COMPLETED)
            if not asking.done() or asking.cancelled():
                raise SessionFailed("it has gone", is_gone=True)
            return asking.result()
        except MCPError as error:
            is_gone = error.code == types.CONNECTION_CLOSED
            raise SessionFailed("it has gone" if is_gone else error.message, is_gone) from error
        except ValidationError as error:
            raise SessionFailed("it does not answer as MCP says") from error
        except (anyio.ClosedResourceError, anyio.BrokenResourceError) as error:
            raise SessionFailed("it has gone", is_gone=True) from error
        finally:
            asking.cancel()  # which tells the server, too
            await asyncio.wait((asking,), timeout=CLOSE_SECONDS)

    def _reason(self) -> str:
        """Why the session has ended, without what may be secret in an address."""
        if not self._keeper.done() or self._keeper.cancelled():
            return f"it has not answered within {OPEN_SECONDS:g} s"
        error = self._keeper.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return error.message if isinstance(error, MCPError) else type(error).__name__


# HTTP


class _Bounded(httpx2.AsyncByteStream):
    """A body of at most MAX_MESSAGE_BYTES."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        total = 0
        async for block in self._stream:
            total += len(block)
            if total > MAX_MESSAGE_BYTES:
                raise httpx2.StreamError(f"the answer has more than {MAX_MESSAGE_BYTES} bytes")
            yield block

    async def aclose(self) -> None:
        await self._stream.aclose()


class _BoundedTransport(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream)
        return response


Streams = tuple[ObjectReceiveStream[SessionMessage | Exception], ObjectSendStream[SessionMessage]]


@contextlib.asynccontextmanager
async def _http(server: HttpMcpServer) -> AsyncGenerator[Any]:
    token = os.environ.get(server.token, "") if server.token else ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = httpx2.Timeout(OPEN_SECONDS, read=READ_SECONDS)
    async with (
        httpx2.AsyncClient(
            headers=headers, timeout=timeout, transport=_BoundedTransport(), trust_env=False
        ) as http_client,
        streamable_http_client(
            server.address, http_client=http_client, max_sse_event_size=MAX_MESSAGE_BYTES
        ) as streams,
    ):
        yield streams


# Processes


@contextlib.asynccontextmanager
async def _process(server: StdioMcpServer) -> AsyncGenerator[Streams]:
    """A server as a process: messages are lines. What it says on its standard error goes to our log."""
    names = (*_VARIABLES, *server.variables)
    if shutil.which(server.command[0]) is None:  # what the shell says of it is not heard here
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), server.command[0])
    watched, held = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *(_SHELL, "-c", _WITH_US, str(watched), *server.command),
            stdin=PIPE,
            stdout=PIPE,
            env={name: os.environ[name] for name in names if name in os.environ},
            limit=MAX_MESSAGE_BYTES,
            pass_fds=(watched,),
            start_new_session=True,  # so that its own children end with it
        )
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(watched)
    heard, hearing = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    saying, said = anyio.create_memory_object_stream[SessionMessage](0)
    tasks = (asyncio.create_task(_hear(process, heard)), asyncio.create_task(_say(process, said, heard)))
    try:
        async with heard, hearing, saying, said:
            yield hearing, saying
    finally:
        ending = asyncio.ensure_future(_end(process, tasks, held))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait((ending,))
            raise


async def _hear(process: Process, heard: ObjectSendStream[SessionMessage | Exception]) -> None:
    """Passes on what a server says, until it ends, or says more than a message may have."""
    assert process.stdout is not None
    async with heard:
        with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
            while line := await _line(process.stdout):
                await heard.send(_message(line))


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # it is longer than the limit
        return b""


def _message(line: bytes) -> SessionMessage | Exception:
    """A message, or what is wrong with it, which the session passes over."""
    try:
        return SessionMessage(types.jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValidationError as error:
        return error


async def _say(
    process: Process, said: ObjectReceiveStream[SessionMessage], heard: ObjectSendStream[SessionMessage | Exception]
) -> None:
    """Passes on what is said to a server. Where it cannot be, the session hears nothing more either."""
    assert process.stdin is not None
    try:
        async for one in said:
            process.stdin.write(one.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
            await process.stdin.drain()
    except (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
        await heard.aclose()


async def _end(process: Process, tasks: tuple[asyncio.Task[None], ...], held: int) -> None:
    """Ends a server: it is told by the end of its input, and then killed, with all of its group.

    `held` is the pipe that says that we are there.
    """
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert process.stdin is not None
    process.stdin.close()
    await _wait(process)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    os.close(held)
    await _wait(process)


async def _wait(process: Process) -> None:
    """Waits a while for a process to end. What it still says is read, as one that cannot say it cannot end either."""
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(EXIT_SECONDS):
            while await process.stdout.read(2**16):
                pass
            await process.wait()

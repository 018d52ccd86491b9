"""What routes share: the context, and streams of server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from serve_apps.errors import envelope
from stack.context import Context, Principal
from stack.errors import Forbidden, StackError


async def _context(request: Request) -> Context:
    """The context in the name of whoever asks. (A plain function would be sent to a thread for each request.)"""
    context, principal = request.app.state.context, request.scope["state"]["principal"]
    assert isinstance(context, Context)
    assert isinstance(principal, Principal)
    return context.of(principal)


ContextOf = Annotated[Context, Depends(_context)]


def needs(scope: str) -> Any:
    """A dependency of routes that only a principal with this scope may use: `APIRouter(dependencies=[needs("data")])`.

    The scope `admin` may use all of them.
    """

    async def check(request: Request) -> None:
        scopes = request.scope["state"]["principal"].scopes
        if scope not in scopes and "admin" not in scopes:
            held = ", ".join(sorted(scopes)) or "none"
            raise Forbidden(f"{request.url.path} needs a key with the scope {scope!r}; this one has: {held}")

    return Depends(check)


JobUuid = Annotated[str, Query(max_length=100)]
logger = logging.getLogger("ray.serve")
T = TypeVar("T")


LEFT = 499  # a status that nobody reads
# How often a stream says that it goes on.
ALIVE_S = 15.0


async def answer_to(request: Request, work: Coroutine[Any, Any, BaseModel | bytes]) -> Response:
    """What the work gives, as JSON, which bytes are already.

    A client that leaves before takes it along: the work is cancelled.
    """
    answer = await _unless_left(request, work)
    if answer is None:
        return Response(status_code=LEFT)
    content = answer if isinstance(answer, bytes) else answer.model_dump_json(exclude_none=True)
    return Response(content, media_type="application/json")


async def stream_to(request: Request, work: Coroutine[Any, Any, AsyncGenerator[bytes]]) -> Response:
    """The stream that the work opens. A client that leaves takes it along, before it is open and after."""
    events = await _unless_left(request, work)
    return Response(status_code=LEFT) if events is None else event_stream(request, events)


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work gives; None if the client left before, and the work is cancelled."""
    tasks = working, leaving = asyncio.create_task(work), asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            leaving.result()
            return None
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait(tasks)


async def _leaves(request: Request) -> None:
    """Returns once the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(request: Request, events: AsyncGenerator[bytes]) -> StreamingResponse:
    """Sends events as they come. An error ends the stream with an event that says so, never silently.

    A client that leaves closes `events`.
    """
    return StreamingResponse(
        _guarded(request, events),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _guarded(request: Request, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except StackError as error:
            yield sse(envelope(request.scope, error))
        except Exception:  # the status is sent already, so no handler of the application can answer it
            logger.exception("request %s failed in its stream", request.scope["state"]["request_id"])
            yield sse(envelope(request.scope, StackError("the request failed for a reason of the server's own")))


async def kept_alive(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Events as they come, and while none does, now and then a comment, which clients pass over.

    What is between us and a client may end a connection on which nothing is said for long.
    """
    async with aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            try:
                while not coming.done():
                    await asyncio.wait([coming], timeout=ALIVE_S)
                    if not coming.done():
                        yield b": it goes on\n\n"
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait([coming])
                if not coming.cancelled():
                    coming.exception()  # where we are left, nobody needs it
            if (event := coming.result()) is None:
                return
            yield event


def streams(event: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Documents that a route may answer with server-sent events of a type that is also one of its `response_model`."""
    schema = {"$ref": f"#/components/schemas/{event.__name__}"}
    return {200: {"content": {"text/event-stream": {"schema": schema}}}}


async def as_events(opening: Coroutine[Any, Any, AsyncGenerator[BaseModel]]) -> AsyncGenerator[bytes]:
    """A stream of wire types that is being opened, as server-sent events."""
    return _as_events(await opening)


async def _as_events(items: AsyncGenerator[BaseModel]) -> AsyncGenerator[bytes]:
    async with aclosing(items):
        async for item in items:
            yield b"data: " + item.model_dump_json(exclude_none=True).encode() + b"\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"

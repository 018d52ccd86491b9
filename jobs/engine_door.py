"""A door to one model for tools that speak OpenAI's HTTP, open on this machine's loopback while a job runs.

It is no public door: whoever asks must have its key, which this process alone has. What is asked goes to the model's
engine as it is, so that the tool must be one that is trusted.
"""

import asyncio
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import web

from stack.context import Context
from stack.errors import StackError
from stack.models import Endpoint

_PATHS: dict[str, Endpoint] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
MAX_BODY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Door:
    """Where the door is, and the headers that open it."""

    url: str
    headers: dict[str, str]


@contextmanager
def opened(context: Context) -> Iterator[Door]:
    """Opens the door, in a thread of its own, to the models that may be asked in this context."""
    key = secrets.token_urlsafe(32)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine door", daemon=True)
    thread.start()
    try:
        runner, port = asyncio.run_coroutine_threadsafe(_open(context, key), loop).result()
        try:
            yield Door(f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"})
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _open(context: Context, key: str) -> tuple[web.AppRunner, int]:
    async def answer(request: web.Request) -> web.Response:
        if not secrets.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {key}".encode()):
            return web.json_response({"error": {"message": "the key is another one"}}, status=401)
        try:
            body = json.loads(await request.read())
            given = await context.models.answer(_PATHS[request.path], body | {"stream": False})
        except StackError as error:
            return web.json_response({"error": {"message": error.message, "code": error.code}}, status=error.status)
        return web.Response(body=given, content_type="application/json")

    application = web.Application(client_max_size=MAX_BODY_BYTES)
    application.add_routes([web.post(path, answer) for path in _PATHS])
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]

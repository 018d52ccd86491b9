"""A door to one model for tools that speak OpenAI's HTTP, open on this machine's loopback while a job runs.

It is no public door: whoever asks must have its key, which this process alone has. What is asked goes to the model's
engine as it is, past the shields, so that the tool must be one that is trusted. A model that is away is asked again, as
the workers of jobs do. What was answered is kept, so that a tool that starts anew is soon where it was.
"""

import asyncio
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from aiohttp import web

from jobs.asking import patiently
from jobs.kept_answers import KeptAnswers
from stack.batch_inference import PatientEngine
from stack.context import Context
from stack.errors import StackError, TooManyRequests, Unavailable
from stack.models import Endpoint

_PATHS: dict[str, Endpoint] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
MAX_BODY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Door:
    """Where the door is, the headers that open it, and why something could not be answered, the first reason first."""

    url: str
    headers: dict[str, str]
    errors: list[StackError]


@contextmanager
def opened(context: Context, kept: KeptAnswers, noted: Callable[[int], None] = lambda _: None) -> Iterator[Door]:
    """Opens the door, in a thread of its own, to the models that may be asked in this context.

    `noted` is told, in that thread, how many answers are kept by now. Where they are too many to be kept, no more are
    given.
    """
    context = replace(context, engine=PatientEngine(context.engine))
    errors: list[StackError] = []
    key = secrets.token_urlsafe(32)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine door", daemon=True)
    thread.start()
    try:
        runner, port = asyncio.run_coroutine_threadsafe(_open(context, key, kept, noted, errors), loop).result()
        try:
            yield Door(f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}, errors)
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _open(
    context: Context, key: str, kept: KeptAnswers, noted: Callable[[int], None], errors: list[StackError]
) -> tuple[web.AppRunner, int]:
    async def answer(request: web.Request) -> web.Response:
        if not secrets.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {key}".encode()):
            return web.json_response({"error": {"message": "the key is another one"}}, status=401)
        endpoint, body = _PATHS[request.path], json.loads(await request.read()) | {"stream": False}
        if (given := kept.find([endpoint, body])) is None:
            try:
                given = await patiently(lambda: context.models.answer(endpoint, body))
                kept.add([endpoint, body], given)
            except StackError as error:
                errors.append(Unavailable(error.message) if isinstance(error, TooManyRequests) else error)
                return web.json_response({"error": {"message": error.message, "code": error.code}}, status=error.status)
            noted(len(kept))
        return web.Response(body=given, content_type="application/json")

    application = web.Application(client_max_size=MAX_BODY_BYTES)
    application.add_routes([web.post(path, answer) for path in _PATHS])
    # Who leaves takes the question along: else a door that closes would wait for a model that is away.
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]

"""What every request passes first: an id, a bound on its body, and an answer if all else fails."""

import logging
import re
import uuid
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.errors import error_response
from stack.context import LOCAL_USER
from stack.errors import StackError, TooLarge

logger = logging.getLogger("ray.serve")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestId:
    """Gives every request an id: the one in `x-request-id`, or a new one, which the answer then carries.

    Behind Serve's proxy, which gives ids itself and puts them into the answers, there always is one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        if _REQUEST_ID.fullmatch(given):
            scope.setdefault("state", {})["request_id"] = given
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", request_id.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_id)


class Authenticate:
    """Finds out in whose name a request is made."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["principal"] = LOCAL_USER
        await self.app(scope, receive, send)


class Bounds:
    """Refuses a body over its bound, by its declared length or as it arrives. `by_path` are other bounds of paths."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, by_path: Mapping[str, int]) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.by_path = by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        bound = self.by_path.get(scope["path"], self.max_body_bytes)
        too_large = error_response(scope, TooLarge(f"the body has more than {bound} bytes"))
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > bound:
            await too_large(scope, receive, send)
            return
        arrived = 0

        async def bounded() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            # To the application it looks as if the client had left; what it then answers is not sent.
            return {"type": "http.disconnect"} if arrived > bound else message

        async def send_unless_refused(message: Message) -> None:
            if arrived <= bound:
                await send(message)

        try:
            await self.app(scope, bounded, send_unless_refused)
        except ClientDisconnect:
            if arrived <= bound:
                raise
        if arrived > bound:
            await too_large(scope, receive, send)


class Faults:
    """Answers a fault of our own. Its reason stays in the log, under the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            if started or scope["type"] != "http":
                raise
            logger.exception("request %s failed", scope["state"]["request_id"])
            fault = StackError("the request failed for a reason of the server's own")
            await error_response(scope, fault)(scope, receive, send)

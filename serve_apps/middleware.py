"""What every request passes first: an id, whose it is, a bound on its body, and an answer if all else fails."""

import asyncio
import logging
import re
import uuid
from collections.abc import Mapping

from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.errors import error_response
from stack import tracing
from stack.api.memory_banks import INGEST
from stack.context import LOCAL_USER, Principal
from stack.errors import BadInput, Forbidden, StackError, TooLarge, TooManyRequests, Unauthorized, Unavailable
from stack.keys import HOW_TO_MAKE_ONE, Keyring, is_loopback

logger = logging.getLogger("ray.serve")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
INSERT = "/memory_bank/insert"
_PORT = re.compile(r":\d*$")


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


class Trace:
    """A span around each request, to the end of its answer, below the one in its `traceparent` if it has one.

    The answer names the trace in `x-trace-id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        with tracing.span(scope["method"], parent, SpanKind.SERVER) as span:
            trace_id = format_trace_id(span.get_span_context().trace_id).encode()

            async def send_with_trace(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                    message = {**message, "headers": [*message.get("headers", []), (b"x-trace-id", trace_id)]}
                await send(message)

            try:
                await self.app(scope, receive, send_with_trace)
            finally:
                _describe(span, scope)


def _describe(span: Span, scope: Scope) -> None:
    """Names a request's span by its route, by the terms of OpenTelemetry's semantic conventions."""
    span.update_name(f"{scope['method']} {route_of(scope)}")
    span.set_attribute("http.request.method", scope["method"])
    span.set_attribute("http.route", route_of(scope))
    span.set_attribute("url.path", scope["path"][:1_000])
    span.set_attribute("request_id", scope["state"]["request_id"])
    if principal := scope["state"].get("principal"):
        span.set_attribute("tenant", principal.tenant)


def route_of(scope: Scope) -> str:
    """The template of the route that has answered a request, such as /v1/models/{model}: of these there are few."""
    return str(getattr(scope.get("route"), "path", "unknown"))


class Authenticate:
    """Finds out in whose name a request is made, before anything of its body is read.

    Where no key was ever made, everybody on this machine is the local user, whatever key they send, but for the pages
    of other sites in its browsers; and nobody else is answered. The paths in OPEN need no key.
    """

    OPEN = frozenset(("/health", "/docs", "/openapi.json"))

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self.app = app
        self.keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.OPEN:
            await self.app(scope, receive, send)
            return
        try:
            principal = await self._principal(scope)
        except StackError as error:
            await error_response(scope, error)(scope, receive, send)
        except SQLAlchemyError:
            logger.exception("request %s: the API keys cannot be looked up", scope["state"]["request_id"])
            unavailable = Unavailable("the database of the API keys does not answer")
            await error_response(scope, unavailable)(scope, receive, send)
        else:
            scope.setdefault("state", {})["principal"] = principal
            await self.app(scope, receive, send)

    async def _principal(self, scope: Scope) -> Principal:
        is_open = self.keyring.is_open()
        if is_open is None:
            is_open = await asyncio.to_thread(self.keyring.ask_whether_open)
        if is_open:
            return _local_user(scope)
        key = _bearer(scope)
        known = self.keyring.known(key)
        return known if known is not None else await asyncio.to_thread(self.keyring.find, key)


def _local_user(scope: Scope) -> Principal:
    client = scope.get("client")
    if client is None or not is_loopback(client[0]):
        raise Unauthorized(
            f"there are no API keys, so only requests from the stack's own machine are answered: make one there with "
            f"`{HOW_TO_MAKE_ONE}`"
        )
    # A page of elsewhere, in a browser on this machine, can give its own name this machine's address (DNS rebinding).
    given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    name = _PORT.sub("", given)
    if not is_loopback(name):
        raise Unauthorized(
            f"there are no API keys, so only requests to localhost or 127.0.0.1 are answered, not to {name[:80]!r}"
        )
    _refuse_other_sites(scope, given)
    return LOCAL_USER


def _refuse_other_sites(scope: Scope, host: str) -> None:
    """Raises Forbidden for what a page of another site asks through a browser, which says so and sends no key."""
    for name, value in scope["headers"]:
        other = name == b"sec-fetch-site" and value == b"cross-site"
        if name == b"origin":
            other = value.decode("latin-1").partition("://")[2].lower() != host.lower()
        if other:
            raise Forbidden(
                "there are no API keys, so pages of other sites and origins are not answered: make a key with "
                f"`{HOW_TO_MAKE_ONE}`, and let the page send it"
            )


def _bearer(scope: Scope) -> str:
    """The key in a request's header, whose scheme may be written in any case (RFC 9110)."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if not given:
        raise Unauthorized("this needs an API key, in the header `Authorization: Bearer KEY`")
    if len(given) > 1:
        raise Unauthorized(f"there are {len(given)} Authorization headers; allowed: one")
    header: bytes = given[0]
    scheme, _, key = header.decode("latin-1").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized("the Authorization header must be `Bearer KEY`")
    return key.strip(" ")


class Admit:
    """Answers at most `most` requests at once and refuses more at once, so that none waits unseen in front of it.

    Whether everything is well can be asked all the same.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most
        self.ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        if self.ongoing >= self.most:
            full = TooManyRequests(f"{self.most} requests are being answered already", retry_after=1)
            await error_response(scope, full)(scope, receive, send)
            return
        self.ongoing += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.ongoing -= 1


class Bounds:
    """Refuses a body over its bound, by its declared length or as it arrives. `by_path` are other bounds of paths.

    Refuses a NUL character in an address too, which no id or name can hold and not every database takes.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, by_path: Mapping[str, int]) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.by_path = by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            await error_response(scope, BadInput("the address holds a NUL character"))(scope, receive, send)
            return
        bound = self.by_path.get(scope["path"], self.max_body_bytes)
        hint = f". The job {INGEST} takes more" if scope["path"] == INSERT else ""
        too_large = error_response(scope, TooLarge(f"the body has more than {bound} bytes{hint}"))
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

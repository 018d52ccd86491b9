"""The one shape of errors, at both doors."""

import logging
from itertools import islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from stack.api.wire import explain
from stack.errors import BadInput, NotFound, StackError
from stack.store import faults

MAX_PROBLEMS = 5
# `envelope`, as the OpenAPI document has it.
ENVELOPE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "type", "param", "request_id"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string", "description": "Names the wrong value and what is allowed."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "request_id": {"type": ["string", "null"]},
            },
        }
    },
}
logger = logging.getLogger("ray.serve")


def add_error_handlers(app: FastAPI) -> None:
    """Makes an application answer every error with the envelope."""
    app.add_exception_handler(StackError, _on_stack_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(SQLAlchemyError, _on_database_error)


def error_response(scope: Scope, error: StackError) -> JSONResponse:
    """The error envelope of both doors."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(envelope(scope, error), error.status, headers)


def envelope(scope: Scope, error: StackError) -> dict[str, Any]:
    """An error as JSON."""
    return {
        "error": {
            "code": error.code,
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "request_id": scope.get("state", {}).get("request_id"),
        }
    }


async def _on_stack_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StackError)
    return error_response(request.scope, error)


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    """A database that has no room or does not answer; what else is wrong with it is a fault of our own."""
    assert isinstance(error, SQLAlchemyError)
    passing = faults.passing(error)
    if passing is None:
        raise error
    logger.error("request %s failed: %s", request.scope["state"]["request_id"], faults.reason(error), exc_info=error)
    return error_response(request.scope, passing)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not JSON or not of the declared shape."""
    assert isinstance(error, RequestValidationError)
    problems = []
    for one in islice(error.errors(), MAX_PROBLEMS):
        if one["type"] == "json_invalid":
            reason = one.get("ctx", {}).get("error", "")
            return error_response(request.scope, BadInput(f"the body is not JSON: {reason}", code="not_json"))
        if isinstance(one["input"], bytes):
            message = "the body is not JSON, or its content-type is not application/json"
            return error_response(request.scope, BadInput(message, code="not_json"))
        place, description = explain(one)
        problems.append((place.removeprefix("body").removeprefix("query").removeprefix("."), description))
    message = "; ".join(": ".join(part for part in problem if part) for problem in problems)
    return error_response(request.scope, BadInput(message, param=problems[0][0] or None))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: an unknown path or method."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return error_response(request.scope, NotFound(f"there is no {path}; /docs lists what there is"))
    allowed = (error.headers or {}).get("allow", "")
    refused = BadInput(f"{path}: {error.detail}" + (f"; allowed: {allowed}" if allowed else ""))
    refused.status = error.status_code
    response = error_response(request.scope, refused)
    response.headers.update(error.headers or {})
    return response

"""The one shape of errors, at both doors."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from stack.api.wire import explain
from stack.errors import BadInput, NotFound, StackError

logger = logging.getLogger("ray.serve")


def add_error_handlers(app: FastAPI) -> None:
    """Makes an application answer every error with the envelope."""
    app.add_exception_handler(StackError, _on_stack_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_fault)


def error_response(scope: Scope, error: StackError) -> JSONResponse:
    """The error envelope of both doors."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
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


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not JSON or not of the declared shape."""
    assert isinstance(error, RequestValidationError)
    problems = []
    for one in error.errors():
        if one["type"] == "json_invalid":
            reason = one.get("ctx", {}).get("error", "")
            return error_response(request.scope, BadInput(f"the body is not JSON: {reason}", code="not_json"))
        if isinstance(one["input"], bytes):
            message = "the body is not JSON, or its content-type is not application/json"
            return error_response(request.scope, BadInput(message, code="not_json"))
        place, description = explain(one)
        problems.append((place.removeprefix("body.").removeprefix("query."), description))
    message = "; ".join(": ".join(part for part in problem if part) for problem in problems[:5])
    return error_response(request.scope, BadInput(message, param=problems[0][0] or None))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: an unknown path or method."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return error_response(request.scope, NotFound(f"there is no {path}; /docs lists what there is"))
    refused = BadInput(f"{path}: {error.detail}")
    refused.status = error.status_code
    return error_response(request.scope, refused)


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    """A fault of our own. The reason stays in the log, under the request's id."""
    logger.error("request %s failed", request.scope["state"]["request_id"], exc_info=error)
    return error_response(request.scope, StackError("the request failed for a reason of the server's own"))

"""The one shape of errors, as tests read it."""

import json
import re
from typing import Any

KEYS = {"code", "message", "type", "param", "request_id"}
# What no error may show: paths of the code, tracebacks, reprs of objects.
INTERNALS = re.compile(r"Traceback|\.py\b|site-packages|object at 0x|sqlalchemy", re.IGNORECASE)


def error_of(reply: Any, status: int) -> dict[str, Any]:
    """The error in an answer, once it has the status and the envelope that it must have."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    return checked(reply.json())


def checked(envelope: dict[str, Any]) -> dict[str, Any]:
    """The error in an envelope."""
    assert set(envelope) == {"error"}
    error: dict[str, Any] = envelope["error"]
    assert set(error) == KEYS
    assert all(isinstance(error[key], str) and error[key] for key in ("code", "message", "type", "request_id"))
    assert error["param"] is None or isinstance(error["param"], str)
    assert not INTERNALS.search(error["message"]), error["message"]
    return error


def events_of(reply: Any) -> list[Any]:
    """The events of a stream, parsed but for the last `[DONE]`."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("\n\n")
    events = reply.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events), reply.text
    texts = [event.removeprefix("data: ") for event in events]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]

"""What is elsewhere, for tools: a real server on this machine, under a name that a real authority vouches for."""

import http.server
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from stack.agentic_system.tools import asking
from stack.agentic_system.tools.tool import Call
from stack.fetcher import Fetcher
from tests.unit.test_fetcher import HOST, Answer, Authority, is_this_machine, sends, serving


@dataclass(frozen=True)
class Asked:
    """A request that came there; `body` is the JSON that was sent along, or None."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


Elsewhere = Callable[[Answer], tuple[str, list[Asked]]]


@contextmanager
def there(authority: Authority, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> Iterator[tuple[str, list[Asked]]]:
    asked: list[Asked] = []

    def note_first(handler: http.server.BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        body = json.loads(content) if content else None
        asked.append(Asked(handler.command, handler.path, dict(handler.headers), body))
        answer(handler)

    with serving(authority.server(HOST), note_first) as (port, _):
        fetcher = Fetcher(
            resolve=lambda *_: ["127.0.0.1"],
            is_allowed=is_this_machine,
            ports=frozenset({port}),
            tls=authority.client(),
            seconds=10,
        )
        monkeypatch.setattr(asking, "FETCHER", fetcher)
        yield f"https://{HOST}:{port}", asked


def says(status: int = 200, **answer: Any) -> Answer:
    return sends(status, json.dumps(answer).encode(), Content_Type="application/json")


def call(keys: dict[str, str] | None = None, **arguments: Any) -> Call:
    return Call("call-1", arguments, keys or {}, lambda _: None)

"""What drivers do when a gateway dies: asked of a server of HTTP that answers, breaks off and refuses as it is told."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.drivers import patience
from scripts.drivers.client import Refused, Stack
from stack.config import ROOT

# What Ray Serve's proxy says where a gateway has died with a request.
DIED = (500, {}, "Internal Server Error")
NO_REPLICA = (503, {}, "No replicas are available")
BREAKS = None
WELL = (200, {}, json.dumps({"data": []}))


def envelope(status: int, code: str, **headers: str) -> tuple[int, dict[str, str], str]:
    return status, headers, json.dumps({"error": {"code": code, "message": code}})


class Server(ThreadingHTTPServer):
    """Answers by `script`, one after the other, then well; `asked` are the bodies of what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, str], str] | None] = []
        self.asked: list[bytes] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append(self.rfile.read(int(self.headers.get("content-length", 0))))
        answer = server.script.pop(0) if server.script else WELL
        self.close_connection = True  # which is told, or the next request might go there
        if answer is BREAKS:
            return
        status, headers, text = answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def stack(server: Server, waits: list[float]) -> Iterator[Stack]:
    """One that has answered already."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        made = Stack(client, waits.append)
        made.get("/models/list")
        server.asked.clear()
        yield made


def test_a_look_outlives_gateways_that_die(
    stack: Stack, server: Server, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [BREAKS, DIED, NO_REPLICA, (502, {}, "Bad Gateway"), envelope(503, "unavailable")]
    assert stack.get("/models/list") == {"data": []}
    assert waits == [1, 2, 4, 8, 16]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5
    assert "does not answer" in told[0]
    assert told[1] == "the stack answers 500: it is asked again in 2 s"


def test_the_end_of_a_job_is_waited_for_through_a_gateways_death(stack: Stack, server: Server) -> None:
    def status(state: str) -> tuple[int, dict[str, str], str]:
        return 200, {}, json.dumps({"status": state})

    server.script = [status("running"), BREAKS, DIED, status("running"), NO_REPLICA, status("completed")]
    assert stack.finished("/post_training", "tune-1") == {"status": "completed"}


def test_the_stack_is_asked_again_when_it_says(stack: Stack, server: Server, waits: list[float]) -> None:
    server.script = [
        envelope(503, "unavailable", **{"Retry-After": "30"}),
        envelope(429, "busy", **{"Retry-After": "0"}),
    ]
    assert stack.get("/models/list") == {"data": []}
    assert waits == [30, 2]
    server.script = [envelope(503, "unavailable", **{"Retry-After": "86400"})]
    assert stack.get("/models/list") == {"data": []}
    assert waits[-1] == patience.MOST_S


def test_what_has_a_name_is_sent_again_with_its_body(stack: Stack, server: Server) -> None:
    server.script = [BREAKS, DIED]
    body = {"job_uuid": "tune-1", "model": "small"}
    assert stack.post("/post_training/supervised_fine_tune", body) == {"data": []}
    assert [json.loads(one) for one in server.asked] == [body] * 3


def test_what_has_no_name_is_sent_again_only_where_it_was_not_begun(
    stack: Stack, server: Server, tmp_path: Path, waits: list[float]
) -> None:
    agent = {"agent_config": {"model": "small"}}
    for fault in (BREAKS, DIED, NO_REPLICA):
        server.script = [fault]
        with pytest.raises((Refused, httpx.TransportError)):
            stack.post("/agentic_system/create", agent)
    assert waits == []
    assert len(server.asked) == 3
    busy = envelope(429, "busy", **{"Retry-After": "1"})
    server.script = [busy]
    assert stack.post("/agentic_system/create", agent) == {"data": []}
    server.script = [busy, (200, {}, 'data: {"event": 1}\n\ndata: [DONE]\n\n')]
    assert list(stack.events("/agentic_system/turn/create", agent)) == [{"event": 1}]
    server.asked.clear()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "the rows"}')
    server.script = [busy, (200, {}, '{"content_url": "upload://1"}')]
    assert stack.upload(rows) == "upload://1"
    assert ["the rows" in one.decode() for one in server.asked] == [True, True], "the file is sent from its start"


def test_a_failure_of_the_stacks_own_is_told_at_once(stack: Stack, server: Server, waits: list[float]) -> None:
    for status, code in ((500, "engine_failed"), (404, "not_found"), (401, "unauthorized")):
        server.script = [envelope(status, code)]
        with pytest.raises(Refused, match=f"answered {status}: {code}"):
            stack.get("/models/list")
    assert waits == []


def test_patience_has_an_end(stack: Stack, server: Server, waits: list[float]) -> None:
    server.script = [DIED] * 100
    with pytest.raises(Refused, match="answered 500: Internal Server Error"):
        stack.get("/models/list")
    assert patience.PATIENCE_S <= sum(waits) < patience.PATIENCE_S + patience.MOST_S
    server.script = [BREAKS] * 100
    with pytest.raises(httpx.TransportError):
        stack.get("/models/list")


def test_a_driver_goes_on_from_the_command_line(server: Server) -> None:
    model = {"id": "small", "source": "config", "state": "running", "replicas": 1}
    server.script = [DIED, (200, {}, json.dumps({"data": [model]}))]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.drivers.serve", "--address", server.url],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "small  config, running, 1 replicas\n"
    assert done.stderr == "the stack answers 500: it is asked again in 1 s\n"

"""Who answers at the stack's address, and what the quickstart and scripts/serve make of it."""

import io
import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts import local_stack, quickstart, serve
from scripts.local_stack import RunningStack, StartFailed, running_stack, what_is_missing

SERVICE = {"service": "llama-stack-ray", "home": "/home/a"}
READY = SERVICE | {"status": "ready"}
STARTING = SERVICE | {"status": "starting", "waiting_for": {"small": "DEPLOYING"}}


class Server(ThreadingHTTPServer):
    """Answers every GET with the next of its answers, and goes on with the last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked = 0

    def will_answer(self, *answers: tuple[int, Any]) -> None:
        self.answers = [
            (code, body if isinstance(body, bytes) else json.dumps(body).encode()) for code, body in answers
        ]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        code, body = server.answers[min(server.asked, len(server.answers) - 1)]
        server.asked += 1
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_ready_stack(server: Server) -> None:
    server.will_answer((200, READY))
    assert running_stack(server.url) == RunningStack("/home/a", "")
    assert what_is_missing(server.url) == ""


@pytest.mark.parametrize("waiting_for", [{"small": 1}, {}, None, [], "small"])
def test_a_starting_stack(server: Server, waiting_for: object) -> None:
    server.will_answer((503, STARTING | {"waiting_for": waiting_for}))
    expected = "small (1)" if waiting_for == {"small": 1} else "the gateway"
    assert running_stack(server.url) == RunningStack("/home/a", expected)
    assert what_is_missing(server.url) == expected


def test_nothing_answers(free_port: int) -> None:
    url = f"http://127.0.0.1:{free_port}"
    assert running_stack(url) is None
    assert what_is_missing(url) == "the gateway"


FOREIGN = [
    (200, b"<html>hello</html>"),
    (200, b""),
    (200, {"status": "ready"}),
    (200, READY | {"service": "other"}),
    (200, STARTING),
    (200, ["llama-stack-ray"]),
    (200, None),
    (200, b"\xff\xfe\xff"),
    (200, b"[" * 100_000),
    (301, READY),
    (401, READY),
]
PROXY = [(404, b"Path '/health' not found."), (503, b"Service unavailable"), (500, {"error": {}})]


@pytest.mark.parametrize("answer", FOREIGN + PROXY)
def test_something_else_answers(server: Server, answer: tuple[int, Any]) -> None:
    server.will_answer(answer)
    with pytest.raises(StartFailed, match=f"something else answers at {server.url}: choose another port with --port"):
        what_is_missing(server.url)


@pytest.mark.parametrize("answer", FOREIGN)
def test_something_else_answers_where_a_stack_was_deployed(server: Server, answer: tuple[int, Any]) -> None:
    server.will_answer(answer)
    with pytest.raises(StartFailed, match="something else"):
        what_is_missing(server.url, just_deployed=True)


@pytest.mark.parametrize("answer", PROXY)
def test_serves_proxy_answers_before_the_gateway_does(server: Server, answer: tuple[int, Any]) -> None:
    server.will_answer(answer)
    assert what_is_missing(server.url, just_deployed=True) == "the gateway"


def test_a_server_that_is_not_http_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(1_000)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert what_is_missing(f"http://127.0.0.1:{listener.getsockname()[1]}") == "the gateway"
        thread.join()


def test_the_quickstart_uses_a_stack_of_the_same_home(home: Path, server: Server) -> None:
    server.will_answer((200, READY | {"home": str(home)}))
    with quickstart.stack(server.server_port, keep=False) as url:
        assert url == server.url


def test_the_quickstart_waits_for_a_stack_that_starts(
    home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "POLL_S", 0)
    starting = (503, STARTING | {"home": str(home)})
    server.will_answer(starting, starting, starting, (200, READY | {"home": str(home)}))
    with quickstart.stack(server.server_port, keep=False):
        assert server.asked == 4


@pytest.mark.parametrize("answer", [(200, READY), (503, STARTING), (200, {"service": "llama-stack-ray"}), FOREIGN[0]])
def test_the_quickstart_refuses_another_stack(
    home: Path, server: Server, answer: tuple[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a stack was started"))
    server.will_answer(answer)
    with (
        pytest.raises(StartFailed, match="choose another port with --port"),
        quickstart.stack(server.server_port, False),
    ):
        pytest.fail("it was used")


CHILD = """
import sys
print("12:00:00  ready after 1 s", flush=True)
sys.exit(KEPT if sys.stdin.buffer.read() == b"keep\\n" else 0)
"""
KEPT = 7  # the exit status of a child that was told to go on
Children = list[subprocess.Popen[bytes]]


@pytest.fixture
def children(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    """The children of the quickstart, which stand in for stacks."""
    started: Children = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "scripts.serve"]
        started.append(popen([sys.executable, "-c", CHILD.replace("KEPT", str(KEPT))], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    yield started
    for child in started:
        child.kill()
        child.wait()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError(), None])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stack_is_stopped_unless_it_is_kept(
    children: Children, free_port: int, keep: bool, error: BaseException | None, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, quickstart.stack(free_port, keep):
        if error is not None:
            raise error
    (child,) = children
    if keep and error is None:
        assert child.wait(30) == KEPT
        assert f"Stop it with: kill {child.pid}" in " ".join(capsys.readouterr().out.split())
    else:
        assert child.poll() not in (None, KEPT)
        assert "The stack is stopped." in capsys.readouterr().out


def test_a_failed_step_keeps_a_stack_that_is_to_be_kept(children: Children, free_port: int) -> None:
    with pytest.raises(quickstart.StepFailed), quickstart.stack(free_port, keep=True):
        raise quickstart.StepFailed("no")
    assert children[0].wait(30) == KEPT


def test_a_stack_that_ends_at_its_start_is_a_failure_that_says_why(
    children: Children, free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(globals(), "CHILD", "import sys; sys.exit('serve: the reason')")
    with pytest.raises(StartFailed, match="ended while it started"), quickstart.stack(free_port, keep=True):
        pytest.fail("it started")
    assert "serve: the reason" in capsys.readouterr().out


@pytest.mark.parametrize(("said", "stops"), [(b"", True), (b"keep", True), (b"keep\n", False)])
def test_the_end_of_the_input_stops_serving(said: bytes, stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
    stop = threading.Event()
    serve.set_at_end_of_input(stop)
    assert stop.is_set() == stops


def watch_over(url: str, look: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """serve.watch_over, stopped when `look`, which is called before every look, says so."""
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda _: look())
    serve.watch_over(url, stop, lost_s=0)


def test_serving_ends_when_nothing_answers_any_more(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartFailed, match=r"Ray or the gateway .* has died"):
        watch_over(f"http://127.0.0.1:{free_port}", lambda: False, monkeypatch)


def test_serving_ends_where_the_gateway_answers_and_ray_does_not(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.will_answer((200, READY), (503, STARTING | {"waiting_for": {"Ray Serve": "it has not answered"}}))
    with pytest.raises(StartFailed, match=r"Ray or the gateway .* has died"):
        watch_over(server.url, lambda: server.asked == 3, monkeypatch)


def test_serving_goes_on_while_a_stack_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.will_answer((200, READY), (503, STARTING), (200, READY))
    watch_over(server.url, lambda: server.asked == 3, monkeypatch)


@pytest.mark.parametrize(("silent_looks", "dies"), [(1, False), (2, True)])
def test_only_a_long_silence_ends_serving(silent_looks: int, dies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=40)
    answers = [RunningStack("/home/a", ""), *[None] * silent_looks] * 3
    monkeypatch.setattr(serve.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(local_stack, "running_stack", lambda *_, **__: answers.pop(0))
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda _: not answers)
    with pytest.raises(StartFailed, match="not answered for 75 s") if dies else nullcontext():
        serve.watch_over("http://stack", stop, lost_s=75)


def test_a_refused_deployment_is_one_line_unless_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["start_new_session"]
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nno such import path\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(StartFailed, match="refused the config file: no such import path"):
        local_stack.deploy({}, "http://127.0.0.1:1", lambda: False)
    local_stack.deploy({}, "http://127.0.0.1:1", lambda: True)

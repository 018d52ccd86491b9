"""What clients see of an engine's faults, and what an engine sees of clients that leave."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stack.errors import BadInput, EngineFailed, StackError, Unavailable
from tests.api.envelope import checked, error_of, events_of
from tests.api.test_inference import OPENAI_CHAT, STACK_CHAT, every_route, whole_and_streamed
from tests.running_stack import wait_for
from tests.scripted_engine import ScriptedEngine

SECONDS = 5.0


@every_route
@whole_and_streamed
@pytest.mark.parametrize(
    ("fault", "status", "code", "retry_after"),
    [
        (BadInput("the prompt is too long", param="messages"), 400, "bad_input", None),
        (EngineFailed("the model failed"), 500, "engine_failed", None),
        (Unavailable("the model cannot answer now"), 503, "unavailable", "5"),
    ],
    ids=["refused", "failed", "away"],
)
def test_a_fault_before_the_first_token_has_its_status(
    client: TestClient,
    engine: ScriptedEngine,
    path: str,
    body: dict[str, Any],
    stream: bool,
    fault: StackError,
    status: int,
    code: str,
    retry_after: str | None,
) -> None:
    engine.fail(fault)
    reply = client.post(path, json=body | {"stream": stream})
    error = error_of(reply, status)
    assert (error["code"], error["message"], error["param"]) == (code, fault.message, fault.param)
    assert reply.headers.get("retry-after") == retry_after


@every_route
@whole_and_streamed
def test_no_answer_at_all_is_a_fault_of_the_engine(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.fail("break off")
    assert error_of(client.post(path, json=body | {"stream": stream}), 500)["code"] == "engine_failed"


@every_route
@whole_and_streamed
def test_a_fault_of_our_own_is_500_and_keeps_its_reason_to_itself(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.fail(RuntimeError("secret: /etc/stack.key"))
    reply = client.post(path, json=body | {"stream": stream})
    error = error_of(reply, 500)
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "secret" not in reply.text


def text_of(event: dict[str, Any]) -> str:
    """The new text in an event of any of the routes."""
    if "event" in event:
        return str(event["event"]["delta"])
    if "delta" in event:
        return str(event["delta"])
    choices = event.get("choices") or [{}]
    return str(choices[0].get("text") or choices[0].get("delta", {}).get("content") or "")


@every_route
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (EngineFailed("the replica is gone"), "the replica is gone"),
        (Unavailable("the replica is draining"), "the replica is draining"),
        ("break off", "broke off"),
    ],
    ids=["failed", "away", "break off"],
)
def test_a_fault_in_a_stream_ends_it_with_an_error_event(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any], fault: Any, message: str
) -> None:
    engine.fail(fault, after=2)
    *events, last = events_of(client.post(path, json=body | {"stream": True}))
    assert "".join(text_of(event) for event in events) == "Paris is"
    error = checked(last)
    assert message in error["message"]
    assert error["type"] == "server_error"


@every_route
def test_an_error_event_of_the_engine_reaches_the_client(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail("error", after=2)
    *events, last = events_of(client.post(path, json=body | {"stream": True}))
    assert "".join(text_of(event) for event in events) == "Paris is"
    assert (checked(last)["message"], last["error"]["type"]) == ("the engine died", "server_error")


@every_route
def test_a_fault_of_our_own_in_a_stream_ends_it_with_an_error_event_too(
    client: TestClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail(RuntimeError("secret: /etc/stack.key"), after=2)
    reply = client.post(path, json=body | {"stream": True})
    assert "secret" not in reply.text
    assert checked(events_of(reply)[-1])["code"] == "internal_error"


# Clients that leave


@pytest.fixture
def server(app: FastAPI) -> Iterator[int]:
    """The port of a real server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.parametrize(("path", "body"), [STACK_CHAT, OPENAI_CHAT], ids=["stack", "openai"])
def test_leaving_a_stream_closes_the_generation(
    server: int, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    engine.fail("hang", after=1)
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{server}", timeout=SECONDS) as client,
        client.stream("POST", path, json=body | {"stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        assert any("Paris" in line for line in lines)
        assert not engine.closed_early.is_set()
    assert engine.closed_early.wait(SECONDS), "the engine goes on generating for nobody"


@every_route
@whole_and_streamed
def test_leaving_before_the_answer_closes_the_generation(
    server: int, engine: ScriptedEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine.fail("hang")
    content = json.dumps(body | {"stream": stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: engine.asked, SECONDS)
        assert not engine.closed_early.is_set()
    assert engine.closed_early.wait(SECONDS), "the engine goes on generating for nobody"

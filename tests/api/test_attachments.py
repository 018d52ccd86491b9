"""Attachments and images at both doors: what the engine is asked, and what is refused."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from stack import attachments
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput
from stack.fetcher import Fetcher
from tests.api.envelope import error_of, events_of
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

ANSWER = "Paris is big."
STACK, OPENAI = "/inference/chat_completion", "/v1/chat/completions"
MODELS = [{"id": "small", "path": "models/small"}, {"id": "seeing", "path": "models/small", "images": True}]
streamed_and_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return file.getvalue()


PNG = "data:image/png;base64," + base64.b64encode(png()).decode()
SHOWN = {"type": "image_url", "image_url": {"url": PNG}}


class Internet(Fetcher):
    """What lies at two addresses."""

    def fetch(self, url: str, into: BinaryIO, most: int) -> None:
        found = {"https://example.org/red.png": png(), "https://example.org/a.csv": b"a,b\n1,2"}.get(url)
        if found is None:
            raise BadInput(f"{url} answers with the status 404")
        into.write(found)


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    monkeypatch.setattr(attachments, "FETCHER", Internet())
    config = Config.parse(CONFIG | {"store": store_url, "models": MODELS}, "the tests' config")
    context = Context.open(config, engine=engine)
    yield context
    context.close()


def at_stack_door(url: str, model: str = "seeing") -> tuple[str, dict[str, Any]]:
    content = ["What is it?", {"content": url, "mime_type": "image/png"}]
    return STACK, {"model": model, "messages": [{"role": "user", "content": content}]}


def at_openai_door(url: str, model: str = "seeing", **more: str) -> tuple[str, dict[str, Any]]:
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url, **more}}]
    return OPENAI, {"model": model, "messages": [{"role": "user", "content": content}]}


both_doors = pytest.mark.parametrize("at_door", [at_stack_door, at_openai_door], ids=["stack", "openai"])


def ask(client: TestClient, path: str, body: dict[str, Any], stream: bool = False) -> None:
    """Asks, and sees that there is an answer."""
    reply = client.post(path, json=body | {"stream": stream})
    assert reply.status_code == 200, reply.text
    if stream:
        assert "Paris" in str(events_of(reply))
    else:
        assert ANSWER in reply.text


def asked(engine: ScriptedEngine) -> list[dict[str, Any]]:
    (one,) = engine.asked
    messages: list[dict[str, Any]] = one.body["messages"]
    return messages


# Images


@both_doors
@streamed_and_not
@pytest.mark.parametrize("url", [PNG, "https://example.org/red.png"], ids=["data", "https"])
def test_the_engine_is_shown_the_image_itself(
    client: TestClient, engine: ScriptedEngine, at_door: Any, stream: bool, url: str
) -> None:
    ask(client, *at_door(url), stream=stream)
    content = [{"type": "text", "text": "What is it?"}, SHOWN]
    assert asked(engine) == [{"role": "user", "content": content}]


def test_the_detail_of_an_image_is_passed_on(client: TestClient, engine: ScriptedEngine) -> None:
    ask(client, *at_openai_door(PNG, detail="low"))
    assert asked(engine)[0]["content"][1] == {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}


@both_doors
@streamed_and_not
def test_a_model_of_text_alone_answers_400_and_says_so(
    client: TestClient, engine: ScriptedEngine, at_door: Any, stream: bool
) -> None:
    path, body = at_door(PNG, model="small")
    error = error_of(client.post(path, json=body | {"stream": stream}), 400)
    assert "'small' takes text only, and no images; those that take images: seeing" in error["message"]
    assert error["param"] == "messages.0.content"
    assert engine.asked == []


@both_doors
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/none.png", "status 404"),
        ("https://example.org/a.csv", "no image that can be read"),
        ("data:image/png;base64,AAAA", "no image that can be read"),
        ("data:image/png;base64,#", "base64"),
    ],
)
def test_what_is_no_image_is_400(
    client: TestClient, engine: ScriptedEngine, at_door: Any, url: str, words: str
) -> None:
    path, body = at_door(url)
    assert words in error_of(client.post(path, json=body), 400)["message"]
    assert engine.asked == []


@both_doors
@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "https://127.0.0.1:8265/"])
def test_addresses_that_lead_inside_are_400(
    client: TestClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, at_door: Any, url: str
) -> None:
    monkeypatch.setattr(attachments, "FETCHER", Fetcher())
    path, body = at_door(url)
    error_of(client.post(path, json=body), 400)
    assert engine.asked == []


def test_an_image_does_not_stand_in_a_system_message(client: TestClient) -> None:
    path, body = at_stack_door(PNG)
    body["messages"][0]["role"] = "system"
    assert "'system' cannot hold an image" in error_of(client.post(path, json=body), 400)["message"]


def test_images_and_tools_can_be_had_together(client: TestClient, engine: ScriptedEngine) -> None:
    path, body = at_stack_door(PNG)
    ask(client, path, body | {"tools": [{"tool_name": "brave_search"}]})
    assert SHOWN in asked(engine)[-1]["content"]


# Texts


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"content": "a,b", "mime_type": "text/csv"}, "Attachment (text/csv):\na,b"),
        (["Sum:", {"content": ["1", "2"], "mime_type": "text/csv"}], "Sum:\n\nAttachment (text/csv):\n12"),
        ({"content": "data:text/csv;base64,YSxi", "mime_type": "text/csv"}, "Attachment (text/csv):\na,b"),
        (
            {"content": "https://example.org/a.csv", "mime_type": "text/csv"},
            "Attachment a.csv (text/csv):\na,b\n1,2",
        ),
    ],
    ids=["alone", "with text", "data", "https"],
)
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
@streamed_and_not
def test_a_text_attachment_is_text_to_the_engine(
    client: TestClient, engine: ScriptedEngine, content: Any, text: str, role: str, stream: bool
) -> None:
    ask(client, STACK, {"model": "small", "messages": [{"role": role, "content": content}]}, stream)
    assert asked(engine) == [{"role": role, "content": text}]


def test_an_attachment_may_be_context_or_the_answer_of_a_tool(client: TestClient, engine: ScriptedEngine) -> None:
    csv = {"content": "a,b", "mime_type": "text/csv"}
    user = {"role": "user", "content": "Sum?", "context": csv}
    ask(client, STACK, {"model": "small", "messages": [user]})
    assert asked(engine)[0]["content"] == "Sum?\n\nAttachment (text/csv):\na,b"
    engine.asked.clear()
    call = {"role": "assistant", "content": "", "tool_calls": [{"call_id": "1", "tool_name": "read", "arguments": {}}]}
    tool = {"role": "ipython", "call_id": "1", "tool_name": "read", "content": csv}
    ask(client, STACK, {"model": "small", "messages": [user, call, tool]})
    assert "Attachment (text/csv):\na,b" in str(asked(engine)[-1]["content"])


@streamed_and_not
def test_a_text_with_an_attachment_is_continued(client: TestClient, engine: ScriptedEngine, stream: bool) -> None:
    content = ["The sum of", {"content": "https://example.org/a.csv", "mime_type": "text/csv"}]
    ask(client, "/inference/completion", {"model": "small", "content": content}, stream)
    (one,) = engine.asked
    assert one.body["prompt"] == "The sum of\n\nAttachment a.csv (text/csv):\na,b\n1,2"


def test_an_image_is_not_continued_as_a_text(client: TestClient) -> None:
    body = {"model": "seeing", "content": {"content": PNG, "mime_type": "image/png"}}
    error = error_of(client.post("/inference/completion", json=body), 400)
    assert (error["param"], "image" in error["message"]) == ("content", True)


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        ({"content": "a", "mime_type": "application/pdf"}, "messages.0.content", "allowed: text/*"),
        (["a", {"content": "a"}], "messages.0.content.1.mime_type", "is required"),
        (["a", 5], "messages.0.content.1", "should be a text or an attachment, not 5"),
        ({"content": "a", "mime_type": "text/csv", "name": "b"}, "messages.0.content", "unknown key 'name'"),
    ],
)
def test_attachments_that_cannot_be_used_are_400(client: TestClient, content: Any, param: str, words: str) -> None:
    reply = client.post(STACK, json={"model": "small", "messages": [{"role": "user", "content": content}]})
    error = error_of(reply, 400)
    assert error["param"] == param
    assert words in error["message"]


# Batches


def test_a_batch_may_hold_images_and_refuses_those_of_one_row_alone(client: TestClient, engine: ScriptedEngine) -> None:
    rows = [at_stack_door(url)[1]["messages"] for url in (PNG, "data:image/png;base64,AAAA")]
    reply = client.post("/batch_inference/chat_completion", json={"model": "seeing", "messages_batch": rows})
    assert [one["content"] for one in reply.json()["completion_message_batch"]] == [ANSWER, ""]
    (one,) = reply.json()["errors"]
    assert (one["index"], one["error"]["param"]) == (1, "messages_batch.1.0.content")
    assert SHOWN in asked(engine)[0]["content"]

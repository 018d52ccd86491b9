"""Images from a server that speaks OpenAI's image API, at an address of the config that may be inside."""

import asyncio
import base64
import http.server
import io
import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from stack.agentic_system.tools.photogen import Photogen, RemotePhotogen, image_attachment
from stack.agentic_system.tools.tool import ToolFailed
from stack.api.safety import RestAPIExecutionConfig
from stack.attachments import MAX_IMAGE_BYTES
from tests.unit.agentic_system.tools.elsewhere import Elsewhere, call, says
from tests.unit.test_fetcher import Answer, sends

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray import serve
    from ray.serve.exceptions import BackPressureError, RayServeException


def picture(format: str = "PNG") -> bytes:
    into = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(into, format)
    return into.getvalue()


PNG = base64.b64encode(picture()).decode()


@contextmanager
def inside(answer: Answer) -> Iterator[tuple[str, list[Any]]]:
    """A server by plain http on this machine."""
    asked: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("slash", ["", "/"])
async def test_an_address_of_the_config_is_asked_as_openai_is_and_the_image_is_an_attachment(slash: str) -> None:
    with inside(says(created=1, data=[{"b64_json": PNG, "revised_prompt": "a red square"}])) as (url, asked):
        output = await Photogen(url + slash).run(call({"photogen_api_key": "k"}, query=" a red square "))
    assert asked == [
        (
            "/v1/images/generations",
            "Bearer k",
            {"prompt": "a red square", "n": 1, "response_format": "b64_json"},
        )
    ]
    (image,) = output.attachments
    assert (image.content, image.mime_type) == (f"data:image/png;base64,{PNG}", "image/png")
    assert "image/png" in output.content
    assert PNG not in output.content


async def test_without_a_key_none_is_sent() -> None:
    with inside(says(data=[{"b64_json": PNG}])) as (url, asked):
        await Photogen(url).run(call(query="a red square"))
    assert asked[0][1] is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(data=[{"url": "https://…"}]), "with an image in base64"),
        (says(data=[]), "with an image in base64"),
        (says(data=[{"b64_json": "***"}]), "not in base64"),
        (says(data=[{"b64_json": base64.b64encode(b"MZ\x90\0 no image").decode()}]), "no image that can be read"),
        (says(data=[{"b64_json": "A" * (MAX_IMAGE_BYTES * 4 // 3 + 100_000)}]), "bytes"),
        (says(401, error={"message": "Incorrect API key provided: k"}), "refuses the key"),
        (says(500), "status 500"),
        (sends(307, b"", Location="http://127.0.0.1/"), "redirects are not followed"),
    ],
)
async def test_what_is_no_image_fails_the_call(answer: Answer, words: str) -> None:
    with inside(answer) as (url, _), pytest.raises(ToolFailed, match=words):
        await Photogen(url).run(call({"photogen_api_key": "k"}, query="a red square"))


async def test_one_that_is_not_there_fails_the_call() -> None:
    with inside(says()) as (url, _):
        pass
    with pytest.raises(ToolFailed, match="does not answer"):
        await Photogen(url).run(call(query="a red square"))


@pytest.mark.parametrize("query", ["", "x" * 5_000])
async def test_a_prompt_has_a_bound(query: str) -> None:
    with pytest.raises(ToolFailed, match="allowed: 1 to 4000"):
        await Photogen("http://127.0.0.1:9/v1").run(call(query=query))


async def test_a_remote_execution_is_asked_by_the_guarded_fetcher_and_takes_no_key(elsewhere: Elsewhere) -> None:
    url, asked = elsewhere(says(data=[{"b64_json": base64.b64encode(picture("JPEG")).decode()}]))
    execution = RestAPIExecutionConfig.model_validate(
        {"url": f"{url}/make", "method": "POST", "body": {"prompt": "{{query}}", "size": 8}}
    )
    output = await RemotePhotogen(execution).run(call({"photogen_api_key": "hunter2"}, query="a red square"))
    assert output.attachments[0].mime_type == "image/jpeg"
    (one,) = asked
    assert (one.path, one.body) == ("/make", {"prompt": "a red square", "size": 8})
    assert "hunter2" not in str(one)


@pytest.mark.parametrize(("method", "expected"), [("GET", True), ("POST", False), ("PUT", False)])
def test_only_what_reads_is_asked_again_after_a_crash(method: str, expected: bool) -> None:
    execution = RestAPIExecutionConfig.model_validate({"url": "https://example.org/", "method": method})
    assert RemotePhotogen(execution).is_idempotent is expected
    assert not Photogen("http://images.test/v1").is_idempotent


async def test_a_remote_execution_cannot_be_inside() -> None:
    execution = RestAPIExecutionConfig(url="https://127.0.0.1/", method="POST")
    with pytest.raises(ToolFailed, match="may not be asked"):
        await RemotePhotogen(execution).run(call(query="a red square"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_an_image_keeps_its_type(format: str) -> None:
    image = image_attachment(base64.b64encode(picture(format)).decode())
    assert image.mime_type == f"image/{format.lower()}"


def test_it_is_the_tool_that_llama_knows() -> None:
    tool = Photogen("http://127.0.0.1/v1")
    assert tool.name == tool.definition().name == "photogen"


# By Ray Serve


class Request:
    """What a handle gives: it can be awaited and cancelled."""

    def __init__(self, answer: "asyncio.Future[Any]") -> None:
        self._answer = answer
        self.is_cancelled = False

    def __await__(self) -> Any:
        return self._answer.__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class Application:
    """An application with an image model, by its handle; gives what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked: asyncio.Queue[tuple[Any, Request]] = asyncio.Queue()
        self.images = self
        monkeypatch.setattr(serve, "get_app_handle", {"painter": self}.__getitem__)

    def remote(self, body: dict[str, Any]) -> Request:
        request = Request(self.answer)
        self.asked.put_nowait((body, request))
        return request


async def test_an_application_of_serve_is_asked_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    application = Application(monkeypatch)
    application.answer.set_result({"data": [{"b64_json": PNG}]})
    output = await Photogen("painter").run(call(query="a red square"))
    assert output.attachments[0].mime_type == "image/png"
    body, _ = application.asked.get_nowait()
    assert body == {"prompt": "a red square", "n": 1, "response_format": "b64_json"}


@pytest.mark.parametrize(
    "error", [BackPressureError(num_queued_requests=1, max_queued_requests=1), RayServeException("no such application")]
)
async def test_an_application_that_cannot_answer_fails_the_call(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    application = Application(monkeypatch)
    application.answer.set_exception(error)
    with pytest.raises(ToolFailed, match="the image model cannot answer now"):
        await Photogen("painter").run(call(query="a red square"))


async def test_an_application_that_answers_otherwise_fails_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    application = Application(monkeypatch)
    application.answer.set_result([PNG])
    with pytest.raises(ToolFailed, match="does not answer as documented"):
        await Photogen("painter").run(call(query="a red square"))


async def test_a_call_that_is_cancelled_cancels_the_request_to_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    application = Application(monkeypatch)
    running = asyncio.create_task(Photogen("painter").run(call(query="a red square")))
    _, request = await application.asked.get()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert request.is_cancelled

"""Functions elsewhere: what they are asked, and what becomes of their answers."""

import asyncio
import http.server
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from stack.agentic_system.tools import asking
from stack.agentic_system.tools.function_call import remote_builtin, remote_function
from stack.agentic_system.tools.tool import MAX_CHARACTERS, ToolFailed
from stack.agents_config import RemoteKey
from stack.api.agent_tools import FunctionCallToolDefinition
from stack.api.safety import RestAPIExecutionConfig
from stack.errors import BadInput
from tests.unit.agentic_system.tools.elsewhere import Elsewhere, call, says
from tests.unit.test_fetcher import Answer, breaks_off, in_chunks, sends, without_end


def weather(url: str, method: str = "POST", idempotent: bool = False, **more: Any) -> Any:
    execution = RestAPIExecutionConfig.model_validate({"url": url, "method": method} | more)
    definition = FunctionCallToolDefinition.model_validate(
        {
            "type": "function_call",
            "function_name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "city": {"param_type": "string", "required": True},
                "days": {"param_type": "int", "required": False},
            },
            "remote_execution": execution,
            "idempotent": idempotent,
        }
    )
    return remote_function(definition, execution)


async def test_the_arguments_are_sent_and_the_answer_is_what_the_model_is_told(elsewhere: Elsewhere) -> None:
    url, asked = elsewhere(says(celsius=21, sky="klar"))
    tool = weather(
        f"{url}/weather/{{{{city}}}}",
        "PUT",
        params={"unit": "celsius"},
        headers={"X-Key": "k", "Accept": "application/json"},
        body={"forecast": {"days": "{{days}}"}},
    )
    output = await tool.run(call(city="Köln/Süd", days=3))
    assert output.content == '{"celsius": 21, "sky": "klar"}'
    assert output.attachments == ()
    (one,) = asked
    assert (one.method, one.path) == ("PUT", "/weather/K%C3%B6ln%2FS%C3%BCd?unit=celsius")
    assert one.body == {"forecast": {"days": 3}}
    assert (one.headers["X-Key"], one.headers["Accept"]) == ("k", "application/json")
    assert one.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_without_a_body_nothing_is_sent_along(elsewhere: Elsewhere, method: str) -> None:
    url, asked = elsewhere(says(ok=True))
    await weather(url, method).run(call(city="Bonn"))
    (one,) = asked
    assert (one.method, one.path, one.body) == (method, "/?city=Bonn", None)
    assert "Content-Type" not in one.headers


@pytest.mark.parametrize(
    ("content", "content_type", "text"),
    [
        (b"sunny", "text/plain", "sunny"),
        ("warm: 21 °C".encode(), "text/plain; charset=UTF-8", "warm: 21 °C"),
        ("21 °C".encode("latin-1"), 'text/html; charset="iso-8859-1"', "21 °C"),
        (b"[1]", "application/problem+json", "[1]"),
        (b"a\0b", "text/plain", "a\N{REPLACEMENT CHARACTER}b"),
        (b"", "image/png", "It is done: status 200, without an answer."),
    ],
)
async def test_text_and_json_are_taken(elsewhere: Elsewhere, content: bytes, content_type: str, text: str) -> None:
    url, _ = elsewhere(sends(content=content, Content_Type=content_type))
    assert (await weather(url).run(call(city="Bonn"))).content == text


async def test_other_statuses_of_success_are_success(elsewhere: Elsewhere) -> None:
    url, _ = elsewhere(sends(201, b"made", Content_Type="text/plain"))
    assert (await weather(url).run(call(city="Bonn"))).content == "made"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sends(302, b"", Location="https://127.0.0.1/secret"), "redirects are not followed"),
        (says(404, detail="no such city"), 'status 404: {"detail": "no such city"}'),
        (sends(500, b"broken", Content_Type="text/plain"), "status 500: broken"),
        (sends(content=b"\x89PNG", Content_Type="image/png"), "'image/png'; allowed: text, JSON"),
        (sends(content=b"x", Content_Type="text/plain; charset=utf-7"), "the charset 'utf-7'"),
        (sends(content=b"\xff\xfe", Content_Type="text/plain"), "no utf-8"),
        (sends(content=b"x", Content_Encoding="gzip"), "content-encoding"),
        (breaks_off, "broke off"),
        (without_end, "more than 1048576 bytes"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"), "does not answer as it should"),
    ],
)
async def test_what_does_not_answer_as_it_should_fails_the_call(
    elsewhere: Elsewhere, answer: Answer, words: str
) -> None:
    url, asked = elsewhere(answer)
    with pytest.raises(ToolFailed) as caught:
        await weather(f"{url}/hunter2?key=hunter2").run(call(city="Bonn"))
    assert words in caught.value.message
    assert "hunter2" not in caught.value.message
    assert "/secret" not in caught.value.message
    assert len(asked) == 1


async def test_a_long_answer_is_cut(elsewhere: Elsewhere) -> None:
    url, _ = elsewhere(sends(content=b"begin" + b"." * 100_000 + b"end", Content_Type="text/plain"))
    content = (await weather(url).run(call(city="Bonn"))).content
    assert len(content) <= MAX_CHARACTERS
    assert content.startswith("begin.")
    assert content.endswith(".end")
    assert "characters are left out" in content


async def test_content_in_chunks_that_is_no_text_fails_the_call(elsewhere: Elsewhere) -> None:
    url, _ = elsewhere(in_chunks)
    with pytest.raises(ToolFailed, match="no utf-8"):
        await weather(url).run(call(city="Bonn"))


async def test_a_call_that_is_cancelled_cuts_its_connection(elsewhere: Elsewhere) -> None:
    asked_for, cut = threading.Event(), threading.Event()

    def hangs(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked_for.set()
        handler.rfile.read(1)  # until the far side goes
        cut.set()

    url, _ = elsewhere(hangs)
    running = asyncio.create_task(weather(url).run(call(city="Bonn")))
    await asyncio.to_thread(asked_for.wait, 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await asyncio.to_thread(cut.wait, 10)


async def test_one_that_hangs_keeps_no_other_from_being_run(elsewhere: Elsewhere) -> None:
    go_on = threading.Event()

    def hangs_for_bonn(handler: http.server.BaseHTTPRequestHandler) -> None:
        if "Bonn" in handler.path:
            go_on.wait(10)
        says(ok=True)(handler)

    url, _ = elsewhere(hangs_for_bonn)
    tool = weather(url, "GET")
    hanging = [asyncio.create_task(tool.run(call(city="Bonn"))) for _ in range(5)]
    try:
        assert (await tool.run(call(city="Trier"))).content == '{"ok": true}'
        assert not any(task.done() for task in hanging)
    finally:
        go_on.set()
        await asyncio.gather(*hanging)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "[::1]", "0", "10.0.0.1"])
async def test_what_is_inside_cannot_be_asked(host: str) -> None:
    with pytest.raises(ToolFailed, match="may not be asked"):
        await weather(f"https://{host}/").run(call(city="Bonn"))


def test_its_fetcher_is_the_guarded_one() -> None:
    assert asking.FETCHER.ports == {443}
    assert not asking.FETCHER.takes_http


@pytest.mark.parametrize(
    ("method", "idempotent", "expected"),
    [
        ("GET", False, True),
        ("POST", False, False),
        ("PUT", False, False),
        ("DELETE", False, False),
        ("POST", True, True),
    ],
)
def test_what_reads_or_is_marked_so_can_be_run_again(method: str, idempotent: bool, expected: bool) -> None:
    assert weather("https://example.org/", method, idempotent).is_idempotent is expected


def test_it_is_described_as_it_was_defined() -> None:
    described = weather("https://example.org/").definition()
    assert (described.name, described.description) == ("weather", "The weather in a city.")
    assert described.parameters["required"] == ["city"]
    assert described.parameters["properties"] == {"city": {"type": "string"}, "days": {"type": "integer"}}


def test_an_execution_that_no_call_fits_is_bad_input() -> None:
    with pytest.raises(BadInput, match="names the argument 'town'; allowed: city, days"):
        weather("https://example.org/{{town}}")


async def test_a_built_in_tool_can_be_asked_elsewhere_and_takes_no_key_with_it(elsewhere: Elsewhere) -> None:
    url, asked = elsewhere(says(found=["a"]))
    execution = RestAPIExecutionConfig.model_validate({"url": url, "method": "GET", "params": {"q": "{{query}}"}})
    tool = remote_builtin("brave_search", execution)
    assert tool.definition().name == tool.name == "brave_search"
    output = await tool.run(call({"brave_search_api_key": "hunter2"}, query="cats & dogs"))
    assert output.content == '{"found": ["a"]}'
    (one,) = asked
    assert one.path == "/?q=cats+%26+dogs"
    assert "hunter2" not in str(one)


# Secrets


def with_key(url: str, operators: Mapping[str, RemoteKey] | None = None) -> Any:
    """A function whose header names a key, and an argument beside it."""
    headers = {"Authorization": "Bearer {{key:weather.token}}", "X-City": "{{city}}"}
    definition = FunctionCallToolDefinition.model_validate(
        {
            "type": "function_call",
            "function_name": "weather",
            "description": "",
            "parameters": {"city": {"param_type": "string"}},
            "remote_execution": {"url": url, "method": "GET", "headers": headers},
        }
    )
    assert definition.remote_execution is not None
    return remote_function(definition, definition.remote_execution, operators or {})


async def test_a_header_can_name_a_key_of_the_request(elsewhere: Elsewhere) -> None:
    url, asked = elsewhere(says(ok=True))
    tool = with_key(url)
    await tool.run(call({"weather.token": "hunter2", "other": "hush"}, city="{{key:other}}"))
    (one,) = asked
    assert one.headers["Authorization"] == "Bearer hunter2"
    assert one.headers["X-City"] == "{{key:other}}", "an argument is no template"
    with pytest.raises(ToolFailed, match="there is no key"):
        await tool.run(call({"other": "hush"}, city="Bonn"))
    assert len(asked) == 1


async def test_the_operators_keys_go_to_the_hosts_that_they_are_for(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEATHER_TOKEN", "operators")
    url, asked = elsewhere(says(ok=True))
    host = url.removeprefix("https://").partition(":")[0]
    ours = RemoteKey(variable="WEATHER_TOKEN", hosts=[host])
    await with_key(url, {"weather.token": ours}).run(call(city="Bonn"))
    await with_key(url, {"weather.token": ours}).run(call({"weather.token": "own"}, city="Bonn"))
    assert [one.headers["Authorization"] for one in asked] == ["Bearer operators", "Bearer own"]
    theirs = RemoteKey(variable="WEATHER_TOKEN", hosts=["elsewhere.example"])
    with pytest.raises(ToolFailed, match="no key"):
        await with_key(url, {"weather.token": theirs}).run(call(city="Bonn"))
    assert len(asked) == 2


@pytest.mark.parametrize("more", [{"params": {"key": "{{key:a}}"}}, {"body": {"a": ["{{key:a}}"]}}])
def test_a_key_stands_in_headers_alone(more: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="allowed: in the values of headers"):
        weather("https://example.org/", **more)

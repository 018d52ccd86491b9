"""A shield elsewhere: real servers that answer, hang, redirect, talk nonsense, or are inside."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import ValidationError

from stack.api.safety import RestAPIExecutionConfig
from stack.errors import BadInput
from stack.fetcher import Fetcher
from stack.shield_config import ThirdPartyShield
from stack.shields import third_party
from stack.shields.verdict import UNJUDGED, Said, Verdict
from tests.unit.test_fetcher import HOST, Answer, Authority, is_this_machine, says_nothing, sends, serving

SHIELD = ThirdPartyShield(id="other", type="third_party_shield", timeout_s=5)
SAID = [Said("user", "Hello Wörld"), Said("assistant", "Hi")]
NOWHERE: Any = None  # it needs no context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def there(authority: Authority, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> Iterator[tuple[str, list[Any]]]:
    """A third party; gives its address and what it was asked: path, headers, body."""
    bodies: list[Any] = []

    def read_first(handler: http.server.BaseHTTPRequestHandler) -> None:
        bodies.append((handler.command, json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))))
        answer(handler)

    with serving(authority.server(HOST), read_first) as (port, requests):
        options: dict[str, Any] = dict(
            resolve=lambda *_: ["127.0.0.1"],
            is_allowed=is_this_machine,
            ports=frozenset({port}),
            tls=authority.client(),
        )
        monkeypatch.setattr(third_party, "FETCHER", Fetcher(**options))
        asked: list[Any] = []
        yield f"https://{HOST}:{port}/judge", asked
        asked += [(*request, *body) for request, body in zip(requests, bodies, strict=True)]


def says(**answer: Any) -> Answer:
    return sends(content=json.dumps(answer).encode())


async def judged(url: str, shield: ThirdPartyShield = SHIELD, **config: Any) -> Verdict:
    execution = RestAPIExecutionConfig.model_validate({"url": url, "method": "POST"} | config)
    return await third_party.judge(NOWHERE, shield, SAID, execution)


async def test_it_is_sent_the_messages_and_its_answer_is_the_verdict(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = says(is_violation=True, violation_type="toxic", violation_return_message="Be kind.", score=0.75)
    with there(authority, monkeypatch, answer) as (url, asked):
        verdict = await judged(
            url,
            method="PUT",
            params={"lang": "en & de", "strict": True, "none": None},
            headers={"X-Key": "secret"},
            body={"model": "v2", "nested": {"a": [1]}},
        )
    assert verdict == Verdict(True, "toxic", "Be kind.", 0.75)
    ((path, headers, method, body),) = asked
    assert path == "/judge?lang=en+%26+de&strict=true"
    assert (method, headers["X-Key"], headers["Content-Type"]) == ("PUT", "secret", "application/json")
    messages = [{"role": "user", "content": "Hello Wörld"}, {"role": "assistant", "content": "Hi"}]
    assert body == {"model": "v2", "nested": {"a": [1]}, "messages": messages}


async def test_no_violation_passes(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    with there(authority, monkeypatch, says(is_violation=False)) as (url, _):
        assert await judged(url) == Verdict(is_violation=False)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sends(content=b"<html>all is well</html>"), "does not answer as documented"),
        (sends(content=b"{}"), "is_violation: is required"),
        (says(is_violation="no"), "is_violation"),
        (says(is_violation=0), "is_violation"),
        (says(is_violation=False, more=1), "unknown key 'more'"),
        (sends(content=b"[]"), "does not answer as documented"),
        (sends(content=b"\xff\xfe"), "does not answer as documented"),
        (sends(content=b" " * 100_000), "bytes"),
        (sends(302, b"", Location="https://127.0.0.1/"), "redirects are not followed"),
        (sends(500, b'{"is_violation": false}'), "status 500"),
        (sends(404, b'{"is_violation": false}'), "status 404"),
        (sends(201, b'{"is_violation": false}'), "status 201"),
        (sends(content=b'{"is_violation": false}', Content_Encoding="gzip"), "content-encoding"),
        (sends(content=b'{"is_vio', Content_Length="100"), "broke off"),
    ],
)
@pytest.mark.parametrize("fails_open", [False, True])
async def test_what_does_not_answer_as_it_should_does_not_pass(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str, fails_open: bool
) -> None:
    shield = SHIELD.model_copy(update={"fails_open": fails_open})
    with there(authority, monkeypatch, answer) as (url, _):
        verdict = await judged(url, shield)
    assert (verdict.is_violation, verdict.type) == (not fails_open, UNJUDGED)
    assert verdict.message is not None
    assert words in verdict.message


async def test_one_that_hangs_does_not_pass(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    with there(authority, monkeypatch, says_nothing) as (url, _):
        verdict = await judged(url, SHIELD.model_copy(update={"timeout_s": 0.3}))
    assert (verdict.is_violation, verdict.type) == (True, UNJUDGED)


async def test_one_that_cannot_prove_who_it_is_does_not_pass(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(authority.server("other.example.org"), says(is_violation=False)) as (port, _):
        options: dict[str, Any] = dict(resolve=lambda *_: ["127.0.0.1"], is_allowed=is_this_machine)
        monkeypatch.setattr(third_party, "FETCHER", Fetcher(**options, ports=frozenset({port}), tls=authority.client()))
        assert (await judged(f"https://{HOST}:{port}/")).is_violation


@pytest.mark.parametrize(
    "url",
    [
        *("https://127.0.0.1/", "https://localhost/", "https://169.254.169.254/latest", "https://[::1]/", "https://0/"),
        *("http://example.org/", "file:///etc/passwd", "data:application/json,{}", "https://example.org:8080/"),
        *("https://user:pw@example.org/", "https://example.org/a b", "https://none.invalid/"),
    ],
)
async def test_an_address_that_is_not_allowed_is_bad_input(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        await judged(url)
    assert caught.value.param == "execution_config.url"


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"method": "GET"}, "method"),
        ({"method": "DELETE"}, "method"),
        ({"headers": {"Host": "inside"}}, "headers"),
        ({"headers": {"content-length": 1}}, "headers"),
        ({"headers": {"X-A": "b\r\nX-C: d"}}, "headers"),
        ({"headers": {"X A": "b"}}, "headers"),
        ({"headers": {"X-A": ["b"]}}, "headers"),
        ({"params": {"a": {"b": 1}}}, "params"),
        ({"body": {"messages": []}}, "body"),
    ],
)
async def test_what_cannot_be_sent_is_refused_before_anything_is(config: dict[str, Any], param: str) -> None:
    with pytest.raises(BadInput) as caught:
        await judged("https://example.org/", **config)
    assert caught.value.param == f"execution_config.{param}"


async def test_one_without_an_address_is_bad_input() -> None:
    with pytest.raises(BadInput, match="'other' needs an execution_config"):
        await third_party.judge(NOWHERE, SHIELD, SAID, None)


def test_a_far_side_cannot_keep_a_thread_for_ever(authority: Authority) -> None:
    """Its headers drip for longer than the whole call may take."""
    never, ended = threading.Event(), threading.Event()

    def drips(handler: http.server.BaseHTTPRequestHandler) -> None:
        try:
            while not never.wait(0.02):
                handler.wfile.write(b"x")
        finally:
            ended.set()

    with serving(authority.server(HOST), drips) as (port, _):
        options: dict[str, Any] = dict(resolve=lambda *_: ["127.0.0.1"], is_allowed=is_this_machine)
        fetcher = Fetcher(**options, ports=frozenset({port}), tls=authority.client(), seconds=0.5, idle_seconds=5)
        with pytest.raises(Exception, match=r"was not there|does not answer"):
            fetcher.send(f"https://{HOST}:{port}/", "POST", {}, b"{}", 1_000)
        assert ended.wait(10), "the connection is cut"


@pytest.mark.parametrize("fails_open", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"url": "https://none.invalid/"},
        {"url": "https://127.0.0.1/"},
        {"url": "https://example.org/a b"},
        {"url": "https://example.org/", "headers": {"Host": "inside"}},
    ],
)
async def test_a_config_that_cannot_be_asked_is_no_fault_of_the_request(
    config: dict[str, Any], fails_open: bool, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"method": "POST", "params": {"key": "secret"}} | config
    shield = ThirdPartyShield.model_validate(
        {"id": "other", "type": "third_party_shield", "execution_config": asked, "fails_open": fails_open}
    )
    verdict = await third_party.judge(NOWHERE, shield, SAID, None)
    assert (verdict.is_violation, verdict.type) == (not fails_open, UNJUDGED)
    assert "secret" not in f"{verdict.message} {caplog.text}"
    assert "example.org" not in str(verdict.message)
    assert "shield=other cannot be asked" in caplog.text


@pytest.mark.parametrize(
    ("config", "words"), [({"method": "GET"}, "allowed: POST, PUT"), ({"body": {"messages": []}}, "a key 'messages'")]
)
def test_a_config_that_could_never_be_asked_is_refused_at_the_start(config: dict[str, Any], words: str) -> None:
    asked = {"url": "https://example.org/", "method": "POST"} | config
    with pytest.raises(ValidationError, match=words):
        ThirdPartyShield.model_validate({"id": "other", "type": "third_party_shield", "execution_config": asked})


async def test_addresses_of_requests_that_hang_keep_no_thread_from_the_config_s(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hangs_or_answers(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.headers.get("X-Hang"):
            go_on.wait()
        says(is_violation=False)(handler)

    with there(authority, monkeypatch, hangs_or_answers) as (url, _):
        hanging = [asyncio.create_task(judged(url, headers={"X-Hang": "1"})) for _ in range(40)]
        try:
            await asyncio.sleep(0)
            config = RestAPIExecutionConfig.model_validate({"url": url, "method": "POST"})
            shield = SHIELD.model_copy(update={"execution_config": config})
            assert await third_party.judge(NOWHERE, shield, SAID, None) == Verdict(is_violation=False)
            assert not any(task.done() for task in hanging)
        finally:
            go_on.set()
            await asyncio.gather(*hanging)

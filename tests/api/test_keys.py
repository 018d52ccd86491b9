"""In whose name a request is made: keys, scopes, and what is answered without any."""

import logging
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event

from serve_apps.middleware import Authenticate
from stack import keys
from stack.context import Context
from tests.api.conftest import HERE, URL
from tests.api.envelope import error_of
from tests.scripted_engine import ScriptedEngine

CHAT = {"model": "small", "messages": [{"role": "user", "content": "a"}]}


def made(context: Context, *scopes: str, tenant: str = "acme") -> str:
    return keys.create(context.store, tenant, "test", scopes or ("data", "inference", "training"))[1]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets 3 seconds pass for keyrings, which is more than they take things for known."""
    seconds = keys.monotonic() + 3
    monkeypatch.setattr(keys, "monotonic", lambda: seconds)


# Without keys


@pytest.mark.parametrize("authorization", [None, "Bearer none", "Bearer ", "Basic YTpi", "nonsense"])
def test_without_keys_this_machine_is_the_default_tenant(
    client: TestClient, context: Context, data: dict[str, Any], authorization: str | None
) -> None:
    headers = {"authorization": authorization} if authorization is not None else {}
    body = {"uuid": "train", "dataset": data}
    assert client.post("/datasets/create", json=body, headers=headers).status_code == 200
    assert context.store.datasets.get("default", "train") is not None


@pytest.mark.parametrize("host", ["192.168.1.5", "::ffff:10.0.0.1", "2001:db8::1", "testclient"])
def test_without_keys_no_other_machine_is_answered(
    app: FastAPI, context: Context, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(app, client=(host, 50_000), base_url=URL) as other:
        for headers in ({}, bearer("none")):
            reply = other.get("/v1/models", headers=headers)
            assert "python -m stack keys create" in error_of(reply, 401)["message"]
        key = made(context)
        later(monkeypatch)
        assert other.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8321", "127.0.0.1", "127.0.0.1:8321", "[::1]", "[::1]:8321"])
def test_without_keys_it_answers_to_this_machines_own_names(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "localhost.evil.example", "", ":8321", "x" * 9_000],
)
def test_without_keys_it_does_not_answer_to_a_name_that_was_given_its_address(
    client: TestClient, context: Context, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = client.get("/v1/models", headers={"host": host})
    assert "only requests to localhost or 127.0.0.1" in error_of(reply, 401)["message"]
    assert len(reply.text) < 500
    key = made(context)
    later(monkeypatch)
    assert client.get("/v1/models", headers=bearer(key) | {"host": host}).status_code == 200


OTHER_SITES = [
    {"origin": "https://evil.example"},
    {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    {"origin": "http://127.0.0.1:3000"},  # another program's page on this machine
    {"origin": "http://127.0.0.1"},
    {"origin": "http://127.0.0.1:8321.evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", OTHER_SITES, ids=repr)
def test_without_keys_a_page_of_another_site_is_403(
    client: TestClient, context: Context, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"file": ("train.jsonl", b"{}\n")}  # a form, which a browser sends to other sites without asking first
    error = error_of(client.post("/datasets/upload", files=file, headers=headers), 403)
    assert (error["code"], error["type"]) == ("forbidden", "permission_error")
    assert "python -m stack keys create" in error["message"]
    key = made(context)
    later(monkeypatch)
    assert client.post("/datasets/upload", files=file, headers=headers | bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://127.0.0.1:8321", "sec-fetch-site": "same-origin"},
        {"host": "localhost:8321", "origin": "http://LOCALHOST:8321"},
        {"host": "localhost", "origin": "http://localhost"},
        {"host": "[::1]:8321", "origin": "http://[::1]:8321"},
        {"host": "localhost", "origin": "https://localhost"},  # behind a proxy that ends TLS
        {"sec-fetch-site": "none"},  # typed into the browser
    ],
    ids=repr,
)
def test_without_keys_its_own_pages_are_answered(client: TestClient, headers: dict[str, str]) -> None:
    file = {"file": ("train.jsonl", b"{}\n")}
    assert client.post("/datasets/upload", files=file, headers=headers).status_code == 200


# With keys


@pytest.fixture
def key(context: Context) -> str:
    """A key of the tenant acme, for all but agents and admin."""
    return made(context)


@pytest.fixture
def read(app: FastAPI) -> list[Any]:
    """What is read of bodies behind the check of keys."""
    messages: list[Any] = []

    class Reads:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def watched() -> Any:
                message = await receive()
                if message["type"] == "http.request":
                    messages.append(message)
                return message

            await self.inner(scope, watched, send)

    app.add_middleware(Reads)
    return messages


def test_a_key_is_taken_at_both_doors(client: TestClient, key: str) -> None:
    body = {"model": "small", "messages": CHAT["messages"]}
    for path in ("/inference/chat_completion", "/v1/chat/completions"):
        assert client.post(path, json=body, headers=bearer(key)).status_code == 200


def test_the_openai_client_sends_its_key(client: TestClient, key: str) -> None:
    def ask(api_key: str) -> Any:
        asked = openai.OpenAI(api_key=api_key, base_url=f"{URL}/v1", http_client=client, max_retries=0)
        return asked.chat.completions.create(model="small", messages=[{"role": "user", "content": "a"}])

    assert ask(key).choices[0].message.content == "Paris is big."
    with pytest.raises(openai.AuthenticationError, match="lsr_ID_SECRET"):
        ask("none")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_may_be_written_in_any_case(client: TestClient, key: str, scheme: str) -> None:
    assert client.get("/v1/models", headers={"authorization": f"{scheme} {key}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"Bearer none"],
        [b"KEY"],
        [b"Basic KEY"],
        [b"Bearer KEY KEY"],
        [b"Bearer KEY, Bearer KEY"],
        [b"Bearer KEY\xe4"],
        [b"Bearer \xff\xfe"],
        [b"BearerKEY"],
        [b"Bearer\tKEY"],
        [b"Bearer " + b"a" * 10_000_000],
        [b"a" * 10_000_000],
        [b"Bearer KEY", b"Bearer KEY"],
        [b"Bearer none", b"Bearer KEY"],
    ],
    ids=lambda headers: repr(headers)[:60],
)
def test_a_wrong_header_is_401_and_says_what_is_right(
    client: TestClient, context: Context, key: str, headers: list[bytes]
) -> None:
    given = [(b"authorization", header.replace(b"KEY", key.encode())) for header in headers]
    reply = client.get("/v1/models", headers=given)
    error = error_of(reply, 401)
    assert (error["code"], error["type"]) == ("unauthorized", "authentication_error")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert error["request_id"] == reply.headers["x-request-id"]
    assert len(reply.text) < 500
    assert key not in reply.text


@pytest.mark.parametrize("secret", ["A" * 43, "-" * 43])
def test_an_unknown_key_is_401(client: TestClient, key: str, secret: str) -> None:
    wrong = f"{key.rsplit(key[-43:], 1)[0]}{secret}"
    reply = client.get("/v1/models", headers=bearer(wrong))
    assert error_of(reply, 401)["message"] == "the API key is not known, or is revoked"


def test_a_revoked_key_is_401_also_when_it_was_the_last(app: FastAPI, context: Context, key: str) -> None:
    keys.revoke(context.store, key.split("_")[1])
    with TestClient(app, client=HERE, base_url=URL) as client:
        error_of(client.get("/v1/models", headers=bearer(key)), 401)
        error_of(client.get("/v1/models"), 401)


def test_a_revoked_key_is_refused_when_it_was_looked_up_long_enough_ago(
    client: TestClient, context: Context, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/v1/models", headers=bearer(key)).status_code == 200
    keys.revoke(context.store, key.split("_")[1])
    later(monkeypatch)
    error_of(client.get("/v1/models", headers=bearer(key)), 401)


def test_the_first_key_is_needed_soon(client: TestClient, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/v1/models").status_code == 200
    key = made(context)
    later(monkeypatch)
    error_of(client.get("/v1/models"), 401)
    assert client.get("/v1/models", headers=bearer(key)).status_code == 200


def test_a_request_without_a_right_key_is_refused_before_its_body_is_read(
    read: list[Any], client: TestClient, key: str
) -> None:
    for headers in ({}, bearer("none"), bearer(key[:-43] + "A" * 43)):
        error_of(client.post("/datasets/create", content=b"{}", headers=headers), 401)
    assert read == []
    error_of(client.post("/datasets/create", content=b"{}", headers=bearer(key)), 400)
    assert read != []


def test_an_unknown_path_needs_a_key_too(client: TestClient, key: str) -> None:
    error_of(client.get("/nowhere"), 401)
    error_of(client.get("/health/"), 401)
    error_of(client.get("/nowhere", headers=bearer(key)), 404)


@pytest.mark.parametrize("path", sorted(Authenticate.OPEN))
def test_what_is_open_needs_no_key(client: TestClient, context: Context, key: str, path: str) -> None:
    for headers in ({}, bearer("none"), bearer(key)):
        assert client.get(path, headers=headers).status_code == 200


def test_health_tells_other_machines_nothing_of_this_one(app: FastAPI, key: str) -> None:
    with TestClient(app, client=("192.168.1.5", 50_000), base_url=URL) as other:
        assert other.get("/health").json() == {"status": "ready", "service": "llama-stack-ray"}


@pytest.mark.parametrize(
    ("scope", "method", "path"),
    [
        ("inference", "GET", "/v1/models"),
        ("inference", "POST", "/inference/chat_completion"),
        ("inference", "GET", "/safety/shields"),
        ("inference", "POST", "/safety/run_shields"),
        ("data", "POST", "/datasets/create"),
        ("training", "GET", "/post_training/jobs"),
        ("training", "GET", "/evaluate/jobs"),
        ("inference", "POST", "/synthetic_data_generation/generate"),
        ("training", "POST", "/synthetic_data_generation/jobs"),
        ("inference", "POST", "/batch_inference/chat_completion"),
        ("training", "GET", "/batch_inference/jobs"),
        ("admin", "GET", "/metrics"),
    ],
)
def test_a_key_without_the_scope_is_403_and_the_scope_is_named(
    client: TestClient, context: Context, scope: str, method: str, path: str
) -> None:
    others = [other for other in ("inference", "data", "training", "agents") if other != scope]
    error = error_of(client.request(method, path, headers=bearer(made(context, *others)), json={}), 403)
    assert (error["code"], error["type"]) == ("forbidden", "permission_error")
    assert repr(scope) in error["message"]
    for right in (scope, "admin"):
        assert client.request(method, path, headers=bearer(made(context, right)), json={}).status_code in (200, 400)


def test_a_key_is_looked_up_once_for_many_requests(client: TestClient, context: Context, key: str) -> None:
    statements: list[str] = []
    event.listen(context.store.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    for _ in range(5):
        assert client.get("/v1/models", headers=bearer(key)).status_code == 200
    assert sum("sha256" in statement and "api_keys" in statement for statement in statements) == 1


def test_a_database_that_does_not_answer_is_503(client: TestClient, context: Context) -> None:
    with context.store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE api_keys RENAME TO gone")
    reply = client.get("/v1/models")
    assert error_of(reply, 503)["code"] == "unavailable"
    assert client.get("/health").status_code == 200


def test_no_key_stands_in_a_log(
    client: TestClient, context: Context, engine: ScriptedEngine, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine.fail(RuntimeError("broken"))
    wrong = key[:-43] + "A" * 43
    error_of(client.post("/v1/chat/completions", json=CHAT, headers=bearer(key)), 500)
    error_of(client.post("/v1/chat/completions", json=CHAT, headers=bearer(wrong)), 401)
    assert "broken" in caplog.text
    assert key[-43:] not in caplog.text
    assert wrong[-43:] not in caplog.text


def test_the_openapi_document_declares_the_keys(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]

"""/models: an administrator adds and removes models, which everybody may ask then."""

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stack import keys
from stack.added_models import Application
from stack.api.models import ModelState
from stack.context import Context
from stack.store.models import RECENT_S
from tests.api.envelope import error_of
from tests.scripted_deployer import RUNNING, ScriptedDeployer

EXTRA = {"id": "extra", "path": "models/small", "context": 128, "prompt_format": "hermes"}
CHAT = {"model": "extra", "messages": [{"role": "user", "content": "Where?"}]}


def add(client: TestClient, **entry: Any) -> Any:
    reply = client.post("/models/add", json=EXTRA | entry)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_model_is_added_asked_and_removed(client: TestClient, deployer: ScriptedDeployer) -> None:
    added = add(client)
    assert added == {
        "id": "extra", "source": "added", "state": "starting", "reason": None, "replicas": 0,
        "created_at": added["created_at"], "model": EXTRA,
    }  # fmt: skip
    deployer.running["extra"] = RUNNING
    listed = client.get("/models/list").json()["data"]
    assert [(one["id"], one["source"], one["state"], one["replicas"]) for one in listed] == [
        ("small", "config", "running", 1),
        ("extra", "added", "running", 1),
    ]
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["small", "extra"]
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert client.post("/inference/chat_completion", json=CHAT).status_code == 200
    removed = client.post("/models/remove", json={"model_id": "extra"})
    assert (removed.status_code, removed.json()["state"]) == (200, "stopping")
    for path in ("/v1/chat/completions", "/inference/chat_completion"):
        assert error_of(client.post(path, json=CHAT), 404)["code"] == "model_not_found"
    assert client.get("/models/list").json()["data"][1]["state"] == "stopping"


def test_what_is_wrong_with_a_model_is_told(client: TestClient, deployer: ScriptedDeployer) -> None:
    add(client)
    deployer.running["extra"] = Application(ModelState.failed, 0, "ValueError: the weights are broken")
    extra = client.get("/models/list").json()["data"][1]
    assert (extra["state"], extra["reason"]) == ("failed", "ValueError: the weights are broken")


@pytest.mark.parametrize(
    ("entry", "status", "param", "words"),
    [
        ({"id": "small"}, 409, "id", "the config lists"),
        ({"id": "gateway"}, 409, "id", "another application"),
        ({"id": "a:b"}, 400, "id", "pattern"),
        ({"id": "../a"}, 400, "id", "pattern"),
        ({"id": None}, 400, "id", "string"),
        ({"path": "models/none"}, 400, "path", "no model in the folder"),
        ({"path": "a\0b"}, 400, "path", "NUL"),
        ({"path": "x" * 5_000}, 400, "path", "4000 characters"),
        ({"path": "~nobody-here/a"}, 400, "path", "cannot be read"),
        ({"replicas": 1}, 400, None, "unknown key 'replicas'; allowed: id, path"),
        ({"gpus": 3}, 400, None, "gpus is 3"),
        ({"prompt_format": "x"}, 400, "prompt_format", "'llama3'"),
        ({"min_replicas": 10**9}, 400, "min_replicas", "1000"),
        ({"engine": {"trust_remote_code": True}}, 400, "engine", "never"),
        ({"engine": {"worker_cls": "a.b"}}, 400, "engine", "config file alone"),
        ({"engine": {str(number): 1 for number in range(300)}}, 400, "engine", "at most 200"),
        ({"engine": []}, 400, "engine", "dictionary"),
    ],
)
def test_what_cannot_be_added_is_refused_and_the_wrong_field_is_named(
    client: TestClient, context: Context, entry: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = error_of(client.post("/models/add", json=EXTRA | entry), status)
    assert error["param"] == param
    assert words in error["message"]
    assert context.store.models.list() == []


@pytest.mark.parametrize("key", ["id", "path"])
def test_half_a_character_is_refused(client: TestClient, key: str) -> None:
    body = '{"id": "extra", "path": "models/small", "KEY": "\\ud83d"}'.replace("KEY", key)
    error_of(client.post("/models/add", content=body, headers={"content-type": "application/json"}), 400)


def test_the_same_model_again_is_fine_and_another_one_is_409(client: TestClient) -> None:
    assert add(client) == add(client)
    error = error_of(client.post("/models/add", json=EXTRA | {"context": 256}), 409)
    assert (error["code"], error["param"]) == ("conflict", "id")


def test_a_model_of_the_config_is_409_with_what_to_do(client: TestClient) -> None:
    error = error_of(client.post("/models/remove", json={"model_id": "small"}), 409)
    assert "out of the config file" in error["message"]


@pytest.mark.parametrize("id", ["none", "gateway", "small:tune-1", "ä"])
def test_a_model_that_was_not_added_is_404_and_named(client: TestClient, id: str) -> None:
    error = error_of(client.post("/models/remove", json={"model_id": id}), 404)
    assert error["param"] == "model_id"
    assert repr(id) in error["message"]


@pytest.mark.parametrize("body", [{"model_id": ""}, {"model_id": "a\0"}, {"model_id": "x" * 301}, {"id": "extra"}])
def test_what_names_no_model_is_400(client: TestClient, body: dict[str, Any]) -> None:
    error_of(client.post("/models/remove", json=body), 400)


def test_ray_serve_being_away_is_503(client: TestClient, deployer: ScriptedDeployer, context: Context) -> None:
    deployer.is_away = True
    reply = client.post("/models/add", json=EXTRA)
    error_of(reply, 503)
    assert int(reply.headers["retry-after"]) > 0
    error_of(client.get("/models/list"), 503)
    assert context.store.models.list() == []


def test_only_administrators_may(app: FastAPI, context: Context) -> None:
    def of(scopes: list[str]) -> TestClient:
        key = keys.create(context.store, "acme", "test", scopes)[1]
        return TestClient(app, raise_server_exceptions=False, headers={"authorization": f"Bearer {key}"})

    user, admin = of(["inference", "data", "training", "agents"]), of(["admin"])
    for method, path, body in [
        ("GET", "/models/list", None),
        ("POST", "/models/add", EXTRA),
        ("POST", "/models/remove", {"model_id": "extra"}),
    ]:
        assert "'admin'" in error_of(user.request(method, path, json=body), 403)["message"]
        assert admin.request(method, path, json=body).status_code == 200
    (row,) = context.store.models.list()
    assert (row.tenant, row.removed_at is not None) == ("acme", True)


def test_another_gateway_knows_an_added_model_within_a_second(app: FastAPI, client: TestClient) -> None:
    assert RECENT_S <= 1
    add(client)
    assert client.get("/v1/models/extra").json()["id"] == "extra"

"""What every route has in common: envelopes, request ids, bounds, health and the OpenAPI document."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from serve_apps import gateway
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput
from tests import samples
from tests.api.conftest import HERE, URL
from tests.api.envelope import INTERNALS, error_of
from tests.api.test_inference import CHAT
from tests.scripted_engine import ScriptedEngine

POSTS = [
    "/inference/chat_completion",
    "/inference/completion",
    "/inference/embeddings",
    "/batch_inference/chat_completion",
    "/batch_inference/completion",
    "/batch_inference/jobs",
    "/batch_inference/job/cancel",
    "/reward_scoring/score",
    "/synthetic_data_generation/generate",
    "/synthetic_data_generation/jobs",
    "/synthetic_data_generation/job/cancel",
    "/safety/run_shields",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/models/add",
    "/models/remove",
    "/datasets/create",
    "/datasets/delete",
    "/datasets/uploads/delete",
    "/memory_banks/create",
    "/memory_banks/drop",
    "/memory_banks/ingest",
    "/memory_banks/ingest/job/cancel",
    "/memory_bank/insert",
    "/memory_bank/update",
    "/memory_bank/query",
    "/memory_bank/documents/get",
    "/memory_bank/documents/delete",
    "/agentic_system/create",
    "/agentic_system/update",
    "/agentic_system/delete",
    "/agentic_system/session/create",
    "/agentic_system/session/get",
    "/agentic_system/session/delete",
    "/agentic_system/turn/create",
    "/agentic_system/turn/cancel",
    "/agentic_system/turn/approve",
    "/post_training/supervised_fine_tune",
    "/post_training/preference_optimize",
    "/post_training/train_reward_model",
    "/post_training/job/cancel",
    "/evaluate/question_answering/",
    "/evaluate/summarization/",
    "/evaluate/text_generation/",
    "/evaluate/judged/",
    "/evaluate/benchmark/",
    "/evaluate/function_calling/",
    "/evaluate/compare",
    "/evaluate/job/cancel",
    "/experiments/create",
    "/experiments/update",
    "/experiments/create_run",
    "/experiments/artifacts/upload",
    "/experiments/artifacts/get",
    "/artifacts/delete",
    "/runs/update",
    "/runs/log_metrics",
    "/logging/log_messages",
    "/logging/get_logs",
    "/telemetry/log_event",
]
GETS = [
    "/datasets/get",
    "/datasets/preview",
    "/memory_banks/get",
    "/memory_banks/ingest/job/status",
    "/memory_banks/ingest/job/logs",
    "/memory_banks/ingest/job/artifacts",
    "/agentic_system/get",
    "/agentic_system/session/list",
    "/post_training/job/status",
    "/post_training/job/logs",
    "/post_training/job/artifacts",
    "/evaluate/job/status",
    "/evaluate/job/logs",
    "/evaluate/job/artifacts",
    "/batch_inference/job/status",
    "/batch_inference/job/logs",
    "/batch_inference/job/artifacts",
    "/synthetic_data_generation/job/status",
    "/synthetic_data_generation/job/logs",
    "/synthetic_data_generation/job/artifacts",
    "/experiments/get",
    "/experiments/runs",
    "/artifacts/get",
    "/artifacts/content",
    "/runs/get",
    "/runs/metrics",
    "/telemetry/get_trace",
]
OTHERS = [
    "/health",
    "/datasets/list",
    "/datasets/uploads",
    "/memory_banks/list",
    "/memory_banks/ingest/jobs",
    "/agentic_system/list",
    "/agentic_system/turn/get",  # these three need two ids or more
    "/agentic_system/turn/events",
    "/agentic_system/step/get",
    "/experiments/list",
    "/metrics",
    "/models/list",
    "/safety/shields",
    "/v1/models",
    "/v1/models/{model}",
    "/post_training/jobs",
    "/evaluate/jobs",
    "/batch_inference/jobs",
    "/synthetic_data_generation/jobs",
]
# The parameters that GETS require, by how the paths begin.
IDS = {
    "/datasets/": "dataset_uuid",
    "/memory_banks/ingest/": "job_uuid",
    "/memory_banks/": "bank_id",
    "/agentic_system/": "agent_id",
    "/experiments/": "experiment_id",
    "/artifacts/": "artifact_id",
    "/runs/": "run_id",
    "/telemetry/": "trace_id",
    "/": "job_uuid",
}
FORMS = ["/datasets/upload"]  # of POST, with a body that is not JSON
# Of POSTS, with bounds of their own.
LARGER = ["/experiments/artifacts/upload", "/memory_bank/insert", "/memory_bank/update"]
JSON = {"content-type": "application/json"}


def id_of(path: str) -> str:
    return next(name for beginning, name in IDS.items() if path.startswith(beginning))


# Bodies


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"{", b"nonsense", b"{'model': 'small'}", b'{"model": "small",}', b'"'], ids=repr)
def test_a_body_that_is_not_json_is_400(client: TestClient, path: str, body: bytes) -> None:
    error = error_of(client.post(path, content=body, headers=JSON), 400)
    assert error["code"] == "not_json"
    assert error["message"].startswith("the body is not JSON")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [b"\xff\xfe", b'{"model": "\xff"}', b"[" * 50_000, b'{"model": ' + b"9" * 10_000 + b"}"],
    ids=["not UTF-8", "half UTF-8", "too deep", "too long a number"],
)
def test_a_body_that_cannot_be_read_is_400(client: TestClient, path: str, body: bytes) -> None:
    error_of(client.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"5", b'"text"', b"{}", b'{"request": {}}'], ids=repr)
def test_a_body_that_is_no_request_is_400(client: TestClient, path: str, body: bytes) -> None:
    error_of(client.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("address", [f"{path}?{name}=a%00b" for path in GETS for name in ("job_uuid", "dataset_uuid")])
def test_an_address_with_a_nul_character_is_400(client: TestClient, address: str) -> None:
    assert "NUL" in error_of(client.get(address), 400)["message"]


def test_a_path_with_a_nul_character_is_400(client: TestClient) -> None:
    assert "NUL" in error_of(client.get("/v1/models/a%00b"), 400)["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense", ""])
def test_json_under_another_content_type_is_400_with_the_right_one(client: TestClient, content_type: str) -> None:
    body = json.dumps(CHAT).encode()
    reply = client.post("/inference/chat_completion", content=body, headers={"content-type": content_type})
    assert "application/json" in error_of(reply, 400)["message"]


LONE = b"\\ud83d"  # one half of a character that takes two


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/inference/chat_completion", b'{"%s": 1}'),
        ("/inference/chat_completion", b'{"model": "%s", "messages": [{"role": "user", "content": "a"}]}'),
        ("/inference/chat_completion", b'{"model": "small", "messages": [{"role": "%s", "content": "a"}]}'),
        ("/inference/chat_completion", b'{"model": "small", "messages": [{"role": "user", "content": "%s"}]}'),
        ("/v1/chat/completions", b'{"model": "%s", "messages": [{"role": "user", "content": "a"}]}'),
        ("/datasets/create", b'{"uuid": "a", "dataset": {"columns": {"%s": "x"}, "content_url": "file:///a.jsonl"}}'),
        (
            "/datasets/create",
            b'{"uuid": "a", "dataset": {"columns": {"x": "text"}, "content_url": "file:///%s.jsonl"}}',
        ),
    ],
)
def test_half_a_character_is_400(client: TestClient, path: str, body: bytes) -> None:
    error_of(client.post(path, content=body.replace(b"%s", LONE), headers=JSON), 400)


def test_a_body_of_just_the_greatest_size_is_taken(client: TestClient, context: Context) -> None:
    body = json.dumps(CHAT).encode()
    body += b" " * (context.config.max_body_bytes - len(body))
    assert client.post("/inference/chat_completion", content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize("path", [*(path for path in POSTS if path not in LARGER), "/health", "/nowhere"])
def test_a_body_that_declares_too_great_a_size_is_413(client: TestClient, context: Context, path: str) -> None:
    limit = context.config.max_body_bytes
    error = error_of(client.post(path, content=b" " * (limit + 1), headers=JSON), 413)
    assert error["code"] == "too_large"
    assert str(limit) in error["message"]


@pytest.mark.parametrize("path", [path for path in POSTS if path not in LARGER])
def test_a_body_that_grows_too_great_as_it_arrives_is_413(client: TestClient, context: Context, path: str) -> None:
    limit = context.config.max_body_bytes

    def chunks() -> Iterator[bytes]:
        for _ in range(limit // 1024 + 1):
            yield b" " * 1024

    reply = client.post(path, content=chunks(), headers=JSON)
    assert "content-length" not in reply.request.headers
    error = error_of(reply, 413)
    assert error["code"] == "too_large"
    assert str(limit) in error["message"]


def test_a_body_in_chunks_is_taken(client: TestClient) -> None:
    body = json.dumps(CHAT).encode()
    chunks = (body[start : start + 7] for start in range(0, len(body), 7))
    assert client.post("/inference/chat_completion", content=chunks, headers=JSON).status_code == 200


# Request ids


def test_an_answer_has_a_new_request_id_each_time(client: TestClient) -> None:
    ids = [client.get("/health").headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", request_id) for request_id in ids)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("DELETE", "/health", 405),
        ("POST", "/datasets/create", 400),
        ("GET", "/datasets/get", 400),
    ],
)
def test_an_error_names_the_request_id_of_its_answer(client: TestClient, method: str, path: str, status: int) -> None:
    reply = client.request(method, path)
    assert error_of(reply, status)["request_id"] == reply.headers["x-request-id"]


def test_an_answer_to_too_great_a_body_has_a_request_id(client: TestClient, context: Context) -> None:
    reply = client.post("/datasets/create", content=b" " * (context.config.max_body_bytes + 1), headers=JSON)
    assert error_of(reply, 413)["request_id"] == reply.headers["x-request-id"]


def test_a_fault_of_our_own_has_a_request_id(client: TestClient, engine: ScriptedEngine) -> None:
    engine.fail(RuntimeError("secret"))
    reply = client.post("/v1/chat/completions", json=CHAT)
    assert error_of(reply, 500)["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("request_id", ["abc", "A-b_c.9", "0" * 128])
def test_a_given_request_id_is_kept(client: TestClient, request_id: str) -> None:
    assert error_of(client.get("/nowhere", headers={"x-request-id": request_id}), 404)["request_id"] == request_id


@pytest.mark.parametrize("request_id", ["", " ", "a b", "a\tb", "ä", "<script>", "0" * 129])
def test_a_request_id_that_is_not_safe_in_logs_is_replaced(client: TestClient, request_id: str) -> None:
    reply = client.get("/nowhere", headers=[(b"x-request-id", request_id.encode("latin-1"))])
    made = error_of(reply, 404)["request_id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    assert reply.headers["x-request-id"] == made


# Paths and methods


@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1", "/v2/models", "/inference", "/inference/chat_completion/x"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_404_and_named(client: TestClient, method: str, path: str) -> None:
    error = error_of(client.request(method, path), 404)
    assert error["code"] == "not_found"
    assert f"{method} {path}" in error["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in POSTS if path not in OTHERS),
        *(("POST", path) for path in [*GETS, "/health"]),
        ("DELETE", "/v1/models"),
    ],
)
def test_a_wrong_method_is_405_and_named(client: TestClient, method: str, path: str) -> None:
    error = error_of(client.request(method, path), 405)
    assert error["type"] == "invalid_request_error"
    assert f"{method} {path}" in error["message"]


@pytest.mark.parametrize("path", GETS)
def test_a_missing_or_too_long_query_is_400_and_named(client: TestClient, path: str) -> None:
    name = id_of(path)
    missing = error_of(client.get(path), 400)
    assert (missing["param"], missing["message"]) == (name, f"{name}: is required")
    long = error_of(client.get(path, params={name: "x" * 101}), 400)
    assert long["param"] == name
    assert "at most 100 characters" in long["message"]


@pytest.mark.parametrize("path", GETS)
@pytest.mark.parametrize("id", ["none", "", "../../etc/passwd", "' OR 1=1 --", "ä"])
def test_an_unknown_id_is_404_and_named(client: TestClient, path: str, id: str) -> None:
    name = id_of(path)
    error = error_of(client.get(path, params={name: id}), 404)
    assert (error["code"], error["param"]) == ("not_found", name)
    assert repr(id) in error["message"]


# Faults


def test_a_fault_of_the_database_is_500_without_internals(client: TestClient, context: Context) -> None:
    with context.store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE jobs")
    reply = client.get("/post_training/jobs")
    error = error_of(reply, 500)
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert not INTERNALS.search(reply.text)
    assert "jobs" not in reply.text
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("job_uuid", ["full", "locked"])
def test_the_words_of_a_request_do_not_pass_for_the_databases(
    client: TestClient, context: Context, job_uuid: str
) -> None:
    with context.store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE jobs")
    error_of(client.get("/post_training/job/status", params={"job_uuid": job_uuid}), 500)


def test_a_full_database_is_507_and_can_still_be_read(
    client: TestClient, context: Context, data: dict[str, Any]
) -> None:
    context.store.engine.dispose()
    event.listen(context.store.engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
    described = data | {"metadata": {"text": "x" * 16_000}}
    for number in range(100):  # into the room that is left in its file, and on
        reply = client.post("/datasets/create", json={"uuid": f"big-{number}", "dataset": described})
        if reply.status_code != 200:
            break
    assert error_of(reply, 507)["code"] == "storage_full"
    assert not INTERNALS.search(reply.text)
    error_of(client.get("/datasets/get", params={"dataset_uuid": f"big-{number}"}), 404)
    assert client.get("/post_training/jobs").json() == []


def test_a_database_that_others_keep_locked_is_503(client: TestClient, context: Context, data: dict[str, Any]) -> None:
    engine = context.store.engine
    engine.dispose()
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 10"))
    with engine.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")
        reply = client.post("/datasets/create", json={"uuid": "train", "dataset": data})
    error = error_of(reply, 503)
    assert error["code"] == "unavailable"
    assert int(reply.headers["retry-after"]) > 0
    assert client.post("/datasets/create", json={"uuid": "train", "dataset": data}).status_code == 200


# Health


def about() -> dict[str, str]:
    return {"service": "llama-stack-ray", "home": os.environ["STACK_HOME"]}


def test_when_everything_is_ready_health_is_200(client: TestClient) -> None:
    reply = client.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ready"} | about())


def test_before_that_health_is_503_with_what_is_not(client: TestClient, waiting_for: dict[str, str]) -> None:
    waiting_for["small"] = "DEPLOYING"
    reply = client.get("/health")
    assert (reply.status_code, reply.json()) == (
        503,
        {"status": "starting", "waiting_for": {"small": "DEPLOYING"}} | about(),
    )
    assert int(reply.headers["retry-after"]) > 0
    waiting_for.clear()
    assert client.get("/health").status_code == 200


# Models


def test_models_are_listed_with_their_adapters(client: TestClient, context: Context) -> None:
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    samples.add_adapter(context.store, "gone:tune-2", "gone", "tune-2")
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(model["id"], model["root"], model["object"]) for model in listed["data"]] == [
        ("small", "small", "model"),
        ("small:tune-1", "small", "model"),
    ]
    assert all(isinstance(model["created"], int) and model["created"] > 1_700_000_000 for model in listed["data"])


def test_a_model_is_found_by_its_id(client: TestClient, context: Context) -> None:
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    for name in ("small", "small:tune-1"):
        model = client.get(f"/v1/models/{name}").json()
        assert (model["id"], model["root"]) == (name, "small")
        assert model in client.get("/v1/models").json()["data"]


@pytest.mark.parametrize("id", ["big", "org/big", "small:tune-9"])
def test_an_unknown_model_is_404(client: TestClient, id: str) -> None:
    error = error_of(client.get(f"/v1/models/{id}"), 404)
    assert error["code"] == "model_not_found"
    assert error["message"] == f"there is no model '{id}'; there are: small"


# The application


def test_the_openapi_document_has_every_route_and_no_422(client: TestClient) -> None:
    document: dict[str, Any] = client.get("/openapi.json").json()
    served = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert served == {*(("POST", path) for path in POSTS + FORMS), *(("GET", path) for path in [*GETS, *OTHERS])}
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            assert ("default" in operation["responses"]) == (operation.get("security") != [])
            assert operation.get("description")
    assert "ValidationError" not in json.dumps(document)
    assert client.get("/openapi.json").json() == document


def test_every_reference_in_the_openapi_document_leads_somewhere(client: TestClient) -> None:
    text = client.get("/openapi.json").text
    schemas = json.loads(text)["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/([^\"]+)", text)) <= set(schemas)


def test_the_documentation_is_a_page(client: TestClient) -> None:
    reply = client.get("/docs")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    for path in [*POSTS, *GETS, *OTHERS]:
        assert path in reply.text
    assert "://" not in reply.text, "the page must need nothing from elsewhere"


def test_a_wrong_config_is_refused_when_the_application_is_built() -> None:
    with pytest.raises(BadInput, match="args of the application 'gateway': unknown key 'modles'"):
        gateway.build({"modles": []})


def test_an_application_of_a_smaller_bound_refuses_smaller_bodies(context: Context) -> None:
    config = context.config.model_copy(update={"max_body_bytes": 1_024})
    assert isinstance(config, Config)
    app = gateway.create_app(Context(config, context.store, context.artifacts, context.models), ready=never)
    with TestClient(app, client=HERE, base_url=URL) as client:
        error_of(client.post("/v1/completions", content=b" " * 1_025, headers=JSON), 413)


async def never() -> dict[str, str]:
    return {"everything": "NOT DEPLOYED"}


def test_an_error_does_not_echo_a_long_key(client: TestClient) -> None:
    for body in (
        {"x" * 3_000: 1},
        {"uuid": "a", "dataset": {"columns": {"x" * 3_000: 5}, "content_url": "file:///a"}},
    ):
        reply = client.post("/datasets/create", json=body)
        assert reply.status_code == 400
        assert len(reply.text) < 1_000

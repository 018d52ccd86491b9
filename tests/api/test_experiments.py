"""The routes of experiments, runs and artifacts, and content in ranges, from a local folder and from S3."""

import base64
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_apps import gateway
from stack.artifacts import BLOCK, Artifacts
from stack.context import Context
from stack.store import Artifact, now
from tests import samples
from tests.api.conftest import URL
from tests.api.envelope import error_of
from tests.s3 import S3

CONTENT = bytes(range(256)) * 5_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NOBODYS = "0" * 32


@pytest.fixture(params=["file", "s3"])
def kept(request: pytest.FixtureRequest, context: Context, tmp_path: Path) -> Context:
    """A context whose artifacts are in a local folder or in S3."""
    if request.param == "file":
        return context
    s3: S3 = request.getfixturevalue("s3")
    return replace(context, artifacts=Artifacts(s3.bucket(), cache=tmp_path / "cache"))


@pytest.fixture
def storing(kept: Context) -> Iterator[TestClient]:
    async def ready() -> dict[str, str]:
        return {}

    with TestClient(
        gateway.create_app(kept, ready), raise_server_exceptions=False, client=("127.0.0.1", 1), base_url=URL
    ) as client:
        yield client


def create(client: TestClient, name: str = "first", **metadata: Any) -> dict[str, Any]:
    reply = client.post("/experiments/create", json={"name": name, "metadata": metadata})
    assert reply.status_code == 200, reply.text
    experiment: dict[str, Any] = reply.json()
    return experiment


def body(experiment_id: str, content: bytes = CONTENT, **changes: Any) -> dict[str, Any]:
    text = base64.b64encode(content).decode()
    return dict(experiment_id=experiment_id, name="loss.png", artifact_type="plot", content=text) | changes


def upload(client: TestClient, content: bytes = CONTENT, **changes: Any) -> str:
    reply = client.post("/experiments/artifacts/upload", json=body(create(client)["id"], content, **changes))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def get_content(client: TestClient, artifact_id: str, **headers: str) -> Any:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.get("/artifacts/content", params={"artifact_id": artifact_id}, headers=names)


# The way of the specification


def test_an_experiment_from_its_start_to_its_end(client: TestClient) -> None:
    experiment = create(client, "first", lr=0.1)
    assert set(experiment) == {"id", "name", "status", "created_at", "updated_at", "metadata"}
    named = {"experiment_id": experiment["id"]}
    run = client.post("/experiments/create_run", json={"request": named | {"metadata": {"seed": 1}}}).json()
    assert (run["experiment_id"], run["status"], run["metadata"]) == (experiment["id"], "running", {"seed": 1})
    ended = {"run_id": run["id"], "status": "completed", "ended_at": "2999-01-01T01:00:00+01:00"}
    ended_run = client.post("/runs/update", json=ended).json()
    assert (ended_run["status"], ended_run["ended_at"]) == ("completed", "2999-01-01T00:00:00.000Z")
    assert client.get("/runs/get", params={"run_id": run["id"]}).json() == ended_run
    assert client.get("/experiments/runs", params=named).json() == [ended_run]
    changed = client.post("/experiments/update", json=named | {"status": "completed", "metadata": {"lr": None}}).json()
    assert (changed["status"], changed["metadata"]) == ("completed", {})
    assert client.get("/experiments/get", params=named).json() == changed
    assert client.get("/experiments/list").json() == [changed]


def test_an_artifact_from_its_upload_to_its_removal(storing: TestClient) -> None:
    experiment = create(storing)
    made = storing.post("/experiments/artifacts/upload", json={"request": body(experiment["id"], metadata={"a": 1})})
    artifact = made.json()
    assert (artifact["name"], artifact["type"], artifact["size"]) == ("loss.png", "plot", len(CONTENT))
    listed = storing.post("/experiments/artifacts/get", json={"experiment_id": experiment["id"]}).json()
    assert listed == [artifact]
    one = storing.get("/artifacts/get", params={"artifact_id": artifact["id"]}).json()
    assert artifact.items() <= one.items()
    (file,) = one["files"]
    assert (file["bytes"], file["sha256"]) == (len(CONTENT), SHA256)
    assert storing.get(file["url"]).content == CONTENT
    deleted = storing.post("/artifacts/delete", json={"artifact_id": artifact["id"]})
    assert deleted.json() == {"id": artifact["id"], "bytes": len(CONTENT)}
    error_of(storing.get(file["url"]), 404)
    assert storing.post("/experiments/artifacts/get", json={"experiment_id": experiment["id"]}).json() == []


def test_lists_come_in_pages(client: TestClient) -> None:
    for number in range(3):
        create(client, f"experiment {number}")
    everything = client.get("/experiments/list").json()
    first = client.get("/experiments/list", params={"limit": 2}).json()
    rest = client.get("/experiments/list", params={"limit": 2, "after": first[-1]["id"]}).json()
    assert first + rest == everything
    for limit in ("0", "1001", "-1", "x", ""):
        error_of(client.get("/experiments/list", params={"limit": limit}), 400)
    error_of(client.get("/experiments/list", params={"after": NOBODYS}), 404)
    listing = {"experiment_id": everything[0]["id"]}
    error_of(client.post("/experiments/artifacts/get", json=listing | {"limit": 1_001}), 400)
    error_of(client.post("/experiments/artifacts/get", json=listing | {"after": NOBODYS}), 404)


def test_other_metadata_under_a_name_are_409(client: TestClient) -> None:
    assert create(client, "first", lr=0.1) == create(client, "first", lr=0.1)
    reply = client.post("/experiments/create", json={"name": "first", "metadata": {"lr": 0.2}})
    assert error_of(reply, 409)["param"] == "name"


def test_a_jobs_run_is_its_own(client: TestClient, context: Context) -> None:
    run_id = samples.add_job(context.store, "job-1").run_id
    error = error_of(client.post("/runs/update", json={"run_id": run_id, "status": "completed"}), 409)
    assert error["param"] == "status"
    assert client.get("/runs/get", params={"run_id": run_id}).json()["status"] == "scheduled"


# Bad input


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/experiments/create", {"name": ""}),
        ("/experiments/create", {"name": " "}),
        ("/experiments/create", {"name": "a\0"}),
        ("/experiments/create", {"name": "a" * 201}),
        ("/experiments/create", {"name": 5}),
        ("/experiments/create", {"name": "a", "metadata": []}),
        ("/experiments/create", {"name": "a", "metadata": {"a": "x" * 20_000}}),
        ("/experiments/create", {"name": "a", "metadata": {str(n): n for n in range(1_001)}}),
        ("/experiments/create", {"name": "a", "other": 1}),
        ("/experiments/update", {"experiment_id": NOBODYS, "status": "done"}),
        ("/experiments/update", {"experiment_id": "x" * 101}),
        ("/runs/update", {"run_id": NOBODYS, "status": ""}),
        ("/runs/update", {"run_id": NOBODYS, "status": "x" * 101}),
        ("/runs/update", {"run_id": NOBODYS, "status": "a\0"}),
        ("/runs/update", {"run_id": NOBODYS, "ended_at": "yesterday"}),
        ("/runs/update", {"run_id": NOBODYS, "ended_at": "0001-01-01T00:00:00+14:00"}),
        ("/experiments/artifacts/upload", body(NOBODYS, b"", name="../a")),
        ("/experiments/artifacts/upload", body(NOBODYS, b"", name="a" * 256)),
        ("/experiments/artifacts/upload", body(NOBODYS, b"", artifact_type="film")),
        ("/experiments/artifacts/upload", body(NOBODYS) | {"content": 5}),
        ("/experiments/artifacts/upload", body(NOBODYS, b"", metadata={"a": "x" * 20_000})),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_field_is_400(client: TestClient, path: str, fields: dict[str, Any]) -> None:
    assert error_of(client.post(path, json=fields), 400)["message"]


@pytest.mark.parametrize(
    "metadata",
    [
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\\ud83d"}',
        b'{"\\ud83d": 1}',
        b'{"a":' + b"[" * 300 + b"]" * 300 + b"}",
    ],
    ids=["NaN", "infinite", "half a character", "half a character in a key", "deep"],
)
@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("/experiments/create", b'{"name": "a"'),
        ("/experiments/create_run", b'{"experiment_id": "ID"'),
        ("/experiments/update", b'{"experiment_id": "ID"'),
        (
            "/experiments/artifacts/upload",
            b'{"experiment_id": "ID", "name": "a", "artifact_type": "plot", "content": ""',
        ),
    ],
)
def test_metadata_that_cannot_be_kept_or_answered_are_400(
    client: TestClient, path: str, start: bytes, metadata: bytes
) -> None:
    start = start.replace(b"ID", create(client)["id"].encode())
    sent = start + b', "metadata": ' + metadata + b"}"
    error_of(client.post(path, content=sent, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("id", [NOBODYS, "none", "", "../../etc/passwd", "a\0", "' OR 1=1 --"])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/experiments/update", "experiment_id"),
        ("/experiments/create_run", "experiment_id"),
        ("/experiments/artifacts/get", "experiment_id"),
        ("/runs/update", "run_id"),
        ("/artifacts/delete", "artifact_id"),
    ],
)
def test_an_unknown_id_in_a_body_is_404(client: TestClient, path: str, name: str, id: str) -> None:
    error = error_of(client.post(path, json={name: id}), 404)
    assert error["param"] == name


def test_an_upload_over_the_bound_is_413(client: TestClient, context: Context) -> None:
    experiment, most = create(client), context.config.max_artifact_bytes
    reply = client.post("/experiments/artifacts/upload", json=body(experiment["id"], bytes(most + 1)))
    assert str(most) in error_of(reply, 413)["message"]
    declared = {"content-type": "application/json", "content-length": str(most * 2)}
    error_of(client.post("/experiments/artifacts/upload", content=b"{}", headers=declared), 413)
    assert client.post("/experiments/artifacts/get", json={"experiment_id": experiment["id"]}).json() == []


def test_an_upload_over_the_quota_is_507(client: TestClient, context: Context) -> None:
    config = context.config.model_copy(update={"max_tenant_bytes": len(CONTENT)})

    async def ready() -> dict[str, str]:
        return {}

    app = gateway.create_app(replace(context, config=config), ready)
    with TestClient(app, client=("127.0.0.1", 1), base_url=URL) as client:
        first = upload(client)
        reply = client.post("/experiments/artifacts/upload", json=body(create(client)["id"], b"1"))
        assert error_of(reply, 507)["code"] == "storage_full"
        client.post("/artifacts/delete", json={"artifact_id": first})
        upload(client)


# Content


def test_all_of_a_file(storing: TestClient) -> None:
    reply = get_content(storing, upload(storing))
    assert reply.status_code == 200
    assert reply.content == CONTENT
    assert reply.headers["content-length"] == str(len(CONTENT))
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["accept-ranges"] == "bytes"
    assert reply.headers["etag"] == f'"{SHA256}"'
    assert "content-range" not in reply.headers


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        (f"bytes={BLOCK - 1}-{BLOCK}", BLOCK - 1, BLOCK + 1),
        ("bytes=-5", len(CONTENT) - 5, len(CONTENT)),
        (f"bytes={len(CONTENT) - 1}-", len(CONTENT) - 1, len(CONTENT)),
        ("bytes=0-99999999999999999999", 0, len(CONTENT)),
    ],
)
def test_a_range_of_a_file(storing: TestClient, header: str, start: int, stop: int) -> None:
    reply = get_content(storing, upload(storing), range=header)
    assert reply.status_code == 206
    assert reply.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(CONTENT)}"
    assert reply.headers["content-length"] == str(stop - start)
    assert reply.content == CONTENT[start:stop]


@pytest.mark.parametrize("header", [f"bytes={len(CONTENT)}-", "bytes=-0", "bytes=99999999999-"])
def test_a_range_behind_the_file_is_416(storing: TestClient, header: str) -> None:
    reply = get_content(storing, upload(storing), range=header)
    assert error_of(reply, 416)["param"] == "range"
    assert reply.headers["content-range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize("header", ["bytes=0-1,4-5", "lines=1-2", "bytes=5-2", "nonsense"])
def test_what_is_no_single_range_is_answered_by_all(client: TestClient, header: str) -> None:
    reply = get_content(client, upload(client), range=header)
    assert (reply.status_code, len(reply.content)) == (200, len(CONTENT))


def test_a_download_goes_on_only_with_the_same_file(client: TestClient) -> None:
    made = upload(client)
    assert get_content(client, made, range="bytes=5-9", if_range=f'"{SHA256}"').status_code == 206
    for other in ('"other"', f'W/"{SHA256}"', "Wed, 21 Oct 2015 07:28:00 GMT"):
        reply = get_content(client, made, range="bytes=5-9", if_range=other)
        assert (reply.status_code, reply.content) == (200, CONTENT)


def test_a_file_that_the_client_has_is_304(client: TestClient) -> None:
    made = upload(client)
    for tag in (f'"{SHA256}"', f'"other", W/"{SHA256}"', "*"):
        reply = get_content(client, made, if_none_match=tag, range="bytes=5-9")
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", f'"{SHA256}"')
    assert get_content(client, made, if_none_match='"other"').status_code == 200


def test_an_empty_file(storing: TestClient) -> None:
    made = upload(storing, b"")
    reply = get_content(storing, made)
    assert (reply.status_code, reply.content, reply.headers["content-length"]) == (200, b"", "0")
    error_of(get_content(storing, made, range="bytes=0-"), 416)


@pytest.mark.parametrize("name", ["loss.png", 'a"; filename=evil.exe', "Grüße (1).txt", "a;b,c%2e", "<script>"])
def test_the_name_of_a_download_is_no_more_than_a_name(client: TestClient, name: str) -> None:
    disposition = get_content(client, upload(client, b"1", name=name)).headers["content-disposition"]
    start, _, quoted = disposition.partition("''")
    assert start == "attachment; filename*=UTF-8"
    assert urllib.parse.unquote(quoted) == name
    assert not set(quoted) & set('";, <>')


@pytest.mark.parametrize("file", ["other", "", "../content", "/etc/passwd", "content/../content", "manifest.json"])
def test_a_file_that_the_artifact_does_not_have_is_404(client: TestClient, file: str) -> None:
    params = {"artifact_id": upload(client, b"1"), "file": file}
    assert error_of(client.get("/artifacts/content", params=params), 404)["param"] == "file"


def test_content_that_is_lost_is_an_error_before_it_begins(storing: TestClient, kept: Context) -> None:
    made = upload(storing)
    kept.artifacts._files.rm_file(f"{kept.artifacts._path(f'experiments/{made}')}/content")
    error_of(get_content(storing, made), 404)
    kept.artifacts.remove(f"experiments/{made}")
    error_of(get_content(storing, made), 404)
    error_of(storing.get("/artifacts/get", params={"artifact_id": made}), 404)


def test_what_a_job_has_made_is_served_file_by_file(client: TestClient, context: Context, tmp_path: Path) -> None:
    (tmp_path / "made" / "deep").mkdir(parents=True)
    for name in ("adapter.bin", "deep/a b+c&d.txt"):
        (tmp_path / "made" / name).write_text(f"content of {name}")
    context.artifacts.publish("adapters/tune-1", tmp_path / "made")
    job = samples.add_job(context.store, "tune-1", "supervised_fine_tune")
    samples.start(context.store, "tune-1")
    experiment = context.store.telemetry.run_experiment("default", job.run_id)
    about = (experiment, job.run_id, "tune-1", "model", "adapters/tune-1", 50)
    made = Artifact("1" * 32, "default", *about, metadata={}, created_at=now())
    assert context.store.jobs.complete(job.id, 1, {}, None, made)
    (listed,) = client.post("/experiments/artifacts/get", json={"experiment_id": experiment}).json()
    files = client.get("/artifacts/get", params={"artifact_id": listed["id"]}).json()["files"]
    assert [client.get(file["url"]).text for file in files] == [f"content of {file['name']}" for file in files]
    assert client.get(files[1]["url"]).headers["content-disposition"].endswith("''a%20b%2Bc%26d.txt")
    error_of(client.get("/artifacts/content", params={"artifact_id": listed["id"]}), 400)


def test_the_openapi_document_tells_content_from_json(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    replies = document["paths"]["/artifacts/content"]["get"]["responses"]
    assert list(replies["200"]["content"]) == ["application/octet-stream"]
    assert {"206", "304", "416"} <= set(replies)
    upload_schema = json.dumps(document["components"]["schemas"]["UploadArtifactRequest"])
    assert "base64" in upload_schema

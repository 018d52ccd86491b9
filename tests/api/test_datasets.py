"""The data set API by HTTP: uploads, previews, lists, deletion, and whose they are."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stack import keys, uploads
from stack.context import Context
from tests import samples
from tests.api.conftest import URL
from tests.api.envelope import error_of
from tests.samples import DIALOG, dataset, evaluation

ROWS = b"".join(json.dumps({"dialog": DIALOG, "id": number}).encode() + b"\n" for number in range(4))
COLUMNS = {"dialog": "dialog", "id": "number"}
BOUNDARY = "boundary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
LOCAL = ("127.0.0.1", 50_000)


def upload(client: TestClient, content: bytes = ROWS, name: str = "train.jsonl") -> Any:
    return client.post("/datasets/upload", files={"file": (name, content)})


def uploaded(client: TestClient, content: bytes = ROWS, name: str = "train.jsonl") -> dict[str, Any]:
    reply = upload(client, content, name)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def create(client: TestClient, uuid: str, url: str, columns: dict[str, str] = COLUMNS) -> Any:
    return client.post("/datasets/create", json={"uuid": uuid, "dataset": {"columns": columns, "content_url": url}})


def part(name: str = "file", file_name: str | None = "train.jsonl", content: bytes = ROWS, more: str = "") -> bytes:
    shown = f'; filename="{file_name}"' if file_name is not None else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n{more}\r\n'
    return head.encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def nothing_is_kept(context: Context, home: Path) -> bool:
    arrived = list((home / "uploads").iterdir()) if (home / "uploads").exists() else []
    return not arrived and not files_below(home / "artifacts") and context.store.datasets.uploaded_bytes("default") == 0


@pytest.fixture
def tenants(app: FastAPI, context: Context) -> Iterator[tuple[TestClient, TestClient]]:
    """Clients of two tenants."""
    made = [keys.create(context.store, tenant, "tests", ["data", "training"])[1] for tenant in ("default", "acme")]
    headers = [{"authorization": f"Bearer {key}"} for key in made]
    with (
        TestClient(app, client=LOCAL, base_url=URL, headers=headers[0]) as one,
        TestClient(app, client=LOCAL, base_url=URL, headers=headers[1]) as another,
    ):
        yield one, another


# Uploads


def test_an_uploaded_file_is_kept_as_it_was_sent(client: TestClient, context: Context, home: Path) -> None:
    sent = uploaded(client)
    assert (sent["name"], sent["bytes"]) == ("train.jsonl", len(ROWS))
    assert sent["sha256"] == hashlib.sha256(ROWS).hexdigest()
    assert sent["content_url"] == f"upload://{sent['id']}/train.jsonl"
    assert [path.read_bytes() for path in files_below(home / "artifacts") if path.name == "content"] == [ROWS]
    assert context.store.datasets.uploaded_bytes("default") == len(ROWS)
    assert client.get("/datasets/uploads").json() == [sent]
    assert not list((home / "uploads").iterdir())


def test_an_uploaded_file_becomes_a_data_set_and_is_trained_on(client: TestClient) -> None:
    sent = uploaded(client, gzip.compress(ROWS), "train.jsonl.gz")
    registered = create(client, "train", sent["content_url"]).json()
    assert (registered["rows"], registered["sha256"], registered["bytes"]) == (4, sent["sha256"], sent["bytes"])
    shown = client.get("/datasets/preview", params={"dataset_uuid": "train", "rows": 2}).json()
    assert shown == {"dataset_uuid": "train", "rows": [{"dialog": DIALOG, "id": n} for n in (0, 1)], "more": True}
    assert client.post("/evaluate/question_answering/", json=evaluation("train")).status_code == 200


def test_names_of_any_language_are_taken(client: TestClient) -> None:
    sent = uploaded(client, name="Lehr sätze.jsonl")
    assert sent["name"] == "Lehr sätze.jsonl"
    assert create(client, "a", sent["content_url"]).status_code == 200


def test_an_uploaded_document_is_no_data_set(client: TestClient) -> None:
    sent = uploaded(client, b"some text", "notes.md")
    assert "must end with one of .jsonl" in error_of(create(client, "a", sent["content_url"]), 400)["message"]


@pytest.mark.parametrize("name", ["../../a.jsonl", "/etc/a.jsonl", "C:\\data\\a.jsonl"])
def test_of_a_path_only_the_name_is_kept(client: TestClient, name: str) -> None:
    reply = client.post("/datasets/upload", content=part(file_name=name) + END, headers=FORM)
    assert reply.json()["name"] == "a.jsonl"


@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_an_upload_may_come_in_pieces_of_any_size(client: TestClient, size: int) -> None:
    body = part() + END
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    assert client.post("/datasets/upload", content=pieces, headers=FORM).json()["bytes"] == len(ROWS)


def test_a_file_of_just_the_greatest_size_is_taken(client: TestClient, context: Context) -> None:
    limit = context.config.max_dataset_bytes
    assert uploaded(client, b"x" * limit)["bytes"] == limit


@pytest.mark.parametrize("over", [1, 2**20], ids=["by a byte", "by far"])
def test_a_declared_upload_over_its_bound_is_413_and_leaves_nothing(
    client: TestClient, context: Context, home: Path, over: int
) -> None:
    limit = context.config.max_dataset_bytes
    assert "more than" in error_of(upload(client, b"x" * (limit + over)), 413)["message"]
    assert nothing_is_kept(context, home)


@pytest.mark.parametrize("times", [1, 100], ids=["a block more", "a hundred times"])
def test_an_upload_that_grows_over_its_bound_is_413_and_leaves_nothing(
    client: TestClient, context: Context, home: Path, times: int
) -> None:
    limit = context.config.max_dataset_bytes

    def blocks() -> Iterator[bytes]:
        yield part(content=b"")[:-2]
        for _ in range(limit // 1024 * times + 1):
            yield b"x" * 1024
        yield b"\r\n" + END

    reply = client.post("/datasets/upload", content=blocks(), headers=FORM)
    assert "content-length" not in reply.request.headers
    assert "more than" in error_of(reply, 413)["message"]
    assert nothing_is_kept(context, home)


def test_an_upload_that_cannot_fit_is_507_before_it_is_written(
    client: TestClient, context: Context, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    monkeypatch.setattr(uploads.Upload, "write", None)
    assert error_of(upload(client), 507)["code"] == "storage_full"
    assert nothing_is_kept(context, home)


def test_a_disk_that_fills_up_meanwhile_is_507_and_nothing_is_kept(
    client: TestClient, context: Context, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "CHECK_BYTES", 10_000)
    # Nothing is declared, and there is less room at each look.
    room = iter(range(70_000, 0, -20_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(room)))
    body = part(content=b"x" * 60_000) + END
    blocks = (body[start : start + 5_000] for start in range(0, len(body), 5_000))
    monkeypatch.setattr("serve_apps.routes.datasets.BLOCK", 5_000)
    error_of(client.post("/datasets/upload", content=blocks, headers=FORM), 507)
    assert nothing_is_kept(context, home)


def test_what_a_tenant_keeps_is_bounded_until_it_is_deleted(app: FastAPI, context: Context) -> None:
    most = len(ROWS) * 5 // 2
    app.state.context = Context(
        context.config.model_copy(update={"max_tenant_bytes": most}), context.store, context.artifacts, context.engine
    )
    with TestClient(app, client=LOCAL, base_url=URL) as client:
        first = uploaded(client)
        uploaded(client)
        assert str(most) in error_of(upload(client), 507)["message"]
        deleted = client.post("/datasets/uploads/delete", json={"upload_id": first["id"]})
        assert (deleted.status_code, deleted.json()) == (200, first)
        uploaded(client)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body ends before the form does"),
        (b"nonsense", "not multipart/form-data"),
        (END, "the form has no file"),
        (part(), "the body ends before the form does"),
        (part()[:100], "the body ends before the form does"),
        (part(name="data") + END, "a part 'data'; allowed: one part 'file'"),
        (part(file_name=None) + END, "a part 'file'; allowed: one part 'file', with a file name"),
        (part(name="purpose", file_name=None, content=b"x") + part() + END, "a part 'purpose'"),
        (part() + part() + END, "more than one part"),
        (part(content=b"") + END, "is empty"),
        (part(file_name="a.exe") + END, "must end with one of .jsonl"),
        (part(file_name="") + END, "with a file name"),
        (part(file_name="a\x01.jsonl") + END, "printable"),
        (part(file_name="a" * 300 + ".jsonl") + END, "at most 255"),
        (part(more="X-Long: " + "x" * 20_000 + "\r\n") + END, ""),
        (part(more="X: y\r\n" * 5_000) + END, ""),
        (part().replace(b"Content-Disposition", b"Content-Type") + END, "a part ''"),
    ],
    ids=range(17),
)
def test_a_form_that_is_not_one_file_is_400_and_leaves_nothing(
    client: TestClient, context: Context, home: Path, body: bytes, words: str
) -> None:
    reply = client.post("/datasets/upload", content=body, headers=FORM)
    assert words in error_of(reply, 400)["message"]
    assert nothing_is_kept(context, home)


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "application/json", "multipart/form-data", "multipart/form-data; boundary="),
        *("multipart/mixed; boundary=b", "multipart/form-data; boundary=" + "b" * 5_000, "nonsense; ;;="),
    ],
    ids=range(7),
)
def test_another_content_type_is_400(client: TestClient, content_type: str) -> None:
    reply = client.post("/datasets/upload", content=part() + END, headers={"content-type": content_type})
    assert "multipart/form-data" in error_of(reply, 400)["message"]


async def test_a_connection_that_breaks_leaves_nothing(app: FastAPI, context: Context, home: Path) -> None:
    messages = iter([{"type": "http.request", "body": part(content=b"x" * 5_000), "more_body": True}])
    answers: list[dict[str, Any]] = []

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/datasets/upload",
        "raw_path": b"/datasets/upload",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", FORM["content-type"].encode())],
        "client": LOCAL,
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    assert answers[0]["status"] == 400
    assert nothing_is_kept(context, home)


# Deletion


def test_an_upload_goes_with_the_last_data_set_that_stands_on_it(
    client: TestClient, context: Context, home: Path
) -> None:
    sent = uploaded(client)
    for uuid in ("a", "b"):
        assert create(client, uuid, sent["content_url"]).status_code == 200
    error = error_of(client.post("/datasets/uploads/delete", json={"upload_id": sent["id"]}), 409)
    assert "stands on the upload" in error["message"]
    assert client.post("/datasets/delete", json={"dataset_uuid": "a"}).status_code == 200
    assert client.get("/datasets/uploads").json() == [sent]
    assert client.get("/datasets/preview", params={"dataset_uuid": "b"}).status_code == 200
    assert client.post("/datasets/delete", json={"request": {"dataset_uuid": "b"}}).status_code == 200
    assert client.get("/datasets/uploads").json() == []
    assert nothing_is_kept(context, home)
    error_of(client.post("/datasets/delete", json={"dataset_uuid": "b"}), 404)
    error_of(create(client, "a", sent["content_url"]), 404)


def test_a_data_set_that_a_job_needs_is_kept(client: TestClient, context: Context) -> None:
    assert create(client, "train", uploaded(client)["content_url"]).status_code == 200
    client.post("/evaluate/question_answering/", json=evaluation("train"))
    error = error_of(client.post("/datasets/delete", json={"dataset_uuid": "train"}), 409)
    assert (error["code"], error["param"]) == ("conflict", "dataset_uuid")
    assert "'evaluation-1'" in error["message"]
    samples.fail(context.store, "evaluation-1", "it is over")
    assert client.post("/datasets/delete", json={"dataset_uuid": "train"}).status_code == 200


# Jobs


@pytest.mark.parametrize("is_registered", [True, False])
@pytest.mark.parametrize("is_full", [True, False], ids=["a full disk", "a small quota"])
def test_a_job_that_cannot_fit_is_507_before_it_has_a_row(
    app: FastAPI, context: Context, home: Path, monkeypatch: pytest.MonkeyPatch, is_registered: bool, is_full: bool
) -> None:
    described = dataset(samples.write_rows(home / "data" / "a.jsonl", samples.dialogs(20)))
    pairs = dataset(samples.write_rows(home / "data" / "b.jsonl", samples.preferences(20)), **samples.PREFERENCES)
    reference, preferences = ("a", "b") if is_registered else (described, pairs)
    with TestClient(app, client=LOCAL, base_url=URL) as client:
        assert create(client, "a", described["content_url"], described["columns"]).status_code == 200
        assert create(client, "b", pairs["content_url"], pairs["columns"]).status_code == 200
        if is_full:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000))
        else:
            config = context.config.model_copy(update={"max_tenant_bytes": 4_000})
            app.state.context = replace(context, config=config)
        bodies = {
            "/evaluate/question_answering/": evaluation(reference),
            "/post_training/supervised_fine_tune": samples.fine_tuning(reference),
            "/post_training/preference_optimize": samples.preference_optimization(preferences),
            "/post_training/train_reward_model": samples.reward_training(
                preferences, algorithm="full", algorithm_config={}
            ),
        }
        for path, body in bodies.items():
            error = error_of(client.post(path, json=body), 507)
            assert (error["code"], "4000" in error["message"]) == ("storage_full", True)
            jobs = client.get(path.rsplit("/", 2 if path.endswith("/") else 1)[0] + "/jobs")
            assert (jobs.status_code, jobs.json()) == (200, [])
        monkeypatch.undo()
        app.state.context = context
        monkeypatch.setenv("STACK_HOME", str(home))
        for path, body in bodies.items():
            assert client.post(path, json=body).status_code == 200


# Lists and previews


def test_lists_are_paged(client: TestClient) -> None:
    sent = [uploaded(client) for _ in range(3)]
    for number, one in enumerate(sent):
        create(client, f"a{number}", one["content_url"])
    for path, key in (("/datasets/list", "uuid"), ("/datasets/uploads", "id")):
        everything = [one[key] for one in client.get(path).json()]
        assert len(everything) == 3
        first = client.get(path, params={"limit": 2}).json()
        rest = client.get(path, params={"limit": 2, "after": first[-1][key]}).json()
        assert [one[key] for one in first + rest] == everything
        error_of(client.get(path, params={"after": "none"}), 404)
        error_of(client.get(path, params={"limit": 0}), 400)
        error_of(client.get(path, params={"limit": 1_001}), 400)


@pytest.mark.parametrize("rows", ["0", "101", "-1", "x"])
def test_a_preview_of_too_many_rows_is_400(client: TestClient, rows: str) -> None:
    error = error_of(client.get("/datasets/preview", params={"dataset_uuid": "a", "rows": rows}), 400)
    assert error["param"] == "rows"


def test_numbers_beyond_all_numbers_can_be_shown(client: TestClient) -> None:
    sent = uploaded(client, b'{"x": [1e400, "\\u00e4", 12345678901234567890123]}\n')
    assert create(client, "a", sent["content_url"], {"x": "json"}).status_code == 200
    shown = client.get("/datasets/preview", params={"dataset_uuid": "a"}).json()
    assert shown["rows"] == [{"x": [None, "ä", 12345678901234567890123]}]


# Tenants


def test_what_is_anothers_is_not_found(tenants: tuple[TestClient, TestClient], context: Context) -> None:
    mine, theirs = tenants
    sent = uploaded(mine)
    assert create(mine, "train", sent["content_url"]).status_code == 200
    error = error_of(create(theirs, "stolen", sent["content_url"]), 404)
    assert "there is no upload" in error["message"]
    error_of(theirs.get("/datasets/get", params={"dataset_uuid": "train"}), 404)
    error_of(theirs.get("/datasets/preview", params={"dataset_uuid": "train"}), 404)
    error_of(theirs.post("/datasets/delete", json={"dataset_uuid": "train"}), 404)
    error_of(theirs.post("/datasets/uploads/delete", json={"upload_id": sent["id"]}), 404)
    assert theirs.get("/datasets/list").json() == theirs.get("/datasets/uploads").json() == []
    error_of(theirs.get("/datasets/uploads", params={"after": sent["id"]}), 404)
    assert mine.get("/datasets/preview", params={"dataset_uuid": "train"}).status_code == 200
    own = uploaded(theirs)
    assert create(theirs, "train", own["content_url"]).status_code == 200
    assert [one["content_url"] for one in mine.get("/datasets/list").json()] == [sent["content_url"]]
    assert context.store.datasets.uploaded_bytes("acme") == len(ROWS)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "upload://",
            "upload:///",
            "upload://none/train.jsonl",
            "upload://{id}",
            "upload://{id}/",
            "upload://{id}/b.jsonl",
        ),
        *("upload://{id}/../train.jsonl", "upload://{id}/train.jsonl?x", "upload://../{id}/train.jsonl"),
    ],
)
def test_addresses_of_no_upload_are_404(client: TestClient, url: str) -> None:
    error = error_of(create(client, "a", url.format(id=uploaded(client)["id"])), 404)
    assert error["param"] == "dataset.content_url"


def test_a_key_without_the_scope_may_not(app: FastAPI, context: Context) -> None:
    key = keys.create(context.store, "default", "tests", ["inference"])[1]
    with TestClient(app, client=LOCAL, base_url=URL, headers={"authorization": f"Bearer {key}"}) as client:
        error_of(upload(client), 403)
        error_of(client.get("/datasets/list"), 403)


@pytest.mark.parametrize(
    "url", ["https://[/a.jsonl", "https://[::1/a.jsonl", "https://]/a.jsonl", "https://℀.com/a.jsonl"]
)
def test_an_address_that_is_none_is_400(client: TestClient, url: str) -> None:
    body = {"uuid": "a", "dataset": {"columns": {"a": "text"}, "content_url": url}}
    error_of(client.post("/datasets/create", json=body), 400)


def test_outside_of_the_data_folders_nothing_is_told(client: TestClient) -> None:
    data = {"columns": {"a": "text"}, "content_url": "file:///proc/1/root/etc/passwd"}
    error = error_of(client.post("/datasets/create", json={"uuid": "a", "dataset": data}), 400)
    assert "Permission" not in error["message"]


@pytest.mark.parametrize(("path", "field"), [("delete", "dataset_uuid"), ("uploads/delete", "upload_id")])
def test_a_nul_character_in_an_id_is_400(client: TestClient, path: str, field: str) -> None:
    assert error_of(client.post(f"/datasets/{path}", json={field: "\0"}), 400)["param"] == field

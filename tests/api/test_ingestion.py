"""Inserts of any size by HTTP, with the store in the place of drivers."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from stack.context import Context
from tests import samples
from tests.api.envelope import error_of
from tests.memory import document
from tests.samples import dataset, ingestion, write_rows

INGEST = "/memory_banks/ingest"
FILE = {"name": "errors.jsonl", "bytes": 9, "sha256": "0" * 64}


@pytest.fixture
def texts(home: Path) -> dict[str, Any]:
    rows = [{"document_id": f"d{number}", "content": f"text {number}"} for number in range(4)]
    return dataset(write_rows(home / "data" / "texts.jsonl", rows), document_id="text", content="text")


@pytest.fixture
def bank_id(client: TestClient) -> str:
    found: str = client.post("/memory_banks/create", json={"name": "a", "config": {"type": "keyvalue"}}).json()[
        "bank_id"
    ]
    return found


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_a_job_is_accepted_listed_and_cancelled(
    client: TestClient, texts: dict[str, Any], bank_id: str, wrapped: bool
) -> None:
    body = ingestion(texts, bank_id=bank_id)
    reply = client.post(INGEST, json={"request": body} if wrapped else body)
    assert (reply.status_code, reply.json()) == (200, {"job_uuid": "ingest-1"}), reply.text
    assert client.post(INGEST, json=body).json() == {"job_uuid": "ingest-1"}
    (listed,) = client.get(f"{INGEST}/jobs").json()
    assert (listed["job_uuid"], listed["kind"], listed["status"]) == ("ingest-1", "ingest_documents", "scheduled")
    one = {"job_uuid": "ingest-1"}
    assert client.get(f"{INGEST}/job/status", params=one).json()["status"] == "scheduled"
    assert client.get(f"{INGEST}/job/logs", params=one).json()["log_lines"] == []
    assert client.get(f"{INGEST}/job/artifacts", params=one).json() == {"job_uuid": "ingest-1", "files": []}
    error_of(client.get("/batch_inference/job/status", params=one), 404)
    assert client.post(f"{INGEST}/job/cancel", json=one).json()["status"] == "cancelled"


def test_a_completed_job_tells_its_counts_and_files(
    client: TestClient, context: Context, texts: dict[str, Any], bank_id: str
) -> None:
    client.post(INGEST, json=ingestion(texts, bank_id=bank_id))
    samples.start(context.store, "ingest-1")
    progress = {"done": 4, "total": 4, "unit": "rows", "seconds_left": 0.0}
    samples.report(context.store, "ingest-1", progress, [("written", 0, 3.0), ("failed", 0, 1.0)])
    samples.complete(context.store, "ingest-1", {"path": "file:///a/b", "files": [FILE], "datasets": {}})
    status = client.get(f"{INGEST}/job/status", params={"job_uuid": "ingest-1"}).json()
    assert (status["status"], status["progress"]) == ("completed", progress)
    assert status["metrics"] == {"written": 3.0, "failed": 1.0}
    artifacts = client.get(f"{INGEST}/job/artifacts", params={"job_uuid": "ingest-1"}).json()
    assert artifacts == {"job_uuid": "ingest-1", "path": "file:///a/b", "files": [FILE]}


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"bank_id": "none"}, 404, "bank_id", "'none'"),
        ({"dataset": None, "source_bank_id": "none"}, 404, "source_bank_id", "'none'"),
        ({"dataset": "none"}, 404, "dataset", "'none'"),
        ({"dataset": None}, 400, None, "neither of dataset and source_bank_id"),
        ({"job_uuid": "../a"}, 400, "job_uuid", "'../a'"),
        ({"max_failed_rows": -1}, 400, "max_failed_rows", "not -1"),
        ({"documents": [document("a")]}, 400, None, "unknown key 'documents'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_wrong_job_says_what_is_allowed(
    client: TestClient,
    texts: dict[str, Any],
    bank_id: str,
    change: dict[str, Any],
    status: int,
    param: str | None,
    words: str,
) -> None:
    error = error_of(client.post(INGEST, json=ingestion(texts, bank_id=bank_id) | change), status)
    assert error["param"] == param
    assert words in error["message"]
    assert client.get(f"{INGEST}/jobs").json() == []


def test_rows_that_are_no_documents_are_refused(client: TestClient, data: dict[str, Any], bank_id: str) -> None:
    error = error_of(client.post(INGEST, json=ingestion(data, bank_id=bank_id)), 400)
    assert error["param"] == "dataset"
    assert "document_id (text) and content (text or json)" in error["message"]

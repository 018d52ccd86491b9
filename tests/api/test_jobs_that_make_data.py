"""Synthetic data and batches of any size by HTTP, with the store in the place of drivers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from stack import made_datasets
from stack.api.datasets import TrainEvalDatasetColumnType
from stack.config import Config
from stack.context import Context
from tests import samples
from tests.api.envelope import error_of
from tests.conftest import CONFIG
from tests.samples import batch, dataset, generation, write_rows
from tests.scripted_engine import ScriptedEngine

GENERATE, BATCH = "/synthetic_data_generation", "/batch_inference"
REWARD_MODELS = [{"kind": "classifier", "id": "reward", "path": "models/reward"}]
FILE = {"name": "rejected.jsonl", "bytes": 9, "sha256": "0" * 64}
both = pytest.mark.parametrize(
    ("api", "body_of"), [(GENERATE, generation), (BATCH, batch)], ids=["generation", "batch"]
)


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "reward_models": REWARD_MODELS}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


def post(client: TestClient, api: str, body: dict[str, Any], wrapped: bool = False) -> Any:
    return client.post(f"{api}/jobs", json={"request": body} if wrapped else body)


@both
@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_a_job_is_accepted_listed_and_cancelled(
    client: TestClient, data: dict[str, Any], api: str, body_of: Any, wrapped: bool
) -> None:
    body = body_of(data)
    reply = post(client, api, body, wrapped)
    assert (reply.status_code, reply.json()) == (200, {"job_uuid": body["job_uuid"]}), reply.text
    assert post(client, api, body).json() == {"job_uuid": body["job_uuid"]}
    (listed,) = client.get(f"{api}/jobs").json()
    assert (listed["job_uuid"], listed["status"]) == (body["job_uuid"], "scheduled")
    assert client.get(f"{api}/job/status", params={"job_uuid": body["job_uuid"]}).json()["status"] == "scheduled"
    assert client.get(f"{api}/job/logs", params={"job_uuid": body["job_uuid"]}).json()["log_lines"] == []
    empty = client.get(f"{api}/job/artifacts", params={"job_uuid": body["job_uuid"]}).json()
    assert empty == {"job_uuid": body["job_uuid"], "files": [], "datasets": {}}
    cancelled = client.post(f"{api}/job/cancel", json={"job_uuid": body["job_uuid"]})
    assert cancelled.json()["status"] == "cancelled"


@both
def test_what_a_lost_attempt_has_registered_goes_with_a_job_that_is_cancelled(
    client: TestClient, context: Context, home: Path, data: dict[str, Any], api: str, body_of: Any
) -> None:
    body = body_of(data)
    post(client, api, body)
    job = samples.start(context.store, body["job_uuid"])
    (name, *_) = made_datasets.names_of(job.kind, job.request)
    rows = write_rows(home / "made.jsonl", [{"text": "a"}])
    made_datasets.register(context, name, rows, {"text": TrainEvalDatasetColumnType.text}, {"job_uuid": job.uuid})
    assert context.store.jobs.lose_attempt(job.id, 1, "it was killed")
    assert client.get("/datasets/get", params={"dataset_uuid": name}).status_code == 200
    cancelled = client.post(f"{api}/job/cancel", json={"job_uuid": job.uuid})
    assert cancelled.json()["status"] == "cancelled"
    assert client.get("/datasets/get", params={"dataset_uuid": name}).status_code == 404


@both
def test_a_completed_job_tells_its_data_sets_and_files(
    client: TestClient, context: Context, data: dict[str, Any], api: str, body_of: Any
) -> None:
    body = body_of(data)
    post(client, api, body)
    samples.start(context.store, body["job_uuid"])
    progress = {"done": 4, "total": 4, "unit": "rows", "seconds_left": 0.0}
    samples.report(context.store, body["job_uuid"], progress, [("rows", 0, 4.0)])
    result = {"path": "file:///a/b", "files": [FILE], "datasets": {"sft": "mine"}}
    samples.complete(context.store, body["job_uuid"], result)
    status = client.get(f"{api}/job/status", params={"job_uuid": body["job_uuid"]}).json()
    assert (status["status"], status["metrics"], status["progress"]) == ("completed", {"rows": 4.0}, progress)
    artifacts = client.get(f"{api}/job/artifacts", params={"job_uuid": body["job_uuid"]}).json()
    assert artifacts == {"job_uuid": body["job_uuid"], **result}


@both
def test_jobs_are_found_in_their_own_api_alone(
    client: TestClient, data: dict[str, Any], api: str, body_of: Any
) -> None:
    for other_api, other in ((GENERATE, generation), (BATCH, batch)):
        assert post(client, other_api, other(data)).status_code == 200
    mine = body_of(data)["job_uuid"]
    assert [job["job_uuid"] for job in client.get(f"{api}/jobs").json()] == [mine]
    (foreign,) = {"generation-1", "batch-1"} - {mine}
    for what in ("status", "artifacts", "logs"):
        assert repr(foreign) in error_of(client.get(f"{api}/job/{what}", params={"job_uuid": foreign}), 404)["message"]
    error_of(client.get("/evaluate/job/status", params={"job_uuid": mine}), 404)


@both
@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"job_uuid": "../a"}, 400, "job_uuid", "'../a'"),
        ({"dataset": "none"}, 404, "dataset", "'none'"),
        ({"model": "big"}, 404, "model", "there is no model 'big'"),
        ({"max_failed_rows": -1}, 400, "max_failed_rows", "not -1"),
        ({"rows": 5}, 400, None, "unknown key 'rows'"),
        ({"sampling_params": {"strategy": "top_k"}}, 400, "sampling_params.top_k", "needs a top_k"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_wrong_job_says_what_is_allowed(
    client: TestClient,
    data: dict[str, Any],
    api: str,
    body_of: Any,
    change: dict[str, Any],
    status: int,
    param: str | None,
    words: str,
) -> None:
    error = error_of(post(client, api, body_of(data) | change), status)
    assert error["param"] == param
    assert words in error["message"]
    assert client.get(f"{api}/jobs").json() == []


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"num_generations": 0}, 400, "num_generations", "not 0"),
        ({"num_generations": 10_000}, 400, "num_generations", "not 10000"),
        ({"reward_model": "big"}, 404, "reward_model", "there are: reward"),
        ({"source": "memory_bank"}, 400, "source", "'dataset', 'self_instruct' or 'documents', not 'memory_bank'"),
        ({"source": "documents", "output": "preferences"}, 400, None, "allowed with the source 'documents'"),
        ({"source": "self_instruct"}, 400, None, "seed_prompts is required with the source 'self_instruct'"),
        ({"dataset": None}, 400, None, "dataset is required with the source 'dataset'"),
    ],
    ids=str,
)
def test_a_wrong_generation_says_what_is_allowed(
    client: TestClient, data: dict[str, Any], change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = error_of(post(client, GENERATE, generation(data) | change), status)
    assert error["param"] == param
    assert words in error["message"]


@both
def test_other_columns_empty_sets_and_ids_that_stand_twice_are_refused(
    client: TestClient, home: Path, api: str, body_of: Any
) -> None:
    for name, rows, columns, words in (
        ("a", [{"question": "b"}], {"question": "text"}, "this data set has: question (text)"),
        ("b", [], {"prompt": "text"}, "has no rows"),
        ("c", [{"id": "x", "prompt": "y"}] * 2, {"id": "text", "prompt": "text"}, "the rows 1 and 2 have the same id"),
    ):
        data = dataset(write_rows(home / "data" / f"{name}.jsonl", rows), **columns)
        error = error_of(post(client, api, body_of(data)), 400)
        assert words in error["message"]
        assert error["param"] == "dataset"


@both
def test_a_job_would_not_write_over_a_data_set(
    client: TestClient, data: dict[str, Any], api: str, body_of: Any
) -> None:
    for name in ("generation-1", "batch-1.answers"):
        assert client.post("/datasets/create", json={"uuid": name, "dataset": data}).status_code == 200
    assert "already" in error_of(post(client, api, body_of(data)), 409)["message"]


@both
def test_another_request_with_the_same_uuid_is_409(
    client: TestClient, data: dict[str, Any], api: str, body_of: Any
) -> None:
    post(client, api, body_of(data))
    assert (
        "stands for another job" in error_of(post(client, api, body_of(data) | {"max_failed_rows": 7}), 409)["message"]
    )


@both
def test_a_data_set_that_a_job_needs_is_not_deleted(
    client: TestClient, data: dict[str, Any], api: str, body_of: Any
) -> None:
    client.post("/datasets/create", json={"uuid": "train", "dataset": data})
    post(client, api, body_of("train"))
    error = error_of(client.post("/datasets/delete", json={"dataset_uuid": "train"}), 409)
    assert repr(body_of("train")["job_uuid"]) in error["message"]

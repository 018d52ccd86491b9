"""Data sets, fine-tuning and evaluation by HTTP, with the store in the place of drivers."""

import math
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from stack.context import Context
from stack.store import Adapter, now
from tests import samples
from tests.api.envelope import error_of
from tests.evaluated import completed
from tests.samples import (
    PREFERENCES,
    dataset,
    dialogs,
    evaluation,
    fine_tuning,
    preference_optimization,
    preferences,
    reward_training,
    write_rows,
)

FINE_TUNE = "/post_training/supervised_fine_tune"
PREFER, REWARD = "/post_training/preference_optimize", "/post_training/train_reward_model"
EVALUATE = "/evaluate/question_answering/"
FILE = {"name": "a.safetensors", "bytes": 9, "sha256": "0" * 64}
flat_and_wrapped = pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])


def post(client: TestClient, path: str, body: dict[str, Any], wrapped: bool = False) -> Any:
    return client.post(path, json={"request": body} if wrapped else body)


def status_of(client: TestClient, api: str, job_uuid: str) -> dict[str, Any]:
    reply = client.get(f"/{api}/job/status", params={"job_uuid": job_uuid})
    assert reply.status_code == 200, reply.text
    status: dict[str, Any] = reply.json()
    return status


# Data sets


@flat_and_wrapped
def test_a_data_set_is_registered_and_found(client: TestClient, data: dict[str, Any], wrapped: bool) -> None:
    created = post(client, "/datasets/create", {"uuid": "train", "dataset": data}, wrapped)
    assert created.status_code == 200
    registered = created.json()
    assert registered["rows"] == 4
    assert len(registered["sha256"]) == 64
    assert {key: registered[key] for key in data} == data
    assert client.get("/datasets/get", params={"dataset_uuid": "train"}).json() == registered
    assert post(client, "/datasets/create", {"uuid": "train", "dataset": data}).json() == registered


def test_another_data_set_of_the_same_uuid_is_409(client: TestClient, home: Path, data: dict[str, Any]) -> None:
    post(client, "/datasets/create", {"uuid": "train", "dataset": data})
    other = dataset(write_rows(home / "data" / "other.jsonl", dialogs(1)))
    error = error_of(post(client, "/datasets/create", {"uuid": "train", "dataset": other}), 409)
    assert (error["code"], error["param"]) == ("conflict", "uuid")
    assert "'train'" in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"content_url": "http://example.org/a.jsonl"}, "dataset.content_url", ["^(file|", "http://example.org"]),
        ({"content_url": "file:///etc/passwd"}, "dataset.content_url", ["outside of the data folders", "/home/data"]),
        ({"content_url": "file://" + "/a" * 3_000}, "dataset.content_url", ["at most 4096 characters"]),
        ({"columns": {}}, "dataset.columns", ["at least 1 item"]),
        ({"columns": {"dialog": "chat"}}, "dataset.columns.dialog", ["'chat'", "'dialog', 'text'"]),
        ({"columns": {"answer": "text"}}, None, ["row 1", "'answer'", "it has: dialog"]),
        ({"columns": {"dialog": "text"}}, None, ["row 1", "'dialog'", "text"]),
        ({"rows": 5}, "dataset", ["unknown key 'rows'", "columns, content_url, metadata"]),
    ],
)
def test_a_wrong_data_set_is_400(
    client: TestClient, data: dict[str, Any], change: dict[str, Any], param: str | None, words: list[str]
) -> None:
    error = error_of(post(client, "/datasets/create", {"uuid": "train", "dataset": data | change}), 400)
    for word in words:
        assert word in error["message"]
    assert param is None or error["param"] == param
    error_of(client.get("/datasets/get", params={"dataset_uuid": "train"}), 404)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("file://[/a.jsonl", "file:"),
        ("file:///a%00.jsonl", "file:"),
        ("file:///a\0.jsonl", "NUL"),
        ("file://x/a.jsonl", "file:"),
    ],
)
def test_an_address_that_no_file_has_is_400(client: TestClient, url: str, word: str) -> None:
    body = {"uuid": "train", "dataset": {"columns": {"x": "text"}, "content_url": url}}
    assert word in error_of(post(client, "/datasets/create", body), 400)["message"]


def test_a_data_set_over_its_bound_is_413(client: TestClient, context: Context, home: Path) -> None:
    limit = context.config.max_dataset_bytes
    file = write_rows(home / "data" / "big.jsonl", [{"text": "x" * 1_000}] * (limit // 1_000 + 1))
    body = {"uuid": "big", "dataset": dataset(file, text="text")}
    assert str(limit) in error_of(post(client, "/datasets/create", body), 413)["message"]


# Jobs


def jobs(data: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """The route, the API and the body of each kind of job."""
    return [(FINE_TUNE, "post_training", fine_tuning(data)), (EVALUATE, "evaluate", evaluation(data))]


@pytest.fixture
def pairs(home: Path) -> dict[str, Any]:
    """The description of a data set of 4 preferences."""
    return dataset(write_rows(home / "data" / "pairs.jsonl", preferences(4)), **PREFERENCES)


@flat_and_wrapped
def test_trainings_on_preferences_are_accepted_and_listed_by_kind(
    client: TestClient, context: Context, pairs: dict[str, Any], wrapped: bool
) -> None:
    trainings = [(PREFER, preference_optimization(pairs)), (REWARD, reward_training(pairs))]
    for path, body in trainings:
        kind, uuid = path.rsplit("/", 1)[-1], body["job_uuid"]
        for _ in range(2):
            reply = post(client, path, body, wrapped)
            assert (reply.status_code, reply.json()) == (200, {"job_uuid": uuid})
        status = status_of(client, "post_training", uuid)
        assert (status["kind"], status["status"], status["checkpoints"]) == (kind, "scheduled", [])
        listed = client.get("/post_training/jobs", params={"kind": kind}).json()
        assert [(job["job_uuid"], job["kind"]) for job in listed] == [(uuid, kind)]
        error = error_of(post(client, path, body | {"priority": 1}), 409)
        assert (error["code"], error["param"]) == ("conflict", "job_uuid")
        artifacts = client.get("/post_training/job/artifacts", params={"job_uuid": uuid}).json()
        assert artifacts == {"job_uuid": uuid, "checkpoints": [], "metrics": []}
        cancelled = client.post("/post_training/job/cancel", json={"job_uuid": uuid})
        assert cancelled.json()["status"] == "cancelled"
    assert len(client.get("/post_training/jobs").json()) == 2
    error = error_of(client.get("/post_training/jobs", params={"kind": "evaluate"}), 400)
    for word in ("supervised_fine_tune", "preference_optimize", "train_reward_model"):
        assert word in error["message"]


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "words"),
    [
        (PREFER, {"algorithm_config": {"reward_clip": 5}}, 400, "algorithm_config.reward_clip", ["5"]),
        (PREFER, {"algorithm_config": {"beta": 0}}, 400, "algorithm_config.beta", ["0"]),
        (PREFER, {"algorithm": "ppo"}, 400, "algorithm", ["'dpo'", "'ppo'"]),
        (PREFER, {"finetuned_model": "big"}, 404, "finetuned_model", ["there are: small"]),
        (PREFER, {"finetuned_model": "a\0b"}, 400, "finetuned_model", ["NUL"]),
        (PREFER, {"model": "small"}, 400, None, ["unknown key 'model'", "finetuned_model"]),
        (PREFER, {"dataset": "none"}, 404, "dataset", ["'none'"]),
        (REWARD, {"model": "big"}, 404, "model", ["there are: small"]),
        (REWARD, {"algorithm": "qlora"}, 400, "algorithm", ["GPU", "allowed: lora"]),
        (REWARD, {"algorithm": "full"}, 400, "algorithm_config", ["{}"]),
        (REWARD, {"validation_dataset": "none"}, 404, "validation_dataset", ["'none'"]),
    ],
)
def test_a_wrong_training_on_preferences_is_refused(
    client: TestClient,
    pairs: dict[str, Any],
    path: str,
    change: dict[str, Any],
    status: int,
    param: str | None,
    words: list[str],
) -> None:
    body = preference_optimization(pairs) if path == PREFER else reward_training(pairs)
    error = error_of(post(client, path, body | change), status)
    for word in words:
        assert word in error["message"]
    assert error["param"] == param
    assert client.get("/post_training/jobs").json() == []


@flat_and_wrapped
def test_a_job_is_accepted_and_scheduled(client: TestClient, data: dict[str, Any], wrapped: bool) -> None:
    for path, api, body in jobs(data):
        reply = post(client, path, body, wrapped)
        assert (reply.status_code, reply.json()) == (200, {"job_uuid": body["job_uuid"]})
        status = status_of(client, api, body["job_uuid"])
        assert (status["job_uuid"], status["status"], status["metrics"]) == (body["job_uuid"], "scheduled", {})
        assert "started_at" not in status


def test_a_job_on_a_registered_data_set_is_accepted(client: TestClient, data: dict[str, Any]) -> None:
    post(client, "/datasets/create", {"uuid": "train", "dataset": data})
    for path, _, body in jobs("train"):
        assert post(client, path, body).status_code == 200


def test_the_same_job_again_is_the_same_job(client: TestClient, context: Context, data: dict[str, Any]) -> None:
    for path, api, body in jobs(data):
        post(client, path, body)
        samples.start(context.store, body["job_uuid"])
        for wrapped in (False, True):
            again = post(client, path, body, wrapped)
            assert (again.status_code, again.json()) == (200, {"job_uuid": body["job_uuid"]})
        assert status_of(client, api, body["job_uuid"])["status"] == "running"
    assert len(context.store.jobs.under_way()) == 2


def test_another_job_of_the_same_uuid_is_409(client: TestClient, data: dict[str, Any]) -> None:
    (_, _, tuning), (_, _, questions) = jobs(data)
    post(client, FINE_TUNE, tuning)
    others = [
        (FINE_TUNE, tuning | {"validation_dataset": data}),
        (EVALUATE, questions | {"job_uuid": tuning["job_uuid"]}),
    ]
    for path, body in others:
        error = error_of(post(client, path, body), 409)
        assert (error["code"], error["param"]) == ("conflict", "job_uuid")
        assert "'tune-1'" in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"algorithm": "qlora"}, "algorithm", ["qlora", "allowed: lora"]),
        ({"algorithm": "full"}, "algorithm_config", ["full", "{}"]),
        ({"hyperparam_search_config": {"parameters": {}}}, "hyperparam_search_config.parameters", ["at least 1"]),
        ({"algorithm": "magic"}, "algorithm", ["'full', 'lora', 'qlora' or 'dora'", "'magic'"]),
        ({"job_uuid": "../x"}, "job_uuid", ["'../x'"]),
        ({"training_config": {}}, "training_config.n_epochs", ["n_epochs: is required", "batch_size: is required"]),
        ({"dataset": 5}, "dataset", ["5"]),
        ({"epochs": 5}, None, ["unknown key 'epochs'", "training_config"]),
    ],
)
def test_a_wrong_fine_tuning_is_400(
    client: TestClient, data: dict[str, Any], change: dict[str, Any], param: str | None, words: list[str]
) -> None:
    error = error_of(post(client, FINE_TUNE, fine_tuning(data) | change), 400)
    for word in words:
        assert word in error["message"]
    assert error["param"] == param
    assert client.get("/post_training/jobs").json() == []


@pytest.mark.parametrize(
    ("field", "value", "status", "word"),
    [("model", "big", 404, "there are: small"), ("dataset", "none", 404, "'none'")],
)
def test_a_fine_tuning_of_what_is_not_there_is_404(
    client: TestClient, data: dict[str, Any], field: str, value: str, status: int, word: str
) -> None:
    assert word in error_of(post(client, FINE_TUNE, fine_tuning(data) | {field: value}), status)["message"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"metrics": ["bleu"]}, 400, ["metrics.0", "'em' or 'f1'", "'bleu'"]),
        ({"metrics": []}, 400, ["metrics", "at least 1 item"]),
        ({"checkpoint": "big"}, 404, ["'big'", "there are: small"]),
        ({"dataset": "none"}, 404, ["'none'"]),
        ({"sampling_params": {"max_tokens": -1}}, 400, ["sampling_params.max_tokens", "-1"]),
    ],
)
def test_a_wrong_evaluation_is_refused(
    client: TestClient, data: dict[str, Any], change: dict[str, Any], status: int, words: list[str]
) -> None:
    error = error_of(post(client, EVALUATE, evaluation(data) | change), status)
    for word in words:
        assert word in error["message"]


def test_a_fine_tuning_shows_its_way_to_a_served_model(
    client: TestClient, context: Context, data: dict[str, Any]
) -> None:
    post(client, FINE_TUNE, fine_tuning(data))
    store = context.store
    samples.start(store, "tune-1")
    progress = {"done": 1, "total": 2, "unit": "steps", "seconds_left": 3.5}
    samples.report(store, "tune-1", progress, [("loss", 1, 2.0)])
    running = status_of(client, "post_training", "tune-1")
    assert (running["status"], running["progress"], running["metrics"]) == ("running", progress, {"loss": 2.0})
    assert running["checkpoints"] == []
    assert "completed_at" not in running

    samples.report(store, "tune-1", progress | {"done": 2}, [("loss", 2, 1.0)])
    checkpoint = {"model": "small:tune-1", "path": "file:///adapters/tune-1", "iters": 2, "files": [FILE]}
    result = {"checkpoints": [checkpoint]}
    samples.complete(
        store,
        "tune-1",
        result,
        Adapter("default", "small:tune-1", "small", "tune-1", "adapters/tune-1", created_at=now()),
    )
    completed = status_of(client, "post_training", "tune-1")
    assert (completed["status"], completed["metrics"], completed["checkpoints"]) == (
        "completed",
        {"loss": 1.0},
        [checkpoint],
    )
    assert completed["resources_allocated"] == {"workers": 1}
    assert completed["scheduled_at"] <= completed["started_at"] <= completed["completed_at"]

    artifacts = client.get("/post_training/job/artifacts", params={"job_uuid": "tune-1"}).json()
    assert (artifacts["job_uuid"], artifacts["checkpoints"]) == ("tune-1", [checkpoint])
    series = [(point["name"], point["step"], point["value"]) for point in artifacts["metrics"]]
    assert series == [("loss", 1, 2.0), ("loss", 2, 1.0)]
    answer = client.post(
        "/v1/chat/completions", json={"model": "small:tune-1", "messages": [{"role": "user", "content": "a"}]}
    )
    assert answer.status_code == 200


def test_two_evaluations_are_compared(client: TestClient, context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "before", ["Paris", "London"])
    completed(context, tmp_path, "after", ["Paris", "Paris"])
    found = post(client, "/evaluate/compare", {"first": "before", "second": "after"}).json()
    em, f1 = found["metrics"]
    assert (em["name"], em["difference"]["value"], f1["name"]) == ("em", 0.5, "f1")
    assert em["outcomes"] == {"both": 1, "only_first": 0, "only_second": 1, "neither": 0}
    (changed,) = found["changed"]
    assert (changed["row"], changed["first_answer"], changed["second_answer"]) == (2, "London", "Paris")
    completed(context, tmp_path, "other", ["Paris"], sha256="1" * 64)
    error = error_of(post(client, "/evaluate/compare", {"first": "before", "second": "other"}), 409)
    assert "different data" in error["message"]
    error_of(post(client, "/evaluate/compare", {"first": "before", "second": "after", "most": 101}), 400)


@pytest.mark.parametrize(
    ("path", "fields", "kind"),
    [
        ("summarization/", {"metrics": ["rouge", "bleu"]}, "evaluate_summarization"),
        ("text_generation/", {"metrics": ["perplexity"]}, "evaluate_text_generation"),
        ("judged/", {"metrics": ["rating"], "judge": "small", "rubric": "Be brief."}, "evaluate_judged"),
    ],
)
def test_the_other_evaluations_are_jobs_too(
    client: TestClient, data: dict[str, Any], path: str, fields: dict[str, Any], kind: str
) -> None:
    assert post(client, f"/evaluate/{path}", evaluation(data) | fields).json() == {"job_uuid": "evaluation-1"}
    assert status_of(client, "evaluate", "evaluation-1")["kind"] == kind
    error = error_of(post(client, f"/evaluate/{path}", evaluation(data) | fields | {"metrics": ["em"]}), 400)
    assert all(metric in error["message"] for metric in fields["metrics"])


def test_a_benchmark_is_a_job_too(client: TestClient) -> None:
    body = {"job_uuid": "benchmark-1", "tasks": ["capitals"], "checkpoint": "small"}
    assert post(client, "/evaluate/benchmark/", body).json() == {"job_uuid": "benchmark-1"}
    assert status_of(client, "evaluate", "benchmark-1")["kind"] == "evaluate_benchmark"


def test_an_evaluation_shows_its_scores(client: TestClient, context: Context, data: dict[str, Any]) -> None:
    post(client, EVALUATE, evaluation(data))
    empty = client.get("/evaluate/job/artifacts", params={"job_uuid": "evaluation-1"}).json()
    assert empty == {"job_uuid": "evaluation-1", "files": []}
    store = context.store
    samples.start(store, "evaluation-1")
    progress = {"done": 4, "total": 4, "unit": "examples", "seconds_left": 0.0}
    samples.report(store, "evaluation-1", progress, [("em", 0, 0.75), ("examples", 0, 4.0)])
    samples.complete(store, "evaluation-1", {"path": "file:///evaluations/evaluation-1", "files": [FILE]})
    status = status_of(client, "evaluate", "evaluation-1")
    assert (status["status"], status["progress"]) == ("completed", progress)
    assert status["metrics"] == {"em": 0.75, "examples": 4.0}
    artifacts = client.get("/evaluate/job/artifacts", params={"job_uuid": "evaluation-1"}).json()
    expected = {"job_uuid": "evaluation-1", "path": "file:///evaluations/evaluation-1", "files": [FILE]}
    assert artifacts == expected


def test_a_failed_job_shows_the_reason(client: TestClient, context: Context, data: dict[str, Any]) -> None:
    for path, api, body in jobs(data):
        post(client, path, body)
        samples.fail(context.store, body["job_uuid"], "the disk is full")
        status = status_of(client, api, body["job_uuid"])
        assert (status["status"], status["error"]) == ("failed", "the disk is full")
        assert status["completed_at"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverges_can_still_be_looked_at(
    client: TestClient, context: Context, data: dict[str, Any], value: float
) -> None:
    post(client, FINE_TUNE, fine_tuning(data))
    samples.start(context.store, "tune-1")
    progress = {"done": 1, "total": 2, "unit": "steps"}
    samples.report(context.store, "tune-1", progress, [("loss", 1, value), ("learning_rate", 1, 0.5)])
    assert status_of(client, "post_training", "tune-1")["metrics"]["learning_rate"] == 0.5
    artifacts = client.get("/post_training/job/artifacts", params={"job_uuid": "tune-1"})
    assert "learning_rate" in [point["name"] for point in artifacts.json()["metrics"]]


def test_jobs_are_listed_and_only_those_of_the_api(client: TestClient, context: Context, data: dict[str, Any]) -> None:
    assert client.get("/post_training/jobs").json() == []
    for path, _, body in jobs(data):
        post(client, path, body)
    for api, job_uuid in (("post_training", "tune-1"), ("evaluate", "evaluation-1")):
        assert [(job["job_uuid"], job["status"]) for job in client.get(f"/{api}/jobs").json()] == [
            (job_uuid, "scheduled")
        ]
    for api, job_uuid in (("post_training", "evaluation-1"), ("evaluate", "tune-1")):
        for what in ("status", "artifacts"):
            error = error_of(client.get(f"/{api}/job/{what}", params={"job_uuid": job_uuid}), 404)
            assert f"'{job_uuid}'" in error["message"]

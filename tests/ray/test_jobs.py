"""Jobs on real Ray with the real model: cancelling, logs as they come, and jobs that wait."""

import json
import threading
from typing import Any

import httpx
import pytest

from stack.store import Store
from stack.store.jobs import NewJob
from tests import samples
from tests.running_stack import MODEL, Stack, ended, wait_for

pytestmark = pytest.mark.alone

CANCELLED_WITHIN_S = 10
STATUS = "/post_training/job/status"


@pytest.fixture(scope="module")
def data(stack: Stack) -> dict[str, Any]:
    return samples.dataset(stack.data_at(samples.write_rows(stack.home / "data" / "jobs.jsonl", samples.dialogs(24))))


def submit(client: httpx.Client, data: dict[str, Any], uuid: str, epochs: int = 1) -> None:
    training = {"n_epochs": epochs, "n_iters": 0, "batch_size": 8, "shuffle": True}
    request = samples.fine_tuning(data, job_uuid=uuid, model=MODEL, training_config=training)
    reply = client.post("/post_training/supervised_fine_tune", json=request)
    assert reply.status_code == 200, reply.text


def status_of(client: httpx.Client, uuid: str) -> dict[str, Any]:
    status: dict[str, Any] = client.get(STATUS, params={"job_uuid": uuid}).json()
    return status


def test_a_running_job_is_cancelled_within_seconds_and_leaves_nothing(
    stack: Stack, client: httpx.Client, data: dict[str, Any]
) -> None:
    submit(client, data, "tune-long", epochs=1_000)
    wait_for(lambda: (status_of(client, "tune-long").get("progress") or {}).get("done"), 180)
    asked = client.post("/post_training/job/cancel", json={"job_uuid": "tune-long"})
    assert asked.json()["cancelled_at"]
    status = ended(client, "post_training", "tune-long", seconds=CANCELLED_WITHIN_S)
    assert status["status"] == "cancelled"
    assert [attempt["exit_reason"] for attempt in status["attempts"]] == ["it was stopped"]
    wait_for(lambda: not stack.processes("tune-long") and not stack.processes("RayTrainWorker"), CANCELLED_WITHIN_S)
    assert not (stack.home / "work" / "default" / "tune-long").exists()
    again = client.post("/post_training/job/cancel", json={"job_uuid": "tune-long"})
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


@pytest.fixture(scope="module")
def followed(stack: Stack, data: dict[str, Any]) -> list[str]:
    """The log of a training that was followed to its end."""
    lines: list[str] = []
    parameters = {"job_uuid": "tune-followed", "follow": True}
    with stack.client() as client:
        submit(client, data, "tune-followed")
        with client.stream(
            "GET", "/post_training/job/logs", params=parameters, headers={"accept": "text/event-stream"}, timeout=300
        ) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            for line in reply.iter_lines():
                if not lines and line:
                    # The first line comes while the job runs, not at its end.
                    assert status_of(client, "tune-followed")["status"] == "running"
                if line.startswith("data: {"):
                    lines += json.loads(line[6:])["log_lines"]
                elif line == "data: [DONE]":
                    break
    return lines


def test_logs_stream_from_the_first_line_to_the_last(client: httpx.Client, followed: list[str]) -> None:
    assert status_of(client, "tune-followed")["status"] == "completed"
    whole = client.get("/post_training/job/logs", params={"job_uuid": "tune-followed"}).json()
    assert followed == whole["log_lines"]
    assert any("loss=" in line for line in followed)
    # What Ray Train runs to clean up after it has found Ray's dashboard; else the end waits for twelve seconds.
    assert not [line for line in followed if "did not exit" in line or "GetTimeoutError" in line]


def test_the_files_of_a_job_are_found_with_sizes_and_hashes(
    stack: Stack, client: httpx.Client, followed: list[str]
) -> None:
    artifacts = client.get("/post_training/job/artifacts", params={"job_uuid": "tune-followed"}).json()
    (checkpoint,) = artifacts["checkpoints"]
    folder = stack.files_at(checkpoint["path"])
    for file in checkpoint["files"]:
        path = folder / file["name"]
        assert path.stat().st_size == file["bytes"]
        assert len(file["sha256"]) == 64


def test_a_job_that_no_node_can_run_says_so_and_blocks_no_other(
    stack: Stack, client: httpx.Client, data: dict[str, Any]
) -> None:
    # No request asks for GPUs where no model has any: the row is what one for such a model would be.
    request = samples.evaluation(data, job_uuid="evaluation-16-gpus", checkpoint=MODEL)
    store = Store(stack.store_url)
    job = NewJob("default", "evaluation-16-gpus", "evaluate", request, "evaluate", priority=10, bundles=[{"GPU": 16}])
    store.jobs.add(job, max_waiting=100)
    store.close()

    def status() -> dict[str, Any]:
        answer: dict[str, Any] = client.get("/evaluate/job/status", params={"job_uuid": job.uuid}).json()
        return answer

    waiting_for = wait_for(lambda: status().get("waiting_for"), 30)
    assert waiting_for == "no node has 16 GPU; the largest of each: 0 GPU"
    behind = samples.evaluation(data, job_uuid="evaluation-behind", checkpoint=MODEL)
    client.post("/evaluate/question_answering/", json=behind)
    assert ended(client, "evaluate", "evaluation-behind")["status"] == "completed"
    assert status()["status"] == "scheduled"
    client.post("/evaluate/job/cancel", json={"job_uuid": job.uuid})
    assert status()["status"] == "cancelled"


def test_jobs_are_accepted_while_others_run(stack: Stack, client: httpx.Client, data: dict[str, Any]) -> None:
    """Many clients at once, and the same job twice: each is accepted once."""
    replies: list[int] = []

    def post(number: int) -> None:
        request = samples.evaluation(data, job_uuid=f"at-once-{number % 5}", checkpoint=MODEL)
        with stack.client() as mine:
            replies.append(mine.post("/evaluate/question_answering/", json=request).status_code)

    threads = [threading.Thread(target=post, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 10
    for number in range(5):
        assert ended(client, "evaluate", f"at-once-{number}")["status"] == "completed"
    listed = client.get("/evaluate/jobs", params={"status": "completed", "limit": 1_000}).json()
    mine = [job["job_uuid"] for job in listed if job["job_uuid"].startswith("at-once-")]
    assert sorted(mine) == sorted(f"at-once-{number}" for number in range(5))

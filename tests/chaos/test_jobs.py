"""kill -9 of everything that a job runs on: the job goes on, ends once, and nothing that was acknowledged is gone."""

import json
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import samples
from tests.running_stack import MODEL, SCRIPTED, Stack, ended, wait_for

pytestmark = pytest.mark.long
DRIVER = "jobs.supervised_fine_tune"
TRAIN_WORKER = "RayTrainWorker"
SUPERVISOR = "ServeReplica:gateway:JobSupervisor"  # Ray has a JobSupervisor of its own for each of its jobs
GATEWAY = "ServeReplica:gateway:Gateway"
STEPS = 24


@pytest.fixture(scope="module")
def data(stack: Stack) -> dict[str, Any]:
    return samples.dataset(samples.write_rows(stack.home / "data" / "chaos.jsonl", samples.dialogs(24)))


def submit(client: httpx.Client, data: dict[str, Any], uuid: str) -> None:
    """A training of 24 steps, with a checkpoint every third."""
    training = {"n_epochs": 2, "n_iters": 0, "batch_size": 2, "shuffle": True}
    request = samples.fine_tuning(data, job_uuid=uuid, model=MODEL, training_config=training)
    reply = client.post("/post_training/supervised_fine_tune", json=request)
    assert reply.status_code == 200, reply.text


def status_of(client: httpx.Client, uuid: str) -> dict[str, Any]:
    status: dict[str, Any] = client.get("/post_training/job/status", params={"job_uuid": uuid}).json()
    return status


def wait_for_checkpoint(client: httpx.Client, uuid: str, steps: int) -> None:
    """Waits for a checkpoint of at least so many steps."""

    def saved() -> bool:
        status = status_of(client, uuid)
        assert status["status"] in ("scheduled", "running"), status
        return any(checkpoint["iters"] >= steps for checkpoint in status.get("checkpoints") or [])

    wait_for(saved, 240, lambda: status_of(client, uuid))


def assert_ran_once(client: httpx.Client, uuid: str, attempts: int) -> None:
    """The job is completed by the last of so many attempts, of which no two overlap; each step counts once."""
    status = ended(client, "post_training", uuid)
    assert status["status"] == "completed", status
    assert [attempt["number"] for attempt in status["attempts"]] == list(range(1, attempts + 1)), status["attempts"]
    for earlier, later in zip(status["attempts"], status["attempts"][1:], strict=False):
        assert earlier["ended_at"] <= later["started_at"]
        assert earlier["exit_reason"] != "completed"
    assert status["attempts"][-1]["exit_reason"] == "completed"
    artifacts = client.get("/post_training/job/artifacts", params={"job_uuid": uuid}).json()
    losses = [point["step"] for point in artifacts["metrics"] if point["name"] == "loss"]
    assert losses == list(range(1, STEPS + 1))
    lines = client.get("/post_training/job/logs", params={"job_uuid": uuid}).json()["log_lines"]
    assert sum("going on from step" in line for line in lines) == attempts - 1


def test_a_training_survives_its_driver_its_worker_and_the_supervisor(
    stack: Stack, client: httpx.Client, data: dict[str, Any]
) -> None:
    submit(client, data, "tune-killed")
    wait_for_checkpoint(client, "tune-killed", 3)
    stack.kill_9(f"{DRIVER} --tenant default --job tune-killed")
    wait_for_checkpoint(client, "tune-killed", 6)
    stack.kill_9(TRAIN_WORKER)
    wait_for_checkpoint(client, "tune-killed", 12)
    # Its driver does not need the supervisor: the attempt goes on, and the next supervisor finds it.
    stack.kill_9(SUPERVISOR)
    assert_ran_once(client, "tune-killed", attempts=3)


def test_what_a_killed_gateway_has_accepted_is_kept(stack: Stack, client: httpx.Client, data: dict[str, Any]) -> None:
    accepted = []
    for number in range(8):
        if number == 4:
            stack.kill_9(GATEWAY)
        request = samples.evaluation(data, job_uuid=f"evaluation-{number}", checkpoint=MODEL, priority=-1)
        try:
            reply = client.post("/evaluate/question_answering/", json=request)
        except httpx.TransportError:
            continue
        if reply.status_code == 200:
            accepted.append(request["job_uuid"])
    assert len(accepted) >= 4
    wait_for(lambda: answers(client), 60)
    for uuid in accepted:
        assert ended(client, "evaluate", uuid)["status"] == "completed"


def test_a_batch_accounts_for_every_row_once_when_its_driver_and_its_worker_are_killed(
    stack: Stack, client: httpx.Client
) -> None:
    rows = [
        {"id": f"row-{number}", "prompt": f"Count on from {number}, please." + " Do it well." * 20}
        for number in range(400)
    ]
    file = samples.write_rows(stack.home / "data" / "counts.jsonl", rows)
    data = samples.dataset(file, id="text", prompt="text")
    body = samples.batch(data, job_uuid="batch-killed", model=MODEL, sampling_params={"max_tokens": 16})
    assert client.post("/batch_inference/jobs", json=body).status_code == 200

    def done() -> int:
        status = client.get("/batch_inference/job/status", params={"job_uuid": "batch-killed"}).json()
        assert status["status"] in ("scheduled", "running"), status
        return int((status.get("progress") or {"done": 0})["done"])

    wait_for(lambda: done() >= 32, 240)
    stack.kill_9("jobs.batch_inference --tenant default --job batch-killed")
    before = done()
    wait_for(lambda: done() > before, 240)
    stack.kill_9("MapWorker")
    status = ended(client, "batch_inference", "batch-killed")
    assert status["status"] == "completed", status
    assert (status["metrics"]["rows"], status["metrics"]["failed"]) == (400, 0)
    made = client.get("/datasets/get", params={"dataset_uuid": "batch-killed.answers"}).json()
    assert made["rows"] == 400


def done_of(client: httpx.Client, api: str, uuid: str) -> int:
    """How many rows a job that has not ended is done with."""
    status = client.get(f"/{api}/job/status", params={"job_uuid": uuid}).json()
    assert status["status"] in ("scheduled", "running"), status
    return int((status.get("progress") or {"done": 0})["done"])


def test_a_batch_survives_its_engine(stack: Stack, client: httpx.Client) -> None:
    rows = [{"id": f"row-{number}", "prompt": f"Count on from {number}, please."} for number in range(400)]
    file = samples.write_rows(stack.home / "data" / "engine.jsonl", rows)
    data = samples.dataset(file, id="text", prompt="text")
    body = samples.batch(data, job_uuid="batch-engine", model=MODEL, sampling_params={"max_tokens": 32})
    assert client.post("/batch_inference/jobs", json=body).status_code == 200
    wait_for(lambda: done_of(client, "batch_inference", "batch-engine") >= 32, 240)
    stack.kill_9("VLLM::EngineCore")
    status = ended(client, "batch_inference", "batch-engine", seconds=600)
    assert status["status"] == "completed", status
    assert status["metrics"]["rows"] == 400
    answers, errors = (f"batch-engine.{what}" for what in ("answers", "errors"))
    made = client.get("/datasets/get", params={"dataset_uuid": answers}).json()["rows"]
    failed = status["metrics"]["failed"]
    assert made + failed == 400
    if failed:
        assert client.get("/datasets/get", params={"dataset_uuid": errors}).json()["rows"] == failed


def test_a_generation_survives_its_engine(stack: Stack, client: httpx.Client) -> None:
    rows = [{"id": f"row-{number}", "prompt": f"Count on from {number}, please."} for number in range(300)]
    file = samples.write_rows(stack.home / "data" / "engine-prompts.jsonl", rows)
    body = samples.generation(
        samples.dataset(file, id="text", prompt="text"), job_uuid="grow-engine", model=MODEL,
        filtering_function="none", output="scored", num_generations=2,
        sampling_params={"strategy": "top_p", "temperature": 1.0, "max_tokens": 32},
    )  # fmt: skip
    assert client.post("/synthetic_data_generation/jobs", json=body).status_code == 200
    wait_for(lambda: done_of(client, "synthetic_data_generation", "grow-engine") >= 16, 240)
    stack.kill_9("VLLM::EngineCore")
    assert done_of(client, "synthetic_data_generation", "grow-engine") < 300, "it was asking when the engine died"
    status = ended(client, "synthetic_data_generation", "grow-engine", seconds=900)
    assert status["status"] == "completed", status
    metrics = status["metrics"]
    answered = 300 - metrics["failed"]
    assert answered >= 150, "what is asked once the engine is there again has its answers"
    assert (metrics["prompts"], metrics["rows"], metrics["generated"]) == (300, answered, 2 * answered)
    made = client.get("/datasets/get", params={"dataset_uuid": "grow-engine"}).json()
    assert made["rows"] == answered


def test_a_batch_survives_an_engine_of_its_own(stack: Stack, client: httpx.Client) -> None:
    serving = {process.pid for process in stack.processes("VLLM::EngineCore")}
    rows = [{"id": f"row-{number}", "prompt": f"Count on from {number}, please."} for number in range(300)]
    file = samples.write_rows(stack.home / "data" / "own-engine.jsonl", rows)
    data = samples.dataset(file, id="text", prompt="text")
    sampling = {"strategy": "greedy", "max_tokens": 32}
    body = samples.batch(data, job_uuid="batch-own", model=MODEL, engine="own", sampling_params=sampling)
    assert client.post("/batch_inference/jobs", json=body).status_code == 200
    wait_for(lambda: done_of(client, "batch_inference", "batch-own") >= 32, 400)
    own = [process for process in stack.processes("VLLM::EngineCore") if process.pid not in serving]
    assert len(own) == 1
    own[0].kill()
    psutil.wait_procs(own, timeout=60)
    assert done_of(client, "batch_inference", "batch-own") < 300, "it was asking when its engine died"
    status = ended(client, "batch_inference", "batch-own", seconds=900)
    assert status["status"] == "completed", status
    assert (status["metrics"]["rows"], status["metrics"]["failed"]) == (300, 0)
    assert len(status["attempts"]) == 1, "another engine has followed in the same attempt"
    made = client.get("/datasets/get", params={"dataset_uuid": "batch-own.answers"}).json()
    assert made["rows"] == 300
    assert serving <= {process.pid for process in stack.processes("VLLM::EngineCore")}, "the engines that serve live on"
    left = {process.pid for process in stack.processes("VLLM::EngineCore")} - serving
    wait_for(lambda: left.isdisjoint(process.pid for process in stack.processes("VLLM::EngineCore")), 60)


def test_a_row_that_kills_its_model_is_the_only_one_that_fails(stack: Stack, client: httpx.Client) -> None:
    rows = [{"id": f"row-{number}", "prompt": f"Count on from {number}."} for number in range(5)]
    rows.insert(2, {"id": "poison", "prompt": "fault:die-before-first"})
    data = samples.dataset(samples.write_rows(stack.home / "data" / "poison.jsonl", rows), id="text", prompt="text")
    body = samples.batch(data, job_uuid="batch-poison", model=SCRIPTED, sampling_params={"max_tokens": 2})
    assert client.post("/batch_inference/jobs", json=body).status_code == 200
    status = ended(client, "batch_inference", "batch-poison", seconds=900)
    assert status["status"] == "completed", status
    (error,) = client.get("/datasets/preview", params={"dataset_uuid": "batch-poison.errors", "rows": 9}).json()["rows"]
    assert (error["id"], error["code"]) == ("poison", "unavailable")
    made = client.get("/datasets/get", params={"dataset_uuid": "batch-poison.answers"}).json()
    assert made["rows"] == 5


def test_a_generation_accounts_for_every_passage_once_when_its_driver_and_its_worker_are_killed(
    stack: Stack, client: httpx.Client
) -> None:
    text = "".join(f"The river {number} rises in the mountains and is {number} km long. " for number in range(600))
    file = samples.write_rows(stack.home / "data" / "rivers-of-chaos.jsonl", [{"id": "rivers", "text": text}])
    body = samples.generation(
        samples.dataset(file, id="text", text="text"), job_uuid="grow-killed", model=MODEL, source="documents",
        filtering_function="none", num_generations=2, passage_characters=200,
        sampling_params={"strategy": "top_p", "temperature": 1.0, "max_tokens": 64},
    )  # fmt: skip
    assert client.post("/synthetic_data_generation/jobs", json=body).status_code == 200

    def done() -> int:
        return done_of(client, "synthetic_data_generation", "grow-killed")

    wait_for(lambda: done() >= 4, 240)
    stack.kill_9("jobs.generate_synthetic_data --tenant default --job grow-killed")
    before = done()
    wait_for(lambda: done() > before, 240)
    stack.kill_9("MapWorker")
    status = ended(client, "synthetic_data_generation", "grow-killed", seconds=600)
    assert status["status"] == "completed", status
    metrics = status["metrics"]
    rejected = sum(value for name, value in metrics.items() if name.startswith("rejected_"))
    assert metrics["failed"] == 0
    assert metrics["rows"] + rejected == 2 * metrics["prompts"], "each answer is a row, or is rejected"


def test_an_evaluation_accounts_for_every_row_once_when_its_driver_and_its_worker_are_killed(
    stack: Stack, client: httpx.Client
) -> None:
    rows = [{"prompt": f"Count on from {number}." + " Do it well." * 20, "completion": "1"} for number in range(400)]
    file = samples.write_rows(stack.home / "data" / "questions.jsonl", rows)
    data = samples.dataset(file, prompt="text", completion="text")
    body = samples.evaluation(data, job_uuid="evaluation-killed", checkpoint=MODEL, sampling_params={"max_tokens": 16})
    assert client.post("/evaluate/question_answering/", json=body).status_code == 200

    def done() -> int:
        status = client.get("/evaluate/job/status", params={"job_uuid": "evaluation-killed"}).json()
        assert status["status"] in ("scheduled", "running"), status
        return int((status.get("progress") or {"done": 0})["done"])

    wait_for(lambda: done() >= 32, 240)
    stack.kill_9("jobs.evaluate --tenant default --job evaluation-killed")
    before = done()
    assert before < 400
    wait_for(lambda: done() > before, 240)
    stack.kill_9("MapWorker")
    status = ended(client, "evaluate", "evaluation-killed")
    assert status["status"] == "completed", status
    assert (status["metrics"]["examples"], status["metrics"]["failed"]) == (400, 0)
    lines = client.get("/evaluate/job/logs", params={"job_uuid": "evaluation-killed"}).json()["log_lines"]
    assert any("going on from" in line for line in lines), "what was answered before the kill is kept"
    path = client.get("/evaluate/job/artifacts", params={"job_uuid": "evaluation-killed"}).json()["path"]
    examples = (Path(path.removeprefix("file://")) / "examples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in examples) == list(range(1, 401))


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_trainings_survive_all_of_ray(stack: Stack, data: dict[str, Any]) -> None:
    with stack.client() as client:
        submit(client, data, "tune-all-killed")
        submit(client, data, "tune-all-waiting")
        wait_for_checkpoint(client, "tune-all-killed", 3)
    stack.kill()
    stack.start()
    with stack.client() as client:
        assert_ran_once(client, "tune-all-killed", attempts=2)
        assert ended(client, "post_training", "tune-all-waiting")["status"] == "completed"


def test_a_batch_survives_all_of_ray(stack: Stack) -> None:
    """In a test of its own, as on two cores it waits for a training to end."""
    rows = [{"id": f"row-{number}", "prompt": f"Count on from {number}."} for number in range(400)]
    file = samples.write_rows(stack.home / "data" / "all-counts.jsonl", rows)
    data = samples.dataset(file, id="text", prompt="text")
    batch = samples.batch(data, job_uuid="batch-all-killed", model=MODEL, sampling_params={"max_tokens": 16})
    with stack.client() as client:
        assert client.post("/batch_inference/jobs", json=batch).status_code == 200
        wait_for(lambda: done_of(client, "batch_inference", "batch-all-killed") >= 32, 240)
    stack.kill()
    stack.start()
    with stack.client() as client:
        status = ended(client, "batch_inference", "batch-all-killed", seconds=600)
        assert (status["status"], len(status["attempts"])) == ("completed", 2), status
        assert (status["metrics"]["rows"], status["metrics"]["failed"]) == (400, 0)
        made = client.get("/datasets/get", params={"dataset_uuid": "batch-all-killed.answers"}).json()
        assert made["rows"] == 400
        lines = client.get("/batch_inference/job/logs", params={"job_uuid": "batch-all-killed"}).json()["log_lines"]
        assert any("going on from" in line for line in lines), "what was answered before the kill is kept"

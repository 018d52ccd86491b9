"""What a job uses and leaves behind, on real Ray: data sets of all kinds, experiments, logs, artifacts, one trace."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pyarrow
import pyarrow.parquet
import pytest
from llama_stack import LlamaStack

from tests import samples
from tests.running_stack import MODEL, Stack, ended, wait_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
CSV = "prompt,completion\n" + "".join(f'"What is {n}, plus one?",{n + 1}\n' for n in range(16))
FORMATS = ("parquet", "json", "jsonl")
TRAINING = {"n_epochs": 2, "n_iters": 0, "batch_size": 8, "shuffle": True}


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as client:
        yield client


@pytest.fixture(scope="module")
def tuned(stack: Stack, http: httpx.Client) -> dict[str, Any]:
    """The status of a finished training on an uploaded, compressed CSV file, within a trace of its client's."""
    sent = http.post("/datasets/upload", files={"file": ("sums.csv.gz", gzip.compress(CSV.encode()))})
    assert sent.status_code == 200, sent.text
    columns = {"prompt": "text", "completion": "text"}
    data = {"columns": columns, "content_url": sent.json()["content_url"]}
    created = http.post("/datasets/create", json={"uuid": "sums", "dataset": data})
    assert created.status_code == 200, created.text
    assert created.json()["rows"] == 16
    request = samples.fine_tuning(
        "sums", job_uuid="tune-sums", model=MODEL, validation_dataset="sums", training_config=TRAINING,
        logger_config={"report_to": ["tensorboard", "wandb"], "project": "sums"},
    )  # fmt: skip
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    reply = http.post("/post_training/supervised_fine_tune", json=request, headers=headers)
    assert reply.status_code == 200, reply.text
    status = ended(http, "post_training", "tune-sums")
    assert status["status"] == "completed", status
    return status


def test_a_job_has_a_run_in_an_experiment_with_its_figures(http: httpx.Client, tuned: dict[str, Any]) -> None:
    run = http.get("/runs/get", params={"run_id": tuned["run_id"]}).json()
    assert run["status"] == "completed"
    assert run["metadata"]["job_uuid"] == "tune-sums"
    experiment = http.get("/experiments/get", params={"experiment_id": run["experiment_id"]}).json()
    assert experiment["name"] == "supervised_fine_tune"
    points = http.get("/runs/metrics", params={"run_id": tuned["run_id"]}).json()
    names = {point["name"] for point in points}
    expected = {"loss", "learning_rate", "validation_loss", "tokens", "tokens_per_second", "memory_gb", "cpu_percent"}
    assert expected <= names
    losses = http.get("/runs/metrics", params={"run_id": tuned["run_id"], "name": "loss", "from_step": 2}).json()
    assert [point["step"] for point in losses] == [2, 3, 4]


def test_the_log_of_a_job_is_searched(http: httpx.Client, tuned: dict[str, Any]) -> None:
    search = {"query": "STEP 4/4 LOSS=", "filters": {"run_id": tuned["run_id"], "level": "info"}}
    found = http.post("/logging/get_logs", json=search).json()
    assert len(found) == 1
    assert "step 4/4 loss=" in found[0]["message"]


def test_what_a_job_has_made_is_found_and_fetched_whole_and_in_part(http: httpx.Client, tuned: dict[str, Any]) -> None:
    run = http.get("/runs/get", params={"run_id": tuned["run_id"]}).json()
    listed = http.post("/experiments/artifacts/get", json={"experiment_id": run["experiment_id"]}).json()
    (mine,) = [artifact for artifact in listed if artifact["name"] == "tune-sums"]
    assert mine["type"] == "checkpoint"
    artifact = http.get("/artifacts/get", params={"artifact_id": mine["id"]}).json()
    files = {file["name"]: file for file in artifact["files"]}
    assert any(name.startswith("tensorboard/") and "events.out.tfevents" in name for name in files)
    weights = files["adapter_model.safetensors"]
    address = {"artifact_id": mine["id"], "file": weights["name"]}
    whole = http.get("/artifacts/content", params=address).content
    assert len(whole) == weights["bytes"]
    assert hashlib.sha256(whole).hexdigest() == weights["sha256"]
    part = http.get("/artifacts/content", params=address, headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])


def test_a_job_reports_to_weights_and_biases_too(stack: Stack, tuned: dict[str, Any]) -> None:
    (log,) = (stack.home / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"tune-sums" in content
    assert b"train/loss" in content


def test_one_trace_leads_from_the_request_to_the_job(stack: Stack, tuned: dict[str, Any]) -> None:
    def services() -> set[str]:
        return {span.service for span in stack.spans if span.trace_id == TRACE}

    wait_for(lambda: {"gateway", "job-supervisor", "job"} <= services(), 30, services)
    spans = {span.span_id: span for span in stack.spans if span.trace_id == TRACE}
    (job,) = [span for span in spans.values() if span.service == "job"]
    above = [job]
    while above[-1].parent_span_id in spans:
        above.append(spans[above[-1].parent_span_id])
    assert above[-1].service == "gateway"
    assert above[-1].parent_span_id == "b7ad6b7169203331"


@pytest.fixture(scope="module")
def evaluated(stack: Stack, http: httpx.Client) -> dict[str, dict[str, Any]]:
    """The status of evaluations that have ended, of the same rows in files of all formats: they run together."""
    rows = [{"id": number, "prompt": "Say yes.", "completion": "yes"} for number in range(40)]
    for name in FORMATS:
        file = stack.home / "data" / f"questions.{name}"
        if name == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        elif name == "json":
            file.write_text(json.dumps(rows))
        else:
            samples.write_rows(file, rows)
        data = samples.dataset(stack.data_at(file), id="number", prompt="text", completion="text")
        request = samples.evaluation(data, job_uuid=f"evaluation-{name}", checkpoint=MODEL)
        reply = http.post("/evaluate/question_answering/", json=request)
        assert reply.status_code == 200, reply.text
    return {name: ended(http, "evaluate", f"evaluation-{name}") for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_ray_data_reads_every_format(
    stack: Stack, http: httpx.Client, evaluated: dict[str, dict[str, Any]], name: str
) -> None:
    status = evaluated[name]
    assert status["status"] == "completed", status
    assert status["metrics"]["examples"] == 40
    artifacts = http.get("/evaluate/job/artifacts", params={"job_uuid": f"evaluation-{name}"}).json()
    results = stack.files_at(artifacts["path"]) / "examples.jsonl"
    numbers = sorted(json.loads(line)["row"] for line in results.read_text().splitlines())
    assert numbers == list(range(1, 41))


def test_a_job_that_finds_other_content_fails_with_both_hashes(stack: Stack, http: httpx.Client) -> None:
    file = samples.write_rows(stack.home / "data" / "changing.jsonl", samples.dialogs(4))
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    http.post("/datasets/create", json={"uuid": "changing", "dataset": samples.dataset(stack.data_at(file))})
    http.post(
        "/evaluate/question_answering/", json=samples.evaluation("changing", job_uuid="changed", checkpoint=MODEL)
    )
    stack.data_at(samples.write_rows(file, samples.dialogs(5)))  # the driver takes seconds to start
    status = ended(http, "evaluate", "changed")
    assert status["status"] == "failed"
    assert before in status["error"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() in status["error"]
    assert len(status["attempts"]) == 1
    again = samples.evaluation("changing", job_uuid="changed-2", checkpoint=MODEL)
    # What lies in object storage is read by the job alone.
    answer = http.post("/evaluate/question_answering/", json=again)
    assert answer.status_code == (200 if stack.storage else 409)
    if stack.storage:
        assert ended(http, "evaluate", "changed-2")["status"] == "failed"


def test_the_rfc_client_keeps_data_sets_and_telemetry(stack: Stack, http: httpx.Client) -> None:
    client = LlamaStack(base_url=stack.url, http_client=http)
    file = samples.write_rows(stack.home / "data" / "rfc.jsonl", samples.dialogs(3))
    data: Any = samples.dataset(stack.data_at(file))
    client.datasets.create(uuid="rfc", dataset=data)
    assert client.datasets.get(dataset_uuid="rfc").content_url == data["content_url"]
    client.datasets.delete(dataset_uuid="rfc")
    assert http.get("/datasets/get", params={"dataset_uuid": "rfc"}).status_code == 404
    event: Any = {"trace_id": "trace-rfc", "span_id": "span-rfc", "timestamp": "2026-01-01T00:00:00Z"}
    start = {"type": "span_start", "name": "all"}
    client.telemetry.log(event=event | {"type": "structured_log", "payload": start})
    client.telemetry.log(event=event | {"type": "unstructured_log", "message": "hello", "severity": "info"})
    client.telemetry.log(event=event | {"type": "structured_log", "payload": {"type": "span_end", "status": "ok"}})
    trace = client.telemetry.get_trace(trace_id="trace-rfc")
    assert (trace.trace_id, trace.root_span_id) == ("trace-rfc", "span-rfc")
    assert trace.end_time is not None


def test_prometheus_reads_requests_and_jobs(http: httpx.Client, tuned: dict[str, Any]) -> None:
    figures = http.get("/metrics").text
    assert 'route="/post_training/supervised_fine_tune"' in figures
    assert 'kind="supervised_fine_tune"' in figures

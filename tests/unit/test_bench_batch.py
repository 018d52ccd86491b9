"""scripts/bench batch: its figures, what it asks for, and which processes it looks at."""

import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import bench_batch, bench_servers
from scripts.bench_batch import Batch, ended, engine_of, is_of_a_job, rate, request_of, write_rows
from scripts.bench_servers import BenchFailed, local_model
from scripts.local_stack import read_serve_file
from stack.api.batch_inference import BatchInferenceJobRequest
from stack.datasets import DIALOG

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray and vLLM themselves warn of as they are imported
    from jobs import asking
    from scripts import plain_vllm
    from serve_apps.llm import engine_config


def test_the_start_of_a_job_does_not_count() -> None:
    few, many = Batch(32, seconds=20.0), Batch(256, seconds=48.0)
    assert rate(few, many) == pytest.approx(8)
    with pytest.raises(BenchFailed, match="256 rows took no longer than 32: take more --rows"):
        rate(few, Batch(256, seconds=19.0))


def test_both_are_measured_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the peer, too, the few rows' seconds are taken off."""

    def run(name: str, command: list[str], log: Path) -> None:
        settings, output = map(Path, command[-2:])
        told = json.loads(settings.read_text())
        assert set(inspect.signature(plain_vllm.answer).parameters) == set(told)
        assert len(Path(told["rows"]).read_text().splitlines()) == 1_000
        output.write_text(json.dumps({"few_seconds": 30.0, "seconds": 248.0, "tokens": 16_000}))

    @contextmanager
    def stack(*_: object, **__: object) -> Iterator[None]:
        yield

    seconds = {bench_batch.WARM: 20.0, bench_batch.FEW: 50.0, 1_000: 268.0}
    monkeypatch.setattr(bench_batch, "run", run)
    monkeypatch.setattr(bench_batch, "stack", stack)
    monkeypatch.setattr(bench_batch, "answer", lambda _, __, rows, ___: Batch(rows, seconds[rows]))
    found = bench_batch.speed(tmp_path, 1_000)
    assert (found.peer, found.ours) == (4.0, 4.0), "the 20 s that the job takes to start count in neither"
    assert found.met
    assert "from the 128th to the 1,000th, 16 tokens" in found.name


def test_the_few_rows_are_as_many_as_a_job_asks_about_at_once() -> None:
    """With fewer it would be slower while these are answered, and the difference would be too fast."""
    assert bench_batch.FEW == asking.ROWS_AT_ONCE


def test_the_driver_and_ray_datas_workers_are_the_processes_of_a_job() -> None:
    assert is_of_a_job("python -m jobs.batch_inference --tenant default --job batch-100 --attempt 1")
    assert is_of_a_job("ray::MapWorker(MapBatches(AnswerChats)).submit")
    assert is_of_a_job("ray::ReadRows->SplitBlocks")
    for other in ("ray::IDLE", "ray::ServeReplica:gateway:Gateway", "VLLM::EngineCore", "raylet"):
        assert not is_of_a_job(other)


def test_the_rows_are_the_same_at_every_run_and_a_job_takes_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "few.jsonl", 3)
    write_rows(tmp_path / "more.jsonl", 5)
    few, more = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("few", "more"))
    assert few == more[:3]
    assert len({json.loads(line)["id"] for line in more}) == 5
    for line in more:
        (message,) = DIALOG.validate_python(json.loads(line)["dialog"])
        assert 10 <= len(str(message.content).split()) <= 40
    body = request_of("batch-3", tmp_path / "few.jsonl", "small", 32)
    assert BatchInferenceJobRequest.model_validate(body).sampling_params.max_tokens == 32


def test_both_engines_have_the_same_settings() -> None:
    model = local_model(adapters=0)
    told = engine_of(model)
    assert (told["dtype"], told["max_model_len"]) == (model.dtype, model.context)
    assert told.items() >= model.engine.items()
    assert json.loads(json.dumps(told)) == told
    served = engine_config(model).engine_kwargs
    assert {"enable_chunked_prefill", "max_model_len", "dtype"} <= told.keys() & served.keys()
    assert all(told[name] == served[name] for name in told.keys() & served.keys())


def test_the_scripted_stack_answers_as_fast_as_it_is_told(tmp_path: Path) -> None:
    document = bench_servers.stack_document(local_model(adapters=0), is_scripted=True, tokens_per_second=1_000.0)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    assert read_serve_file(file).config.models[0].adapters == 0
    assert document["applications"][1]["args"]["tokens_per_second"] == 1_000.0
    real = bench_servers.stack_document(local_model(adapters=0), is_scripted=False)
    assert "tokens_per_second" not in real["applications"][1]["args"]


def replying(*statuses: dict[str, Any]) -> httpx.Client:
    left = list(statuses)
    return httpx.Client(
        base_url="http://stack", transport=httpx.MockTransport(lambda _: httpx.Response(200, json=left.pop(0)))
    )


def test_a_job_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_batch, "LOOK_S", 0.0)
    done = {"status": "completed", "metrics": {"failed": 0.0}}
    assert ended(replying({"status": "scheduled"}, {"status": "running"}, done), "a") == done
    with pytest.raises(BenchFailed, match="the job 'a' is failed: row 5 is too long"):
        ended(replying({"status": "running"}, {"status": "failed", "error": "row 5 is too long"}), "a")

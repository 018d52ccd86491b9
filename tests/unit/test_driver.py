"""What every driver does around its work: finding its job, taking it, and writing down how it ended."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.exceptions import ActorDiedError
from ray.job_submission import JobDetails, JobStatus, JobType
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckTimeoutError,
)  # what Ray Train raises, and has no other name
from sqlalchemy.exc import OperationalError

from jobs import driver, reporter
from serve_apps.scheduling import is_lost
from stack import datasets, evaluations, jobs, made_datasets
from stack.api.datasets import CreateDatasetRequest
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.context import Context
from stack.errors import BadInput, Diverged, NotFound, Unavailable
from stack.store import Adapter, Job, now
from tests import samples
from tests.conftest import CONFIG
from tests.ray_errors import as_it_is, in_a_ray_task, in_a_training_worker
from tests.samples import dataset, dialogs, evaluation, write_rows

Work = Callable[[driver.Work, EvaluateQuestionAnsweringRequest], driver.Outcome]


AWAY = OperationalError("select", {}, Exception("could not connect"))
FULL_DISK = OSError(errno.ENOSPC, "No space left on device", "/data/a")


@pytest.mark.parametrize("wrapped", [as_it_is, in_a_ray_task, in_a_training_worker])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadInput("row 5 is not JSON: here"), "row 5 is not JSON: here"),
        (ValueError("wrong: this one"), "ValueError: wrong: this one"),
        (ValueError("wrong:\n  5\n\n"), "ValueError: wrong: 5"),
        (ValueError(), "ValueError: no message"),
        (FULL_DISK, "the disk is full: [Errno 28] No space left on device: '/data/a'"),
        (PermissionError(errno.EACCES, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
        (NotFound("there is no model 'a'"), "there is no model 'a'"),
        (TimeoutExpired("make", 5), "subprocess.TimeoutExpired: Command 'make' timed out after 5 seconds"),
    ],
    ids=["ours", "built in", "several lines", "no message", "full disk", "another OSError", "no -Error", "a package's"],
)
def test_the_reason_of_a_failure_is_the_error_in_one_line_wherever_it_was_raised(
    error: Exception, reason: str, wrapped: Callable[[Exception], Exception]
) -> None:
    assert driver.reason(wrapped(error)) == reason


@pytest.mark.parametrize(
    "message",
    ["database or disk is full", "I/O error: No space left on device (os error 28)"],
    ids=["SQLite", "safetensors"],
)
@pytest.mark.parametrize("wrapped", [as_it_is, in_a_ray_task, in_a_training_worker])
def test_a_full_disk_is_told_by_whoever_finds_it(message: str, wrapped: Callable[[Exception], Exception]) -> None:
    assert driver.reason(wrapped(RuntimeError(message))) == f"the disk is full: {message}"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 12 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["Python", "PyTorch on CPU", "PyTorch on GPU"],
)
@pytest.mark.parametrize("wrapped", [as_it_is, in_a_ray_task, in_a_training_worker])
def test_where_memory_ends_what_to_lower_is_told(error: Exception, wrapped: Callable[[Exception], Exception]) -> None:
    reason = driver.reason(wrapped(error))
    assert reason.startswith("out of memory: lower micro_batch_size, batch_size or max_length in training_config: ")
    assert str(error) in reason


def test_what_workers_raised_is_known_by_its_kind() -> None:
    diverged = in_a_training_worker(Diverged("the loss is nan at step 3: lower the learning rate"))
    other = in_a_training_worker(BadInput("the loss is nan"))
    assert isinstance(diverged, WorkerGroupError)
    assert isinstance(other, WorkerGroupError)
    assert driver.raised_in_workers(diverged, Diverged)
    assert not driver.raised_in_workers(other, Diverged)
    assert not driver.raised_in_workers(diverged, BadInput)


def test_the_reason_of_an_interrupted_job_is_the_interruption() -> None:
    assert driver.reason(KeyboardInterrupt()) == "KeyboardInterrupt: no message"


def test_the_reason_of_a_worker_that_died_is_what_ray_says_of_it() -> None:
    reason = driver.reason(WorkerGroupError("worker 1 failed", {1: ActorDiedError()}))
    assert "The actor died unexpectedly" in reason


@pytest.fixture
def run(context: Context, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs a driver as a Ray job with the given arguments and work."""
    monkeypatch.setenv("STACK_CONFIG", json.dumps(CONFIG | {"store": context.config.store}))
    ray_job = {"metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(ray_job))

    def run(*arguments: str | Path, work: Work = found_nothing) -> int:
        monkeypatch.setattr("sys.argv", ["jobs.evaluate", *map(str, arguments)])
        return driver.run(EvaluateQuestionAnsweringRequest, evaluations.question_answering, evaluations.resources, work)

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def outcome(work: driver.Work, result: dict[str, Any], adapter: Adapter | None = None) -> driver.Outcome:
    return driver.Outcome(result, driver.artifact_row(work, "evaluations/a", "metric", [], {}), adapter)


def found_nothing(work: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
    """Evaluates nothing."""
    return outcome(work, {"path": "file:///nothing", "files": []})


@pytest.fixture
def data(home: Path) -> dict[str, Any]:
    return dataset(write_rows(home / "data" / "test.jsonl", dialogs(2)))


@pytest.fixture
def config(tmp_path: Path, data: dict[str, Any]) -> Path:
    """A file with a right request."""
    file = tmp_path / "request.yaml"
    file.write_text(yaml.safe_dump(evaluation(data)))
    return file


def job(context: Context, uuid: str = "evaluation-1") -> Job:
    found = context.store.jobs.get("default", uuid)
    assert found is not None
    return found


ATTEMPT = ("--job", "evaluation-1", "--attempt", "1")


def accepted(context: Context, data: dict[str, Any]) -> Job:
    """A job whose first attempt the supervisor has opened."""
    request = EvaluateQuestionAnsweringRequest.model_validate(evaluation(data))
    job = evaluations.question_answering(context, request)
    assert context.store.jobs.open_attempt(job.id, 1, "default.evaluation-1.1")
    return job


def test_a_request_from_a_file_becomes_a_job_and_is_completed(
    context: Context, run: Callable[..., int], config: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        seen.append((request.job_uuid, job(given.context).status))
        return outcome(given, {"files": [], "path": "file:///a"})

    assert run("--config", config, work=work) == 0
    assert seen == [("evaluation-1", "running")]
    done = job(context)
    assert done.status == "completed"
    assert [one.submission_id for one in context.store.jobs.attempts(done.id)] == ["raysubmit_1"]
    asked = evaluation(data | {"sha256": done.request["dataset"]["sha256"]})
    assert done.request == EvaluateQuestionAnsweringRequest.model_validate(asked).model_dump(mode="json")
    assert done.result == {"files": [], "path": "file:///a"}
    assert "'evaluation-1' is completed" in capsys.readouterr().out


def test_a_file_may_be_json_and_wrapped(
    context: Context, run: Callable[..., int], tmp_path: Path, data: dict[str, Any]
) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"request": evaluation(data)}))
    assert run("--config", file) == 0
    assert job(context).status == "completed"


def test_a_model_that_the_work_has_made_is_added(
    context: Context, run: Callable[..., int], data: dict[str, Any]
) -> None:
    accepted(context, data)
    model = samples.trained("small-evaluation-1")

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        return replace(outcome(given, {"files": [], "path": "file:///a"}), model=model)

    assert run(*ATTEMPT, work=work) == 0
    assert job(context).status == "completed"
    assert context.store.models.list() == [model]


def test_a_job_that_the_gateway_has_accepted_is_found_by_its_uuid(
    context: Context, run: Callable[..., int], data: dict[str, Any]
) -> None:
    accepted(context, data)
    assert run(*ATTEMPT) == 0
    assert job(context).status == "completed"


def test_a_job_without_room_any_more_fails_before_it_begins(
    context: Context, run: Callable[..., int], data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted(context, data)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert run(*ATTEMPT, work=None) == 2
    assert (job(context).status, job(context).started_at) == ("failed", None)
    assert "100 bytes left" in (job(context).error or "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"job_uuid: [", "is not YAML"),
        (b"\xff\xfe\x00\x01", "is not YAML"),
        (b"", "dictionary"),
        (b"- a\n- b\n", "dictionary"),
        (b"job_uid: a", "unknown key 'job_uid'; allowed: job_uuid, dataset"),
        (b"job_uuid: a", "dataset: is required"),
        (b"{job_uuid: a, dataset: b, checkpoint: small, sampling_params: {}, metrics: [bleu]}", "'em' or 'f1'"),
        (b"{job_uuid: a, dataset: none, checkpoint: small, sampling_params: {}, metrics: [em]}", "'none'"),
        (b"{job_uuid: a, dataset: none, checkpoint: big, sampling_params: {}, metrics: [em]}", "there are: small"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason_and_makes_no_job(
    context: Context,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    words: str,
) -> None:
    file = tmp_path / "request.yaml"
    file.write_bytes(content)
    assert run("--config", file) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("refused: ")
    assert words in printed
    assert printed.count("\n") == 1
    assert context.store.jobs.page("default", [jobs.EVALUATE]) == []


def test_a_missing_file_is_refused(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", tmp_path / "none.yaml") == 2
    assert f"{tmp_path}/none.yaml cannot be read: {os.strerror(errno.ENOENT)}" in capsys.readouterr().err


def test_an_unknown_job_is_refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--job", "none", "--attempt", "1") == 2
    assert "there is no job 'none' of the tenant 'default'" in capsys.readouterr().err


@pytest.mark.parametrize("tenant", ["../acme", "a.b", ""])
def test_what_can_be_no_tenant_is_refused(
    run: Callable[..., int], config: Path, tenant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", config, "--tenant", tenant) == 2
    assert f"not {tenant!r}" in capsys.readouterr().err


def test_a_wrong_config_of_the_stack_is_refused(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_CONFIG", '{"models": []}')
    assert run(*ATTEMPT) == 2
    assert "refused: STACK_CONFIG: models" in capsys.readouterr().err


def test_a_file_outside_of_a_ray_job_is_refused(
    context: Context,
    run: Callable[..., int],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert run("--config", config) == 2
    assert "ray job submit" in capsys.readouterr().err
    assert context.store.jobs.page("default", [jobs.EVALUATE]) == []


@pytest.mark.parametrize("arguments", [[], ["--job", "a", "--config", "b"], ["--uuid", "a"]])
def test_other_arguments_are_refused(
    run: Callable[..., int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["running", "completed", "failed"])
def test_a_job_that_is_not_waiting_is_left_alone(
    context: Context, run: Callable[..., int], data: dict[str, Any], capsys: pytest.CaptureFixture[str], end: str
) -> None:
    job_id = accepted(context, data).id
    context.store.jobs.begin(job_id, 1, {})
    if end == "failed":
        context.store.jobs.fail(job_id, 1, "before")
    elif end == "completed":
        context.store.jobs.complete(job_id, 1, {"path": None, "files": []})
    before = job(context)

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        raise AssertionError("it must not run")

    assert run(*ATTEMPT, work=work) == (1 if end == "failed" else 0)
    assert job(context) == before
    assert f"is {end} already" in capsys.readouterr().out


def failing(error: BaseException) -> Work:
    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        raise error

    return work


@pytest.mark.parametrize("wrapped", [as_it_is, in_a_ray_task])
def test_work_that_is_refused_fails_the_job_with_the_reason(
    context: Context,
    run: Callable[..., int],
    data: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    wrapped: Callable[[Exception], Exception],
) -> None:
    accepted(context, data)
    assert run(*ATTEMPT, work=failing(wrapped(BadInput("row 5 is not JSON")))) == 1
    assert (job(context).status, job(context).error) == ("failed", "row 5 is not JSON")
    assert capsys.readouterr().err == "failed: row 5 is not JSON\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL_DISK, "the disk is full"),
        (ValueError("wrong"), "ValueError: wrong"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_whatever_ends_the_work_fails_the_job_and_is_raised_again(
    context: Context, run: Callable[..., int], data: dict[str, Any], error: BaseException, reason: str
) -> None:
    accepted(context, data)
    with pytest.raises(type(error)) as caught:
        run(*ATTEMPT, work=failing(error))
    assert caught.value is error
    failed = job(context)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.startswith(reason)


def test_a_driver_that_is_told_to_stop_leaves_its_job_to_the_supervisor(
    context: Context, run: Callable[..., int], data: dict[str, Any]
) -> None:
    accepted(context, data)
    cleaned_up = []

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned_up.append(True)
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as ended:
        run(*ATTEMPT, work=work)
    assert cleaned_up
    assert ended.value.code == 143
    assert job(context).status == "running"


# What a worker that is left raises, as it arrives from there.
MISSING = RuntimeError(
    "Traceback (most recent call last):\nRuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
    "Connection closed by peer [127.0.0.1]:49420"
)


def test_a_worker_that_fails_by_itself_ends_the_job_also_where_the_others_miss_it() -> None:
    memory = RuntimeError("Traceback (most recent call last):\nMemoryError: it is full")
    both = WorkerGroupError("both failed", {0: MISSING, 1: memory})
    assert not driver.is_lost(both)
    assert driver.reason(both).startswith("out of memory: lower micro_batch_size")


@pytest.mark.parametrize(
    "error",
    [
        in_a_ray_task(ActorDiedError()),
        WorkerGroupError("worker 0 died", {0: ActorDiedError()}),
        WorkerGroupError("worker 1 died", {0: MISSING, 1: ActorDiedError()}),
        WorkerGroupError("worker 1 has died, which nobody saw", {0: MISSING}),
        WorkerGroupError("worker 0 has hung", {0: WorkerHealthCheckTimeoutError("it does not answer")}),
        Unavailable("the model is away"),
        in_a_training_worker(Unavailable("the database does not answer")),
        in_a_ray_task(AWAY),
        ControllerError(AWAY),
        AWAY,
    ],
    ids=[
        "actor",
        "training worker",
        "one of several",
        "missed by another",
        "hung",
        "model",
        "worker's database",
        "task's",
        "controller's",
        "database",
    ],
)
def test_work_that_is_lost_for_no_fault_of_its_own_waits_for_another_attempt(
    context: Context, run: Callable[..., int], data: dict[str, Any], error: Exception
) -> None:
    accepted(context, data)
    kept = []

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        (given.folder / "checkpoint").write_text("half")
        kept.append(given.folder / "checkpoint")
        raise error

    with contextlib.suppress(type(error)):
        assert run(*ATTEMPT, work=work) in (1, driver.GONE)
    assert job(context).status == "scheduled"
    assert "another attempt" in (job(context).waiting_for or "")
    assert kept[0].read_text() == "half"
    assert context.store.jobs.open_attempt(job(context).id, 2, "default.evaluation-1.2")

    def again(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        assert (given.folder / "checkpoint").read_text() == "half"
        return outcome(given, {"path": None, "files": []})

    assert run("--job", "evaluation-1", "--attempt", "2", work=again) == 0
    assert job(context).status == "completed"
    assert not kept[0].exists()


def away(*_: Any, **__: Any) -> Any:
    raise AWAY


def is_lost_with(exit_code: int) -> bool:
    """Whether the supervisor takes a driver that exits so for lost."""
    return is_lost(
        JobDetails(
            type=JobType.SUBMISSION,
            entrypoint="",
            status=JobStatus.FAILED,
            error_type="JOB_ENTRYPOINT_COMMAND_ERROR",
            driver_exit_code=exit_code,
        )
    )


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers soon have enough of a database that is away."""
    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    monkeypatch.setattr(reporter, "LIFE_S", 0.1)
    monkeypatch.setattr(driver, "_give_up", lambda _: None)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "place",
    [
        "stack.store.Store.__init__",
        "stack.store.jobs.Jobs.get",
        "stack.store.jobs.Jobs.begin",
        "stack.store.jobs.Jobs.beat",
        "stack.store.telemetry.Telemetry.add_metrics",
        "stack.store.telemetry.Telemetry.run_experiment",
        "stack.store.jobs.Jobs.complete",
    ],
)
def test_a_driver_whose_database_is_away_leaves_its_job_to_another_attempt(
    context: Context,
    run: Callable[..., int],
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    accepted(context, data)
    work = publishing(tmp_path / "a", end=lambda _: None)

    def measured(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        given.reporter.metrics.log(1, [("em", 1.0)])
        return work(given, request)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(place, away)
        code = run(*ATTEMPT, work=measured)
    assert code == driver.GONE
    assert is_lost_with(code)
    context.store.jobs.lose_attempt(job(context).id, 1, "failed")  # as the supervisor does, if the driver has not
    assert job(context).status == "scheduled"
    assert context.store.jobs.open_attempt(job(context).id, 2, "default.evaluation-1.2")
    assert run("--job", "evaluation-1", "--attempt", "2", work=work) == 0
    assert job(context).status == "completed"
    assert context.artifacts.exists("adapters/evaluation-1")


@pytest.mark.parametrize(
    ("place", "method"),
    [("stack.store.jobs.Jobs", "complete"), ("stack.store.telemetry.Telemetry", "add_metrics")],
)
def test_a_database_that_comes_back_costs_a_job_nothing(
    context: Context,
    run: Callable[..., int],
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    method: str,
) -> None:
    accepted(context, data)
    of = type(context.store.jobs) if place.endswith("Jobs") else type(context.store.telemetry)
    right, calls = getattr(of, method), []

    def at_last(*given: Any, **more: Any) -> Any:
        calls.append(True)
        if len(calls) <= 2:
            raise AWAY
        return right(*given, **more)

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        given.reporter.metrics.log(1, [("em", 1.0)])
        return outcome(given, {"path": None, "files": []})

    monkeypatch.setattr(of, method, at_last)
    assert run(*ATTEMPT, work=work) == 0
    assert job(context).status == "completed"
    assert context.store.telemetry.newest_metrics("default", job(context).run_id) == {"em": 1.0}


@pytest.mark.usefixtures("impatient")
def test_a_failure_that_cannot_be_written_down_is_left_to_another_attempt(
    context: Context, run: Callable[..., int], data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted(context, data)
    monkeypatch.setattr("stack.store.jobs.Jobs.fail", away)
    assert run(*ATTEMPT, work=failing(BadInput("row 5"))) == driver.GONE
    assert job(context).status == "running"


# A driver in a process of its own, as Ray starts it.
PROGRAM = """
import signal, sys, threading
from jobs import driver
from stack import evaluations
from stack.api.evaluations import EvaluateQuestionAnsweringRequest

def work(given, request):
    print("begun", flush=True)
    threading.Event().wait(60)

sys.exit(driver.run(EvaluateQuestionAnsweringRequest, evaluations.question_answering, evaluations.resources, work))
"""


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("end", ["given up", "told to stop"])
def test_how_a_driver_exits_tells_that_it_is_lost(context: Context, data: dict[str, Any], end: str) -> None:
    accepted(context, data)
    command = [sys.executable, "-c", PROGRAM, *ATTEMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        if end == "given up":
            assert context.store.jobs.lose_attempt(job(context).id, 1, "its node was cut off")
        else:
            process.terminate()
        code = process.wait(30)
    assert code == (driver.GONE if end == "given up" else 143)
    assert is_lost_with(code)


def test_what_a_job_prints_is_its_log(context: Context, run: Callable[..., int], data: dict[str, Any]) -> None:
    accepted(context, data)

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        os.write(1, b"half of it\n")  # as print does, but where the test runner has put its own in place
        subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
        return outcome(given, {"path": None, "files": []})

    assert run(*ATTEMPT, work=work) == 0
    lines = jobs.logs(context, "evaluation-1", [jobs.EVALUATE])
    assert ("info", "half of it") in [(line.level, line.message) for line in lines]
    assert ("warning", "from a child") in [(line.level, line.message) for line in lines]


ADAPTER = Adapter("default", "small:evaluation-1", "small", "evaluation-1", "adapters/evaluation-1", created_at=now())


def publishing(folder: Path, end: Callable[[Context], None]) -> Work:
    """Work that publishes an artifact and an adapter; `end` happens before it returns."""
    folder.mkdir()
    (folder / "a.txt").write_text("one")

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        files = driver.publish(given, "adapters/evaluation-1", folder)
        end(given.context)
        row = driver.artifact_row(given, "adapters/evaluation-1", "checkpoint", files, {})
        return driver.Outcome({}, row, ADAPTER)

    return work


def test_what_a_job_has_made_is_served_when_it_is_completed(
    context: Context, run: Callable[..., int], data: dict[str, Any], tmp_path: Path
) -> None:
    accepted(context, data)
    assert run(*ATTEMPT, work=publishing(tmp_path / "a", end=lambda _: None)) == 0
    assert context.store.adapters.list("default") == [ADAPTER]
    assert context.artifacts.exists("adapters/evaluation-1")


def test_what_a_job_has_made_is_removed_when_it_was_failed_meanwhile(
    context: Context,
    run: Callable[..., int],
    data: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accepted(context, data)

    def end(context: Context) -> None:
        context.store.jobs.fail(job(context).id, 1, "its Ray job is gone")

    assert run(*ATTEMPT, work=publishing(tmp_path / "a", end)) == 1
    assert (job(context).status, job(context).error) == ("failed", "its Ray job is gone")
    assert context.store.adapters.list("default") == []
    assert not context.artifacts.exists("adapters/evaluation-1")
    assert "its Ray job is gone" in capsys.readouterr().out


def test_an_accepted_request_that_is_right_no_more_fails_the_job_with_the_reason(
    context: Context, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A release may know other fields than the one that accepted the job."""
    job = samples.add_job(context.store, "old", checkpoint="small")
    assert context.store.jobs.open_attempt(job.id, 1, "default.old.1")
    assert run("--job", "old", "--attempt", "1") == 2
    assert "dataset: is required" in capsys.readouterr().err
    now = context.store.jobs.get("default", "old")
    assert now is not None
    assert now.status == "failed"
    assert "dataset: is required" in (now.error or "")


# The data sets that a job makes


def registering(context: Context, data: dict[str, Any], then: Work) -> tuple[Work, Callable[[], list[str]]]:
    """Work that registers a data set as a job of its own would, then does something; and which data sets there are."""

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        described = data | {"metadata": {"job_uuid": given.job.uuid}}
        body = {"uuid": given.job.uuid, "dataset": described}
        datasets.create(given.context, CreateDatasetRequest.model_validate(body))
        return then(given, request)

    return work, lambda: [one.uuid for one in datasets.page(context, None, 10)]


@pytest.fixture
def makes_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of any kind make the data set of their name."""
    monkeypatch.setattr(made_datasets, "names_of", lambda kind, request: [request["job_uuid"]])


@pytest.mark.parametrize("error", [BadInput("no"), Unavailable("it starts"), ValueError("wrong"), SystemExit(1)])
def test_an_attempt_that_comes_to_no_end_leaves_no_data_set(
    context: Context, run: Callable[..., int], data: dict[str, Any], makes_data: None, error: BaseException
) -> None:
    accepted(context, data)
    work, there = registering(context, data, failing(error))
    with contextlib.suppress(ValueError, SystemExit):
        run(*ATTEMPT, work=work)
    assert there() == []


def test_a_completed_job_keeps_its_data_set(
    context: Context, run: Callable[..., int], data: dict[str, Any], makes_data: None
) -> None:
    accepted(context, data)
    work, there = registering(context, data, found_nothing)
    assert run(*ATTEMPT, work=work) == 0
    assert there() == ["evaluation-1"]


def test_an_attempt_that_has_been_given_up_does_not_touch_what_the_next_one_makes(
    context: Context, run: Callable[..., int], data: dict[str, Any], makes_data: None
) -> None:
    job_id = accepted(context, data).id

    def given_up(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        context.store.jobs.lose_attempt(job_id, 1, "it is silent")
        driver.require_open(given)
        raise AssertionError("it went on")

    work, there = registering(context, data, given_up)
    assert run(*ATTEMPT, work=work) == 1
    assert there() == ["evaluation-1"]


def test_a_job_that_is_cancelled_at_its_end_leaves_no_data_set(
    context: Context, run: Callable[..., int], data: dict[str, Any], makes_data: None
) -> None:
    job_id = accepted(context, data).id

    def cancelled(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        context.store.jobs.cancel("default", "evaluation-1")
        context.store.jobs.end_cancelled(job_id, 1, "cancelled")
        return replace(outcome(given, {}), artifact=driver.artifact_row(given, _published(given), "metric", [], {}))

    work, there = registering(context, data, cancelled)
    assert run(*ATTEMPT, work=work) == 1
    assert there() == []


def _published(given: driver.Work) -> str:
    (given.folder / "a").write_text("a")
    given.context.artifacts.publish("evaluations/a", given.folder)
    return "evaluations/a"


def test_a_job_with_a_problem_has_failed_and_what_it_has_made_is_kept(
    context: Context, run: Callable[..., int], data: dict[str, Any]
) -> None:
    accepted(context, data)

    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        return replace(outcome(given, {"path": "file:///a", "files": []}), problem="the data set is too large")

    assert run(*ATTEMPT, work=work) == 1
    failed = job(context)
    assert (failed.status, failed.result) == ("failed", {"path": "file:///a", "files": []})
    assert failed.error == "the data set is too large; what was made is kept as the artifact 'evaluations/a'"
    assert "evaluations/a" in context.store.artifacts.known_paths()

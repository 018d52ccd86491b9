"""How a driver ends whose work fails, is lost for no fault of its own, or has no database."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.job_submission import JobDetails, JobStatus, JobType
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckTimeoutError,
)  # what Ray Train raises, and has no other name

from jobs import driver, reporter
from serve_apps.scheduling import is_lost
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.context import Context
from stack.errors import BadInput, Unavailable
from tests.driven import ATTEMPT, AWAY, FULL_DISK, accepted, failing, job, outcome, publishing
from tests.ray_errors import as_it_is, in_a_ray_task, in_a_training_worker


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

"""Drivers that are run in this process, on a job whose work is whatever a test says."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.exc import OperationalError

from jobs import driver
from stack import evaluations
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.context import Context
from stack.store import Adapter, Job, now
from tests.samples import evaluation

Work = Callable[[driver.Work, EvaluateQuestionAnsweringRequest], driver.Outcome]
AWAY = OperationalError("select", {}, Exception("could not connect"))
FULL_DISK = OSError(errno.ENOSPC, "No space left on device", "/data/a")
ADAPTER = Adapter("default", "small:evaluation-1", "small", "evaluation-1", "adapters/evaluation-1", created_at=now())


def outcome(work: driver.Work, result: dict[str, Any], adapter: Adapter | None = None) -> driver.Outcome:
    return driver.Outcome(result, driver.artifact_row(work, "evaluations/a", "metric", [], {}), adapter)


def found_nothing(work: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
    """Evaluates nothing."""
    return outcome(work, {"path": "file:///nothing", "files": []})


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


def failing(error: BaseException) -> Work:
    def work(given: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
        raise error

    return work


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

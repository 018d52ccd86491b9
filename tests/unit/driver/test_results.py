"""What a driver's work has made: it is served, or removed, or kept with a problem."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import driver
from stack import datasets, made_datasets
from stack.api.datasets import CreateDatasetRequest
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.context import Context
from stack.errors import BadInput, Unavailable
from tests.driven import ADAPTER, ATTEMPT, Work, accepted, failing, found_nothing, job, outcome, publishing


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

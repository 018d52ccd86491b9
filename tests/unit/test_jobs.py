"""Jobs: one uuid is one job, and what a job's state says."""

from typing import Any

import pytest

from stack import jobs
from stack.api.jobs import JobProgress, JobState
from stack.context import Context
from stack.errors import Conflict, NotFound

REQUEST = {"lr": 0.001, "columns": {"a": "text", "b": "json"}, "names": ["x", None]}


def submit(context: Context, kind: str = jobs.EVALUATE, uuid: str = "job-1", **changes: Any) -> str:
    return jobs.submit(context, kind, uuid, REQUEST | changes).status


def test_a_submitted_job_is_scheduled_and_waits_for_the_supervisor(context: Context) -> None:
    job = jobs.submit(context, jobs.EVALUATE, "job-1", REQUEST)
    assert (job.uuid, job.kind, job.request, job.status) == ("job-1", jobs.EVALUATE, REQUEST, "scheduled")
    assert job.submission_id is None
    assert [one.uuid for one in context.store.unfinished_jobs()] == ["job-1"]


def test_a_job_that_ray_runs_already_keeps_its_submission(context: Context) -> None:
    assert jobs.submit(context, jobs.EVALUATE, "job-1", REQUEST, "raysubmit_1").submission_id == "raysubmit_1"


def test_the_same_request_again_is_the_same_job(context: Context) -> None:
    submit(context)
    context.store.start_job("job-1")
    reordered = dict(reversed(REQUEST.items()))
    again = jobs.submit(context, jobs.EVALUATE, "job-1", reordered, "raysubmit_2")
    assert (again.status, again.submission_id) == ("running", None)
    assert len(context.store.jobs_of_kinds([jobs.EVALUATE])) == 1


@pytest.mark.parametrize("change", [{"lr": 0.002}, {"names": ["x"]}, {"more": 1}])
def test_another_request_with_the_same_uuid_is_a_conflict(context: Context, change: dict[str, Any]) -> None:
    submit(context)
    with pytest.raises(Conflict, match="'job-1' stands for another job") as caught:
        submit(context, **change)
    assert caught.value.param == "job_uuid"
    job = context.store.job("job-1")
    assert job is not None
    assert job.request == REQUEST


def test_the_same_request_of_another_kind_is_a_conflict(context: Context) -> None:
    submit(context)
    with pytest.raises(Conflict):
        submit(context, kind=jobs.SUPERVISED_FINE_TUNE)


def test_a_job_is_found_by_its_uuid_and_kind(context: Context) -> None:
    submit(context)
    assert jobs.get(context, "job-1", [jobs.EVALUATE]).uuid == "job-1"


@pytest.mark.parametrize(("uuid", "kind"), [("job-2", jobs.EVALUATE), ("job-1", jobs.SUPERVISED_FINE_TUNE), ("", "")])
def test_a_job_of_another_uuid_or_kind_is_not_found(context: Context, uuid: str, kind: str) -> None:
    submit(context)
    with pytest.raises(NotFound, match=f"there is no such job: '{uuid}'") as caught:
        jobs.get(context, uuid, [kind])
    assert caught.value.param == "job_uuid"


def state(context: Context) -> JobState:
    job = context.store.job("job-1")
    assert job is not None
    return JobState.model_validate(jobs.state(context, job))


def test_the_state_of_a_job_follows_it_to_its_end(context: Context) -> None:
    submit(context)
    scheduled = state(context)
    assert (scheduled.status, scheduled.progress, scheduled.metrics) == ("scheduled", None, {})
    assert (scheduled.started_at, scheduled.completed_at, scheduled.error) == (None, None, None)
    context.store.start_job("job-1")
    progress = {"done": 1, "total": 4, "unit": "steps", "seconds_left": 2.5}
    context.store.record_progress("job-1", progress, [("loss", 1, 0.5)])
    running = state(context)
    assert (running.status, running.progress) == ("running", JobProgress.model_validate(progress))
    assert running.metrics == {"loss": 0.5}
    context.store.complete_job("job-1", {})
    completed = state(context)
    assert completed.status == "completed"
    assert completed.started_at is not None
    assert completed.completed_at is not None
    assert completed.scheduled_at <= completed.started_at <= completed.completed_at


def test_the_state_of_a_failed_job_has_the_reason(context: Context) -> None:
    submit(context)
    context.store.fail_job("job-1", "the disk is full")
    assert (state(context).status, state(context).error) == ("failed", "the disk is full")


def test_every_kind_of_job_has_a_driver() -> None:
    assert jobs.DRIVERS == {
        jobs.SUPERVISED_FINE_TUNE: "jobs.supervised_fine_tune",
        jobs.EVALUATE: "jobs.evaluate",
    }

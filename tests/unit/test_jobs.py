"""Jobs: one uuid is one job, and what a job's state says."""

import asyncio
import datetime as dt
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from stack import jobs
from stack.api.jobs import JobProgress, JobState
from stack.api.wire import Request
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, TooManyRequests
from stack.store import Artifact, Job, now
from tests import samples

REQUEST = {"lr": 0.001, "columns": {"a": "text", "b": "json"}, "names": ["x", None], "more": 0}


class Wanted(Request):
    """What a job is asked for. `more` is a field that an earlier release did not have."""

    lr: Annotated[float, Field(lt=1)]
    columns: dict[str, str]
    names: list[str | None]
    more: int = 0


def submit(context: Context, kind: str = jobs.EVALUATE, uuid: str = "job-1", **changes: Any) -> str:
    return jobs.submit(context, kind, uuid, Wanted.model_validate(REQUEST | changes)).status


def test_a_submitted_job_is_scheduled_and_waits_for_the_supervisor(context: Context) -> None:
    job = jobs.submit(context, jobs.EVALUATE, "job-1", Wanted.model_validate(REQUEST))
    assert (job.uuid, job.kind, job.request, job.status) == ("job-1", jobs.EVALUATE, REQUEST, "scheduled")
    assert [one.uuid for one in context.store.jobs.waiting()] == ["job-1"]


def test_a_job_that_ray_runs_already_keeps_its_submission(context: Context) -> None:
    wanted = Wanted.model_validate(REQUEST)
    job = jobs.submit(context, jobs.EVALUATE, "job-1", wanted, submission_id="raysubmit_1")
    assert [one.submission_id for one in context.store.jobs.attempts(job.id)] == ["raysubmit_1"]


def test_the_same_request_again_is_the_same_job(context: Context) -> None:
    submit(context)
    samples.start(context.store, "job-1")
    reordered = Wanted.model_validate(dict(reversed(REQUEST.items())))
    again = jobs.submit(context, jobs.EVALUATE, "job-1", reordered, submission_id="raysubmit_2")
    assert again.status == "running"
    assert len(context.store.jobs.page("default", [jobs.EVALUATE])) == 1


@pytest.mark.parametrize("change", [{"lr": 0.002}, {"names": ["x"]}, {"more": 1}])
def test_another_request_with_the_same_uuid_is_a_conflict(context: Context, change: dict[str, Any]) -> None:
    submit(context)
    with pytest.raises(Conflict, match="'job-1' stands for another job") as caught:
        submit(context, **change)
    assert caught.value.param == "job_uuid"
    job = context.store.jobs.get("default", "job-1")
    assert job is not None
    assert job.request == REQUEST


def test_a_request_that_an_earlier_release_has_accepted_is_the_same_with_the_defaults_of_its_new_fields(
    context: Context,
) -> None:
    accepted = {name: value for name, value in REQUEST.items() if name != "more"}
    job = samples.add_job(context.store, "job-1", jobs.EVALUATE, **accepted)
    assert jobs.submit(context, jobs.EVALUATE, "job-1", Wanted.model_validate(accepted)) == job
    assert submit(context, more=0) == "scheduled"
    with pytest.raises(Conflict, match="'job-1' stands for another job"):
        submit(context, more=1)


@pytest.mark.parametrize("accepted", [{"lr": 2.0}, {"fewer": 5}, {"names": "x"}], ids=str)
def test_a_request_is_not_the_same_as_one_that_is_right_no_more(context: Context, accepted: dict[str, Any]) -> None:
    samples.add_job(context.store, "job-1", jobs.EVALUATE, **(REQUEST | accepted))
    with pytest.raises(Conflict, match="'job-1' stands for another job"):
        submit(context)


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
    job = context.store.jobs.get("default", "job-1")
    assert job is not None
    return JobState.model_validate(jobs.state(context, job))


def test_the_state_of_a_job_follows_it_to_its_end(context: Context) -> None:
    submit(context)
    scheduled = state(context)
    assert (scheduled.status, scheduled.progress, scheduled.metrics) == ("scheduled", None, {})
    assert (scheduled.started_at, scheduled.completed_at, scheduled.error) == (None, None, None)
    samples.start(context.store, "job-1")
    progress = {"done": 1, "total": 4, "unit": "steps", "seconds_left": 2.5}
    samples.report(context.store, "job-1", progress, [("loss", 1, 0.5)])
    running = state(context)
    assert (running.status, running.progress) == ("running", JobProgress.model_validate(progress))
    assert running.metrics == {"loss": 0.5}
    samples.complete(context.store, "job-1", {})
    completed = state(context)
    assert completed.status == "completed"
    assert completed.started_at is not None
    assert completed.completed_at is not None
    assert completed.scheduled_at <= completed.started_at <= completed.completed_at


def test_the_state_of_a_failed_job_has_the_reason(context: Context) -> None:
    submit(context)
    samples.fail(context.store, "job-1", "the disk is full")
    assert (state(context).status, state(context).error) == ("failed", "the disk is full")


def test_every_kind_of_job_has_a_driver() -> None:
    assert jobs.DRIVERS == {
        jobs.SUPERVISED_FINE_TUNE: "jobs.supervised_fine_tune",
        jobs.PREFERENCE_OPTIMIZE: "jobs.preference_optimize",
        jobs.TRAIN_REWARD_MODEL: "jobs.train_reward_model",
        jobs.EVALUATE: "jobs.evaluate",
        jobs.GENERATE: "jobs.generate_synthetic_data",
        jobs.BATCH_INFERENCE: "jobs.batch_inference",
        jobs.EVALUATE_SUMMARIZATION: "jobs.evaluate_summarization",
        jobs.EVALUATE_TEXT_GENERATION: "jobs.evaluate_text_generation",
        jobs.EVALUATE_JUDGED: "jobs.evaluate_judged",
        jobs.EVALUATE_BENCHMARK: "jobs.evaluate_benchmark",
        jobs.EVALUATE_FUNCTION_CALLING: "jobs.evaluate_function_calling",
        jobs.INGEST: "jobs.ingest_documents",
    }
    for module in jobs.DRIVERS.values():
        assert importlib.util.find_spec(module) is not None, module


def test_too_many_waiting_jobs_are_refused_until_some_run(context: Context) -> None:
    config = context.config.model_copy(update={"max_waiting_jobs_per_tenant": 1})
    narrow = replace(context, config=config)
    submit(narrow)
    with pytest.raises(TooManyRequests, match="allowed: 1"):
        submit(narrow, uuid="job-2")
    assert submit(narrow) == "scheduled", "the same again is no further one"
    assert submit(narrow.of_tenant("acme"), uuid="job-2") == "scheduled"
    samples.start(context.store, "job-1")
    assert submit(narrow, uuid="job-2") == "scheduled"


def test_pages_go_on_behind_a_job(context: Context) -> None:
    for number in range(3):
        submit(context, uuid=f"job-{number}")
    kinds = [jobs.EVALUATE]
    first = jobs.page(context, kinds, None, None, None, 2)
    assert [job.uuid for job in first] == ["job-2", "job-1"]
    assert [job.uuid for job in jobs.page(context, kinds, None, None, "job-1", 2)] == ["job-0"]
    with pytest.raises(BadInput, match="allowed: evaluate"):
        jobs.page(context, kinds, "bake", None, None, 2)
    with pytest.raises(NotFound):
        jobs.page(context, kinds, None, None, "job-9", 2)


def test_cancelling_is_idempotent_and_bound_to_the_tenant(context: Context) -> None:
    submit(context)
    with pytest.raises(NotFound):
        jobs.cancel(context.of_tenant("acme"), "job-1", [jobs.EVALUATE])
    for _ in range(2):
        assert jobs.cancel(context, "job-1", [jobs.EVALUATE]).status == "cancelled"


@pytest.mark.parametrize("kind", ["bake", "", "red_teaming"])
def test_a_job_that_nothing_would_run_is_not_accepted(context: Context, kind: str) -> None:
    with pytest.raises(BadInput, match=f"there are no jobs of the kind '{kind}'; allowed: supervised_fine_tune"):
        submit(context, kind)
    assert context.store.jobs.get("default", "job-1") is None


def work_folder(tenant: str, uuid: str) -> Path:
    """The folder of a job, with something in it."""
    folder = jobs.work_folder(tenant, uuid)
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_text("x")
    return folder


def lose(context: Context, uuid: str, tenant: str = "default") -> Job:
    """Lets the first attempt of an accepted job begin and be lost."""
    job = samples.start(context.store, uuid, tenant)
    assert context.store.jobs.lose_attempt(job.id, 1, "the node died")
    return job


def test_cancelling_between_two_attempts_removes_what_the_next_would_have_gone_on_from(context: Context) -> None:
    submit(context)
    samples.start(context.store, "job-1")
    folder = work_folder("default", "job-1")
    assert jobs.cancel(context, "job-1", [jobs.EVALUATE]).status == "running"
    assert folder.is_dir(), "its driver is at work there"
    submit(context, uuid="job-2")
    lose(context, "job-2")
    other = work_folder("default", "job-2")
    assert jobs.cancel(context, "job-2", [jobs.EVALUATE]).status == "cancelled"
    assert not other.exists()


def test_the_work_of_jobs_that_have_ended_is_swept(context: Context) -> None:
    """A driver ends a job that is to be cancelled when it loses its attempt, say."""
    acme = context.of_tenant("acme")
    for one in (context, acme):
        for uuid in ("waits", "runs", "ended"):
            submit(one, uuid=uuid)
            work_folder(one.tenant, uuid)
        samples.start(context.store, "runs", one.tenant)
        job = samples.start(context.store, "ended", one.tenant)
        context.store.jobs.cancel(one.tenant, "ended")
        assert context.store.jobs.lose_attempt(job.id, 1, "the node died")
    strange = work_folder("default", "of-no-job")
    assert jobs.sweep(context) == ["work/acme/ended", "work/default/ended"]
    assert jobs.sweep(context) == []
    assert strange.is_dir()
    assert jobs.work_folder("acme", "waits").is_dir()
    assert jobs.work_folder("acme", "runs").is_dir()


@pytest.mark.parametrize("tenant", ["default", "acme"])
def test_what_was_published_for_a_job_that_came_to_nothing_is_swept(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    """Its driver was killed in between, and the job given up or cancelled."""
    mine = context.of_tenant(tenant)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "content").write_text("x")
    names = {}
    for number, uuid in enumerate(["waits", "runs", "failed", "cancelled", "completed", "kept"]):
        submit(mine, uuid=uuid)
        names[uuid] = jobs.artifact_name(tenant, jobs.FOLDERS[number % len(jobs.FOLDERS)], uuid)
        context.artifacts.publish(names[uuid], tmp_path / "files")
    for uuid in ("runs", "completed"):
        samples.start(context.store, uuid, tenant)
    for uuid in ("failed", "kept"):
        context.store.jobs.give_up(lose(context, uuid, tenant).id, "too often")
    context.store.jobs.cancel(tenant, "cancelled")
    job = context.store.jobs.get(tenant, "completed")
    assert job is not None
    assert context.store.jobs.complete(job.id, 1, {})
    experiment = context.store.telemetry.run_experiment(tenant, job.run_id)
    row = Artifact("id", tenant, experiment, job.run_id, "kept", "checkpoint", names["kept"], 1, {}, now())
    context.store.artifacts.add(row)
    assert jobs.sweep(context) == [], "a driver may be about to write its row"
    monkeypatch.setattr(jobs, "SWEEP_AFTER", dt.timedelta(0))
    assert sorted(jobs.sweep(context)) == sorted([names["cancelled"], names["failed"]])
    assert jobs.sweep(context) == []
    for uuid in ("waits", "runs", "completed", "kept"):
        assert context.artifacts.exists(names[uuid])


async def test_a_log_is_followed_to_the_end_of_its_job(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "FOLLOW_S", 0.01)
    submit(context)
    job = samples.start(context.store, "job-1")
    lines = jobs.follow(context, "job-1", [jobs.EVALUATE])
    context.store.telemetry.add_logs("default", job.run_id, [(now(), "info", "one"), (now(), "warning", "two")])
    assert [(await anext(lines)).message for _ in range(2)] == ["one", "two"]
    next_line = asyncio.ensure_future(anext(lines))
    context.store.telemetry.add_logs("default", job.run_id, [(now(), "info", "three")])
    assert (await next_line).message == "three"
    context.store.telemetry.add_logs("default", job.run_id, [(now(), "info", "four")])
    samples.complete(context.store, "job-1", {})
    assert [line.message async for line in lines] == ["four"]

"""The state machine of jobs, on each database."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from stack.api.jobs import JobStatus
from stack.store import Adapter, Artifact, Job, Store, now
from stack.store.jobs import MAX_REASON, NewJob
from tests.samples import trained
from tests.threads import at_once

ROUNDS = 12


def new(uuid: str = "job-1", **changes: Any) -> NewJob:
    given: dict[str, Any] = dict(tenant="default", uuid=uuid, kind="evaluate", request={"a": 1}, experiment="evaluate")
    return NewJob(**given | changes)


def add(store: Store, uuid: str = "job-1", **changes: Any) -> Job:
    job, _ = store.jobs.add(new(uuid, **changes), max_waiting=100)
    assert job is not None
    return job


def get(store: Store, uuid: str = "job-1") -> Job:
    job = store.jobs.get("default", uuid)
    assert job is not None
    return job


def running(store: Store, uuid: str = "job-1", number: int = 1) -> Job:
    """A job whose attempt of this number has begun."""
    job = store.jobs.get("default", uuid) or add(store, uuid)
    assert store.jobs.open_attempt(job.id, number, f"{uuid}-{number}")
    assert store.jobs.begin(job.id, number, {"workers": 1})
    return get(store, uuid)


def test_a_job_opens_a_run_in_the_experiment_of_its_name(store: Store) -> None:
    first, second, other = add(store, "a"), add(store, "b"), add(store, "c", experiment="other")
    experiments = [store.telemetry.run_experiment("default", job.run_id) for job in (first, second, other)]
    assert experiments[0] == experiments[1] != experiments[2]
    assert first.status == JobStatus.scheduled


def test_the_same_uuid_again_is_the_same_job(store: Store) -> None:
    job = add(store)
    again, is_new = store.jobs.add(new(request={"b": 2}), max_waiting=100)
    assert (again, is_new) == (job, False)


def test_tenants_do_not_see_each_others_jobs(store: Store) -> None:
    mine = add(store)
    theirs, is_new = store.jobs.add(new(tenant="acme", request={"b": 2}), max_waiting=100)
    assert is_new
    assert theirs is not None
    assert store.jobs.get("default", "job-1") == mine
    assert [job.id for job in store.jobs.page("acme", ["evaluate"])] == [theirs.id]
    store.jobs.cancel("acme", "job-1")
    assert get(store).status == JobStatus.scheduled


def test_no_more_jobs_wait_than_may(store: Store) -> None:
    for uuid in ("a", "b"):
        assert store.jobs.add(new(uuid), max_waiting=2)[0] is not None
    assert store.jobs.add(new("c"), max_waiting=2) == (None, False)
    assert store.jobs.get("default", "c") is None
    assert store.jobs.add(new("c", tenant="acme"), max_waiting=2)[1]
    assert store.jobs.add(new("a"), max_waiting=2)[0] is not None, "one that is there already is no further one"
    running(store, "a")
    assert store.jobs.add(new("c"), max_waiting=2)[0] is not None


def test_from_scheduled_to_completed(store: Store) -> None:
    job = running(store)
    assert job.status == JobStatus.running
    assert job.started_at is not None
    assert job.resources_allocated == {"workers": 1}
    assert store.jobs.record(job.id, 1, progress={"done": 1})
    experiment = store.telemetry.run_experiment("default", job.run_id)
    artifact = Artifact("id", "default", experiment, job.run_id, "n", "model", "adapters/n", 5, {}, now())
    assert store.jobs.complete(
        job.id, 1, {"x": 1}, Adapter("default", "m:a", "m", "job-1", "adapters/n", now()), artifact
    )
    ended = get(store)
    assert (ended.status, ended.result, ended.progress) == (JobStatus.completed, {"x": 1}, {"done": 1})
    assert ended.completed_at is not None
    (attempt,) = store.jobs.attempts(job.id)
    assert attempt.exit_reason == "completed"
    assert store.adapters.get("default", "m:a") is not None
    assert store.adapters.get("acme", "m:a") is None
    assert store.artifacts.get("default", "id") == artifact


def test_a_model_that_a_job_has_trained_is_added_with_its_end(store: Store) -> None:
    job, model = running(store), trained("small-job-1")
    assert store.jobs.complete(job.id, 1, {"x": 1}, model=model)
    assert store.models.list() == [model]
    assert not store.jobs.complete(job.id, 1, {}, model=trained("again"))
    assert store.models.list() == [model]


def test_a_job_whose_model_has_an_id_that_was_taken_meanwhile_fails_and_says_where_its_files_are(store: Store) -> None:
    first = store.models.add("small-job-1", "acme", {"id": "small-job-1", "path": "a"}, most=10)
    job = running(store)
    assert store.jobs.record(job.id, 1, checkpoints=[{"path": "work/a", "iters": 1, "files": []}])
    experiment = store.telemetry.run_experiment("default", job.run_id)
    artifact = Artifact("id", "default", experiment, job.run_id, "n", "model", "models/n", 5, {}, now())
    assert store.jobs.complete(job.id, 1, {"x": 1}, artifact=artifact, model=trained("small-job-1"))
    ended = get(store)
    assert (ended.status, ended.result, ended.checkpoints) == (JobStatus.failed, None, None)
    assert ended.error is not None
    assert "another model 'small-job-1'" in ended.error
    assert "'models/n'" in ended.error
    assert store.artifacts.get("default", "id") == artifact
    assert store.models.list() == [first]
    assert not store.jobs.fail(job.id, 1, "again")


def test_an_attempt_has_one_driver(store: Store) -> None:
    job = running(store)
    assert not store.jobs.begin(job.id, 1, {})


def test_a_job_has_one_open_attempt(store: Store) -> None:
    job = add(store)
    assert store.jobs.open_attempt(job.id, 1, "s-1")
    assert not store.jobs.open_attempt(job.id, 2, "s-2")
    assert [one.id for one in store.jobs.waiting()] == []


def test_a_lost_attempt_leaves_the_job_waiting_and_its_driver_powerless(store: Store) -> None:
    job = running(store)
    assert store.jobs.beat(job.id, 1)
    assert store.jobs.lose_attempt(job.id, 1, "the node died")
    assert get(store).status == JobStatus.scheduled
    assert "the node died" in (get(store).waiting_for or "")
    assert not store.jobs.beat(job.id, 1)
    assert not store.jobs.record(job.id, 1, progress={"done": 9})
    assert not store.jobs.complete(job.id, 1, {})
    assert not store.jobs.fail(job.id, 1, "late")
    (waiting,) = store.jobs.waiting()
    assert (waiting.attempts, waiting.begun, waiting.uuid) == (1, 1, "job-1")
    started = job.started_at
    again = running(store, number=2)
    assert again.started_at == started, "a job starts once"
    assert again.waiting_for is None
    assert store.jobs.complete(again.id, 2, {})


def test_cancelling_a_waiting_job_ends_it_at_once(store: Store) -> None:
    add(store)
    store.jobs.cancel("default", "job-1")
    store.jobs.cancel("default", "job-1")
    job = get(store)
    assert job.status == JobStatus.cancelled
    assert job.completed_at is not None
    assert not store.jobs.open_attempt(job.id, 1, "s")


def test_cancelling_a_running_job_waits_for_its_attempt_to_stop(store: Store) -> None:
    job = running(store)
    store.jobs.cancel("default", "job-1")
    asked = get(store)
    assert (asked.status, asked.cancelled_at is not None) == (JobStatus.running, True)
    store.jobs.cancel("default", "job-1")
    assert get(store).cancelled_at == asked.cancelled_at
    assert store.jobs.end_cancelled(job.id, 1, "it was stopped")
    assert get(store).status == JobStatus.cancelled
    assert not store.jobs.end_cancelled(job.id, 1, "again")


def test_a_job_that_has_ended_is_not_cancelled(store: Store) -> None:
    job = running(store)
    store.jobs.fail(job.id, 1, "why")
    store.jobs.cancel("default", "job-1")
    ended = get(store)
    assert (ended.status, ended.error, ended.cancelled_at) == (JobStatus.failed, "why", None)


def test_a_job_lost_while_it_was_to_be_cancelled_is_not_tried_again(store: Store) -> None:
    job = running(store)
    store.jobs.cancel("default", "job-1")
    store.jobs.lose_attempt(job.id, 1, "the node died")
    assert store.jobs.waiting() == []
    store.jobs.cancel("default", "job-1")
    assert get(store).status == JobStatus.cancelled


def test_pages_are_newest_first_and_filtered(store: Store) -> None:
    for number in range(5):
        add(store, f"job-{number}")
    running(store, "job-3")
    page = store.jobs.page("default", ["evaluate"], limit=2)
    assert [job.uuid for job in page] == ["job-4", "job-3"]
    page = store.jobs.page("default", ["evaluate"], after=page[-1].id, limit=2)
    assert [job.uuid for job in page] == ["job-2", "job-1"]
    assert [job.uuid for job in store.jobs.page("default", ["evaluate"], status="running")] == ["job-3"]
    assert store.jobs.page("default", ["supervised_fine_tune"]) == []
    assert store.jobs.counts() == {
        ("default", "evaluate", "running"): 1,
        ("default", "evaluate", "scheduled"): 4,
    }


def test_a_page_has_the_newest_of_several_kinds(store: Store) -> None:
    for number in range(6):
        add(store, f"job-{number}", kind=("evaluate", "a", "b")[number % 3])
    page = store.jobs.page("default", ["a", "b"], limit=3)
    assert [job.uuid for job in page] == ["job-5", "job-4", "job-2"]
    assert [job.uuid for job in store.jobs.page("default", ["a", "b"], after=page[-1].id)] == ["job-1"]


def test_of_each_tenants_waiting_jobs_the_most_urgent_are_seen(store: Store) -> None:
    """However many others have."""
    for number in range(4):
        add(store, f"job-{number}", priority=number // 2)
    add(store, "other", tenant="acme")
    running(store, "job-0")
    assert [job.uuid for job in store.jobs.waiting(limit=2)] == ["job-2", "job-3", "other"]
    assert [job.uuid for job in store.jobs.waiting()] == ["job-1", "job-2", "job-3", "other"]


def test_a_job_submitted_by_hand_is_under_way_at_once(store: Store) -> None:
    job, is_new = store.jobs.add(new(), max_waiting=0, submission_id="raysubmit_1")
    assert is_new
    assert job is not None
    ((_, attempt),) = store.jobs.under_way()
    assert (attempt.number, attempt.submission_id) == (1, "raysubmit_1")
    assert store.jobs.waiting() == []


def test_giving_up_a_job_that_was_lost_too_often(store: Store) -> None:
    job = running(store)
    store.jobs.give_up(job.id, "too often")
    assert get(store).status == JobStatus.running, "an attempt is under way"
    store.jobs.lose_attempt(job.id, 1, "why")
    store.jobs.give_up(job.id, "too often")
    assert (get(store).status, get(store).error) == (JobStatus.failed, "too often")


@pytest.mark.parametrize("ending", ["complete", "fail", "end_cancelled"])
def test_the_run_follows_its_job(store: Store, ending: str) -> None:
    job = running(store)
    arguments: list[Any] = [{}] if ending == "complete" else ["why"]
    assert getattr(store.jobs, ending)(job.id, 1, *arguments)
    run = store.telemetry.run("default", job.run_id)
    assert run is not None
    assert run.status == get(store).status
    assert run.ended_at == get(store).completed_at


@pytest.mark.parametrize("how", ["lose_attempt", "fail", "end_cancelled"])
def test_a_job_that_is_to_be_cancelled_ends_so_however_its_attempt_does(store: Store, how: str) -> None:
    """The driver or the supervisor may not have heard of it yet."""
    job = running(store)
    store.jobs.cancel("default", "job-1")
    assert getattr(store.jobs, how)(job.id, 1, "the worker was stopped")
    ended = get(store)
    assert (ended.status, ended.error, ended.waiting_for) == (JobStatus.cancelled, None, None)
    assert ended.completed_at is not None
    (attempt,) = store.jobs.attempts(job.id)
    assert attempt.exit_reason == "the worker was stopped"
    run = store.telemetry.run("default", job.run_id)
    assert run is not None
    assert run.status == JobStatus.cancelled


def test_a_job_that_is_done_is_completed_though_it_was_to_be_cancelled(store: Store) -> None:
    job = running(store)
    store.jobs.cancel("default", "job-1")
    assert store.jobs.complete(job.id, 1, {"x": 1})
    assert (get(store).status, get(store).result) == (JobStatus.completed, {"x": 1})


def test_a_job_that_is_to_be_cancelled_is_not_begun(store: Store) -> None:
    job = add(store)
    assert store.jobs.open_attempt(job.id, 1, "s-1")
    store.jobs.cancel("default", "job-1")
    assert not store.jobs.begin(job.id, 1, {})
    assert store.jobs.end_cancelled(job.id, 1, "it was stopped")
    assert (get(store).status, get(store).started_at) == (JobStatus.cancelled, None)


def test_a_job_between_two_attempts_is_cancelled_at_once(store: Store) -> None:
    job = running(store)
    assert store.jobs.lose_attempt(job.id, 1, "the node died")
    store.jobs.cancel("default", "job-1")
    assert get(store).status == JobStatus.cancelled
    assert store.jobs.waiting() == []


def test_a_job_that_has_ended_is_not_given_up_nor_its_run(store: Store) -> None:
    job = running(store)
    assert store.jobs.complete(job.id, 1, {})
    store.jobs.give_up(job.id, "too often")
    run = store.telemetry.run("default", job.run_id)
    assert run is not None
    assert (get(store).status, run.status) == (JobStatus.completed, JobStatus.completed)
    assert run.ended_at == get(store).completed_at


def test_a_run_starts_when_its_job_does_and_once(store: Store) -> None:
    job = running(store)
    store.jobs.lose_attempt(job.id, 1, "the node died")
    running(store, number=2)
    run = store.telemetry.run("default", job.run_id)
    assert run is not None
    assert run.started_at == job.started_at


def test_a_job_with_an_attempt_under_way_waits_for_nothing(store: Store) -> None:
    job = add(store)
    store.jobs.set_waiting_for(job.id, "no node has 16 GPU")
    assert get(store).waiting_for == "no node has 16 GPU"
    assert store.jobs.open_attempt(job.id, 1, "s-1")
    store.jobs.set_waiting_for(job.id, "no node has 16 GPU")
    assert get(store).waiting_for is None


def test_whatever_an_error_says_is_kept(store: Store) -> None:
    job = running(store)
    assert store.jobs.fail(job.id, 1, "a\0b \ud800 é " + "x" * 2 * MAX_REASON)
    error = get(store).error
    assert error is not None
    assert error.startswith("a\ufffdb ? é xxx")
    assert len(error) < MAX_REASON + 10


def test_how_jobs_stand_is_told_of_a_tenants_own(store: Store) -> None:
    job = running(store)
    add(store, "job-2")
    add(store, "job-3", tenant="acme")
    asked = ["job-1", "job-2", "job-3", "job-4"]
    assert store.jobs.statuses("default", asked) == {"job-1": "running", "job-2": "scheduled"}
    assert store.jobs.statuses("default", []) == {}
    assert not store.jobs.has_ended(job.id)
    assert store.jobs.fail(job.id, 1, "why")
    assert store.jobs.has_ended(job.id)


# What several processes do at the same moment


def test_of_many_supervisors_one_opens_an_attempt(store: Store) -> None:
    """Though they have seen different ones before, and would open different ones."""
    job = add(store)
    opened = at_once(*(partial(store.jobs.open_attempt, job.id, number, f"s-{number}") for number in range(1, 9)))
    assert opened.count(True) == 1
    assert len(store.jobs.attempts(job.id)) == 1


def test_no_more_jobs_wait_than_may_however_many_come_at_once(store: Store) -> None:
    accepted = at_once(*(partial(store.jobs.add, new(f"job-{number}"), max_waiting=3) for number in range(8)))
    assert [is_new for _, is_new in accepted].count(True) == 3
    assert len(store.jobs.waiting()) == 3


def rounds_of(store: Store, prepare: Callable[[Store, str], Job], *steps: Callable[[Job], Any]) -> list[list[Any]]:
    """Does the steps at once with a job, time and again with another, and returns what they came to."""
    results = []
    for number in range(ROUNDS):
        job = prepare(store, f"job-{number}")
        done = at_once(*(partial(step, job) for step in steps))
        results.append([get(store, job.uuid), *done])
    return results


def test_cancelling_while_an_attempt_is_lost_leaves_no_job_behind(store: Store) -> None:
    for job, _, lost in rounds_of(
        store,
        running,
        lambda job: store.jobs.cancel("default", job.uuid),
        lambda job: store.jobs.lose_attempt(job.id, 1, "the node died"),
    ):
        assert lost
        assert job.status == JobStatus.cancelled
    assert store.jobs.under_way() == []


def test_cancelling_while_an_attempt_is_opened_and_begun(store: Store) -> None:
    """Either there is none, and the job has ended, or there is one, and the supervisor finds that it is to be ended."""

    def open_and_begin(job: Job) -> tuple[bool, bool]:
        return store.jobs.open_attempt(job.id, 1, job.uuid), store.jobs.begin(job.id, 1, {})

    for job, _, (opened, begun) in rounds_of(
        store, add, lambda job: store.jobs.cancel("default", job.uuid), open_and_begin
    ):
        assert job.cancelled_at is not None
        expected = JobStatus.running if begun else JobStatus.scheduled if opened else JobStatus.cancelled
        assert job.status == expected
        assert len(store.jobs.attempts(job.id)) == int(opened)


def test_completing_while_the_attempt_is_lost_and_the_job_cancelled(store: Store) -> None:
    for job, completed, lost, _ in rounds_of(
        store,
        running,
        lambda job: store.jobs.complete(job.id, 1, {"x": 1}),
        lambda job: store.jobs.lose_attempt(job.id, 1, "the node died"),
        lambda job: store.jobs.cancel("default", job.uuid),
    ):
        assert completed != lost
        assert job.status == (JobStatus.completed if completed else JobStatus.cancelled)
        assert (job.result is not None) == completed


def test_a_job_fails_whose_model_an_administrator_adds_another_of_as_it_is_completed(store: Store) -> None:
    def add_model(job: Job) -> bool:
        found = store.models.add(job.uuid, "acme", {"id": job.uuid, "path": "a"}, most=100)
        assert found is not None
        return found.private

    rounds = rounds_of(
        store, running, lambda job: store.jobs.complete(job.id, 1, {}, model=trained(job.uuid)), add_model
    )
    for job, completed, is_private in rounds:
        assert completed
        assert job.status == (JobStatus.completed if is_private else JobStatus.failed)
    is_trained = {job.uuid: is_private for job, _, is_private in rounds}
    assert {row.id: row.private for row in store.models.list()} == is_trained, "both saw the same one"


def test_losses_count_since_a_job_last_got_further(store: Store) -> None:
    job = running(store)

    def lose(number: int, *progress: tuple[int, str]) -> tuple[int, int]:
        """Begins an attempt if need be, and loses it after its progress: how many have begun, and got no further."""
        if number > 1:
            running(store, number=number)
        for done, unit in progress:
            assert store.jobs.record(job.id, number, progress={"done": done, "total": 100, "unit": unit})
        assert store.jobs.lose_attempt(job.id, number, "the node died")
        (waiting,) = store.jobs.waiting()
        return waiting.begun, waiting.stalled

    assert lose(1) == (1, 1)
    assert lose(2, (0, "prompts")) == (2, 2), "it has done nothing"
    assert lose(3, (5, "prompts"), (9, "prompts")) == (3, 1), "it has got further, and was lost"
    assert lose(4, (7, "prompts"), (9, "prompts")) == (4, 2), "it has done the same again"
    assert lose(5, (3, "rows")) == (5, 1), "it has begun with something else"
    assert lose(6, (3, "rows")) == (6, 2)
    assert lose(7) == (7, 3)
    found = get(store)
    assert found.furthest == {"unit": "rows", "done": 3, "attempt": 5}
    assert found.progress == {"done": 3, "total": 100, "unit": "rows"}


def test_what_a_lost_attempt_records_is_not_kept(store: Store) -> None:
    for job, lost, recorded in rounds_of(
        store,
        running,
        lambda job: store.jobs.lose_attempt(job.id, 1, "the node died"),
        lambda job: store.jobs.record(job.id, 1, progress={"done": 9}),
    ):
        assert lost
        assert (job.progress is not None) == recorded


def test_giving_up_while_an_attempt_is_opened(store: Store) -> None:
    for job, _, opened in rounds_of(
        store,
        add,
        lambda job: store.jobs.give_up(job.id, "too often"),
        lambda job: store.jobs.open_attempt(job.id, 1, job.uuid),
    ):
        assert job.status == (JobStatus.scheduled if opened else JobStatus.failed)

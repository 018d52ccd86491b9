"""Which jobs start next, which can never, which attempts were lost."""

import datetime as dt
import warnings
from collections import Counter
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from stack.config import AutoscaledNodes
from stack.store.jobs import Waiting

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.scheduling import (
        MAX_UNBEGUN,
        choose,
        is_due,
        is_lost,
        is_tried_enough,
        why_never,
        with_those_to_come,
    )


def waiting(id: int, tenant: str = "a", priority: int = 0, **changes: Any) -> Waiting:
    given: dict[str, Any] = dict(
        uuid=f"job-{id}",
        kind="evaluate",
        bundles=[],
        waiting_for=None,
        trace=None,
        attempts=0,
        begun=0,
        stalled=0,
        last_ended_at=None,
    )
    return Waiting(id=id, tenant=tenant, priority=priority, **(given | changes))


def chosen(jobs: list[Waiting], most: int = 10, of_tenant: int = 10, **running: int) -> list[int]:
    return [job.id for job in choose(jobs, Counter(running), {}, most, of_tenant)]


def test_the_oldest_job_starts_first_and_no_more_than_may_run() -> None:
    assert chosen([waiting(3), waiting(1), waiting(2)], most=2) == [1, 2]
    assert chosen([waiting(1)], most=2, a=2) == []


def test_of_a_tenants_jobs_the_greatest_priority_starts_first() -> None:
    assert chosen([waiting(1), waiting(2, priority=5), waiting(3, priority=5), waiting(4, priority=-1)]) == [2, 3, 1, 4]


def test_tenants_take_turns_however_many_jobs_one_of_them_has() -> None:
    many = [waiting(number) for number in range(1, 100)]
    assert chosen([*many, waiting(100, "b"), waiting(101, "b")], most=5) == [1, 100, 2, 101, 3]


def test_a_tenant_that_has_running_jobs_waits_for_one_that_has_none() -> None:
    assert chosen([waiting(1), waiting(2, "b")], most=3, a=2) == [2]


def test_priorities_do_not_pass_other_tenants_by() -> None:
    assert chosen([waiting(1, "a", priority=100), waiting(2, "a", priority=100), waiting(3, "b")], most=2) == [1, 3]


def test_a_tenant_at_its_own_limit_does_not_hold_up_others() -> None:
    assert chosen([waiting(1), waiting(2), waiting(3, "b"), waiting(4, "b")], of_tenant=1) == [1, 3]
    assert chosen([waiting(1), waiting(2, "b")], most=9, of_tenant=2, a=2, b=3) == []
    assert chosen([waiting(1), waiting(2, "b")], most=9, of_tenant=2, a=2, b=1) == [2]


def test_of_tenants_with_as_many_running_jobs_the_one_that_waited_longest_is_next() -> None:
    turns = {"a": 7, "b": 3}
    many = [waiting(1), waiting(2, "b"), waiting(3, "c")]
    assert [job.id for job in choose(many, Counter(), turns, 10, 10)] == [3, 2, 1]
    assert turns["c"] < turns["b"] < turns["a"], "these were turns, too"
    assert [job.id for job in choose(many, Counter("abc"), turns, 4, 10)] == [3]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_over_time_no_tenant_is_passed_by(slots: int) -> None:
    """Two have always jobs waiting, older than all of the third, which comes later."""
    queue = [waiting(number, "ab"[number % 2]) for number in range(200)] + [waiting(900 + n, "c") for n in range(10)]
    turns: dict[str, int] = {}
    under_way: list[Waiting] = []
    started: list[str] = []
    while len(started) < 30:
        del under_way[:1]  # the oldest ends, which makes room for one
        running = Counter(job.tenant for job in under_way)
        for job in list(choose(queue, running, turns, slots, slots)):
            queue.remove(job)
            under_way.append(job)
            started.append(job.tenant)
    for end in range(6, 31):
        assert {"a", "b", "c"} == set(started[end - 6 : end]), started
    assert [started.count(tenant) for tenant in "abc"] == [10, 10, 10]


NODES = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}]


@pytest.mark.parametrize(
    "bundles",
    [[], [{"CPU": 64}], [{"CPU": 1, "GPU": 4}], [{"GPU": 4}, {"GPU": 4}]],
    ids=["nothing", "one node", "both on one node", "two nodes"],
)
def test_a_job_that_fits_the_cluster_may_run(bundles: list[dict[str, float]]) -> None:
    assert why_never(bundles, NODES) is None


def test_a_job_that_no_node_can_hold_says_what_there_is() -> None:
    reason = why_never([{"CPU": 1, "GPU": 16}], NODES)
    assert reason == "no node has 1 CPU, 16 GPU; the largest of each: 64 CPU, 4 GPU"
    assert why_never([{"CPU": 64, "GPU": 1}], NODES) is not None, "no one node has both"


def test_a_job_that_the_cluster_cannot_hold_at_once_says_so() -> None:
    assert why_never([{"GPU": 4}] * 4, NODES) == "the cluster has 8 GPU, and the job needs 16 at once"


def test_a_lost_job_is_tried_again_later_and_later() -> None:
    def ended(seconds_ago: float, attempts: int) -> Waiting:
        time = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds_ago)
        return waiting(1, attempts=attempts, last_ended_at=time.isoformat())

    assert is_due(waiting(1))
    assert not is_due(ended(1, attempts=1))
    assert is_due(ended(3, attempts=1))
    assert not is_due(ended(3, attempts=2))
    assert is_due(ended(61, attempts=20))
    assert is_due(ended(61, attempts=5_000))


def test_a_job_gets_so_many_attempts_and_more_if_they_do_not_begin() -> None:
    assert not is_tried_enough(waiting(1, attempts=3, begun=3, stalled=3), max_retries=3)
    assert is_tried_enough(waiting(1, attempts=4, begun=4, stalled=4), max_retries=3)
    assert not is_tried_enough(waiting(1, attempts=50, begun=50, stalled=3), max_retries=3), "it gets further"
    assert not is_tried_enough(waiting(1, attempts=MAX_UNBEGUN + 2, begun=3), max_retries=3)
    assert is_tried_enough(waiting(1, attempts=MAX_UNBEGUN, begun=0), max_retries=3)


def details(status: JobStatus, error_type: str | None = None, exit_code: int | None = None) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION, entrypoint="", status=status, error_type=error_type, driver_exit_code=exit_code
    )


@pytest.mark.parametrize(
    ("ended", "lost"),
    [
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", -9), True),
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", -15), True),
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", 137), True),
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", 143), True),
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", 75), True),
        (details(JobStatus.FAILED, "JOB_SUPERVISOR_ACTOR_DIED"), True),
        (details(JobStatus.FAILED, "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"), True),
        (details(JobStatus.FAILED), True),
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", 1), False),
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_ERROR", -11), False),
        (details(JobStatus.FAILED, "JOB_ENTRYPOINT_COMMAND_START_ERROR"), False),
        (details(JobStatus.SUCCEEDED, exit_code=0), False),
        (details(JobStatus.STOPPED), True),
    ],
)
def test_only_what_was_ended_from_outside_counts_as_lost(ended: JobDetails, lost: bool) -> None:
    assert is_lost(ended) is lost


def test_nodes_that_the_autoscaler_would_start_hold_jobs_too() -> None:
    head, spot = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 8.0}
    kind = AutoscaledNodes(resources=spot, most=2)
    assert with_those_to_come([head], []) == [head]
    assert with_those_to_come([head], [kind]) == [head, spot, spot]
    assert why_never([{"GPU": 8}] * 2, with_those_to_come([head], [kind])) is None
    assert why_never([{"GPU": 8}] * 3, with_those_to_come([head], [kind])) is not None


def test_nodes_that_have_come_are_not_counted_twice() -> None:
    spot = {"CPU": 8.0, "GPU": 8.0}
    kind = AutoscaledNodes(resources=spot, most=2)
    running = spot | {"memory": 1e9}
    assert with_those_to_come([running], [kind]) == [running, spot]
    assert with_those_to_come([running, running, running], [kind]) == [running, running, running]

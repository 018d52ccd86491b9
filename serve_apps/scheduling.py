"""What the job supervisor goes by: which jobs start next, which can never, which attempts were lost."""

import datetime as dt
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from ray.job_submission import JobDetails, JobStatus

from stack.config import AutoscaledNodes
from stack.store.jobs import Waiting

# How many attempts may be lost before their drivers have begun: Ray itself is to blame then, rather than the job.
MAX_UNBEGUN = 20
# By what a driver ends that another attempt should follow: of itself, as it cannot reach the database (75), or by a
# signal from outside (SIGKILL, SIGTERM), as Ray or a shell writes it.
_LOST_EXITS = (75, 137, 143, -9, -15)


def why_never(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> str | None:
    """Why the nodes of the cluster can never hold these bundles at once, if they cannot."""
    for bundle in bundles:
        if not any(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes):
            return f"no node has {_written(bundle)}; the largest of each: {_written(_largest(nodes, bundle))}"
    for name in {name for bundle in bundles for name in bundle}:
        amount = sum(bundle.get(name, 0) for bundle in bundles)
        held = sum(node.get(name, 0) for node in nodes)
        if amount > held:
            return f"the cluster has {held:g} {name}, and the job needs {amount:g} at once"
    return None


def with_those_to_come(nodes: list[dict[str, float]], autoscaled: Sequence[AutoscaledNodes]) -> list[dict[str, float]]:
    """The nodes that there are and those that the autoscaler would start. Those that are there count among its most."""
    to_come = []
    for kind in autoscaled:
        there = sum(all(node.get(name, 0) >= least for name, least in kind.resources.items()) for node in nodes)
        to_come += [kind.resources] * max(0, kind.most - there)
    return [*nodes, *to_come]


def choose(
    waiting: list[Waiting], running: Counter[str], turns: dict[str, int], most: int, most_of_tenant: int
) -> Iterator[Waiting]:
    """The jobs to start next, fairly: the next of the tenant that has the fewest running.

    Of tenants with as many, it is the turn of the one whose last job started longest ago: `turns` are the numbers of
    their last starts. Of a tenant's jobs those of the highest priority come first, then the oldest. Counts what it
    gives in `running` and `turns`.
    """
    queues = {
        tenant: sorted(queue, key=lambda job: (-job.priority, job.id))
        for tenant, queue in groupby(sorted(waiting, key=lambda job: job.tenant), key=lambda job: job.tenant)
    }
    while queues and sum(running.values()) < most:
        tenant = min(queues, key=lambda tenant: (running[tenant], turns.get(tenant, -1), queues[tenant][0].id))
        if running[tenant] >= most_of_tenant:
            return
        yield queues[tenant].pop(0)
        running[tenant] += 1
        turns[tenant] = max(turns.values(), default=0) + 1
        if not queues[tenant]:
            del queues[tenant]


def is_due(job: Waiting) -> bool:
    """Whether a job may be tried now: after its first lost attempt 2 s later, then 4, 8, … up to a minute."""
    if job.last_ended_at is None:
        return True
    since = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(job.last_ended_at)
    return since.total_seconds() >= min(2.0 ** min(job.attempts, 6), 60.0)


def is_tried_enough(job: Waiting, max_retries: int) -> bool:
    """Whether so many attempts at a job were lost, since it last got further, that it gets no other."""
    return job.stalled > max_retries or job.attempts - job.begun >= MAX_UNBEGUN


def is_lost(details: JobDetails) -> bool:
    """Whether an ended Ray job's driver was ended from outside, or never started, for no fault of its own."""
    if details.status != JobStatus.FAILED:
        return details.status == JobStatus.STOPPED
    if details.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR":
        return details.driver_exit_code in _LOST_EXITS
    return details.error_type != "JOB_ENTRYPOINT_COMMAND_START_ERROR"


def _largest(nodes: list[dict[str, float]], bundle: dict[str, float]) -> dict[str, float]:
    return {name: max((node.get(name, 0) for node in nodes), default=0) for name in bundle}


def _written(bundle: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())

"""The one state machine of all long work.

    scheduled ──> running ──> completed | failed | cancelled
        ^            │
        └────────────┘ an attempt was lost: a worker, a node, or all of Ray

A job is a row of the store, and the row is the truth. An attempt at it is a Ray job that runs a driver of `jobs/`; its
submission id is made from the job's tenant and uuid, so that submitting it twice is one attempt. Routes only add rows
and ask for cancelling: the job supervisor (serve_apps/job_supervisor.py) submits attempts to Ray and watches them, and
the driver writes down how far it is and how it ended. What a job prints is the log of its run.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from stack import tracing
from stack.api.jobs import JobAttempt, JobLog, JobProgress, JobStatus
from stack.config import home
from stack.context import DEFAULT_TENANT, Context
from stack.errors import BadInput, Conflict, NotFound, TooManyRequests
from stack.store import Job
from stack.store.jobs import Entry, NewJob
from stack.store.telemetry import Log

SUPERVISED_FINE_TUNE = "supervised_fine_tune"
PREFERENCE_OPTIMIZE = "preference_optimize"
EVALUATE = "evaluate"
GENERATE = "generate_synthetic_data"
BATCH_INFERENCE = "batch_inference"
# What runs a job of each kind: the module of its driver.
DRIVERS = {SUPERVISED_FINE_TUNE: "jobs.supervised_fine_tune", EVALUATE: "jobs.evaluate"}
FOLLOW_S = 0.5
PAGE = 1_000


def submit(
    context: Context,
    kind: str,
    uuid: str,
    request: dict[str, Any],
    *,
    bundles: Sequence[dict[str, float]] = (),
    submission_id: str | None = None,
) -> Job:
    """Accepts a job; with a submission id, one that a user has submitted to Ray already.

    `uuid` is the client's idempotency key: the same request again is the same job. `bundles` are the resources that
    must be free for it, node by node. Raises Conflict for another request with the same uuid, and TooManyRequests
    when too many of the tenant's jobs wait already.
    """
    priority = request.get("priority", 0)
    new = NewJob(context.tenant, uuid, kind, request, kind, priority, bundles, tracing.traceparent())
    job, _ = context.store.jobs.add(new, context.config.max_waiting_jobs_per_tenant, submission_id)
    if job is None:
        most = context.config.max_waiting_jobs_per_tenant
        raise TooManyRequests(f"{most} jobs of the tenant {context.tenant!r} wait already; allowed: {most}")
    if (job.kind, job.request) != (kind, request):
        raise Conflict(f"the job_uuid {uuid!r} stands for another job; choose a new one", param="job_uuid")
    return job


def get(context: Context, uuid: str, kinds: Sequence[str]) -> Job:
    """The job of this uuid if it is of one of these kinds. Raises NotFound."""
    job = context.store.jobs.get(context.tenant, uuid)
    if job is None or job.kind not in kinds:
        raise NotFound(f"there is no such job: {uuid!r}", param="job_uuid")
    return job


def page(
    context: Context, kinds: Sequence[str], kind: str | None, status: JobStatus | None, after: str | None, limit: int
) -> list[Entry]:
    """The jobs of these kinds, newest first, behind the one with the uuid `after`. Raises BadInput, NotFound."""
    if kind is not None and kind not in kinds:
        raise BadInput(f"there are no jobs of the kind {kind!r} here; allowed: {', '.join(kinds)}", param="kind")
    last = get(context, after, kinds).id if after is not None else None
    return context.store.jobs.page(context.tenant, [kind] if kind else kinds, status, last, limit)


def cancel(context: Context, uuid: str, kinds: Sequence[str]) -> Job:
    """Asks that a job be cancelled: its work is stopped within seconds. One that has ended stays as it is."""
    get(context, uuid, kinds)
    context.store.jobs.cancel(context.tenant, uuid)
    return get(context, uuid, kinds)


def logs(context: Context, uuid: str, kinds: Sequence[str], after: int = 0, limit: int = PAGE) -> list[JobLog]:
    """The lines that a job has written so far, behind the one numbered `after`."""
    job = get(context, uuid, kinds)
    return [_line(log) for log in context.store.telemetry.logs_after(job.tenant, job.run_id, after, limit)]


async def follow(context: Context, uuid: str, kinds: Sequence[str], after: int = 0) -> AsyncGenerator[JobLog]:
    """The lines that a job has written and writes, until it has ended."""
    while True:
        # The state first: what is written before the job ends is read after that look.
        job = await asyncio.to_thread(get, context, uuid, kinds)
        lines = await asyncio.to_thread(logs, context, uuid, kinds, after)
        for line in lines:
            yield line
            after = line.number
        if len(lines) == PAGE:
            continue
        if job.completed_at is not None:
            return
        await asyncio.sleep(FOLLOW_S)


def entry(job: Entry) -> dict[str, Any]:
    """The fields of JobEntry of a job."""
    times = dict(scheduled_at=job.scheduled_at, started_at=job.started_at, completed_at=job.completed_at)
    return dict(job_uuid=job.uuid, kind=job.kind, status=job.status, **times)


def state(context: Context, job: Job) -> dict[str, Any]:
    """The fields of JobState of a job."""
    return dict(
        job_uuid=job.uuid,
        kind=job.kind,
        status=job.status,
        run_id=job.run_id,
        priority=job.priority,
        scheduled_at=job.scheduled_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        cancelled_at=job.cancelled_at,
        waiting_for=job.waiting_for,
        resources_allocated=job.resources_allocated,
        progress=JobProgress(**job.progress) if job.progress else None,
        attempts=[
            JobAttempt(
                number=attempt.number,
                submission_id=attempt.submission_id,
                started_at=attempt.started_at,
                ended_at=attempt.ended_at,
                exit_reason=attempt.exit_reason,
            )
            for attempt in context.store.jobs.attempts(job.id)
        ],
        metrics=context.store.telemetry.newest_metrics(job.tenant, job.run_id),
        error=job.error,
    )


def submission_id(tenant: str, uuid: str, number: int) -> str:
    """The id of the Ray job that is an attempt at a job. Tenants have no dot in their names, so it is unambiguous."""
    return f"{tenant}.{uuid}.{number}"


def artifact_name(tenant: str, folder: str, uuid: str) -> str:
    """The artifact in which a job keeps what it has made: tenants are apart."""
    return f"{folder}/{uuid}" if tenant == DEFAULT_TENANT else f"tenants/{tenant}/{folder}/{uuid}"


def work_folder(tenant: str, uuid: str) -> Path:
    """Where a job keeps what a next attempt goes on from, until it ends."""
    return home() / "work" / tenant / uuid


def _line(log: Log) -> JobLog:
    return JobLog(number=log.id, timestamp=log.timestamp, level=log.level, message=log.message)

"""The one state machine of all long work.

    scheduled ──> running ──> completed
        └────────────┴──────> failed

A job is a row of the store, and the row is the truth. An attempt at it is a Ray job that runs a driver of `jobs/`; its
submission id is made from the job's uuid, so that submitting it twice is one attempt. Routes only add rows: the job
supervisor (serve_apps/job_supervisor.py) submits them to Ray and notices those whose Ray job died without a word.
"""

from collections.abc import Sequence
from typing import Any

from stack.api.jobs import JobProgress
from stack.context import Context
from stack.errors import Conflict, NotFound
from stack.store import Job

SUPERVISED_FINE_TUNE = "supervised_fine_tune"
EVALUATE = "evaluate"
# What runs a job of each kind: the module of its driver.
DRIVERS = {SUPERVISED_FINE_TUNE: "jobs.supervised_fine_tune", EVALUATE: "jobs.evaluate"}


def submit(context: Context, kind: str, uuid: str, request: dict[str, Any], submission_id: str | None = None) -> Job:
    """Accepts a job; with a submission id, one that a user has submitted to Ray already.

    `uuid` is the client's idempotency key: the same request again is the same job. Raises Conflict for another request
    with the same uuid.
    """
    context.store.add_job(uuid, kind, request, submission_id)
    job = context.store.job(uuid)
    assert job is not None
    if (job.kind, job.request) != (kind, request):
        raise Conflict(f"the job_uuid {uuid!r} stands for another job; choose a new one", param="job_uuid")
    return job


def get(context: Context, uuid: str, kinds: Sequence[str]) -> Job:
    """The job of this uuid if it is of one of these kinds. Raises NotFound."""
    job = context.store.job(uuid)
    if job is None or job.kind not in kinds:
        raise NotFound(f"there is no such job: {uuid!r}", param="job_uuid")
    return job


def state(context: Context, job: Job) -> dict[str, Any]:
    """The fields of JobState of a job."""
    return dict(
        job_uuid=job.uuid,
        status=job.status,
        scheduled_at=job.scheduled_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        progress=JobProgress(**job.progress) if job.progress else None,
        metrics=context.store.newest_metrics_of(job.uuid),
        error=job.error,
    )

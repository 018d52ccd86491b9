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
import datetime as dt
import shutil
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stack import tracing, trained_models
from stack.api.jobs import JobAttempt, JobLog, JobProgress, JobStatus
from stack.api.wire import Request
from stack.config import home
from stack.context import DEFAULT_TENANT, Context
from stack.errors import BadInput, Conflict, NotFound, TooManyRequests
from stack.store import Job
from stack.store.jobs import UNFINISHED, Entry, NewJob
from stack.store.telemetry import Log

SUPERVISED_FINE_TUNE = "supervised_fine_tune"
PREFERENCE_OPTIMIZE = "preference_optimize"
TRAIN_REWARD_MODEL = "train_reward_model"
# Of question answering. It is called as it was when there were no others.
EVALUATE = "evaluate"
EVALUATE_SUMMARIZATION = "evaluate_summarization"
EVALUATE_TEXT_GENERATION = "evaluate_text_generation"
EVALUATE_JUDGED = "evaluate_judged"
EVALUATE_BENCHMARK = "evaluate_benchmark"
EVALUATE_FUNCTION_CALLING = "evaluate_function_calling"
GENERATE = "generate_synthetic_data"
BATCH_INFERENCE = "batch_inference"
INGEST = "ingest_documents"
# What runs a job of each kind: the module of its driver.
DRIVERS = {
    SUPERVISED_FINE_TUNE: "jobs.supervised_fine_tune",
    PREFERENCE_OPTIMIZE: "jobs.preference_optimize",
    TRAIN_REWARD_MODEL: "jobs.train_reward_model",
    EVALUATE: "jobs.evaluate",
    GENERATE: "jobs.generate_synthetic_data",
    BATCH_INFERENCE: "jobs.batch_inference",
    EVALUATE_SUMMARIZATION: "jobs.evaluate_summarization",
    EVALUATE_TEXT_GENERATION: "jobs.evaluate_text_generation",
    EVALUATE_JUDGED: "jobs.evaluate_judged",
    EVALUATE_BENCHMARK: "jobs.evaluate_benchmark",
    EVALUATE_FUNCTION_CALLING: "jobs.evaluate_function_calling",
    INGEST: "jobs.ingest_documents",
}
# The folders of the artifacts that jobs make: those of fine-tuning, which are adapters or whole models, of evaluations,
# of generations, of batches and of ingestions.
ADAPTERS, WHOLE_MODELS, RESULTS, GENERATIONS, BATCHES = "adapters", "models", "evaluations", "generations", "batches"
INGESTIONS = "ingestions"
FOLDERS = (ADAPTERS, WHOLE_MODELS, RESULTS, GENERATIONS, BATCHES, INGESTIONS)
# What a worker that asks served models reserves: it only waits.
ASKER_CPUS = 0.25
SWEEP_AFTER = dt.timedelta(days=1)
FOLLOW_S = 0.5
PAGE = 1_000


def submit(
    context: Context,
    kind: str,
    uuid: str,
    request: Request,
    *,
    bundles: Sequence[dict[str, float]] = (),
    submission_id: str | None = None,
) -> Job:
    """Accepts a job; with a submission id, one that a user has submitted to Ray already.

    `uuid` is the client's idempotency key: the same request again is the same job. `bundles` are the resources that
    must be free for it, node by node. Raises Conflict for another request with the same uuid, and TooManyRequests
    when too many of the tenant's jobs wait already. BadInput for a kind that nothing runs.
    """
    if kind not in DRIVERS:
        raise BadInput(f"there are no jobs of the kind {kind!r}; allowed: {', '.join(DRIVERS)}")
    body = request.model_dump(mode="json")
    priority = body.get("priority", 0)
    new = NewJob(context.tenant, uuid, kind, body, kind, priority, bundles, tracing.traceparent())
    job, _ = context.store.jobs.add(new, context.config.max_waiting_jobs_per_tenant, submission_id)
    if job is None:
        most = context.config.max_waiting_jobs_per_tenant
        raise TooManyRequests(f"{most} jobs of the tenant {context.tenant!r} wait already; allowed: {most}")
    if job.kind != kind or not _is_same(request, job.request):
        raise Conflict(f"the job_uuid {uuid!r} stands for another job; choose a new one", param="job_uuid")
    return job


def _is_same(request: Request, accepted: dict[str, Any]) -> bool:
    """Whether a job was accepted with this request. Fields that there are since then have their defaults in it."""
    try:
        known = type(request).model_validate(accepted)
    except ValidationError:  # an earlier release allowed it, and it cannot be sent again
        return False
    return known.model_dump(mode="json") == request.model_dump(mode="json")


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
    job = get(context, uuid, kinds)
    if job.status == JobStatus.cancelled:  # between two attempts, say: nobody else removes what the last has left
        shutil.rmtree(work_folder(job.tenant, job.uuid), ignore_errors=True)
    return job


def logs(context: Context, uuid: str, kinds: Sequence[str], after: int = 0, limit: int = PAGE) -> list[JobLog]:
    """The lines that a job has written so far, behind the one numbered `after`."""
    return _lines(context, get(context, uuid, kinds), after, limit)


async def follow(context: Context, uuid: str, kinds: Sequence[str], after: int = 0) -> AsyncGenerator[JobLog]:
    """The lines that a job has written and writes, until it has ended."""
    job = await asyncio.to_thread(get, context, uuid, kinds)
    while True:
        has_ended, lines = await asyncio.to_thread(_look, context, job, after)
        for line in lines:
            yield line
            after = line.number
        if len(lines) == PAGE:
            continue
        if has_ended:
            return
        await asyncio.sleep(FOLLOW_S)


def sweep(context: Context) -> list[str]:
    """Removes what jobs have left that ended without a result: folders of work, artifacts that have no row, and copies
    of models that nothing serves.

    For the administrator: it sees all tenants' jobs. What was written within SWEEP_AFTER stays. Returns the names.
    """
    return [*_sweep_work(context), *_sweep_artifacts(context), *trained_models.sweep(context)]


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


def _sweep_work(context: Context) -> list[str]:
    removed = []
    for tenant in _names(home() / "work"):
        uuids = _names(home() / "work" / tenant)
        for uuid, status in context.store.jobs.statuses(tenant, uuids).items():
            if status not in UNFINISHED:
                shutil.rmtree(work_folder(tenant, uuid), ignore_errors=True)
                removed.append(f"work/{tenant}/{uuid}")
    return removed


def _sweep_artifacts(context: Context) -> list[str]:
    files, known = context.artifacts, context.store.artifacts.known_paths()
    removed = []
    for tenant in [DEFAULT_TENANT, *(name.rsplit("/", 1)[-1] for name in files.names("tenants"))]:
        for folder in FOLDERS:
            names = files.names(artifact_name(tenant, folder, "").rstrip("/"))
            uuids = {name: name.rsplit("/", 1)[-1] for name in names if name not in known}
            statuses = context.store.jobs.statuses(tenant, list(uuids.values()))
            # What a completed job has made stays, whatever has become of its row.
            ended = (
                name for name, uuid in uuids.items() if statuses.get(uuid) in (JobStatus.failed, JobStatus.cancelled)
            )
            removed += [name for name in ended if files.remove_if_older(name, SWEEP_AFTER)]
    return removed


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _look(context: Context, job: Job, after: int) -> tuple[bool, list[JobLog]]:
    # The state first: what is written before the job ends is read after that look.
    has_ended = context.store.jobs.has_ended(job.id)
    return has_ended, _lines(context, job, after, PAGE)


def _lines(context: Context, job: Job, after: int, limit: int) -> list[JobLog]:
    return [_line(log) for log in context.store.telemetry.logs_after(job.tenant, job.run_id, after, limit)]


def _line(log: Log) -> JobLog:
    return JobLog(number=log.id, timestamp=log.timestamp, level=log.level, message=log.message)

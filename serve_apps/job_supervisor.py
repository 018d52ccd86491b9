"""The job supervisor: a Serve deployment of one replica that hands accepted jobs to Ray and watches the attempts.

The store is the truth. Once a second it looks at the open attempts and the waiting jobs, never at those that have
ended: it stops what is to be cancelled, closes attempts whose Ray job has ended without saying how, and opens attempts
at waiting jobs as far as the limits allow. An attempt that was lost with a worker, a node or all of Ray is followed by
another one. A new replica starts from the store, so nothing is lost when one dies; when it starts it also stops the
Ray jobs that no open attempt stands for. Once a day it sweeps the artifacts of what interrupted uploads have left.
"""

import asyncio
import datetime as dt
import json
import logging
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

import ray
from ray import serve
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from sqlalchemy.exc import SQLAlchemyError

from stack import experiments, jobs, tracing
from stack.config import Config
from stack.context import Context
from stack.errors import StackError
from stack.store import Attempt, Job, now
from stack.store.jobs import Waiting

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
SWEEP_S = 24 * 3600.0
# How long the heartbeat of an attempt that Ray does not know may stand still: its driver ends itself before that.
LEASE_S = 30.0
# What our Ray jobs are marked with, so that no other is ever stopped.
MARK = "llama_stack_job"
_ENDED = (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED)
# Signals by which a driver is killed from outside (SIGKILL, SIGTERM), as Ray or a shell writes them.
_KILLED = (-9, -15, 137, 143)


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class JobSupervisor:
    def __init__(self, config: Config) -> None:
        tracing.start("job-supervisor", config.otlp_address)
        self._config = config
        self._context = Context.open(config)
        self._store = self._context.store
        self._client: JobSubmissionClient | None = None
        self._problem: str | None = None
        # Of the attempts that Ray does not know: the last heartbeat seen, and when it was first seen.
        self._silent: dict[tuple[int, int], tuple[int, float]] = {}
        self._loop = asyncio.get_running_loop().create_task(self._watch())
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep_daily())

    def check_health(self) -> None:
        """Serve restarts a supervisor that has stopped watching."""
        if self._loop.done():
            self._loop.result()

    async def problem(self) -> str | None:
        """Why jobs cannot be handed to Ray, if they cannot."""
        return self._problem

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.reconcile)
                self._problem = None
            except (OSError, RuntimeError, SQLAlchemyError) as error:
                # Ray's job API or the database is away: jobs wait until both are back.
                self._problem = f"jobs cannot be handed to Ray: {error}"
                self._client = None
                logger.warning("%s", self._problem)
            await asyncio.sleep(INTERVAL_S)

    async def _sweep_daily(self) -> None:
        while True:
            await asyncio.to_thread(self._sweep)
            await asyncio.sleep(SWEEP_S)

    def _sweep(self) -> None:
        try:
            for name in experiments.sweep(self._context):
                logger.info("%s, which an interrupted upload has left, is removed", name)
        except (OSError, StackError, SQLAlchemyError) as error:  # tomorrow again
            logger.warning("the artifacts cannot be swept: %s", error)

    def reconcile(self) -> None:
        """Brings Ray's jobs in line with the rows of the store, once."""
        if self._client is None:
            client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
            stop_strays(client, {attempt.submission_id for _, attempt in self._store.jobs.under_way()})
            self._client = client
        for job, attempt in self._store.jobs.under_way():
            self._look_at(self._client, job, attempt)
        waiting = self._store.jobs.waiting()
        if waiting:
            self._open_attempts(self._client, waiting)

    # Attempts under way

    def _look_at(self, client: JobSubmissionClient, job: Job, attempt: Attempt) -> None:
        details = _details(client, attempt.submission_id)
        if details is None:
            if self._is_silent(attempt):
                self._lose(job, attempt, "its Ray job is gone: Ray was started anew while it ran")
            return
        if details.status in _ENDED:
            self._close(job, attempt, details)
        elif job.cancelled_at is not None:
            client.stop_job(attempt.submission_id)

    def _is_silent(self, attempt: Attempt) -> bool:
        """Whether the driver of an attempt that Ray does not know has shown no sign of life for LEASE_S."""
        key = (attempt.job_id, attempt.number)
        heartbeat, since = self._silent.get(key, (-1, 0.0))
        if heartbeat != attempt.heartbeat:
            self._silent[key] = (attempt.heartbeat, time.monotonic())
            return False
        if time.monotonic() - since < LEASE_S:
            return False
        del self._silent[key]
        return True

    def _close(self, job: Job, attempt: Attempt, details: JobDetails) -> None:
        """Closes an attempt whose driver has ended without saying how."""
        # Ray adds the end of the driver's log, which is in the job's own log.
        message = (details.message or "no message").split(", last available logs")[0]
        reason = f"{details.status.value.lower()}: {message}"
        # The driver may have written its outcome between our two looks: these change nothing then.
        if job.cancelled_at is not None or details.status == JobStatus.STOPPED:
            if self._store.jobs.end_cancelled(job.id, attempt.number, "it was stopped"):
                self._clean(job, "cancelled")
        elif is_lost(details):
            self._lose(job, attempt, reason)
        elif self._store.jobs.fail(job.id, attempt.number, f"its driver ended without a result ({reason})"):
            self._clean(job, "failed")

    def _lose(self, job: Job, attempt: Attempt, reason: str) -> None:
        if job.cancelled_at is not None:
            if self._store.jobs.end_cancelled(job.id, attempt.number, reason):
                self._clean(job, "cancelled")
        elif self._store.jobs.lose_attempt(job.id, attempt.number, reason):
            self._store.telemetry.add_logs(
                job.tenant, job.run_id, [(now(), "warning", f"attempt {attempt.number} was lost: {reason}")]
            )
            logger.warning("attempt %s at job %s was lost: %s", attempt.number, job.uuid, reason)

    def _clean(self, job: Job, how: str) -> None:
        shutil.rmtree(jobs.work_folder(job.tenant, job.uuid), ignore_errors=True)
        logger.info("job %s of %s %s", job.uuid, job.tenant, how)

    # Waiting jobs

    def _open_attempts(self, client: JobSubmissionClient, waiting: list[Waiting]) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        possible = []
        for job in waiting:
            reason = why_never(job.bundles, nodes)
            if reason is None:
                possible.append(job)
            elif reason != job.waiting_for:
                self._store.jobs.set_waiting_for(job.id, reason)
        running = Counter(job.tenant for job, _ in self._store.jobs.under_way())
        for job in choose(
            [job for job in possible if is_due(job)],
            running,
            self._config.max_running_jobs,
            self._config.max_running_jobs_per_tenant,
        ):
            self._submit(client, job)

    def _submit(self, client: JobSubmissionClient, job: Waiting) -> None:
        number = job.attempts + 1
        if job.begun > self._config.max_retries:
            last = self._store.jobs.attempts(job.id)[-1]
            self._store.jobs.give_up(job.id, f"lost {job.begun} times, at last: {last.exit_reason}")
            shutil.rmtree(jobs.work_folder(job.tenant, job.uuid), ignore_errors=True)
            return
        submission_id = jobs.submission_id(job.tenant, job.uuid, number)
        # The row first: a Ray job without one is a stray, a row without a Ray job is an attempt that is lost.
        if not self._store.jobs.open_attempt(job.id, number, submission_id):
            return
        arguments = ["--tenant", job.tenant, "--job", job.uuid, "--attempt", str(number)]
        try:
            with tracing.span("submit attempt", parent=job.trace, job_uuid=job.uuid, attempt=number):
                client.submit_job(
                    entrypoint=shlex.join([sys.executable, "-m", jobs.DRIVERS[job.kind], *arguments]),
                    submission_id=submission_id,
                    runtime_env={"env_vars": {"STACK_CONFIG": json.dumps(self._config.model_dump(mode="json"))}},
                    metadata={MARK: job.uuid},
                )
        except RuntimeError as error:
            # Should the Ray job exist all the same, its driver finds the attempt closed.
            self._store.jobs.lose_attempt(job.id, number, f"it could not be handed to Ray: {error}")
            raise
        logger.info("attempt %s at job %s of %s is submitted", number, job.uuid, job.tenant)


def stop_strays(client: JobSubmissionClient, known: set[str]) -> None:
    """Stops those of our Ray jobs that no open attempt stands for."""
    for details in client.list_jobs():
        ours = MARK in (details.metadata or {})
        if ours and details.submission_id and details.submission_id not in known and details.status not in _ENDED:
            logger.warning("the Ray job %s stands for no attempt and is stopped", details.submission_id)
            client.stop_job(details.submission_id)


def is_lost(details: JobDetails) -> bool:
    """Whether an ended Ray job's driver was killed from outside, or never started, for no fault of its own."""
    if details.status != JobStatus.FAILED:
        return False
    if details.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR":
        return details.driver_exit_code in _KILLED
    return details.error_type != "JOB_ENTRYPOINT_COMMAND_START_ERROR"


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


def choose(waiting: list[Waiting], running: Counter[str], most: int, most_of_tenant: int) -> Iterator[Waiting]:
    """The jobs to start next, fairly: in turns, the next of the tenant that has the fewest running.

    Of a tenant's jobs those of the highest priority come first, then the oldest. Counts what it gives in `running`.
    """
    queues = {
        tenant: sorted(queue, key=lambda job: (-job.priority, job.id))
        for tenant, queue in groupby(sorted(waiting, key=lambda job: job.tenant), key=lambda job: job.tenant)
    }
    while queues and sum(running.values()) < most:
        tenant = min(queues, key=lambda tenant: (running[tenant], queues[tenant][0].id))
        if running[tenant] >= most_of_tenant:
            return
        yield queues[tenant].pop(0)
        running[tenant] += 1
        if not queues[tenant]:
            del queues[tenant]


def is_due(job: Waiting) -> bool:
    """Whether a job may be tried now: after its first lost attempt 2 s later, then 4, 8, … up to a minute."""
    if job.last_ended_at is None:
        return True
    since = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(job.last_ended_at)
    return since.total_seconds() >= min(2.0**job.attempts, 60.0)


def _details(client: JobSubmissionClient, submission_id: str) -> JobDetails | None:
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "404" in str(error):  # the client has no error class of its own for this
            return None
        raise


def _largest(nodes: list[dict[str, float]], bundle: dict[str, float]) -> dict[str, float]:
    return {name: max((node.get(name, 0) for node in nodes), default=0) for name in bundle}


def _written(bundle: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())

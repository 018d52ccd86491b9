"""Attempts at jobs: how Ray's jobs are brought in line with the rows of the store.

The store is the truth. A pass looks at the open attempts and the waiting jobs, never at those that have ended: it stops
what is to be cancelled, closes attempts whose Ray job has ended without saying how, and opens attempts at waiting jobs
as far as the limits allow. An attempt that was lost with a worker, a node or all of Ray is followed by another one.
"""

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from ray.job_submission import JobDetails, JobStatus

from serve_apps import scheduling
from stack import jobs, tracing
from stack.config import ROOT, Config
from stack.store import Attempt, Job, Store, now
from stack.store.jobs import AFTER_LOSS, Waiting

logger = logging.getLogger("ray.serve")

# How long the heartbeat of an attempt that Ray does not know may stand still: its driver ends itself before that.
LEASE_S = 30.0
# What our Ray jobs are marked with, so that no other is ever stopped.
MARK = "llama_stack_job"
_ENDED = (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED)


class Client(Protocol):
    """What is needed of ray.job_submission.JobSubmissionClient.

    It raises OSError when Ray cannot be reached, and RuntimeError when Ray answers that it did not do what it was told.
    """

    def get_version(self) -> str: ...
    def list_jobs(self) -> list[JobDetails]: ...
    def get_job_info(self, job_id: str) -> JobDetails: ...
    def stop_job(self, job_id: str) -> bool: ...
    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str: ...


class Attempts:
    """`connect` makes a client of Ray's jobs, `address` is that of their Ray and `cluster` its name, `nodes` tells what
    each living node has, and `forget` removes the data sets that a job has registered which has no result."""

    def __init__(
        self,
        config: Config,
        store: Store,
        connect: Callable[[], Client],
        address: Callable[[], str],
        cluster: str,
        nodes: Callable[[], list[dict[str, float]]],
        forget: Callable[[Job], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._store = store
        self._connect = connect
        self._address = address
        self._cluster = cluster
        self._nodes = nodes
        self._forget = forget
        self._clock = clock
        self._client: Client | None = None
        # Of the attempts that Ray does not know: the last heartbeat seen, and when it was first seen.
        self._silent: dict[tuple[int, int], tuple[int, float]] = {}
        self._turns: dict[str, int] = {}

    def reconcile(self) -> None:
        """Brings Ray's jobs in line with the rows of the store, once.

        Raises what the client, `nodes` or the store raise when Ray or the database is away: the next pass goes on.
        """
        try:
            if self._client is None:
                self._client = self._connect()
                self._stop_strays(self._client)
            refusal = self._look_at_all(self._client)
            self._start_some(self._client)
            if refusal is not None:
                raise refusal
        except (OSError, RuntimeError):
            self._client = None
            raise

    def _stop_strays(self, client: Client) -> None:
        """Stops those of our Ray jobs that no open attempt stands for."""
        # Ray's jobs first: whatever is among them had its row before, and is known if that is still open.
        found = client.list_jobs()
        known = {attempt.submission_id for _, attempt in self._store.jobs.under_way()}
        for details in found:
            ours = MARK in (details.metadata or {})
            if ours and details.submission_id and details.submission_id not in known and details.status not in _ENDED:
                logger.warning("the Ray job %s stands for no attempt and is stopped", details.submission_id)
                client.stop_job(details.submission_id)

    # Attempts under way

    def _look_at_all(self, client: Client) -> RuntimeError | None:
        """Returns an error if Ray has refused something for one of them, which holds up no other."""
        under_way = self._store.jobs.under_way()
        keys = {(attempt.job_id, attempt.number) for _, attempt in under_way}
        self._silent = {key: seen for key, seen in self._silent.items() if key in keys}
        refusal: RuntimeError | None = None
        for job, attempt in under_way:
            try:
                self._look_at(client, job, attempt)
            except RuntimeError as error:
                refusal = error
        return refusal

    def _look_at(self, client: Client, job: Job, attempt: Attempt) -> None:
        details = _details(client, attempt.submission_id)
        if details is None:
            if self._is_silent(attempt) and not self._is_elsewhere(attempt):
                self._lose(job, attempt, "its Ray job is gone: Ray was started anew while it ran")
        elif details.status in _ENDED:
            self._close(job, attempt, details)
        elif job.cancelled_at is not None:
            client.stop_job(attempt.submission_id)

    def _is_silent(self, attempt: Attempt) -> bool:
        """Whether the driver of an attempt that Ray does not know has shown no sign of life for LEASE_S."""
        key = (attempt.job_id, attempt.number)
        heartbeat, since = self._silent.get(key, (-1, 0.0))
        if heartbeat != attempt.heartbeat:
            self._silent[key] = (attempt.heartbeat, self._clock())
            return False
        return self._clock() - since >= LEASE_S

    def _is_elsewhere(self, attempt: Attempt) -> bool:
        """Whether an attempt is another living cluster's, where it may wait for long until its driver begins."""
        return attempt.cluster is not None and attempt.cluster in self._store.clusters.others(self._cluster)

    def _close(self, job: Job, attempt: Attempt, details: JobDetails) -> None:
        """Closes an attempt whose driver has ended without saying how."""
        # Ray adds the end of the driver's log, which is in the job's own log.
        message = (details.message or "no message").split(", last available logs")[0]
        reason = f"{details.status.value.lower()}: {message}"
        # The driver may have written its outcome between our two looks: these change nothing then.
        if job.cancelled_at is not None:
            if self._store.jobs.end_cancelled(job.id, attempt.number, "it was stopped"):
                self._clean(job, "cancelled")
        elif scheduling.is_lost(details):
            self._lose(job, attempt, reason)
        elif self._store.jobs.fail(job.id, attempt.number, f"its driver ended without a result ({reason})"):
            self._clean(job, "failed")

    def _lose(self, job: Job, attempt: Attempt, reason: str) -> None:
        if not self._store.jobs.lose_attempt(job.id, attempt.number, reason):
            return
        if self._store.jobs.has_ended(job.id):  # it was to be cancelled
            self._clean(job, "cancelled")
            return
        self._store.telemetry.add_logs(
            job.tenant, job.run_id, [(now(), "warning", f"attempt {attempt.number} was lost: {reason}")]
        )
        logger.warning("attempt %s at job %s was lost: %s", attempt.number, job.uuid, reason)

    def _clean(self, job: Job | Waiting, how: str) -> None:
        """Removes what a job has left that has ended without a result."""
        logger.info("job %s of %s %s", job.uuid, job.tenant, how)
        shutil.rmtree(jobs.work_folder(job.tenant, job.uuid), ignore_errors=True)
        # A driver that is killed right before its job is completed has registered them.
        if (ended := self._store.jobs.get(job.tenant, job.uuid)) is not None:
            self._forget(ended)

    # Waiting jobs

    def _start_some(self, client: Client) -> None:
        waiting = self._store.jobs.waiting()
        if not waiting:
            return
        nodes = scheduling.with_those_to_come(self._nodes(), self._config.autoscaled_nodes)
        ready = [job for job in waiting if self._can_start(job, nodes)]
        running = Counter(job.tenant for job, _ in self._store.jobs.under_way())
        for tenant in running:
            self._turns.setdefault(tenant, 0)  # it had its turn before this process began to count
        most, most_of_tenant = self._config.max_running_jobs, self._config.max_running_jobs_per_tenant
        chosen = list(scheduling.choose(ready, running, self._turns, most, most_of_tenant))
        if chosen:
            client.get_version()  # while Ray does not answer, no attempts are used up
        for job in chosen:
            self._submit(client, job)

    def _can_start(self, job: Waiting, nodes: list[dict[str, float]]) -> bool:
        """Whether a waiting job may start now. Writes down why it never will, or what it waits for."""
        if (hopeless := self._why_hopeless(job)) is not None:
            self._store.jobs.give_up(job.id, hopeless)
            self._clean(job, f"given up: {hopeless}")
            return False
        reason = scheduling.why_never(job.bundles, nodes)
        if reason is None and job.waiting_for is not None and not job.waiting_for.startswith(AFTER_LOSS):
            self._store.jobs.set_waiting_for(job.id, None)  # what was missing has come
        elif reason is not None and reason != job.waiting_for:
            self._store.jobs.set_waiting_for(job.id, reason)
        return reason is None and scheduling.is_due(job)

    def _why_hopeless(self, job: Waiting) -> str | None:
        if job.kind not in jobs.DRIVERS:  # another release has accepted it
            return f"there is no driver for jobs of the kind {job.kind!r}; there are: {', '.join(jobs.DRIVERS)}"
        if scheduling.is_tried_enough(job, self._config.max_retries):
            last = self._store.jobs.attempts(job.id)[-1]
            return f"lost {job.attempts} times, at last: {last.exit_reason}"
        return None

    def _submit(self, client: Client, job: Waiting) -> None:
        number = job.attempts + 1
        submission_id = jobs.submission_id(job.tenant, job.uuid, number)
        # The row first: a Ray job without one is a stray, a row without a Ray job is an attempt that is lost.
        if not self._store.jobs.open_attempt(job.id, number, submission_id, self._cluster):
            return
        # Ray tells a driver of the Ray that was started last on its machine, which may be another one. The code is that
        # of who submits it, which need not be what Ray was started with.
        command = ["env", f"RAY_ADDRESS={self._address()}", sys.executable, "-m", jobs.DRIVERS[job.kind]]
        command += ["--tenant", job.tenant, "--job", job.uuid, "--attempt", str(number)]
        config = self._config.model_dump(mode="json")
        try:
            with tracing.span("submit attempt", parent=job.trace, job_uuid=job.uuid, attempt=number):
                client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=submission_id,
                    runtime_env={"env_vars": {"STACK_CONFIG": json.dumps(config), "PYTHONPATH": _code()}},
                    metadata={MARK: job.uuid},
                )
        except (OSError, RuntimeError) as error:
            away = isinstance(error, OSError)
            reason = "Ray does not answer" if away else _last_line(str(error))
            # Should the Ray job exist all the same, its driver finds the attempt closed.
            self._store.jobs.lose_attempt(job.id, number, f"it could not be handed to Ray ({reason})")
            logger.warning("attempt %s at job %s could not be handed to Ray: %s", number, job.uuid, error)
            if away:
                raise
            return  # it may be about this job alone
        logger.info("attempt %s at job %s of %s is submitted", number, job.uuid, job.tenant)


def _code() -> str:
    """Where this process has its code from, before anything else."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _details(client: Client, submission_id: str) -> JobDetails | None:
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "status code 404" in str(error):  # the client has no error class of its own for this
            return None
        raise


def _last_line(answer: str) -> str:
    """The error that ends the traceback which Ray answers with."""
    return answer.rstrip(". \n").rpartition("\n")[2].strip()

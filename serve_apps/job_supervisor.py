"""The job supervisor: a Serve deployment of one replica that hands accepted jobs to Ray and watches them.

The store is the truth and a Ray job is one attempt. Once a second it looks at the unfinished jobs: those that were
never submitted are, under a submission id made from the job's uuid, and those whose Ray job has ended without saying
how are failed with the reason. A new replica starts from the store, so nothing is lost when one dies.
"""

import asyncio
import json
import logging
import shlex
import sys

import ray
from ray import serve
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from stack.config import Config
from stack.jobs import DRIVERS
from stack.store import Job, Store

logger = logging.getLogger("ray.serve")

INTERVAL_S = 1.0
_ENDED = (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED)


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class JobSupervisor:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._store = Store(config.store_url)
        self._client: JobSubmissionClient | None = None
        self._problem: str | None = None
        self._loop = asyncio.get_running_loop().create_task(self._watch())

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
            except (OSError, RuntimeError) as error:
                # Ray's job API is away: jobs wait in the store until it is back.
                self._problem = f"Ray's job API does not answer: {error}"
                self._client = None
                logger.warning("%s", self._problem)
            await asyncio.sleep(INTERVAL_S)

    def reconcile(self) -> None:
        """Brings Ray's jobs in line with the rows of the store, once."""
        if self._client is None:
            self._client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
        unfinished = self._store.unfinished_jobs()
        if not unfinished:
            return
        attempts = {details.submission_id: details for details in self._client.list_jobs() if details.submission_id}
        for job in unfinished:
            if job.submission_id is None:
                self._submit(self._client, job, attempts)
            else:
                self._look_after(job, attempts.get(job.submission_id))

    def _submit(self, client: JobSubmissionClient, job: Job, attempts: dict[str, JobDetails]) -> None:
        submission_id = f"{job.uuid}-1"
        if submission_id not in attempts:
            client.submit_job(
                entrypoint=shlex.join([sys.executable, "-m", DRIVERS[job.kind], "--job", job.uuid]),
                submission_id=submission_id,
                runtime_env={"env_vars": {"STACK_CONFIG": json.dumps(self._config.model_dump(mode="json"))}},
            )
        self._store.set_submission(job.uuid, submission_id)
        logger.info("job %s is submitted to Ray as %s", job.uuid, submission_id)

    def _look_after(self, job: Job, attempt: JobDetails | None) -> None:
        if attempt is None:
            reason = "its Ray job is gone: Ray was started anew while it ran"
        elif attempt.status in _ENDED:
            reason = f"its driver ended without a result ({attempt.status.value.lower()}): {attempt.message}"
        else:
            return
        # The driver may have written its outcome between our two looks: a job that has ended is not failed again.
        if self._store.fail_job(job.uuid, reason):
            logger.warning("job %s failed: %s", job.uuid, reason)

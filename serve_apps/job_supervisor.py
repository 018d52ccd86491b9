"""The job supervisor: a Serve deployment of one replica that hands accepted jobs to Ray and watches them.

The store is the truth and a Ray job is one attempt. Once a second it looks at the unfinished jobs: those that were
never submitted are, as many as may run at once, under a submission id made from the job's uuid; and those whose Ray
job has ended without saying how are failed with the reason. A new replica starts from the store, so nothing is lost
when one dies.
"""

import asyncio
import json
import logging
import shlex
import shutil
import sys

import ray
from ray import serve
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from sqlalchemy.exc import SQLAlchemyError

from stack.api.jobs import JobStatus as StackJobStatus
from stack.config import Config
from stack.jobs import DRIVERS
from stack.post_training import training_folder
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
            except (OSError, RuntimeError, SQLAlchemyError) as error:
                # Ray's job API or the database is away: jobs wait until both are back.
                self._problem = f"jobs cannot be handed to Ray: {error}"
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
        waiting = [job for job in unfinished if not self._is_under_way(job, attempts)]
        running = len(unfinished) - len(waiting)
        for job in waiting[: max(0, self._config.max_running_jobs - running)]:
            self._submit(self._client, job, attempts)

    def _is_under_way(self, job: Job, attempts: dict[str, JobDetails]) -> bool:
        """Whether a job needs no new attempt. One that has lost its attempt while it ran is failed."""
        if job.submission_id is None:
            return False
        attempt = attempts.get(job.submission_id)
        if attempt is None:
            if job.status == StackJobStatus.scheduled:
                return False  # Ray was started anew before the driver began: nothing is lost
            self._fail(job, "its Ray job is gone: Ray was started anew while it ran")
        elif attempt.status in _ENDED:
            self._fail(job, f"its driver ended without a result ({attempt.status.value.lower()}): {attempt.message}")
        return True

    def _submit(self, client: JobSubmissionClient, job: Job, attempts: dict[str, JobDetails]) -> None:
        submission_id = f"{job.uuid}-1"
        if submission_id not in attempts:  # it may be there: a supervisor that died between the two next steps
            client.submit_job(
                entrypoint=shlex.join([sys.executable, "-m", DRIVERS[job.kind], "--job", job.uuid]),
                submission_id=submission_id,
                runtime_env={"env_vars": {"STACK_CONFIG": json.dumps(self._config.model_dump(mode="json"))}},
            )
        self._store.set_submission(job.uuid, submission_id)
        logger.info("job %s is submitted to Ray as %s", job.uuid, submission_id)

    def _fail(self, job: Job, reason: str) -> None:
        # The driver may have written its outcome between our two looks: a job that has ended is not failed again.
        if self._store.fail_job(job.uuid, reason):
            shutil.rmtree(training_folder(job.uuid), ignore_errors=True)
            logger.warning("job %s failed: %s", job.uuid, reason)

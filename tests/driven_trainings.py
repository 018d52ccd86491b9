"""Trainings as the drivers of jobs run them, in this process, on a Ray of its own, with tiny models."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from stack import jobs as stack_jobs
from stack.api.post_training import PostTrainingSFTRequest
from stack.config import Config
from stack.context import Context
from stack.store import Job
from tests.running_stack import command_of, free_port, processes_of, wait_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import driver, training
    from jobs.reporter import Reporter


@contextmanager
def context_on_ray(home: Path, *models: str) -> Iterator[Context]:
    """A home folder with these models, and a Ray of two cores, which ends with it."""
    (home / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACK_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        listed = [{"id": name, "path": f"models/{name}", "context": 256} for name in models]
        context = Context.open(Config.parse({"models": listed}, "the tests' config"))
        port = free_port()
        patch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        ray.init(address="local", num_cpus=2, dashboard_port=port, include_dashboard=True, log_to_driver=False)
        yield context
        ray.shutdown()
        context.close()


def train(context: Context, request: PostTrainingSFTRequest, attempt: int = 1) -> driver.Outcome:
    """Does what the driver of an attempt does from its beginning to its end."""
    store, job = context.store, job_of(context, request.job_uuid)
    assert store.jobs.open_attempt(job.id, attempt, f"default.{job.uuid}.{attempt}")
    assert store.jobs.begin(job.id, attempt, {})
    folder = folder_of(job)
    folder.mkdir(parents=True, exist_ok=True)
    with Reporter(store, job, store.jobs.attempts(job.id)[-1], lost=pytest.fail) as reporter:
        try:
            return training.train(driver.Work(context, job, reporter, folder), request, "sft")
        finally:
            assert reporter.finish()


def job_of(context: Context, uuid: str) -> Job:
    job = context.store.jobs.get("default", uuid)
    assert job is not None
    return job


def folder_of(job: Job) -> Path:
    return stack_jobs.work_folder(job.tenant, job.uuid)


def files_of(path: str) -> Path:
    """What is at the address of a checkpoint."""
    return Path(path.removeprefix("file://"))


def kill_workers(home: Path, once: Callable[[], Any]) -> None:
    """Kills the workers of a training once something holds."""
    wait_for(once, 120)
    for process in processes_of(home):
        if "RayTrainWorker" in command_of(process):
            process.kill()

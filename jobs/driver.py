"""What every driver does around its work: find its job, take it, and write down how it ended.

    python -m jobs.NAME --config FILE     a request in YAML or JSON, as a user submits it by `ray job submit`
    python -m jobs.NAME --job UUID        a job that the gateway has accepted, as the job supervisor submits it

Both are rows of the store, so a job that was started by hand shows at both doors like any other.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from stack.api.jobs import JobStatus
from stack.api.wire import Request, describe
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, StackError
from stack.store import Adapter, Job

R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Outcome:
    """What a job has come to: what its row keeps, the artifact it has published, and the adapter that is now served."""

    result: dict[str, Any]
    artifact: str
    adapter: Adapter | None = None


def run(
    request_type: type[R],
    submit: Callable[[Context, R, str | None], Job],
    work: Callable[[Context, R], Outcome],
) -> int:
    """Runs a driver. `submit` accepts a request by hand; `work` does the job."""
    # A driver that is told to stop ends like one that fails: it cleans up, and its row says so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was stopped"))
    arguments = _arguments(work.__doc__ or "")
    try:
        context = Context.open(Config.from_environment())
        job = _job(context, arguments, request_type, submit)
        request = request_type.model_validate(job.request)
    except StackError as error:
        print(f"refused: {error.message}", file=sys.stderr)
        return 2
    if not context.store.start_job(job.uuid):
        return _report_earlier(context.store.job(job.uuid) or job)
    try:
        outcome = work(context, request)
    except BaseException as error:  # whatever it was, the row must say so; it is raised again
        context.store.fail_job(job.uuid, reason(error))
        if isinstance(error, StackError):
            print(f"failed: {error.message}", file=sys.stderr)
            return 1
        raise
    if not context.store.complete_job(job.uuid, outcome.result, outcome.adapter):
        context.artifacts.remove(outcome.artifact)
        return _report_earlier(context.store.job(job.uuid) or job)
    print(f"the job {job.uuid!r} is completed")
    return 0


def _report_earlier(job: Job) -> int:
    """Says how a job stands that is not this process's to do, or no longer."""
    print(f"the job {job.uuid!r} is {job.status} already" + (f": {job.error}" if job.error else ""))
    return 1 if job.status in (JobStatus.failed, JobStatus.cancelled) else 0


def reason(error: BaseException) -> str:
    """Why a job failed, in one line: the cause below what Ray wraps around it."""
    if isinstance(error, WorkerGroupError):
        # What a worker of Ray Train raised arrives as the text of its traceback, which ends with the error itself.
        cause = str(next(iter(error.worker_failures.values())))
        lines = cause.rsplit("Traceback (most recent call last):", 1)[-1].strip("\n").splitlines()
        cause = "\n".join(dropwhile(lambda line: line[:1].isspace(), lines))
    else:
        while isinstance(error, RayTaskError):
            error = error.cause
        cause = f"{type(error).__module__}.{type(error).__name__}: {error}"
    kind, _, message = " ".join(cause.split()).partition(": ")
    if any(sign in cause for sign in _FULL_DISK):
        return f"the disk is full: {message}"
    if kind.startswith(StackError.__module__) or kind == "builtins.SystemExit":
        return message
    return f"{kind.removeprefix('builtins.').rstrip(':')}: {message or 'no message'}"


# How the system, SQLite and safetensors say it.
_FULL_DISK = ("No space left on device", "database or disk is full", "os error 28")


def _arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", type=Path, metavar="FILE", help="a file with the request, in YAML or JSON")
    which.add_argument("--job", metavar="UUID", help="a job that has been accepted")
    return parser.parse_args()


def _job(
    context: Context,
    arguments: argparse.Namespace,
    request_type: type[R],
    submit: Callable[[Context, R, str | None], Job],
) -> Job:
    if arguments.job:
        job = context.store.job(arguments.job)
        if job is None:
            raise BadInput(f"there is no job {arguments.job!r} in {context.store.engine.url}")
        return job
    try:
        request = request_type.model_validate(yaml.safe_load(arguments.config.read_text()))
    except OSError as error:
        raise BadInput(f"{arguments.config} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{arguments.config} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise BadInput(f"{arguments.config}: {describe(error)}") from error
    return submit(context, request, _submission_id())


def _submission_id() -> str:
    """The id of the Ray job that this process is, by which the supervisor watches it."""
    ray_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submission_id = ray_job.get("metadata", {}).get("job_submission_id")
    if not submission_id:
        raise BadInput("--config is for `ray job submit -- python -m jobs.NAME --config FILE`: this is no Ray job")
    return str(submission_id)

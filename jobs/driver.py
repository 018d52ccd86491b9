"""What every driver does around its work: find its job, take it, and write down how it ended.

    python -m jobs.NAME --config FILE                         a request in YAML or JSON, by `ray job submit`
    python -m jobs.NAME --tenant T --job UUID --attempt N     an attempt at an accepted job, by the job supervisor

Both are rows of the store, so a job that was started by hand shows at both doors like any other.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train import ControllerError, WorkerGroupError
from sqlalchemy.exc import SQLAlchemyError

from jobs.reporter import GIVEN_UP, Reporter, steadily
from stack import jobs, keys, made_datasets, tracing
from stack.api.jobs import JobStatus
from stack.api.wire import Request, describe
from stack.artifacts import File
from stack.config import Config
from stack.context import DEFAULT_TENANT, Context
from stack.errors import BadInput, StackError, Unavailable
from stack.store import Adapter, AddedModel, Artifact, Attempt, Job, faults, now

R = TypeVar("R", bound=Request)
# How a driver exits that could not write down how it ended: the supervisor takes it for lost.
GONE = os.EX_TEMPFAIL
STOPPED = 128 + signal.SIGTERM
# What ends an attempt through no fault of the job: another attempt may go well. So does a database that is away.
LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, RaySystemError, Unavailable)


@dataclass(frozen=True)
class Outcome:
    """What a job has come to: what its row keeps, the artifact it has published, and the adapter or the model that is
    served from now on.

    With a `problem` the job has failed by it; what it has published is kept.
    """

    result: dict[str, Any]
    artifact: Artifact
    adapter: Adapter | None = None
    model: AddedModel | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Work:
    """What a driver works with: the context in the name of the job's tenant, the job, where it notes how far it is, and
    a folder for what a next attempt goes on from, which is removed when the job has ended."""

    context: Context
    job: Job
    reporter: Reporter
    folder: Path


def run(
    request_type: type[R],
    submit: Callable[[Context, R, str | None], Job],
    resources: Callable[[Context, R], dict[str, Any]],
    work: Callable[[Work, R], Outcome],
) -> int:
    """Runs a driver. `submit` accepts a request by hand, `resources` are what the job takes, `work` does it."""
    # A driver that is told to stop writes no end: the supervisor knows whether it was cancelled or lost.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray's own handler, which takes its place
    arguments = _arguments(work.__doc__ or "")
    try:
        keys.check_tenant(arguments.tenant)
        with closing(Context.open(Config.from_environment())) as context:
            return _run(context.of_tenant(arguments.tenant), arguments, request_type, submit, resources, work)
    except StackError as error:
        return _refuse(error)
    except SQLAlchemyError as error:
        if faults.passing(error) is None:
            raise
        print(f"stopping: the database is out of reach: {faults.reason(error)}", file=sys.stderr)
        return GONE
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            print("stopping: told to", file=sys.stderr)
            error.code = STOPPED
        raise


def _run(
    context: Context,
    arguments: argparse.Namespace,
    request_type: type[R],
    submit: Callable[[Context, R, str | None], Job],
    resources: Callable[[Context, R], dict[str, Any]],
    work: Callable[[Work, R], Outcome],
) -> int:
    job, attempt = _job(context, arguments, request_type, submit)
    try:
        request = request_type.model_validate(job.request)
        taken = resources(context, request)
    except (StackError, ValidationError) as error:  # accepted by an earlier release, or on another configuration
        why = error.message if isinstance(error, StackError) else describe(error)
        context.store.jobs.fail(job.id, attempt.number, why)
        return _refuse(BadInput(why))
    if not context.store.jobs.begin(job.id, attempt.number, taken):
        return _report_earlier(context, job)
    folder = jobs.work_folder(job.tenant, job.uuid)
    folder.mkdir(parents=True, exist_ok=True)
    tracing.start("job", context.config.otlp_address)
    with (
        tracing.span("job", parent=job.trace, kind=job.kind, job_uuid=job.uuid, attempt=attempt.number),
        Reporter(context.store, job, attempt, lost=_give_up) as reporter,
    ):
        status = _work(Work(context, job, reporter, folder), request, work)
    tracing.stop()
    return status


def _refuse(error: StackError) -> int:
    print(f"refused: {error.message}", file=sys.stderr)
    return GONE if isinstance(error, Unavailable) else 2


def _work(given: Work, request: R, work: Callable[[Work, R], Outcome]) -> int:
    store, job, number = given.context.store, given.job, given.reporter.number
    try:
        outcome = work(given, request)
    except SystemExit:
        with suppress(SQLAlchemyError):
            _forget_data(given)
        raise
    except BaseException as error:  # whatever it was, the row must say so; it is raised again
        why = reason(error)
        steadily(lambda: _forget_data(given))
        steadily(given.reporter.finish)
        if is_lost(error):
            steadily(lambda: store.jobs.lose_attempt(job.id, number, why))
        elif steadily(lambda: store.jobs.fail(job.id, number, why)):
            shutil.rmtree(given.folder, ignore_errors=True)
        if isinstance(error, StackError):
            print(f"failed: {error.message}", file=sys.stderr)
            return 1
        raise
    made = (outcome.result, outcome.adapter, outcome.artifact, outcome.model, outcome.problem)
    mine = steadily(given.reporter.finish) and steadily(lambda: store.jobs.complete(job.id, number, *made))
    if not mine:
        now = steadily(lambda: store.jobs.get(job.tenant, job.uuid))
        # What another attempt has published, or is about to, has the same name.
        if now is not None and now.status in (JobStatus.failed, JobStatus.cancelled):
            given.context.artifacts.remove(outcome.artifact.path)
            steadily(lambda: made_datasets.forget(given.context, job))
        return _report_earlier(given.context, job)
    shutil.rmtree(given.folder, ignore_errors=True)
    return _report(given.context, job, "")


def require_open(work: Work) -> None:
    """Raises Unavailable for an attempt that has been given up: the next one may be under way already."""
    if not steadily(lambda: _is_open(work)):
        raise Unavailable(GIVEN_UP)


def publish(work: Work, name: str, folder: Path) -> list[File]:
    """Makes an artifact of what a job has made; of an earlier attempt at the same, that was lost in between, too.

    Raises Unavailable for an attempt that has been given up: what lies there may be that of the next one.
    """
    require_open(work)
    if work.context.artifacts.exists(name):
        work.context.artifacts.remove(name)
    return work.context.artifacts.publish(name, folder)


def artifact_row(work: Work, name: str, type: str, files: list[File], metadata: dict[str, Any]) -> Artifact:
    """What is written down of an artifact that a job has published: it belongs to the job's run."""
    job, size = work.job, sum(file.bytes for file in files)
    experiment_id = steadily(lambda: work.context.store.telemetry.run_experiment(job.tenant, job.run_id))
    about = {"job_uuid": job.uuid, **metadata}
    return Artifact(
        uuid.uuid4().hex, job.tenant, experiment_id, job.run_id, job.uuid, type, name, size, about, created_at=now()
    )


def _is_open(work: Work) -> bool:
    return work.context.store.jobs.beat(work.job.id, work.reporter.number)


def _forget_data(work: Work) -> None:
    """Removes the data sets that an attempt has registered which comes to no end; the next one registers its own."""
    if made_datasets.names_of(work.job.kind, work.job.request) and _is_open(work):
        made_datasets.forget(work.context, work.job)


def _give_up(why: str) -> None:
    """Ends this process at once, with all that Ray runs for it: another attempt may be under way already."""
    print(f"stopping: {why}", file=sys.__stderr__, flush=True)
    os._exit(GONE)


def _report_earlier(context: Context, job: Job) -> int:
    """Says how a job stands that is not this process's to do, or no longer."""
    return _report(context, job, " already")


def _report(context: Context, job: Job, when: str) -> int:
    now = steadily(lambda: context.store.jobs.get(job.tenant, job.uuid)) or job
    print(f"the job {now.uuid!r} is {now.status}{when}" + (f": {now.error}" if now.error else ""))
    return 1 if now.status in (JobStatus.failed, JobStatus.cancelled) else 0


def is_lost(error: BaseException) -> bool:
    """Whether something ended through no fault of the job, so that another attempt may go well."""
    if isinstance(error, WorkerGroupError):
        causes = _causes(error)
        # A moment after a worker has died the others miss it, each in its own words.
        gone = [isinstance(cause, LOST) or _has_hung(cause) for cause in causes]
        return any(gone) or all(_misses_another(cause) for cause in causes)
    error = _cause(error)
    if isinstance(error, SQLAlchemyError):
        return isinstance(faults.passing(error), Unavailable)
    return isinstance(error, LOST)


def _has_hung(cause: BaseException) -> bool:
    """Whether a worker of Ray Train has not answered for long. The error is known by its name: it is not public."""
    return type(cause).__name__ == "WorkerHealthCheckTimeoutError"


def _misses_another(cause: BaseException) -> bool:
    """Whether a worker failed because another one that it talked to is not there any more."""
    return any(sign in _said(cause) for sign in _MISSING)


# How gloo, NCCL and the store by which workers find each other say it.
_MISSING = ("gloo/transport/", "ncclRemoteError", "torch.distributed.DistNetworkError")


def _cause(error: BaseException) -> BaseException:
    """The error below what Ray, or the controller of Ray Train, wraps around it."""
    while True:
        if isinstance(error, ControllerError):
            error = error.controller_failure
        elif isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        else:
            return error


def _causes(error: WorkerGroupError) -> list[BaseException]:
    """What the workers of Ray Train that failed have raised; of one that died, what Ray raised, which it wraps."""
    return [getattr(cause, "health_check_failure", cause) for cause in error.worker_failures.values()]


def _said(error: BaseException) -> str:
    """An error by its kind and in its words."""
    words: object = error
    if isinstance(error, SQLAlchemyError):
        words = faults.reason(error)
    elif isinstance(error, StackError):  # to what it says, Ray Data has added something, but not to its message
        words = error.message
    return f"{type(error).__module__}.{type(error).__name__}: {words}"


def raised_in_workers(error: WorkerGroupError, kind: type[StackError]) -> bool:
    """Whether all workers that failed by themselves raised an error of this kind."""
    causes = [cause for cause in _causes(error) if not _misses_another(cause)]
    return bool(causes) and all(isinstance(cause, kind) for cause in causes)


def reason(error: BaseException) -> str:
    """Why a job failed, in one line: the cause below what Ray wraps around it."""
    if isinstance(error, WorkerGroupError):
        causes = _causes(error)
        error = next((cause for cause in causes if not _misses_another(cause)), causes[0] if causes else error)
    cause = _said(_cause(error))
    kind, _, message = " ".join(cause.split()).partition(": ")
    if any(sign in cause for sign in _FULL_DISK):
        return f"the disk is full: {message}"
    if any(sign in cause for sign in _NO_MEMORY):
        return f"out of memory: lower micro_batch_size, batch_size or max_length in training_config: {message}"
    if kind.startswith(StackError.__module__) or kind == "builtins.SystemExit":
        return message
    return f"{kind.removeprefix('builtins.').rstrip(':')}: {message or 'no message'}"


# How the system, SQLite and safetensors say it.
_FULL_DISK = ("No space left on device", "database or disk is full", "os error 28")
# How PyTorch, Python and Ray's monitor of the memory say it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "MemoryError", "running low on memory")


def _arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", type=Path, metavar="FILE", help="a file with the request, in YAML or JSON")
    which.add_argument("--job", metavar="UUID", help="a job that has been accepted")
    parser.add_argument("--attempt", type=int, metavar="N", help="with --job: the number of this attempt at it")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, help="whose job it is (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.job is None) != (arguments.attempt is None):
        parser.error("--job and --attempt go together")
    return arguments


def _job(
    context: Context,
    arguments: argparse.Namespace,
    request_type: type[R],
    submit: Callable[[Context, R, str | None], Job],
) -> tuple[Job, Attempt]:
    if arguments.job:
        job = context.store.jobs.get(context.tenant, arguments.job)
        if job is None:
            raise BadInput(f"there is no job {arguments.job!r} of the tenant {context.tenant!r} in the database")
        return job, _attempt(context, job, arguments.attempt)
    try:
        request = request_type.model_validate(yaml.safe_load(arguments.config.read_text()))
    except OSError as error:
        raise BadInput(f"{arguments.config} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{arguments.config} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise BadInput(f"{arguments.config}: {describe(error)}") from error
    submission_id = _submission_id()
    job = submit(context, request, submission_id)
    mine = [one.number for one in context.store.jobs.attempts(job.id) if one.submission_id == submission_id]
    if not mine:
        raise BadInput(f"the job {job.uuid!r} is {job.status} already, by an earlier submission")
    return job, _attempt(context, job, mine[0])


def _attempt(context: Context, job: Job, number: int) -> Attempt:
    for attempt in context.store.jobs.attempts(job.id):
        if attempt.number == number:
            return attempt
    raise BadInput(f"the job {job.uuid!r} has no attempt {number}")


def _submission_id() -> str:
    """The id of the Ray job that this process is, by which the supervisor watches it."""
    ray_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submission_id = ray_job.get("metadata", {}).get("job_submission_id")
    if not submission_id:
        raise BadInput("--config is for `ray job submit -- python -m jobs.NAME --config FILE`: this is no Ray job")
    return str(submission_id)

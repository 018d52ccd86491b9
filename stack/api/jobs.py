"""Wire types that all long work shares."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from stack.api.wire import Id, Request, Wire, at_most

JsonObject = Annotated[dict[str, Any], at_most(1_000)]
# Of the jobs of a tenant that wait, those with the greatest number run first.
Priority = Annotated[int, Field(ge=-100, le=100)]
# Of jobs that make data sets, which are called after them.
MakingJobUuid = Annotated[Id, Field(max_length=80)]
MadeDatasetId = Annotated[Id, Field(max_length=80)]


class JobEngine(StrEnum):
    """Which engine answers a job that asks a model: that of the deployment that serves, or one of the job's own."""

    serving = "serving"
    own = "own"


class JobStatus(StrEnum):
    """`cancelled` is an addition to the specification."""

    scheduled = "scheduled"
    running = "running"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"


class JobProgress(Wire):
    """How far a job is: `done` of `total` units (steps, rows), and the seconds that are left at its present speed."""

    done: int
    total: int
    unit: str
    seconds_left: float | None = None


class JobAttempt(Wire):
    """One Ray job that has worked on a job, and why it ended."""

    number: int
    submission_id: str
    started_at: str
    ended_at: str | None = None
    exit_reason: str | None = None


class JobLog(Wire):
    """A line that a job has written. Numbers rise; between two lines of a job there may be others'."""

    number: int
    timestamp: str
    level: str
    message: str


class JobLogStream(Wire):
    """The lines of a job's log, as texts and with their times. Ask again with `after=next` for those that follow."""

    job_uuid: str
    log_lines: list[str]
    lines: list[JobLog]
    next: int


class JobEntry(Wire):
    """A job in a list."""

    job_uuid: str
    kind: str
    status: JobStatus
    scheduled_at: str
    started_at: str | None = None
    completed_at: str | None = None


class CancelJobRequest(Request):
    job_uuid: Id


class CancelledJob(Wire):
    """What has become of a job that was to be cancelled: `running` until its work has been stopped."""

    job_uuid: str
    status: JobStatus
    cancelled_at: str | None = None


class ArtifactFile(Wire):
    name: str
    bytes: int
    sha256: str


class JobState(Wire):
    """What every job's status says.

    `waiting_for` is why a scheduled job does not run yet, `error` the reason of a failure, `metrics` are the newest by
    name, and `run_id` is where all of them and the log are kept.
    """

    job_uuid: str
    kind: str
    status: JobStatus
    run_id: str
    priority: int
    scheduled_at: str
    started_at: str | None = None
    completed_at: str | None = None
    cancelled_at: str | None = None
    waiting_for: str | None = None
    resources_allocated: JsonObject | None = None
    progress: JobProgress | None = None
    attempts: list[JobAttempt] = []
    metrics: dict[str, float] = {}
    error: str | None = None


class MetricPoint(Wire):
    """One value of a metric of a job at a step."""

    name: str
    step: int
    value: float
    timestamp: str

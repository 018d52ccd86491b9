"""Wire types that all long work shares."""

from enum import StrEnum
from typing import Annotated, Any

from stack.api.wire import Wire, at_most


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


class ArtifactFile(Wire):
    name: str
    bytes: int
    sha256: str


class JobState(Wire):
    """What every job's status says. `error` is the reason of a failure; `metrics` are the newest by name."""

    job_uuid: str
    status: JobStatus
    scheduled_at: str
    started_at: str | None = None
    completed_at: str | None = None
    progress: JobProgress | None = None
    metrics: dict[str, float] = {}
    error: str | None = None


class MetricPoint(Wire):
    """One value of a metric of a job at a step."""

    name: str
    step: int
    value: float
    timestamp: str


JsonObject = Annotated[dict[str, Any], at_most(1_000)]

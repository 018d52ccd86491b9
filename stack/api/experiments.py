"""Wire types of experiments, their runs and their artifacts.

Metadata are changed key by key: a key that is given gets its new value, null removes it, the others stay.
"""

import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from stack.api.telemetry import Time
from stack.api.wire import Info, Request, Wire

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _plain(value: str) -> str:
    if not value.strip() or _CONTROL.search(value):
        raise ValueError(f"{value[:80]!r} is blank or holds a control character")
    return value


def _without_a_path(value: str) -> str:
    if "/" in value or "\\" in value or ".." in value or value == ".":
        raise ValueError(f"{value[:80]!r} looks like a path; allowed: a name without '/', '\\' and '..'")
    return value


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain)]
FileName = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_plain), AfterValidator(_without_a_path)]
RunStatus = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_plain)]
GivenId = Annotated[str, Field(max_length=100)]  # one that the server has made
Limit = Annotated[int, Field(ge=1, le=1_000)]


class ExperimentStatus(StrEnum):
    not_started = "not_started"
    running = "running"
    completed = "completed"
    failed = "failed"


class ArtifactType(StrEnum):
    model = "model"
    dataset = "dataset"
    checkpoint = "checkpoint"
    plot = "plot"
    metric = "metric"
    config = "config"
    code = "code"
    other = "other"


class Experiment(Wire):
    """What runs belong to. Jobs open theirs in one that is called like their kind."""

    id: str
    name: str
    status: ExperimentStatus
    created_at: str
    updated_at: str
    metadata: dict[str, Any]


class CreateExperimentRequest(Request):
    """Names are unique. The same name with the same metadata again is the same experiment."""

    name: Name
    metadata: Info = {}


class UpdateExperimentRequest(Request):
    experiment_id: GivenId
    status: ExperimentStatus | None = None
    metadata: Info | None = None


class Run(Wire):
    """One go at something: a job's, or a client's own. Metrics and logs belong to it. Its status is free text."""

    id: str
    experiment_id: str
    status: str
    started_at: str
    ended_at: str | None = None
    metadata: dict[str, Any]


class CreateRunRequest(Request):
    experiment_id: GivenId
    metadata: Info = {}


class UpdateRunRequest(Request):
    """Of a job's run only metadata can be changed, other than `job_uuid` and `kind`: the rest is the job's."""

    run_id: GivenId
    status: RunStatus | None = None
    ended_at: Time | None = None
    metadata: Info | None = None


class Artifact(Wire):
    """A file or a folder that belongs to an experiment, and to a run where one made it. `size` is in bytes."""

    id: str
    name: str
    type: ArtifactType
    size: int
    created_at: str
    metadata: dict[str, Any]
    experiment_id: str
    run_id: str | None = None


class ArtifactContent(Wire):
    """A file of an artifact, and the path at which the gateway serves its content."""

    name: str
    bytes: int
    sha256: str
    url: str


class ArtifactWithFiles(Artifact):
    """`path` is the address of the folder in which the files lie, for processes that reach it."""

    path: str
    files: list[ArtifactContent]


class UploadArtifactRequest(Request):
    """A file in base64. `name` is what people see: it has nothing to do with where the file is kept."""

    experiment_id: GivenId
    name: FileName
    artifact_type: ArtifactType
    content: Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
    metadata: Info = {}
    run_id: GivenId | None = None


class ListArtifactsRequest(Request):
    """`after` is the id of the last artifact of the page before."""

    experiment_id: GivenId
    limit: Limit = 100
    after: GivenId | None = None


class DeleteArtifactRequest(Request):
    artifact_id: GivenId


class DeletedArtifact(Wire):
    """`bytes` is what the tenant may keep more of now."""

    id: str
    bytes: int

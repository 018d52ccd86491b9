"""Experiments, their runs, and the artifacts that belong to them.

An upload writes the file first and the row after it. If the process dies in between, the file has no row: it is listed
nowhere and counts for nothing, until `sweep` removes it. A removal takes the files first, and can be repeated.
"""

import base64
import datetime as dt
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pydantic import TypeAdapter, ValidationError

from stack import disk, jobs, quotas
from stack.api import experiments as api
from stack.api.wire import Info, describe
from stack.artifacts import File
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, TooLarge
from stack.store import Artifact, now
from stack.store.experiments import Experiment
from stack.store.telemetry import Run

UPLOADS = "experiments"  # the folder of uploaded artifacts
CONTENT = "content"  # what the one file of an uploaded artifact is called
JOBS_OWN = ("job_uuid", "kind")  # metadata of a job's run that say whose it is
SWEEP_AFTER = dt.timedelta(days=1)
_ID = re.compile(r"[0-9a-f]{32}")
_INFO: TypeAdapter[dict[str, Any]] = TypeAdapter(Info)


def create(context: Context, request: api.CreateExperimentRequest) -> api.Experiment:
    """Opens an experiment. The same again is the same one; Conflict if the name stands for other metadata."""
    experiment = context.store.experiments.add(context.tenant, request.name, request.metadata)
    if experiment.metadata != request.metadata:
        raise Conflict(f"there is an experiment {request.name!r} with other metadata", param="name")
    return _experiment(experiment)


def get(context: Context, experiment_id: str) -> api.Experiment:
    """Raises NotFound."""
    return _experiment(_known_experiment(context, experiment_id))


def page(context: Context, after: str | None, limit: int) -> list[api.Experiment]:
    """The experiments of a tenant, newest first, behind the one with the id `after`. Raises NotFound."""
    last = _known_experiment(context, after, "after") if after is not None else None
    return [_experiment(one) for one in context.store.experiments.page(context.tenant, last, limit)]


def update(context: Context, request: api.UpdateExperimentRequest) -> api.Experiment:
    """Changes the status, and metadata key by key. Raises NotFound, BadInput."""
    _known_experiment(context, request.experiment_id)
    changed = context.store.experiments.change(
        context.tenant, request.experiment_id, request.status, _merging(request.metadata)
    )
    assert changed is not None  # experiments are never removed
    return _experiment(changed)


def create_run(context: Context, request: api.CreateRunRequest) -> api.Run:
    """Opens a run, whose status is `running`. Raises NotFound."""
    experiment = _known_experiment(context, request.experiment_id)
    return _run(context.store.experiments.add_run(context.tenant, experiment.id, request.metadata))


def get_run(context: Context, run_id: str) -> api.Run:
    """Raises NotFound."""
    return _run(_known_run(context, run_id))


def page_of_runs(context: Context, experiment_id: str, after: str | None, limit: int) -> list[api.Run]:
    """The runs of an experiment, the last that started first, behind the one with the id `after`. Raises NotFound."""
    experiment = _known_experiment(context, experiment_id)
    last = _known_run(context, after, "after") if after is not None else None
    return [_run(one) for one in context.store.experiments.page_of_runs(context.tenant, experiment.id, last, limit)]


def update_run(context: Context, request: api.UpdateRunRequest) -> api.Run:
    """Changes a run, its metadata key by key. Raises NotFound, BadInput, and Conflict for what a job says itself."""
    run = _known_run(context, request.run_id)
    if job_uuid := _job_of(context, run):
        fields = [field for field in ("status", "ended_at") if getattr(request, field) is not None]
        fields += [f"metadata.{key}" for key in JOBS_OWN if key in (request.metadata or {})]
        if fields:
            allowed = f"metadata other than {' and '.join(JOBS_OWN)}"
            message = (
                f"the run {run.id!r} is of the job {job_uuid!r}, which sets {fields[0]} itself; allowed: {allowed}"
            )
            raise Conflict(message, param=fields[0])
    if request.ended_at is not None and request.ended_at < run.started_at:
        message = f"the run cannot end at {request.ended_at}: it started at {run.started_at}"
        raise BadInput(message, param="ended_at")
    merge = _merging(request.metadata)
    changed = context.store.experiments.change_run(context.tenant, run.id, request.status, request.ended_at, merge)
    assert changed is not None  # runs are never removed
    return _run(changed)


def upload(context: Context, request: api.UploadArtifactRequest) -> api.Artifact:
    """Keeps a file. Raises TooLarge, NotFound, BadInput, and StorageFull where there is no room for it."""
    most = context.config.max_artifact_bytes
    if len(request.content) > (most + 2) // 3 * 4:
        raise TooLarge(f"the content has more than {most} bytes", param="content")
    experiment = _known_experiment(context, request.experiment_id)
    if request.run_id is not None and _known_run(context, request.run_id).experiment_id != experiment.id:
        message = f"the run {request.run_id!r} is not of the experiment {experiment.id!r}"
        raise BadInput(message, param="run_id")
    content = _decoded(request.content)
    if len(content) > most:
        raise TooLarge(f"the content has {len(content)} bytes; allowed: at most {most}", param="content")
    quotas.require_room(context, len(content))
    artifact_id = uuid.uuid4().hex
    artifact = Artifact(
        artifact_id, context.tenant, experiment.id, request.run_id, request.name, request.artifact_type,
        jobs.artifact_name(context.tenant, UPLOADS, artifact_id), len(content), request.metadata, created_at=now(),
    )  # fmt: skip
    _publish(context, artifact.path, content)
    context.store.artifacts.add(artifact)
    return api.Artifact(**_fields(artifact))


def page_of_artifacts(context: Context, request: api.ListArtifactsRequest) -> list[api.Artifact]:
    """The artifacts of an experiment, newest first, those of its jobs among them. Raises NotFound."""
    experiment = _known_experiment(context, request.experiment_id)
    last = _known_artifact(context, request.after, "after") if request.after is not None else None
    found = context.store.artifacts.page(context.tenant, experiment.id, last, request.limit)
    return [api.Artifact(**_fields(one)) for one in found]


def get_artifact(context: Context, artifact_id: str) -> api.ArtifactWithFiles:
    """An artifact with its files. Raises NotFound."""
    artifact = _known_artifact(context, artifact_id)
    files = [
        api.ArtifactContent(
            name=file.name,
            bytes=file.bytes,
            sha256=file.sha256,
            url=f"/artifacts/content?{urlencode(dict(artifact_id=artifact.id, file=file.name))}",
        )
        for file in _files(context, artifact)
    ]
    return api.ArtifactWithFiles(**_fields(artifact), path=context.artifacts.url(artifact.path), files=files)


def find_file(context: Context, artifact_id: str, name: str | None) -> tuple[Artifact, File]:
    """A file of an artifact, which need not be named where it is the only one. Raises NotFound, BadInput."""
    artifact = _known_artifact(context, artifact_id)
    files = _files(context, artifact)
    if name is None:
        if len(files) != 1:
            message = f"the artifact {artifact_id!r} has {len(files)} files: name the one in `file`"
            raise BadInput(message, param="file")
        return artifact, files[0]
    for file in files:
        if file.name == name:
            return artifact, file
    raise NotFound(f"the artifact {artifact_id!r} has no file {name!r}", param="file")


def content(context: Context, artifact: Artifact, file: File, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to before `stop`, in blocks."""
    return context.artifacts.blocks(artifact.path, file, start, stop)


def delete(context: Context, request: api.DeleteArtifactRequest) -> api.DeletedArtifact:
    """Removes an artifact, files first. Raises NotFound, and Conflict while a model is served from it."""
    artifact = _known_artifact(context, request.artifact_id)
    model = context.store.artifacts.adapter_on(context.tenant, artifact.path) or _whole_model_on(context, artifact)
    if model is not None:
        message = f"the artifact {artifact.id!r} is the model {model!r}, which is served from it"
        raise Conflict(message, param="artifact_id")
    context.artifacts.remove(artifact.path)
    context.store.artifacts.delete(context.tenant, artifact.id)
    return api.DeletedArtifact(id=artifact.id, bytes=artifact.bytes)


def _whole_model_on(context: Context, artifact: Artifact) -> str | None:
    """The id of a whole model that is served from the files of an artifact, if there is one."""
    folder = context.artifacts.folder
    if folder is None:
        return None
    path = str(folder / artifact.path)
    return next((row.id for row in context.store.models.list() if row.private and row.entry["path"] == path), None)


def sweep(context: Context) -> list[str]:
    """Removes what uploads and publications have left that were interrupted longer ago than SWEEP_AFTER.

    For the administrator: it sees all tenants' rows. Returns the names of the artifacts that had no row.
    """
    files = context.artifacts
    folders = [UPLOADS, *(f"{tenant}/{UPLOADS}" for tenant in files.names("tenants"))]
    names = [name for folder in folders for name in files.names(folder)]
    known = context.store.artifacts.known_paths()
    files.remove_temporary(SWEEP_AFTER)
    return [name for name in names if name not in known and files.remove_if_older(name, SWEEP_AFTER)]


def _publish(context: Context, path: str, content: bytes) -> None:
    with disk.telling_full("the disk of the artifacts"), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONTENT).write_bytes(content)
        context.artifacts.publish(path, Path(folder))


def _decoded(content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise BadInput(f"the content is not base64: {error}", param="content") from error


def _files(context: Context, artifact: Artifact) -> list[File]:
    try:
        return context.artifacts.files(artifact.path)
    except NotFound as error:  # it is being removed, or others have emptied its folder
        raise NotFound(f"the files of the artifact {artifact.id!r} are gone", param="artifact_id") from error


def _merging(changes: dict[str, Any] | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What makes new metadata of old: each key is set, or removed where its value is null."""

    def merge(old: dict[str, Any]) -> dict[str, Any]:
        both = {**old, **(changes or {})}
        merged = {key: value for key, value in both.items() if value is not None or key not in (changes or {})}
        try:
            return _INFO.validate_python(merged)
        except ValidationError as error:
            raise BadInput(f"the metadata, with those that are there: {describe(error)}", param="metadata") from error

    return merge


def _job_of(context: Context, run: Run) -> str | None:
    """The uuid of the job that a run is of."""
    job_uuid = run.metadata.get("job_uuid")
    job = context.store.jobs.get(context.tenant, job_uuid) if isinstance(job_uuid, str) else None
    return job.uuid if job is not None and job.run_id == run.id else None


def _known_experiment(context: Context, id: str, param: str = "experiment_id") -> Experiment:
    found = context.store.experiments.get(context.tenant, id) if _ID.fullmatch(id) else None
    if found is None:
        raise NotFound(f"there is no experiment {id!r}", param=param)
    return found


def _known_run(context: Context, id: str, param: str = "run_id") -> Run:
    found = context.store.telemetry.run(context.tenant, id) if _ID.fullmatch(id) else None
    if found is None:
        raise NotFound(f"there is no run {id!r}", param=param)
    return found


def _known_artifact(context: Context, id: str, param: str = "artifact_id") -> Artifact:
    found = context.store.artifacts.get(context.tenant, id) if _ID.fullmatch(id) else None
    if found is None:
        raise NotFound(f"there is no artifact {id!r}", param=param)
    return found


def _experiment(row: Experiment) -> api.Experiment:
    return api.Experiment(**{field: getattr(row, field) for field in api.Experiment.model_fields})


def _run(row: Run) -> api.Run:
    return api.Run(**{field: getattr(row, field) for field in api.Run.model_fields})


def _fields(row: Artifact) -> dict[str, Any]:
    """The fields of api.Artifact."""
    return {field: row.bytes if field == "size" else getattr(row, field) for field in api.Artifact.model_fields}

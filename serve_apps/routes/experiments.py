"""Experiments, their runs and their artifacts."""

from itertools import chain
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse

from serve_apps import ranges
from serve_apps.errors import error_response
from serve_apps.routes.common import ContextOf, needs
from stack import experiments
from stack.api.experiments import (
    Artifact,
    ArtifactWithFiles,
    CreateExperimentRequest,
    CreateRunRequest,
    DeleteArtifactRequest,
    DeletedArtifact,
    Experiment,
    Limit,
    ListArtifactsRequest,
    Run,
    UpdateExperimentRequest,
    UpdateRunRequest,
    UploadArtifactRequest,
)
from stack.errors import BadInput

router = APIRouter(tags=["experiments"], dependencies=[needs("training")])
GivenId = Annotated[str, Query(max_length=100)]
After = Annotated[str | None, Query(max_length=100, description="the id of the last one of the page before")]
PageLimit = Annotated[Limit, Query()]
FileName = Annotated[str | None, Query(max_length=1_024, description="needed where the artifact has several files")]


@router.post("/experiments/create")
def create(context: ContextOf, body: CreateExperimentRequest) -> Experiment:
    """Opens an experiment. The same name with the same metadata again is the same experiment."""
    return experiments.create(context, body)


@router.get("/experiments/get")
def get(context: ContextOf, experiment_id: GivenId) -> Experiment:
    """One experiment."""
    return experiments.get(context, experiment_id)


@router.get("/experiments/list")
def list_experiments(context: ContextOf, after: After = None, limit: PageLimit = 100) -> list[Experiment]:
    """Experiments, newest first, a page at a time."""
    return experiments.page(context, after, limit)


@router.post("/experiments/update")
def update(context: ContextOf, body: UpdateExperimentRequest) -> Experiment:
    """Changes an experiment's status, and its metadata key by key: null removes one."""
    return experiments.update(context, body)


@router.post("/experiments/create_run", response_model_exclude_none=True)
def create_run(context: ContextOf, body: CreateRunRequest) -> Run:
    """Opens a run, whose status is `running`."""
    return experiments.create_run(context, body)


@router.get("/experiments/runs", response_model_exclude_none=True)
def list_runs(context: ContextOf, experiment_id: GivenId, after: After = None, limit: PageLimit = 100) -> list[Run]:
    """The runs of an experiment, the last that started first, a page at a time."""
    return experiments.page_of_runs(context, experiment_id, after, limit)


@router.get("/runs/get", response_model_exclude_none=True)
def get_run(context: ContextOf, run_id: GivenId) -> Run:
    """One run."""
    return experiments.get_run(context, run_id)


@router.post("/runs/update", response_model_exclude_none=True)
def update_run(context: ContextOf, body: UpdateRunRequest) -> Run:
    """Changes a run. A job says itself how its run stands: of that only further metadata can be changed."""
    return experiments.update_run(context, body)


@router.post("/experiments/artifacts/upload", response_model_exclude_none=True)
def upload_artifact(context: ContextOf, body: UploadArtifactRequest) -> Artifact:
    """Keeps a file with an experiment."""
    return experiments.upload(context, body)


@router.post("/experiments/artifacts/get", response_model_exclude_none=True)
def list_artifacts(context: ContextOf, body: ListArtifactsRequest) -> list[Artifact]:
    """The artifacts of an experiment, newest first, a page at a time."""
    return experiments.page_of_artifacts(context, body)


@router.get("/artifacts/get", response_model_exclude_none=True)
def get_artifact(context: ContextOf, artifact_id: GivenId) -> ArtifactWithFiles:
    """An artifact with its files."""
    return experiments.get_artifact(context, artifact_id)


@router.post("/artifacts/delete")
def delete_artifact(context: ContextOf, body: DeleteArtifactRequest) -> DeletedArtifact:
    """Removes an artifact. One from which a model is served is refused."""
    return experiments.delete(context, body)


@router.get(
    "/artifacts/content",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "the range that was asked for", "content": {"application/octet-stream": {}}},
        304: {"description": "the client has this content already (If-None-Match)"},
        416: {"description": "the range lies behind the end of the file"},
    },
)
def artifact_content(
    request: Request,
    context: ContextOf,
    artifact_id: GivenId,
    file: FileName = None,
    range: Annotated[str | None, Header()] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A file of an artifact: all of it, or one range of its bytes (RFC 9110, 14). Several ranges are answered by all.

    The ETag is the file's SHA-256.
    """
    artifact, found = experiments.find_file(context, artifact_id, file)
    etag = f'"{found.sha256}"'
    headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, no-cache"}
    if ranges.names(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    part = ranges.requested(range, found.bytes) if if_range in (None, etag) else None
    start, stop = part or (0, found.bytes)
    if part is not None and start == stop:
        return _not_in(request, range, found.bytes)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{found.bytes}"
    name = artifact.name if found.name == experiments.CONTENT else found.name.rsplit("/", 1)[-1]
    headers |= {
        "content-length": str(stop - start),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
        "x-content-type-options": "nosniff",
    }
    blocks = experiments.content(context, artifact, found, start, stop)
    first = next(blocks, b"")  # a file that cannot be read is an error, not an answer that breaks off
    status = 200 if part is None else 206
    return StreamingResponse(chain([first], blocks), status, headers, media_type="application/octet-stream")


def _not_in(request: Request, asked: str | None, size: int) -> Response:
    refused = BadInput(f"the range {asked!r} is not in the {size} bytes of the file", param="range")
    refused.status = 416
    response = error_response(request.scope, refused)
    response.headers["content-range"] = f"bytes */{size}"
    return response

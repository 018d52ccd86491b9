"""The data set API. Routes that read files or the database run in threads."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.requests import ClientDisconnect

from serve_apps.multipart import FileForm
from serve_apps.readers import READERS
from serve_apps.routes.common import ContextOf, needs
from stack import datasets, uploads
from stack.api.datasets import (
    MAX_PREVIEW_ROWS,
    CreateDatasetRequest,
    DatasetPreview,
    DeleteDatasetRequest,
    DeleteUploadRequest,
    RegisteredDataset,
    UploadedFile,
)
from stack.errors import BadInput

router = APIRouter(prefix="/datasets", tags=["datasets"], dependencies=[needs("data")])

DatasetUuid = Annotated[str, Query(max_length=100)]
After = Annotated[str | None, Query(max_length=100, description="the id of the last one of the page before")]
Limit = Annotated[int, Query(ge=1, le=1_000)]
# How much of an upload is held in memory before it is written.
BLOCK = 2**20


@router.post("/create", response_model_exclude_none=True)
async def create(context: ContextOf, body: CreateDatasetRequest) -> RegisteredDataset:
    """Checks and registers a data set."""
    return await READERS.run(datasets.create, context, body)


@router.get("/get", response_model_exclude_none=True)
def get(context: ContextOf, dataset_uuid: DatasetUuid) -> RegisteredDataset:
    """A registered data set."""
    return datasets.get(context, dataset_uuid)


@router.post("/delete")
def delete(context: ContextOf, body: DeleteDatasetRequest) -> None:
    """Forgets a data set, and deletes the upload on which no other one stands."""
    datasets.delete(context, body.dataset_uuid)


@router.get("/list", response_model_exclude_none=True)
def list_datasets(context: ContextOf, after: After = None, limit: Limit = 100) -> list[RegisteredDataset]:
    """Data sets, newest first, a page at a time."""
    return datasets.page(context, after, limit)


@router.get("/preview", response_model=DatasetPreview)
async def preview(
    context: ContextOf, dataset_uuid: DatasetUuid, rows: Annotated[int, Query(ge=1, le=MAX_PREVIEW_ROWS)] = 10
) -> Response:
    """The first rows of a data set, with their declared columns."""
    shown = await READERS.run(datasets.preview, context, dataset_uuid, rows)
    # By pydantic, since a row may hold a number that is beyond all numbers of JSON's.
    return Response(shown.model_dump_json(), media_type="application/json")


_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary"}},
}


@router.post(
    "/upload",
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def upload(request: Request, context: ContextOf) -> UploadedFile:
    """Takes a file of rows, as the part `file` of a form; its `content_url` is what a data set can stand on."""
    form = FileForm(request.headers.get("content-type", ""))
    declared = request.headers.get("content-length", "")
    if declared.isdigit():
        await asyncio.to_thread(uploads.require_room, context, int(declared))
    stream = request.stream()
    try:
        async for block in stream:
            form.write(block)
            if form.name is not None:
                break
        else:
            form.finish()
        assert form.name is not None
        async with contextmanager_in_threadpool(uploads.receive(context, form.name)) as file:
            async for block in stream:
                form.write(block)
                if form.size >= BLOCK:
                    await asyncio.to_thread(file.write, form.take())
            form.finish()
            await asyncio.to_thread(file.write, form.take())
            return await asyncio.to_thread(file.publish)
    except ClientDisconnect as error:
        raise BadInput("the body broke off") from error


@router.get("/uploads")
def list_uploads(context: ContextOf, after: After = None, limit: Limit = 100) -> list[UploadedFile]:
    """Uploaded files, newest first, a page at a time."""
    return uploads.page(context, after, limit)


@router.post("/uploads/delete")
def delete_upload(context: ContextOf, body: DeleteUploadRequest) -> UploadedFile:
    """Deletes an uploaded file on which no data set stands."""
    return uploads.delete(context, body.upload_id)

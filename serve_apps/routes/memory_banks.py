"""The memory API: banks, their documents, and queries."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from serve_apps.readers import READERS
from serve_apps.routes.common import ContextOf, JobUuid, answer_to, needs
from serve_apps.routes.jobs import After as AfterJob
from serve_apps.routes.jobs import Kind, Status, add_job_routes
from serve_apps.routes.jobs import Limit as LimitOfJobs
from stack.api.memory_banks import (
    CreateMemoryBankRequest,
    DeleteDocumentsRequest,
    DropMemoryBankRequest,
    GetDocumentsRequest,
    IngestDocumentsRequest,
    IngestJob,
    IngestJobArtifactsResponse,
    IngestJobEntry,
    IngestJobStatusResponse,
    InsertDocumentsRequest,
    MemoryBank,
    MemoryBankDocument,
    QueryDocumentsRequest,
    QueryDocumentsResponse,
    UpdateDocumentsRequest,
)
from stack.memory_banks import banks, ingestion
from stack.memory_banks.banks import Memory

router = APIRouter(tags=["memory"], dependencies=[needs("data")])
# As other jobs, they need more than what they write does.
_jobs = APIRouter(prefix="/memory_banks/ingest", dependencies=[needs("training")])

BankId = Annotated[str, Query(max_length=100)]
After = Annotated[str | None, Query(max_length=100, description="the id of the last one of the page before")]
Limit = Annotated[int, Query(ge=1, le=10_000)]


def _memory(request: Request) -> Memory:
    memory: Memory = request.app.state.memory
    return memory


MemoryOf = Annotated[Memory, Depends(_memory)]


class JsonLines(JSONResponse):
    """One JSON object a line. It is a JSONResponse, as the OpenAPI document would not say what they are otherwise."""

    media_type = "application/jsonl"

    def render(self, content: Any) -> bytes:
        return _rendered(content)


@router.post("/memory_banks/create", response_model_exclude_none=True)
async def create(context: ContextOf, body: CreateMemoryBankRequest) -> MemoryBank:
    """Makes a bank. Its id is made here."""
    return await banks.create(context, body)


@router.get("/memory_banks/list", response_class=JsonLines, response_model=MemoryBank)
def list_banks(context: ContextOf, after: After = None, limit: Limit = 10_000) -> Response:
    """Banks, newest first, a line each."""
    return JsonLines(banks.page(context, after, limit))


@router.get("/memory_banks/get", response_model_exclude_none=True)
def get(context: ContextOf, bank_id: BankId) -> MemoryBank:
    """A bank."""
    return banks.get(context, bank_id)


@router.post("/memory_banks/drop")
async def drop(context: ContextOf, memory: MemoryOf, body: DropMemoryBankRequest) -> str:
    """Removes a bank with all that is in it. Answers its id."""
    return await banks.drop(context, memory, body.bank_id)


@router.post("/memory_bank/insert", response_model=None)
async def insert(request: Request, context: ContextOf, memory: MemoryOf, body: InsertDocumentsRequest) -> Response:
    """Writes new documents. With the answer they are durable, and the next query finds them."""
    return await answer_to(request, _nothing(banks.insert(context, memory, body)))


@router.post("/memory_bank/update", response_model=None)
async def update(request: Request, context: ContextOf, memory: MemoryOf, body: UpdateDocumentsRequest) -> Response:
    """Replaces documents, each with all that was made of it, in one commit."""
    return await answer_to(request, _nothing(banks.update(context, memory, body)))


@router.post("/memory_bank/query", response_model=QueryDocumentsResponse)
async def query(request: Request, context: ContextOf, memory: MemoryOf, body: QueryDocumentsRequest) -> Response:
    """The chunks that answer a query, best first, with their scores."""
    return await answer_to(request, banks.query(context, memory, body))


@router.post("/memory_bank/documents/get", response_class=JsonLines, response_model=MemoryBankDocument)
async def get_documents(context: ContextOf, memory: MemoryOf, bank_id: BankId, body: GetDocumentsRequest) -> Response:
    """Documents as they were given, a line each."""
    pages = await banks.get_documents(context, memory, bank_id, body)
    return StreamingResponse(_lines(pages), media_type=JsonLines.media_type)


@router.post("/memory_bank/documents/delete")
async def delete_documents(context: ContextOf, memory: MemoryOf, body: DeleteDocumentsRequest) -> None:
    """Deletes documents with all that was made of them. Those that are not there are gone already."""
    await banks.delete_documents(context, memory, body)


@_jobs.post("")
async def ingest(context: ContextOf, body: IngestDocumentsRequest) -> IngestJob:
    """Accepts an insert of any size: of a data set, or of another bank's documents. It runs on its own."""
    job = await READERS.run(ingestion.submit, context, body)
    return IngestJob(job_uuid=job.uuid)


@_jobs.get("/job/status", response_model_exclude_none=True)
def ingest_status(context: ContextOf, job_uuid: JobUuid) -> IngestJobStatusResponse:
    """How far an ingestion is."""
    return ingestion.job_status(context, job_uuid)


@_jobs.get("/job/artifacts", response_model_exclude_none=True)
def ingest_artifacts(context: ContextOf, job_uuid: JobUuid) -> IngestJobArtifactsResponse:
    """The files of an ingestion, which say what has failed."""
    return ingestion.job_artifacts(context, job_uuid)


@_jobs.get("/jobs", response_model_exclude_none=True)
def list_ingestions(
    context: ContextOf, status: Status = None, kind: Kind = None, after: AfterJob = None, limit: LimitOfJobs = 100
) -> list[IngestJobEntry]:
    """Ingestions, newest first, a page at a time."""
    return ingestion.list_jobs(context, kind, status, after, limit)


add_job_routes(_jobs, ingestion.KINDS)
router.include_router(_jobs)


def _rendered(items: Iterable[BaseModel]) -> bytes:
    """Items as JSON, a line each."""
    return b"".join(item.model_dump_json(exclude_none=True).encode() + b"\n" for item in items)


async def _lines(pages: AsyncIterator[Sequence[BaseModel]]) -> AsyncIterator[bytes]:
    """The lines of pages as they come."""
    async for page in pages:
        yield await asyncio.to_thread(_rendered, page)


async def _nothing(work: Coroutine[Any, Any, None]) -> bytes:
    await work
    return b"null"

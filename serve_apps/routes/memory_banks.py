"""The memory API: banks, their documents, and queries."""

from collections.abc import Coroutine, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from serve_apps.routes.common import ContextOf, answer_to, needs
from stack.api.memory_banks import (
    CreateMemoryBankRequest,
    DeleteDocumentsRequest,
    DropMemoryBankRequest,
    GetDocumentsRequest,
    InsertDocumentsRequest,
    MemoryBank,
    MemoryBankDocument,
    QueryDocumentsRequest,
    QueryDocumentsResponse,
    UpdateDocumentsRequest,
)
from stack.memory_banks import banks
from stack.memory_banks.banks import Memory

router = APIRouter(tags=["memory"], dependencies=[needs("data")])

BankId = Annotated[str, Query(max_length=100)]
After = Annotated[str | None, Query(max_length=100, description="the id of the last one of the page before")]
Limit = Annotated[int, Query(ge=1, le=10_000)]


def _memory(request: Request) -> Memory:
    memory: Memory = request.app.state.memory
    return memory


MemoryOf = Annotated[Memory, Depends(_memory)]


class JsonLines(Response):
    """One JSON object a line."""

    media_type = "application/jsonl"


@router.post("/memory_banks/create", response_model_exclude_none=True)
async def create(context: ContextOf, body: CreateMemoryBankRequest) -> MemoryBank:
    """Makes a bank. Its id is made here."""
    return await banks.create(context, body)


@router.get("/memory_banks/list", response_class=JsonLines, response_model=MemoryBank)
def list_banks(context: ContextOf, after: After = None, limit: Limit = 10_000) -> Response:
    """Banks, newest first, a line each."""
    return _lines(banks.page(context, after, limit))


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
    return _lines(await banks.get_documents(context, memory, bank_id, body))


@router.post("/memory_bank/documents/delete")
async def delete_documents(context: ContextOf, memory: MemoryOf, body: DeleteDocumentsRequest) -> None:
    """Deletes documents with all that was made of them. Those that are not there are gone already."""
    await banks.delete_documents(context, memory, body)


def _lines(items: Iterable[BaseModel]) -> JsonLines:
    return JsonLines(b"".join(item.model_dump_json(exclude_none=True).encode() + b"\n" for item in items))


async def _nothing(work: Coroutine[Any, Any, None]) -> bytes:
    await work
    return b"null"

"""Inserts of any size, as jobs: of the rows of a data set, or of all documents of another bank.

The job does to each document what `banks.insert` does (jobs/ingest_documents.py).
"""

from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue, ValidationError

from stack import datasets, jobs, quotas
from stack.api.datasets import TrainEvalDataset, TrainEvalDatasetColumnType
from stack.api.jobs import ArtifactFile, JobStatus
from stack.api.memory_banks import (
    IngestDocumentsRequest,
    IngestJobArtifactsResponse,
    IngestJobEntry,
    IngestJobStatusResponse,
    MemoryBankDocument,
    VectorBankConfig,
)
from stack.api.wire import describe
from stack.context import Context
from stack.datasets import Shape, Size, columns_of
from stack.engines import bundles_of_job, resources_of_job
from stack.errors import BadInput
from stack.memory_banks import banks
from stack.memory_banks.writer import ROW_BYTES
from stack.row_ids import id_of
from stack.store import Job, MemoryBank

KINDS = (jobs.INGEST,)
DOCUMENT_ID = "document_id"
TEXT = "text/plain"
# About how many bytes a token has, and a line of what a job knows of a document.
TOKEN_BYTES, LINE_BYTES = 4, 500
_KIND = TrainEvalDatasetColumnType
# What the columns of documents may be.
_COLUMNS = {
    DOCUMENT_ID: (_KIND.text,),
    "content": (_KIND.text, _KIND.json),
    "mime_type": (_KIND.text,),
    "metadata": (_KIND.json,),
}
_REQUIRED = (DOCUMENT_ID, "content")


@dataclass(frozen=True)
class GivenDocument:
    """A document as it was given, by its id, in JSON, and when it expires, if it does already."""

    id: str
    content: JsonValue
    mime_type: str
    metadata: dict[str, JsonValue]
    expires_at: str | None = None

    def document(self) -> MemoryBankDocument:
        """As requests have it. Raises ValidationError for one over their bounds."""
        return MemoryBankDocument.model_validate(
            {
                "document_id": self.id,
                "content": self.content,
                "mime_type": self.mime_type,
                "metadata": self.metadata,
            }
        )


def submit(context: Context, request: IngestDocumentsRequest, submission_id: str | None = None) -> Job:
    """Accepts an insert of any size.

    Raises NotFound for an unknown bank, data set or embedding model, BadInput for rows that are no documents, two of
    the same id, or a bank without documents as the source, and StorageFull.
    """
    known = context.store.jobs.get(context.tenant, request.job_uuid)
    if known is not None:
        request, bundles = datasets.as_accepted(request, known.request), known.bundles
    else:
        bank = _bank(context, request)
        request, found = datasets.accept(context, request, DOCUMENTS)
        _require_room(context, request, bank, [datasets.size(context, one) for one in found])
        bundles = bundles_of_job(None)
    return jobs.submit(context, jobs.INGEST, request.job_uuid, request, bundles=bundles, submission_id=submission_id)


def resources(context: Context, request: IngestDocumentsRequest) -> dict[str, Any]:
    """What an ingestion that starts takes beside the model that serves and the writer.

    Raises NotFound where a bank was dropped since, and StorageFull.
    """
    bank = _bank(context, request)
    _require_room(context, request, bank, datasets.sizes_before_reading(context, request))
    return resources_of_job(None)


def size_of_bank(bank: MemoryBank) -> Size:
    """About how much the documents of a bank are. Their texts stand twice in it: as given, and in chunks."""
    return Size(bank.bytes // 2, 0)


def bytes_in_bank(bank: MemoryBank, text: int, documents: int) -> int:
    """About how many bytes so many documents with so many bytes of text take in a bank."""
    size = 2 * text + documents * ROW_BYTES
    if bank.config["type"] == "vector":
        of_chunk = VectorBankConfig.model_validate(bank.config).chunk_size_in_tokens * TOKEN_BYTES
        size += (documents + text // of_chunk) * (4 * (bank.dimensions or 0) + ROW_BYTES)
    return size


def require_documents(context: Context, bank_id: str, field: str) -> MemoryBank:
    """A bank to read the documents of. Raises NotFound, and BadInput for one into which nothing was written."""
    bank = banks.find(context, bank_id, field)
    if bank.written_at is None:
        raise BadInput(f"the memory bank {bank_id!r} has no documents", param=field)
    return bank


def list_jobs(
    context: Context, kind: str | None, status: JobStatus | None, after: str | None, limit: int
) -> list[IngestJobEntry]:
    """Ingestions, newest first."""
    return [IngestJobEntry(**jobs.entry(job)) for job in jobs.page(context, KINDS, kind, status, after, limit)]


def job_status(context: Context, job_uuid: str) -> IngestJobStatusResponse:
    """How far an ingestion is. Raises NotFound."""
    return IngestJobStatusResponse(**jobs.state(context, jobs.get(context, job_uuid, KINDS)))


def job_artifacts(context: Context, job_uuid: str) -> IngestJobArtifactsResponse:
    """The files of an ingestion, which say what has failed. Raises NotFound."""
    result = jobs.get(context, job_uuid, KINDS).result or {}
    return IngestJobArtifactsResponse(
        job_uuid=job_uuid,
        path=result.get("path"),
        files=[ArtifactFile(**file) for file in result.get("files", [])],
    )


def _bank(context: Context, request: IngestDocumentsRequest) -> MemoryBank:
    """The bank that is written into. Raises NotFound for it, its model, and the bank of the source."""
    bank = banks.find(context, request.bank_id)
    if bank.config["type"] == "vector":
        context.models.get_embedding_model(bank.config["embedding_model"])
    if bank.config["type"] == "graph":
        context.models.get(bank.config["model"])
    if request.source_bank_id is not None:
        require_documents(context, request.source_bank_id, "source_bank_id")
    return bank


def _require_room(context: Context, request: IngestDocumentsRequest, bank: MemoryBank, sizes: list[Size]) -> None:
    """Raises StorageFull unless there is room for what comes into the bank, and for the job's work meanwhile."""
    copied = 0
    if request.source_bank_id is not None:
        source = size_of_bank(banks.find(context, request.source_bank_id, "source_bank_id"))
        copied, sizes = source.text, [source]
    text, rows = sum(size.text for size in sizes), sum(size.rows for size in sizes)
    banks.require_room(context, bytes_in_bank(bank, text, rows))
    work = jobs.work_folder(context.tenant, request.job_uuid)
    quotas.require_room_for_job(context, kept=0, temporary=copied + rows * LINE_BYTES, work=work)


def _columns_problem(dataset: TrainEvalDataset) -> str | None:
    for name, kinds in _COLUMNS.items():
        kind = dataset.columns.get(name)
        if kind is None and name in _REQUIRED:
            return (
                "documents stand in the columns document_id (text) and content (text or json), and may have mime_type "
                f"(text) and metadata (json); this data set has: {columns_of(dataset)}"
            )
        if kind is not None and kind not in kinds:
            return f"the column {name!r} is of type {kind}; allowed: {', '.join(kinds)}"
    return None


def _read(number: int, row: dict[str, Any], dataset: TrainEvalDataset) -> GivenDocument:
    has = dataset.columns
    one = GivenDocument(
        id_of(number, row, dataset, DOCUMENT_ID),
        row["content"],
        row["mime_type"] if "mime_type" in has else TEXT,
        (row["metadata"] if "metadata" in has else None) or {},
    )
    try:
        one.document()
    except ValidationError as error:
        raise BadInput(f"row {number}: {describe(error)}") from error
    return one


# The rows of a data set that are documents.
DOCUMENTS = Shape(_columns_problem, _read, unique_ids=True, id_column=DOCUMENT_ID)

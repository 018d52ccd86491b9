"""Wire types of the memory API: banks, their documents, and queries."""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from stack.api.batch_inference import MAX_FAILED_ROWS
from stack.api.datasets import DatasetReference
from stack.api.filters import Filter
from stack.api.jobs import ArtifactFile, JobEntry, JobState, MakingJobUuid, Priority
from stack.api.wire import Info, ModelId, Request, Wire, at_most, without_nul
from stack.errors import TooLarge

MAX_DOCUMENTS = 1_000
MAX_IDS = 1_000
MAX_PARTS = 10_000
MAX_CONTENT = 32 * 2**20
MAX_QUERY = 20_000
MAX_ADDRESS = 4_096
MAX_TTL_S = 100 * 366 * 24 * 3_600
MAX_CHUNK_TOKENS = 8_192
MAX_ENTITIES = 100
MAX_ENTITY_NAME = 200
MAX_HOPS = 3
INGEST = "/memory_banks/ingest"

BankId = Annotated[str, Field(max_length=100), AfterValidator(without_nul)]
DocumentId = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(without_nul)]
ChunkSize = Annotated[int, Field(ge=8, le=MAX_CHUNK_TOKENS)]
Part = Annotated[str, Field(max_length=MAX_CONTENT), AfterValidator(without_nul)]


class ChunkedBankConfig(Wire):
    """Documents are cut into chunks of so many tokens of a model's own tokenizer."""

    chunk_size_in_tokens: ChunkSize
    overlap_size_in_tokens: Annotated[int, Field(ge=0, le=MAX_CHUNK_TOKENS)] | None = None

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> Self:
        half = self.chunk_size_in_tokens // 2
        if self.overlap > half:
            raise ValueError(
                f"overlap_size_in_tokens is {self.overlap}; allowed: at most half of chunk_size_in_tokens, {half}"
            )
        return self

    @property
    def overlap(self) -> int:
        return self.overlap_size_in_tokens or 0


class VectorBankConfig(ChunkedBankConfig):
    """Chunks are found by what they mean, by what they say, or by both.

    Sizes are in tokens of the embedding model's own tokenizer.
    """

    type: Literal["vector"]
    embedding_model: ModelId


class KeyValueBankConfig(Wire):
    """Documents are found whole, by their ids: exactly, or by how they begin."""

    type: Literal["keyvalue"]


class Language(StrEnum):
    """Those whose words can be stemmed."""

    arabic = "Arabic"
    danish = "Danish"
    dutch = "Dutch"
    english = "English"
    finnish = "Finnish"
    french = "French"
    german = "German"
    greek = "Greek"
    hungarian = "Hungarian"
    italian = "Italian"
    norwegian = "Norwegian"
    portuguese = "Portuguese"
    romanian = "Romanian"
    russian = "Russian"
    spanish = "Spanish"
    swedish = "Swedish"
    tamil = "Tamil"
    turkish = "Turkish"


class KeywordBankConfig(Wire):
    """Chunks are found by the words in them (BM25).

    With `stem` by any form of these words in the `language`, whose stop words are not looked for.
    """

    type: Literal["keyword"]
    language: Language = Language.english
    stem: bool = True


class GraphBankConfig(ChunkedBankConfig):
    """Chunks are found by the entities that they speak of, and by how these are related.

    A language model reads them when documents are written: `model`, or where none is named, the first one that is
    served when the bank is made. Sizes are in tokens of its tokenizer.
    """

    type: Literal["graph"]
    model: ModelId | None = None
    chunk_size_in_tokens: ChunkSize = 256


BankConfig = Annotated[
    VectorBankConfig | KeyValueBankConfig | KeywordBankConfig | GraphBankConfig, Field(discriminator="type")
]
BankName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(without_nul)]
BankUrl = Annotated[
    str, Field(max_length=MAX_ADDRESS, pattern=r"^(https?://|file://|data:)"), AfterValidator(without_nul)
]


class CreateMemoryBankRequest(Request):
    """`url` is kept and given back: a note of where the documents come from. Nothing is fetched from there."""

    name: BankName
    config: BankConfig
    url: BankUrl | None = None


class MemoryBank(Wire):
    """A bank, by the id that the server has given to it. Names need not be unique."""

    bank_id: str
    name: str
    config: BankConfig
    url: str | None = None
    created_at: str


class DropMemoryBankRequest(Request):
    bank_id: BankId


class Address(Wire):
    """Where a content lies: data:, https://, upload:// (a file that was sent), file:// (within the data folders)."""

    uri: Annotated[str, Field(min_length=1, max_length=MAX_CONTENT), AfterValidator(without_nul)]


def _kind(value: Any) -> str:
    return "(text)" if isinstance(value, str) else "(parts)" if isinstance(value, list) else "(address)"


# A text, one in parts, which are put together without anything between them, or where it lies. A text without blanks
# that begins like an address is one.
DocumentContent = Annotated[
    Annotated[Part, Tag("(text)")]
    | Annotated[Annotated[list[Part], at_most(MAX_PARTS), Field(min_length=1)], Tag("(parts)")]
    | Annotated[Address, Tag("(address)")],
    Discriminator(_kind),
]


class MemoryBankDocument(Wire):
    """A document. Its `mime_type` says how it is read; `metadata` is what queries can filter by."""

    document_id: DocumentId
    content: DocumentContent
    mime_type: Annotated[str, Field(min_length=3, max_length=200), AfterValidator(without_nul)]
    metadata: Info


def _few_enough(value: Any) -> Any:
    """Refuses more documents before any of them is looked at."""
    if isinstance(value, list) and len(value) > MAX_DOCUMENTS:
        raise TooLarge(
            f"there are {len(value)} documents; allowed in one call: {MAX_DOCUMENTS}. The job {INGEST} takes more",
            param="documents",
        )
    return value


Documents = Annotated[list[MemoryBankDocument], Field(min_length=1), BeforeValidator(_few_enough)]
DocumentIds = Annotated[list[DocumentId], Field(min_length=1), at_most(MAX_IDS)]


Ttl = Annotated[int, Field(ge=1, le=MAX_TTL_S)]


class InsertDocumentsRequest(Request):
    """New documents, which expire after `ttl_seconds`. Those that are there already, just so, are left as they are."""

    bank_id: BankId
    documents: Documents
    ttl_seconds: Ttl | None = None


class UpdateDocumentsRequest(Request):
    """Documents in the place of those of the same ids, which are there. They expire when those would have."""

    bank_id: BankId
    documents: Documents


class GetDocumentsRequest(Request):
    document_ids: DocumentIds


class DeleteDocumentsRequest(Request):
    bank_id: BankId
    document_ids: DocumentIds


class QueryMode(StrEnum):
    vector = "vector"
    keyword = "keyword"
    hybrid = "hybrid"


EntityName = Annotated[str, Field(min_length=1, max_length=MAX_ENTITY_NAME), AfterValidator(without_nul)]


class QueryParams(Wire):
    """How a bank is asked, all of it optional.

    `mode` is of vector banks: by meaning, by words, or by both, whose ranks are fused (hybrid). `prefix` is of keyvalue
    banks: the query is how ids begin, not a whole one. `entities` and `hops` are of graph banks: the entities to begin
    from, else those that the query names, and how many relations away from them others may be.

    There are at most `max_chunks`, of at most `max_tokens` together, none of them scored below `score_threshold`, all
    of documents whose metadata pass the `filter`. With `neighbours` each comes with so many of the chunks before it and
    after it in its document.
    """

    mode: QueryMode | None = None
    max_chunks: Annotated[int, Field(ge=1, le=1_000)] = 10
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    score_threshold: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None
    filter: Filter | None = None
    neighbours: Annotated[int, Field(ge=0, le=10)] = 0
    prefix: bool = False
    entities: Annotated[list[EntityName], at_most(MAX_ENTITIES)] = []
    hops: Annotated[int, Field(ge=1, le=MAX_HOPS)] | None = None


QueryText = Annotated[str, Field(max_length=MAX_QUERY), AfterValidator(without_nul)]


def _query(value: str | list[str]) -> str | list[str]:
    text = "".join(value)
    if not text.strip():
        raise ValueError("is empty")
    if len(text) > MAX_QUERY:
        raise ValueError(f"has {len(text)} characters; allowed: at most {MAX_QUERY}")
    return value


class QueryDocumentsRequest(Request):
    """A query: a text, or one in parts, which are put together without anything between them."""

    bank_id: BankId
    query: Annotated[
        Annotated[QueryText, Tag("(text)")] | Annotated[Annotated[list[QueryText], at_most(MAX_PARTS)], Tag("(parts)")],
        Discriminator(
            lambda value: "(text)" if isinstance(value, str) else "(parts)" if isinstance(value, list) else None,
            "text",
            "should be a text, or a list of texts that are its parts",
        ),
        AfterValidator(_query),
    ]
    params: QueryParams = QueryParams()

    @property
    def text(self) -> str:
        return "".join(self.query)


class QueriedChunk(Wire):
    """A chunk of a document: its `position` there, from 0, its `page`, from 1, and the `headings` that it is under."""

    content: str
    token_count: int
    document_id: str
    position: int
    page: int | None = None
    headings: list[str]
    metadata: dict[str, Any]


class QueryDocumentsResponse(Wire):
    """The chunks, best first, and their scores."""

    chunks: list[QueriedChunk]
    scores: list[float]


class IngestDocumentsRequest(Request):
    """An insert of any size: the rows of `dataset`, or all documents of the bank `source_bank_id`.

    The data set has the columns `document_id` (text), `content` (text, or json for what `insert` takes beside a text),
    and may have `mime_type` (text; `text/plain` without it) and `metadata` (json). Another bank's documents are read,
    cut and embedded anew, as this bank is configured. A document that fails is told; more than `max_failed_rows` of
    them fail the job. Each expires `ttl_seconds` after it was written.
    """

    job_uuid: MakingJobUuid
    bank_id: BankId
    dataset: DatasetReference | None = None
    source_bank_id: BankId | None = None
    ttl_seconds: Ttl | None = None
    max_failed_rows: Annotated[int, Field(ge=0, le=MAX_FAILED_ROWS)] = 1_000
    priority: Priority = 0

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.dataset is None) == (self.source_bank_id is None):
            there = "neither" if self.dataset is None else "both"
            raise ValueError(f"there is {there} of dataset and source_bank_id; allowed: one of them")
        if self.source_bank_id == self.bank_id:
            raise ValueError(f"source_bank_id is bank_id, {self.bank_id!r}; allowed: another bank's")
        return self


class IngestJob(Wire):
    job_uuid: str


class IngestJobEntry(JobEntry):
    """An ingestion in a list."""


class IngestJobStatusResponse(JobState):
    """`metrics` holds `documents`, `written`, `unchanged` (those that the bank had already, just so), `failed`,
    `chunks`, `tokens` (those of the chunks) and `seconds`: for how long the job has worked, in all its attempts."""


class IngestJobArtifactsResponse(Wire):
    """The files of an ingestion: `summary.json`, and `errors.jsonl` where documents have failed."""

    job_uuid: str
    path: str | None
    files: list[ArtifactFile]

"""Wire types of the data set API."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from stack.api.wire import Id, Info, Request, Wire, at_most, without_nul

MAX_PREVIEW_ROWS = 100
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


class TrainEvalDatasetColumnType(StrEnum):
    dialog = "dialog"
    text = "text"
    media = "media"
    number = "number"
    json = "json"


class TrainEvalDataset(Wire):
    """Rows for training or evaluation: a file of JSON Lines, JSON, CSV or Parquet with these columns.

    Examples stand in one column of type `dialog`, a list of messages whose last one is the assistant's answer, or in
    two of type `text`, `prompt` and `completion`. The file is one under the data roots of the stack (file://, s3:// or
    gs://), one that was uploaded (upload://), or lies in the public internet (https://).

    With a `sha256`, its content must be that one. A job keeps the one of the content that it was accepted with.
    """

    columns: Annotated[dict[ColumnName, TrainEvalDatasetColumnType], Field(min_length=1), at_most(1_000)]
    content_url: Annotated[
        str, Field(max_length=4_096, pattern=r"^(file|upload|s3|gs|https)://"), AfterValidator(without_nul)
    ]
    metadata: Info | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


def _kind(value: Any) -> str:
    return "registered" if isinstance(value, str) else "described"


# Where a request takes a data set, it may name a registered one instead of describing it.
DatasetReference = Annotated[
    Annotated[TrainEvalDataset, Tag("described")] | Annotated[Id, Tag("registered")], Discriminator(_kind)
]


class RegisteredDataset(TrainEvalDataset):
    """A data set as it was found when it was registered. `bytes` and `sha256` are those of the file as it lies.

    `examples` tells whether every row is one; nothing is known of that for data sets of the first release.
    """

    uuid: Id
    rows: int
    bytes: int
    sha256: str
    examples: bool | None = None
    created_at: str


class CreateDatasetRequest(Request):
    uuid: Id
    dataset: TrainEvalDataset


class DeleteDatasetRequest(Request):
    dataset_uuid: Annotated[str, Field(max_length=100), AfterValidator(without_nul)]


class DatasetPreview(Wire):
    """The first rows of a data set, with their declared columns; `more` if there are others."""

    dataset_uuid: str
    rows: list[dict[str, Any]]
    more: bool


class UploadedFile(Wire):
    """A file that was sent; `content_url` is its address in the description of a data set."""

    id: str
    name: str
    bytes: int
    sha256: str
    created_at: str
    content_url: str


class DeleteUploadRequest(Request):
    upload_id: Annotated[str, Field(max_length=100), AfterValidator(without_nul)]

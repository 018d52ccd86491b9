"""Wire types of the data set API."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from stack.api.wire import Id, Request, Wire, at_most


class TrainEvalDatasetColumnType(StrEnum):
    dialog = "dialog"
    text = "text"
    media = "media"
    number = "number"
    json = "json"


class TrainEvalDataset(Wire):
    """Rows for training or evaluation: a file of JSON Lines with these columns.

    Examples stand in one column of type `dialog`, a list of messages whose last one is the assistant's answer, or in
    two of type `text`, `prompt` and `completion`.
    """

    columns: Annotated[dict[str, TrainEvalDatasetColumnType], Field(min_length=1), at_most(1_000)]
    content_url: Annotated[str, Field(max_length=4_096, pattern=r"^file://")]
    metadata: Annotated[dict[str, Any], at_most(1_000)] | None = None


def _kind(value: Any) -> str:
    return "registered" if isinstance(value, str) else "described"


# Where a request takes a data set, it may name a registered one instead of describing it.
DatasetReference = Annotated[
    Annotated[TrainEvalDataset, Tag("described")] | Annotated[Id, Tag("registered")], Discriminator(_kind)
]


class RegisteredDataset(TrainEvalDataset):
    """A data set as it was found when it was registered."""

    uuid: Id
    rows: int
    bytes: int
    sha256: str
    created_at: str


class CreateDatasetRequest(Request):
    uuid: Id
    dataset: TrainEvalDataset

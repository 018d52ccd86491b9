"""Data sets: files of JSON Lines that are checked when they are registered, and read row by row."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import TypeAdapter, ValidationError

from stack.api.datasets import (
    CreateDatasetRequest,
    RegisteredDataset,
    TrainEvalDataset,
    TrainEvalDatasetColumnType,
)
from stack.api.messages import CompletionMessage, Message
from stack.api.wire import describe
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError, TooLarge
from stack.inference import openai_message
from stack.store import now

MAX_ROW_BYTES = 16 * 2**20
_DIALOG: TypeAdapter[list[Message]] = TypeAdapter(list[Message])


@dataclass(frozen=True)
class Example:
    """What a model should say: the messages before its answer, in OpenAI's shape, and the answer."""

    messages: list[dict[str, Any]]
    answer: str


def create(context: Context, request: CreateDatasetRequest) -> RegisteredDataset:
    """Checks every row of a data set's file and registers it.

    Registering the same again changes nothing. Raises BadInput with the row at fault, TooLarge, or Conflict where the
    uuid stands for something else.
    """
    known = context.store.datasets.get(context.tenant, request.uuid)
    if known is None:
        rows, size, digest = check(context, request.dataset)
        row = request.dataset.model_dump(mode="json") | dict(
            uuid=request.uuid, rows=rows, bytes=size, sha256=digest, created_at=now()
        )
        if context.store.datasets.add(context.tenant, row):
            return RegisteredDataset(**{k: v for k, v in row.items() if k != "tenant"})
        known = context.store.datasets.get(context.tenant, request.uuid)
    assert known is not None
    if TrainEvalDataset(**{key: known[key] for key in TrainEvalDataset.model_fields}) != request.dataset:
        raise Conflict(f"there is another data set with the uuid {request.uuid!r}", param="uuid")
    return RegisteredDataset(**{k: v for k, v in known.items() if k != "tenant"})


def get(context: Context, uuid: str) -> RegisteredDataset:
    """A registered data set. Raises NotFound."""
    row = context.store.datasets.get(context.tenant, uuid)
    if row is None:
        raise NotFound(f"there is no data set with the uuid {uuid!r}", param="dataset_uuid")
    return RegisteredDataset(**{k: v for k, v in row.items() if k != "tenant"})


def resolve(context: Context, reference: TrainEvalDataset | str) -> TrainEvalDataset:
    """The data set that a request means, read through and found whole.

    Raises what `create` raises, and Conflict where the file is no longer what was registered.
    """
    if not isinstance(reference, str):
        check(context, reference)
        return reference
    registered = get(context, reference)
    dataset = TrainEvalDataset(**registered.model_dump(include=set(TrainEvalDataset.model_fields)))
    _, _, digest = check(context, dataset)
    if digest != registered.sha256:
        raise Conflict(
            f"the file of the data set {reference!r} has changed: registered with the SHA-256 {registered.sha256}, "
            f"it now has {digest}",
            param="dataset",
        )
    return dataset


def check_examples(context: Context, reference: TrainEvalDataset | str, field: str) -> None:
    """Reads the data set in this field of a request through.

    Raises BadInput, naming the field and the row, unless each row holds an example (see TrainEvalDataset).
    """
    try:
        for _ in examples(context, resolve(context, reference)):
            pass
    except StackError as error:
        error.param = field
        raise


def _require_example_columns(dataset: TrainEvalDataset) -> None:
    if _dialog_column(dataset) is None and not _has_prompt_and_completion(dataset):
        columns = ", ".join(f"{name} ({kind})" for name, kind in dataset.columns.items())
        raise BadInput(
            f"examples stand in one column of type dialog, or in two of type text, prompt and completion; "
            f"this data set has: {columns}",
            param="dataset.columns",
        )


def examples(context: Context, dataset: TrainEvalDataset) -> Iterator[Example]:
    """The examples of a data set, in the order of its rows. Raises BadInput, naming the row, for one without answer."""
    _require_example_columns(dataset)
    column = _dialog_column(dataset)
    for number, row in rows(context, dataset):
        if column is None:
            yield Example([dict(role="user", content=row["prompt"])], row["completion"])
            continue
        dialog = _DIALOG.validate_python(row[column])
        if len(dialog) < 2 or not isinstance(dialog[-1], CompletionMessage):
            raise BadInput(f"row {number}: the dialog in {column!r} does not end with an answer of the assistant")
        try:
            messages = [openai_message(message) for message in dialog]
        except BadInput as error:
            raise BadInput(f"row {number}: {error.message}") from error
        yield Example(messages[:-1], messages[-1]["content"])


def check(context: Context, dataset: TrainEvalDataset) -> tuple[int, int, str]:
    """Reads a data set through. Returns its rows, its bytes and its SHA-256; raises BadInput with the row at fault."""
    file = _file(context, dataset)
    digest = hashlib.sha256()
    size = count = 0
    for number, line in _lines(file):
        size += len(line)
        if size > context.config.max_dataset_bytes:
            raise TooLarge(f"{dataset.content_url} has more than {context.config.max_dataset_bytes} bytes")
        digest.update(line)
        _row(line, number, dataset)
        count = number
    if not count:
        raise BadInput(f"{dataset.content_url} has no rows", param="dataset.content_url")
    return count, size, digest.hexdigest()


def rows(context: Context, dataset: TrainEvalDataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a data set with their numbers, from 1, checked one by one as they are read."""
    for number, line in _lines(_file(context, dataset)):
        yield number, _row(line, number, dataset)


def _file(context: Context, dataset: TrainEvalDataset) -> Path:
    """The local file of a data set, if it is one that users may read."""
    url = dataset.content_url
    try:
        address = urlsplit(url)
        file = Path(unquote(address.path)).resolve()
        is_file = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{url!r} is no address of a local file: {error}", param="dataset.content_url") from error
    if address.netloc not in ("", "localhost"):
        message = f"{url!r} is no address of a local file; allowed: file:///folder/name.jsonl"
        raise BadInput(message, param="dataset.content_url")
    roots = context.config.data_folders
    if not any(file.is_relative_to(root) for root in roots):
        allowed = ", ".join(str(root) for root in roots)
        raise BadInput(f"{url} is outside of the data folders: {allowed}", param="dataset.content_url")
    if file.suffix != ".jsonl":
        raise BadInput(f"{url} is not JSON Lines: its name must end with .jsonl", param="dataset.content_url")
    if not is_file:
        raise BadInput(f"there is no file {url}", param="dataset.content_url")
    if not os.access(file, os.R_OK):
        raise BadInput(f"{url} may not be read", param="dataset.content_url")
    return file


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise BadInput(f"row {number} has more than {MAX_ROW_BYTES} bytes")
            yield number, line


def _row(line: bytes, number: int, dataset: TrainEvalDataset) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"row {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadInput(f"row {number} is not a JSON object with the declared columns")
    for column, kind in dataset.columns.items():
        if column not in row:
            raise BadInput(f"row {number} lacks the declared column {column!r}; it has: {', '.join(row) or 'none'}")
        problem = _problem(row[column], kind)
        if problem:
            raise BadInput(f"row {number}: the column {column!r} is declared as {kind}, but {problem}")
    return row


def _problem(value: Any, kind: TrainEvalDatasetColumnType) -> str | None:
    match kind:
        case TrainEvalDatasetColumnType.text | TrainEvalDatasetColumnType.media:
            return None if isinstance(value, str) else f"holds a {type(value).__name__}"
        case TrainEvalDatasetColumnType.number:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return None if is_number else f"holds a {type(value).__name__}"
        case TrainEvalDatasetColumnType.dialog:
            try:
                _DIALOG.validate_python(value)
            except ValidationError as error:
                return f"is not a list of messages: {describe(error)[:300]}"
            return None
        case TrainEvalDatasetColumnType.json:
            return None


def _dialog_column(dataset: TrainEvalDataset) -> str | None:
    dialogs = [name for name, kind in dataset.columns.items() if kind == TrainEvalDatasetColumnType.dialog]
    return dialogs[0] if len(dialogs) == 1 else None


def _has_prompt_and_completion(dataset: TrainEvalDataset) -> bool:
    return all(dataset.columns.get(name) == TrainEvalDatasetColumnType.text for name in ("prompt", "completion"))

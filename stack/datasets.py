"""Data sets: what is checked when they are registered, and how their rows and examples are read.

A data set is immutable: its rows are checked once, and the hash of its content is kept. Whoever reads it later finds
the same content, or Conflict with both hashes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import FailFast, TypeAdapter, ValidationError

from stack import uploads
from stack.api.datasets import (
    CreateDatasetRequest,
    DatasetPreview,
    RegisteredDataset,
    TrainEvalDataset,
    TrainEvalDatasetColumnType,
)
from stack.api.messages import CompletionMessage, Message
from stack.api.wire import describe
from stack.context import Context
from stack.dataset_content import Content, opened
from stack.dataset_files import Numbered, format_of, is_finite_number, read
from stack.errors import BadInput, Conflict, NotFound, StackError
from stack.inference import openai_message
from stack.store import now

# How many bad rows a refusal names.
MAX_BAD_ROWS = 10
MAX_PROBLEM = 300
MAX_PREVIEW_BYTES = 2**18
_DIALOG: TypeAdapter[list[Message]] = TypeAdapter(Annotated[list[Message], FailFast()])
_ROW: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Checked:
    """A data set whose rows were read through: how many there are, and the bytes and the SHA-256 of its content."""

    dataset: TrainEvalDataset
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Example:
    """What a model should say: the messages before its answer, in OpenAI's shape, and the answer."""

    messages: list[dict[str, Any]]
    answer: str


def create(context: Context, request: CreateDatasetRequest) -> RegisteredDataset:
    """Checks every row of a data set's file and registers it.

    Registering the same again changes nothing. Raises BadInput with the first rows at fault, TooLarge, or Conflict
    where the uuid stands for something else.
    """
    known = context.store.datasets.get(context.tenant, request.uuid)
    if known is None:
        found = check(context, request.dataset)
        row = request.dataset.model_dump(mode="json") | dict(
            uuid=request.uuid, rows=found.rows, bytes=found.bytes, sha256=found.sha256, created_at=now()
        )
        if context.store.datasets.add(context.tenant, row):
            return _registered(row)
        known = context.store.datasets.get(context.tenant, request.uuid)
    assert known is not None
    if TrainEvalDataset(**{key: known[key] for key in TrainEvalDataset.model_fields}) != request.dataset:
        raise Conflict(f"there is another data set with the uuid {request.uuid!r}", param="uuid")
    return _registered(known)


def get(context: Context, uuid: str, field: str = "dataset_uuid") -> RegisteredDataset:
    """A registered data set. Raises NotFound."""
    return _registered(_row_of(context, uuid, field))


def page(context: Context, after: str | None, limit: int) -> list[RegisteredDataset]:
    """Data sets, newest first, behind the one with the uuid `after`. Raises NotFound."""
    last = _row_of(context, after, "after") if after is not None else None
    return [_registered(row) for row in context.store.datasets.page(context.tenant, last, limit)]


def preview(context: Context, uuid: str, most: int) -> DatasetPreview:
    """The first rows of a data set: at most so many, and of MAX_PREVIEW_BYTES together. Raises NotFound."""
    registered = get(context, uuid)
    shown: list[dict[str, Any]] = []
    size = 0
    with opened(context, registered.content_url) as content:
        for number, row in _rows(context, registered, content):
            if isinstance(row, str):
                raise _changed(uuid, row)
            size += len(_ROW.dump_json(row))
            if number > most or size > MAX_PREVIEW_BYTES:
                break
            shown.append(row)
    return DatasetPreview(dataset_uuid=uuid, rows=shown, more=len(shown) < registered.rows)


def delete(context: Context, uuid: str) -> None:
    """Forgets a data set, and the upload on which no other one stands; other files are left alone.

    Raises NotFound, and Conflict while a job that has not ended needs it.
    """
    dataset = get(context, uuid)
    is_upload = dataset.content_url.startswith("upload://")
    for job_uuid, request in context.store.datasets.unfinished_jobs(context.tenant):
        if uuid in _references(request) or (is_upload and dataset.content_url in _references(request)):
            message = f"the job {job_uuid!r} needs the data set {uuid!r} and has not ended; cancel it, or wait for it"
            raise Conflict(message, param="dataset_uuid")
    context.store.datasets.delete(context.tenant, uuid)
    if is_upload and context.store.datasets.at(context.tenant, dataset.content_url) is None:
        uploads.remove(context, uploads.id_of(dataset.content_url))


def resolve(context: Context, reference: TrainEvalDataset | str) -> Checked:
    """The data set that a request means. One that is described is read through here; one that is registered was.

    Raises what `create` raises, and NotFound.
    """
    if not isinstance(reference, str):
        return check(context, reference)
    found = get(context, reference, "dataset")
    dataset = TrainEvalDataset(**found.model_dump(include=set(TrainEvalDataset.model_fields)))
    return Checked(dataset, found.rows, found.bytes, found.sha256)


def check_examples(context: Context, reference: TrainEvalDataset | str, field: str) -> None:
    """Reads the data set in this field of a request through.

    Raises BadInput, naming the field and the row, unless each row holds an example (see TrainEvalDataset).
    """
    try:
        if not isinstance(reference, str):
            _require_example_columns(reference)
        for _ in examples(context, resolve(context, reference)):
            pass
    except StackError as error:
        error.param = field
        raise


def examples(context: Context, checked: Checked) -> Iterator[Example]:
    """The examples of a data set, in the order of its rows. Raises BadInput, naming the row, for one without answer."""
    _require_example_columns(checked.dataset)
    column = _dialog_column(checked.dataset)
    for number, row in rows(context, checked):
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


def check(context: Context, dataset: TrainEvalDataset) -> Checked:
    """Reads a data set through. Raises BadInput with the first rows at fault, and TooLarge."""
    with opened(context, dataset.content_url) as content:
        digest = _sha256(content)
        problems: list[str] = []
        count = 0
        for count, row in _rows(context, dataset, content):  # noqa: B007  # the last number is how many there are
            if isinstance(row, str):
                problems.append(row[:MAX_PROBLEM])
                if len(problems) == MAX_BAD_ROWS:
                    break
        if problems:
            more = "; it was read no further" if len(problems) == MAX_BAD_ROWS else ""
            raise BadInput("; ".join(problems) + more, param="dataset.content_url")
        if not count:
            raise BadInput(f"{dataset.content_url} has no rows", param="dataset.content_url")
        return Checked(dataset, count, content.bytes, digest)


def rows(context: Context, checked: Checked) -> Iterator[tuple[int, dict[str, Any]]]:
    """The declared columns of a data set's rows with their numbers, from 1.

    Raises Conflict, with both hashes, where the content is no longer what was checked.
    """
    with opened(context, checked.dataset.content_url) as content:
        digest = _sha256(content)
        if digest != checked.sha256:
            raise Conflict(
                f"the content of {checked.dataset.content_url} has changed: it was checked with the SHA-256 "
                f"{checked.sha256}, and now has {digest}",
                param="dataset",
            )
        for number, row in _rows(context, checked.dataset, content):
            if isinstance(row, str):
                raise BadInput(row)
            yield number, row


def _registered(row: dict[str, Any]) -> RegisteredDataset:
    return RegisteredDataset(**{key: value for key, value in row.items() if key != "tenant"})


def _row_of(context: Context, uuid: str, field: str) -> dict[str, Any]:
    row = context.store.datasets.get(context.tenant, uuid)
    if row is None:
        raise NotFound(f"there is no data set with the uuid {uuid!r}", param=field)
    return row


def _references(request: dict[str, Any]) -> list[str]:
    """The data sets that the request of a job names, and the addresses of those that it describes."""
    named = [value for key, value in request.items() if key == "dataset" or key.endswith("_dataset")]
    return [str(one["content_url"] if isinstance(one, dict) else one) for one in named if one is not None]


def _sha256(content: Content) -> str:
    digest = hashlib.file_digest(content.file, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a real file
    content.file.seek(0)
    return digest


def _changed(uuid: str, problem: str) -> Conflict:
    return Conflict(f"the content of the data set {uuid!r} has changed since it was checked: {problem[:MAX_PROBLEM]}")


def _rows(context: Context, dataset: TrainEvalDataset, content: Content) -> Iterator[Numbered]:
    """The rows with their numbers, each checked as it is read, or what is wrong with it."""
    try:
        form = format_of(content.name)
        for number, row in read(content.file, form, dataset.columns, context.config.max_dataset_bytes):
            problem = None if isinstance(row, str) else _problem(number, row, dataset)
            yield number, problem or row
    except StackError as error:
        error.param = error.param or "dataset.content_url"
        raise


def _problem(number: int, row: dict[str, Any], dataset: TrainEvalDataset) -> str | None:
    for column, kind in dataset.columns.items():
        problem = _problem_of(row[column], kind)
        if problem:
            return f"row {number}: the column {column!r} is declared as {kind}, but {problem}"
    return None


def _problem_of(value: Any, kind: TrainEvalDatasetColumnType) -> str | None:
    match kind:
        case TrainEvalDatasetColumnType.text | TrainEvalDatasetColumnType.media:
            return None if isinstance(value, str) else f"holds {_shown(value)}"
        case TrainEvalDatasetColumnType.number:
            return None if is_finite_number(value) else f"holds {_shown(value)}"
        case TrainEvalDatasetColumnType.dialog:
            try:
                _DIALOG.validate_python(value)
            except ValidationError as error:
                return f"is not a list of messages: {describe(error)}"
            return None
        case TrainEvalDatasetColumnType.json:
            return None


def _shown(value: Any) -> str:
    """What stands in a row, in the words of JSON."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:37] + '...'!r}"
    return f"the number {value!r}"[:60]


def _require_example_columns(dataset: TrainEvalDataset) -> None:
    if _dialog_column(dataset) is None and not _has_prompt_and_completion(dataset):
        columns = ", ".join(f"{name} ({kind})" for name, kind in dataset.columns.items())
        raise BadInput(
            f"examples stand in one column of type dialog, or in two of type text, prompt and completion; "
            f"this data set has: {columns}",
            param="dataset.columns",
        )


def _dialog_column(dataset: TrainEvalDataset) -> str | None:
    dialogs = [name for name, kind in dataset.columns.items() if kind == TrainEvalDatasetColumnType.dialog]
    return dialogs[0] if len(dialogs) == 1 else None


def _has_prompt_and_completion(dataset: TrainEvalDataset) -> bool:
    return all(dataset.columns.get(name) == TrainEvalDatasetColumnType.text for name in ("prompt", "completion"))

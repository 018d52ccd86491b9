"""Data sets: what is checked when they are registered, and how their rows and examples are read.

A data set is immutable: its rows are checked once, and the hash of its content is kept: with the data set where it is
registered, with the job where the job's request describes it. Whoever reads it later finds the same content, or
Conflict with both hashes.
"""

import datetime as dt
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit

from pydantic import FailFast, TypeAdapter, ValidationError

from stack import uploads
from stack.api.datasets import (
    CreateDatasetRequest,
    DatasetPreview,
    RegisteredDataset,
    TrainEvalDataset,
    TrainEvalDatasetColumnType,
)
from stack.api.messages import CompletionMessage, Message, UserMessage, text_of
from stack.api.wire import Request, describe
from stack.context import Context
from stack.dataset_content import Content, opened
from stack.dataset_files import Numbered, format_of, is_finite_number, read
from stack.errors import BadInput, Conflict, NotFound, StackError
from stack.inference import openai_message
from stack.row_ids import ID, SeenIds, id_of
from stack.store import now
from stack.store.datasets import FIELDS

# How many bad rows a refusal names.
MAX_BAD_ROWS = 10
MAX_PROBLEM = 300
MAX_PREVIEW_BYTES = 2**18
# How much a row is taken to have where nobody has counted them.
ROW_BYTES = 200
R = TypeVar("R", bound=Request)
T = TypeVar("T")
DIALOG: TypeAdapter[list[Message]] = TypeAdapter(Annotated[list[Message], FailFast()])
_ROW: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Checked:
    """A data set whose rows were read through: how many there are, and the bytes and the SHA-256 of its content.

    `misfit` is why the first row that does not have the shape that was asked for has it not. It is not known of a
    registered data set.
    """

    dataset: TrainEvalDataset
    rows: int
    bytes: int
    sha256: str
    misfit: str | None = None


@dataclass(frozen=True)
class Shape(Generic[T]):
    """What is wanted of each row of a data set.

    `columns_problem` says what is missing of the columns, if anything is. `read` makes of a row, by its number, what is
    wanted, or raises BadInput, naming the row. With `of_examples` every row that is an example fits. With
    `unique_ids` no two rows may have the same id, which stands in the column `id_column`.
    """

    columns_problem: Callable[[TrainEvalDataset], str | None]
    read: Callable[[int, dict[str, Any], TrainEvalDataset], T]
    of_examples: bool = False
    unique_ids: bool = False
    id_column: str = ID


@dataclass(frozen=True)
class Size:
    """About how much the rows of a data set are: their bytes as text, and their number."""

    text: int
    rows: int


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
            uuid=request.uuid,
            rows=found.rows,
            bytes=found.bytes,
            sha256=found.sha256,
            examples=found.misfit is None,
            created_at=now(),
        )
        if context.store.datasets.add(context.tenant, row):
            return _registered(row)
        known = context.store.datasets.get(context.tenant, request.uuid)
    assert known is not None
    registered = _registered(known)
    if _described(registered) != _pinned(request.dataset, registered.sha256):
        raise Conflict(f"there is another data set with the uuid {request.uuid!r}", param="uuid")
    return registered


def get(context: Context, uuid: str, field: str = "dataset_uuid") -> RegisteredDataset:
    """A registered data set. Raises NotFound."""
    return _registered(_row_of(context, uuid, field))


def page(context: Context, after: str | None, limit: int) -> list[RegisteredDataset]:
    """Data sets, newest first, behind the one with the uuid `after`. Raises NotFound."""
    last = _row_of(context, after, "after") if after is not None else None
    return [_registered(row) for row in context.store.datasets.page(context.tenant, last, limit)]


def preview(context: Context, uuid: str, most: int) -> DatasetPreview:
    """The first rows of a data set: at most so many, and of MAX_PREVIEW_BYTES together.

    Raises NotFound, and Conflict, with both hashes, where they are no longer what was registered.
    """
    registered = get(context, uuid)
    shown: list[dict[str, Any]] = []
    size = 0
    with opened(context, registered.content_url) as content:
        _require_same(content, registered.content_url, registered.sha256)
        for number, row in _rows(context, registered, content):
            if isinstance(row, str):
                raise BadInput(row)
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
    job_uuid = context.store.datasets.job_on(context.tenant, uuid, dataset.content_url if is_upload else None)
    if job_uuid is not None:
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
    return Checked(_described(found), found.rows, found.bytes, found.sha256)


def accept(context: Context, request: R, shape: Shape[Any]) -> tuple[R, list[Checked]]:
    """Checks the data sets of a job's request, whose rows must have a shape, before the job is accepted.

    Returns the request with the hashes of those that it describes, and what was found. Raises BadInput, naming the
    field and the row, where one has it not, and Conflict for a registered file that has changed.
    """
    found = {field: check_shape(context, reference, field, shape) for field, reference in _references(request).items()}
    hashes = {field: one.dataset for field, one in found.items() if not isinstance(getattr(request, field), str)}
    return request.model_copy(update=hashes), list(found.values())


def as_accepted(request: R, accepted: dict[str, Any]) -> R:
    """A request with the hashes of the data sets that a job was accepted with, so that it can be compared to the job's.

    A hash that the client gives stays: it may be another one.
    """
    hashes = {
        field: _pinned(reference, accepted[field].get("sha256"))
        for field, reference in _references(request).items()
        if not isinstance(reference, str) and isinstance(accepted.get(field), dict)
    }
    return request.model_copy(update=hashes)


def check_shape(context: Context, reference: TrainEvalDataset | str, field: str, shape: Shape[Any]) -> Checked:
    """The data set in this field of a request, each of whose rows has a shape.

    One that is described is read through. One that is registered was, so that where it is known to have the shape, only
    a local file that was touched since is read, for its hash; what has changed elsewhere is found out by whoever reads
    it. Raises BadInput, naming the field and the row, and Conflict.
    """
    try:
        if isinstance(reference, str):
            return _registered_of_shape(context, get(context, reference, field), shape)
        _require_columns(reference, shape)
        found = check(context, reference, shape)
        if found.misfit is not None:
            raise BadInput(found.misfit)
        return found
    except StackError as error:
        error.param = field
        raise


def read_as(context: Context, checked: Checked, shape: Shape[T]) -> Iterator[tuple[int, T]]:
    """The rows of a data set as their shape has them, with their numbers. Raises BadInput, naming the row."""
    _require_columns(checked.dataset, shape)
    for number, row in rows(context, checked):
        yield number, shape.read(number, row, checked.dataset)


def examples(context: Context, checked: Checked) -> Iterator[Example]:
    """The examples of a data set, in the order of its rows. Raises BadInput, naming the row, for one without answer."""
    return (example for _, example in read_as(context, checked, EXAMPLES))


def size(context: Context, checked: Checked) -> Size:
    """How much there is in a data set that was read through."""
    return Size(_text_bytes(context, checked.dataset.content_url, checked.bytes), checked.rows)


def sizes_before_reading(context: Context, request: Request) -> list[Size]:
    """How much there is in the data sets of a request, as far as that is known before they are read.

    Of one that is described and lies elsewhere nothing is.
    """
    return [_size_before_reading(context, reference) for reference in _references(request).values()]


def check(context: Context, dataset: TrainEvalDataset, shape: Shape[Any] | None = None) -> Checked:
    """Reads a data set through, and looks whether its rows have a shape (EXAMPLES by default).

    Raises BadInput with the first rows at fault, TooLarge, and Conflict where it does not have the hash that is given.
    """
    shape = shape or EXAMPLES
    with opened(context, dataset.content_url) as content, SeenIds() as seen:
        digest = _require_same(content, dataset.content_url, dataset.sha256)
        problems: list[str] = []
        misfit = shape.columns_problem(dataset)
        count = 0
        for count, row in _rows(context, dataset, content):  # the last number is how many there are
            if isinstance(row, str):
                problems.append(row[:MAX_PROBLEM])
                if len(problems) == MAX_BAD_ROWS:
                    break
            elif misfit is None:
                misfit = _misfit(count, row, dataset, shape, seen)
        if problems:
            more = "; it was read no further" if len(problems) == MAX_BAD_ROWS else ""
            raise BadInput("; ".join(problems) + more, param="dataset.content_url")
        if not count:
            raise BadInput(f"{dataset.content_url} has no rows", param="dataset.content_url")
        return Checked(_pinned(dataset, digest), count, content.bytes, digest, misfit)


def rows(context: Context, checked: Checked) -> Iterator[tuple[int, dict[str, Any]]]:
    """The declared columns of a data set's rows with their numbers, from 1.

    Raises Conflict, with both hashes, where the content is no longer what was checked.
    """
    with opened(context, checked.dataset.content_url) as content:
        _require_same(content, checked.dataset.content_url, checked.sha256)
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


def _described(registered: RegisteredDataset) -> TrainEvalDataset:
    return TrainEvalDataset(**registered.model_dump(include=set(TrainEvalDataset.model_fields)))


def _pinned(dataset: TrainEvalDataset, sha256: str | None) -> TrainEvalDataset:
    """A data set with the hash that it has been given, or with this one."""
    return dataset.model_copy(update={"sha256": dataset.sha256 or sha256})


def _references(request: Request) -> dict[str, TrainEvalDataset | str]:
    """The data sets that the request of a job names or describes, by field."""
    found = {field: getattr(request, field, None) for field in FIELDS}
    return {field: reference for field, reference in found.items() if reference is not None}


def _registered_of_shape(context: Context, registered: RegisteredDataset, shape: Shape[Any]) -> Checked:
    found = Checked(_described(registered), registered.rows, registered.bytes, registered.sha256)
    _require_columns(found.dataset, shape)
    has_ids = shape.unique_ids and shape.id_column in found.dataset.columns
    if registered.examples and shape.of_examples and not has_ids:
        _require_untouched(context, registered)
    else:
        with SeenIds() as seen:
            for number, row in rows(context, found):
                if (misfit := _misfit(number, row, found.dataset, shape, seen)) is not None:
                    raise BadInput(misfit)
    return found


def _require_untouched(context: Context, registered: RegisteredDataset) -> None:
    """Raises Conflict for a local file that has changed. Uploads cannot; what lies elsewhere is not asked for here."""
    if registered.content_url.startswith("file://"):
        with opened(context, registered.content_url) as content:
            touched = dt.datetime.fromtimestamp(content.touched_at, dt.UTC)
            if content.bytes != registered.bytes or touched >= dt.datetime.fromisoformat(registered.created_at):
                _require_same(content, registered.content_url, registered.sha256)


def _require_same(content: Content, url: str, sha256: str | None) -> str:
    """The hash of a content. Raises Conflict where it is not the one that it had."""
    digest = hashlib.file_digest(content.file, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a real file
    content.file.seek(0)
    if digest != (sha256 or digest):
        raise Conflict(
            f"the content of {url} has changed: it was checked with the SHA-256 {sha256}, and now has {digest}",
            param="dataset",
        )
    return digest


def _size_before_reading(context: Context, reference: TrainEvalDataset | str) -> Size:
    if isinstance(reference, str):
        return size(context, resolve(context, reference))
    url = reference.content_url
    if url.startswith("file://"):
        with opened(context, url) as content:
            packed = content.bytes
    elif url.startswith("upload://"):
        upload = context.store.datasets.get_upload(context.tenant, uploads.id_of(url))
        packed = upload["bytes"] if upload else 0
    else:
        return Size(0, 0)
    text = _text_bytes(context, url, packed)
    return Size(text, text // ROW_BYTES)


def _text_bytes(context: Context, url: str, bytes: int) -> int:
    """About how much the rows of a file are as text: what is packed is ten times as much, but never over the bound."""
    form = format_of(unquote(urlsplit(url).path))
    is_packed = form.compression is not None or form.kind == "Parquet"
    return min(10 * bytes, context.config.max_dataset_bytes) if is_packed else bytes


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
                DIALOG.validate_python(value)
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


def _example(number: int, row: dict[str, Any], dataset: TrainEvalDataset) -> Example:
    column = dialog_column(dataset)
    if column is None:
        return Example([dict(role="user", content=row["prompt"])], row["completion"])
    dialog = DIALOG.validate_python(row[column])
    if len(dialog) < 2 or not isinstance(dialog[-1], CompletionMessage):
        raise BadInput(f"row {number}: the dialog in {column!r} does not end with an answer of the assistant")
    try:
        messages = [_without_calls(message) for message in dialog]
    except BadInput as error:
        raise BadInput(f"row {number}: {error.message}") from error
    return Example(messages[:-1], messages[-1]["content"])


def _without_calls(message: Message) -> dict[str, Any]:
    if isinstance(message, CompletionMessage) and message.tool_calls:
        raise BadInput("an example's messages cannot hold tool calls; leave them out")
    return plain(message)


def plain(message: Message) -> dict[str, Any]:
    """A message in OpenAI's shape. Raises BadInput for one that is not of text alone."""
    contents = [message.content, message.context or ""] if isinstance(message, UserMessage) else [message.content]
    for content in contents:
        text_of(content)
    # Without the tool's name, which would stand, empty, in all messages of an Arrow column, and in what templates see.
    return {key: value for key, value in openai_message(message).items() if key != "name"}


def _misfit(
    number: int, row: dict[str, Any], dataset: TrainEvalDataset, shape: Shape[Any], seen: SeenIds
) -> str | None:
    try:
        shape.read(number, row, dataset)
        if shape.unique_ids and shape.id_column in dataset.columns:
            seen.add(number, id_of(number, row, dataset, shape.id_column))
    except BadInput as error:
        return error.message
    return None


def _require_columns(dataset: TrainEvalDataset, shape: Shape[Any]) -> None:
    problem = shape.columns_problem(dataset)
    if problem is not None:
        raise BadInput(problem, param="dataset.columns")


def _example_columns_problem(dataset: TrainEvalDataset) -> str | None:
    if dialog_column(dataset) is not None or has_text_columns(dataset):
        return None
    return (
        f"examples stand in one column of type dialog, or in two of type text, prompt and completion; "
        f"this data set has: {columns_of(dataset)}"
    )


def columns_of(dataset: TrainEvalDataset) -> str:
    """The columns of a data set with their types, for a message."""
    return ", ".join(f"{name} ({kind})" for name, kind in dataset.columns.items())


def dialog_column(dataset: TrainEvalDataset) -> str | None:
    """The one column of dialogs, if there is exactly one."""
    dialogs = [name for name, kind in dataset.columns.items() if kind == TrainEvalDatasetColumnType.dialog]
    return dialogs[0] if len(dialogs) == 1 else None


def has_text_columns(dataset: TrainEvalDataset) -> bool:
    """Whether there are texts `prompt` and `completion`."""
    return all(dataset.columns.get(name) == TrainEvalDatasetColumnType.text for name in ("prompt", "completion"))


# What evaluations ask and compare with, and what a model may learn from: see TrainEvalDataset.
EXAMPLES = Shape(_example_columns_problem, _example, of_examples=True)

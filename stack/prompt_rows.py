"""What is asked of a row: a dialog to answer, or a text to go on from or to read; and by which id it is known.

PROMPTS are dialogs of text alone: a column of type dialog, of which the messages before the last answer count where it
ends with one, or a text in the column prompt. CHATS may hold attachments, too. TEXTS are in a column of type text,
`text` or `prompt`.

No two rows may have the same id.
"""

from dataclasses import dataclass
from typing import Any

from stack.api.datasets import TrainEvalDataset, TrainEvalDatasetColumnType
from stack.api.messages import CompletionMessage, SystemMessage
from stack.datasets import DIALOG, Shape, columns_of, dialog_column, plain
from stack.errors import BadInput
from stack.row_ids import ID, id_of

_TEXT, _NUMBER = TrainEvalDatasetColumnType.text, TrainEvalDatasetColumnType.number
Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A dialog that ends with what is to be answered: messages of the Llama Stack."""

    id: str
    dialog: list[dict[str, Any]]


@dataclass(frozen=True)
class Text:
    id: str
    text: str


def _ids_problem(dataset: TrainEvalDataset) -> str | None:
    kind = dataset.columns.get(ID, _TEXT)
    return None if kind in (_TEXT, _NUMBER) else f"the column {ID!r} is of type {kind}; allowed: text, number"


def _prompt_columns_problem(dataset: TrainEvalDataset) -> str | None:
    if dialog_column(dataset) is not None or dataset.columns.get("prompt") == _TEXT:
        return _ids_problem(dataset)
    return (
        "prompts stand in one column of type dialog, or in one of type text, prompt; this data set has: "
        f"{columns_of(dataset)}"
    )


def _read_prompt(number: int, row: Row, dataset: TrainEvalDataset) -> Prompt:
    prompt, column = _read_chat(number, row, dataset), dialog_column(dataset)
    for message in DIALOG.validate_python(prompt.dialog) if column is not None else ():
        try:
            plain(message)
        except BadInput as error:
            raise BadInput(f"row {number}: {column}: {error.message}") from error
    return prompt


def _read_chat(number: int, row: Row, dataset: TrainEvalDataset) -> Prompt:
    name = id_of(number, row, dataset)
    column = dialog_column(dataset)
    if column is None:
        return Prompt(name, [dict(role="user", content=_not_empty(number, "prompt", row["prompt"]))])
    dialog = DIALOG.validate_python(row[column])
    if dialog and isinstance(dialog[-1], CompletionMessage):
        dialog = dialog[:-1]
    if not dialog or isinstance(dialog[-1], CompletionMessage | SystemMessage):
        raise BadInput(f"row {number}: the dialog in {column!r} has no message that could be answered")
    return Prompt(name, [message.model_dump(mode="json", exclude_none=True) for message in dialog])


def _text_columns_problem(dataset: TrainEvalDataset) -> str | None:
    if _text_column(dataset) is not None:
        return _ids_problem(dataset)
    return f"texts stand in a column of type text, text or prompt; this data set has: {columns_of(dataset)}"


def _read_text(number: int, row: Row, dataset: TrainEvalDataset) -> Text:
    column = _text_column(dataset)
    assert column is not None
    return Text(id_of(number, row, dataset), _not_empty(number, column, row[column]))


def _text_column(dataset: TrainEvalDataset) -> str | None:
    return next((name for name in ("text", "prompt") if dataset.columns.get(name) == _TEXT), None)


def _not_empty(number: int, column: str, text: str) -> str:
    if not text.strip():
        raise BadInput(f"row {number}: the text in {column!r} is empty")
    return text


PROMPTS = Shape(_prompt_columns_problem, _read_prompt, unique_ids=True)
CHATS = Shape(_prompt_columns_problem, _read_chat, unique_ids=True)
TEXTS = Shape(_text_columns_problem, _read_text, unique_ids=True)

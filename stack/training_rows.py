"""What a model learns from a row: what it should say, or which of two answers is the better one.

DIALOGS are for supervised fine-tuning: a column of type dialog, in which each message of the assistant that follows
another one is learned, two of type text, prompt and completion, or one of type text, `text`, of which every token is.

PREFERENCES are for preference optimization and reward models: the columns prompt (a text, or a dialog without its last
answer), chosen and rejected (each a text, or a dialog of the answer alone).
"""

from dataclasses import dataclass
from typing import Any

from stack.api.datasets import TrainEvalDataset, TrainEvalDatasetColumnType
from stack.api.messages import CompletionMessage
from stack.datasets import DIALOG, Shape, columns_of, dialog_column, has_text_columns, plain
from stack.errors import BadInput

_TEXT, _DIALOG = TrainEvalDatasetColumnType.text, TrainEvalDatasetColumnType.dialog
Row = dict[str, Any]


@dataclass(frozen=True)
class Dialog:
    """Messages in OpenAI's shape, at least one of them the assistant's; or a text, of which all is learned."""

    messages: list[dict[str, Any]]
    text: str | None = None


@dataclass(frozen=True)
class Preference:
    """Two answers to the same messages, of which people prefer the one."""

    messages: list[dict[str, Any]]
    chosen: str
    rejected: str


def _dialog_columns_problem(dataset: TrainEvalDataset) -> str | None:
    if dialog_column(dataset) is not None or has_text_columns(dataset) or dataset.columns.get("text") == _TEXT:
        return None
    return (
        "supervised fine-tuning needs one column of type dialog, or two of type text, prompt and completion, or one of "
        f"type text, text; this data set has: {columns_of(dataset)}"
    )


def _read_dialog(number: int, row: Row, dataset: TrainEvalDataset) -> Dialog:
    if (column := dialog_column(dataset)) is not None:
        messages = _messages(number, column, row[column])
        if not any(message["role"] == "assistant" for message in messages[1:]):
            raise BadInput(f"row {number}: the dialog in {column!r} has no answer of the assistant to learn")
        return Dialog(messages)
    if has_text_columns(dataset):
        prompt = dict(role="user", content=row["prompt"])
        return Dialog([prompt, dict(role="assistant", content=row["completion"])])
    if not row["text"]:
        raise BadInput(f"row {number}: the text is empty")
    return Dialog([], row["text"])


def _preference_columns_problem(dataset: TrainEvalDataset) -> str | None:
    if all(dataset.columns.get(name) in (_TEXT, _DIALOG) for name in ("prompt", "chosen", "rejected")):
        return None
    return (
        "preferences stand in the columns prompt, chosen and rejected, each of type text or dialog; this data set has: "
        f"{columns_of(dataset)}"
    )


def _read_preference(number: int, row: Row, dataset: TrainEvalDataset) -> Preference:
    if dataset.columns["prompt"] == _DIALOG:
        messages = _messages(number, "prompt", row["prompt"])
        if not messages or messages[-1]["role"] == "assistant":
            raise BadInput(f"row {number}: the dialog in 'prompt' does not end with what is to be answered")
    else:
        messages = [dict(role="user", content=row["prompt"])]
    chosen, rejected = (_answer(number, name, row[name], dataset) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadInput(f"row {number}: the chosen and the rejected answer are the same")
    return Preference(messages, chosen, rejected)


def _answer(number: int, column: str, value: Any, dataset: TrainEvalDataset) -> str:
    if dataset.columns[column] == _TEXT:
        return str(value)
    dialog = DIALOG.validate_python(value)
    if len(dialog) != 1 or not isinstance(dialog[0], CompletionMessage) or dialog[0].tool_calls:
        raise BadInput(f"row {number}: the dialog in {column!r} is not one answer of the assistant in words")
    content: str = _messages(number, column, value)[0]["content"]
    return content


def _messages(number: int, column: str, value: Any) -> list[dict[str, Any]]:
    try:
        return [plain(message) for message in DIALOG.validate_python(value)]
    except BadInput as error:
        raise BadInput(f"row {number}: {column}: {error.message}") from error


DIALOGS = Shape(_dialog_columns_problem, _read_dialog, of_examples=True)
PREFERENCES = Shape(_preference_columns_problem, _read_preference)

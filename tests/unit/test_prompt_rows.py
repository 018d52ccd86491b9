"""What is asked of rows, and the ids by which they are known."""

from pathlib import Path
from typing import Any

import pytest

from stack import datasets, prompt_rows
from stack.api.datasets import TrainEvalDataset
from stack.context import Context
from stack.datasets import Shape
from stack.errors import BadInput
from stack.prompt_rows import PROMPTS, TEXTS, Prompt, Text, require_unique_ids
from tests.samples import DIALOG, dataset, write_rows

QUESTION = {"role": "user", "content": "Where?"}


def read(context: Context, home: Path, shape: Shape[Any], rows: list[dict[str, Any]], **columns: str) -> list[Any]:
    return [value for _, value in datasets.read_as(context, checked(context, home, rows, **columns), shape)]


def checked(context: Context, home: Path, rows: list[dict[str, Any]], **columns: str) -> datasets.Checked:
    described = dataset(write_rows(home / "data" / "rows.jsonl", rows), **columns)
    return datasets.check(context, TrainEvalDataset.model_validate(described))


def test_a_dialog_is_asked_without_its_last_answer(context: Context, home: Path) -> None:
    rows = [{"dialog": DIALOG}, {"dialog": DIALOG[:2]}, {"dialog": [*DIALOG, QUESTION]}]
    first, second, third = read(context, home, PROMPTS, rows)
    assert first == Prompt("1", DIALOG[:2])
    assert second == Prompt("2", DIALOG[:2])
    assert [message["role"] for message in third.dialog] == ["system", "user", "assistant", "user"]


def test_a_prompt_is_what_a_user_says(context: Context, home: Path) -> None:
    rows = [{"prompt": "Where?", "completion": "There"}]
    (found,) = read(context, home, PROMPTS, rows, prompt="text", completion="text")
    assert found == Prompt("1", [QUESTION])


@pytest.mark.parametrize("column", ["text", "prompt"])
def test_a_text_is_taken_as_it_is(context: Context, home: Path, column: str) -> None:
    assert read(context, home, TEXTS, [{column: " a "}], **{column: "text"}) == [Text("1", " a ")]


@pytest.mark.parametrize(
    ("kind", "values", "ids"), [("text", ["b", "a"], ["b", "a"]), ("number", [5, 7.0], ["5", "7"])]
)
def test_a_row_is_known_by_its_id(context: Context, home: Path, kind: str, values: list[Any], ids: list[str]) -> None:
    rows = [{"id": value, "text": "a"} for value in values]
    assert [one.id for one in read(context, home, TEXTS, rows, id=kind, text="text")] == ids


@pytest.mark.parametrize(
    ("shape", "columns", "words"),
    [
        (PROMPTS, {"question": "text"}, "prompts stand in one column of type dialog, .* has: question"),
        (PROMPTS, {"prompt": "number"}, "has: prompt .number"),
        (TEXTS, {"dialog": "dialog"}, "texts stand in a column of type text, text or prompt"),
        (TEXTS, {"text": "text", "id": "json"}, "the column 'id' is of type json; allowed: text, number"),
        (PROMPTS, {"prompt": "text", "id": "json"}, "the column 'id' is of type json"),
    ],
)
def test_other_columns_are_refused(shape: Shape[Any], columns: dict[str, Any], words: str) -> None:
    described = TrainEvalDataset(columns=columns, content_url="upload://a/b.jsonl")
    with pytest.raises(BadInput, match=words):
        raise BadInput(shape.columns_problem(described) or "")


@pytest.mark.parametrize(
    ("shape", "row", "columns", "words"),
    [
        (PROMPTS, {"dialog": []}, {}, "row 1: the dialog in 'dialog' has no message that could be answered"),
        (PROMPTS, {"dialog": DIALOG[:1]}, {}, "no message that could be answered"),
        (PROMPTS, {"dialog": [DIALOG[2]]}, {}, "no message that could be answered"),
        (PROMPTS, {"prompt": "  "}, {"prompt": "text"}, "row 1: the text in 'prompt' is empty"),
        (TEXTS, {"text": ""}, {"text": "text"}, "row 1: the text in 'text' is empty"),
        (TEXTS, {"text": "a", "id": ""}, {"text": "text", "id": "text"}, "row 1: the id has 0 characters"),
        (
            TEXTS,
            {"text": "a", "id": "x" * 1_001},
            {"text": "text", "id": "text"},
            "1001 characters; allowed: 1 to 1000",
        ),
        (
            PROMPTS,
            {"dialog": [{"role": "user", "content": {"content": "a", "mime_type": "text/plain"}}]},
            {},
            "row 1: dialog: an attachment cannot be used here",
        ),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(
    context: Context, home: Path, shape: Shape[Any], row: dict[str, Any], columns: dict[str, str], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        read(context, home, shape, [row], **columns)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("text", ["a", "b", "c", "b"], "the rows 2 and 4 have the same id, 'b'"),
        ("number", [1, 2, 1.0], "the rows 1 and 3 have the same id, '1'"),
    ],
)
def test_two_rows_of_the_same_id_are_refused(
    context: Context, home: Path, kind: str, values: list[Any], words: str
) -> None:
    rows = [{"id": value, "text": "a"} for value in values]
    with pytest.raises(BadInput, match=words) as caught:
        require_unique_ids(context, checked(context, home, rows, id=kind, text="text"))
    assert caught.value.param == "dataset"


def test_ids_that_differ_pass_and_so_does_a_data_set_without_them(context: Context, home: Path) -> None:
    rows = [{"id": value, "text": "a"} for value in ("a", "A", "b ", "b")]
    require_unique_ids(context, checked(context, home, rows, id="text", text="text"))
    require_unique_ids(context, checked(context, home, rows, text="text"))


def test_the_module_names_its_column() -> None:
    assert prompt_rows.ID == "id"

"""What is asked of rows, and the ids by which they are known."""

from pathlib import Path
from typing import Any

import pytest

from stack import datasets, row_ids
from stack.api.datasets import CreateDatasetRequest, TrainEvalDataset
from stack.context import Context
from stack.datasets import Shape
from stack.errors import BadInput
from stack.prompt_rows import CHATS, PROMPTS, TEXTS, Prompt, Text
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
    described = dataset(write_rows(home / "data" / "rows.jsonl", [{"id": value, "text": "a"} for value in values]))
    data = TrainEvalDataset.model_validate(described | {"columns": {"id": kind, "text": "text"}})
    datasets.create(context, CreateDatasetRequest(uuid="registered", dataset=data))
    for reference in (data, "registered"):
        with pytest.raises(BadInput, match=words) as caught:
            datasets.check_shape(context, reference, "dataset", TEXTS)
        assert caught.value.param == "dataset"


IDS = ["a", "A", "b ", "b", "é", "e\u0301", "a\u0001", "\U0001f600"]


def test_ids_that_differ_pass_and_so_does_a_data_set_without_them(context: Context, home: Path) -> None:
    file = write_rows(home / "data" / "rows.jsonl", [{"id": value, "text": "a"} for value in IDS])
    for columns in ({"id": "text", "text": "text"}, {"text": "text"}):
        data = TrainEvalDataset.model_validate(dataset(file, **columns))
        assert datasets.check_shape(context, data, "dataset", TEXTS).rows == len(IDS)


def test_ids_are_looked_at_in_the_one_reading(context: Context, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    really = datasets.read
    monkeypatch.setattr(datasets, "read", lambda *given: (read.append(1), really(*given))[1])
    file = write_rows(home / "data" / "rows.jsonl", [{"id": "a", "text": "a"}, {"id": "b", "text": "a"}])
    data = TrainEvalDataset.model_validate(dataset(file, id="text", text="text"))
    datasets.check_shape(context, data, "dataset", TEXTS)
    assert len(read) == 1
    assert list((home / "uploads").iterdir()) == []


ATTACHED = {"role": "user", "content": ["See", {"content": "a text", "mime_type": "text/plain"}]}


def test_chats_may_hold_attachments_and_prompts_may_not(context: Context, home: Path) -> None:
    rows = [{"dialog": [ATTACHED]}]
    (found,) = read(context, home, CHATS, rows)
    assert found.dialog == [ATTACHED]
    with pytest.raises(BadInput, match="row 1: dialog: an attachment cannot be used here"):
        read(context, home, PROMPTS, rows)


def test_the_module_names_its_column() -> None:
    assert row_ids.ID == "id"

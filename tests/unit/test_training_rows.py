"""What a model learns from a row: which columns and rows are right, and what is said of those that are not."""

from pathlib import Path
from typing import Any

import pytest

from stack import datasets
from stack.api.datasets import CreateDatasetRequest, TrainEvalDataset
from stack.api.post_training import PostTrainingSFTRequest
from stack.context import Context
from stack.datasets import EXAMPLES, Checked, Shape
from stack.errors import BadInput, Conflict
from stack.training_rows import DIALOGS, PREFERENCES, Dialog, Preference
from tests.samples import DIALOG, dataset, fine_tuning, write_rows

SYSTEM, USER, ASSISTANT = DIALOG
CALL = {"call_id": "call-1", "tool_name": "brave_search", "arguments": {"query": "Île-de-France"}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "ipython", "call_id": "call-1", "tool_name": "brave_search", "content": "Paris it is"}
IMAGE = {"content": "https://example.com/a.png", "mime_type": "image/png"}
TEXTS = {"prompt": "text", "chosen": "text", "rejected": "text"}
PAIR = {"prompt": "Which?", "chosen": "this", "rejected": "that"}


@pytest.fixture
def data(context: Context, home: Path) -> Path:
    """The folder whose files may be read."""
    return home / "data"


def described(file: Path, **columns: str) -> TrainEvalDataset:
    return TrainEvalDataset.model_validate(dataset(file, **columns))


def register(context: Context, uuid: str, file: Path, **columns: str) -> None:
    request = {"uuid": uuid, "dataset": dataset(file, **columns)}
    datasets.create(context, CreateDatasetRequest.model_validate(request))


def read(context: Context, data: Path, shape: Shape[Any], rows: list[dict[str, Any]], **columns: str) -> list[Any]:
    """What a shape makes of rows, which are accepted first."""
    reference = described(write_rows(data / "rows.jsonl", rows), **columns)
    checked = datasets.check_shape(context, reference, "dataset", shape)
    numbered = list(datasets.read_as(context, checked, shape))
    assert [number for number, _ in numbered] == list(range(1, len(rows) + 1))
    return [value for _, value in numbered]


def refusal(context: Context, data: Path, shape: Shape[Any], rows: list[dict[str, Any]], **columns: str) -> str:
    """Why rows are not accepted. Whoever reads them all the same is told the same."""
    reference = described(write_rows(data / "rows.jsonl", rows), **columns)
    with pytest.raises(BadInput) as refused:
        datasets.check_shape(context, reference, "validation_dataset", shape)
    assert refused.value.param == "validation_dataset"
    with pytest.raises(BadInput) as caught:
        list(datasets.read_as(context, datasets.check(context, reference), shape))
    assert caught.value.message == refused.value.message
    return refused.value.message


# Dialogs


def test_a_dialog_has_all_of_its_messages_whoever_speaks_last(context: Context, data: Path) -> None:
    several = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "And of Spain?"}, {**ASSISTANT, "content": ""}]
    found = read(context, data, DIALOGS, [{"dialog": DIALOG}, {"dialog": several}, {"dialog": several[:4]}])
    assert found == [Dialog(DIALOG), Dialog(several), Dialog(several[:4])]


def test_the_dialog_column_may_have_any_name_beside_others(context: Context, data: Path) -> None:
    found = read(context, data, DIALOGS, [{"talk": DIALOG, "text": "x"}], talk="dialog", text="text")
    assert found == [Dialog(DIALOG)]


def test_calls_of_tools_and_their_results_are_in_openais_shape(context: Context, data: Path) -> None:
    (found,) = read(context, data, DIALOGS, [{"dialog": [USER, CALLING, RESULT, ASSISTANT]}])
    function = {"name": "brave_search", "arguments": '{"query": "Île-de-France"}'}
    assert found.messages == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call-1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "Paris it is"},
        ASSISTANT,
    ]


def test_a_users_context_stands_after_what_he_says(context: Context, data: Path) -> None:
    (found,) = read(context, data, DIALOGS, [{"dialog": [{**USER, "context": "An atlas."}, ASSISTANT]}])
    assert found.messages[0] == {"role": "user", "content": f"{USER['content']}\n\nAn atlas."}


def test_a_prompt_and_its_completion_are_a_dialog(context: Context, data: Path) -> None:
    rows = [{"prompt": "1 + 1?", "completion": "2"}, {"prompt": "", "completion": ""}]
    found = read(context, data, DIALOGS, rows, prompt="text", completion="text")
    assert found == [
        Dialog([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}])
        for row in rows
    ]


def test_a_text_is_learned_as_it_is(context: Context, data: Path) -> None:
    assert read(context, data, DIALOGS, [{"text": " Zürich\n"}], text="text") == [Dialog([], " Zürich\n")]


@pytest.mark.parametrize(
    "columns",
    [
        {"x": "text"},
        {"text": "json"},
        {"prompt": "text", "completion": "number"},
        {"completion": "text"},
        {"one": "dialog", "other": "dialog"},
        TEXTS,
    ],
)
def test_other_columns_hold_no_dialogs_and_are_named(context: Context, data: Path, columns: dict[str, str]) -> None:
    values = {"dialog": DIALOG, "number": 1, "text": "x", "json": {}}
    row = {name: values[kind] for name, kind in columns.items()}
    message = refusal(context, data, DIALOGS, [row], **columns)
    assert "one column of type dialog, or two of type text, prompt and completion, or one of type text, text" in message
    assert message.endswith("has: " + ", ".join(f"{name} ({kind})" for name, kind in columns.items()))


@pytest.mark.parametrize("messages", [[], [ASSISTANT], [SYSTEM, USER]])
def test_a_dialog_without_an_answer_is_named(context: Context, data: Path, messages: list[dict[str, Any]]) -> None:
    message = refusal(context, data, DIALOGS, [{"dialog": DIALOG}, {"dialog": messages}])
    assert message == "row 2: the dialog in 'dialog' has no answer of the assistant to learn"


def test_a_dialog_with_an_attachment_is_named(context: Context, data: Path) -> None:
    shown = {"dialog": [{"role": "user", "content": ["Look:", IMAGE]}, ASSISTANT]}
    message = refusal(context, data, DIALOGS, [{"dialog": DIALOG}, shown])
    assert message == "row 2: dialog: an attachment cannot be used here; allowed: text"


def test_an_empty_text_is_named(context: Context, data: Path) -> None:
    assert refusal(context, data, DIALOGS, [{"text": "x"}, {"text": ""}], text="text") == "row 2: the text is empty"


# Preferences


def test_preferences_of_texts_answer_a_user(context: Context, data: Path) -> None:
    found = read(context, data, PREFERENCES, [PAIR, PAIR | {"chosen": ""}], **TEXTS)
    asked = [{"role": "user", "content": "Which?"}]
    assert found == [Preference(asked, "this", "that"), Preference(asked, "", "that")]


def test_preferences_of_dialogs_answer_what_was_said(context: Context, data: Path) -> None:
    row = {
        "prompt": [SYSTEM, USER, CALLING, RESULT],
        "chosen": [ASSISTANT],
        "rejected": [{**ASSISTANT, "content": "?"}],
    }
    (found,) = read(context, data, PREFERENCES, [row], prompt="dialog", chosen="dialog", rejected="dialog")
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool"]
    assert found.messages[2]["tool_calls"][0]["function"]["name"] == "brave_search"
    assert (found.chosen, found.rejected) == ("Paris", "?")


def test_columns_of_preferences_may_be_of_both_types(context: Context, data: Path) -> None:
    row = {"prompt": DIALOG[:2], "chosen": [ASSISTANT], "rejected": "Lyon"}
    found = read(context, data, PREFERENCES, [row], prompt="dialog", chosen="dialog", rejected="text")
    assert found == [Preference(DIALOG[:2], "Paris", "Lyon")]


@pytest.mark.parametrize(
    "columns", [{"prompt": "text", "chosen": "text"}, TEXTS | {"rejected": "json"}, {"dialog": "dialog"}]
)
def test_other_columns_hold_no_preferences_and_are_named(context: Context, data: Path, columns: dict[str, str]) -> None:
    row = {name: DIALOG if kind == "dialog" else "x" for name, kind in columns.items()}
    message = refusal(context, data, PREFERENCES, [row], **columns)
    assert "the columns prompt, chosen and rejected, each of type text or dialog" in message
    assert message.endswith("has: " + ", ".join(f"{name} ({kind})" for name, kind in columns.items()))


@pytest.mark.parametrize("prompt", [[], DIALOG])
def test_a_prompt_that_asks_for_no_answer_is_named(context: Context, data: Path, prompt: list[dict[str, Any]]) -> None:
    rows = [PAIR | {"prompt": [USER]}, PAIR | {"prompt": prompt}]
    message = refusal(context, data, PREFERENCES, rows, prompt="dialog", chosen="text", rejected="text")
    assert message == "row 2: the dialog in 'prompt' does not end with what is to be answered"


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize("answer", [[], [USER], [USER, ASSISTANT], [CALLING]])
def test_what_is_not_one_answer_in_words_is_named(
    context: Context, data: Path, column: str, answer: list[dict[str, Any]]
) -> None:
    right = {"prompt": "Which?", "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "Lyon"}]}
    columns = {"prompt": "text", "chosen": "dialog", "rejected": "dialog"}
    message = refusal(context, data, PREFERENCES, [right, right | {column: answer}], **columns)
    assert message == f"row 2: the dialog in {column!r} is not one answer of the assistant in words"


def test_an_attachment_in_a_preference_is_named(context: Context, data: Path) -> None:
    rows = [PAIR | {"prompt": [USER]}, PAIR | {"prompt": [{"role": "user", "content": IMAGE}]}]
    message = refusal(context, data, PREFERENCES, rows, prompt="dialog", chosen="text", rejected="text")
    assert message == "row 2: prompt: an attachment cannot be used here; allowed: text"


@pytest.mark.parametrize("kind", ["text", "dialog"])
def test_between_two_answers_that_are_the_same_none_can_be_preferred(context: Context, data: Path, kind: str) -> None:
    same = "Paris" if kind == "text" else [ASSISTANT]
    rows = [PAIR | {"chosen": same, "rejected": same}]
    message = refusal(context, data, PREFERENCES, rows, prompt="text", chosen=kind, rejected=kind)
    assert message == "row 1: the chosen and the rejected answer are the same"


# Shapes of registered and of described data sets


def test_registered_examples_are_dialogs_without_being_read_again(
    context: Context, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "1 + 1?", "completion": "2"}]
    register(context, "talks", write_rows(data / "a.jsonl", [{"dialog": DIALOG}]))
    register(context, "texts", write_rows(data / "b.jsonl", rows), prompt="text", completion="text")
    monkeypatch.setattr(datasets, "read", None)
    assert datasets.check_shape(context, "talks", "dataset", DIALOGS).rows == 1
    assert datasets.check_shape(context, "texts", "dataset", DIALOGS).rows == 1


def test_registered_dialogs_that_are_no_examples_are_read_through(context: Context, data: Path) -> None:
    register(context, "right", write_rows(data / "a.jsonl", [{"dialog": [USER, CALLING, RESULT]}]))
    register(context, "wrong", write_rows(data / "b.jsonl", [{"dialog": DIALOG}, {"dialog": DIALOG[:2]}]))
    register(context, "texts", write_rows(data / "c.jsonl", [{"text": "x"}, {"text": ""}]), text="text")
    assert not any(datasets.get(context, uuid).examples for uuid in ("right", "wrong", "texts"))
    assert datasets.check_shape(context, "right", "dataset", DIALOGS).rows == 1
    for uuid, words in (
        ("wrong", "row 2: the dialog in 'dialog' has no answer"),
        ("texts", "row 2: the text is empty"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            datasets.check_shape(context, uuid, "dataset", DIALOGS)
        assert caught.value.param == "dataset"


def test_registered_preferences_are_read_through(context: Context, data: Path) -> None:
    register(context, "right", write_rows(data / "a.jsonl", [PAIR]), **TEXTS)
    register(context, "wrong", write_rows(data / "b.jsonl", [PAIR, PAIR | {"chosen": "that"}]), **TEXTS)
    found = datasets.check_shape(context, "right", "dataset", PREFERENCES)
    assert found == datasets.resolve(context, "right")
    assert [value.chosen for _, value in datasets.read_as(context, found, PREFERENCES)] == ["this"]
    with pytest.raises(BadInput, match="row 2: the chosen and the rejected answer are the same"):
        datasets.check_shape(context, "wrong", "dataset", PREFERENCES)


def test_that_rows_are_examples_says_nothing_of_preferences(context: Context, data: Path) -> None:
    columns = TEXTS | {"completion": "text"}
    register(context, "a", write_rows(data / "a.jsonl", [PAIR | {"completion": "x", "chosen": "that"}]), **columns)
    assert datasets.get(context, "a").examples
    with pytest.raises(BadInput, match="row 1: the chosen and the rejected answer are the same"):
        datasets.check_shape(context, "a", "dataset", PREFERENCES)


def test_registered_columns_of_another_shape_are_refused_with_the_field(context: Context, data: Path) -> None:
    register(context, "a", write_rows(data / "a.jsonl", [{"dialog": DIALOG}]))
    with pytest.raises(BadInput, match=r"prompt, chosen and rejected.* has: dialog \(dialog\)$") as caught:
        datasets.check_shape(context, "a", "validation_dataset", PREFERENCES)
    assert caught.value.param == "validation_dataset"


@pytest.mark.parametrize(("shape", "row"), [(DIALOGS, {"dialog": DIALOG}), (PREFERENCES, PAIR)])
def test_a_registered_file_that_has_changed_is_a_conflict(
    context: Context, data: Path, shape: Shape[Any], row: dict[str, Any]
) -> None:
    columns = TEXTS if shape is PREFERENCES else {}
    file = write_rows(data / "a.jsonl", [row])
    register(context, "a", file, **columns)
    write_rows(file, [row, row])
    with pytest.raises(Conflict, match="has changed") as caught:
        datasets.check_shape(context, "a", "dataset", shape)
    assert caught.value.param == "dataset"


def test_a_job_is_accepted_with_the_hashes_of_what_it_describes(context: Context, data: Path) -> None:
    register(context, "a", write_rows(data / "a.jsonl", [{"dialog": DIALOG}]))
    file = write_rows(data / "b.jsonl", [{"dialog": [USER, CALLING]}, {"dialog": DIALOG}])
    body = fine_tuning(dataset(file), validation_dataset="a")
    request, found = datasets.accept(context, PostTrainingSFTRequest.model_validate(body), DIALOGS)
    assert isinstance(request.dataset, TrainEvalDataset)
    assert request.dataset.sha256 == found[0].sha256
    assert request.validation_dataset == "a"
    assert [one.rows for one in found] == [2, 1]


def test_a_job_is_refused_with_the_field_of_what_does_not_fit(context: Context, data: Path) -> None:
    right = dataset(write_rows(data / "a.jsonl", [{"dialog": DIALOG}]))
    wrong = dataset(write_rows(data / "b.jsonl", [{"dialog": DIALOG}, {"dialog": [USER]}]))
    body = fine_tuning(right, validation_dataset=wrong)
    with pytest.raises(BadInput, match="row 2: the dialog in 'dialog' has no answer") as caught:
        datasets.accept(context, PostTrainingSFTRequest.model_validate(body), DIALOGS)
    assert caught.value.param == "validation_dataset"


def test_a_check_says_of_any_shape_which_row_is_the_first_misfit(context: Context, data: Path) -> None:
    file = write_rows(data / "a.jsonl", [{"dialog": DIALOG}, {"dialog": [USER, CALLING]}, {"dialog": [USER]}])

    def misfit(shape: Shape[Any]) -> str:
        found: Checked = datasets.check(context, described(file), shape)
        assert found.rows == 3
        return found.misfit or ""

    assert misfit(EXAMPLES).startswith("row 2: ")
    assert misfit(DIALOGS).startswith("row 3: ")
    assert misfit(PREFERENCES).startswith("preferences stand in the columns")

"""Data sets as jobs read them: by the read task of Ray Data's source, which is sent to a worker."""

import json
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stack import datasets, uploads
from stack.api.datasets import TrainEvalDataset
from stack.context import Context
from stack.datasets import EXAMPLES, Shape
from stack.errors import BadInput, Conflict
from stack.prompt_rows import TEXTS, Text
from stack.training_rows import DIALOGS, PREFERENCES
from tests.samples import DIALOG, dataset, write_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import dataset_source
    from jobs.dataset_source import Rows

QUESTION = {"role": "user", "content": "Which of them?"}


def dialog(number: int) -> dict[str, Any]:
    return {
        "dialog": [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": str(number)}]
    }


@pytest.fixture
def file(home: Path) -> Path:
    return write_rows(home / "data" / "a.jsonl", [dialog(number) for number in range(1, 26)])


def checked(context: Context, file: Path, shape: Shape[Any] = EXAMPLES, **columns: str) -> datasets.Checked:
    return datasets.check(context, TrainEvalDataset.model_validate(dataset(file, **columns)), shape)


def blocks(source: Rows) -> list[Any]:
    """What the one read task gives, as a worker gets it."""
    (task,) = source.get_read_tasks(parallelism=8)
    return list(pickle.loads(pickle.dumps(task))())


def values(source: Rows) -> list[Any]:
    return [json.loads(row["value"]) for block in blocks(source) for row in block.to_pylist()]


def test_rows_are_read_in_bounded_blocks(context: Context, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_source, "BLOCK_ROWS", 10)
    found = blocks(Rows(context, checked(context, file), EXAMPLES))
    assert [block.num_rows for block in found] == [10, 10, 5]
    assert all(block.schema == dataset_source.SCHEMA for block in found)
    rows = [row for block in found for row in block.to_pylist()]
    assert [row["row"] for row in rows] == list(range(1, 26))
    assert rows[6].keys() == {"row", "value"}
    assert json.loads(rows[6]["value"]) == {"messages": [{"role": "user", "content": "question 7"}], "answer": "7"}


def test_blocks_are_bounded_in_bytes_too(context: Context, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_source, "BLOCK_BYTES", 200)
    found = blocks(Rows(context, checked(context, file), EXAMPLES))
    assert max(block.num_rows for block in found) <= 3
    assert sum(block.num_rows for block in found) == 25


def test_rows_of_these_numbers_are_left_out(context: Context, file: Path) -> None:
    answered = frozenset(range(1, 26)) - {3, 25}
    found = blocks(Rows(context, checked(context, file), EXAMPLES, answered))
    assert [row["row"] for block in found for row in block.to_pylist()] == [3, 25]
    assert blocks(Rows(context, checked(context, file), EXAMPLES, frozenset(range(1, 26)))) == []


def test_the_value_is_what_the_shape_makes_of_a_row(context: Context, home: Path) -> None:
    dialogs = write_rows(home / "data" / "b.jsonl", [{"dialog": DIALOG}])
    assert values(Rows(context, checked(context, dialogs, DIALOGS), DIALOGS)) == [{"messages": DIALOG, "text": None}]
    texts = write_rows(home / "data" / "c.jsonl", [{"text": "Zürich 🏔"}])
    source = Rows(context, checked(context, texts, DIALOGS, text="text"), DIALOGS)
    assert values(source) == [{"messages": [], "text": "Zürich 🏔"}]
    pair = {"prompt": [QUESTION], "chosen": "this", "rejected": "that"}
    preferences = write_rows(home / "data" / "d.jsonl", [pair])
    columns = {"prompt": "dialog", "chosen": "text", "rejected": "text"}
    source = Rows(context, checked(context, preferences, PREFERENCES, **columns), PREFERENCES)
    assert values(source) == [{"messages": [QUESTION], "chosen": "this", "rejected": "that"}]


def test_a_row_without_the_shape_is_named(context: Context, home: Path) -> None:
    file = write_rows(home / "data" / "b.jsonl", [dialog(1), {"dialog": DIALOG[:2]}])
    with pytest.raises(BadInput, match="row 2: the dialog in 'dialog' has no answer"):
        blocks(Rows(context, checked(context, file), DIALOGS))


def test_content_that_has_changed_is_not_read(context: Context, file: Path) -> None:
    source = Rows(context, checked(context, file), EXAMPLES)
    write_rows(file, [dialog(1)])
    with pytest.raises(Conflict, match="has changed"):
        blocks(source)


def test_the_source_reads_in_the_name_of_its_tenant(context: Context, file: Path) -> None:
    acme = context.of_tenant("acme")
    with uploads.receive(acme, "a.jsonl") as upload:
        upload.write(file.read_bytes())
        url = upload.publish().content_url
    described = TrainEvalDataset.model_validate({"columns": {"dialog": "dialog"}, "content_url": url})
    found = blocks(Rows(acme, datasets.check(acme, described), EXAMPLES))
    assert sum(block.num_rows for block in found) == 25


@dataclass(frozen=True)
class Word:
    word: str


def as_words(value: Text) -> Iterator[Word]:
    return (Word(word) for word in value.text.split())


def test_rows_may_be_split_into_parts_that_are_numbered_through(context: Context, home: Path) -> None:
    texts = write_rows(home / "data" / "d.jsonl", [{"text": "a b"}, {"text": "c"}, {"text": "d e"}])
    found = checked(context, texts, TEXTS, text="text")
    parts = [row for block in blocks(Rows(context, found, TEXTS, {2, 3}, as_words)) for row in block.to_pylist()]
    assert [(row["row"], json.loads(row["value"])) for row in parts] == [
        (1, {"word": "a"}), (4, {"word": "d"}), (5, {"word": "e"}),
    ]  # fmt: skip
    assert sum(1 for _ in dataset_source.numbered(context, found, TEXTS, as_words)) == 5

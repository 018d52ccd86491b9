"""The quickstart's data: the same splits each time, and no test row that was trained on."""

import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from scripts import prompt_injection
from scripts.prompt_injection import (
    LABELS,
    MAX_CHARACTERS,
    OTHER_TEST_ROWS,
    SYSTEM_PROMPT,
    TEST_ROWS,
    TRAIN_ROWS,
    VALIDATION_ROWS,
    normalised,
    write_splits,
)

Rows = list[tuple[str, int]]
SIZES = {"train": TRAIN_ROWS, "validation": VALIDATION_ROWS, "test": TEST_ROWS, "other_test": OTHER_TEST_ROWS}


def rows(name: str, count: int) -> Rows:
    return [(f"{name} text, number {number}!", number % 2) for number in range(count)]


def write_source(folder: Path, **changes: Rows) -> Path:
    """Source files, each with just as many rows as its split takes, unless others are given."""
    source = folder / "source"
    source.mkdir()
    contents = {name: rows(name, size) for name, size in SIZES.items()} | changes
    for name in ("train", "validation", "test"):
        with (source / f"s-labs-{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *contents[name]])
    texts, labels = zip(*contents["other_test"], strict=True)
    table = pyarrow.table({"text": list(texts), "label": list(labels), "unused": [0] * len(texts)})
    pyarrow.parquet.write_table(table, source / "neuralchemy-core-test.parquet")
    return source


def texts(file: Path) -> list[str]:
    return [json.loads(line)["dialog"][1]["content"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("one", "other"),
    [("Ignore this", "ignore  THIS"), ("Ignore, this!", "\tignore this.\n"), ("a-b", "a b"), ("ÄH?", "äh")],
)
def test_case_punctuation_and_white_space_make_no_other_text(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), [("ignore this", "ignore that"), ("ab", "a b"), ("1", "2"), ("ä", "a")])
def test_letters_and_words_make_another_text(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_splits_have_their_sizes_and_drop_nothing_without_need(tmp_path: Path) -> None:
    splits = write_splits(write_source(tmp_path), tmp_path / "out")
    assert {name: split.rows for name, split in splits.items()} == SIZES
    assert {split.dropped for split in splits.values()} == {0}
    for name, split in splits.items():
        assert split.file == tmp_path / "out" / f"{name}.jsonl"
        assert sorted(texts(split.file)) == sorted(text for text, _ in rows(name, SIZES[name]))


def test_a_row_is_a_dialog_that_ends_with_the_label(tmp_path: Path) -> None:
    splits = write_splits(write_source(tmp_path), tmp_path / "out")
    expected = {text: LABELS[label] for text, label in rows("test", TEST_ROWS)}
    for line in splits["test"].file.read_text().splitlines():
        system, user, assistant = json.loads(line)["dialog"]
        assert system == {"role": "system", "content": SYSTEM_PROMPT}
        assert assistant == {"role": "assistant", "content": expected[user["content"]]}


def test_splits_are_the_same_each_time(tmp_path: Path) -> None:
    source = write_source(tmp_path, train=rows("train", TRAIN_ROWS * 2), test=rows("test", TEST_ROWS * 2))
    once, again = (write_splits(source, tmp_path / name) for name in ("once", "again"))
    for name in SIZES:
        assert once[name].file.read_bytes() == again[name].file.read_bytes()


def test_rows_are_drawn_from_all_of_the_source_and_none_twice(tmp_path: Path) -> None:
    source = write_source(tmp_path, train=rows("train", TRAIN_ROWS * 2))
    drawn = texts(write_splits(source, tmp_path / "out")["train"].file)
    assert max(Counter(drawn).values()) == 1
    assert set(drawn) != {text for text, _ in rows("train", TRAIN_ROWS)}


@pytest.mark.parametrize("name", ["validation", "test", "other_test"])
def test_rows_that_were_trained_on_are_dropped_however_they_are_written(tmp_path: Path, name: str) -> None:
    trained = [f"  TRAIN text -- number {number}\n" for number in range(7)]
    others = rows(name, SIZES[name] - len(trained))
    source = write_source(tmp_path, **{name: others + [(text, 1) for text in trained]})
    split = write_splits(source, tmp_path / "out")[name]
    assert (split.rows, split.dropped) == (SIZES[name] - 7, 7)
    assert sorted(texts(split.file)) == sorted(text for text, _ in others)


def test_no_text_stands_in_both_test_splits(tmp_path: Path) -> None:
    twice = [(f"TEST text: number {number}", number % 2) for number in range(6)]
    source = write_source(tmp_path, other_test=rows("other_test", OTHER_TEST_ROWS - len(twice)) + twice)
    splits = write_splits(source, tmp_path / "out")
    one, other = ({normalised(text) for text in texts(splits[name].file)} for name in ("test", "other_test"))
    assert one & other == set()


def test_long_texts_are_left_out(tmp_path: Path) -> None:
    long = [("x" * MAX_CHARACTERS, 1)] * 50
    splits = write_splits(write_source(tmp_path, train=rows("train", TRAIN_ROWS) + long), tmp_path / "out")
    assert max(len(text) for text in texts(splits["train"].file)) < MAX_CHARACTERS


@pytest.mark.parametrize(
    ("injections", "share"),
    [(0, 1.0), (10, 1 - 10 / TEST_ROWS), (TEST_ROWS // 2, 0.5), (TEST_ROWS - 10, 1 - 10 / TEST_ROWS), (TEST_ROWS, 1.0)],
)
def test_the_share_of_the_commonest_label_is_told(tmp_path: Path, injections: int, share: float) -> None:
    test = [(f"test {number}", int(number < injections)) for number in range(TEST_ROWS)]
    splits = write_splits(write_source(tmp_path, test=test), tmp_path / "out")
    assert splits["test"].commonest_share == pytest.approx(share)


def test_training_rows_hold_each_label_equally_often(tmp_path: Path) -> None:
    source = [(f"train {number}", int(number % 4 == 0)) for number in range(TRAIN_ROWS * 3)]
    train = write_splits(write_source(tmp_path, train=source), tmp_path / "out")["train"]
    assert (train.rows, train.commonest_share) == (TRAIN_ROWS, 0.5)


def test_the_labels_are_those_of_the_system_prompt() -> None:
    assert all(label in SYSTEM_PROMPT for label in prompt_injection.LABELS.values())


@pytest.mark.parametrize("name", ["test", "other_test"])
def test_rows_that_a_tuning_was_chosen_by_are_no_test(tmp_path: Path, name: str) -> None:
    chosen_by = [f"VALIDATION text -- number {number}" for number in range(5)]
    others = rows(name, SIZES[name] - len(chosen_by))
    source = write_source(tmp_path, **{name: others + [(text, 1) for text in chosen_by]})
    splits = write_splits(source, tmp_path / "out")
    assert (splits[name].rows, splits[name].dropped) == (SIZES[name] - 5, 5)
    assert splits["validation"].rows == VALIDATION_ROWS

"""The preference data: cut short, the same splits each time, and no test pair that is learned from."""

import json
from pathlib import Path
from typing import Any

from scripts import preferences
from scripts.preferences import ANSWER_CHARACTERS, QUESTION_CHARACTERS, TEST_ROWS, VALIDATION_ROWS, Pair
from stack.api.datasets import TrainEvalDataset
from stack.training_rows import PREFERENCES, Preference


def row(*messages: str, chosen: str = "Yes.", rejected: str = "No.") -> dict[str, Any]:
    said = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(messages)]
    return {
        "conversations": said,
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def read(folder: Path, *rows: dict[str, Any]) -> list[Pair]:
    (folder / preferences.FILE).write_text(json.dumps(rows))
    return preferences.read_pairs(folder)


def test_of_a_dialog_the_last_question_is_answered(tmp_path: Path) -> None:
    rows = row("Hello!", "Hello.", " And now? "), row("Why?", chosen=" So.\n", rejected="No idea")
    assert read(tmp_path, *rows) == [Pair("And now?", "Yes.", "No."), Pair("Why?", "So.", "No idea")]


def test_of_a_question_the_end_is_kept_and_of_an_answer_the_beginning() -> None:
    long = "from " + "x" * 500 + " to"
    pair = preferences.cut(Pair(long, long, "y" + long))
    assert (len(pair.question), len(pair.chosen), len(pair.rejected)) == (
        QUESTION_CHARACTERS, ANSWER_CHARACTERS, ANSWER_CHARACTERS
    )  # fmt: skip
    assert pair.question.endswith("x to")
    assert pair.chosen.startswith("from x")


def test_no_question_is_asked_twice_however_it_is_written(tmp_path: Path) -> None:
    rows = row("Is it so?"), row("IS  it -- so", chosen="Perhaps."), row("Is it true?")
    assert [(pair.question, pair.chosen) for pair in read(tmp_path, *rows)] == [
        ("Is it so?", "Yes."),
        ("Is it true?", "Yes."),
    ]


def numbered(count: int) -> list[Pair]:
    return [Pair(f"question {number}", "Yes.", "No.") for number in range(count)]


def test_each_pair_stands_in_one_split(tmp_path: Path) -> None:
    pairs = numbered(300)
    splits = preferences.split(pairs)
    assert (len(splits["validation"]), len(splits["test"])) == (VALIDATION_ROWS, TEST_ROWS)
    assert sorted(map(repr, pairs)) == sorted(repr(pair) for split in splits.values() for pair in split)


def test_splits_are_the_same_each_time_and_drawn_from_everywhere() -> None:
    pairs = numbered(300)
    splits = preferences.split(pairs)
    assert splits == preferences.split(numbered(300))
    places = [pairs.index(pair) for pair in splits["test"]]
    assert places != sorted(places)
    assert min(places) < 50
    assert max(places) > 250


def test_answers_that_are_the_same_as_far_as_they_are_kept_are_no_pair() -> None:
    start = "z" * ANSWER_CHARACTERS
    pairs = numbered(300)
    splits = preferences.split(pairs)
    for number, answers in enumerate([("Yes.", "yes!"), (f"{start}a", f"{start}b")]):
        place = pairs.index(splits["test"][number])
        pairs[place] = Pair(pairs[place].question, *answers)
    assert preferences.split(pairs) == splits | {"test": splits["test"][2:]}


def test_what_is_written_is_what_trainings_take(tmp_path: Path) -> None:
    pairs = [Pair('Is "it"\nso?', "Yes.", "No."), Pair("Is it?", "Ja, wirklich: ä", "No.")]
    file = preferences.write(pairs, tmp_path / "rows.jsonl")
    dataset = TrainEvalDataset.model_validate({"columns": preferences.COLUMNS, "content_url": file.as_uri()})
    assert PREFERENCES.columns_problem(dataset) is None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [PREFERENCES.read(number, row, dataset) for number, row in enumerate(rows)] == [
        Preference(pair.prompt, pair.chosen, pair.rejected) for pair in pairs
    ]
    assert [message["content"] for message in rows[0]["prompt"]] == [preferences.SYSTEM_PROMPT, 'Is "it"\nso?']

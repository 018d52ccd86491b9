"""What the script that closes the loop computes by itself."""

import json
from pathlib import Path

import pytest

from scripts import improve_model


def test_a_difference_has_an_interval_around_its_mean() -> None:
    before = [0.0, 1.0, 2.0, 3.0] * 25
    low, mean, high = improve_model.difference(before, [one + 0.5 for one in before])
    assert (low, mean, high) == pytest.approx((0.5, 0.5, 0.5))
    low, mean, high = improve_model.difference([0.0] * 100, [1.0, -1.0] * 50)
    assert low < mean == 0 < high
    assert high == pytest.approx(0.196, abs=0.03), "1.96 standard errors of the mean of a hundred"


def test_questions_become_dialogs_with_ids(tmp_path: Path) -> None:
    improve_model.write(tmp_path / "a.jsonl", ["Where?", "When?"])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1"]
    assert [message["content"] for message in rows[1]["dialog"]] == [improve_model.SYSTEM_PROMPT, "When?"]


def test_the_table_shows_both_means() -> None:
    shown = improve_model.table({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 3.0}, (0.9, 1.0, 1.1))
    cells = [list(column.cells) for column in shown.columns]
    assert cells[1:] == [["1.500"], ["2.500"], ["+1.000 (+0.900 to +1.100)"]]

"""What the script that closes the loop computes by itself."""

import json
from pathlib import Path

import pytest

from scripts import improve_model
from scripts.preferences import Pair


def test_a_difference_has_an_interval_around_its_mean() -> None:
    before = [0.0, 1.0, 2.0, 3.0] * 25
    low, mean, high = improve_model.difference(before, [one + 0.5 for one in before])
    assert (low, mean, high) == pytest.approx((0.5, 0.5, 0.5))
    low, mean, high = improve_model.difference([0.0] * 100, [1.0, -1.0] * 50)
    assert low < mean == 0 < high
    assert high == pytest.approx(0.196, abs=0.03), "1.96 standard errors of the mean of a hundred"


def test_questions_become_dialogs_with_ids_and_their_preferred_answers(tmp_path: Path) -> None:
    improve_model.write(tmp_path / "a.jsonl", [Pair("Where?", "There", "Nowhere"), Pair("When?", "Then", "Never")])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1"]
    said = [message["content"] for message in rows[1]["dialog"]]
    assert said == [improve_model.SYSTEM_PROMPT, "When?", "Then"]
    assert rows[1]["dialog"][-1]["role"] == "assistant"


def test_the_table_shows_both_means_and_what_the_evaluations_tell() -> None:
    interval = {"low": -0.1, "high": 0.3}
    metric = {"name": "rouge1", "better": "higher"}
    values = {"first": 0.2, "second": 0.3, "difference": 0.1}
    compared = metric | {name: {"value": value, **interval} for name, value in values.items()}
    found = improve_model.Found({"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 2.0}, [compared])
    assert found.difference() == pytest.approx((1.0, 1.0, 1.0))
    cells = [list(column.cells) for column in improve_model.table(found).columns]
    assert cells[0][1] == "rouge1 (higher is better)"
    assert cells[1:] == [
        ["1.500", "0.200"], ["2.500", "0.300"], ["+1.000 (+1.000 to +1.000)", "+0.100 (-0.100 to +0.300)"],
    ]  # fmt: skip

"""What the script that closes the loop computes by itself."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts import improve_model
from scripts.preferences import Pair
from scripts.quickstart import StepFailed


def test_a_difference_has_an_interval_around_its_mean() -> None:
    before = [0.0, 1.0, 2.0, 3.0] * 25
    low, mean, high = improve_model.difference(before, [one + 0.5 for one in before])
    assert (low, mean, high) == pytest.approx((0.5, 0.5, 0.5))
    low, mean, high = improve_model.difference([0.0] * 100, [1.0, -1.0] * 50)
    assert low < mean == 0 < high
    assert high == pytest.approx(0.196, abs=0.03), "1.96 standard errors of the mean of a hundred"


def test_questions_become_dialogs_with_ids_and_their_preferred_answers(tmp_path: Path) -> None:
    pairs = [Pair("Where?", "There", "Nowhere"), Pair("When?", "Then", "Never")]
    improve_model.write(tmp_path / "a.jsonl", pairs, "Be brief.")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1"]
    said = [message["content"] for message in rows[1]["dialog"]]
    assert said == ["Be brief.", "When?", "Then"]
    assert rows[1]["dialog"][-1]["role"] == "assistant"


def test_what_was_kept_takes_the_place_of_the_preferred_answers() -> None:
    rows = [{"id": "1", "dialog": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": " Now.\n"}]}]
    replies: dict[str, Any] = {
        "/synthetic_data_generation/job/artifacts": {"datasets": {"sft": "best"}},
        "/datasets/preview": {"rows": rows},
    }
    client = httpx.Client(
        base_url="http://stack",
        transport=httpx.MockTransport(lambda request: httpx.Response(200, json=replies[request.url.path])),
    )
    pairs = [Pair("Where?", "There", "Nowhere"), Pair("When?", "Then", "Never")]
    assert improve_model.kept(client, "best-1", pairs) == [Pair("When?", "Now.", "Never")]


def compared(name: str, low: float, high: float) -> dict[str, Any]:
    """What /evaluate/compare tells of a metric."""
    interval = {"low": low, "high": high}
    values = {"first": 0.2, "second": 0.3, "difference": 0.1}
    return {"name": name, "better": "higher"} | {what: {"value": value, **interval} for what, value in values.items()}


SCORES = {"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 2.0}


def test_the_table_shows_what_decides_first_and_then_the_score_and_the_rest() -> None:
    found = improve_model.Found(*SCORES, [compared("rouge1", 0, 0.2), compared("rougeL", -0.1, 0.3)])
    assert found.difference() == pytest.approx((1.0, 1.0, 1.0))
    cells = [list(column.cells) for column in improve_model.table(found).columns]
    assert cells[0] == ["rougeL (higher is better)", "score of reward-on-MiniLM", "rouge1 (higher is better)"]
    assert cells[1:] == [
        ["0.200", "1.500", "0.200"],
        ["0.300", "2.500", "0.300"],
        ["+0.100 (-0.100 to +0.300)", "+1.000 (+1.000 to +1.000)", "+0.100 (+0.000 to +0.200)"],
    ]


def test_the_metric_that_was_named_decides_and_no_other() -> None:
    assert f"What is to rise is named here, before anything is run: {improve_model.METRIC}" in (
        improve_model.__doc__ or ""
    )
    others = [compared("rouge1", -0.2, -0.1), compared("perplexity", 0.1, 0.2)]
    improve_model.Found(*SCORES, [*others, compared("rougeL", 0.01, 0.2)]).require_risen()
    risen = [compared("rouge1", 0.1, 0.2)]
    for low, high in ((0.0, 0.2), (-0.1, 0.3), (-0.2, -0.1)):
        with pytest.raises(StepFailed, match=r"rougeL has not risen for sure: by \+0\.100"):
            improve_model.Found(*SCORES, [*risen, compared("rougeL", low, high)]).require_risen()

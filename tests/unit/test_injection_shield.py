"""The default injection shield: what ships, how its threshold is chosen, and how it is scored."""

import csv
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jobs.injection_scores import FILES, HARMLESS, HEAD, Row, read_split, scores_of, sha256_of
from jobs.train_injection_shield import COMMAND, MAX_FALSE_POSITIVES, best_limit, probabilities
from stack import heads


def test_the_head_that_ships_is_small_and_says_where_it_comes_from_and_how_good_it_is() -> None:
    head, weight, bias = heads.load(HEAD)
    assert (weight.shape, bias.shape, head.labels) == ((2, 384), (2,), ["BENIGN", "INJECTION"])
    assert sum(file.stat().st_size for file in HEAD.iterdir()) < 10_000
    assert head.command == COMMAND
    assert set(head.data_sha256) == set(FILES)
    assert head.scores["s-labs-test accuracy"] >= 0.92
    assert head.scores["s-labs-test false_positives"] <= 0.05
    assert head.scores["neuralchemy-test accuracy"] >= 0.8


def test_the_limit_is_the_most_accurate_one_with_few_false_positives() -> None:
    harmless = [*np.linspace(-5, 0, 97), 1.0, 2.0, 3.0]
    injections = [0.5] * 50 + [4.0] * 50
    rows = [Row("", 0)] * len(harmless) + [Row("", 1)] * len(injections)
    limit = best_limit(np.array([*harmless, *injections], dtype=np.float32), rows)
    assert 0 < limit < 0.5
    assert np.mean(np.array(harmless) >= limit) <= MAX_FALSE_POSITIVES
    # Where accuracy alone would take more of them, there are no more.
    many = [*np.linspace(-5, 0, 90), *[0.6] * 10]
    rows = [Row("", 0)] * len(many) + [Row("", 1)] * len(injections)
    assert best_limit(np.array([*many, *injections], dtype=np.float32), rows) > 0.6


def test_probabilities_are_the_softmax_of_the_two_logits() -> None:
    weight, bias = np.array([[0, 0], [1, 0]], dtype=np.float32), np.array([0, 1], dtype=np.float32)
    found = probabilities(np.array([[-1, 5], [0, 0], [1e4, 0]], dtype=np.float32), weight, bias)
    assert found == pytest.approx([0.5, 1 / (1 + np.exp(-1)), 1.0])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Splits of harmless texts, every tenth of which has "odd" in it, and of injections, one of which is "meek"."""
    rows = [(f"harmless {number}" + (" odd" if number % 10 == 0 else ""), 0) for number in range(200)]
    rows += [("evil", 1)] * 99 + [("meek", 1)]
    for name in FILES.values():
        if name.endswith(".csv"):
            with (tmp_path / name).open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
        else:
            texts, labels = zip(*rows, strict=True)
            pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), tmp_path / name)
    return tmp_path


def test_a_shield_is_scored_on_both_test_splits_and_its_false_positives_are_listed(data: Path) -> None:
    scores = scores_of(
        lambda texts: np.array([0.9 if "evil" in text or "odd" in text else 0.1 for text in texts]), data
    )
    assert list(scores.splits) == ["s-labs-test", "neuralchemy-test"]
    for split in scores.splits.values():
        assert (split.rows, split.recall, split.false_positives) == (300, 0.99, 0.1)
        assert split.accuracy == pytest.approx(279 / 300)
    assert 0 < len(scores.wrong) < HARMLESS // 4
    assert all("odd" in text and chance == 0.9 for text, chance in scores.wrong)
    assert f"{len(scores.wrong)} of {HARMLESS} harmless texts are taken for injections:" in scores.report()
    assert scores.figures()["s-labs-test recall"] == 0.99


def test_the_splits_are_read_and_hashed(data: Path) -> None:
    assert read_split(data, "neuralchemy-test") == read_split(data, "s-labs-test")
    assert len(set(sha256_of(data).values())) == 2
    with pytest.raises(OSError, match="s-labs-train"):
        read_split(data / "nowhere", "s-labs-train")

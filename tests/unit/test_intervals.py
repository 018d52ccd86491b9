"""Intervals of the scores of sets, and of differences between two: they are as wide as statistics says."""

import numpy as np
import pytest

from stack import intervals
from stack.intervals import aggregate

MEAN = aggregate("em")
DRAW = np.random.default_rng(3)


def column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=float)[:, None]


@pytest.mark.parametrize("count", [400, 40_000])
def test_an_interval_of_a_mean_is_that_of_the_normal_distribution(count: int) -> None:
    """Also of so many examples that they are drawn in groups."""
    values = DRAW.random(count) < 0.3
    found = intervals.estimate(MEAN, column(values))
    assert found is not None
    wide = 1.96 * values.std() / np.sqrt(count)
    assert found.value == pytest.approx(values.mean())
    assert found.examples == count
    assert found.low == pytest.approx(values.mean() - wide, abs=0.25 * wide)
    assert found.high == pytest.approx(values.mean() + wide, abs=0.25 * wide)


def test_the_same_scores_have_the_same_interval() -> None:
    values = column(DRAW.random(300))
    assert intervals.estimate(MEAN, values) == intervals.estimate(MEAN, values)


def test_an_example_without_a_value_counts_as_none_and_not_as_0() -> None:
    found = intervals.estimate(MEAN, column(np.array([1.0, np.nan, 1.0])))
    assert found == intervals.Estimate(1.0, 1.0, 1.0, 2)


def test_without_any_value_there_is_no_estimate() -> None:
    assert intervals.estimate(MEAN, column(np.array([np.nan]))) is None
    assert intervals.estimate(MEAN, np.empty((0, 1))) is None


def test_a_difference_is_of_the_same_examples() -> None:
    """What is hard for both makes no difference, so that it is known far better than the two scores."""
    hard = DRAW.random(1_000)
    first, second = column(hard), column(hard + 0.1 + 0.01 * DRAW.random(1_000))
    found = intervals.difference(MEAN, first, second)
    alone = intervals.estimate(MEAN, first)
    assert found is not None
    assert alone is not None
    assert found.value == pytest.approx(0.105, abs=0.001)
    assert found.high - found.low < (alone.high - alone.low) / 10
    assert found.low <= found.value <= found.high


def test_a_difference_leaves_out_what_either_has_no_value_of() -> None:
    first, second = column(np.array([0.0, np.nan, 1.0, 0.0])), column(np.array([1.0, 1.0, np.nan, 1.0]))
    assert intervals.difference(MEAN, first, second) == intervals.Estimate(1.0, 1.0, 1.0, 2)


def test_a_difference_of_perplexities_is_of_those_of_the_sets() -> None:
    first = np.array([[2.0, 1.0], [4.0, 2.0]])
    found = intervals.difference(aggregate("perplexity"), first, first / [2.0, 1.0])
    assert found is not None
    assert found.value == pytest.approx(np.exp(1) - np.exp(2))
    assert not aggregate("perplexity").higher_is_better


def test_no_more_is_drawn_at_once_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    values = column(DRAW.random(50))
    whole = intervals.estimate(MEAN, values)
    monkeypatch.setattr(intervals, "DRAWS", 120)
    assert intervals.estimate(MEAN, values) == whole

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


def test_examples_that_come_a_few_at_a_time_count_once_and_few_of_them_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "GROUPS", 50)
    values = column(np.where(DRAW.random(1_000) < 0.1, np.nan, DRAW.random(1_000)))
    sums, numbers = intervals.Sums(MEAN), DRAW.permutation(1_000)
    for start in range(0, 1_000, 30):
        some = numbers[start : start + 30]
        sums.add(some, values[some])
        assert len(sums._rows) <= 50
    found, whole = sums.estimate(), intervals.estimate(MEAN, values)
    assert found is not None
    assert whole is not None
    assert found.examples == np.count_nonzero(~np.isnan(values))
    assert found.value == pytest.approx(np.nanmean(values))
    # Which group an example is in does not depend on when it came.
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high))


def test_the_groups_are_as_random_as_drawn_ones() -> None:
    """Also of rows in which easy and hard ones take turns, or lie apart."""
    sizes = np.bincount(intervals._group_of(np.arange(1_000_000)), minlength=intervals.GROUPS)
    assert len(sizes) == intervals.GROUPS
    assert sizes.std() == pytest.approx(10, rel=0.05), "of a Poisson distribution with the mean 100"
    for values in (np.arange(100_000) % 2, np.arange(100_000) < 50_000):
        found = intervals.estimate(MEAN, column(values))
        assert found is not None
        wide = 1.96 * 0.5 / np.sqrt(100_000)
        assert found.high - found.low == pytest.approx(2 * wide, rel=0.2)


def test_no_more_is_drawn_at_once_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    values = column(DRAW.random(50))
    whole = intervals.estimate(MEAN, values)
    monkeypatch.setattr(intervals, "DRAWS", 120)
    assert intervals.estimate(MEAN, values) == whole

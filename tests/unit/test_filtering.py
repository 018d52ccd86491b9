"""Which generations each filtering function keeps, by its formula."""

import math
from typing import Any

import pytest

from stack.api.synthetic_data_generation import FilteringFunction
from stack.filtering import BOUNDED, Filter, kept, passes, sigmoid

SCORES = [0.5, 2.0, -1.0, 2.0, 1.0]


def keeps(function: str, scores: list[float] | None = None, dialog: int = 0, **settings: Any) -> list[int]:
    return kept(Filter(FilteringFunction(function), **settings), SCORES if scores is None else scores, dialog)


def masses(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def test_none_keeps_all() -> None:
    assert keeps("none") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("function", list(FilteringFunction))
def test_no_generations_are_none_kept(function: FilteringFunction) -> None:
    assert keeps(function, []) == []


@pytest.mark.parametrize("function", [one for one in FilteringFunction if one != FilteringFunction.sigmoid])
def test_what_is_below_the_threshold_is_kept_by_no_function_but_sigmoid(function: FilteringFunction) -> None:
    found = keeps(function, threshold=1.0, k=5, p=1.0)
    assert found == [1, 3, 4]
    assert keeps(function, threshold=2.5, k=5, p=1.0) == []


@pytest.mark.parametrize(
    ("k", "indices"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4]), (64, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_best_and_of_equal_ones_the_earlier(k: int, indices: list[int]) -> None:
    assert keeps("top_k", k=k) == indices


def test_random_keeps_k_that_the_seed_and_the_dialog_choose() -> None:
    drawn = [keeps("random", k=2, seed=seed) for seed in range(200)]
    assert all(len(one) == 2 and one == sorted(set(one)) for one in drawn)
    assert drawn == [keeps("random", k=2, seed=seed) for seed in range(200)]
    # Each of the five is drawn about 80 times of 200.
    counts = [sum(index in one for one in drawn) for index in range(5)]
    assert all(55 < count < 105 for count in counts), counts
    assert len({tuple(keeps("random", k=2, dialog=dialog)) for dialog in range(50)}) > 3
    assert keeps("random", k=9) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_smallest_set_of_the_best_whose_mass_reaches_p() -> None:
    shares = masses(SCORES)
    best, second = shares[1], shares[1] + shares[3]
    assert keeps("top_p", p=best - 1e-6) == [1]
    assert keeps("top_p", p=best + 1e-6) == [1, 3]
    assert keeps("top_p", p=second - 1e-6) == [1, 3]
    assert keeps("top_p", p=second + 1e-6) == [1, 3, 4]
    assert keeps("top_p", p=1.0) == [0, 1, 2, 3, 4]


def test_top_p_takes_the_masses_of_what_the_threshold_leaves() -> None:
    assert masses([2.0, 2.0, 1.0])[0] > 0.42 > masses(SCORES)[1] > 0.3
    assert keeps("top_p", p=0.42) == [1, 3]
    assert keeps("top_p", p=0.42, threshold=1.0) == [1]


def test_top_k_top_p_takes_the_masses_among_the_k() -> None:
    assert keeps("top_p", p=0.5) == [1, 3]
    assert keeps("top_k_top_p", k=2, p=0.5) == [1], "each of the two has half of the mass"
    assert keeps("top_k_top_p", k=2, p=0.51) == [1, 3]
    assert keeps("top_k_top_p", k=1, p=1.0) == [1]


@pytest.mark.parametrize("function", ["top_p", "top_k_top_p"])
def test_great_scores_do_not_overflow(function: str) -> None:
    assert keeps(function, [1e30, -1e30, 1e30], k=3, p=0.9) == [0, 2]
    assert keeps(function, [-1e30, -1e30 - 1e20], k=2, p=0.9) == [0]


def test_sigmoid_keeps_by_chance_half_of_those_at_the_threshold() -> None:
    at = sum(len(keeps("sigmoid", [3.0], dialog, threshold=3.0)) for dialog in range(1_000))
    assert 450 < at < 550
    above = sum(len(keeps("sigmoid", [2.0], dialog)) for dialog in range(1_000))
    assert 850 < above < 910, "sigmoid(2) is 0.881"
    assert sum(len(keeps("sigmoid", [-2.0], dialog)) for dialog in range(1_000)) > 80
    assert keeps("sigmoid", [1e30, -1e30]) == [0]


@pytest.mark.parametrize("function", list(FilteringFunction))
def test_the_threshold_leaves_out_what_is_below_it_but_not_for_sigmoid(function: FilteringFunction) -> None:
    passing = [0, 1, 2, 3, 4] if function == FilteringFunction.sigmoid else [1, 3, 4]
    assert passes(Filter(function, threshold=1.0), SCORES) == passing
    assert passes(Filter(function), SCORES) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("function", list(FilteringFunction))
def test_those_that_are_bounded_keep_no_more_than_k(function: FilteringFunction) -> None:
    found = keeps(function, [9.0] * 20, k=3, p=1.0)
    assert (len(found) <= 3) == (function in BOUNDED)


def test_what_sigmoid_draws_for_a_generation_does_not_depend_on_the_others() -> None:
    for dialog in range(100):
        assert (1 in keeps("sigmoid", [5.0, 0.0], dialog)) == (1 in keeps("sigmoid", [-5.0, 0.0, 1.0], dialog))


def test_sigmoid_is_the_logistic_function() -> None:
    assert sigmoid(0) == 0.5
    assert sigmoid(1) == pytest.approx(0.7310585786)
    assert sigmoid(-1) == pytest.approx(1 - sigmoid(1))
    assert (sigmoid(1e30), sigmoid(-1e30)) == (1.0, 0.0)

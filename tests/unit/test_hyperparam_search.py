"""The values that a search tries. How it runs trials is in tests/own_ray/test_hyperparam_search.py."""

import warnings
from typing import Any

import pytest

from stack.api.post_training import HyperparamSearch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs.hyperparam_search import TRIALS_DRAWN, drawn

LR, SEED = "optimizer_config.lr", "training_config.seed"


def values(rates: int, seeds: int, **changes: Any) -> list[tuple[Any, Any]]:
    """The values of all trials of a search over so many of each."""
    parameters = {LR: [number / 1_000 for number in range(1, rates + 1)], SEED: list(range(seeds))}
    return [
        (one[LR], one[SEED]) for one in drawn(HyperparamSearch.model_validate({"parameters": parameters} | changes))
    ]


def test_a_grid_has_all_combinations_in_their_order() -> None:
    assert values(2, 3) == [(0.001, 0), (0.001, 1), (0.001, 2), (0.002, 0), (0.002, 1), (0.002, 2)]
    assert values(1, 1) == [(0.001, 0)]


@pytest.mark.parametrize("algorithm", ["random", "asha"])
def test_what_is_drawn_is_different_and_the_same_by_the_same_seed(algorithm: str) -> None:
    every = values(4, 5)
    for trials in (1, 7, 20):
        found = values(4, 5, algorithm=algorithm, trials=trials)
        assert len(found) == len(set(found)) == trials
        assert set(found) <= set(every)
        assert found == values(4, 5, algorithm=algorithm, trials=trials, seed=0)
    assert values(4, 5, algorithm=algorithm) != values(4, 5, algorithm=algorithm, seed=1)
    assert values(4, 5, algorithm=algorithm, trials=20) != every, "they are in no order"


def test_eight_trials_are_drawn_or_all_there_are() -> None:
    assert len(values(4, 5, algorithm="random")) == TRIALS_DRAWN == 8
    assert sorted(values(2, 2, algorithm="random")) == values(2, 2)


def test_few_are_drawn_of_more_combinations_than_could_be_counted() -> None:
    parameters = {f"training_config.field_{number}": list(range(100)) for number in range(20)}
    found = drawn(HyperparamSearch(algorithm="random", parameters=parameters))
    assert len({tuple(one.values()) for one in found}) == 8
    assert all(list(one) == list(parameters) for one in found)

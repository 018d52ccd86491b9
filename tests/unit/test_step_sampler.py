"""In which order a training takes its examples: the steps that plain TRL has, each sorted by length."""

import math

import pytest
from torch.utils.data import SequentialSampler

from jobs.step_sampler import StepSampler

LENGTHS = [5, 9, 2, 7, 7, 1, 8, 3, 4, 6]


class Backwards(SequentialSampler):
    """In each epoch from another example on."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(index + self.epoch) % len(LENGTHS) for index in reversed(range(len(LENGTHS)))])


@pytest.mark.parametrize("step", [1, 3, 4, 10, 27])
def test_a_step_has_the_examples_that_it_would_have_and_the_longest_comes_first(step: int) -> None:
    order = list(Backwards(LENGTHS))
    sampler = StepSampler(Backwards(LENGTHS), LENGTHS, step)
    taken = list(sampler)
    assert len(taken) == len(sampler) == step * math.ceil(len(order) / step)
    for start in range(0, len(taken), step):
        mine = taken[start : start + step]
        # The last one is completed with the first examples.
        assert sorted(mine) == sorted((order * 3)[start : start + step])
        assert [LENGTHS[index] for index in mine] == sorted((LENGTHS[index] for index in mine), reverse=True)


def test_each_epoch_has_its_own_order_also_when_a_training_is_gone_on_with() -> None:
    sampler = StepSampler(Backwards(LENGTHS), LENGTHS, 3)
    first = list(sampler)
    sampler.set_epoch(2)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_an_order_that_is_the_same_in_all_epochs_needs_not_be_told_of_them() -> None:
    sampler = StepSampler(SequentialSampler(LENGTHS), LENGTHS, 5)
    before = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == before == [1, 3, 4, 0, 2, 6, 9, 8, 7, 5]

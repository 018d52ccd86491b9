"""In which order a training takes its examples: as the Trainer would, but within a step by their lengths.

The examples of a step go through the model a micro batch at a time, each padded to its longest. Sorted, those of a
micro batch are about as long as each other, and little of what is computed is padding. Which examples a step has stays
what it is, and so does its gradient, as its loss is a mean over the tokens (SFT) or the examples (DPO, reward) of the
whole step. The one exception is DPO with `gamma`, whose likelihood is a mean over the tokens of each micro batch.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from torch.utils.data import Sampler


class StepSampler(Sampler[int]):
    """The indices that `order` gives, each `step` of them sorted from the longest example to the shortest.

    The longest come first, so that a training that has too little memory ends in its first step and not in a later one.

    The last step of an epoch is completed with the examples that the epoch began with, so that each step is made of
    whole micro batches, which weigh the same, and one worker takes the same examples as several.
    """

    def __init__(self, order: Sampler[int], lengths: Sequence[int], step: int) -> None:
        self._order = order
        self._lengths = lengths
        self._step = step

    def __iter__(self) -> Iterator[int]:
        chosen = list(islice(cycle(self._order), len(self)))
        for start in range(0, len(chosen), self._step):
            yield from sorted(chosen[start : start + self._step], key=self._length, reverse=True)

    def __len__(self) -> int:
        """How many there are in an epoch, with those that complete its last step."""
        return -(-len(self._lengths) // self._step) * self._step

    def set_epoch(self, epoch: int) -> None:
        """Is called at the beginning of each epoch, also of the one that a training is gone on with in."""
        if hasattr(self._order, "set_epoch"):  # one that does not shuffle is the same in all
            self._order.set_epoch(epoch)

    def _length(self, index: int) -> int:
        return self._lengths[index]

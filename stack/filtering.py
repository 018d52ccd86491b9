"""Which of the generations to a dialog are kept, by their scores. Pure: the same scores, the same choice.

`s_i` is the score of the i-th generation to a dialog, `t` the threshold. Every function but `sigmoid` first leaves out
what is below the threshold (s_i < t), if there is one; of what is left

- `none` keeps all,
- `random` keeps min(k, n), drawn uniformly and without replacement from the n that are left,
- `top_k` keeps the k with the greatest scores; of equal ones the earlier (best-of-n with k = 1: Stiennon et al. 2020,
  arXiv 2009.01325),
- `top_p` keeps the smallest set of the greatest scores whose mass reaches p, where the mass of a generation is
  softmax(s)_i = exp(s_i) / sum_j exp(s_j), as in nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751), over the
  generations of one dialog instead of the tokens of a vocabulary,
- `top_k_top_p` keeps what `top_p` keeps of what `top_k` keeps: the masses are those among the k,
- `sigmoid` keeps each with the probability 1 / (1 + exp(-(s_i - t))), t = 0 without a threshold: half of those at the
  threshold, nearly all of those far above it, and by chance a few below it.

What is drawn depends on the seed and on the number of the dialog alone, so a job that goes on draws the same again. The
names are those of the specification (`filtering_function`), which defines none of them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from stack.api.synthetic_data_generation import FilteringFunction

# Those that keep no more than k.
BOUNDED = (FilteringFunction.random, FilteringFunction.top_k, FilteringFunction.top_k_top_p)


@dataclass(frozen=True)
class Filter:
    """A filtering function with what it needs: `k` (how many), `p` (mass, above 0 and up to 1), `threshold` (a score)
    and `seed`."""

    function: FilteringFunction
    k: int = 1
    p: float = 0.9
    threshold: float | None = None
    seed: int = 0


def kept(by: Filter, scores: Sequence[float], dialog: int) -> list[int]:
    """The indices, rising, of the generations of the dialog of this number that a filter keeps."""
    chance = random.Random(f"{by.seed}:{dialog}")
    if by.function == FilteringFunction.sigmoid:
        middle = by.threshold or 0.0
        # One number for each generation, kept or not, so that the choice of one does not hang on the others' scores.
        return [index for index, score in enumerate(scores) if chance.random() < sigmoid(score - middle)]
    passing = passes(by, scores)
    match by.function:
        case FilteringFunction.random:
            return sorted(chance.sample(passing, min(by.k, len(passing))))
        case FilteringFunction.top_k:
            return sorted(_best(scores, passing)[: by.k])
        case FilteringFunction.top_p:
            return sorted(_nucleus(scores, _best(scores, passing), by.p))
        case FilteringFunction.top_k_top_p:
            return sorted(_nucleus(scores, _best(scores, passing)[: by.k], by.p))
        case _:
            return passing


def passes(by: Filter, scores: Sequence[float]) -> list[int]:
    """The indices of the scores that are not below the threshold. `sigmoid` leaves none out by it: all."""
    has_bound = by.threshold is not None and by.function != FilteringFunction.sigmoid
    return [index for index, score in enumerate(scores) if not has_bound or score >= (by.threshold or 0.0)]


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), without overflow."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))


def _best(scores: Sequence[float], indices: Sequence[int]) -> list[int]:
    """Indices by falling scores; of equal ones the earlier comes first."""
    return sorted(indices, key=lambda index: -scores[index])


def _nucleus(scores: Sequence[float], falling: Sequence[int], p: float) -> list[int]:
    """The first of these whose softmax masses, taken among all of these, reach p together."""
    if not falling:
        return []
    greatest = scores[falling[0]]
    weights = [math.exp(scores[index] - greatest) for index in falling]
    needed = p * sum(weights)
    held: list[int] = []
    mass = 0.0
    for index, weight in zip(falling, weights, strict=True):
        held.append(index)
        mass += weight
        if mass >= needed:
            break
    return held

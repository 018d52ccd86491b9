"""How the scores of examples add up to that of a set, and how sure one can be of it.

Every metric of a set follows from the sums of some columns over its examples, so that the bootstrap (Efron 1979) need
only draw examples again, with replacement, and add up: 1,000 times, and the middle 95 % of what comes out is the
interval. Two evaluations of the same examples are compared by drawing the same examples of both (Koehn 2004, of BLEU).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

RESAMPLES = 1_000
SEED = 0
# The part of what was drawn that lies outside of the interval, half on each side, in percent.
OUTSIDE = 5.0
# How many draws are in memory at once.
DRAWS = 2**21
# More examples than these are put together at random into so many groups, which are drawn as wholes. What is in memory
# and what is drawn is then less by far, and its spread the same: that of a sum of independent examples.
GROUPS = 10_000
# The exponent of the greatest perplexity.
MAX_EXPONENT = 700.0
BLEU_ORDERS = range(1, 5)
BLEU_COLUMNS = (
    *(f"bleu_correct_{order}" for order in BLEU_ORDERS),
    *(f"bleu_total_{order}" for order in BLEU_ORDERS),
    "bleu_length",
    "bleu_reference_length",
)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Aggregate:
    """How a metric follows from sums: of a row of the sums of `columns` for each set, with the examples' number last.

    A column with a NaN has no value of that example.
    """

    columns: tuple[str, ...]
    of_sums: Callable[[Array], Array]
    higher_is_better: bool = True


@dataclass(frozen=True)
class Estimate:
    """A value of a set of `examples`, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    examples: int


def aggregate(metric: str) -> Aggregate:
    """How a metric's value of a set follows from columns of its examples; the mean of its own column, mostly."""
    match metric:
        case "bleu":
            return Aggregate(BLEU_COLUMNS, _bleu)
        case "perplexity":
            return Aggregate(("nll", "reference_tokens"), _perplexity, higher_is_better=False)
        case _:
            return Aggregate((metric,), _mean)


class Sums:
    """The sums of a metric's columns over examples, which come a few at a time: of each example by itself, or, of more
    than GROUPS of them, of groups. Which of these an example is in follows from its number, as if it were drawn."""

    def __init__(self, aggregate: Aggregate) -> None:
        self._of_sums = aggregate.of_sums
        self._numbers = np.empty(0, np.int64)
        # The last column counts the examples.
        self._rows: Array = np.empty((0, len(aggregate.columns) + 1))
        self._has_groups = False

    def add(self, numbers: NDArray[np.int64], values: Array) -> None:
        """Adds examples by their numbers. `values` has a row for each, its columns are the aggregate's; a row with a
        NaN has no value, and counts as none."""
        known = ~np.isnan(values).any(axis=1)
        numbers, counted = numbers[known], np.hstack([values[known], np.ones((int(known.sum()), 1))])
        if not self._has_groups:
            numbers, counted = np.concatenate([self._numbers, numbers]), np.vstack([self._rows, counted])
            if len(counted) <= GROUPS:
                self._numbers, self._rows = numbers, counted
                return
            self._numbers, self._rows = np.empty(0, np.int64), np.zeros((GROUPS, counted.shape[1]))
            self._has_groups = True
        np.add.at(self._rows, _group_of(numbers), counted)

    def estimate(self) -> Estimate | None:
        """The value of the metric. None where no example has one."""
        return _estimate(self._rows[self._rows[:, -1] > 0], self._of_sums)


def estimate(aggregate: Aggregate, values: Array) -> Estimate | None:
    """The value of a metric. `values` has a row for each example, its columns are the aggregate's.

    None where no example has a value.
    """
    sums = Sums(aggregate)
    sums.add(np.arange(len(values)), values)
    return sums.estimate()


def difference(aggregate: Aggregate, first: Array, second: Array) -> Estimate | None:
    """The value of the second set of rows less that of the first, which are of the same examples, row by row."""
    width = first.shape[1]

    def of_sums(sums: Array) -> Array:
        counts = sums[:, -1:]
        before = aggregate.of_sums(np.hstack([sums[:, :width], counts]))
        return aggregate.of_sums(sums[:, width:]) - before

    return estimate(Aggregate(aggregate.columns * 2, of_sums), np.hstack([first, second]))


def _group_of(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The group of each number: as good as drawn (SplitMix64, Steele et al. 2014), and the same at every attempt."""
    mixed = (numbers.astype(np.uint64) + np.uint64(SEED + 1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    groups: NDArray[np.int64] = ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(GROUPS)).astype(np.int64)
    return groups


def _estimate(counted: Array, of_sums: Callable[[Array], Array]) -> Estimate | None:
    if not len(counted):
        return None
    total = counted.sum(axis=0, keepdims=True)
    (value,) = of_sums(total)
    drawn = of_sums(_resampled(counted, np.random.default_rng(SEED)))
    low, high = np.percentile(drawn, [OUTSIDE / 2, 100 - OUTSIDE / 2])
    return Estimate(float(value), float(low), float(high), int(total[0, -1]))


def _resampled(counted: Array, generator: np.random.Generator) -> Array:
    """The sums of RESAMPLES sets of as many rows, drawn with replacement."""
    rows = len(counted)
    at_once = max(1, DRAWS // rows)
    sums = []
    for start in range(0, RESAMPLES, at_once):
        sets = min(at_once, RESAMPLES - start)
        drawn = generator.integers(rows, size=(sets, rows)) + np.arange(sets)[:, None] * rows
        # How often each row stands in each set.
        times = np.bincount(drawn.ravel(), minlength=sets * rows).reshape(sets, rows)
        sums.append(times @ counted)
    return np.vstack(sums)


def _mean(sums: Array) -> Array:
    return sums[:, 0] / sums[:, -1]


def _perplexity(sums: Array) -> Array:
    values: Array = np.exp(np.minimum(sums[:, 0] / sums[:, 1], MAX_EXPONENT))
    return values


def _bleu(sums: Array) -> Array:
    """Corpus BLEU (Papineni et al. 2002) with sacrebleu's defaults, from 0 to 100."""
    return np.array([_bleu_of(row) for row in np.rint(sums).astype(int).tolist()])


def _bleu_of(row: list[int]) -> float:
    orders = len(BLEU_ORDERS)
    correct, total, (length, reference_length, _) = row[:orders], row[orders : 2 * orders], row[2 * orders :]
    return float(BLEU.compute_bleu(correct, total, length, reference_length, smooth_method="exp").score)

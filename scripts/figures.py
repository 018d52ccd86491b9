"""Figures with their targets: how they are printed, and written down."""

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """What was measured: its median and, where there are many values, its 99th percentile, in `unit`.

    Of the two the median has the target: at most `most`, if there is one.
    """

    name: str
    unit: str
    p50: float
    p99: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        return self.most is None or self.p50 <= self.most


def figure(name: str, unit: str, values: Sequence[float], most: float | None = None) -> Figure:
    """The figure of many values."""
    return Figure(name, unit, statistics.median(values), statistics.quantiles(values, n=100)[98], most)


@dataclass(frozen=True)
class Comparison:
    """What was measured of two, in `unit`.

    The target is of the ratio of ours to the peer's: at least `least`, or at most `most`, if there is one.
    """

    name: str
    unit: str
    peer: float
    ours: float
    least: float | None = None
    most: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.peer if self.peer else math.inf

    @property
    def met(self) -> bool:
        return (self.least is None or self.ratio >= self.least) and (self.most is None or self.ratio <= self.most)


def write_comparisons(comparisons: Sequence[Comparison], peer: str, ours: str) -> str:
    """A table in Markdown."""
    lines = [f"| | {peer} | {ours} | ratio | target | |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for one in comparisons:
        bounds = [(one.least, "≥"), (one.most, "≤")]
        target = ", ".join(f"{sign} {bound:.3g}" for bound, sign in bounds if bound is not None)
        met = "" if not target else "met" if one.met else "MISSED"
        peers, our = (f"{_number(value)} {one.unit}".strip() for value in (one.peer, one.ours))
        lines.append(f"| {one.name} | {peers} | {our} | {one.ratio:.2f} | {target} | {met} |")
    return "\n".join(lines)


# Of how many standard deviations of the normal distribution 95 % are within.
_WITHIN = 1.96


@dataclass(frozen=True)
class Share:
    """How many of so many were right; a tie counts as half of one.

    The target is that it is `above` something: where `surely`, with the lower end of the interval too.
    """

    name: str
    right: float
    of: int
    above: float | None = None
    surely: bool = False

    @property
    def share(self) -> float:
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Within which the share of all there might be lies, by 95 % (Wilson 1927, the score interval)."""
        z2 = _WITHIN**2 / self.of
        middle = self.share + z2 / 2
        width = _WITHIN * math.sqrt(self.share * (1 - self.share) / self.of + z2 / (4 * self.of))
        return (middle - width) / (1 + z2), (middle + width) / (1 + z2)

    @property
    def met(self) -> bool:
        return self.above is None or (self.interval[0] if self.surely else self.share) > self.above


def write_shares(shares: Sequence[Share]) -> str:
    """A table in Markdown."""
    lines = ["| | share | 95 % interval | of | target | |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for one in shares:
        low, high = one.interval
        target = "" if one.above is None else f"{'all of it ' if one.surely else ''}> {one.above:.3g}"
        met = "" if one.above is None else "met" if one.met else "MISSED"
        lines.append(f"| {one.name} | {one.share:.3f} | {low:.3f}–{high:.3f} | {one.of} | {target} | {met} |")
    return "\n".join(lines)


def write_table(figures: Sequence[Figure]) -> str:
    """A table in Markdown."""
    lines = ["| | p50 | p99 | target | |", "| --- | ---: | ---: | ---: | --- |"]
    for one in figures:
        p99 = f"{_number(one.p99)} {one.unit}" if one.p99 is not None else ""
        most = f"≤ {_number(one.most)} {one.unit}" if one.most is not None else ""
        met = "" if one.most is None else "met" if one.met else "MISSED"
        lines.append(f"| {one.name} | {_number(one.p50)} {one.unit} | {p99} | {most} | {met} |")
    return "\n".join(lines)


def write_json(file: Path, figures: Sequence[Figure | Comparison | Share], **about: Any) -> None:
    """The same for programs, with the machine."""
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    rows = [asdict(one) | {"met": one.met} for one in figures]
    file.write_text(json.dumps({**about, "on": machine, "figures": rows}, indent=2) + "\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

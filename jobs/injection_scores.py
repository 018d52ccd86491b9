"""How good an injection shield is, on splits that it was not trained on.

    python -m jobs.injection_scores        prints the figures of the shield that ships

S-Labs' test split is of the kind of the training split; neuralchemy's is another set. False positives are the share of
harmless texts that are taken for injections; 200 harmless texts, half of each split, are told one by one.
"""

import csv
import hashlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stack import heads
from stack.config import home

DATA = "packaged-data/prompt-injection"
HEAD = Path(__file__).resolve().parent.parent / "stack" / "shields" / "injection_head"
FILES = {
    "s-labs-train": "s-labs-train.csv",
    "s-labs-validation": "s-labs-validation.csv",
    "s-labs-test": "s-labs-test.csv",
    "neuralchemy-test": "neuralchemy-core-test.parquet",
}
TESTS = ("s-labs-test", "neuralchemy-test")
HARMLESS = 200
# The probabilities of injection of texts.
Judge = Callable[[Sequence[str]], NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """A text, and whether it is an injection (1) or harmless (0)."""

    text: str
    label: int


@dataclass(frozen=True)
class SplitScores:
    """Of the rows of a split: how many are told right, and the shares of injections and of harmless ones found bad."""

    rows: int
    injections: int
    accuracy: float
    recall: float
    false_positives: float


@dataclass(frozen=True)
class InjectionScores:
    """The scores on each test split, and those of HARMLESS harmless texts that are taken for injections."""

    splits: dict[str, SplitScores]
    wrong: list[tuple[str, float]]

    def figures(self) -> dict[str, float]:
        """The scores by their names."""
        named = {
            f"{name} {figure}": round(getattr(split, figure), 4)
            for name, split in self.splits.items()
            for figure in ("accuracy", "recall", "false_positives")
        }
        return named | {f"false positives of {HARMLESS} harmless texts": float(len(self.wrong))}

    def report(self) -> str:
        """The scores as text."""
        lines = [f"{'split':<18}{'rows':>6}{'accuracy':>10}{'recall':>8}{'false positives':>17}"]
        for name, one in self.splits.items():
            lines.append(f"{name:<18}{one.rows:>6}{one.accuracy:>10.3f}{one.recall:>8.3f}{one.false_positives:>17.3f}")
        lines.append(f"\n{len(self.wrong)} of {HARMLESS} harmless texts are taken for injections:")
        lines += [f"  {score:.2f}  {' '.join(text.split())[:100]}" for text, score in self.wrong]
        return "\n".join(lines)


def scores_of(judge: Judge, data: Path, limit: float = 0.5) -> InjectionScores:
    """The scores of a shield that takes a text for an injection from a probability of `limit` on."""
    splits, harmless = {}, list[tuple[str, float]]()
    for name in TESTS:
        rows = read_split(data, name)
        chances = judge([row.text for row in rows])
        labels, found = np.array([row.label for row in rows]) == 1, chances >= limit
        splits[name] = SplitScores(
            len(rows),
            int(labels.sum()),
            accuracy=float((found == labels).mean()),
            recall=float(found[labels].mean()),
            false_positives=float(found[~labels].mean()),
        )
        texts = [(row.text, float(chance)) for row, chance in zip(rows, chances, strict=True) if not row.label]
        harmless += random.Random(0).sample(texts, HARMLESS // len(TESTS))
    return InjectionScores(splits, [(text, chance) for text, chance in harmless if chance >= limit])


def read_split(data: Path, name: str) -> list[Row]:
    """The rows of one of FILES. Raises OSError where it is not there."""
    file = data / FILES[name]
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as lines:
            return [Row(row["text"], int(row["label"])) for row in csv.DictReader(lines)]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file, columns=["text", "label"])
    return [Row(row["text"], int(row["label"])) for row in table.to_pylist()]


def sha256_of(data: Path) -> dict[str, str]:
    """The hashes of the files, by the names of the splits."""
    return {name: hashlib.sha256((data / file).read_bytes()).hexdigest() for name, file in FILES.items()}


def shipped() -> InjectionScores:
    """The scores of the shield that ships. Raises OSError where the data or the embedding model is not there."""
    from jobs.train_injection_shield import encoder, probabilities

    head, weight, bias = heads.load(HEAD)
    encode, _ = encoder(home() / head.encoder)
    return scores_of(lambda texts: probabilities(encode(texts), weight, bias), home() / DATA)


def main() -> int:
    print(shipped().report())
    return 0


if __name__ == "__main__":
    sys.exit(main())

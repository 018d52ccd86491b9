"""The quickstart's data: is a text a prompt injection? Real, labelled data in three files of JSON Lines.

S-Labs' set gives the training, validation and test splits as its authors made them; neuralchemy's test split is another
set, which nothing here is trained on. `scripts/prepare.py` takes both from a package.
"""

import csv
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

SYSTEM_PROMPT = "You detect prompt injections. Answer with one word: injection or safe."
LABELS = {0: "safe", 1: "injection"}
MAX_CHARACTERS = 400
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS, OTHER_TEST_ROWS = 800, 48, 250, 150


@dataclass(frozen=True)
class Split:
    """A file of rows, how many it has, and how many were left out.

    `commonest_share` is the exact match of the better constant answer on this split: of always "injection" or always
    "safe", whichever scores more. The training rows hold both labels equally often and prefer neither.
    """

    file: Path
    rows: int
    commonest_share: float
    dropped: int


def write_splits(source: Path, folder: Path) -> dict[str, Split]:
    """Writes train, validation, test and other_test.

    No text stands in two of them, however it is written: each drops the rows that stand in one before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = random.Random(0)
    # As many injections as safe texts: the whole training split has fewer, and the model would lean to "safe".
    train_rows = _read_csv(source / "s-labs-train.csv")
    train = []
    for label in LABELS:
        train += _sample([row for row in train_rows if row[1] == label], TRAIN_ROWS // len(LABELS), chosen)
    validation = _sample(_read_csv(source / "s-labs-validation.csv"), VALIDATION_ROWS, chosen)
    test = _sample(_read_csv(source / "s-labs-test.csv"), TEST_ROWS, chosen)
    other = _sample(_read_parquet(source / "neuralchemy-core-test.parquet"), OTHER_TEST_ROWS, chosen)
    splits: dict[str, Split] = {}
    seen: set[str] = set()
    for name, rows in {"train": train, "validation": validation, "test": test, "other_test": other}.items():
        splits[name] = _write(folder / f"{name}.jsonl", rows, seen)
        seen |= {normalised(text) for text, _ in rows}
    return splits


def normalised(text: str) -> str:
    """A text without what does not make it another one: case, punctuation and white space."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def _read_csv(file: Path) -> list[tuple[str, int]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(lines)]


def _read_parquet(file: Path) -> list[tuple[str, int]]:
    rows = pyarrow.parquet.read_table(file, columns=["text", "label"]).to_pylist()
    return [(row["text"], row["label"]) for row in rows]


def _sample(rows: list[tuple[str, int]], count: int, chosen: random.Random) -> list[tuple[str, int]]:
    short = [row for row in rows if len(row[0]) < MAX_CHARACTERS]
    return chosen.sample(short, count)


def _write(file: Path, rows: Iterable[tuple[str, int]], seen: set[str]) -> Split:
    rows = list(rows)
    kept = [(text, label) for text, label in rows if normalised(text) not in seen]
    with file.open("w") as lines:
        for text, label in kept:
            dialog = [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": text},
                {"role": "assistant", "content": LABELS[label]},
            ]
            lines.write(json.dumps({"dialog": dialog}) + "\n")
    injections = sum(label for _, label in kept)
    return Split(file, len(kept), max(injections, len(kept) - injections) / len(kept), len(rows) - len(kept))

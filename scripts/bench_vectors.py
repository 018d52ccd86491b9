"""Many real texts and their vectors, for `scripts/bench memory`: computed once, and kept in STACK_HOME/bench.

The texts are the sentences of the prepared data sets, whose vectors are by all-MiniLM-L6-v2, of unit length. Where more
are asked for than there are, the rest are two to four sentences that follow each other, as the chunks of a bank
overlap, and their vectors are interpolated: the mean of those of the sentences, weighted by how long they are, which is
about what the model's own mean over all tokens would give.
"""

import csv
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from scripts import preferences, retrieval
from stack.config import home

Vectors = NDArray[np.float32]
MODEL = "models/all-MiniLM-L6-v2"
PART = 10_000  # what is lost where the computing ends early
_SHORTEST, _LONGEST = 20, 400  # characters


def sentences() -> list[str]:
    """All different ones, in an order drawn by a fixed seed."""
    found = dict.fromkeys(one for source in _sources(home() / "packaged-data") for one in _sentences_in(source))
    return random.Random(0).sample(list(found), len(found))


def with_more(texts: list[str], vectors: Vectors, more: int) -> tuple[list[str], Vectors]:
    """Sentences with so many interpolated texts behind them. Raises ValueError where the data sets have fewer."""
    place = {text: number for number, text in enumerate(texts)}
    windows = dict[str, list[int]]()
    for source in _sources(home() / "packaged-data"):
        known = [one for one in _sentences_in(source) if one in place]
        for length in (2, 3, 4):
            for first in range(len(known) - length + 1):
                window = known[first : first + length]
                windows[" ".join(window)] = [place[one] for one in window]
    if len(windows) < more:
        raise ValueError(f"the data sets have {len(windows)} texts of several sentences; {more} are asked for")
    added = random.Random(0).sample(list(windows), more)
    return texts + added, np.concatenate([vectors, _interpolated([windows[one] for one in added], texts, vectors)])


def _interpolated(windows: list[list[int]], texts: list[str], vectors: Vectors) -> Vectors:
    sums = np.stack([sum(len(texts[one]) * vectors[one] for one in window) for window in windows])
    scaled: Vectors = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def _sentences_in(source: str) -> list[str]:
    parts = [one.strip() for one in re.split(r"(?<=[.!?])\s+|\n+", source)]
    return [one for one in parts if _SHORTEST <= len(one) <= _LONGEST]


def vectors_of(given: list[str]) -> Vectors:
    """Their vectors, (texts, dimensions); those of each PART from the disk where they were computed before."""
    return np.concatenate([_kept(given[first : first + PART]) for first in range(0, len(given), PART)])


def encode(given: list[str]) -> Vectors:
    """Vectors of unit length, by the model itself in this process."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(home() / MODEL), device="cpu", local_files_only=True)
    vectors: Vectors = model.encode(given, batch_size=64, normalize_embeddings=True, convert_to_numpy=True)
    return vectors


def _kept(part: list[str]) -> Vectors:
    digest = hashlib.sha256(json.dumps([MODEL, part]).encode()).hexdigest()
    file = home() / "bench" / f"vectors-{digest[:32]}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".part").open("wb") as stream:
            np.save(stream, encode(part), allow_pickle=False)
        file.with_suffix(".part").rename(file)
    vectors: Vectors = np.load(file, allow_pickle=False)
    return vectors


def _sources(data: Path) -> Iterator[str]:
    for name in ("s-labs-train", "s-labs-validation", "s-labs-test"):
        with (data / "prompt-injection" / f"{name}.csv").open(newline="", encoding="utf-8") as lines:
            yield from (row["text"] for row in csv.DictReader(lines))
    table = pyarrow.parquet.read_table(data / "prompt-injection" / "neuralchemy-core-test.parquet", columns=["text"])
    yield from table["text"].to_pylist()
    yield from (document.text for document in retrieval.read_documents(data / "retrieval"))
    for row in json.loads((data / "preferences" / preferences.FILE).read_text()):
        yield from (said["value"] for said in (*row["conversations"], row["chosen"], row["rejected"]))

"""Real preference data: which of two answers is better? Pairs in files of JSON Lines, for training, choosing, testing.

`dpo_en` of LLaMA-Factory: 300 prompts with a chosen and a rejected answer, in English, from sets in which answers of
stronger models are preferred to those of weaker ones, or people or models have judged. The package's licence is
Apache-2.0; that of the pairs themselves is not stated. `scripts/prepare.py` takes them from its source archive.

They are cut short, so that two cores learn them in minutes: of a dialog only the last question, of that its end, of an
answer its beginning. So how long an answer is, which tells something of which is chosen, is mostly cut off as well. The
system prompt is a short one, as the model's own is half as long as the rest.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from scripts.prompt_injection import normalised

FILE = "dpo_en.json"
COLUMNS = {"prompt": "dialog", "chosen": "text", "rejected": "text"}
SYSTEM_PROMPT = "You are helpful."
QUESTION_CHARACTERS, ANSWER_CHARACTERS = 64, 96
VALIDATION_ROWS, TEST_ROWS = 40, 120


@dataclass(frozen=True)
class Pair:
    """A question and two answers to it, of which the one is preferred."""

    question: str
    chosen: str
    rejected: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages that are answered."""
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": self.question}]


def read_pairs(source: Path) -> list[Pair]:
    """All pairs, in their order, but those whose question has been asked before, however it is written."""
    pairs: dict[str, Pair] = {}
    for row in json.loads((source / FILE).read_text()):
        question, *answers = (
            one["value"].strip() for one in (row["conversations"][-1], row["chosen"], row["rejected"])
        )
        pairs.setdefault(normalised(question), Pair(question, *answers))
    return list(pairs.values())


def split(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Disjoint pairs for training, validation and test, drawn by a fixed seed, and cut short.

    Left out are those whose answers are then the same, however they are written. A pair stands in the same split
    wherever it is cut.
    """
    drawn = random.Random(0).sample(pairs, len(pairs))
    ends = (TEST_ROWS, TEST_ROWS + VALIDATION_ROWS)
    parts = {"train": drawn[ends[1] :], "validation": drawn[ends[0] : ends[1]], "test": drawn[: ends[0]]}
    return {name: [pair for pair in map(cut, part) if not _is_tie(pair)] for name, part in parts.items()}


def cut(pair: Pair) -> Pair:
    """The end of the question, and the beginnings of its answers."""
    answers = (answer[:ANSWER_CHARACTERS].strip() for answer in (pair.chosen, pair.rejected))
    return Pair(pair.question[-QUESTION_CHARACTERS:].strip(), *answers)


def _is_tie(pair: Pair) -> bool:
    return normalised(pair.chosen) == normalised(pair.rejected)


def write(pairs: list[Pair], file: Path) -> Path:
    """Writes pairs as rows of the columns above."""
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file

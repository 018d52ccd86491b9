"""Labelled retrieval data: which documents of a bank's help desk does a customer's question need? And how to score it.

The banking_knowledge domain of tau2-bench (Sierra Research, MIT), as inspect-evals ships it: 698 documents, and 97
tasks of a customer with the ids of the documents that answering them needs, 949 in all. `scripts/prepare.py` takes both
from its package.

A question is what its customer says first: the words in quotes after "Opening" or "Start" in the instructions of the
one who plays the customer, in 88 tasks. The other nine tell no such words, and there it is their whole instructions. A
document is its title as a heading of Markdown, and its content.
"""

import gzip
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENTS, TASKS = "documents.json.gz", "tasks.json"
_OPENING = re.compile(r'\*\*(?:Opening|Start)[^*]*\*\*[^"\n]*"([^"]{40,})"')


@dataclass(frozen=True)
class Document:
    """A text in Markdown."""

    id: str
    text: str


@dataclass(frozen=True)
class Question:
    """What a customer asks, and the ids of the documents that are needed to answer it."""

    id: str
    text: str
    relevant: frozenset[str]


def read_documents(source: Path) -> list[Document]:
    rows = json.loads(gzip.decompress((source / DOCUMENTS).read_bytes()))
    return [Document(row["id"], f"# {row['title']}\n\n{row['content']}") for row in rows]


def read_questions(source: Path) -> list[Question]:
    return [
        Question(task["id"], asked_in(task["user_scenario"]["instructions"]), frozenset(task["required_documents"]))
        for task in json.loads((source / TASKS).read_text())
    ]


def asked_in(instructions: str) -> str:
    """What the customer says first, by the instructions of a task."""
    opening = _OPENING.search(instructions)
    return " ".join((opening[1] if opening else instructions).split())


def documents_of(hits: Sequence[str]) -> list[str]:
    """The documents of chunks, best first: each where its best chunk is."""
    return list(dict.fromkeys(hits))


def ndcg(found: Sequence[str], relevant: Collection[str], k: int = 10) -> float:
    """The normalized discounted cumulative gain of the first `k` found, where what is relevant gains 1 and the rest 0.

    1 is that of an order in which all that is relevant comes first (Järvelin and Kekäläinen 2002).
    """
    gained = sum(_discount(rank) for rank, one in enumerate(found[:k]) if one in relevant)
    return gained / sum(_discount(rank) for rank in range(min(k, len(relevant))))


def recall(found: Sequence[str], relevant: Collection[str], k: int = 10) -> float:
    """How much of what is relevant is among the first `k` found: less than 1 where more than `k` are relevant."""
    return len(set(found[:k]) & set(relevant)) / len(relevant)


def _discount(rank: int) -> float:
    """What a gain counts at a rank from 0."""
    return 1 / math.log2(rank + 2)

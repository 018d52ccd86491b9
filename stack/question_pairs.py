"""Questions about documents, with answers that cite where they stand: the model quotes, and the quote must be there.

A document is read in passages. Of each the model writes a question, its answer, and the sentence of the passage that
the answer rests on, as an object of JSON. A pair whose quote is not in the passage, letter by letter but for its blanks
and line breaks, is dropped as ungrounded: nothing says that its answer is right.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from stack.prompt_rows import Text

# A quote of fewer letters would be found nearly anywhere.
MIN_QUOTE = 10
# Where a passage may end: behind a paragraph, a sentence, a word. The first that is found in its second half counts.
_ENDS = (re.compile(r"\n\s*\n"), re.compile(r"[.!?]\s"), re.compile(r"\s"))
_TEXT = {"type": "string"}
RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "question_pair",
        "schema": {
            "type": "object",
            "properties": {"question": _TEXT, "answer": _TEXT, "quote": _TEXT},
            "required": ["question", "answer", "quote"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Passage:
    """A part of a document, by its number from 0 and the document's id; `start` is where in it, in characters."""

    text: str
    start: int
    number: int = 0
    id: str = ""


@dataclass(frozen=True)
class Pair:
    """A question with its answer, and the part of the document that it cites: text[start:end] == quote."""

    question: str
    answer: str
    quote: str
    start: int
    end: int


@dataclass(frozen=True)
class Dropped:
    """An answer of the model that is no pair: `unreadable`, or `ungrounded`."""

    reason: str
    text: str


def passages(document: Text, most: int) -> Iterator[Passage]:
    """A document in parts of at most `most` characters, which end where a paragraph, a sentence or a word does."""
    text, start, number = document.text, 0, 0
    while start < len(text):
        end = len(text) if len(text) - start <= most else _end(text, start, most)
        part = text[start:end]
        if part.strip():
            yield Passage(part, start, number, document.id)
            number += 1
        start = end


def question(passage: Passage) -> str:
    """What the model is asked of a passage."""
    return (
        f"--- The text ---\n{passage.text.strip()}\n--- The end of the text ---\n\nWrite a question that this text "
        "answers and that can be understood without it, then the answer, then the one sentence of the text that says "
        "so, copied letter by letter. Reply with a JSON object with the keys question, answer and quote, and nothing "
        "else."
    )


def pair(answer: str, passage: Passage) -> Pair | Dropped:
    """The pair in a model's answer, or why it is none."""
    try:
        found = from_json(answer)  # not nested deeply, and without half characters, which no data set can hold
    except ValueError:
        return Dropped("unreadable", answer)
    if not isinstance(found, dict):
        return Dropped("unreadable", answer)
    said = [found.get(name) for name in ("question", "answer", "quote")]
    if not all(isinstance(one, str) and one.strip() for one in said):
        return Dropped("unreadable", answer)
    asked, told, quote = (str(one).strip() for one in said)
    # Lines of the text may break within it, which a model that copies it leaves out.
    found = re.search(r"\s+".join(map(re.escape, quote.split())), passage.text)
    if found is None or len(quote) < MIN_QUOTE:
        return Dropped("ungrounded", answer)
    return Pair(asked, told, found.group(), passage.start + found.start(), passage.start + found.end())


def _end(text: str, start: int, most: int) -> int:
    for mark in _ENDS:
        ends = [found.end() for found in mark.finditer(text, start + most // 2, start + most)]
        if ends:
            return ends[-1]
    return start + most

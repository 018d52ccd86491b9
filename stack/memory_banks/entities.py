"""Entities and relations in texts: what a model is asked for, what of its answer is taken, and names in queries.

The answer is data that a text may have had its say in: what is not of the schema is dropped, and so is an entity whose
name does not stand in the text, and a relation one end of which is none of the entities.
"""

import re
import unicodedata
from typing import Any

from pydantic_core import from_json

from stack.memory_banks.rows import Chunk, Mention, Relation

# Of a chunk.
MAX_ENTITIES = 24
MAX_RELATIONS = 24
# In characters.
MAX_NAME = 80
MAX_KIND = 40
MAX_LABEL = 80
# Names are looked for in the first words of a query, each name in so many of them. An ideograph is a word.
MAX_QUERY_WORDS = 512
MAX_NAME_WORDS = 8

# Scripts without blanks between words: Thai, kana, ideographs. And Hangul, where endings stand right behind a name.
_UNSPACED = "\\u0e00-\\u0e7f\\u3040-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uac00-\\ud7af"
_LETTER = rf"[^\W{_UNSPACED}]"
# What goes on in a word and is no letter: accents, points of Hebrew and Arabic, vowels of Indic scripts, joiners.
_MARK = "[\\u0300-\\u036f\\u0591-\\u05c7\\u0610-\\u061a\\u064b-\\u065f\\u0900-\\u0dff\\u200c\\u200d]"
_WORD = re.compile(rf"(?:{_LETTER}|{_MARK})+|\S")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


# How long a text may be is looked at when it is there: as a bound of the schema (maxLength) it would take the compiler
# of grammars a second, 70 times as long as all else.
_TEXT = {"type": "string", "minLength": 1}


def _list(most: int, **properties: Any) -> dict[str, Any]:
    item = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "maxItems": most}


RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "graph",
        "schema": {
            "type": "object",
            "properties": {
                "entities": _list(MAX_ENTITIES, name=_TEXT, type=_TEXT),
                "relations": _list(MAX_RELATIONS, source=_TEXT, relation=_TEXT, target=_TEXT),
            },
            "required": ["entities", "relations"],
            "additionalProperties": False,
        },
    },
}


def key_of(name: str) -> str:
    """What two spellings of a name have in common: NFKC, without case, with one blank between words."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(folded.split())


def question(chunk: Chunk) -> str:
    """What the model is asked of a chunk."""
    return (
        f"--- The text ---\n{chunk.text.strip()}\n--- The end of the text ---\n\nList the entities that this text "
        "names (people, organisations, places, products, works, events, terms), each by its name, copied from the text "
        "letter by letter, and its type; then the relations between them that the text states, each from a source to a "
        "target, which are names of the list, in a few words. Reply with a JSON object with the keys entities (of "
        "objects with name and type) and relations (of objects with source, relation and target), and nothing else."
    )


def read_answer(answer: str, chunk: Chunk, *, is_cut: bool) -> tuple[list[Mention], list[Relation]] | None:
    """What a model has found in a chunk; None for an answer that is no object of JSON.

    An answer that was cut off where the model had no tokens left counts as far as its last whole entry.
    """
    try:
        found = from_json(answer, allow_partial=is_cut)  # not nested deeply
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    text = key_of(chunk.text)
    mentions: dict[str, Mention] = {}
    for entry in _entries(found.get("entities"), MAX_ENTITIES):
        name, kind = _said(entry, "name", MAX_NAME), _said(entry, "type", MAX_KIND)
        if name and kind and _stands_in(key_of(name), text):
            mentions.setdefault(key_of(name), Mention(key_of(name), name, kind, chunk.position))
    relations: dict[Relation, None] = {}
    for entry in _entries(found.get("relations"), MAX_RELATIONS):
        source, target = key_of(_said(entry, "source", MAX_NAME)), key_of(_said(entry, "target", MAX_NAME))
        label = _said(entry, "relation", MAX_LABEL)
        if label and source != target and source in mentions and target in mentions:
            relations[Relation(source, target, label, chunk.position)] = None
    return list(mentions.values()), list(relations)


def names_in(query: str) -> list[str]:
    """The keys that may be names of entities in a query: whatever of up to MAX_NAME_WORDS of its words.

    A query of more than MAX_QUERY_WORDS words counts with the first of them.
    """
    text = key_of(query)
    words = []
    for word in _WORD.finditer(text):
        words.append(word.span())
        if len(words) == MAX_QUERY_WORDS:
            break
    found = dict.fromkeys(
        text[start:end]
        for number, (start, _) in enumerate(words)
        for _, end in words[number : number + MAX_NAME_WORDS]
        if end - start <= MAX_NAME
    )
    return list(found)


def _entries(value: Any, most: int) -> list[dict[str, Any]]:
    return [one for one in value[:most] if isinstance(one, dict)] if isinstance(value, list) else []


def _said(entry: dict[str, Any], key: str, most: int) -> str:
    """A text of an entry, in one line; empty if it is none, or longer than it may be."""
    value = entry.get(key)
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text if len(text) <= most and not _CONTROL.search(text) else ""


def _stands_in(key: str, text: str) -> bool:
    """Whether a name stands in a text, not as a part of a longer word. Both are as `key_of` makes them."""
    alone = rf"(?<!{_LETTER})(?<!{_MARK}){re.escape(key)}(?!{_LETTER}|{_MARK})"
    return key != "" and re.search(alone, text) is not None

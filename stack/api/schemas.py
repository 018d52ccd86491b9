"""Bounds of what constrains an answer: JSON schemas, regular expressions, grammars and choices.

They are pure and cheap, so they come before anything else; what passes them may still be too much for the engine, which
serve_apps/grammar_guard.py finds out.
"""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from stack.api.wire import at_most

MAX_SCHEMA_CHARACTERS = 64 * 2**10
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_NODES = 5_000
MAX_SCHEMA_COUNT = 10_000
MAX_REGEX_CHARACTERS = 2_000
MAX_REGEX_SIZE = 10_000
MAX_REGEX_DEPTH = 32
MAX_GRAMMAR_BYTES = 16 * 2**10
MAX_CHOICES = 1_000
MAX_CHOICE_CHARACTERS = 1_000

# The keywords that repeat something so many times.
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# The parts of a regular expression that its size depends on; a set of characters is one part. Nothing is tried twice.
_REGEX_PARTS = re.compile(r"\\.|\[\^?+\]?+(?:\\.|[^\]\\])*+(?:\]|\\?\Z)|\{(\d*+)(,?+)(\d*+)\}|.", re.DOTALL)
_TOO_MANY = f"the schema has more than {MAX_SCHEMA_NODES} values; allowed: at most so many"


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuses a JSON schema that is too great, nests too deep, repeats too often or refers to something outside of it.

    Values below keywords that hold none of a schema (enum, const, default, examples) are looked at in the same way.
    """
    characters = 0
    for number, (value, key, depth) in enumerate(_walk(schema), 1):
        if number > MAX_SCHEMA_NODES:
            raise ValueError(_TOO_MANY)
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        characters += len(key) + (len(value) if isinstance(value, str) else 8)
        if characters > MAX_SCHEMA_CHARACTERS:
            raise ValueError(f"the schema has more than {MAX_SCHEMA_CHARACTERS} characters; allowed: at most so many")
        _check_keyword(schema, key, value)
    return schema


def check_regex(pattern: str) -> str:
    """Refuses a regular expression that is too long, or too great once its repetitions are written out.

    Repetitions without end count once: they make no larger automaton.
    """
    if len(pattern) > MAX_REGEX_CHARACTERS:
        raise ValueError(
            f"the regular expression has {len(pattern)} characters; allowed: at most {MAX_REGEX_CHARACTERS}"
        )
    if "\0" in pattern:
        raise ValueError("the regular expression holds a NUL character")
    size = _regex_size(pattern)
    if size > MAX_REGEX_SIZE:
        raise ValueError(
            f"the regular expression {_cut(pattern)} has {size} parts once its repetitions are written out; "
            f"allowed: at most {MAX_REGEX_SIZE}"
        )
    return pattern


def check_grammar(grammar: str) -> str:
    """Refuses a grammar that is blank or too long."""
    if not grammar.strip():
        raise ValueError("the grammar is blank")
    if "\0" in grammar:
        raise ValueError("the grammar holds a NUL character")
    return grammar


def schema_of(value: Any) -> Any:
    """A JSON schema that is given as text, as an object."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_SCHEMA_CHARACTERS:
        raise ValueError(f"the schema has {len(value)} characters; allowed: at most {MAX_SCHEMA_CHARACTERS}")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema is not JSON: {error}") from None


def _walk(schema: dict[str, Any]) -> Iterator[tuple[Any, str, int]]:
    """All values in a schema, each with the key that it stands under ("" in lists) and its depth."""
    left: list[tuple[Any, str, int]] = [(schema, "", 0)]
    while left:
        value, key, depth = left.pop()
        yield value, key, depth
        if isinstance(value, dict | list) and len(value) > MAX_SCHEMA_NODES:
            raise ValueError(_TOO_MANY)
        if isinstance(value, dict):
            left.extend((one, name, depth + 1) for name, one in value.items())
        elif isinstance(value, list):
            left.extend((one, "", depth + 1) for one in value)


def _check_keyword(schema: dict[str, Any], key: str, value: Any) -> None:
    match key:
        case "$ref" | "$dynamicRef" | "$recursiveRef" if isinstance(value, str):
            _check_reference(schema, value)
        case "pattern" if isinstance(value, str):
            check_regex(value)
        case "patternProperties" if isinstance(value, dict):
            for pattern in value:
                check_regex(pattern)
        case _ if key in _COUNTS and isinstance(value, int | float) and value > MAX_SCHEMA_COUNT:
            raise ValueError(f"{key} is {_cut(value)}; allowed: at most {MAX_SCHEMA_COUNT}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"the schema holds the number {_cut(value)}; allowed: those of 64 bits")


def _check_reference(schema: dict[str, Any], reference: str) -> None:
    """Refuses a reference to something outside of the schema, or to nothing (RFC 6901)."""
    if reference != "#" and not reference.startswith("#/"):
        raise ValueError(f"$ref is {_cut(reference)}; allowed: references within the schema, such as #/$defs/name")
    place: Any = schema
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(place, list) and name.isdecimal() and len(name) < 6 and int(name) < len(place):
            place = place[int(name)]
        elif isinstance(place, dict) and name in place:
            place = place[name]
        else:
            raise ValueError(f"$ref is {_cut(reference)}, which is not in the schema")


def _regex_size(pattern: str) -> int:
    """How many parts a regular expression has once its repetitions are written out."""
    groups = [0]  # the size of each group that is open
    last = 0  # the size of what a repetition would repeat
    for part in _REGEX_PARTS.finditer(pattern):
        text = part.group()
        if text == "(":
            if len(groups) > MAX_REGEX_DEPTH:
                raise ValueError(f"the regular expression nests more than {MAX_REGEX_DEPTH} groups")
            groups.append(0)
            last = 0
        elif text == ")" and len(groups) > 1:
            last = groups.pop() + 1
            groups[-1] += last
        elif part.group(1) or part.group(3):
            times = max(int(bound[:9]) for bound in (part.group(1), part.group(3)) if bound)
            groups[-1] += last * (max(times, 1) - 1)
            last *= max(times, 1)
        else:
            last = 1
            groups[-1] += 1
        if groups[-1] > MAX_REGEX_SIZE:
            return groups[-1]
    return sum(groups)


def _cut(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


JsonSchema = Annotated[dict[str, Any], at_most(MAX_SCHEMA_NODES), AfterValidator(check_schema)]
JsonSchemaOrText = Annotated[dict[str, Any], AfterValidator(check_schema), BeforeValidator(schema_of)]
Regex = Annotated[str, Field(max_length=MAX_REGEX_CHARACTERS), AfterValidator(check_regex)]
Grammar = Annotated[str, Field(max_length=MAX_GRAMMAR_BYTES), AfterValidator(check_grammar)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARACTERS)]],
    Field(min_length=1),
    at_most(MAX_CHOICES),
]

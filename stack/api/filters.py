"""Wire types of filters on metadata, in the form that OpenAI's search of vector stores has: comparisons, and their
combinations. What each means, stack/memory_banks/filters.py says."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from stack.api.wire import Wire, at_most, without_nul

MAX_DEPTH = 10
MAX_PARTS = 200
MAX_VALUES = 1_000
# Of a filter with all its parts.
MAX_ALL_VALUES = 2_000
MAX_ALL_CHARACTERS = 2**18
MAX_KEY_LENGTH = 200
MAX_VALUE_LENGTH = 4_000

Key = Annotated[str, Field(min_length=1, max_length=MAX_KEY_LENGTH), AfterValidator(without_nul)]


def _comparable(value: Any) -> Any:
    """A text or a number: what has an order."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {value!r:.80}; allowed: a text or a number")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"is {value!r:.80}; allowed: a number that a float of 64 bits can be")
    return value


def _scalar(value: Any) -> Any:
    if isinstance(value, bool | str | int | float):
        return value if isinstance(value, bool) else _comparable(value)
    raise ValueError(f"is {value!r:.80}; allowed: a text, a number, true or false")


def _text(value: str) -> str:
    if len(value) > MAX_VALUE_LENGTH:
        raise ValueError(f"has {len(value)} characters; allowed: at most {MAX_VALUE_LENGTH}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds half of a character")
    return without_nul(value)


Comparable = Annotated[float | str, PlainValidator(_comparable, json_schema_input_type=float | str)]
Scalar = Annotated[bool | float | str, PlainValidator(_scalar, json_schema_input_type=bool | float | str)]


class Equality(Wire):
    """The value of a key is this one, or is not."""

    type: Literal["eq", "ne"]
    key: Key
    value: Scalar


class Order(Wire):
    """The value of a key is greater or less than this one: numbers as numbers, texts by their characters' numbers."""

    type: Literal["gt", "gte", "lt", "lte"]
    key: Key
    value: Comparable


class Membership(Wire):
    """The value of a key is one of these, or is none of them."""

    type: Literal["in", "nin"]
    key: Key
    value: Annotated[list[Scalar], at_most(MAX_VALUES)]


class Existence(Wire):
    """The metadata has the key."""

    type: Literal["exists"]
    key: Key


class Combination(Wire):
    """All of the filters hold, or any of them does."""

    type: Literal["and", "or"]
    filters: Annotated[list["AnyFilter"], at_most(MAX_PARTS), Field(min_length=1)]


class Negation(Wire):
    """The filter does not hold."""

    type: Literal["not"]
    filter: "AnyFilter"


AnyFilter = Annotated[
    Equality | Order | Membership | Existence | Combination | Negation,
    Field(discriminator="type"),
]


def _bounded(value: Any) -> Any:
    """Refuses what is too deep or too large before any of it is looked at."""
    level = [value]
    parts = values = characters = 0
    for _depth in range(MAX_DEPTH):
        parts += len(level)
        _require_at_most(MAX_PARTS, parts, "parts")
        given = [one for part in level for one in _values(part)]
        values += len(given)
        _require_at_most(MAX_ALL_VALUES, values, "values in all")
        characters += sum(len(one) for one in given if isinstance(one, str))
        _require_at_most(MAX_ALL_CHARACTERS, characters, "characters of values in all")
        level = [inner for part in level for inner in _inner(part)]
        if not level:
            return value
    raise ValueError(f"is nested deeper than {MAX_DEPTH} levels; allowed: at most {MAX_DEPTH}")


def _require_at_most(most: int, found: int, what: str) -> None:
    if found > most:
        raise ValueError(f"has more than {most} {what}; allowed: at most {most}")


def _inner(part: Any) -> list[Any]:
    if not isinstance(part, Mapping):
        return []
    several = part.get("filters")
    return [*(several if isinstance(several, list) else []), *([part["filter"]] if "filter" in part else [])]


def _values(part: Any) -> list[Any]:
    if not isinstance(part, Mapping) or "value" not in part:
        return []
    return part["value"] if isinstance(part["value"], list) else [part["value"]]


Filter = Annotated[AnyFilter, BeforeValidator(_bounded)]

Combination.model_rebuild()
Negation.model_rebuild()

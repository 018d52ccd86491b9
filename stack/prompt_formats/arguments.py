"""A call's arguments as its tool's JSON schema has them.

Models write numbers as strings, in some formats always, and at times where they need not. What stands in a string is
taken for what the schema asks for where that is exact: "3" for an integer, not "3 apples". Anything else that does not
fit makes the call a broken one. Of JSON Schema this reads types, enum, const, properties, required,
additionalProperties, items, anyOf, oneOf, allOf and references within the schema; the rest is left to the tool.
"""

import json
import re
from typing import Any

MAX_DEPTH = 64
# References and alternatives can make a small schema endless to follow.
_MAX_STEPS = 10_000
_INTEGER = re.compile(r"-?[0-9]{1,400}")
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,3})?")
_WORDS = {"true": True, "True": True, "false": False, "False": False}


class Misfit(ValueError):
    """A value that its schema does not allow."""


def typed_arguments(arguments: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the types of the schema. Raises Misfit."""
    _require_depth(arguments, MAX_DEPTH)
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        raise Misfit("has NaN, an infinite number, or half of a character") from error
    typed: dict[str, Any] = _Schema(schema).fit(arguments, schema | {"type": "object"})
    return typed


def _require_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise Misfit(f"is nested deeper than {MAX_DEPTH} levels")
        for one in value.values() if isinstance(value, dict) else value:
            _require_depth(one, left - 1)


class _Schema:
    """A schema that values are fitted to, and how much longer that may take."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._steps = _MAX_STEPS
        self._depth = 0

    def fit(self, value: Any, schema: Any) -> Any:
        self._steps -= 1
        if self._steps <= 0 or self._depth > 2 * MAX_DEPTH:
            raise Misfit("takes too long to compare with its schema")
        if schema is True or schema is None:
            return value
        if not isinstance(schema, dict):
            raise Misfit("is not allowed")
        self._depth += 1
        try:
            return self._fit(value, schema)
        finally:
            self._depth -= 1

    def _fit(self, value: Any, schema: dict[str, Any]) -> Any:
        if isinstance(schema.get("$ref"), str):
            value = self.fit(value, self._at(schema["$ref"]))
        for part in _listed(schema, "allOf"):
            value = self.fit(value, part)
        for key in ("anyOf", "oneOf"):
            if alternatives := _listed(schema, key):
                value = self._fit_any(value, alternatives)
        value = _of_types(value, _listed(schema, "type"))
        if "const" in schema or "enum" in schema:
            value = _one_of(value, [schema["const"]] if "const" in schema else _listed(schema, "enum"))
        if isinstance(value, dict):
            return self._fit_object(value, schema)
        if isinstance(value, list) and "items" in schema:
            return [self.fit(one, schema["items"]) for one in value]
        return value

    def _fit_any(self, value: Any, alternatives: list[Any]) -> Any:
        """As the first alternative that allows the value as it is, or else, converted."""
        converted = []
        for alternative in alternatives:
            try:
                fitted = self.fit(value, alternative)
            except Misfit:
                if self._steps <= 0:
                    raise
                continue
            if _same(fitted, value):
                return fitted
            converted.append(fitted)
        if not converted:
            raise Misfit("fits none of the alternatives")
        return converted[0]

    def _fit_object(self, value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            properties = {}
        others = None if "patternProperties" in schema else schema.get("additionalProperties")
        if missing := [name for name in _listed(schema, "required") if isinstance(name, str) and name not in value]:
            raise Misfit(f"lacks {missing[0]!r}")
        return {name: self.fit(one, properties.get(name, others)) for name, one in value.items()}

    def _at(self, reference: str) -> Any:
        """What a reference within the schema points to. One that leads out of it allows anything."""
        if reference != "#" and not reference.startswith("#/"):
            return True
        place: Any = self._root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                place = place[int(key)] if isinstance(place, list) else place[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise Misfit(f"has a schema whose reference {reference!r} leads nowhere") from None
        return place


def _listed(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key, [])
    return value if isinstance(value, list) else [value]


def _of_types(value: Any, types: list[Any]) -> Any:
    if not types or any(_is(value, type_) for type_ in types):
        return int(value) if isinstance(value, float) and "integer" in types and "number" not in types else value
    if isinstance(value, str):
        for type_ in types:
            converted = _read(value.strip(), type_)
            if _is(converted, type_):
                return converted
    raise Misfit(f"must be of type {' or '.join(map(str, types))}")


def _is(value: Any, type_: Any) -> bool:
    match type_:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "null":
            return value is None
    return False


def _read(written: str, type_: Any) -> Any:
    """What a string says, if it is a value of the type and nothing else; otherwise something that is not of it."""
    match type_:
        case "boolean":
            return _WORDS.get(written)
        case "integer":
            return int(written) if _INTEGER.fullmatch(written) else None
        case "number":
            return _number(written)
        case "null":
            return None if written in ("null", "None") else written
        case "array" | "object":
            return _json(written)
    return None


def _number(written: str) -> float | int | None:
    if _INTEGER.fullmatch(written):
        return int(written)
    value = float(written) if _NUMBER.fullmatch(written) else None
    return value if value is not None and abs(value) != float("inf") else None


def _json(written: str) -> Any:
    try:
        value = json.loads(written)
        _require_depth(value, MAX_DEPTH)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _one_of(value: Any, allowed: list[Any]) -> Any:
    for one in allowed:
        if _same(one, value):
            return one
    if isinstance(value, str):
        for one in allowed:
            if not isinstance(one, str) and _same(one, _json(_WORDS_AS_JSON.get(value, value))) and one is not None:
                return one
    raise Misfit(f"must be one of {json.dumps(allowed)[:200]}")


_WORDS_AS_JSON = {"True": "true", "False": "false"}


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON values: 1 and true are not, 1 and 1.0 are."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)

"""What constrains an answer is bounded before anything is made of it."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from stack.api.schemas import check_grammar, check_regex, check_schema, schema_of


def nested(levels: int) -> dict[str, Any]:
    """A schema of so many levels, each in the one before."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


GOOD_SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "required": ["a"]},
    {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
    {"$defs": {"a/b~c": {"type": "string"}}, "$ref": "#/$defs/a~1b~0c"},
    {"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/0"}]},
    {"properties": {"me": {"$ref": "#"}}},
    {"properties": {"$ref": {"type": "string"}, "pattern": {"type": "string"}, "maxItems": {"type": "integer"}}},
    {"type": "string", "pattern": "^[a-z]{1,100}$", "maxLength": 10_000},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"enum": ["x" * 60] * 900},
    nested(32),
]
BAD_SCHEMAS: list[tuple[dict[str, Any], str]] = [
    ({"$ref": "http://example.org/a.json"}, "$ref is 'http://example.org/a.json'; allowed: references within"),
    ({"items": [{"$ref": "file:///etc/passwd"}]}, "$ref is 'file:///etc/passwd'; allowed: references within"),
    ({"$ref": "other.json#/a"}, "allowed: references within"),
    ({"$dynamicRef": "http://example.org"}, "allowed: references within"),
    ({"$ref": "#/$defs/a"}, "$ref is '#/$defs/a', which is not in the schema"),
    ({"anyOf": [{"$ref": "#/anyOf/1"}]}, "which is not in the schema"),
    ({"anyOf": [{"$ref": "#/anyOf/" + "9" * 5_000}]}, "which is not in the schema"),
    ({"type": "string", "pattern": "(a{1,1000}){1,1000}"}, "allowed: at most 10000"),
    ({"patternProperties": {"(a{1,1000}){1,1000}": {}}}, "allowed: at most 10000"),
    ({"type": "array", "minItems": 10**9}, "minItems is 1000000000; allowed: at most 10000"),
    ({"type": "array", "maxItems": 1e300}, "maxItems is 1e+300; allowed: at most 10000"),
    ({"type": "string", "maxLength": 10_001}, "maxLength is 10001; allowed: at most 10000"),
    ({"minimum": 2**63}, "the schema holds the number 9223372036854775808; allowed: those of 64 bits"),
    ({"properties": {str(number): {} for number in range(5_000)}}, "more than 5000 values"),
    ({"enum": ["x" * 1_000] * 100}, "more than 65536 characters"),
    ({"x" * 70_000: 1}, "more than 65536 characters"),
    (nested(33), "nested deeper than 32 levels"),
]


@pytest.mark.parametrize("schema", GOOD_SCHEMAS, ids=lambda schema: str(schema)[:60])
def test_schemas_within_the_bounds_are_taken_as_they_are(schema: dict[str, Any]) -> None:
    assert check_schema(schema) is schema


@pytest.mark.parametrize(("schema", "words"), BAD_SCHEMAS, ids=[words for _, words in BAD_SCHEMAS])
def test_other_schemas_are_refused_with_the_bound(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        check_schema(schema)
    assert len(str(caught.value)) < 400


GOOD_REGEXES = [
    "",
    "a",
    r"[a-z]{1,100}@([a-z]{1,50}\.){1,10}com",
    r"(a+)+b",
    r"\({100}",
    r"[(]{100}[])]{5}[^]]",
    r"\d{3,}",
    "(" * 32 + "a" + ")" * 32,
    "x{",
    "{1,5}",
    "a)b",
    "[",
]
BAD_REGEXES = [
    ("x" * 2_001, "has 2001 characters; allowed: at most 2000"),
    ("a\0", "NUL"),
    ("a{10001}", "has 10001 parts once its repetitions are written out; allowed: at most 10000"),
    ("(a{1,1000}){1,1000}", "allowed: at most 10000"),
    ("((((a{30}){30}){30}){30}){30}", "allowed: at most 10000"),
    ("(ab{,100}c){500,}", "allowed: at most 10000"),
    ("a{" + "9" * 1_000 + "}", "allowed: at most 10000"),
    ("a{100}{200}", "allowed: at most 10000"),
    ("(" * 33 + "a" + ")" * 33, "nests more than 32 groups"),
]


@pytest.mark.parametrize("pattern", GOOD_REGEXES)
def test_regular_expressions_within_the_bounds_are_taken(pattern: str) -> None:
    assert check_regex(pattern) == pattern


@pytest.mark.parametrize(("pattern", "words"), BAD_REGEXES, ids=[words for _, words in BAD_REGEXES])
def test_other_regular_expressions_are_refused_with_the_bound(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        check_regex(pattern)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("grammar", "words"), [("", "blank"), (" \n", "blank"), ("a\0", "NUL")], ids=repr)
def test_a_grammar_that_is_blank_or_holds_a_nul_is_refused(grammar: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_grammar(grammar)


def test_a_schema_as_text_becomes_an_object() -> None:
    assert schema_of('{"type": "object"}') == {"type": "object"}
    assert schema_of({"type": "object"}) == {"type": "object"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[" * 60_000, "not JSON"), ("9" * 5_000, "not JSON"), (" " * 70_000, "at most 65536")],
    ids=["broken", "too deep", "too long a number", "too long"],
)
def test_a_text_that_is_no_schema_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schema_of(text)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (check_schema, {"enum": ["x"] * 1_000_000}),
        (check_schema, {"properties": {f"p{number}": {"$ref": "#/" + "a/" * 10} for number in range(2_000)}}),
        (check_regex, "(" * 1_000 + "a{1,9}" * 100),
        (check_regex, "[" * 2_000),
        (check_regex, "\\" * 1_999),
        (check_regex, "[\\" * 1_000),
        (check_regex, "{1," * 600),
        (check_regex, "{" + "9" * 1_999),
    ],
    ids=["values", "references", "groups", "sets", "escapes", "escapes in sets", "repetitions", "digits"],
)
def test_even_a_refusal_is_cheap(check: Callable[[Any], Any], value: Any) -> None:
    begin = time.thread_time()
    with suppress(ValueError):
        check(value)
    assert time.thread_time() - begin < 0.05

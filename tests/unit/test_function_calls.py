"""Calls of functions beside the expected ones, as BFCL compares them."""

import json
from typing import Any

import pytest

from stack import function_calls
from stack.errors import BadInput
from stack.function_calls import match


def function(name: str = "f", required: tuple[str, ...] = (), **parameters: Any) -> dict[str, Any]:
    properties = {one: {"type": kind} if isinstance(kind, str) else kind for one, kind in parameters.items()}
    return {"name": name, "description": "", "parameters": {"properties": properties, "required": list(required)}}


LIST = {"type": "array", "items": {"type": "integer"}}
OBJECTS = {"type": "array", "items": {"type": "dict"}}


@pytest.mark.parametrize(
    ("kind", "value", "allowed", "is_right"),
    [
        ("string", "new york, NY", ["New York NY"], True),
        ("string", "New York", ["Boston"], False),
        ("string", 5, ["5"], False),
        ("string", "it's", ['it"s'], True),
        ("integer", 5, [5], True),
        ("integer", 5.0, [5], False),
        ("integer", "5", [5], False),
        ("integer", "n", ["n"], True),  # a variable
        ("integer", True, [1], False),
        ("float", 5, [5.0], True),
        ("float", 5.5, [5.0], False),
        ("boolean", True, [True], True),
        ("boolean", 1, [True], False),
        ("any", "x", ["X"], True),
        (LIST, [1, 2], [[1, 2]], True),
        (LIST, [2, 1], [[1, 2]], False),
        (LIST, [1, 2.0], [[1, 2]], False),
        (LIST, [1], [[1, 2], [1]], True),
        ({"type": "tuple", "items": {"type": "float"}}, [1.5, 2.5], [[1.5, 2.5]], True),
        ({"type": "array", "items": {"type": "string"}}, ["A-B"], [["ab"]], True),
        ("dict", {"a": "X y"}, [{"a": ["xy"], "b": ["", 1]}], True),
        ("dict", {"a": "x", "b": 2}, [{"a": ["x"], "b": ["", 1]}], False),
        ("dict", {"a": "x"}, [{"a": ["x"], "b": [1]}], False),
        ("dict", {"c": "x"}, [{"a": ["", "x"]}], False),
        (OBJECTS, [{"a": 1}, {"a": 2}], [[{"a": [1]}, {"a": [2]}]], True),
        (OBJECTS, [{"a": 2}, {"a": 1}], [[{"a": [1]}, {"a": [2]}]], False),
    ],
)
def test_a_value_is_right_that_is_one_of_the_allowed(kind: Any, value: Any, allowed: list[Any], is_right: bool) -> None:
    assert match([function(x=kind)], [("f", {"x": value})], [{"f": {"x": allowed}}]) is is_right


@pytest.mark.parametrize(
    ("arguments", "is_right"),
    [
        ({"a": 1}, True),
        ({"a": 1, "b": 2}, True),
        ({"a": 1, "b": 3}, False),
        ({"b": 2}, False),
        ({"a": 1, "c": 1}, False),
        ({}, False),
        ("a", False),
        (None, False),
    ],
)
def test_what_is_required_must_be_there_and_what_is_optional_may(arguments: Any, is_right: bool) -> None:
    functions = [function(required=("a",), a="integer", b="integer")]
    assert match(functions, [("f", arguments)], [{"f": {"a": [1], "b": ["", 2]}}]) is is_right


def test_calls_are_as_many_as_expected_in_any_order() -> None:
    functions = [function("f", a="integer"), function("g")]
    expected = [{"f": {"a": [1]}}, {"g": {}}, {"f": {"a": [2]}}]
    right = [("g", {}), ("f", {"a": 2}), ("f", {"a": 1})]
    assert match(functions, right, expected)
    assert not match(functions, right[:2], expected)
    assert not match(functions, [*right, ("g", {})], expected)
    assert not match(functions, [("g", {}), ("f", {"a": 2}), ("f", {"a": 2})], expected)
    assert not match(functions, [("h", {}), ("f", {"a": 2}), ("f", {"a": 1})], expected)
    assert match(functions, [], [])


def test_a_call_that_equals_another_one_only_as_a_number_does_is_another_one() -> None:
    functions = [function(a="integer")]
    assert not match(functions, [("f", {"a": 5.0}), ("f", {"a": 5})], [{"f": {"a": [5]}}, {"f": {"a": [5]}}])


def row(**changes: Any) -> dict[str, Any]:
    parameters = {"type": "dict", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    return {
        "question": [[{"role": "user", "content": "How many?"}]],
        "function": [{"name": "f", "description": "Counts.", "parameters": parameters}],
        "ground_truth": [{"f": {"a": [1]}}],
    } | changes


def test_a_row_of_bfcl_is_a_case() -> None:
    case = function_calls.read(1, row())
    assert case.messages == [{"role": "user", "content": "How many?"}]
    assert case.expected == [{"f": {"a": [1]}}]
    assert match(case.functions, [("f", {"a": 1})], case.expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": []}, "question is not a list of one list of messages"),
        ({"question": [[]]}, "question has no message"),
        ({"question": [[{"role": "nobody"}]]}, "nobody"),
        ({"function": []}, "at least 1"),
        ({"function": [{"name": "f"}]}, "parameters: is required"),
        ({"ground_truth": [{"g": {}}]}, "ground_truth calls 'g'; allowed: f"),
        ({"ground_truth": [{"f": {"a": 1}}]}, "valid list"),
        ({"ground_truth": [{"f": {}, "g": {}}]}, "at most 1"),
        ({"function": [function(a="String")], "ground_truth": []}, "'a' has the type 'String'; allowed"),
        ({"function": [function(a={"type": "array"})], "ground_truth": []}, "'array of None'"),
        (
            {"function": [function(a="dict")], "ground_truth": [{"f": {"a": [{"b": 5}]}}]},
            "{\"b\": 5} for the parameter 'a'",
        ),
        ({"function": [function(a="dict")], "ground_truth": [{"f": {"a": ["", {"b": "x"}]}}]}, "allowed: objects with"),
        ({"function": [function(a=OBJECTS)], "ground_truth": [{"f": {"a": [[5]]}}]}, "5 for the parameter 'a'"),
        ({"function": [function(a=OBJECTS)], "ground_truth": [{"f": {"a": [[{"b": 5}]]}}]}, "a list of values"),
    ],
)
def test_a_row_that_is_none_is_refused_by_its_number(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        function_calls.read(3, row(**changes))
    assert caught.value.message.startswith("row 3: ")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("kind", "allowed", "value"),
    [
        ("dict", ["", {"b": [5, ""]}, "variable"], {"b": 5}),
        (OBJECTS, ["", [{"b": [5]}], "variable"], [{"b": 5}]),
    ],
)
def test_what_a_row_may_hold_is_compared_whatever_the_model_calls(kind: Any, allowed: list[Any], value: Any) -> None:
    case = function_calls.read(1, row(function=[function(a=kind)], ground_truth=[{"f": {"a": allowed}}]))
    assert match(case.functions, [("f", {"a": value})], case.expected)
    for other in (5, "x", {}, {"b": [5]}, {"c": 5}, [], [5], [{}], [{"b": [5]}], [{"c": 5}], [[5]], None):
        assert not match(case.functions, [("f", {"a": other})], case.expected) or other in ({}, [])


def test_functions_are_tools_with_json_schemas() -> None:
    nested = {"type": "dict", "properties": {"type": {"type": "any"}}}
    (tool,) = function_calls.tools([function(a="float", b={"type": "tuple", "items": {"type": "dict"}}, c=nested)])
    assert (tool["type"], tool["function"]["name"]) == ("function", "f")
    parameters = tool["function"]["parameters"]
    assert parameters["type"] == "object"
    assert parameters["properties"]["a"] == {"type": "number"}
    assert parameters["properties"]["b"] == {"type": "array", "items": {"type": "object"}}
    assert parameters["properties"]["c"] == {"type": "object", "properties": {"type": {"type": "string"}}}


def test_calls_are_those_of_the_message_whatever_its_text_is() -> None:
    calls = [{"function": {"name": "f", "arguments": '{"a": 1}'}}]
    found = function_calls.calls_of({"content": None, "tool_calls": calls})
    assert found == [("f", {"a": 1})]
    assert json.loads(function_calls.written(found)) == [{"name": "f", "arguments": {"a": 1}}]
    assert function_calls.calls_of({"content": function_calls.written(found)}) == []
    assert function_calls.calls_of({"content": "Paris", "tool_calls": None}) == []

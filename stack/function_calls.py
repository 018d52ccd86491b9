"""Whether a model calls the right functions: by the syntax of the calls, as BFCL compares them (its AST match).

The Berkeley Function-Calling Leaderboard (Patil et al. 2025) gives, for each parameter of an expected call, a list of
values of which any is right; an empty text among them says that it may be left out. Texts are compared without case,
blanks and most marks; a whole number is right where a float is expected; of several calls, the order does not matter.
This is what BFCL does for Python; its sets for Java and JavaScript write values in those languages, and are not scored.

A row is BFCL's question and its answer in one: `question`, a list with one list of messages, `function`, the functions
that there are, and `ground_truth`, the expected calls, all of type json.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from stack.api.datasets import TrainEvalDataset, TrainEvalDatasetColumnType
from stack.api.wire import describe
from stack.datasets import DIALOG, columns_of, plain
from stack.errors import BadInput

COLUMNS = ("question", "function", "ground_truth")
_PYTHON = {
    **{"string": str, "integer": int, "float": float, "boolean": bool},
    **{"array": list, "tuple": list, "dict": dict, "any": str},
}
_IGNORED = re.compile(r"[ ,./\-_*^]")
_SCHEMAS = {"float": "number", "tuple": "array", "dict": "object", "any": "string"}
# A parameter that may be left out is one that has this among its values.
_OPTIONAL = ""


class _Parameters(BaseModel):
    properties: dict[str, dict[str, Any]]
    required: list[str] = []


class _Function(BaseModel):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str = ""
    parameters: _Parameters


_FUNCTIONS = TypeAdapter(Annotated[list[_Function], Field(min_length=1, max_length=128)])
_EXPECTED = TypeAdapter(
    Annotated[
        list[Annotated[dict[str, dict[str, list[Any]]], Field(min_length=1, max_length=1)]], Field(max_length=100)
    ]
)


@dataclass(frozen=True)
class Case:
    """A question in OpenAI's messages, the functions that may be called, and the calls that are expected."""

    messages: list[dict[str, Any]]
    functions: list[dict[str, Any]]
    expected: list[dict[str, Any]]


def columns_problem(dataset: TrainEvalDataset) -> str | None:
    """What is missing of the columns, if anything is."""
    if all(dataset.columns.get(name) == TrainEvalDatasetColumnType.json for name in COLUMNS):
        return None
    return (
        f"function calls need the columns {', '.join(COLUMNS)} of type json; this data set has: {columns_of(dataset)}"
    )


def read(number: int, row: Mapping[str, Any]) -> Case:
    """The case in a row, by its number. Raises BadInput, naming the row."""
    try:
        functions = [one.model_dump() for one in _FUNCTIONS.validate_python(row["function"])]
        expected = _EXPECTED.validate_python(row["ground_truth"])
        turns = row["question"]
        if not isinstance(turns, list) or len(turns) != 1:
            raise BadInput("question is not a list of one list of messages")
        messages = [plain(message) for message in DIALOG.validate_python(turns[0])]
        if not messages:
            raise BadInput("question has no message")
        _require_known(functions, expected)
    except ValidationError as error:
        raise BadInput(f"row {number}: {describe(error)}") from error
    except BadInput as error:
        raise BadInput(f"row {number}: {error.message}") from error
    return Case(messages, functions, expected)


def tools(functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The functions as tools in OpenAI's shape."""
    return [
        dict(type="function", function=dict(one, parameters=dict(_schema(one["parameters"]), type="object")))
        for one in functions
    ]


def calls_of(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The names and arguments of the calls in a message in OpenAI's shape."""
    functions = [one["function"] for one in message.get("tool_calls") or ()]
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


def written(calls: Sequence[tuple[str, Any]]) -> str:
    """Calls as a text."""
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def match(functions: Sequence[Mapping[str, Any]], calls: Sequence[tuple[str, Any]], expected: Sequence[Any]) -> bool:
    """Whether calls, each a name and its arguments, are the expected ones, each an object {name: {parameter: values}}.

    `functions` are BFCL's descriptions of the functions that there are. Names are compared as they are.
    """
    if len(calls) != len(expected):
        return False
    described = {function["name"]: function for function in functions}
    left = list(calls)
    for one in expected:
        ((name, allowed),) = one.items()
        fitting = (at for at, call in enumerate(left) if call[0] == name and _fits(described[name], call[1], allowed))
        if (found := next(fitting, None)) is None:
            return False
        del left[found]
    return True


def _require_known(functions: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> None:
    described = {one["name"]: one for one in functions}
    for function in functions:
        for name, parameter in function["parameters"]["properties"].items():
            kind, items = parameter.get("type"), parameter.get("items")
            inner = items.get("type") if isinstance(items, dict) else None
            if kind not in _PYTHON or (kind in ("array", "tuple") and inner not in _PYTHON):
                shown = kind if kind not in _PYTHON else f"{kind} of {inner}"
                allowed = ", ".join(_PYTHON)
                raise BadInput(f"the parameter {name!r} has the type {shown!r}; allowed, also of items: {allowed}")
    for call in expected:
        (name,) = call
        if name not in described:
            raise BadInput(f"ground_truth calls {name!r}; allowed: {', '.join(described)}")
        properties = described[name]["parameters"]["properties"]
        for parameter, allowed in call[name].items():
            if parameter in properties:
                _require_objects(parameter, properties[parameter], allowed)


def _require_objects(name: str, parameter: Mapping[str, Any], allowed: Sequence[Any]) -> None:
    """Raises BadInput unless what an object may hold, where there is one, is a list of values for each of its names."""
    items = parameter.get("items")
    if parameter["type"] == "dict":
        objects = [one for one in allowed if isinstance(one, dict)]
    elif parameter["type"] in ("array", "tuple") and isinstance(items, dict) and items["type"] == "dict":
        objects = [item for one in allowed if isinstance(one, list) for item in one]
    else:
        return
    for one in objects:
        if not isinstance(one, dict) or not all(isinstance(values, list) for values in one.values()):
            raise BadInput(
                f"ground_truth has {json.dumps(one)[:200]} for the parameter {name!r}; allowed: objects with a list of "
                'values for each name, like {"city": ["Paris"]}'
            )


def _schema(value: Any) -> Any:
    """BFCL's description of parameters, in which types are called as in Python, as a JSON schema."""
    if isinstance(value, dict):
        return {key: _SCHEMAS.get(one, one) if key == "type" and isinstance(one, str) else _schema(one)
                for key, one in value.items()}  # fmt: skip
    return [_schema(one) for one in value] if isinstance(value, list) else value


def _fits(function: Mapping[str, Any], arguments: Any, allowed: Mapping[str, list[Any]]) -> bool:
    parameters = function["parameters"]
    if not isinstance(arguments, dict) or any(name not in arguments for name in parameters.get("required", ())):
        return False
    for name, value in arguments.items():
        if name not in parameters["properties"] or name not in allowed:
            return False
        if not _is_right(parameters["properties"][name], value, allowed[name]):
            return False
    return all(name in arguments or _OPTIONAL in values for name, values in allowed.items())


def _is_right(parameter: Mapping[str, Any], value: Any, allowed: list[Any]) -> bool:
    kind: Any = _PYTHON[parameter["type"]]
    if kind is float and type(value) is int:
        value = float(value)
    inner = _PYTHON.get(parameter["items"]["type"]) if parameter["type"] in ("array", "tuple") else None
    shown = next((type(one) for one in allowed if one != _OPTIONAL), None)
    if type(value) is not kind:
        # The name of a variable may stand in the place of a value: then what is allowed is of another type too.
        return shown is not None and type(value) is shown and value in allowed
    if inner is not None and not _have_type(value, inner, allowed):
        return False
    if shown is not None and shown is not kind:
        return value in allowed
    if kind is dict:
        return any(_is_right_object(value, one) for one in allowed if isinstance(one, dict))
    if kind is list and inner is dict:
        lists = (one for one in allowed if isinstance(one, list) or one == _OPTIONAL)
        return any(_are_right_objects(value, list(one)) for one in lists)
    if kind is str:
        return _standard(value) in [_standard(one) for one in allowed if isinstance(one, str)]
    if kind is list:
        lists = (one for one in allowed if isinstance(one, list | str))
        return [_standard(one) for one in value] in [[_standard(item) for item in one] for one in lists]
    return value in allowed


def _have_type(values: list[Any], inner: type, allowed: list[Any]) -> bool:
    """Whether the items of a list have the type that the function says, or that of what is allowed."""
    return any(not isinstance(one, list) or all(_item_has_type(item, inner, one) for item in values) for one in allowed)


def _item_has_type(item: Any, inner: type, allowed: list[Any]) -> bool:
    shown = next((type(one) for one in allowed if one != _OPTIONAL), None)
    return type(item) is inner or (shown is not None and type(item) is shown)


def _is_right_object(value: Mapping[str, Any], allowed: Mapping[str, list[Any]]) -> bool:
    return all(
        name in allowed and _standard(one) in [_standard(item) for item in allowed[name]] for name, one in value.items()
    ) and all(name in value or _OPTIONAL in values for name, values in allowed.items())


def _are_right_objects(values: list[Any], allowed: list[Any]) -> bool:
    return len(values) == len(allowed) and all(
        isinstance(one, dict) and _is_right_object(one, item) for one, item in zip(values, allowed, strict=True)
    )


def _standard(value: Any) -> Any:
    """A text as it is compared: without case, blanks and most marks."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value

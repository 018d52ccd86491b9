"""From the words in which a model writes calls to the calls: one function for each way of writing.

Each gives pairs of a tool's name and its arguments, as they were written, or raises ValueError.
"""

import ast
import json
import re
from contextlib import suppress
from typing import Any

Call = tuple[str, dict[str, Any]]

MAX_PYTHONIC_CHARACTERS = 100_000
# What may stand between objects of JSON: a list's own characters, blank space, and semicolons.
BETWEEN = re.compile(r"[\s,;\[\]]*")
_FUNCTION = re.compile(r"<function=([^<>{}]{1,300})>")
_BUILTIN = re.compile(r"\s*(\w{1,300})\.call\(\s*(\w{1,300})\s*=\s*\"(.*)\"\s*\)\s*", re.DOTALL)
_BEGINS_JSON = re.compile(r"""[\s\[]*\{\s*"(name"\s*:|type"\s*:\s*"function")""")
_BEGINS_BUILTIN = re.compile(r"\s*(brave_search|wolfram_alpha|photogen)\.call\(")
_BEGINS_FUNCTION = re.compile(r"\s*<function=")
_DECODER = json.JSONDecoder()
_JSON_WORDS = {"true": True, "false": False, "null": None}


def json_calls(text: str) -> list[Call]:
    """One or several objects {"name", "parameters"} (or "arguments"), alone, in a list, or one after the other."""
    calls = []
    position = _after_gap(text, 0)
    while position < len(text):
        value, position = _DECODER.raw_decode(text, position)
        calls.append(_call(value))
        position = _after_gap(text, position)
    return calls


def _after_gap(text: str, position: int) -> int:
    gap = BETWEEN.match(text, position)
    assert gap is not None
    return gap.end()


def _call(value: Any) -> Call:
    name = value.get("name") if isinstance(value, dict) else None
    arguments = value.get("parameters", value.get("arguments", {})) if isinstance(value, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("is not an object with a name and parameters")
    return name, arguments


def function_calls(text: str) -> list[Call]:
    """<function=name>{...}</function>; the model may leave out the end."""
    text = text.strip()
    start = _FUNCTION.match(text)
    if start is None:
        raise ValueError("is not a function")
    arguments = json.loads(text[start.end() :].removesuffix("</function>"))
    if not isinstance(arguments, dict):
        raise ValueError("has no object of arguments")
    return [(start[1].strip(), arguments)]


def builtin_calls(text: str) -> list[Call]:
    """name.call(query="..."), as Llama 3 calls its built-in tools."""
    written = _BUILTIN.fullmatch(text)
    if written is None:
        raise ValueError("is not a call of a built-in tool")
    name, parameter, value = written.groups()
    with suppress(ValueError):  # Llama 3 itself writes the query without escaping anything in it
        value = json.loads(f'"{value}"')
    return [(name, {parameter: value})]


def pythonic_calls(text: str) -> list[Call]:
    """[f(a=1), g(b="x")]: read as literals, never run."""
    if len(text) > MAX_PYTHONIC_CHARACTERS:
        raise ValueError("is too long")
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError("is not Python") from error
    if not isinstance(body, ast.List) or not body.elts:
        raise ValueError("is not a list of calls")
    return [_pythonic(call) for call in body.elts]


def tagged_calls(text: str) -> list[Call]:
    """What Llama 3 writes behind its <|python_tag|>: a call in any of these ways, or else code to run."""
    if _BEGINS_JSON.match(text):
        return json_calls(text)
    if _BEGINS_BUILTIN.match(text):
        return builtin_calls(text)
    if _BEGINS_FUNCTION.match(text):
        return function_calls(text)
    try:
        return pythonic_calls(text)
    except (ValueError, RecursionError):
        return [("code_interpreter", {"code": text})]


def _pythonic(call: ast.expr) -> Call:
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("is not a call with named arguments")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("is not a call with named arguments")
        arguments[keyword.arg] = _literal(keyword.value)
    return _dotted(call.func), arguments


def _dotted(name: ast.expr) -> str:
    match name:
        case ast.Name():
            return name.id
        case ast.Attribute():
            return f"{_dotted(name.value)}.{name.attr}"
    raise ValueError("is not a name")


def _literal(node: ast.expr) -> Any:
    """The value of a literal that JSON has too."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=("true" | "false" | "null") as word):
            return _JSON_WORDS[word]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("is not a literal")


def _key(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError("is not an object with strings for keys")
    return node.value

"""Calls that the model must make: the JSON schema that its decoding is constrained to."""

from typing import Any

from stack.prompt_formats.tools import Tool, ToolUse

MAX_CALLS = 8
# Keys of a schema whose members have names of their own choosing, and those whose values are data.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")


def forced_output(use: ToolUse) -> dict[str, Any]:
    """The field of the engine's body that leaves no other answer than calls; nothing if none must be made.

    One object {"name", "parameters"}, or a list of 1 to 8 of them where several calls are allowed.
    """
    if not use.is_forced:
        return {}
    tools = use.callable
    schemas = [_call_schema(tool, index) for index, tool in enumerate(tools)]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if use.parallel:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": MAX_CALLS}
    # A tool's own references are relative to its schema, which is therefore kept whole, under a name.
    schema = schema | {
        "$defs": {
            _key(i): _moved(tool.parameters, f"#/$defs/{_key(i)}") | {"type": "object"} for i, tool in enumerate(tools)
        }
    }
    return {"structured_outputs": {"json": schema}}


def _key(index: int) -> str:
    return f"tool_{index}"


def _call_schema(tool: Tool, index: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{_key(index)}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold at its new place in another one."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in _NAMED and isinstance(value, dict):
            moved[key] = {name: _moved(one, place) for name, one in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, place)
    return moved

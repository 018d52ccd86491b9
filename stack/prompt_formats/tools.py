"""What a request says of tools: which there are, whether they must be called, and how calls are written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stack.api.inference import ToolParamDefinition
from stack.errors import BadInput

PromptFormat = Literal["llama3", "hermes", "plain"]
ToolStyle = Literal["json", "function_tag"]
BUILTIN = ("brave_search", "wolfram_alpha", "photogen", "code_interpreter")


@dataclass(frozen=True)
class Tool:
    """A function that the model can call. `parameters` is the JSON schema of an object."""

    name: str
    description: str | None
    parameters: dict[str, Any]

    @property
    def is_builtin(self) -> bool:
        """Whether Llama 3 knows this tool by its name."""
        return self.name in BUILTIN


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools.

    `choice` is "auto", "none", "required" (some tool must be called), or the name of the one that must be called.
    `style` is the specification's tool_prompt_format. `parallel`: whether one answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    choice: str = "auto"
    style: ToolStyle = "json"
    parallel: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return () if self.choice == "none" else self.tools

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice not in ("auto", "none")

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that the answer may call. Raises BadInput for a choice that no tool can meet."""
        if self.choice == "required" and not self.tools:
            raise BadInput("the tool choice 'required' needs at least one tool", param="tools")
        if self.choice in ("auto", "none", "required"):
            return self.offered
        chosen = tuple(tool for tool in self.tools if tool.name == self.choice)
        if not chosen:
            allowed = ", ".join(("auto", "none", "required", *(tool.name for tool in self.tools)))
            raise BadInput(f"there is no tool {self.choice!r}; allowed: {allowed}", param="tool_choice")
        return chosen


_BUILTIN_TOOLS = {
    "brave_search": ("query", "Searches the web."),
    "wolfram_alpha": ("query", "Computes, and answers questions of mathematics and science."),
    "photogen": ("query", "Makes a picture of what the query describes."),
    "code_interpreter": ("code", "Runs Python code and gives what it prints."),
}


def builtin_tool(name: str) -> Tool:
    """The tool that Llama 3 knows by this name, one of BUILTIN."""
    if name not in _BUILTIN_TOOLS:
        raise BadInput(f"there is no built-in tool {name!r}; allowed: {', '.join(BUILTIN)}", param="tools")
    parameter, description = _BUILTIN_TOOLS[name]
    return Tool(name, description, _object({parameter: {"type": "string"}}, [parameter]))


_JSON_TYPES = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "list": "array",
    "array": "array",
    "dict": "object",
    "object": "object",
}
_LIST = re.compile(r"(?:list|array)\[(.+)\]")
_DICT = re.compile(r"(?:dict|object)\[str(?:ing)?,(.+)\]")


def typed_schema(parameters: Mapping[str, ToolParamDefinition]) -> dict[str, Any]:
    """The JSON schema of the specification's parameter definitions. Raises BadInput for a type that is not known."""
    properties: dict[str, Any] = {}
    for name, parameter in parameters.items():
        properties[name] = _of_type(re.sub(r"\s", "", parameter.param_type).lower(), name, parameter.param_type)
        if parameter.description:
            properties[name]["description"] = parameter.description
    return _object(properties, [name for name, parameter in parameters.items() if parameter.required])


def _of_type(written: str, name: str, original: str) -> dict[str, Any]:
    if written in _JSON_TYPES:
        return {"type": _JSON_TYPES[written]}
    if of_list := _LIST.fullmatch(written):
        return {"type": "array", "items": _of_type(of_list[1], name, original)}
    if of_dict := _DICT.fullmatch(written):
        return {"type": "object", "additionalProperties": _of_type(of_dict[1], name, original)}
    allowed = f"{', '.join(_JSON_TYPES)}, list[TYPE], dict[str, TYPE]"
    raise BadInput(f"the parameter {name!r} has the unknown type {original!r}; allowed: {allowed}", param="tools")


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

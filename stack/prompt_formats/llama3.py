"""Prompts of Llama 3.1 and 3.2, as Meta's model cards and the package llama-models document them.

The prompt is written here whole, because the chat templates in circulation know only one of its ways to define and call
tools. Where the two sources differ, earlier calls are written as the documentation shows the model's own: behind
<|python_tag|>, but for function tags. Two things differ from both: a custom tool is given with its own JSON schema,
where the examples write a list that says nothing of types; and of several calls in one message each stands in its own,
followed by its result, since these models make one call at a time.
"""

import json
import re
from collections.abc import Iterator
from datetime import date
from itertools import islice, takewhile
from typing import Any

from stack.errors import BadInput
from stack.prompt_formats.forced import forced_output
from stack.prompt_formats.messages import EarlierCall, Message, earlier_calls, json_text, text_of
from stack.prompt_formats.tools import Tool, ToolStyle, ToolUse

# <|end_of_text|>, <|eom_id|>, <|eot_id|>
STOP_TOKENS = [128001, 128008, 128009]
_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "ipython"}
_SPECIAL = re.compile(r"<\|(?=\w+\|>)")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def llama3_body(messages: list[Message], use: ToolUse, today: date) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": llama3_prompt(messages, use, today)}],
        "chat_template": "{{ messages[0]['content'] }}",
        "add_special_tokens": False,
        # How a call begins and whether it ends the turn is said by special tokens.
        "skip_special_tokens": False,
        "stop_token_ids": STOP_TOKENS,
        **forced_output(use),
    }


def llama3_prompt(messages: list[Message], use: ToolUse, today: date) -> str:
    """The whole prompt, up to where the model speaks."""
    turns = [*_introduction(messages, use, today)]
    has_own_system = bool(use.offered) and bool(messages) and _role(messages[0]) == "system"
    turns += _conversation(messages[1:] if has_own_system else messages, use.style)
    return "<|begin_of_text|>" + "".join(turns) + _header("assistant")


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _turn(role: str, text: str, before: str = "", end: str = "<|eot_id|>") -> str:
    return f"{_header(role)}{before}{_plain(text)}{end}"


def _plain(text: str) -> str:
    """A text without special tokens: written in a message, they would end it and begin another one's.

    A blank keeps them readable, for people and the model, and the tokenizer from taking them for what they are not.
    """
    return _SPECIAL.sub("< |", text)


def _introduction(messages: list[Message], use: ToolUse, today: date) -> Iterator[str]:
    """The system message that turns tools on, and the message that defines the custom ones."""
    if not use.offered:
        return
    builtins = [tool.name for tool in use.offered if tool.is_builtin and tool.name != "code_interpreter"]
    text = "Environment: ipython\n"
    text += f"Tools: {', '.join(builtins)}\n" if builtins else "\n"
    text += f"Cutting Knowledge Date: December 2023\nToday Date: {_written(today)}\n"
    if messages and _role(messages[0]) == "system":
        text += "\n" + text_of(messages[0])
    yield _turn("system", text)
    if custom := [tool for tool in use.offered if not tool.is_builtin]:
        yield _turn("user", _json_definitions(custom) if use.style == "json" else _function_definitions(custom))


def _written(day: date) -> str:
    return f"{day.day:02} {_MONTHS[day.month - 1]} {day.year}"


def _json_definitions(tools: list[Tool]) -> str:
    functions = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters},
        }
        for tool in tools
    ]
    listed = "\n".join(json.dumps(function, indent=4, ensure_ascii=False) for function in functions)
    return (
        "Answer the user's question by making use of the following functions if needed.\n"
        "If none of the function can be used, please say so.\n"
        f"Here is a list of functions in JSON format:\n{listed}\n\nReturn function calls in JSON format."
    )


def _function_definitions(tools: list[Tool]) -> str:
    listed = "".join(_function_definition(tool) for tool in tools)
    return (
        f"You have access to the following functions:\n\n{listed}"
        "Think very carefully before calling functions.\n"
        "If you choose to call a function ONLY reply in the following format with no prefix or suffix:\n\n"
        '<function=example_function_name>{"example_name": "example_value"}</function>\n\n'
        "Reminder:\n"
        "- If looking for real time information use relevant functions before falling back to brave_search\n"
        "- Function calls MUST follow the specified format, start with <function= and end with </function>\n"
        "- Required parameters MUST be specified\n"
        "- Only call one function at a time\n"
        "- Put the entire function call reply on one line"
    )


def _function_definition(tool: Tool) -> str:
    description = tool.description or ""
    written = {"name": tool.name, "description": description, "parameters": _parameters(tool.parameters)}
    purpose = f" to '{description}'" if description else ""
    return f"Use the function '{tool.name}'{purpose}:\n{json_text(written)}\n\n"


_FLAT = {"type", "properties", "required", "additionalProperties"}


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Parameters as Meta writes them, each with its type and whether it is required.

    A schema that says more than that stays as it is.
    """
    properties = schema.get("properties")
    if set(schema) - _FLAT or not isinstance(properties, dict) or not all(map(_is_flat, properties.values())):
        return schema
    required = schema.get("required") or ()
    return {
        name: {
            **{key: value for key, value in parameter.items() if key != "type"},
            "param_type": parameter["type"],
            "required": name in required,
        }
        for name, parameter in properties.items()
    }


def _is_flat(parameter: Any) -> bool:
    return isinstance(parameter, dict) and isinstance(parameter.get("type"), str) and "required" not in parameter


def _conversation(messages: list[Message], style: ToolStyle) -> Iterator[str]:
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        if _role(message) != "assistant":
            yield _turn(_ROLES[_role(message)], text_of(message))
            continue
        calls = earlier_calls(message)
        if not calls:
            yield _turn("assistant", text_of(message))
            continue
        results = list(takewhile(lambda one: _role(one) == "tool", islice(messages, position, None)))
        position += len(results)
        yield from _calls_and_results(text_of(message), calls, results, style)


def _calls_and_results(text: str, calls: list[EarlierCall], results: list[Message], style: ToolStyle) -> Iterator[str]:
    """Each call with its own result behind it; results of no call at the end."""
    left = list(results)
    for call in calls:
        yield _called(call, text, style)
        text = ""
        of_call = next((one for one in left if one.get("tool_call_id") == call.id), None)
        if of_call is not None:
            left.remove(of_call)
            yield _turn("ipython", text_of(of_call))
    yield from (_turn("ipython", text_of(one)) for one in left)


def _role(message: Message) -> str:
    role = message.get("role")
    if role != "assistant" and role not in _ROLES:
        raise BadInput(f"unknown role {role!r}; allowed: {', '.join(_ROLES)}, assistant", param="messages")
    return "system" if role == "developer" else str(role)


def _called(call: EarlierCall, text: str, style: ToolStyle) -> str:
    before, words, end = _words_of(call, style)
    return f"{_header('assistant')}{_plain(text)}{before}{_plain(words)}{end}"


def _words_of(call: EarlierCall, style: ToolStyle) -> tuple[str, str, str]:
    """The words of a call, and the special tokens before and after them."""
    match call.arguments:
        case {"query": str() as query, **rest} if (
            call.name in ("brave_search", "wolfram_alpha", "photogen") and not rest
        ):
            return "<|python_tag|>", f"{call.name}.call(query={json_text(query)})", "<|eom_id|>"
        case {"code": str() as code, **rest} if call.name == "code_interpreter" and not rest:
            return "<|python_tag|>", code, "<|eom_id|>"
    if style == "function_tag":
        return "", f"<function={call.name}>{json_text(call.arguments)}</function>", "<|eot_id|>"
    written = {"type": "function", "name": call.name, "parameters": call.arguments}
    return "<|python_tag|>", json_text(written), "<|eom_id|>"

"""Models whose chat template knows no tools: all is said in words.

The system message says which tools there are and how to call them, earlier calls are what the assistant said, and
results are what the user says next.
"""

from collections.abc import Iterator
from typing import Any

from stack.prompt_formats.forced import forced_output
from stack.prompt_formats.messages import EarlierCall, Message, earlier_calls, json_text, text_of
from stack.prompt_formats.tools import Tool, ToolStyle, ToolUse


def plain_body(messages: list[Message], use: ToolUse) -> dict[str, Any]:
    names: dict[str | None, str] = {}
    told: list[Message] = []
    was_result = False
    for message in messages:
        if message.get("role") == "tool":
            _tell_result(told, _result(message, names), was_result)
        elif calls := earlier_calls(message):
            names |= {call.id: call.name for call in calls}
            told.append({"role": "assistant", "content": "\n".join(_said(message, calls, use.style))})
        else:
            told.append(message)
        was_result = message.get("role") == "tool"
    if use.offered:
        _tell_tools(told, _introduction(use))
    return {"messages": told} | forced_output(use)


def _said(message: Message, calls: list[EarlierCall], style: ToolStyle) -> Iterator[str]:
    if text := text_of(message):
        yield text
    for call in calls:
        yield _call(call.name, json_text(call.arguments), style)


def _call(name: str, arguments: str, style: ToolStyle) -> str:
    if style == "function_tag":
        return f"<function={name}>{arguments}</function>"
    return f'{{"name": {json_text(name)}, "parameters": {arguments}}}'


def _result(message: Message, names: dict[str | None, str]) -> str:
    call_id = message.get("tool_call_id")
    name = names.get(call_id) or message.get("name")
    of = f" of {name}" if name else ""
    return f"Result{of} (call {call_id}):\n{text_of(message)}" if call_id else f"Result{of}:\n{text_of(message)}"


def _tell_result(told: list[Message], result: str, is_next: bool) -> None:
    """Results of several calls are one message, since many templates want users and assistants to take turns."""
    if is_next:
        told[-1]["content"] += "\n\n" + result
    else:
        told.append({"role": "user", "content": result})


def _tell_tools(told: list[Message], introduction: str) -> None:
    if not told or told[0].get("role") not in ("system", "developer"):
        told.insert(0, {"role": "system", "content": introduction})
    else:
        own = text_of(told[0])
        told[0] = {**told[0], "content": f"{own}\n\n{introduction}" if own else introduction}


def _introduction(use: ToolUse) -> str:
    listed = "\n".join(_definition(tool) for tool in use.offered)
    return f"You can call these tools. Each has a JSON schema of its parameters.\n\n{listed}\n\n{_how(use)}"


def _definition(tool: Tool) -> str:
    return json_text({"name": tool.name, "description": tool.description or "", "parameters": tool.parameters})


def _how(use: ToolUse) -> str:
    if use.is_forced:
        which = " a tool" if use.choice == "required" else f" the tool {use.choice}"
        pattern = _call("NAME", "{PARAMETERS}", "json")
        if use.parallel:
            return (
                f"You must call{which} now: answer with a list of JSON that has one object for each call:\n[{pattern}]"
            )
        return f"You must call{which} now: answer with one object of JSON, and with nothing else:\n{pattern}"
    pattern = _call("NAME", "{PARAMETERS}", use.style)
    number = "To call several, write one line for each. " if use.parallel else "Call one tool at a time. "
    return (
        "To call a tool, answer with one line that has its name and its parameters as JSON, and nothing else:\n"
        f"{pattern}\n"
        f"{number}When no tool is needed, or when you have the results that you need, answer in words."
    )

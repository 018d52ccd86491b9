"""Models whose chat template knows tools, and that write calls as Hermes and Qwen do: <tool_call>{...}</tool_call>.

The template defines the tools and writes earlier calls and results, so the engine gets them in OpenAI's shape. Its own
parsing stays off (tool_choice "none"), which leaves the tools in the prompt. The tags are no special tokens that the
engine would leave out of the text. Where a model leaves them out itself, its calls are read all the same (answers.py).
"""

from typing import Any

from stack.prompt_formats.forced import forced_output
from stack.prompt_formats.messages import Message, earlier_calls
from stack.prompt_formats.tools import Tool, ToolUse


def hermes_body(messages: list[Message], use: ToolUse) -> dict[str, Any]:
    for message in messages:
        earlier_calls(message)  # the engine would take what is not JSON for no arguments at all
    body: dict[str, Any] = {"messages": messages}
    if use.offered:
        body |= {"tools": [_function(tool) for tool in use.offered], "tool_choice": "none"}
    return body | forced_output(use)


def _function(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters}
    return {"type": "function", "function": function}

"""Messages as chat templates take them, to be read or learned as they stand."""

import json

from stack.prompt_formats.messages import Message
from stack.prompt_formats.plain import plain_body
from stack.prompt_formats.tools import PromptFormat, ToolUse


def template_messages(format: PromptFormat, messages: list[Message]) -> list[Message]:
    """OpenAI's messages for a model's chat template, with the calls of tools that they hold.

    Plain models' templates know none: calls are said in words, as when the model is asked. Others get the arguments of
    calls as objects, as engines give them.
    """
    if format == "plain":
        told: list[Message] = plain_body(messages, ToolUse(()))["messages"]
        return told
    return [_with_objects(message) for message in messages]


def _with_objects(message: Message) -> Message:
    calls = [
        call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message

"""The inference step: the model is asked, and its answer streamed as it comes."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from stack import inference
from stack.agentic_system import prompt
from stack.agentic_system.described import openai_tools
from stack.agentic_system.events import Progress
from stack.agentic_system.plan import Infer
from stack.agentic_system.prompt import Message
from stack.agentic_system.tools.answers import plain
from stack.api.agentic_system import AgentConfig
from stack.api.inference import ToolChoice
from stack.api.messages import StopReason
from stack.context import Context
from stack.errors import BadInput, Unavailable
from stack.inference import End
from stack.prompt_formats import CallFailed, CallParsed, CallProgress, CallStarted, Piece, Text
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats.messages import json_text

# Of one message, as its wire type has them.
MAX_CALLS = 100
# Of the model's context, what is kept for its answer, where the agent does not say how long that may be.
ANSWER_SHARE = 4
# An engine counts tokens, where here they are reckoned: a prompt that it refuses is made this much shorter, so often.
SHRINK = 0.6
SHRINKS = 3
# What a last answer has, however much the turn has had.
FINAL_SECONDS = 60.0
FINAL_TOKENS = 1_024


@dataclass(frozen=True)
class Question:
    """What the model is asked: what it is told of the turns `past`, oldest first, and of the `current` one."""

    context: Context
    config: AgentConfig
    told: dict[str, Definition]
    past: Sequence[list[Message]]
    current: list[Message]
    looks_up: bool
    has_called: bool
    tokens_left: int
    seconds_left: float


@dataclass
class _Answer:
    """An answer as far as it has come."""

    texts: list[str]
    calls: list[dict[str, Any]]
    failed: int = 0
    end: End | None = None

    def take(self, piece: Piece | End, progress: Progress) -> None:
        match piece:
            case Text(text):
                self.texts.append(plain(text))
                progress.model_text(self.texts[-1])
            case CallStarted():
                progress.call("", "started")
            case CallProgress(_, text):
                progress.call(plain(text), "in_progress")
            case CallParsed():
                call = {"call_id": piece.id, "tool_name": piece.name, "arguments": piece.arguments}
                progress.call(call, "success")
                self.calls.append(call)
            case CallFailed(_, text):
                self.failed += 1
                self.texts.append(plain(text))
                progress.call(self.texts[-1], "failure")
            case End():
                self.end = piece


async def ask(question: Question, todo: Infer, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """The step's details, and what is known of it beside them: tokens, and whether the answer is cut or unreadable.

    An answer that does not end in the time that is left is taken as far as it has come. Raises what asking the model
    does, and Unavailable where a last answer has not even begun in its time.
    """
    answer = _Answer([], [])
    seconds = max(question.seconds_left, FINAL_SECONDS if todo.final else 0.1)
    is_cut = False
    try:
        async with asyncio.timeout(seconds) as limit:
            async with aclosing(await _stream(question, todo)) as pieces:
                async for piece in pieces:
                    answer.take(piece, progress)
    except TimeoutError:
        if not limit.expired():
            raise
        is_cut = True
    text = "".join(answer.texts)
    if is_cut and todo.final and not text:
        raise Unavailable("the turn had no more time, and the model has given no last answer")
    end = answer.end or End(StopReason.out_of_tokens, 0, prompt.tokens_of_text(text))
    message = {
        "role": "assistant",
        "content": text,
        "stop_reason": end.stop_reason.value,
        "tool_calls": [] if is_cut or todo.final else answer.calls[:MAX_CALLS],
    }
    about: dict[str, Any] = {"tokens": end.completion_tokens, "prompt_tokens": end.prompt_tokens}
    if is_cut:
        about["is_cut"] = True
    if answer.failed and not message["tool_calls"]:
        about["unread"] = True
    return {"model_response": message}, about


async def _stream(question: Question, todo: Infer) -> AsyncGenerator[Piece | End]:
    """The answer's pieces. A prompt that is too long for the model, by its own count, is made shorter."""
    model = await question.context.models.find(question.config.model)
    size = model.base.context
    tools = [] if todo.final else openai_tools(question.told)
    kept = min(question.config.sampling_params.max_tokens or size // ANSWER_SHARE, size // 2)
    room = size - kept - prompt.tokens_of_text(json_text(tools))
    refused: BadInput | None = None
    asked: list[Message] = []
    for shrinks in range(SHRINKS + 1):
        messages = _messages(question, todo, int(room * SHRINK**shrinks))
        if messages == asked:
            continue
        asked = messages
        body = _body(question, todo, tools, messages, size)
        try:
            return await inference.stream_pieces(question.context, body, question.config.tool_prompt_format.value)
        except BadInput as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _messages(question: Question, todo: Infer, tokens: int) -> list[Message]:
    current = question.current
    if todo.final or todo.unread:
        current = prompt.with_line(current, prompt.FINAL if todo.final else prompt.UNREAD)
    told = [*current, *(message for turn in question.past for message in turn)]
    has_data = question.looks_up or bool(question.told) or any(message["role"] == "tool" for message in told)
    instructions = prompt.system(question.config.instructions, has_data=has_data)
    return prompt.fit(instructions, question.past, current, tokens)


def _body(
    question: Question, todo: Infer, tools: list[dict[str, Any]], messages: list[Message], size: int
) -> dict[str, Any]:
    """The request in OpenAI's shape. A tool that must be called must be once in a turn."""
    sampling = question.config.sampling_params
    body = dict(inference.sampling_body(sampling), model=question.config.model, messages=messages)
    left = max(question.tokens_left, FINAL_TOKENS if todo.final else 1)
    if sampling.max_tokens or left < size:
        has_room = max(size - prompt.tokens_of(messages) - prompt.tokens_of_text(json_text(tools)), 1)
        body["max_tokens"] = min(left, sampling.max_tokens or has_room)
    if tools:
        must = question.config.tool_choice == ToolChoice.required and not question.has_called
        body |= dict(tools=tools, tool_choice="required" if must else "auto", parallel_tool_calls=not must)
    return body

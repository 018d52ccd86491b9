"""The calls of one tool_execution step: each checked, then run side by side, each with its row begun and ended.

What a tool gives is text for the model, of a bounded length. Nothing of it is ever run: calls are what the model's own
message has, and nothing else.
"""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from stack.agentic_system.described import fitting_arguments
from stack.agentic_system.events import Progress
from stack.agentic_system.journal import Journal, length
from stack.agentic_system.plan import Call, RunCalls
from stack.agentic_system.prompt import UNKNOWN
from stack.agentic_system.shielding import refusal
from stack.agentic_system.tools import tool as tools
from stack.agentic_system.tools.answers import plain
from stack.agentic_system.tools.tool import MAX_CHARACTERS, Output, Tool, ToolFailed, cut
from stack.api.messages import CompletionMessage, ToolCall, ToolResponseMessage
from stack.api.safety import ShieldDefinition
from stack.context import Context
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats.arguments import Misfit
from stack.store.turns import DENIED

logger = logging.getLogger("ray.serve")

AT_ONCE = 16
# What a call has of a turn whose time is over.
LEAST_SECONDS = 1.0
# How long a call that was cut off has to end what it does.
GRACE_S = 5.0
DENIED_BY_USER = "The call was denied by the user, and was not run."
ONE_TOO_MANY = "The call was not run: the turn has made as many calls as it may."

Response = dict[str, Any]


@dataclass(frozen=True)
class CallContext:
    """What a turn's calls are run with: the tools that are run here, and all that the model was told of, by name.

    A call has `timeout_s`, and no more than there is until `ends_at`, by the event loop's clock: calls wait for others.
    """

    context: Context
    journal: Journal
    tools: Mapping[str, Tool]
    told: Mapping[str, Definition]
    shields: Mapping[str, tuple[Sequence[ShieldDefinition], Sequence[ShieldDefinition]]]
    keys: Mapping[str, str]
    timeout_s: float
    ends_at: float = math.inf

    @property
    def seconds(self) -> float:
        """What a call has that begins now."""
        left = self.ends_at - asyncio.get_running_loop().time()
        return min(self.timeout_s, max(left, LEAST_SECONDS))


def decided(calling: CallContext, todo: RunCalls) -> dict[str, Response]:
    """What is known of calls before any of them is run: those that have ended, and those that are not to be run."""
    known: dict[str, Response] = {}
    for call in todo.calls:
        run = calling.journal.runs.get(call["call_id"])
        tool = calling.tools.get(call["tool_name"])
        if run is not None and run.response is not None:
            known[call["call_id"]] = run.response
        elif run is not None and run.approval == DENIED:
            known[call["call_id"]] = _said(DENIED_BY_USER)
        elif run is not None and run.began_at is not None and not (tool is not None and tool.is_idempotent):
            known[call["call_id"]] = _said(UNKNOWN)
        elif call["call_id"] in todo.refused:
            known[call["call_id"]] = _said(ONE_TOO_MANY)
        else:
            try:
                fitting_arguments(calling.told, call["tool_name"], call["arguments"])
            except Misfit as error:
                known[call["call_id"]] = _said(f"The call was not run: {error}.")
    return known


def at_once(calling: CallContext, todo: RunCalls, known: Mapping[str, Response]) -> list[str]:
    """The calls whose running begins with the step: no shield is asked about them before."""
    return [
        call["call_id"]
        for call in todo.calls
        if call["call_id"] not in known and call["tool_name"] in calling.tools and not _shields(calling, call)[0]
    ]


async def run_calls(
    calling: CallContext, todo: RunCalls, known: Mapping[str, Response], progress: Progress
) -> dict[str, Response]:
    """What each call has given, by its id; nothing of those that are left to the client.

    `known` is what `decided` says, and the calls of `at_once` are begun in the journal. The end of each call is written
    as it comes, but for the last one's, which is left to the next commit. Raises as Journal.commit does.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    begun = set(at_once(calling, todo, known))
    left = {call["call_id"] for call in todo.calls} - known.keys()
    responses = dict(known)
    for call_id, response in known.items():
        progress.tool_text(call_id, response["content"])

    async def run(call: Call) -> None:
        async with slots:
            response = await _run(calling, call, progress, is_begun=call["call_id"] in begun)
        left.discard(call["call_id"])
        if response is None:
            return
        responses[call["call_id"]] = response
        if call["call_id"] in calling.journal.runs:
            calling.journal.end_run(call["call_id"], response)
            if left:
                await calling.journal.commit()

    try:
        async with asyncio.TaskGroup() as group:
            for call in todo.calls:
                if call["call_id"] in left:
                    group.create_task(run(call))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return responses


async def _run(calling: CallContext, call: Call, progress: Progress, *, is_begun: bool) -> Response | None:
    """What a call has given; None for one that is the client's to run."""
    before, after = _shields(calling, call)
    message = CompletionMessage(content="", tool_calls=[ToolCall.model_validate(call)])
    if refused := await refusal(calling.context, before, message, "the arguments of the call", calling.seconds):
        progress.tool_text(call["call_id"], refused)
        return _said(refused)
    tool = calling.tools.get(call["tool_name"])
    if tool is None:
        return None
    if not is_begun:
        calling.journal.begin_runs([call["call_id"]])
        await calling.journal.commit()
    told = _Told(progress, call["call_id"], is_silent=bool(after))
    output = await _output(calling, tool, call, told)
    content = cut(plain(output.content), MAX_CHARACTERS)
    said = ToolResponseMessage(call_id=call["call_id"], tool_name=call["tool_name"], content=content)
    if refused := await refusal(calling.context, after, said, "the output of the call", calling.seconds):
        progress.tool_text(call["call_id"], refused)
        return _said(refused)
    told.finish(content)
    kept = [one for one in output.attachments if calling.journal.has_room(length(one.content))]
    if len(kept) < len(output.attachments):
        content += f"\n[{len(output.attachments) - len(kept)} files are left out: too many, or too large]"
    return {"content": content, "attachments": [one.model_dump(mode="json") for one in kept]}


async def _output(calling: CallContext, tool: Tool, call: Call, told: "_Told") -> Output:
    """What a tool gives, or what is said in its place where it fails, within the time that a call has.

    That time begins with the call's turn, where a tool runs one at a time.
    """
    async with tool.turn or nullcontext():
        return await _timed_output(calling, tool, call, told)


async def _timed_output(calling: CallContext, tool: Tool, call: Call, told: "_Told") -> Output:
    arguments = fitting_arguments(calling.told, call["tool_name"], call["arguments"])
    seconds = calling.seconds
    task = asyncio.ensure_future(tool.run(tools.Call(call["call_id"], arguments, calling.keys, told)))
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        await _end(task, call)
        raise
    finally:
        told.end()
    if not done:
        await _end(task, call)
        return Output(f"The call failed: it had not ended after {seconds:.3g} s, and was cut off.")
    try:
        return task.result()
    except ToolFailed as error:
        return Output(f"The call failed: {error.message}")
    except asyncio.CancelledError:
        return Output("The call failed: the tool has given it up.")
    except Exception:  # whatever a tool dies of is the end of this call, and of nothing else
        logger.exception("the tool %s failed in the call %s", tool.name, call["call_id"])
        return Output("The call failed: the tool died.")


async def _end(task: "asyncio.Future[Output]", call: Call) -> None:
    """Cuts a call off. What does not end by that is left alone, so that it holds up nothing."""
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=GRACE_S)
    if not done:
        logger.error("the call %s of %s does not end, though it was cut off", call["call_id"], call["tool_name"])
    elif not task.cancelled():
        task.exception()  # which nobody needs any more


class _Told:
    """What a tool tells while it runs, for whoever watches: bounded, and nothing once the call is over.

    A silent one waits for what the shields say of the output.
    """

    def __init__(self, progress: Progress, call_id: str, *, is_silent: bool) -> None:
        self._progress = progress
        self._call_id = call_id
        self._is_silent = is_silent
        self._is_over = False
        self._size = 0

    def __call__(self, text: str) -> None:
        if self._is_silent or self._is_over or self._size >= MAX_CHARACTERS:
            return
        told = plain(text[: MAX_CHARACTERS - self._size])
        self._size += len(told)
        self._progress.tool_text(self._call_id, told)

    def end(self) -> None:
        self._is_over = True

    def finish(self, content: str) -> None:
        """The output itself, where nothing was told of it before."""
        if not self._size:
            self._progress.tool_text(self._call_id, content)


def _shields(calling: CallContext, call: Call) -> tuple[Sequence[ShieldDefinition], Sequence[ShieldDefinition]]:
    return calling.shields.get(call["tool_name"], ((), ()))


def _said(text: str) -> Response:
    return {"content": text, "attachments": []}

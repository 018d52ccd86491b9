"""The loop of a turn: what its journal says comes next is begun, done and ended, until there is nothing left to do."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stack import safety
from stack.agentic_system import answer, files, tool_calls
from stack.agentic_system.answer import Question
from stack.agentic_system.conversation import Conversation
from stack.agentic_system.events import Progress, Stream
from stack.agentic_system.journal import Journal
from stack.agentic_system.look_ups import AskMemory, LookUp
from stack.agentic_system.plan import (
    AskApproval,
    Complete,
    Infer,
    Plan,
    Retrieve,
    RunCalls,
    Shield,
    Todo,
    answer_of,
    next_step,
    seconds_of,
)
from stack.agentic_system.replay import details_of, tell_awaiting, tell_end
from stack.agentic_system.tool_calls import CallContext
from stack.agentic_system.tools.tool import File, Tool
from stack.agentic_system.withheld import Withheld
from stack.agents_config import AgentsConfig
from stack.api.agent_tools import AgentTool, MemoryToolDefinition
from stack.api.agentic_system import AgentConfig, InputMessage, StepType
from stack.api.messages import Attachment, CompletionMessage, Message
from stack.context import Context
from stack.errors import Away, Unavailable
from stack.store.turns import Step

# How often a step is begun: one that ends whatever runs it would be begun for ever.
MAX_ATTEMPTS = 5


class OpenTools(Protocol):
    """Opens the tools of a turn, as stack.agentic_system.toolbox.open_tools does."""

    def __call__(
        self, config: AgentsConfig, definitions: Sequence[AgentTool], files: Sequence[File], /, *, is_resumed: bool
    ) -> AbstractAsyncContextManager[Mapping[str, Tool]]: ...


@dataclass(frozen=True)
class Place:
    """What turns are run with in a process."""

    context: Context
    ask_memory: AskMemory
    open_tools: OpenTools


@dataclass(frozen=True)
class Loop:
    """A turn that is under way, with all that its steps need. `messages` and `attachments` are the turn's new ones."""

    context: Context
    ask_memory: AskMemory
    config: AgentConfig
    plan: Plan
    session_bank: str | None
    messages: Sequence[InputMessage]
    attachments: Sequence[Attachment]
    journal: Journal
    stream: Stream
    withheld: Withheld
    conversation: Conversation
    calling: CallContext

    async def run(self) -> None:
        """Returns when the turn is complete or awaits approval, which is written and told by then.

        Raises what ends a turn otherwise: StackError of a shield, a bank or the model that cannot be asked.
        """
        while True:
            todo = next_step(self.plan, self.journal.steps, self.journal.runs)
            match todo:
                case Complete(message):
                    return await self._complete(message)
                case AskApproval():
                    return await self._ask_approval(todo)
            self._require_attempts()
            with suppress(Away):  # the step is begun again
                await self._do(todo)

    async def _do(self, todo: Todo) -> None:
        match todo:
            case Shield():
                await self._judge(todo)
            case Retrieve():
                await self._retrieve()
            case Infer():
                await self._infer(todo)
            case RunCalls():
                await self._run_calls(todo)

    # The kinds of steps

    async def _judge(self, todo: Shield) -> None:
        messages: list[Message] = [*self.messages]
        before: list[Message] = []
        if todo.side == "input":
            judgement = self.plan.input[todo.index]
            shield = judgement.shield
            if judgement.messages is not None:
                messages = [messages[at] for at in judgement.messages]
        else:
            shield = self.plan.output[todo.index]
            before = [message for message in self.messages if _is_text(message)]
            said = answer_of(self.journal.steps).details
            assert said is not None
            messages = [CompletionMessage.model_validate(said["model_response"])]
        about = {"side": todo.side, "index": todo.index, "action": int(shield.on_violation_action)}
        progress = self._begin(StepType.shield_call, about)
        await self.journal.commit()
        async with _bounded(self.plan.bounds.max_seconds, f"the shield {str(shield.shield_type)!r}"):
            response = await safety.judge(self.context, shield, messages, before)
        self._end(progress, {"response": response.model_dump(mode="json", exclude_none=True)}, {})

    async def _retrieve(self) -> None:
        progress = self._begin(StepType.memory_retrieval, {})
        await self.journal.commit()
        tool = next((one for one in self.config.tools if isinstance(one, MemoryToolDefinition)), None)
        model = await self.context.models.find(self.config.model)
        most = model.base.context // 2
        turn = self.journal.turn
        look_up = LookUp(
            turn.id, turn.session_id, self.session_bank, tool, self.messages, self.attachments, max_tokens=most
        )
        async with _bounded(self.plan.bounds.max_seconds, "memory"):
            details = await self.ask_memory(self.context, look_up)
        self._end(progress, details, {})

    async def _infer(self, todo: Infer) -> None:
        steps = [step for step in self.journal.steps if step.has_ended]
        self.withheld.end()
        progress = self._begin(StepType.inference, {"final": todo.final, "after_unread": todo.unread})
        await self.journal.commit()
        self.withheld.begin()
        spent = sum(step.about.get("tokens", 0) for step in steps)
        question = Question(
            context=self.context,
            config=self.config,
            told=dict(self.calling.told),
            past=self.conversation.past,
            current=await self.conversation.current(steps),
            looks_up=self.plan.retrieves,
            has_called=any(step.kind == StepType.tool_execution for step in steps),
            tokens_left=self.plan.bounds.max_tokens - spent,
            seconds_left=self.plan.bounds.max_seconds - seconds_of(steps),
        )
        details, about = await answer.ask(question, todo, progress)
        self._end(progress, details, about)

    async def _run_calls(self, todo: RunCalls) -> None:
        known = tool_calls.decided(self.calling, todo)
        self.withheld.end()
        progress = self._begin(StepType.tool_execution, {})
        if begun := tool_calls.at_once(self.calling, todo, known):
            self.journal.begin_runs(begun)
        await self.journal.commit()
        left = self.plan.bounds.max_seconds - seconds_of(self.journal.steps)
        calling = replace(self.calling, ends_at=asyncio.get_running_loop().time() + left)
        responses = await tool_calls.run_calls(calling, todo, known, progress)
        handled = [call for call in todo.calls if call["call_id"] in responses]
        told = [
            {
                "call_id": call["call_id"],
                "tool_name": call["tool_name"],
                "content": responses[call["call_id"]]["content"],
            }
            for call in handled
        ]
        self._end(progress, {"tool_calls": handled, "tool_responses": told}, {})

    # The ends of a turn here

    async def _ask_approval(self, todo: AskApproval) -> None:
        calls = list(todo.calls)
        self.withheld.end()
        step = self.journal.begin_step(StepType.tool_execution, {})
        self.journal.ask_approval([call["call_id"] for call in calls])
        self.journal.then(lambda: tell_awaiting(self.stream, self.journal.turn.id, step.number, calls))
        await self.journal.commit()

    async def _complete(self, message: dict[str, Any]) -> None:
        self.withheld.end()
        self.journal.complete(message, self._output_attachments())
        self.journal.then(lambda: tell_end(self.stream, self.journal.turn, self.journal.steps))
        await self.journal.commit()

    # What all of them share

    def _begin(self, kind: StepType, about: dict[str, Any]) -> Progress:
        """A step begins with the next commit."""
        step = self.journal.begin_step(kind, about)
        progress = Progress(self.stream, step.number, step.attempt, step.kind, step.id)
        self.journal.then(progress.begin)
        return progress

    def _end(self, progress: Progress, details: dict[str, Any], about: dict[str, Any]) -> None:
        """A step has ended, which is written and told with the next commit."""
        step = self.journal.end_step(details, about)
        progress.flush()
        self.journal.then(lambda: progress.end(details_of(step)))

    def _require_attempts(self) -> None:
        """Raises Unavailable for a step that was begun so often that it will hardly end."""
        step: Step | None = self.journal.steps[-1] if self.journal.steps else None
        if step is not None and not step.has_ended and step.attempt >= MAX_ATTEMPTS:
            raise Unavailable(f"a step of the turn was broken off {step.attempt} times")

    def _output_attachments(self) -> list[dict[str, Any]]:
        """The files that tools have made, in the order of the calls."""
        executed = [step.details for step in self.journal.steps if step.kind == StepType.tool_execution]
        calls = [call["call_id"] for details in executed if details is not None for call in details["tool_calls"]]
        runs = [self.journal.runs[call_id] for call_id in calls if call_id in self.journal.runs]
        return [one for run in runs if run.response is not None for one in run.response["attachments"]]


def retrieves(
    config: AgentConfig, messages: Sequence[InputMessage], given: Sequence[Attachment], bank: str | None
) -> bool:
    """Whether there is something to look up, or to keep for it: banks of the agent or of the session, attachments."""
    if any(files.is_text(one) for one in given):
        return True
    has_banks = any(isinstance(tool, MemoryToolDefinition) and tool.memory_bank_configs for tool in config.tools)
    return (has_banks or bank is not None) and any(message.role == "user" for message in messages)


def _is_text(message: InputMessage) -> bool:
    """Whether a message has no attachments, which would be fetched again, or could not be judged."""
    parts = message.content if isinstance(message.content, list) else [message.content]
    return all(isinstance(part, str) for part in parts)


@asynccontextmanager
async def _bounded(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise Unavailable(f"{what} has not answered within {seconds:g} s") from None

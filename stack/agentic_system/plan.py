"""What comes next in a turn, by what its journal says.

A turn goes through these steps (the specification's loop):

1. the input shields judge the new messages, one step each;
2. what the user asks about is looked up in memory banks;
3. the model is asked;
4. the tools that it calls are run, and it is asked again;
5. where it calls none, the turn is complete.

Whatever the model says in words, beside calls too, is judged by the output shields before anything comes of it.

A call of a client's function ends the turn too: the next one brings the answer. Where a bound of the turn is reached,
the model is asked once more, without tools.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from stack.agents_config import AgentsConfig
from stack.api.agent_tools import (
    AgentTool,
    CodeInterpreterToolDefinition,
    FunctionCallToolDefinition,
    names_of,
)
from stack.api.agentic_system import AgentConfig, StepType
from stack.api.safety import OnViolationAction, ShieldDefinition
from stack.store.turns import Step, ToolRun

# How often in a row the model is told that its call cannot be read.
MAX_UNREAD = 2

Call = dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """A shield that judges some of a turn's new messages, by their places, or all of them."""

    shield: ShieldDefinition
    messages: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """What decides about a turn's steps beside its journal.

    `client` are the tools that the client runs, `guarded` those of them whose arguments shields judge before.
    """

    input: tuple[Judgement, ...]
    output: tuple[ShieldDefinition, ...]
    retrieves: bool
    client: frozenset[str]
    guarded: frozenset[str]
    approval: frozenset[str]
    bounds: AgentsConfig

    @property
    def withholds(self) -> bool:
        """Whether an answer must pass a shield before anybody sees it."""
        return any(shield.on_violation_action == OnViolationAction.raise_ for shield in self.output)


@dataclass(frozen=True)
class Shield:
    """A shield judges the new messages (input) or the answer (output)."""

    side: str
    index: int


@dataclass(frozen=True)
class Retrieve:
    """Memory banks are asked."""


@dataclass(frozen=True)
class Infer:
    """The model is asked: for the last time, if `final`; after a call that could not be read, if `unread`."""

    final: bool = False
    unread: bool = False


@dataclass(frozen=True)
class RunCalls:
    """Tools are run. `refused` are the ids of the calls that are one too many."""

    calls: tuple[Call, ...]
    refused: frozenset[str]


@dataclass(frozen=True)
class AskApproval:
    """The client is asked about these of the calls that are to be run."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Complete:
    """The turn is complete, with this output message."""

    message: dict[str, Any]


Todo = Shield | Retrieve | Infer | RunCalls | AskApproval | Complete


def plan_of(config: AgentConfig, messages: Sequence[dict[str, Any]], bounds: AgentsConfig, *, retrieves: bool) -> Plan:
    """The plan of a turn, whose new `messages` are those of the wire types as JSON.

    What a client's function has answered passes that tool's output shields, as the agent's own tools' answers do.
    """
    tools = {name: tool for tool in config.tools for name in names_of(tool)}
    given = [
        Judgement(shield, (at,))
        for at, message in enumerate(messages)
        if message["role"] == "ipython" and message["tool_name"] in tools
        for shield in tools[message["tool_name"]].output_shields
    ]
    client = frozenset(name for name, tool in tools.items() if is_clients(tool))
    return Plan(
        input=(*(Judgement(shield) for shield in config.input_shields), *given),
        output=tuple(config.output_shields),
        retrieves=retrieves,
        client=client,
        guarded=frozenset(name for name in client if tools[name].input_shields),
        approval=frozenset(config.approval) - client,
        bounds=bounds,
    )


def is_clients(tool: AgentTool) -> bool:
    """Whether the client runs a tool."""
    match tool:
        case FunctionCallToolDefinition():
            return tool.remote_execution is None
        case CodeInterpreterToolDefinition():
            return not tool.enable_inline_code_execution
        case _:
            return False


def next_step(plan: Plan, steps: Sequence[Step], runs: Mapping[str, ToolRun]) -> Todo:
    """What comes after the steps, or again where the last one has not ended. It depends on what it is given alone."""
    if steps and not steps[-1].has_ended:
        return _again(plan, steps, runs)
    inputs = [step for step in steps if _is_shield(step, "input")]
    if inputs and (message := violation(inputs[-1])):
        return Complete(message)
    if len(inputs) < len(plan.input):
        return Shield("input", len(inputs))
    if plan.retrieves and not any(step.kind == StepType.memory_retrieval for step in steps):
        return Retrieve()
    last = next((step for step in reversed(steps) if step.kind in (StepType.inference, StepType.tool_execution)), None)
    if last is None:
        return Infer(final=_is_over(plan, steps))
    if last.kind == StepType.tool_execution:
        if open_calls := _unanswered(steps, last):
            return Complete(_with_calls(_answer_before(steps, last), open_calls))
        return Infer(final=_is_over(plan, steps))
    return _after_answer(plan, steps, runs, last)


def _after_answer(plan: Plan, steps: Sequence[Step], runs: Mapping[str, ToolRun], answer: Step) -> Todo:
    message: dict[str, Any] = _details(answer)["model_response"]
    calls, is_final = message["tool_calls"], answer.about.get("final", False)
    judged = [step for step in steps if _is_shield(step, "output") and step.number > answer.number]
    if judged and (violated := violation(judged[-1])):
        return Complete(violated)
    if len(judged) < len(plan.output) and (message["content"] or not calls):
        return Shield("output", len(judged))
    if calls and not is_final:
        if all(call["tool_name"] in plan.client - plan.guarded for call in calls):
            return Complete(message)
        return Infer(final=True) if _is_over(plan, steps) else _run(plan, steps, runs, calls)
    if answer.about.get("unread") and not is_final and _unread_in_a_row(steps) <= MAX_UNREAD:
        return Infer(final=_is_over(plan, steps), unread=True)
    if answer.about.get("is_cut") and not is_final:
        return Infer(final=True)
    return Complete(message)


def _again(plan: Plan, steps: Sequence[Step], runs: Mapping[str, ToolRun]) -> Todo:
    """A step that was begun and has not ended, as it was begun: whatever a bound would say now."""
    *before, step = steps
    match step.kind:
        case StepType.shield_call:
            return Shield(step.about["side"], step.about["index"])
        case StepType.memory_retrieval:
            return Retrieve()
        case StepType.inference:
            return Infer(final=step.about["final"], unread=step.about["after_unread"])
    calls = _details(_answer_before(steps, step))["model_response"]["tool_calls"]
    return _run(plan, before, runs, calls)


def _run(plan: Plan, before: Sequence[Step], runs: Mapping[str, ToolRun], calls: Sequence[Call]) -> Todo:
    """The calls that are run here; of the others, only what is to be judged of them is done."""
    mine = [call for call in calls if call["tool_name"] not in plan.client - plan.guarded]
    left = max(0, plan.bounds.max_tool_calls - sum(len(_calls(step)) for step in before))
    awaited = [
        call
        for call in mine[:left]
        if call["tool_name"] in plan.approval and _approval_of(runs, call["call_id"]) is None
    ]
    if awaited:
        return AskApproval(tuple(awaited))
    return RunCalls(tuple(mine), frozenset(call["call_id"] for call in mine[left:]))


def _approval_of(runs: Mapping[str, ToolRun], call_id: str) -> str | None:
    return runs[call_id].approval if call_id in runs else None


def _is_over(plan: Plan, steps: Sequence[Step]) -> bool:
    """Whether a bound of the turn is reached."""
    bounds = plan.bounds
    return (
        len(steps) >= bounds.max_steps
        or sum(len(_calls(step)) for step in steps) >= bounds.max_tool_calls
        or sum(step.about.get("tokens", 0) for step in steps) >= bounds.max_tokens
        or seconds_of(steps) >= bounds.max_seconds
    )


def seconds_of(steps: Sequence[Step]) -> float:
    """For how long the steps that have ended were under way, each from the beginning of its last attempt."""
    times = ((step.started_at, step.completed_at) for step in steps)
    return sum((_time(end) - _time(start)).total_seconds() for start, end in times if end is not None)


def violation(step: Step) -> dict[str, Any] | None:
    """The message that takes the place of an answer where a shield has found a violation that ends the turn."""
    response = _details(step)["response"]
    if not response["is_violation"] or step.about["action"] != OnViolationAction.raise_:
        return None
    text = response.get("violation_return_message") or (
        f"The shield {response['shield_type']!r} does not pass the {step.about['side']}."
    )
    return {"role": "assistant", "content": text, "stop_reason": "end_of_turn", "tool_calls": []}


def answer_of(steps: Sequence[Step]) -> Step:
    """The last answer of the model."""
    return next(step for step in reversed(steps) if step.kind == StepType.inference and step.has_ended)


def _is_shield(step: Step, side: str) -> bool:
    return step.kind == StepType.shield_call and step.about["side"] == side


def _unanswered(steps: Sequence[Step], executed: Step) -> list[Call]:
    """The calls that the client has to run, behind a step in which the others were."""
    answered = {response["call_id"] for response in _details(executed)["tool_responses"]}
    calls: list[Call] = _details(_answer_before(steps, executed))["model_response"]["tool_calls"]
    return [call for call in calls if call["call_id"] not in answered]


def _answer_before(steps: Sequence[Step], step: Step) -> Step:
    return answer_of([one for one in steps if one.number < step.number])


def _with_calls(answer: Step, calls: Sequence[Call]) -> dict[str, Any]:
    message: dict[str, Any] = _details(answer)["model_response"]
    return message | {"tool_calls": list(calls)}


def _unread_in_a_row(steps: Sequence[Step]) -> int:
    answers = [step for step in steps if step.kind == StepType.inference]
    count = 0
    for answer in reversed(answers):
        if not answer.about.get("unread"):
            break
        count += 1
    return count


def _calls(step: Step) -> Collection[Call]:
    """The calls that a step has run."""
    return _details(step)["tool_calls"] if step.kind == StepType.tool_execution and step.has_ended else ()


def _details(step: Step) -> dict[str, Any]:
    assert step.details is not None, "the step has not ended"
    return step.details


def _time(written: str) -> datetime:
    return datetime.fromisoformat(written)

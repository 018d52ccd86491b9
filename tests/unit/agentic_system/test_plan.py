"""What comes next in a turn, by its journal alone."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from stack.agentic_system.plan import (
    MAX_UNREAD,
    AskApproval,
    Complete,
    Infer,
    Plan,
    Retrieve,
    RunCalls,
    Shield,
    Todo,
    next_step,
    plan_of,
)
from stack.agents_config import AgentsConfig
from stack.api.agentic_system import AgentConfig, StepType
from stack.store.turns import APPROVED, ASKED, Step, ToolRun

CLIENTS = {"type": "function_call", "description": "", "parameters": {}}
SERVERS = CLIENTS | {"remote_execution": {"url": "https://tools.test", "method": "POST"}}
SCANNER = {"shield_type": "code_scanner_guard", "on_violation_action": 2}
RAISE = {"response": {"shield_type": "code_scanner_guard", "is_violation": True, "violation_return_message": "No."}}
PASSED = {"response": {"shield_type": "code_scanner_guard", "is_violation": False}}
FOUND = {"memory_bank_ids": [], "inserted_context": ""}


def plan(
    *,
    retrieves: bool = False,
    messages: list[dict[str, Any]] | None = None,
    bounds: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Plan:
    """Of an agent with the server's tools run and pay, and the client's tool ask."""
    tools = [SERVERS | {"function_name": "run"}, SERVERS | {"function_name": "pay"}, CLIENTS | {"function_name": "ask"}]
    config = AgentConfig.model_validate({"model": "m", "instructions": "", "tools": tools} | more)
    return plan_of(config, messages or [], AgentsConfig(**bounds), retrieves=retrieves)


class Steps:
    """A journal, step by step; each took a second."""

    def __init__(self) -> None:
        self.all: list[Step] = []

    def add(self, kind: StepType, details: dict[str, Any] | None, **about: Any) -> "Steps":
        number = len(self.all) + 1
        ended = None if details is None else f"2026-01-01T00:00:{number:02}.000Z"
        began = f"2026-01-01T00:00:{number - 1:02}.000Z"
        self.all.append(Step(f"s{number}", "t", number, kind.value, about, 1, details, began, ended))
        return self

    def said(self, text: str, *calls: str, **about: Any) -> "Steps":
        """The model's answer; a call's id is its place, as run-2-0."""
        number = len(self.all) + 1
        made = [
            {"call_id": f"{name}-{number}-{at}", "tool_name": name, "arguments": {}} for at, name in enumerate(calls)
        ]
        message = {"role": "assistant", "content": text, "stop_reason": "end_of_turn", "tool_calls": made}
        known = {"final": False, "after_unread": False, "tokens": 1}
        return self.add(StepType.inference, {"model_response": message}, **known | about)

    def ran(self, *call_ids: str) -> "Steps":
        calls = [{"call_id": one, "tool_name": one.split("-")[0], "arguments": {}} for one in call_ids]
        told = [{"call_id": one["call_id"], "tool_name": one["tool_name"], "content": ""} for one in calls]
        return self.add(StepType.tool_execution, {"tool_calls": calls, "tool_responses": told})

    def judged(self, side: str, details: dict[str, Any] | None, action: int = 2, index: int = 0) -> "Steps":
        return self.add(StepType.shield_call, details, side=side, action=action, index=index)


def ids(todo: Todo) -> list[str]:
    assert isinstance(todo, RunCalls | AskApproval)
    return [call["call_id"] for call in todo.calls]


def content(todo: Todo) -> str:
    assert isinstance(todo, Complete), todo
    text: str = todo.message["content"]
    return text


def run(call_id: str, approval: str | None = None) -> dict[str, ToolRun]:
    return {call_id: ToolRun("s", call_id, None, None, None, approval)}


def test_a_turn_without_anything_asks_the_model_and_is_complete() -> None:
    assert next_step(plan(), [], {}) == Infer()
    assert content(next_step(plan(), Steps().said("Paris").all, {})) == "Paris"


def test_shields_memory_the_model_and_shields_follow_one_another() -> None:
    whole = plan(retrieves=True, input_shields=[SCANNER, SCANNER], output_shields=[SCANNER])
    steps = Steps()
    assert next_step(whole, steps.all, {}) == Shield("input", 0)
    steps.judged("input", PASSED)
    assert next_step(whole, steps.all, {}) == Shield("input", 1)
    steps.judged("input", PASSED, index=1)
    assert next_step(whole, steps.all, {}) == Retrieve()
    steps.add(StepType.memory_retrieval, FOUND)
    assert next_step(whole, steps.all, {}) == Infer()
    steps.said("Paris")
    assert next_step(whole, steps.all, {}) == Shield("output", 0)
    steps.judged("output", PASSED)
    assert content(next_step(whole, steps.all, {})) == "Paris"


@pytest.mark.parametrize(("action", "ends"), [(0, False), (1, False), (2, True)])
def test_a_violation_ends_the_turn_where_the_shield_says_so(action: int, ends: bool) -> None:
    whole = plan(input_shields=[SCANNER], output_shields=[SCANNER])
    todo = next_step(whole, Steps().judged("input", RAISE, action).all, {})
    assert todo == (todo if ends else Infer())
    assert isinstance(todo, Complete) is ends
    steps = Steps().judged("input", PASSED).said("Paris").judged("output", RAISE, action)
    assert content(next_step(whole, steps.all, {})) == ("No." if ends else "Paris")


def test_calls_are_run_and_the_model_asked_again() -> None:
    steps = Steps().said("", "run", "pay")
    assert ids(next_step(plan(), steps.all, {})) == ["run-1-0", "pay-1-1"]
    assert next_step(plan(), steps.ran("run-1-0", "pay-1-1").all, {}) == Infer()


def test_a_clients_call_ends_the_turn() -> None:
    todo = next_step(plan(), Steps().said("", "ask").all, {})
    assert isinstance(todo, Complete)
    assert [call["tool_name"] for call in todo.message["tool_calls"]] == ["ask"]


def test_of_mixed_calls_the_clients_are_left() -> None:
    steps = Steps().said("", "ask", "run")
    assert ids(next_step(plan(), steps.all, {})) == ["run-1-1"]
    todo = next_step(plan(), steps.ran("run-1-1").all, {})
    assert isinstance(todo, Complete)
    assert [call["call_id"] for call in todo.message["tool_calls"]] == ["ask-1-0"]


def test_a_clients_answer_passes_the_tools_shields() -> None:
    tools = [CLIENTS | {"function_name": "ask", "output_shields": [SCANNER]}]
    messages = [{"role": "ipython", "tool_name": "ask"}, {"role": "user"}]
    judgements = plan(tools=tools, messages=messages, input_shields=[SCANNER]).input
    assert [one.messages for one in judgements] == [None, (0,)]


def test_calls_await_approval_until_all_are_decided() -> None:
    asking = plan(approval=["pay", "ask"])
    steps = Steps().said("", "run", "pay")
    todo = next_step(asking, steps.all, {})
    assert isinstance(todo, AskApproval)
    assert ids(todo) == ["pay-1-1"]
    steps.add(StepType.tool_execution, None)
    assert ids(next_step(asking, steps.all, run("pay-1-1", ASKED))) == ["run-1-0", "pay-1-1"]
    assert ids(next_step(asking, steps.all, run("pay-1-1", APPROVED))) == ["run-1-0", "pay-1-1"]


def test_a_clients_call_needs_no_approval() -> None:
    assert isinstance(next_step(plan(approval=["ask"]), Steps().said("", "ask").all, {}), Complete)


def test_a_step_that_has_begun_is_done_again_whatever_the_bounds_say() -> None:
    none = plan(bounds={"max_steps": 1, "max_tool_calls": 0}, input_shields=[SCANNER], retrieves=True)
    assert next_step(none, Steps().judged("input", None).all, {}) == Shield("input", 0)
    assert next_step(none, Steps().add(StepType.memory_retrieval, None).all, {}) == Retrieve()
    begun = Steps().add(StepType.inference, None, final=False, after_unread=True)
    assert next_step(none, begun.all, {}) == Infer(unread=True)
    begun = Steps().add(StepType.inference, None, final=True, after_unread=False)
    assert next_step(none, begun.all, {}) == Infer(final=True)
    calls = Steps().said("", "run").add(StepType.tool_execution, None)
    todo = next_step(replace(none, bounds=AgentsConfig(max_steps=1)), calls.all, {})
    assert ids(todo) == ["run-1-0"]


# Bounds


@pytest.mark.parametrize("bounds", [{"max_steps": 2}, {"max_tool_calls": 1}, {"max_tokens": 1}, {"max_seconds": 2}])
def test_a_bound_that_is_reached_asks_for_the_last_answer(bounds: dict[str, int]) -> None:
    steps = Steps().said("", "run").ran("run-1-0")
    assert next_step(plan(bounds=bounds), steps.all, {}) == Infer(final=True)
    assert next_step(plan(bounds={key: value + 1 for key, value in bounds.items()}), steps.all, {}) == Infer()
    last = steps.said("That is all.", final=True)
    assert content(next_step(plan(bounds=bounds), last.all, {})) == "That is all."


def test_calls_in_a_last_answer_are_not_run() -> None:
    steps = Steps().said("Again:", "run", final=True)
    assert content(next_step(plan(), steps.all, {})) == "Again:"


def test_calls_that_come_when_a_bound_is_reached_are_not_run() -> None:
    assert next_step(plan(bounds={"max_steps": 1}), Steps().said("", "run").all, {}) == Infer(final=True)


def test_of_more_calls_than_there_may_be_the_first_are_run() -> None:
    todo = next_step(
        plan(bounds={"max_tool_calls": 3}), Steps().said("", "run").ran("run-1-0").said("", *["run"] * 4).all, {}
    )
    assert isinstance(todo, RunCalls)
    assert todo.refused == {"run-3-2", "run-3-3"}


def test_without_any_calls_the_model_is_asked_without_tools() -> None:
    assert next_step(plan(bounds={"max_tool_calls": 0}), [], {}) == Infer(final=True)


def test_an_answer_that_was_cut_off_asks_for_the_last_one() -> None:
    assert next_step(plan(), Steps().said("It is", is_cut=True).all, {}) == Infer(final=True)
    last = Steps().said("It is", is_cut=True, final=True)
    assert content(next_step(plan(), last.all, {})) == "It is"


def test_a_call_that_cannot_be_read_is_told_so_often() -> None:
    steps = Steps()
    for _ in range(MAX_UNREAD):
        steps.said("{broken", unread=True)
        assert next_step(plan(), steps.all, {}) == Infer(unread=True)
    assert content(next_step(plan(), steps.said("{broken", unread=True).all, {})) == "{broken"
    assert next_step(plan(), Steps().said("{broken", "run", unread=True).all, {}) != Infer(unread=True)

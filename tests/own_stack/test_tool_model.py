"""Agents on a real model that was taught to call tools, which decides by itself when it calls them.

It is fetched by its hash, where that can be done (scripts/prepare_for_tests.py).
"""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from scripts import tool_model
from scripts.prepare_for_tests import TOOL_MODEL
from tests.agent_clients import CODE, Agent
from tests.fetched import fetched
from tests.memory import document

SAMPLING = {"strategy": "greedy", "max_tokens": 150}
BOILING_POINT = {
    "type": "function_call",
    "function_name": "get_boiling_point",
    "description": "Get the boiling point of a liquid in degrees Celsius",
    "parameters": {"liquid_name": {"param_type": "string", "description": "The name of the liquid", "required": True}},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a stack with this model alone. So small a model repeats its calls until no more are allowed."""
    fetched("tool-model")
    with tool_model.serving(tmp_path_factory.mktemp("tool-model") / "stack", max_tool_calls=1) as server:
        yield httpx.Client(base_url=server.url, timeout=300)


def agent_of(client: httpx.Client, *tools: dict[str, Any], **config: Any) -> Agent:
    given = {"instructions": "You are a helpful assistant.", "sampling_params": SAMPLING, "tools": [*tools]} | config
    return Agent(client, TOOL_MODEL, **given)


def kinds(turn: dict[str, Any]) -> list[str]:
    return [step["step_type"] for step in turn["steps"]]


def test_it_calculates_with_the_code_interpreter(client: httpx.Client) -> None:
    events = [*agent_of(client, CODE).events("What is 1234 * 5678? Use the code interpreter.")]
    payloads = [payload for _, payload in events]
    assert payloads[0]["event_type"] == "turn_start"
    assert any("tool_call_delta" in payload for payload in payloads)
    turn = payloads[-1]["turn"]
    assert kinds(turn) == ["inference", "tool_execution", "inference"]
    assert "7006652" in turn["steps"][1]["tool_responses"][0]["content"]
    assert "7006652" in turn["output_message"]["content"].replace(",", "")


def test_it_answers_from_a_bank_and_cites_it(client: httpx.Client) -> None:
    bank = client.post("/memory_banks/create", json={"name": "handbook", "config": {"type": "keyword"}}).json()
    documents = [
        document("leave", "Everybody has thirty-four days of holidays a year."),
        document("travel", "Whoever travels by train goes first class from four hours on."),
    ]
    reply = client.post("/memory_bank/insert", json={"bank_id": bank["bank_id"], "documents": documents})
    assert reply.status_code == 200, reply.text
    memory = {"type": "memory", "memory_bank_configs": [{"type": "keyword", "bank_id": bank["bank_id"]}]}
    turn = agent_of(client, memory).turn("How many days of holidays do I have?")
    assert kinds(turn) == ["memory_retrieval", "inference"]
    (citation,) = turn["steps"][0]["citations"]
    assert (citation["bank_id"], citation["document_id"]) == (bank["bank_id"], "leave")
    said = turn["output_message"]["content"]
    assert "34" in said or "thirty-four" in said.lower()


def test_a_function_of_the_client_over_two_turns(client: httpx.Client) -> None:
    agent = agent_of(client, BOILING_POINT)
    turn = agent.turn("What is the boiling point of polyjuice?")
    (call,) = turn["output_message"]["tool_calls"]
    assert call["tool_name"] == "get_boiling_point"
    assert call["arguments"]["liquid_name"].lower() == "polyjuice"
    answer = {"role": "ipython", "call_id": call["call_id"], "tool_name": "get_boiling_point", "content": "87"}
    # Of a turn without functions it answers in words, where it would call this one once more.
    nothing = {"type": "memory", "memory_bank_configs": []}
    turn = agent.turn(answer, "Tell me in a sentence what it is.", tools=[nothing])
    assert kinds(turn) == ["inference"]
    assert turn["output_message"]["tool_calls"] == []
    assert "87" in turn["output_message"]["content"]

"""Talks with an agent: a model with instructions and tools, in a session that the stack keeps.

    python -m scripts.drivers.agent --model SmolLM2-135M-Instruct "What is the capital of France?"
    python -m scripts.drivers.agent --config agent.yaml     an agent_config of the API; each line that is read is a turn
    python -m scripts.drivers.agent --agent AGENT --session SESSION "And of Spain?"

What it does step by step is told on the standard error, its answers go to the standard output.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts.drivers.client import Refused, Stack, drive, new_id, say
from scripts.drivers.tune import first_model

API = "/agentic_system"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("message", nargs="*", help="what to say, one turn each (the lines of the standard input)")
    parser.add_argument("--model", help="the agent's model (the first one)")
    parser.add_argument("--instructions", default="You are a helpful assistant.", help="what it is told first")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the whole config of the agent, in YAML or JSON")
    parser.add_argument("--agent", metavar="ID", help="an agent that is there already")
    parser.add_argument("--session", metavar="ID", help="a session of that agent, to go on with")


def run(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    agent = arguments.agent or create(stack, config_of(stack, arguments))
    session = arguments.session or open_session(stack, agent)
    turns = [turn(stack, agent, session, message) for message in arguments.message or _lines()]
    return {"agent_id": agent, "session_id": session, "turns": turns}


def config_of(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.config:
        return dict(yaml.safe_load(arguments.config.read_text()))
    model = arguments.model or first_model(stack)
    return {"model": model, "instructions": arguments.instructions, "sampling_params": {"strategy": "greedy"}}


def create(stack: Stack, config: dict[str, Any]) -> str:
    """Creates an agent; returns its id."""
    return str(stack.post(f"{API}/create", {"agent_config": config})["agent_id"])


def open_session(stack: Stack, agent: str) -> str:
    """Opens a session with an agent; returns its id."""
    body = {"agent_id": agent, "session_name": new_id("session")}
    return str(stack.post(f"{API}/session/create", body)["session_id"])


def turn(stack: Stack, agent: str, session: str, message: str) -> dict[str, Any]:
    """One turn, with its steps as they come: its id, its answer, and the kinds of its steps.

    Raises Refused where its stream ends before it: it awaits an approval, or goes on without us.
    """
    body = {
        "agent_id": agent, "session_id": session, "stream": True,
        "messages": [{"role": "user", "content": message}],
    }  # fmt: skip
    turn_id, whole = None, None
    for event in stack.events(f"{API}/turn/create", body):
        payload = event["event"]["payload"]
        match payload["event_type"]:
            case "turn_start":
                turn_id = payload["turn_id"]
            case "step_complete":
                say(told(payload["step_details"]))
            case "turn_awaiting_approval":
                ids = ", ".join(one["call_id"] for one in payload["tool_calls"])
                raise Refused(
                    f"the turn {payload['turn_id']} of the agent {agent} awaits approval of {_calls(payload)}: "
                    f"POST {API}/turn/approve decides of {ids}, and GET {API}/turn/events follows it then"
                )
            case "turn_complete":
                whole = payload["turn"]
    if whole is None:
        raise Refused(
            f"the stream of the turn {turn_id} of the agent {agent} has ended before it, which goes on: "
            f"GET {API}/turn/get tells how it is"
        )
    steps = [step["step_type"] for step in whole["steps"]]
    return {"turn_id": whole["turn_id"], "answer": whole["output_message"]["content"], "steps": steps}


def told(step: dict[str, Any]) -> str:
    """What a step was, in a line."""
    match step["step_type"]:
        case "tool_execution":
            return f"tools: {_calls(step)} → {[one['content'] for one in step['tool_responses']]}"
        case "memory_retrieval":
            return f"memory: looked in {', '.join(step['memory_bank_ids'])}"
        case "shield_call":
            return "shield: " + ("violated" if step["response"].get("is_violation") else "well")
        case _:
            return "inference"


def _calls(of: dict[str, Any]) -> str:
    return ", ".join(f"{one['tool_name']}({one['arguments']})" for one in of["tool_calls"])


def _lines() -> Iterator[str]:
    return (line.strip() for line in sys.stdin if line.strip())


def words(result: dict[str, Any]) -> str:
    answers = [str(one["answer"]) for one in result["turns"]]
    say(f"go on with --agent {result['agent_id']} --session {result['session_id']}")
    return "\n".join(answers)


if __name__ == "__main__":
    sys.exit(drive(__doc__, options, run, words))

"""How often a small model calls the right functions through the agent loop: cases of BFCL, asked as turns of agents.

    python -m scripts.bfcl [--cases N] [--only CATEGORY …] [--json FILE]        (also: scripts/bench agents --only bfcl)

The Berkeley Function-Calling Leaderboard (Patil et al. 2025) has questions, the functions that there are, and the calls
that are right. Each case becomes an agent with these functions, which the client runs: so the turn ends with the calls,
and they are the answer. They are compared by their syntax, as BFCL does (stack/function_calls.py).

simple       one function, one call
multiple     one call of one of several functions
parallel     several calls of one function
irrelevance  no function helps: right is whatever has no call

What the first answer of the model has called stands beside it: where an answer has a call that cannot be read, the loop
tells the model so, and asks again. A parameter in the specification's form has a name, a type and a description; what
BFCL says beyond that of its values stands in the description.

The model is Qwen2.5-Coder-0.5B-Instruct; `python -m scripts.prepare_for_tests tool-model bfcl` fetches it and the
cases.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from scripts import local_stack, tool_model
from scripts.bench_servers import BenchFailed
from scripts.bench_trainings import say
from scripts.figures import Share, write_json, write_shares
from scripts.prepare_for_tests import TOOL_MODEL
from stack import function_calls
from stack.config import home

# The files of the categories.
CATEGORIES = {
    "simple": "BFCL_v4_simple_python.json",
    "multiple": "BFCL_v4_multiple.json",
    "parallel": "BFCL_v4_parallel.json",
    "irrelevance": "BFCL_v4_irrelevance.json",
}
CASES = 100
# So many turns are under way at once.
AT_ONCE = 8
TURN_S = 900.0
INSTRUCTIONS = "You are a helpful assistant."
SAMPLING = {"strategy": "greedy", "max_tokens": 512}
# How BFCL's types are called in the specification's definitions of parameters.
_TYPES = {"string": "string", "integer": "int", "float": "float", "boolean": "bool", "dict": "dict", "any": "string"}
_LISTS = ("array", "tuple")
# What is said of a parameter's values.
_SAID = ("enum", "default", "properties")

Calls = list[tuple[str, Any]]


@dataclass(frozen=True)
class Case:
    """A question of BFCL: its id, and what stack.function_calls has read of it."""

    id: str
    read: function_calls.Case


@dataclass(frozen=True)
class Answer:
    """What a turn has called and said, what its first answer had called, and how often the model was asked."""

    case: Case
    calls: Calls
    text: str
    first_calls: Calls
    asked: int

    @property
    def is_right(self) -> bool:
        return is_right(self.case, self.calls)

    @property
    def was_right_at_first(self) -> bool:
        return is_right(self.case, self.first_calls)


def main() -> int:
    arguments = _arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="stack-bfcl-") as folder:
            answers = measure(Path(folder) / "stack", arguments.only, arguments.cases)
    except (BenchFailed, local_stack.StartFailed, OSError, httpx.HTTPError) as error:
        print(f"bfcl: {error}", file=sys.stderr)
        return 2
    shares = shares_of(answers)
    print(write_shares(shares))
    if arguments.json is not None:
        rows = [row_of(name, answer) for name, some in answers.items() for answer in some]
        write_json(arguments.json, shares, bench="bfcl", model=TOOL_MODEL, answers=rows)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bfcl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=CASES, metavar="N", help=f"of each category ({CASES})")
    parser.add_argument("--only", nargs="+", choices=CATEGORIES, default=[*CATEGORIES], metavar="CATEGORY")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and answers to a file, too")
    return parser.parse_args()


# The cases


def cases_of(category: str, most: int) -> list[Case]:
    """So many cases of a category, at equal distances, or all where there are fewer. Raises BenchFailed."""
    folder = home() / "packaged-data" / "bfcl"
    name = CATEGORIES[category]
    if not (folder / name).is_file():
        raise BenchFailed(f"the cases are not in {folder}: run python -m scripts.prepare_for_tests bfcl")
    expected: dict[str, Any] = {}
    if (folder / "possible_answer" / name).is_file():
        expected = {row["id"]: row["ground_truth"] for row in _rows(folder / "possible_answer" / name)}
    rows = [*_rows(folder / name)]
    chosen = [rows[at * len(rows) // most] for at in range(most)] if most < len(rows) else rows
    return [
        Case(row["id"], function_calls.read(number, row | {"ground_truth": expected.get(row["id"], [])}))
        for number, row in enumerate(chosen, start=1)
    ]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        yield json.loads(line)


def tool_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function of BFCL as one of the client in an agent's config."""
    required = function["parameters"].get("required", ())
    return {
        "type": "function_call",
        "function_name": function["name"],
        "description": function["description"],
        "parameters": {
            name: {"param_type": _type(parameter), "description": _said(parameter), "required": name in required}
            for name, parameter in function["parameters"]["properties"].items()
        },
    }


def _type(parameter: Mapping[str, Any]) -> str:
    if parameter["type"] not in _LISTS:
        return _TYPES[parameter["type"]]
    items = parameter.get("items")
    return f"list[{_type(items)}]" if isinstance(items, dict) and "type" in items else "list"


def _said(parameter: Mapping[str, Any]) -> str:
    """A parameter's description, with what is said of its values, or of those of its items."""
    items = parameter.get("items")
    parts = [str(parameter.get("description", ""))]
    for of in (parameter, items if isinstance(items, dict) else {}):
        parts += [f"{key}: {json.dumps(of[key])}" for key in _SAID if key in of]
    return " ".join(part for part in parts if part)


# The turns


def measure(folder: Path, categories: Sequence[str] = (*CATEGORIES,), most: int = CASES) -> dict[str, list[Answer]]:
    """The answers to so many cases of each category, of a stack that is started for them. Raises BenchFailed."""
    cases = {name: cases_of(name, most) for name in categories}
    answers = {}
    with (
        tool_model.serving(folder, warm=AT_ONCE) as server,
        httpx.Client(base_url=server.url, timeout=TURN_S) as client,
    ):
        for name, some in cases.items():
            say(f"{name}: {len(some)} cases")
            with ThreadPoolExecutor(AT_ONCE) as threads:
                answers[name] = [*threads.map(lambda case: ask(client, case), some)]
            say(f"{name}: {sum(answer.is_right for answer in answers[name])} right")
    return answers


def ask(client: httpx.Client, case: Case) -> Answer:
    """Has an agent of its own answer a case."""
    config = {
        "model": TOOL_MODEL,
        "instructions": INSTRUCTIONS,
        "sampling_params": SAMPLING,
        "tools": [tool_of(function) for function in case.read.functions],
    }
    agent_id = _post(client, "create", agent_config=config)["agent_id"]
    session_id = _post(client, "session/create", agent_id=agent_id, session_name=case.id)["session_id"]
    turn = _post(client, "turn/create", agent_id=agent_id, session_id=session_id, messages=case.read.messages)
    _post(client, "delete", agent_id=agent_id)
    said = [step["model_response"] for step in turn["steps"] if step["step_type"] == "inference"]
    output = turn["output_message"]
    return Answer(case, _calls(output), output["content"], _calls(said[0]), len(said))


def _post(client: httpx.Client, path: str, **body: Any) -> Any:
    reply = client.post(f"/agentic_system/{path}", json=body)
    if reply.status_code != 200:
        raise BenchFailed(f"/agentic_system/{path} answers {reply.status_code}: {reply.text[:500]}")
    return reply.json()


def _calls(message: Mapping[str, Any]) -> Calls:
    return [(call["tool_name"], call["arguments"]) for call in message["tool_calls"]]


# What is right


def is_right(case: Case, calls: Calls) -> bool:
    return function_calls.match(case.read.functions, calls, case.read.expected)


def shares_of(answers: Mapping[str, Sequence[Answer]]) -> list[Share]:
    """How many of each category are right, and of the first answers to them."""
    return [
        share
        for name, some in answers.items()
        for share in (
            Share(name, sum(answer.is_right for answer in some), len(some)),
            Share(f"{name}, first answer", sum(answer.was_right_at_first for answer in some), len(some)),
        )
    ]


def row_of(category: str, answer: Answer) -> dict[str, Any]:
    """An answer for programs, such as another checker of calls."""
    return {
        "category": category,
        "id": answer.case.id,
        "calls": [{name: arguments} for name, arguments in answer.calls],
        "text": answer.text,
        "first_calls": [{name: arguments} for name, arguments in answer.first_calls],
        "asked": answer.asked,
        "is_right": answer.is_right,
    }


if __name__ == "__main__":
    sys.exit(main())

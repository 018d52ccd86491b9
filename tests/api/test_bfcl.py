"""BFCL's cases as turns of agents: how they are asked, and what is made of the answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from scripts import bfcl
from scripts.bench_servers import BenchFailed
from scripts.prepare_for_tests import TOOL_MODEL
from serve_apps import gateway
from stack.context import Context
from tests.api.conftest import HERE, URL
from tests.scripted_agents import MODEL, Model, call, open_context

FUNCTION: dict[str, Any] = {
    "name": "math.area",
    "description": "The area of a shape.",
    "parameters": {
        "type": "dict",
        "properties": {
            "sides": {"type": "array", "items": {"type": "float"}, "description": "Of the shape."},
            "shape": {"type": "string", "enum": ["square", "triangle"], "default": "square"},
            "point": {"type": "tuple", "items": {"type": "dict", "properties": {"x": {"type": "integer"}}}},
            "colours": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            "exact": {"type": "boolean"},
            "options": {"type": "dict", "properties": {"unit": {"type": "string"}}},
            "whatever": {"type": "any"},
        },
        "required": ["sides"],
    },
}


def rows(*ids: str) -> str:
    question = [[{"role": "user", "content": "How large is it?"}]]
    return "".join(json.dumps({"id": one, "question": question, "function": [FUNCTION]}) + "\n" for one in ids)


@pytest.fixture
def cases(home: Path) -> Path:
    folder = home / "packaged-data" / "bfcl"
    (folder / "possible_answer").mkdir(parents=True)
    ids = [f"simple_{number}" for number in range(10)]
    (folder / bfcl.CATEGORIES["simple"]).write_text(rows(*ids))
    expected = [{"id": one, "ground_truth": [{"math.area": {"sides": [[2.5, 3.5]]}}]} for one in ids]
    (folder / "possible_answer" / bfcl.CATEGORIES["simple"]).write_text("\n".join(map(json.dumps, expected)))
    (folder / bfcl.CATEGORIES["irrelevance"]).write_text(rows("irrelevance_0"))
    return folder


def test_cases_are_taken_at_equal_distances(cases: Path) -> None:
    assert [case.id for case in bfcl.cases_of("simple", 4)] == ["simple_0", "simple_2", "simple_5", "simple_7"]
    assert len(bfcl.cases_of("simple", 100)) == 10
    assert bfcl.cases_of("irrelevance", 100)[0].read.expected == []
    with pytest.raises(BenchFailed, match="prepare_for_tests bfcl"):
        bfcl.cases_of("parallel", 1)


def test_a_function_is_told_with_all_that_is_known_of_its_values() -> None:
    tool = bfcl.tool_of(FUNCTION)
    told = {name: (one["param_type"], one["description"]) for name, one in tool["parameters"].items()}
    assert told == {
        "sides": ("list[float]", "Of the shape."),
        "shape": ("string", 'enum: ["square", "triangle"] default: "square"'),
        "point": ("list[dict]", 'properties: {"x": {"type": "integer"}}'),
        "colours": ("list[list[int]]", ""),
        "exact": ("bool", ""),
        "options": ("dict", 'properties: {"unit": {"type": "string"}}'),
        "whatever": ("string", ""),
    }
    assert [name for name, one in tool["parameters"].items() if one["required"]] == ["sides"]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def context(home: Path, store_url: str, model: Model) -> Iterator[Context]:
    context = open_context(store_url, model, models=[MODEL | {"id": TOOL_MODEL}])
    yield context
    context.close()


@pytest.fixture
def client(context: Context) -> Iterator[TestClient]:
    async def ready() -> dict[str, str]:
        return {}

    with TestClient(gateway.create_app(context, ready), client=HERE, base_url=URL) as client:
        yield client


RIGHT = call("math.area", sides=[2.5, 3.5])


@pytest.mark.parametrize(
    ("category", "said", "is_right", "was_right_at_first", "asked"),
    [
        ("simple", [RIGHT], True, True, 1),
        ("simple", [call("math.area", sides="long"), RIGHT], True, False, 2),
        ("simple", [call("math.area", sides=[3.5, 2.5])], False, False, 1),
        ("simple", [RIGHT + RIGHT], False, False, 1),
        ("simple", ["It is large."], False, False, 1),
        ("irrelevance", ["It is large."], True, True, 1),
        ("irrelevance", [RIGHT], False, False, 1),
    ],
)
def test_the_calls_of_a_turn_are_the_answer(
    client: TestClient,
    model: Model,
    cases: Path,
    category: str,
    said: list[str],
    is_right: bool,
    was_right_at_first: bool,
    asked: int,
) -> None:
    model.say = lambda body: said[min(len(model.asked), len(said)) - 1]
    answer = bfcl.ask(client, bfcl.cases_of(category, 1)[0])  # type: ignore[arg-type]
    assert (answer.is_right, answer.was_right_at_first, answer.asked) == (is_right, was_right_at_first, asked)
    (tool,) = model.bodies[0]["tools"]
    assert tool["function"]["name"] == "math.area"
    sides = {"type": "array", "items": {"type": "number"}, "description": "Of the shape."}
    assert tool["function"]["parameters"]["properties"]["sides"] == sides
    share, first = bfcl.shares_of({category: [answer]})
    assert (share.right, share.of, first.right) == (int(is_right), 1, int(was_right_at_first))
    assert json.loads(json.dumps(bfcl.row_of(category, answer)))["asked"] == asked
    assert client.get("/agentic_system/list").json() == []

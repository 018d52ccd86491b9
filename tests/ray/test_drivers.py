"""The driver scripts as a user runs them: against a stack, by its address alone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import samples
from tests.running_stack import MODEL, SCRIPTED, Stack

FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to learn from, and others to be tested with."""
    folder = tmp_path_factory.mktemp("rows")
    rows = samples.dialogs(12)
    return samples.write_rows(folder / "train.jsonl", rows[:8]), samples.write_rows(folder / "test.jsonl", rows[8:])


def drive(stack: Stack, name: str, *arguments: str | Path) -> dict[str, Any]:
    """What a driver gives for programs."""
    command = (sys.executable, "-m", f"scripts.drivers.{name}", "--address", stack.url, "--json")
    done = stack.run(*command, *map(str, arguments))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_models_are_shown_once_they_are_ready(stack: Stack) -> None:
    models = {one["id"]: one for one in drive(stack, "serve")["models"]}
    assert models[MODEL]["state"] == "running"


def test_an_agent_goes_on_with_its_session(stack: Stack) -> None:
    first = drive(stack, "agent", "--model", MODEL, FRANCE)
    assert "Paris" in first["turns"][0]["answer"]
    again = ("--agent", first["agent_id"], "--session", first["session_id"])
    second = drive(stack, "agent", *again, "What did I ask before?")
    assert second["session_id"] == first["session_id"]
    assert [one["steps"] for one in second["turns"]] == [["inference"]]


def test_answers_become_preferences(stack: Stack, files: tuple[Path, Path]) -> None:
    options = ("--model", MODEL, "--output", "preferences", "--generations", "4", "--max-tokens", "64")
    made = drive(stack, "generate", "--rows", files[1], *options)
    with stack.client() as client:
        dataset = client.get("/datasets/get", params={"dataset_uuid": made["dataset"]})
    assert dataset.status_code == 200, dataset.text
    assert made["metrics"]["generated"] == 16


def test_two_evaluations_are_compared(stack: Stack, files: tuple[Path, Path]) -> None:
    first = drive(stack, "evaluate", "--rows", files[1], "--model", SCRIPTED, "--max-tokens", "8")
    both = ("--dataset", f"{first['job_uuid']}-rows", "--compare-with", first["job_uuid"])
    second = drive(stack, "evaluate", *both, "--model", SCRIPTED, "--max-tokens", "8")
    assert {one["name"]: one["value"] for one in second["compared"]} == {"em": 0, "f1": 0}, "it is the same model"


def test_a_model_is_tuned_and_served(stack: Stack, files: tuple[Path, Path]) -> None:
    tuned = drive(stack, "tune", "--model", MODEL, "--rows", files[0], "--rank", "8")
    assert tuned["model"] == f"{MODEL}:{tuned['job_uuid']}"
    assert drive(stack, "agent", "--model", tuned["model"], FRANCE)["turns"][0]["answer"]


def test_the_whole_life_cycle(stack: Stack, files: tuple[Path, Path]) -> None:
    train, test = files
    options = ("--model", MODEL, "--generations", "2", "--max-tokens", "64", "--ask", FRANCE, "--name", "whole")
    result = drive(stack, "life_cycle", "--train", train, "--test", test, *options)
    assert result["model"] == f"{MODEL}:whole-tune"
    assert {one["name"] for one in result["compared"]} == {"em", "f1"}
    assert result["before"]["examples"] == result["after"]["examples"] == 4
    assert result["turn"]["answer"]

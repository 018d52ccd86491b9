"""scripts/bench agents: its figures, and the stack that it measures."""

from pathlib import Path

import psutil
import pytest
import yaml

from scripts.bench_agents import config, document, megabytes, milliseconds_a_step, time_of
from scripts.local_stack import read_serve_file
from stack.api.agentic_system import AgentConfig

EVENTS = [
    (0.010, {"event_type": "turn_start"}),
    (0.020, {"event_type": "step_start"}),
    (0.025, {"event_type": "step_progress"}),
    (0.030, {"event_type": "step_complete"}),
    (0.031, {"event_type": "step_start"}),
    (0.039, {"event_type": "step_complete"}),
    (0.040, {"event_type": "turn_complete"}),
]


def test_a_step_is_from_the_first_one_to_the_end_of_the_turn_by_their_number() -> None:
    assert milliseconds_a_step(EVENTS) == pytest.approx(10)
    assert time_of(EVENTS, "step_complete") == 0.030


def test_the_stack_that_is_measured_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_HOME", str(tmp_path))
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document()))
    made = read_serve_file(file)
    assert [model.id for model in made.config.models] == ["scripted", "slow"]
    assert made.config.agents.warm == 1
    AgentConfig.model_validate(config("slow"))


def test_the_memory_of_a_process_that_has_ended_is_none() -> None:
    assert megabytes(psutil.Process()) > 1
    child = psutil.Popen(["true"])
    child.wait()
    assert megabytes(child) == 0

"""scripts/bench agents: its figures, and the stack that it measures."""

from pathlib import Path

import psutil
import pytest
import yaml

from scripts.bench_agents import Event, config, document, megabytes, of_a_step, time_of
from scripts.bench_servers import BenchFailed
from scripts.local_stack import read_serve_file
from stack.api.agentic_system import AgentConfig


def events(*steps: str) -> list[Event]:
    """Of a turn whose steps take 10 ms each, begun 20 ms after it was asked for."""
    told: list[Event] = [(0.010, {"event_type": "turn_start"})]
    for number, step_type in enumerate(steps, start=2):
        told.append((number / 100, {"event_type": "step_start", "step_type": step_type}))
        told.append((number / 100 + 0.009, {"event_type": "step_complete", "step_type": step_type}))
    return [*told, (len(steps) / 100 + 0.020, {"event_type": "turn_complete"})]


def test_a_step_is_a_third_of_the_turn_without_the_engine() -> None:
    turn = events("inference", "tool_execution", "inference")
    assert of_a_step(turn, engine_ms=3) == pytest.approx((30 - 2 * 3) / 3)
    assert time_of(turn, "step_complete") == pytest.approx(0.029)
    with pytest.raises(BenchFailed, match="other steps"):
        of_a_step(events("inference"), engine_ms=3)


def test_the_stack_that_is_measured_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_HOME", str(tmp_path))
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document(8_000)))
    made = read_serve_file(file)
    assert [model.id for model in made.config.models] == ["scripted", "slow"]
    assert made.config.agents.warm == 1
    AgentConfig.model_validate(config("slow"))


def test_the_memory_of_a_process_that_has_ended_is_none() -> None:
    assert megabytes(psutil.Process()) > 1
    child = psutil.Popen(["true"])
    child.wait()
    assert megabytes(child) == 0

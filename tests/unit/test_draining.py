"""A gateway that is replaced ends what it streams, the longest turn of an agent among it."""

import warnings
from typing import Any

import pytest

from stack.agentic_system.answer import FINAL_SECONDS
from stack.config import Config
from stack.draining import longest_stream_s

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray Serve's own use of pydantic
    from serve_apps.gateway import build


def args(timeouts: list[float], max_seconds: float) -> dict[str, Any]:
    models = [{"id": f"m{at}", "path": "models/m", "request_timeout_s": one} for at, one in enumerate(timeouts)]
    return {"models": models, "agents": {"max_seconds": max_seconds}}


@pytest.mark.parametrize(
    ("timeouts", "max_seconds", "longest"), [([30, 300], 600, 900), ([1_200], 60, 1_260), ([5], 7_200, 7_205)]
)
def test_a_turn_outlasts_its_bound_by_its_last_answer_and_one_models_time(
    timeouts: list[float], max_seconds: float, longest: float
) -> None:
    config = Config.model_validate(args(timeouts, max_seconds))
    assert longest_stream_s(config) == longest + FINAL_SECONDS


def test_a_gateway_that_is_stopped_waits_for_the_longest_stream() -> None:
    given = args([30], 3_600)
    gateway = build(given)._bound_deployment
    assert gateway._deployment_config.graceful_shutdown_timeout_s == longest_stream_s(Config.model_validate(given))

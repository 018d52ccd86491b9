"""kill -9 of the engine that an evaluation asks: it goes on, ends once, and no row is lost or scored twice."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import samples
from tests.running_stack import MODEL, Stack, ended, wait_for

pytestmark = pytest.mark.long
ROWS = 200


def test_an_evaluation_survives_its_engine(stack: Stack, client: httpx.Client) -> None:
    rows = [{"prompt": f"Count on from {number}, please.", "completion": str(number + 1)} for number in range(ROWS)]
    file = samples.write_rows(stack.home / "data" / "engine-questions.jsonl", rows)
    body = samples.evaluation(
        samples.dataset(file, prompt="text", completion="text"), job_uuid="evaluation-engine", checkpoint=MODEL,
        metrics=["rouge", "perplexity"], sampling_params={"strategy": "greedy", "max_tokens": 32}, max_failed_rows=ROWS,
    )  # fmt: skip
    assert client.post("/evaluate/text_generation/", json=body).status_code == 200

    def state() -> dict[str, Any]:
        found: dict[str, Any] = client.get("/evaluate/job/status", params={"job_uuid": "evaluation-engine"}).json()
        return found

    def done() -> int:
        assert state()["status"] in ("scheduled", "running"), state()
        return int((state().get("progress") or {"done": 0})["done"])

    wait_for(lambda: done() >= 32, 240, state)
    stack.kill_9("VLLM::EngineCore")
    assert done() < ROWS, "the engine was killed while the evaluation asked it"
    status = ended(client, "evaluate", "evaluation-engine", seconds=600)
    assert status["status"] == "completed", status
    path = client.get("/evaluate/job/artifacts", params={"job_uuid": "evaluation-engine"}).json()["path"]
    lines = (Path(path.removeprefix("file://")) / "examples.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    assert sorted(one["row"] for one in examples) == list(range(1, ROWS + 1))
    failed = [one for one in examples if one["error"]]
    metrics = status["metrics"]
    assert (metrics["examples"], metrics["failed"]) == (ROWS, len(failed))
    assert len(failed) < ROWS / 2, "what is asked once the engine is there again has an answer"
    for one in examples:
        assert ("rougeL" in one, "perplexity" in one) == (not one["error"], not one["error"])
    again = client.post("/evaluate/compare", json={"first": "evaluation-engine", "second": "evaluation-engine"}).json()
    assert (again["examples"], again["left_out"], again["changed_examples"]) == (ROWS, len(failed), 0)

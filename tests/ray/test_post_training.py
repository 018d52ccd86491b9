"""Trainings on a running stack with the real model, started together: what they make, load and serve.

What takes no stack is in tests/own_ray/test_training_runs.py and tests/unit/test_training_worker.py, with a tiny model.
"""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from scripts import prompt_injection
from tests.running_stack import MODEL, Stack, ended, wait_for

LORA = {
    "lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False, "apply_lora_to_output": False,
    "rank": 8, "alpha": 16,
}  # fmt: skip
OPTIMIZER = {"optimizer_type": "adamw", "lr": 1e-3, "lr_min": 0.0, "weight_decay": 0.0}
TRAINING = {"n_epochs": 1, "n_iters": 4, "batch_size": 4, "shuffle": True, "seed": 7}
PAIRS = [
    {"prompt": f"Is the {thing} ready?", "chosen": "Yes, it is.", "rejected": "Look for yourself, and leave me alone."}
    for thing in ("car", "soup", "room", "report", "garden", "letter", "bill", "table")
]
START_S = 240


@pytest.fixture(scope="module")
def requests(stack: Stack) -> dict[str, tuple[str, dict[str, Any]]]:
    """By job: the route, and the body."""
    data = stack.home / "data"
    splits = prompt_injection.write_splits(stack.home / "packaged-data" / "prompt-injection", data / "trainings")
    rows = splits["train"].file.read_text().splitlines()[:16]
    (data / "sixteen.jsonl").write_text("".join(f"{row}\n" for row in rows))
    (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    dialogs = {"columns": {"dialog": "dialog"}, "content_url": stack.data_at(data / "sixteen.jsonl")}
    texts = dict.fromkeys(("prompt", "chosen", "rejected"), "text")
    pairs = {"columns": texts, "content_url": stack.data_at(data / "pairs.jsonl")}
    common = {"optimizer_config": OPTIMIZER}

    def fine_tuning(algorithm: str = "lora", lora: Any = LORA, **training: Any) -> tuple[str, dict[str, Any]]:
        body = {"model": MODEL, "dataset": dialogs, "algorithm": algorithm, "algorithm_config": lora}
        return "supervised_fine_tune", common | body | {"training_config": TRAINING | training}

    preferences = common | {"dataset": pairs, "validation_dataset": pairs, "training_config": TRAINING}
    return {
        "one": fine_tuning(),
        "two-fsdp": fine_tuning(workers=2, memory_efficient_fsdp_wrap=True),
        "two-zero2": fine_tuning(workers=2, parallelism="zero2"),
        "whole": fine_tuning("full", None, n_iters=2),
        "preferred": (
            "preference_optimize",
            preferences
            | {
                "finetuned_model": "one", "algorithm": "dpo", "lora_config": None,
                "algorithm_config": {"reward_scale": 1.0, "reward_clip": 0, "epsilon": 0.1, "gamma": 0.2, "beta": 0.1},
            },
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(stack: Stack, requests: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The status of each job when it has ended: the first has its end before the others, which may go on from it."""
    with stack.client() as client:
        for name, (route, body) in requests.items():
            reply = client.post(f"/post_training/{route}", json=body | {"job_uuid": name})
            assert reply.status_code == 200, reply.text
            if name == "one":
                ended(client, "post_training", name)
        return {name: ended(client, "post_training", name) for name in requests}


def losses(client: httpx.Client, job: str) -> list[float]:
    found = client.get("/post_training/job/artifacts", params={"job_uuid": job}).json()["metrics"]
    return [point["value"] for point in found if point["name"] == "loss"]


def files(stack: Stack, status: dict[str, Any]) -> Path:
    return stack.files_at(status["checkpoints"][0]["path"])


def answer(client: httpx.Client, model: str) -> httpx.Response:
    message = {"role": "user", "content": "What is the capital of France?"}
    return client.post("/v1/chat/completions", json={"model": model, "messages": [message], "max_tokens": 4})


def test_all_trainings_are_completed(done: dict[str, dict[str, Any]]) -> None:
    failed = {name: status["error"] for name, status in done.items() if status["status"] != "completed"}
    assert failed == {}


@pytest.mark.parametrize("shared", ["two-fsdp", "two-zero2"])
def test_two_workers_come_to_the_losses_of_one(
    stack: Stack, client: httpx.Client, done: dict[str, dict[str, Any]], shared: str
) -> None:
    assert done[shared]["resources_allocated"]["workers"] == 2
    assert len(losses(client, "one")) == 4
    assert losses(client, shared) == pytest.approx(losses(client, "one"), abs=2e-3)
    assert (files(stack, done[shared]) / "adapter_model.safetensors").is_file()


def test_a_whole_model_is_served_by_an_application_of_its_own(
    client: httpx.Client, done: dict[str, dict[str, Any]]
) -> None:
    (checkpoint,) = done["whole"]["checkpoints"]
    assert checkpoint["model"] == f"{MODEL}-whole"
    assert "model.safetensors" in [file["name"] for file in checkpoint["files"]]

    def answers() -> bool:
        reply = answer(client, f"{MODEL}-whole")
        assert reply.status_code in (200, 503), reply.text
        return reply.status_code == 200

    wait_for(answers, START_S)
    client.post("/models/remove", json={"model_id": f"{MODEL}-whole"}).raise_for_status()


def test_a_whole_model_is_one_that_transformers_loads_and_another_than_before(
    stack: Stack, done: dict[str, dict[str, Any]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(files(stack, done["whole"]))("Good day", return_tensors="pt")
    with torch.no_grad():
        trained, base = (
            AutoModelForCausalLM.from_pretrained(folder)(**tokens).logits
            for folder in (files(stack, done["whole"]), stack.home / "models" / MODEL)
        )
    assert trained.isfinite().all()
    assert (trained - base).abs().max() > 0.01


def test_a_preference_optimization_of_an_adapter_by_its_jobs_id_measures_pairs_and_answers(
    client: httpx.Client, done: dict[str, dict[str, Any]]
) -> None:
    assert {"preference_accuracy", "validation_preference_accuracy"} <= set(done["preferred"]["metrics"])
    assert done["preferred"]["checkpoints"][0]["validation_loss"] > 0
    assert answer(client, f"{MODEL}:preferred").status_code == 200

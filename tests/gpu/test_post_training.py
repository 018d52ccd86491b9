"""Trainings on GPUs with the real model, as the jobs of a stack: in bfloat16 and 4 bits, on one GPU and on two.

`scripts/test tests/gpu` on a machine with GPUs runs them; anywhere else they are skipped.
"""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from tests import samples
from tests.running_stack import MODEL, Stack, ended, wait_for

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
on_two = pytest.mark.skipif(GPUS < 2, reason="there is no second GPU here")
# A training waits for the GPU of a replica that was asked shortly before, and a replica for that of a training.
WAIT_S = 600
STEPS = 30
TRAINING = {"n_epochs": 10, "n_iters": STEPS, "batch_size": 8, "shuffle": True, "seed": 7}
# In bfloat16 a loss has two or three digits, and workers add up in another order than one does.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def data(gpu_stack: Stack) -> dict[str, Any]:
    """Dialogs that all say the same: what is learned of them shows in an answer."""
    return samples.dataset(samples.write_rows(gpu_stack.home / "data" / "gpu.jsonl", samples.dialogs(24)))


def submit(
    client: httpx.Client, data: dict[str, Any], uuid: str, algorithm: str = "lora", training: Any = None, **fields: Any
) -> None:
    body = samples.fine_tuning(
        data, job_uuid=uuid, model=MODEL, algorithm=algorithm, training_config=TRAINING | (training or {}), **fields
    )
    if algorithm == "full":
        body["algorithm_config"] = None
    body["optimizer_config"]["lr"] = 1e-4 if algorithm == "full" else 1e-3
    reply = client.post("/post_training/supervised_fine_tune", json=body)
    assert reply.status_code == 200, reply.text


def completed(client: httpx.Client, uuid: str) -> dict[str, Any]:
    status = ended(client, "post_training", uuid, WAIT_S)
    assert status["status"] == "completed", status
    return status


def trained(
    client: httpx.Client, data: dict[str, Any], uuid: str, algorithm: str = "lora", **training: Any
) -> tuple[dict[str, Any], list[float]]:
    """The status of a training that is done, and its losses."""
    submit(client, data, uuid, algorithm, training)
    status = completed(client, uuid)
    found = client.get("/post_training/job/artifacts", params={"job_uuid": uuid}).json()["metrics"]
    return status, [point["value"] for point in found if point["name"] == "loss"]


@pytest.fixture(scope="module")
def one_gpu(gpu_stack: Stack, data: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[float]]]:
    """What trainings on one GPU came to, by their algorithm."""
    with gpu_stack.client() as client:
        return {algorithm: trained(client, data, f"one-{algorithm}", algorithm) for algorithm in ("lora", "full")}


Trained = dict[str, tuple[dict[str, Any], list[float]]]


def folder(status: dict[str, Any]) -> Path:
    return Path(status["checkpoints"][0]["path"].removeprefix("file://"))


def assert_finite_adapter(status: dict[str, Any]) -> None:
    weights = load_file(folder(status) / "adapter_model.safetensors")
    assert weights
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(torch.count_nonzero(weight) for name, weight in weights.items() if "lora_B" in name)


def assert_whole_model(status: dict[str, Any]) -> None:
    """It loads by plain transformers, complete, and is no longer what it was."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder(status), output_loading_info=True)
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_training_has_a_gpu_for_itself_and_its_losses_fall(one_gpu: Trained) -> None:
    status, losses = one_gpu["lora"]
    assert status["resources_allocated"]["per_worker"]["GPU"] == 1
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] / 2
    assert_finite_adapter(status)


def test_all_weights_are_trained_in_bfloat16_and_load_with_transformers(one_gpu: Trained) -> None:
    status, losses = one_gpu["full"]
    assert losses[-1] < losses[0] / 2
    assert_whole_model(status)


def test_the_adapter_answers_on_the_gpu_as_it_has_learned(client: httpx.Client, one_gpu: Trained) -> None:
    status, _ = one_gpu["lora"]
    body = {"model": status["checkpoints"][0]["model"], "messages": samples.DIALOG[:2], "max_tokens": 8}

    def answer() -> str | None:
        """None while the replica starts."""
        reply = client.post("/v1/chat/completions", json=body | {"temperature": 0})
        assert reply.status_code in (200, 503), reply.text
        return str(reply.json()["choices"][0]["message"]["content"]) if reply.status_code == 200 else None

    assert wait_for(answer, WAIT_S) == samples.DIALOG[2]["content"]


def test_an_adapter_on_weights_of_4_bits_comes_near_the_losses_of_one_on_16(
    client: httpx.Client, data: dict[str, Any], one_gpu: Trained
) -> None:
    status, losses = trained(client, data, "one-qlora", "qlora")
    _, expected = one_gpu["lora"]
    assert losses[0] == pytest.approx(expected[0], rel=0.2)
    assert losses[-1] < losses[0] / 2
    assert status["metrics"]["memory_gb"] > 0
    assert_finite_adapter(status)


def test_a_batch_that_does_not_fit_says_what_to_lower(client: httpx.Client, gpu_stack: Stack) -> None:
    """The logits of 512 examples of 2,048 tokens have over 200 GB in float32."""
    dialog = [*samples.DIALOG[:2], {"role": "assistant", "content": "Paris, and " * 2_000}]
    file = samples.write_rows(gpu_stack.home / "data" / "long.jsonl", [{"dialog": dialog}] * 512)
    large = {"batch_size": 512, "micro_batch_size": 512, "n_iters": 1, "max_length": 2_048, "too_long": "cut"}
    submit(client, samples.dataset(file), "too-large", training=large)
    status = ended(client, "post_training", "too-large", WAIT_S)
    assert status["status"] == "failed", status
    assert status["error"].startswith("out of memory: lower micro_batch_size, batch_size or max_length"), status


def test_a_training_goes_on_after_its_worker_was_killed(
    client: httpx.Client, gpu_stack: Stack, data: dict[str, Any]
) -> None:
    submit(client, data, "killed", training={"n_epochs": 200, "n_iters": 600, "checkpoint_iters": 50})

    def saved() -> bool:
        status = client.get("/post_training/job/status", params={"job_uuid": "killed"}).json()
        assert status["status"] in ("scheduled", "running"), status
        return bool(status["checkpoints"])

    wait_for(saved, WAIT_S)
    gpu_stack.kill_9("RayTrainWorker")
    status = completed(client, "killed")
    assert len(status["attempts"]) == 2
    found = client.get("/post_training/job/artifacts", params={"job_uuid": "killed"}).json()["metrics"]
    assert [point["step"] for point in found if point["name"] == "loss"] == list(range(1, 601))


SHARED: dict[str, dict[str, Any]] = {
    "ddp": {"parallelism": "ddp"},
    "fsdp": {"parallelism": "fsdp"},
    "fsdp-blocks": {"memory_efficient_fsdp_wrap": True},
    "fsdp-offload": {"memory_efficient_fsdp_wrap": True, "fsdp_cpu_offload": True},
    "zero1": {"parallelism": "zero1"},
    "zero2": {"parallelism": "zero2"},
    "zero3": {"parallelism": "zero3"},
}


@on_two
@pytest.mark.parametrize("shared", SHARED)
def test_two_gpus_come_to_the_losses_of_one_with_all_weights(
    client: httpx.Client, data: dict[str, Any], one_gpu: Trained, shared: str
) -> None:
    status, losses = trained(client, data, f"two-{shared}", "full", workers=2, **SHARED[shared])
    assert status["resources_allocated"]["workers"] == 2
    assert losses == pytest.approx(one_gpu["full"][1], abs=TOLERANCE)
    assert_whole_model(status)


@on_two
@pytest.mark.parametrize("shared", ["ddp", "fsdp-blocks", "zero3"])
def test_two_gpus_come_to_the_losses_of_one_with_an_adapter(
    client: httpx.Client, data: dict[str, Any], one_gpu: Trained, shared: str
) -> None:
    status, losses = trained(client, data, f"two-lora-{shared}", workers=2, **SHARED[shared])
    assert losses == pytest.approx(one_gpu["lora"][1], abs=TOLERANCE)
    assert_finite_adapter(status)


@on_two
def test_weights_of_4_bits_are_sharded_over_two_gpus(client: httpx.Client, data: dict[str, Any]) -> None:
    status, losses = trained(client, data, "two-qlora", "qlora", workers=2, memory_efficient_fsdp_wrap=True)
    assert losses[-1] < losses[0] / 2
    assert_finite_adapter(status)

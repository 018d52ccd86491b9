"""Trainings as the drivers of jobs run them, on a Ray of their own, with a tiny model: how they are broken off, go on
and end."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import WorkerGroupError
from safetensors.torch import load_file

from stack import post_training
from stack.api.post_training import PostTrainingSFTRequest
from stack.context import Context
from stack.errors import Diverged
from tests import samples
from tests.driven_trainings import context_on_ray, driver, files_of, folder_of, job_of, kill_workers, train
from tests.tiny_training import save_model

# What libraries warn of in the process of a driver, which is this one here.
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, BATCH, STEPS, EVERY = 24, 6, 80, 16
POISON = "☃"
Accept = Callable[..., PostTrainingSFTRequest]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("home")
    tokenizer = AutoTokenizer.from_pretrained(save_model(home / "models" / "tiny"))
    save_model(home / "models" / "poisoned", poison=tokenizer(POISON)["input_ids"][-1])
    with context_on_ray(home, "tiny", "poisoned") as context:
        yield context


@pytest.fixture
def accept(context: Context) -> Accept:
    """Accepts a training of 24 dialogs, of which one poisons the model that takes that for poison."""

    def accept(uuid: str, model: str = "tiny", algorithm: str = "lora", **changes: Any) -> PostTrainingSFTRequest:
        folder = context.config.data_folders[0]
        train = dialogs(["a" * (1 + number % 7) for number in range(ROWS - 1)] + [POISON])
        validation = dialogs(["zz"] * 4)
        body = samples.fine_tuning(
            samples.dataset(samples.write_rows(folder / "train.jsonl", train)),
            job_uuid=uuid,
            model=model,
            algorithm=algorithm,
            validation_dataset=samples.dataset(samples.write_rows(folder / "validation.jsonl", validation)),
            training_config={
                **{"n_epochs": STEPS * BATCH // ROWS, "n_iters": 0, "batch_size": BATCH, "shuffle": True, "seed": 3},
                **{"checkpoint_iters": EVERY, "keep_checkpoints": 2},
                **changes,
            },
        )
        body["optimizer_config"]["lr"] = 0.02
        request = PostTrainingSFTRequest.model_validate(body)
        post_training.supervised_fine_tune(context, request)
        return PostTrainingSFTRequest.model_validate(job_of(context, uuid).request)

    return accept


def dialogs(answers: list[str]) -> list[dict[str, Any]]:
    question = {"role": "user", "content": "What is it?"}
    return [{"dialog": [question, {"role": "assistant", "content": answer}]} for answer in answers]


def figures(context: Context, uuid: str, name: str) -> dict[int, float]:
    """The values of a figure by step, of which there is one each."""
    found = context.store.telemetry.metrics("default", job_of(context, uuid).run_id, name)
    by_step = {metric.step: float(metric.value) for metric in found}  # type: ignore[arg-type]
    assert len(by_step) == len(found)
    return by_step


def test_a_training_goes_on_where_its_killed_worker_has_left_it_and_its_best_checkpoint_is_kept(
    context: Context, accept: Accept
) -> None:
    request = accept("killed")
    folder = folder_of(job_of(context, "killed"))
    killer = threading.Thread(
        target=kill_workers, args=(folder.parents[2], lambda: job_of(context, "killed").checkpoints)
    )
    killer.start()
    with pytest.raises(WorkerGroupError) as raised:
        train(context, request)
    killer.join()
    assert driver.is_lost(raised.value)
    left = job_of(context, "killed")
    assert left.checkpoints
    assert all((Path(checkpoint["path"]) / "trainer_state.json").is_file() for checkpoint in left.checkpoints)
    reached = max(checkpoint["iters"] for checkpoint in left.checkpoints)
    before = figures(context, "killed", "loss")
    assert EVERY <= reached <= max(before) < STEPS

    assert context.store.jobs.lose_attempt(left.id, 1, driver.reason(raised.value))
    made = train(context, request, attempt=2)
    after = figures(context, "killed", "loss")
    assert list(after) == list(range(1, STEPS + 1))
    # Those of the steps behind the checkpoint, which are done again, are what they were.
    assert {step: after[step] for step in before} == pytest.approx(before, abs=1e-4)

    measured = figures(context, "killed", "validation_loss")
    assert list(measured) == list(range(EVERY, STEPS + 1, EVERY))
    last, best = made.result["checkpoints"]
    assert last["iters"] == STEPS
    assert best["iters"] == min(measured, key=lambda step: measured[step])
    assert best["validation_loss"] == pytest.approx(min(measured.values()))
    for checkpoint in (last, best):
        weights = load_file(files_of(checkpoint["path"]) / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    # The two that did best and the last one, and perhaps what was being written as the worker was killed.
    assert len([kept for kept in (folder / "train").glob("checkpoint_*") if kept.is_dir()]) <= 4


def test_a_training_whose_loss_is_no_number_any_more_fails_and_its_last_good_checkpoint_is_kept(
    context: Context, accept: Accept
) -> None:
    request = accept("diverging", "poisoned", shuffle=False, checkpoint_iters=1)
    with pytest.raises(
        Diverged, match="the loss is nan at step 4: lower the learning rate; the checkpoint of step 3 is"
    ):
        train(context, request)
    (kept,) = job_of(context, "diverging").checkpoints or []
    assert kept["iters"] == 3
    weights = load_file(files_of(kept["path"]) / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(torch.count_nonzero(weight) for name, weight in weights.items() if "lora_B" in name)


def test_an_adapter_that_cannot_be_served_is_merged_into_a_whole_model(context: Context, accept: Accept) -> None:
    from transformers import AutoModelForCausalLM

    made = train(context, accept("merged", algorithm="dora", n_epochs=1))
    merged, base = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (files_of(made.result["checkpoints"][0]["path"]), context.config.models[0].folder)
    )
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed == {name for name in base if "q_proj" in name or ".mlp." in name}
    assert made.model is not None
    assert made.model.id == "tiny-merged"

"""Searches as the drivers of jobs run them, on a Ray of their own, with a tiny model: what they try, keep and publish,
and how they go on after a loss."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train import WorkerGroupError
from safetensors.torch import load_file

from stack import post_training
from stack.api.post_training import PostTrainingSFTRequest
from stack.context import Context
from tests import samples
from tests.driven_trainings import (
    context_on_ray,
    driver,
    files_of,
    folder_of,
    job_of,
    kill_workers,
    train,
)
from tests.tiny_training import save_model

TRIALS = "trials.json"
# What libraries warn of in the process of a driver, which is this one here.
pytestmark = pytest.mark.filterwarnings("ignore")
LR, LR_MIN = "optimizer_config.lr", "optimizer_config.lr_min"
ROWS, BATCH, STEPS = 24, 6, 20
# By this seed a rate that is learned by is drawn first.
GOOD_FIRST = 3
Accept = Callable[..., PostTrainingSFTRequest]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    home = tmp_path_factory.mktemp("home")
    save_model(home / "models" / "tiny")
    with context_on_ray(home, "tiny") as context:
        yield context


@pytest.fixture
def accept(context: Context) -> Accept:
    """Accepts a search over a training of 24 dialogs."""

    def accept(uuid: str, parameters: dict[str, list[Any]], **search: Any) -> PostTrainingSFTRequest:
        folder = context.config.data_folders[0]
        request = PostTrainingSFTRequest.model_validate(
            samples.fine_tuning(
                samples.dataset(samples.write_rows(folder / "train.jsonl", samples.dialogs(ROWS))),
                job_uuid=uuid,
                model="tiny",
                validation_dataset=samples.dataset(samples.write_rows(folder / "some.jsonl", samples.dialogs(4))),
                training_config={"n_epochs": STEPS * BATCH // ROWS, "n_iters": 0, "batch_size": BATCH, "shuffle": True},
                hyperparam_search_config={"parameters": parameters, **search},
            )
        )
        post_training.supervised_fine_tune(context, request)
        return PostTrainingSFTRequest.model_validate(job_of(context, uuid).request)

    return accept


def made_of(outcome: driver.Outcome) -> Path:
    return files_of(outcome.result["checkpoints"][0]["path"])


def trials_of(outcome: driver.Outcome) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((made_of(outcome) / TRIALS).read_text())
    return trials


def saved(context: Context, uuid: str) -> set[str]:
    """Of which trials there is something on disk."""
    work = folder_of(job_of(context, uuid))
    return {folder.name for place in (work, work / "temporary") for folder in place.glob("trial-*")}


def test_a_grid_publishes_the_best_trial_and_keeps_no_other(context: Context, accept: Accept) -> None:
    outcome = train(context, accept("grid", {LR: [1e-6, 0.05]}))
    trials = trials_of(outcome)
    assert [trial["values"] for trial in trials] == [{LR: 1e-6}, {LR: 0.05}]
    assert all(trial["finished"] and trial["error"] is None and trial["steps"] == STEPS for trial in trials)
    losses = [trial["validation_loss"] for trial in trials]
    assert losses[1] < losses[0]
    checkpoint = outcome.result["checkpoints"][0]
    assert (checkpoint["validation_loss"], checkpoint["iters"]) == (losses[1], STEPS)
    weights = load_file(made_of(outcome) / "adapter_model.safetensors")
    learned = max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name)
    assert learned > 1e-3, "by a rate of 1e-6 it goes less far in 20 steps"
    assert saved(context, "grid") == {"trial-1"}
    job = job_of(context, "grid")
    figures = context.store.telemetry.metrics("default", job.run_id)
    assert [(one.name, one.step, one.value) for one in figures] == [
        ("trial_validation_loss", number, loss) for number, loss in enumerate(losses, start=1)
    ]
    assert job.progress is not None
    assert (job.progress["done"], job.progress["total"], job.progress["unit"]) == (2, 2, "trials")


def test_asha_ends_a_bad_trial_early_and_publishes_one_that_was_finished(context: Context, accept: Accept) -> None:
    outcome = train(context, accept("asha", {LR: [0.05, 1e-6]}, algorithm="asha", trials=2, seed=GOOD_FIRST))
    first, second = trials_of(outcome)
    assert (first["values"], first["finished"], first["steps"]) == ({LR: 0.05}, True, STEPS)
    assert (second["finished"], second["error"]) == (False, None)
    assert STEPS * 0.1 <= second["steps"] <= STEPS * 0.4
    assert outcome.result["checkpoints"][0]["validation_loss"] == first["validation_loss"]


def test_a_search_whose_worker_was_killed_runs_only_that_trial_again(context: Context, accept: Accept) -> None:
    values = {LR: [0.05, 1e-6], LR_MIN: [0.0, 1e-3]}
    request = accept("killed", values, algorithm="random", trials=3, seed=GOOD_FIRST)
    work = folder_of(job_of(context, "killed"))
    killer = threading.Thread(
        target=kill_workers, args=(work.parents[2], lambda: any((work / "trial-0").glob("checkpoint_*")))
    )
    killer.start()
    with pytest.raises(WorkerGroupError) as raised:
        train(context, request)
    killer.join()
    assert driver.is_lost(raised.value), "another attempt is made of it"
    job = job_of(context, "killed")
    lost, finished, failed = json.loads((work / TRIALS).read_text())
    assert lost is None
    assert (finished["values"][LR], finished["finished"], finished["error"]) == (1e-6, True, None)
    assert (failed["finished"], failed["error"]) == (False, "lr_min is 0.001, above lr 1e-06")
    assert saved(context, "killed") == {"trial-0", "trial-1"}, "another attempt goes on from the first"
    assert job.progress is not None
    assert (job.progress["done"], job.progress["total"]) == (2, 3)
    assert context.store.jobs.lose_attempt(job.id, 1, driver.reason(raised.value))

    outcome = train(context, request, attempt=2)
    again, *unchanged = trials_of(outcome)
    assert unchanged == [finished, failed]
    assert (again["values"][LR], again["finished"], again["steps"]) == (0.05, True, STEPS)
    assert again["validation_loss"] < finished["validation_loss"]
    assert len(list((work / "search").glob("_trial_*"))) == 1, "no other was run again"
    assert outcome.result["checkpoints"][0]["validation_loss"] == again["validation_loss"]
    assert saved(context, "killed") == {"trial-0"}

"""Trainings as the drivers of jobs run them, on a Ray of their own, with a tiny model: how they are broken off, go on
and end."""

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.train import WorkerGroupError
from safetensors.torch import load_file

from stack import jobs as stack_jobs
from stack import post_training
from stack.api.post_training import PostTrainingSFTRequest
from stack.config import Config
from stack.context import Context
from stack.errors import Diverged
from stack.store import Job
from tests import samples
from tests.running_stack import command_of, processes_of, wait_for
from tests.tiny_training import save_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import driver, training
    from jobs.reporter import Reporter

# What libraries warn of in the process of a driver, which is this one here.
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, BATCH, STEPS, EVERY = 24, 6, 80, 16
POISON = "☃"
Accept = Callable[..., PostTrainingSFTRequest]
Train = Callable[..., driver.Outcome]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(save_model(home / "models" / "tiny"))
    save_model(home / "models" / "poisoned", poison=tokenizer(POISON)["input_ids"][-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACK_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        models = [{"id": name, "path": f"models/{name}", "context": 256} for name in ("tiny", "poisoned")]
        context = Context.open(Config.parse({"models": models}, "the tests' config"))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield context
        ray.shutdown()
        context.close()


@pytest.fixture
def accept(context: Context) -> Accept:
    """Accepts a training of 24 dialogs, of which one poisons the model that takes that for poison."""

    def accept(uuid: str, model: str = "tiny", **changes: Any) -> PostTrainingSFTRequest:
        folder = context.config.data_folders[0]
        train = dialogs(["a" * (1 + number % 7) for number in range(ROWS - 1)] + [POISON])
        validation = dialogs(["zz"] * 4)
        body = samples.fine_tuning(
            samples.dataset(samples.write_rows(folder / "train.jsonl", train)),
            job_uuid=uuid,
            model=model,
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


@pytest.fixture
def train(context: Context) -> Train:
    """Does what the driver of an attempt does from its beginning to its end."""

    def train(request: PostTrainingSFTRequest, attempt: int = 1) -> driver.Outcome:
        store, job = context.store, job_of(context, request.job_uuid)
        assert store.jobs.open_attempt(job.id, attempt, f"default.{job.uuid}.{attempt}")
        assert store.jobs.begin(job.id, attempt, {})
        folder = folder_of(job)
        folder.mkdir(parents=True, exist_ok=True)
        with Reporter(store, job, store.jobs.attempts(job.id)[-1], lost=pytest.fail) as reporter:
            try:
                return training.train(driver.Work(context, job, reporter, folder), request, "sft")
            finally:
                assert reporter.finish()

    return train


def job_of(context: Context, uuid: str) -> Job:
    job = context.store.jobs.get("default", uuid)
    assert job is not None
    return job


def folder_of(job: Job) -> Path:
    return stack_jobs.work_folder(job.tenant, job.uuid)


def figures(context: Context, uuid: str, name: str) -> dict[int, float]:
    """The values of a figure by step, of which there is one each."""
    found = context.store.telemetry.metrics("default", job_of(context, uuid).run_id, name)
    by_step = {metric.step: float(metric.value) for metric in found}  # type: ignore[arg-type]
    assert len(by_step) == len(found)
    return by_step


def made_of(path: str) -> Path:
    return Path(path.removeprefix("file://"))


def kill_workers(context: Context, uuid: str, home: Path) -> None:
    """Kills the workers of a training once it has kept a checkpoint, and at its next steps."""
    wait_for(lambda: job_of(context, uuid).checkpoints, 120)
    for process in processes_of(home):
        if "RayTrainWorker" in command_of(process):
            process.kill()


def test_a_training_goes_on_where_its_killed_worker_has_left_it_and_its_best_checkpoint_is_kept(
    context: Context, accept: Accept, train: Train
) -> None:
    request = accept("killed")
    folder = folder_of(job_of(context, "killed"))
    killer = threading.Thread(target=kill_workers, args=(context, "killed", folder.parents[2]))
    killer.start()
    with pytest.raises(WorkerGroupError) as raised:
        train(request)
    killer.join()
    assert driver.is_lost(raised.value)
    left = job_of(context, "killed")
    assert left.checkpoints
    assert all((Path(checkpoint["path"]) / "trainer_state.json").is_file() for checkpoint in left.checkpoints)
    reached = max(checkpoint["iters"] for checkpoint in left.checkpoints)
    before = figures(context, "killed", "loss")
    assert EVERY <= reached <= max(before) < STEPS

    assert context.store.jobs.lose_attempt(left.id, 1, driver.reason(raised.value))
    made = train(request, attempt=2)
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
        weights = load_file(made_of(checkpoint["path"]) / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    # The two that did best and the last one, and perhaps what was being written as the worker was killed.
    assert len([kept for kept in (folder / "train").glob("checkpoint_*") if kept.is_dir()]) <= 4


def test_a_training_whose_loss_is_no_number_any_more_fails_and_its_last_good_checkpoint_is_kept(
    context: Context, accept: Accept, train: Train
) -> None:
    request = accept("diverging", "poisoned", shuffle=False, checkpoint_iters=1)
    with pytest.raises(
        Diverged, match="the loss is nan at step 4: lower the learning rate; the checkpoint of step 3 is"
    ):
        train(request)
    (kept,) = job_of(context, "diverging").checkpoints or []
    assert kept["iters"] == 3
    weights = load_file(made_of(kept["path"]) / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(torch.count_nonzero(weight) for name, weight in weights.items() if "lora_B" in name)

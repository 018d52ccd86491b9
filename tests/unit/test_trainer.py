"""Runs of a training: what their workers are told, that one does not find what another has left, and what is served."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from stack.api.post_training import PostTrainingSFTRequest
from stack.config import LanguageModel, RewardModel
from tests import samples

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs.trainer import Plan, trainer_of
    from jobs.training import reward_entry
    from jobs.training_worker import Settings

REQUEST = PostTrainingSFTRequest.model_validate(samples.fine_tuning("train"))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    settings = Settings(
        config={}, tenant="default", attempt=1, kind="sft", request={}, model="models/small", adapter=None,
        train="train.arrow", examples=4, validation=None, temporary=str(tmp_path / "temporary"),
        tensorboard=str(tmp_path / "tensorboard"),
    )  # fmt: skip
    return Plan(settings, {"CPU": 1}, use_gpu=False, folder=tmp_path)


def told(plan: Plan, name: str, **options: Any) -> dict[str, Any]:
    config = trainer_of(plan, REQUEST, name, [], **options).train_loop_config
    assert config is not None
    return config


def test_each_run_saves_in_a_folder_of_its_own(plan: Plan) -> None:
    folders = {told(plan, name)["temporary"] for name in ("train", "trial-1", "trial-2")}
    assert len(folders) == 3
    assert all(Path(folder).is_relative_to(plan.settings.temporary) for folder in folders)


def test_workers_get_the_request_of_their_run_and_trials_know_that_they_are_some(plan: Plan) -> None:
    assert told(plan, "train")["request"] == REQUEST.model_dump(mode="json")
    assert [told(plan, "run", trial=trial)["trial"] for trial in (False, True)] == [False, True]


def test_on_cpu_threads_sleep_while_they_wait_and_with_gpus_nothing_is_changed(plan: Plan) -> None:
    environment = trainer_of(plan, REQUEST, "train", []).run_config.worker_runtime_env["env_vars"]
    assert environment["GOMP_SPINCOUNT"] == "1000"
    on_gpus = Plan(plan.settings, {"CPU": 1, "GPU": 1}, use_gpu=True, folder=plan.folder)
    environment = trainer_of(on_gpus, REQUEST, "train", []).run_config.worker_runtime_env["env_vars"]
    assert environment == {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


def test_a_reward_model_is_served_with_what_its_base_takes_and_runs_on() -> None:
    base = LanguageModel(id="base", path="models/base", context=512, prompt_format="hermes", gpus=2, tensor_parallel=2)
    model = RewardModel.model_validate(reward_entry(base) | {"id": "base-reward-1", "path": "/models/reward-1"})
    assert (model.max_tokens, model.prompt_format, model.gpus) == (512, "hermes", 1)
    assert reward_entry(LanguageModel(id="base", path="models/base"))["gpus"] == 0

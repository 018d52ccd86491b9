"""Post-training: what is accepted, what is refused and why, and what a job has made."""

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from stack import datasets, post_training, quotas
from stack.api.datasets import CreateDatasetRequest
from stack.api.post_training import (
    Parallelism,
    PostTrainingRLHFRequest,
    PostTrainingSFTRequest,
    RewardModelRequest,
    TrainingConfig,
    TrainingRequest,
)
from stack.api.wire import describe
from stack.config import EmbeddingModel, LanguageModel
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError, StorageFull
from stack.post_training import Start
from stack.store import Job
from tests import samples
from tests.samples import (
    PREFERENCES,
    dataset,
    dialogs,
    fine_tuning,
    lora,
    preference_optimization,
    preferences,
    reward_training,
    write_rows,
)

TRAINING = {"n_epochs": 1, "n_iters": 0, "batch_size": 8, "shuffle": True}
OPTIMIZER = {"optimizer_type": "adamw", "lr": 0.001, "lr_min": 0.0, "weight_decay": 0.1}
FULL = {"algorithm": "full", "algorithm_config": None}
DPO = {"reward_scale": 1.0, "reward_clip": 0.0, "epsilon": 0.0, "gamma": 0.0, "beta": 0.1}
MODULES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
# Changes of a request that make it wrong, the field that is at fault then, and what is said of it.
Refused = list[tuple[dict[str, Any], str, list[str]]]
Submit = Callable[..., Job]


@pytest.fixture
def data(context: Context, home: Path) -> dict[str, Any]:
    return dataset(write_rows(home / "data" / "train.jsonl", dialogs(4)))


@pytest.fixture
def pairs(context: Context, home: Path) -> dict[str, Any]:
    return dataset(write_rows(home / "data" / "pairs.jsonl", preferences(4)), **PREFERENCES)


def sft(data: Any, **changes: Any) -> PostTrainingSFTRequest:
    return PostTrainingSFTRequest.model_validate(fine_tuning(data, **changes))


def dpo(pairs: Any, **changes: Any) -> PostTrainingRLHFRequest:
    return PostTrainingRLHFRequest.model_validate(preference_optimization(pairs, **changes))


def reward_model(pairs: Any, **changes: Any) -> RewardModelRequest:
    return RewardModelRequest.model_validate(reward_training(pairs, **changes))


def tune(context: Context, data: Any, **changes: Any) -> Job:
    return post_training.supervised_fine_tune(context, sft(data, **changes))


def prefer(context: Context, pairs: Any, **changes: Any) -> Job:
    return post_training.preference_optimize(context, dpo(pairs, **changes))


def reward(context: Context, pairs: Any, **changes: Any) -> Job:
    return post_training.train_reward_model(context, reward_model(pairs, **changes))


def refusal(submit: Submit, context: Context, data: Any, **changes: Any) -> StackError:
    """Why a job is not accepted, of which nothing is left then."""
    before = context.store.jobs.waiting()
    with pytest.raises(StackError) as caught:
        submit(context, data, **changes)
    assert context.store.jobs.waiting() == before
    return caught.value


def require_refusals(submit: Submit, context: Context, data: Any, refused: Refused) -> None:
    for changes, param, words in refused:
        error = refusal(submit, context, data, **changes)
        assert isinstance(error, BadInput), changes
        assert error.param == param, changes
        for word in words:
            assert word in error.message, changes


def accept_all(submit: Submit, context: Context, data: Any, accepted: list[dict[str, Any]]) -> list[Job]:
    """The jobs of requests with these changes, which must all be accepted."""
    jobs = [submit(context, data, job_uuid=f"job-{n}", **changes) for n, changes in enumerate(accepted)]
    assert [job.status for job in jobs] == ["scheduled"] * len(accepted)
    return jobs


def training(**changes: Any) -> dict[str, Any]:
    return {"training_config": TRAINING | changes}


def with_model(context: Context, **entry: Any) -> Context:
    """The same with another model beside `small`."""
    model = LanguageModel.model_validate({"id": "other", "path": "models/small", "context": 256} | entry)
    return replace(context, config=context.config.model_copy(update={"models": [*context.config.models, model]}))


def start(context: Context, adapter: str | None = None) -> Start:
    return Start(context.models.get("small").base, adapter)


def problem(request: Callable[..., TrainingRequest], **changes: Any) -> str:
    """What the wire types say of a request with these changes."""
    with pytest.raises(ValidationError) as caught:
        request("train", **changes)
    return describe(caught.value)


# Requests that are right


def test_a_right_request_is_accepted_as_a_scheduled_job(context: Context, home: Path, data: dict[str, Any]) -> None:
    job = tune(context, data)
    assert (job.uuid, job.kind, job.status) == ("tune-1", "supervised_fine_tune", "scheduled")
    sha256 = hashlib.sha256((home / "data" / "train.jsonl").read_bytes()).hexdigest()
    assert PostTrainingSFTRequest.model_validate(job.request) == sft(data | {"sha256": sha256})


def test_requests_with_preferences_are_accepted_as_jobs_of_their_kinds(
    context: Context, home: Path, pairs: dict[str, Any]
) -> None:
    jobs = [prefer(context, pairs), reward(context, pairs)]
    assert [(job.uuid, job.kind) for job in jobs] == [
        ("prefer-1", "preference_optimize"),
        ("reward-1", "train_reward_model"),
    ]
    sha256 = hashlib.sha256((home / "data" / "pairs.jsonl").read_bytes()).hexdigest()
    assert PostTrainingRLHFRequest.model_validate(jobs[0].request) == dpo(pairs | {"sha256": sha256})
    assert RewardModelRequest.model_validate(jobs[1].request) == reward_model(pairs | {"sha256": sha256})


def test_data_sets_may_be_registered_ones(context: Context, data: dict[str, Any], pairs: dict[str, Any]) -> None:
    for uuid, one in (("train", data), ("pairs", pairs)):
        datasets.create(context, CreateDatasetRequest.model_validate({"uuid": uuid, "dataset": one}))
    tune(context, "train", validation_dataset="train")
    prefer(context, "pairs", validation_dataset="pairs")
    reward(context, "pairs", validation_dataset="pairs")


def test_a_job_needs_a_bundle_for_each_of_its_workers(
    context: Context, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    gpu = with_model(context, gpus=1)
    assert tune(context, data).bundles == [{"CPU": 1}]
    assert reward(context, pairs, **training(workers=2)).bundles == [{"CPU": 1}] * 2
    assert prefer(gpu, pairs, finetuned_model="other", **training(workers=4)).bundles == [{"CPU": 1, "GPU": 1}] * 4
    assert tune(gpu, data, job_uuid="tune-2", model="other").bundles == [{"CPU": 1, "GPU": 1}]
    resources = post_training.resources(gpu, dpo(pairs, finetuned_model="other", **training(workers=4)))
    assert resources == {"workers": 4, "per_worker": {"CPU": 1, "GPU": 1}}


def test_the_priority_of_a_request_is_the_jobs(context: Context, pairs: dict[str, Any]) -> None:
    assert [prefer(context, pairs, priority=3).priority, reward(context, pairs).priority] == [3, 0]


# The algorithm, and the adapter


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_full_lora_and_dora_are_trained_as_they_have_an_adapter_or_none(
    context: Context, data: dict[str, Any], pairs: dict[str, Any], kind: str
) -> None:
    submit, of = (tune, data) if kind == "sft" else (reward, pairs)
    jobs = accept_all(
        submit, context, of,
        [{"algorithm": "full", "algorithm_config": {}}, FULL, {}, {"algorithm": "dora"}],
    )  # fmt: skip
    assert [job.request["algorithm_config"] for job in jobs] == [None, None, lora(), lora()]
    body = fine_tuning(data) if kind == "sft" else reward_training(pairs)
    without = {key: value for key, value in body.items() if key != "algorithm_config"} | {"algorithm": "full"}
    assert post_training.lora_of(type(sft(data)).model_validate(without)) is None
    require_refusals(
        submit, context, of,
        [
            ({"algorithm": "full"}, "algorithm_config", ["full trains all weights", "send {}"]),
            ({"algorithm_config": {}}, "algorithm_config", ["lora needs an algorithm_config"]),
            ({"algorithm_config": None}, "algorithm_config", ["lora needs an algorithm_config"]),
            ({"algorithm": "dora", "algorithm_config": None}, "algorithm_config", ["dora needs an algorithm_config"]),
            ({"algorithm": "qlora"}, "algorithm", ["4-bit", "need a GPU", "on CPU", "allowed: lora"]),
        ],
    )  # fmt: skip


def test_qlora_on_a_gpu_needs_its_package(context: Context, data: dict[str, Any]) -> None:
    gpu = with_model(context, gpus=1)
    if importlib.util.find_spec("bitsandbytes") is not None:
        assert tune(gpu, data, model="other", algorithm="qlora").status == "scheduled"
        return
    error = refusal(tune, gpu, data, model="other", algorithm="qlora")
    assert (error.param, "bitsandbytes, which is not installed" in error.message) == ("algorithm", True)


def test_an_unknown_algorithm_or_optimizer_is_refused_with_the_known_ones() -> None:
    assert "'full', 'lora', 'qlora' or 'dora'" in problem(sft, algorithm="magic")
    assert "'dpo'" in problem(dpo, algorithm="ppo")
    assert "'adam', 'adamw' or 'sgd'" in problem(sft, optimizer_config=OPTIMIZER | {"optimizer_type": "lion"})


def test_an_adapter_may_be_of_any_linear_layers_of_the_model(context: Context, data: dict[str, Any]) -> None:
    choices: list[dict[str, Any]] = [
        {"lora_attn_modules": []},
        {"apply_lora_to_mlp": False},
        {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"lora_attn_modules": ["gate_proj"], "apply_lora_to_mlp": False},
        {"rank": 16},
        {"rank": 1, "alpha": 10_000},
    ]
    accept_all(tune, context, data, [{"algorithm_config": lora(**layers)} for layers in choices])


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_an_adapter_of_layers_that_the_model_has_not_is_refused_with_those_it_has(
    context: Context, data: dict[str, Any], pairs: dict[str, Any], kind: str
) -> None:
    submit = {"sft": tune, "dpo": prefer, "reward": reward}[kind]
    field = "lora_config" if kind == "dpo" else "algorithm_config"
    unknown = [["wq"], ["q_proj", "lm_head"], ["embed_tokens"], ["input_layernorm"], [""]]
    none = lora(lora_attn_modules=[], apply_lora_to_mlp=False)
    require_refusals(
        submit, context, data if kind == "sft" else pairs,
        [
            *(
                ({field: lora(lora_attn_modules=names)}, f"{field}.lora_attn_modules", [repr(names[-1]), MODULES])
                for names in unknown
            ),
            ({field: none}, field, ["no layer would get an adapter", "lora_attn_modules", "apply_lora_to_mlp"]),
        ],
    )  # fmt: skip


def test_the_linear_layers_of_a_model_are_read_from_all_of_its_files(context: Context, home: Path) -> None:
    base = context.models.get("small").base
    assert ", ".join(sorted(post_training.linear_modules(base))) == MODULES
    more = {
        "model.layers.2.mlp.wide.weight": np.zeros((2, 2), np.float32),
        "model.layers.2.mlp.wide.bias": np.zeros((2, 2), np.float32),
        "model.layers.2.norm.weight": np.zeros(2, np.float32),
        "model.rotary.weight": np.zeros((2, 2), np.float32),
    }
    save_file(more, home / "models" / "small" / "model-2.safetensors")
    assert post_training.linear_modules(base) == {*MODULES.split(", "), "wide"}


@pytest.mark.parametrize("rank", [0, -1, 1_025])
def test_a_rank_that_no_adapter_has_is_refused(rank: int) -> None:
    assert "algorithm_config.rank" in problem(sft, algorithm_config=lora(rank=rank))
    assert "algorithm_config.rank" in problem(reward_model, algorithm_config=lora(rank=rank))
    assert "lora_config.rank" in problem(dpo, lora_config=lora(rank=rank))


def test_a_rank_above_what_is_served_is_for_what_becomes_a_whole_model(
    context: Context, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    high = lora(rank=17)
    words = ["17", "small serves adapters up to rank 16"]
    require_refusals(tune, context, data, [({"algorithm_config": high}, "algorithm_config.rank", words)])
    require_refusals(prefer, context, pairs, [({"lora_config": high}, "lora_config.rank", words)])
    merged = training(merge=True)
    whole = [{"algorithm_config": high} | merged, {"algorithm": "dora", "algorithm_config": high}]
    accept_all(tune, context, data, whole)
    prefer(context, pairs, lora_config=high, **merged)
    reward(context, pairs, algorithm_config=high)


def test_an_adapter_of_the_output_layer_is_refused(
    context: Context, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    wrong = {"apply_lora_to_output": True}
    alone = wrong | {"lora_attn_modules": [], "apply_lora_to_mlp": False}
    words = ["apply_lora_to_output is true", "allowed: false", "TRL"]
    for accept, rows, name in (
        (tune, data, "algorithm_config"),
        (prefer, pairs, "lora_config"),
        (reward, pairs, "algorithm_config"),
    ):
        field = f"{name}.apply_lora_to_output"
        refused: Refused = [
            ({name: lora(**one)} | more, field, words) for one in (wrong, alone) for more in ({}, training(merge=True))
        ]
        require_refusals(accept, context, rows, refused)


def test_a_model_whose_mlp_has_other_names_gets_no_adapter_there(
    context: Context, home: Path, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    weights = {f"model.layers.0.{name}.weight": np.zeros((2, 2), np.float32) for name in ("q_proj", "fc1")}
    save_file(weights, home / "models" / "small" / "model.safetensors")
    words = ["'gate_proj'", "it has: fc1, q_proj"]
    require_refusals(tune, context, data, [({}, "algorithm_config.apply_lora_to_mlp", words)])
    require_refusals(prefer, context, pairs, [({}, "lora_config.apply_lora_to_mlp", words)])
    tune(context, data, algorithm_config=lora(lora_attn_modules=["fc1"], apply_lora_to_mlp=False))


# How it is trained


def test_a_step_is_shared_by_the_workers_without_a_rest(context: Context, data: dict[str, Any]) -> None:
    batch, micro = "training_config.batch_size", "training_config.micro_batch_size"
    require_refusals(
        tune, context, data,
        [
            (training(workers=3), batch, ["batch_size is 8", "3 workers"]),
            (training(batch_size=1, workers=2), batch, ["batch_size is 1", "2 workers"]),
            (training(micro_batch_size=3), micro, ["micro_batch_size is 3", "8"]),
            (training(micro_batch_size=16), micro, ["micro_batch_size is 16", "8"]),
            (training(workers=2, micro_batch_size=8), micro, ["micro_batch_size is 8", "4"]),
        ],
    )  # fmt: skip
    shared: list[dict[str, Any]] = [
        {"workers": 2},
        {"workers": 8},
        {"micro_batch_size": 2},
        {"workers": 2, "micro_batch_size": 4},
        {"batch_size": 6, "workers": 3, "micro_batch_size": 1},
    ]
    jobs = accept_all(tune, context, data, [training(**one) for one in shared])
    assert [len(job.bundles) for job in jobs] == [2, 8, 1, 2, 3]


def test_a_worker_takes_its_whole_share_on_gpus_and_a_few_examples_on_cpus() -> None:
    def size(on_cpu: bool, **changes: Any) -> int:
        return post_training.micro_batch_size(TrainingConfig.model_validate(TRAINING | changes), on_cpu=on_cpu)

    assert (size(False), size(False, workers=2)) == (8, 4)
    assert (size(True), size(True, batch_size=6), size(True, batch_size=7)) == (4, 3, 1)
    assert size(False, workers=2, micro_batch_size=1) == size(True, workers=2, micro_batch_size=1) == 1
    assert (size(True, packing=True), size(True, packing=True, micro_batch_size=2)) == (1, 2)
    assert size(False, packing=True) == 8, "a packed row is a batch by itself on a CPU"


def test_examples_are_no_longer_than_the_context(context: Context, data: dict[str, Any]) -> None:
    words = ["max_length is 257", "context, 256"]
    require_refusals(tune, context, data, [(training(max_length=257), "training_config.max_length", words)])
    accept_all(
        tune, context, data,
        [training(max_length=256), training(max_length=2, too_long="cut"), training(too_long="drop", packing=True)],
    )  # fmt: skip


def test_preferences_are_not_packed(context: Context, pairs: dict[str, Any]) -> None:
    refused: Refused = [(training(packing=True), "training_config.packing", ["supervised", "allowed: false"])]
    require_refusals(prefer, context, pairs, refused)
    require_refusals(reward, context, pairs, refused)


def test_the_fields_of_fsdp_mean_fsdp() -> None:
    def chosen(**changes: Any) -> Parallelism:
        return post_training.parallelism_of(TrainingConfig.model_validate(TRAINING | changes))

    assert chosen() == "ddp"
    assert chosen(memory_efficient_fsdp_wrap=True) == "fsdp"
    assert chosen(fsdp_cpu_offload=True) == "fsdp"
    for one in Parallelism:
        assert chosen(parallelism=one) == one


def test_the_fields_of_fsdp_with_another_parallelism_are_refused(context: Context, data: dict[str, Any]) -> None:
    fields = ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload")
    gpu = with_model(context, gpus=1)
    for field in fields:
        refused: Refused = [
            (training(**{field: True, "parallelism": one}), f"training_config.{field}", [field, f"fsdp, not {one}"])
            for one in ("ddp", "zero1", "zero2", "zero3")
        ]
        require_refusals(tune, context, data, refused)
    offload: Refused = [(training(fsdp_cpu_offload=True), "training_config.fsdp_cpu_offload", ["on CPU", "GPU"])]
    require_refusals(tune, context, data, offload)
    accept_all(
        tune, gpu, data,
        [
            *(training(parallelism=one, workers=2) for one in Parallelism),
            training(memory_efficient_fsdp_wrap=True),
            training(memory_efficient_fsdp_wrap=True, parallelism="fsdp"),
            {"model": "other"} | training(fsdp_cpu_offload=True),
            {"model": "other"} | training(fsdp_cpu_offload=True, memory_efficient_fsdp_wrap=True, parallelism="fsdp"),
            training(enable_activation_checkpointing=True),
        ],
    )  # fmt: skip


def test_the_learning_rate_does_not_fall_to_more_than_it_is(context: Context, data: dict[str, Any]) -> None:
    wrong = {"optimizer_config": OPTIMIZER | {"lr_min": 0.25}}
    require_refusals(tune, context, data, [(wrong, "optimizer_config.lr_min", ["lr_min is 0.25", "lr 0.001"])])
    optimizers: list[dict[str, Any]] = [{"lr_min": 0.001}, {"optimizer_type": "sgd"}, {"optimizer_type": "adam"}]
    accept_all(tune, context, data, [{"optimizer_config": OPTIMIZER | one} for one in optimizers])


def test_every_number_of_a_request_has_its_bounds() -> None:
    for section, fields in {
        "training_config": {
            "n_epochs": (0, 1_001), "n_iters": (-1, 10**8 + 1), "batch_size": (0, 65_537), "seed": (-1, 2**32),
            "max_length": (1, 10**7 + 1), "micro_batch_size": (0, 65_537), "workers": (0, 1_025),
            "checkpoint_iters": (-1, 10**8 + 1), "keep_checkpoints": (0, 101),
        },
        "optimizer_config": {"lr": (0, 1.5), "lr_min": (-0.1, 1.5), "weight_decay": (-0.1, 1.5)},
        "algorithm_config": {
            "reward_scale": (0, 1_001), "epsilon": (-0.1, 0.5), "gamma": (-0.1, 101), "beta": (0, 1_001),
        },
    }.items():  # fmt: skip
        request, right = (dpo, DPO) if section == "algorithm_config" else (sft, {**TRAINING})
        right = OPTIMIZER if section == "optimizer_config" else right
        for field, values in fields.items():
            for value in (*values, "x", float("nan")):
                assert f"{section}.{field}" in problem(request, **{section: right | {field: value}})


# Preference optimization


def test_all_settings_of_the_loss_are_taken_but_a_bound_of_rewards(context: Context, pairs: dict[str, Any]) -> None:
    settings: list[dict[str, Any]] = [
        {"beta": 0.5}, {"reward_scale": 2.0}, {"epsilon": 0.1}, {"gamma": 0.2}, {"reward_clip": 0},
    ]  # fmt: skip
    jobs = accept_all(prefer, context, pairs, [{"algorithm_config": DPO | one} for one in settings])
    assert [job.request["algorithm_config"] for job in jobs] == [DPO | one for one in settings]
    assert prefer(context, pairs, algorithm_config={}).request["algorithm_config"] == DPO
    for clip in (0.1, -1, 5):
        assert "algorithm_config.reward_clip" in problem(dpo, algorithm_config=DPO | {"reward_clip": clip})


def test_without_a_new_adapter_all_weights_are_trained(context: Context, pairs: dict[str, Any]) -> None:
    jobs = accept_all(prefer, context, pairs, [{"lora_config": None}, {"lora_config": {}}, {}])
    assert [job.request["lora_config"] for job in jobs] == [None, None, lora()]


def add_adapter(context: Context, home: Path, uuid: str = "tune-0") -> str:
    """The artifact of an adapter of `small` that a job has made."""
    artifact = f"adapters/{uuid}"
    (home / "adapter").mkdir(exist_ok=True)
    (home / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    context.artifacts.publish(artifact, home / "adapter")
    samples.add_adapter(context.store, f"small:{uuid}", "small", uuid)
    return artifact


def test_the_model_to_optimize_is_a_served_one_a_job_or_an_address(
    context: Context, home: Path, pairs: dict[str, Any]
) -> None:
    artifact = add_adapter(context, home)
    samples.add_trained(context.store, "small-whole-1")
    started = {
        named: post_training.start_of(context, dpo(pairs, finetuned_model=named))
        for named in ("small", "small:tune-0", "tune-0", context.artifacts.url(artifact), "small-whole-1")
    }
    adapters = [one.adapter for one in started.values()]
    assert adapters == [None, artifact, artifact, artifact, None]
    assert [one.base.id for one in started.values()] == ["small", "small", "small", "small", "small-whole-1"]
    accept_all(prefer, context, pairs, [{"finetuned_model": one, "lora_config": None} for one in started])


def test_a_job_that_made_a_whole_model_and_its_address_stand_for_it(context: Context, pairs: dict[str, Any]) -> None:
    samples.add_job(context.store, "whole-2", "supervised_fine_tune")
    job = samples.start(context.store, "whole-2")
    best = {"path": "file:///models/whole-2/best", "iters": 1, "files": []}
    last = {"model": "small-whole-2", "path": "file:///models/whole-2", "iters": 2, "files": []}
    made = samples.trained("small-whole-2")
    assert context.store.jobs.complete(job.id, 1, {"checkpoints": [best, last]}, model=made)
    for named in ("whole-2", "file:///models/whole-2"):
        found = post_training.start_of(context, dpo(pairs, finetuned_model=named))
        assert (found.base.id, found.adapter) == ("small-whole-2", None)
        other = context.of_tenant("other")
        assert isinstance(refusal(prefer, other, pairs, finetuned_model=named), NotFound)
    error = refusal(prefer, context, pairs, finetuned_model="file:///models/whole-2/best")
    assert (type(error), error.param) == (BadInput, "finetuned_model")
    assert "allowed: the last checkpoint, file:///models/whole-2" in error.message
    with_job = with_model(context, id="whole-2")
    assert post_training.start_of(with_job, dpo(pairs, finetuned_model="whole-2")).base.id == "whole-2"


def test_the_best_checkpoint_of_an_adapter_is_trained_on_by_its_address(
    context: Context, home: Path, pairs: dict[str, Any]
) -> None:
    address = context.artifacts.url(add_adapter(context, home))
    assert isinstance(refusal(prefer, context, pairs, finetuned_model=f"{address}/best"), NotFound)
    (home / "adapter" / "best").mkdir()
    (home / "adapter" / "best" / "adapter_model.safetensors").write_bytes(b"y" * 100)
    with_best = context.artifacts.url(add_adapter(context, home, "tune-9"))
    start = post_training.start_of(context, dpo(pairs, finetuned_model=f"{with_best}/best"))
    assert (start.base.id, start.adapter, start.within) == ("small", "adapters/tune-9", "best")
    assert post_training.start_of(context, dpo(pairs, finetuned_model=with_best)).within == ""


def test_an_adapter_that_a_failed_training_has_left_is_trained_on_by_its_address(
    context: Context, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    addresses = {}
    for uuid, changes in {"bad": {}, "bad-whole": {"algorithm": "full", "algorithm_config": None}}.items():
        tune(context, data, job_uuid=uuid, **changes)
        addresses[uuid] = f"file:///kept/{uuid}"
        job = samples.start(context.store, uuid)
        kept = [{"path": path, "iters": 2, "files": []} for path in (f"/work/{uuid}/checkpoint_1", addresses[uuid])]
        assert context.store.jobs.record(job.id, 1, checkpoints=kept)
        assert isinstance(refusal(prefer, context, pairs, finetuned_model=addresses[uuid]), NotFound)
        assert len(post_training.job_status(context, uuid).checkpoints) == 2
        assert context.store.jobs.fail(job.id, 1, "the loss is nan")
        # What was in the folder that it worked in is gone with that.
        assert [one.path for one in post_training.job_status(context, uuid).checkpoints] == [addresses[uuid]]
    start = post_training.start_of(context, dpo(pairs, finetuned_model=addresses["bad"]))
    assert (start.base.id, start.adapter) == ("small", post_training.artifact_name("default", "bad", whole=False))
    error = refusal(prefer, context, pairs, finetuned_model=addresses["bad-whole"])
    assert (type(error), error.param) == (BadInput, "finetuned_model")
    for tenant, named in ((context, "bad"), (context.of_tenant("other"), addresses["bad"])):
        assert isinstance(refusal(prefer, tenant, pairs, finetuned_model=named), NotFound)


def test_a_model_to_optimize_that_is_not_there_is_refused(context: Context, home: Path, pairs: dict[str, Any]) -> None:
    artifact = add_adapter(context, home)
    samples.add_job(context.store, "waits", "supervised_fine_tune")
    samples.add_job(context.store, "reward-0", "train_reward_model")
    samples.start(context.store, "reward-0")
    path = "file:///models/reward-0"
    checkpoints = [{"model": None, "path": path, "iters": 2, "files": []}, {"path": path, "iters": 1, "files": []}]
    samples.complete(context.store, "reward-0", {"checkpoints": checkpoints})
    for named in ("big", "waits", "reward-0", "small:tune-9", "file:///adapters/tune-9", artifact):
        error = refusal(prefer, context, pairs, finetuned_model=named, lora_config=None)
        assert isinstance(error, NotFound), named
        assert error.param == "finetuned_model", named
        assert repr(named) in error.message
    other = context.of_tenant("other")
    for named in ("tune-0", "small:tune-0", context.artifacts.url(artifact)):
        assert isinstance(refusal(prefer, other, pairs, finetuned_model=named, lora_config=None), NotFound), named


def test_a_model_to_optimize_is_named_by_a_text_that_can_be_kept(context: Context) -> None:
    for wrong in ("", "a" * 4_097, "a\0b"):
        assert "finetuned_model" in problem(dpo, finetuned_model=wrong)
    embedder = EmbeddingModel.model_validate({"id": "embedder", "path": "models/embedder"})
    config = context.config.model_copy(update={"embedding_models": [embedder]})
    error = refusal(prefer, replace(context, config=config), "pairs", finetuned_model="embedder")
    assert (type(error), error.param) == (BadInput, "finetuned_model")


def test_an_adapter_whose_base_is_gone_is_not_optimized(context: Context, pairs: dict[str, Any]) -> None:
    samples.add_adapter(context.store, "gone:tune-0", "gone", "tune-0")
    for named in ("gone:tune-0", "tune-0"):
        error = refusal(prefer, context, pairs, finetuned_model=named, lora_config=None)
        assert (type(error), error.param) == (NotFound, "finetuned_model")


def test_an_adapter_is_trained_on_and_gets_no_other_one(context: Context, home: Path, pairs: dict[str, Any]) -> None:
    add_adapter(context, home)
    for named in ("small:tune-0", "tune-0"):
        error = refusal(prefer, context, pairs, finetuned_model=named)
        assert (type(error), error.param) == (BadInput, "lora_config")
        assert "leave out lora_config" in error.message
    prefer(context, pairs, finetuned_model="tune-0", lora_config={})


def test_what_is_made_is_whole_unless_it_is_an_adapter_that_is_served(context: Context) -> None:
    whole, merged = start(context), training(merge=True)
    adapter = start(context, "adapters/tune-0")
    for request, of, expected in [
        (sft("a"), whole, False),
        (sft("a", **merged), whole, True),
        (sft("a", **FULL), whole, True),
        (sft("a", algorithm="dora"), whole, True),
        (sft("a", algorithm="qlora"), whole, False),
        (dpo("a"), whole, False),
        (dpo("a", **merged), whole, True),
        (dpo("a", lora_config=None), whole, True),
        (dpo("a", lora_config=None), adapter, False),
        (dpo("a", lora_config=None, **merged), adapter, True),
        (reward_model("a"), whole, True),
        (reward_model("a", **FULL), whole, True),
    ]:
        assert post_training.is_whole(request, of) is expected, request


def test_the_new_adapter_of_a_request_is_where_its_kind_has_it() -> None:
    for request in (sft("a"), dpo("a"), reward_model("a")):
        found = post_training.lora_of(request)
        assert found is not None
        assert found.model_dump() == lora()
    assert post_training.lora_of(dpo("a", lora_config={})) is None
    assert post_training.lora_of(reward_model("a", **FULL)) is None


# The model


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_an_unknown_model_is_refused_with_the_known_ones(
    context: Context, data: dict[str, Any], pairs: dict[str, Any], kind: str
) -> None:
    error = refusal(tune, context, data, model="big") if kind == "sft" else refusal(reward, context, pairs, model="big")
    assert isinstance(error, NotFound)
    assert (error.param, error.code) == ("model", "model_not_found")
    assert error.message == "there is no model 'big'; there are: small"


def test_an_adapter_cannot_be_tuned_but_its_base_is_named(
    context: Context, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    samples.add_adapter(context.store, "small:tune-0", "small", "tune-0")
    refused: Refused = [({"model": "small:tune-0"}, "model", ["name its base, 'small'"])]
    require_refusals(tune, context, data, refused)
    require_refusals(reward, context, pairs, refused)


def test_whole_models_and_adapters_are_served_under_their_own_ids() -> None:
    assert post_training.model_id("default", "small", "tune-1") == "small:tune-1"
    assert post_training.model_id("acme", "small", "tune-1") == "small:acme/tune-1"
    assert post_training.whole_model_id("default", "small", "tune-1") == "small-tune-1"
    assert post_training.whole_model_id("acme", "small", "tune-1") == "small-tune-1..acme"
    assert post_training.artifact_name("default", "tune-1", whole=False) == "adapters/tune-1"
    assert post_training.artifact_name("default", "tune-1", whole=True) == "models/tune-1"
    assert post_training.artifact_name("acme", "tune-1", whole=True) == "tenants/acme/models/tune-1"
    for tenant in ("default", "acme"):
        model = post_training.model_id(tenant, "small", "tune-1")
        found = post_training.adapter_of_model("small", model)
        assert found == post_training.artifact_name(tenant, "tune-1", whole=False)


def test_a_whole_model_has_an_id_that_can_be_served_and_that_is_free(
    context: Context, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    long = with_model(context, id="m" * 150)
    for changes in (FULL, training(merge=True), {"algorithm": "dora"}):
        error = refusal(tune, long, data, model="m" * 150, job_uuid="j" * 50, **changes)
        assert (type(error), error.param) == (BadInput, "job_uuid")
        assert f"{'m' * 150}-{'j' * 50}" in error.message
        assert "at most 200 characters" in error.message
    tune(long, data, model="m" * 150, job_uuid="j" * 49, **FULL)
    tune(long, data, model="m" * 150, job_uuid="k" * 50)  # an adapter is served by its base

    taken = with_model(context, id="small-taken")
    error = refusal(tune, taken, data, job_uuid="taken", **FULL)
    assert (type(error), error.param) == (Conflict, "job_uuid")
    assert "there is a model 'small-taken' already; choose another job_uuid" in error.message
    assert isinstance(refusal(prefer, taken, pairs, job_uuid="taken", lora_config=None), Conflict)
    samples.add_trained(context.store, "small-acme-1", "acme")
    assert isinstance(refusal(tune, context, data, job_uuid="acme-1", **FULL), Conflict), "applications share names"
    assert isinstance(refusal(reward, taken, pairs, job_uuid="taken"), Conflict), "it is served by itself too"
    tune(taken, data, job_uuid="taken")


def test_a_uuid_whose_result_is_there_already_is_a_conflict(
    context: Context, home: Path, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    context.artifacts.publish("adapters/old", home / "data")
    context.artifacts.publish("models/older", home / "data")
    for submit, of, changes in [
        (tune, data, {"job_uuid": "old"}),
        (prefer, pairs, {"job_uuid": "old"}),
        (tune, data, {"job_uuid": "older"} | FULL),
        (reward, pairs, {"job_uuid": "older"}),
    ]:
        error = refusal(submit, context, of, **changes)
        assert (type(error), error.param) == (Conflict, "job_uuid")
        assert "choose another job_uuid" in error.message


# A search, and loggers


def search(parameters: dict[str, list[Any]], **changes: Any) -> dict[str, Any]:
    return {"hyperparam_search_config": {"parameters": parameters} | changes}


def validated(submit: Submit) -> Submit:
    """Submits with a validation data set, as a search needs it."""
    return lambda context, data, **changes: submit(context, data, **{"validation_dataset": data} | changes)


def test_an_empty_search_is_none(context: Context, data: dict[str, Any], pairs: dict[str, Any]) -> None:
    none: list[dict[str, Any]] = [{"hyperparam_search_config": {}}, {"hyperparam_search_config": None}, {}]
    jobs = accept_all(tune, context, data, none)
    assert [job.request["hyperparam_search_config"] for job in jobs] == [None] * 3
    assert prefer(context, pairs, hyperparam_search_config={}).request["hyperparam_search_config"] is None


def test_a_search_varies_numbers_and_choices(context: Context, data: dict[str, Any], pairs: dict[str, Any]) -> None:
    accept_all(
        validated(tune), context, data,
        [
            search({"optimizer_config.lr": [0.01, 0.001], "algorithm_config.rank": [4, 8]}),
            search({"training_config.batch_size": [4, 8]}, algorithm="random", trials=2, seed=1),
            search({"optimizer_config.optimizer_type": ["adam", "sgd"]}, algorithm="asha"),
            search({"training_config.shuffle": [True, False]}),
            search({"optimizer_config.lr": [n / 1_000 for n in range(1, 101)], "training_config.seed": [*range(10)]}),
        ],
    )  # fmt: skip
    validated(prefer)(context, pairs, **search({"optimizer_config.lr": [0.1, 0.5], "lora_config.rank": [4, 16]}))
    validated(reward)(context, pairs, **FULL, **search({"optimizer_config.weight_decay": [0.0, 0.1]}))


def test_a_search_does_not_vary_the_loss_by_which_it_compares(context: Context, pairs: dict[str, Any]) -> None:
    field, words = "hyperparam_search_config.parameters", ["cannot be searched over", "trials are compared by the loss"]
    for name in ("beta", "reward_scale", "epsilon", "gamma"):
        changes = search({f"algorithm_config.{name}": [0.1, 0.2]})
        require_refusals(validated(prefer), context, pairs, [(changes, field, [name, *words, "lora_config.rank"])])


def test_a_search_needs_a_validation_and_no_reports(context: Context, data: dict[str, Any]) -> None:
    rates = search({"optimizer_config.lr": [0.1, 0.2]})
    require_refusals(tune, context, data, [(rates, "validation_dataset", ["needs a validation_dataset"])])
    reported = rates | {"logger_config": {"report_to": ["tensorboard"]}}
    require_refusals(
        validated(tune), context, data, [(reported, "logger_config.report_to", ["leave out report_to"])]
    )  # fmt: skip


def test_a_search_that_cannot_be_made_is_refused(context: Context, data: dict[str, Any], pairs: dict[str, Any]) -> None:
    field = "hyperparam_search_config.parameters"
    not_searchable = (
        "max_length", "too_long", "packing", "merge", "workers", "parallelism", "checkpoint_iters", "keep_checkpoints",
        "memory_efficient_fsdp_wrap", "fsdp_cpu_offload",
    )  # fmt: skip
    unknown = (
        "lr",
        "optimizer_config",
        "optimizer_config.rate",
        "lora_config.rank",
        "model",
        "training_config.",
        "a.b",
    )
    forbidden = [f"training_config.{name}" for name in not_searchable]
    known = ["optimizer_config.lr", "training_config.batch_size", "algorithm_config.rank"]
    too_many = {"optimizer_config.lr": [n / 1_000 for n in range(1, 92)], "training_config.seed": [*range(11)]}
    require_refusals(
        validated(tune), context, data,
        [
            *((search({name: [1]}), field, [repr(name), "cannot be searched over", *known])
              for name in (*unknown, *forbidden)),
            (FULL | search({"algorithm_config.rank": [4]}), field, ["'algorithm_config.rank'"]),
            (search({"algorithm_config.rank": [8, 0]}), field, ["algorithm_config.rank", "0"]),
            (search({"optimizer_config.lr": [0.1, "high"]}), field, ["optimizer_config.lr", "high"]),
            (search({"optimizer_config.optimizer_type": ["lion"]}), field, ["'adam', 'adamw' or 'sgd'"]),
            (search({"algorithm_config.rank": [8, 17]}), "algorithm_config.rank", ["17", "up to rank 16"]),
            (search({"training_config.batch_size": [8, 7]}) | training(workers=2),
             "training_config.batch_size", ["batch_size is 7"]),
            (search({"optimizer_config.lr_min": [0.0, 0.1]}), "optimizer_config.lr_min", ["lr_min is 0.1"]),
            (search(too_many), "hyperparam_search_config", ["1001 trials", "allowed: 1000"]),
            (search({"optimizer_config.lr": [0.1]}, trials=3), "hyperparam_search_config.trials", ["draws nothing"]),
            (search({"optimizer_config.lr": [0.1]}, seed=3), "hyperparam_search_config.seed", ["draws nothing"]),
            (search({"optimizer_config.lr": [0.1, 0.2, 0.1]}), field, ["optimizer_config.lr", "0.1 twice"]),
            *((search({"optimizer_config.lr": [0.1, 0.2], "training_config.seed": [1, 2]}, algorithm=name, trials=5),
               "hyperparam_search_config.trials", ["trials is 5", "4 combinations", "at most 4"])
              for name in ("random", "asha")),
        ],
    )  # fmt: skip
    assert validated(tune)(context, data, **search(too_many, algorithm="random")).status == "scheduled"
    require_refusals(
        validated(prefer), context, pairs, [(search({"lora_config.rank": [17]}), "lora_config.rank", ["17"])]
    )
    for wrong in ({"parameters": {}}, {"parameters": {"optimizer_config.lr": []}}, {"algorithm": "grid"}):
        assert "hyperparam_search_config.parameters" in problem(sft, hyperparam_search_config=wrong)
    for key, value in {"trials": 0, "seed": -1, "algorithm": "best", "metric": "loss"}.items():
        assert key in problem(sft, **search({"optimizer_config.lr": [0.1]}, **{key: value}))


def test_the_request_of_a_trial_has_its_values_and_no_search(data: dict[str, Any]) -> None:
    request = sft(data, **search({"optimizer_config.lr": [0.1]}))
    trial = post_training.with_values(
        request, {"optimizer_config.lr": 0.1, "algorithm_config.rank": 4, "training_config.shuffle": False}
    )
    expected = sft(
        data,
        algorithm_config=lora(rank=4),
        optimizer_config=OPTIMIZER | {"lr": 0.1},
        training_config=TRAINING | {"shuffle": False},
    )
    assert trial == expected
    assert request.optimizer_config.lr == 0.001


def test_figures_are_reported_to_tools_that_are_installed(context: Context, data: dict[str, Any]) -> None:
    tools = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
    for tool, package in tools.items():
        loggers = {"report_to": [tool], "project": "p", "run_name": "r"}
        if importlib.util.find_spec(package) is not None:
            job = tune(context, data, job_uuid=tool, logger_config=loggers)
            assert job.request["logger_config"] == loggers
            continue
        error = refusal(tune, context, data, logger_config=loggers)
        assert (type(error), error.param) == (BadInput, "logger_config")
        assert f"'{tool}' needs the package {package}, which is not installed" in error.message
    assert importlib.util.find_spec("tensorboardX") is not None
    tune(context, data, logger_config={})
    for field in ("project", "run_name"):
        error = refusal(tune, context, data, job_uuid="named", logger_config={field: "p"})
        assert (type(error), error.param) == (BadInput, f"logger_config.{field}")
        assert "report_to" in error.message
    assert "'tensorboard', 'mlflow' or 'wandb'" in problem(sft, logger_config={"report_to": ["comet"]})
    assert "logger_config" in problem(sft, logger_config={"report_to": ["wandb"] * 4})


# The data


@pytest.fixture
def wrong_data(home: Path) -> dict[str, Any]:
    """Data sets that nothing can be trained on, by what is wrong with them."""
    malformed = home / "data" / "malformed.jsonl"
    malformed.write_text("{\n")
    (home / "data" / "empty.jsonl").write_text("")
    return {
        "'none'": "none",
        "there is no file": dataset(home / "data" / "none.jsonl", **PREFERENCES, text="text"),
        "has no rows": dataset(home / "data" / "empty.jsonl", **PREFERENCES, text="text"),
        "row 1 is not JSON": dataset(malformed, **PREFERENCES, text="text"),
    }


def wrong_for(kind: str, home: Path) -> dict[str, Any]:
    """Data sets of which one kind of training learns nothing, by what is said of them."""
    folder = home / "data"
    question = dataset(write_rows(folder / "question.jsonl", [{"question": "a"}]), question="text")
    unanswered = [*dialogs(1), {"dialog": samples.DIALOG[:2]}]
    same = [*preferences(1), {"prompt": "a", "chosen": "b", "rejected": "b"}]
    if kind == "sft":
        return {
            "needs one column of type dialog, or two of type text, prompt and completion": question,
            "this data set has: question (text)": question,
            "row 2: the dialog in 'dialog' has no answer": dataset(write_rows(folder / "asks.jsonl", unanswered)),
            "row 1: the text is empty": dataset(write_rows(folder / "texts.jsonl", [{"text": ""}]), text="text"),
        }
    return {
        "in the columns prompt, chosen and rejected, each of type text or dialog": question,
        "this data set has: dialog (dialog)": dataset(write_rows(folder / "dialogs.jsonl", dialogs(2))),
        "row 2: the chosen and the rejected answer are the same": dataset(
            write_rows(folder / "same.jsonl", same), **PREFERENCES
        ),
    }


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_a_wrong_data_set_is_refused_with_its_field_and_what_is_wrong(
    context: Context, home: Path, data: Any, pairs: Any, wrong_data: dict[str, Any], kind: str, field: str
) -> None:
    submit = {"sft": tune, "dpo": prefer, "reward": reward}[kind]
    right = data if kind == "sft" else pairs
    for words, wrong in (wrong_data | wrong_for(kind, home)).items():
        error = (
            refusal(submit, context, wrong)
            if field == "dataset"
            else refusal(submit, context, right, validation_dataset=wrong)
        )
        assert words in error.message
        assert (error.param or "").split(".")[0] == field


def test_a_registered_data_set_of_the_wrong_shape_is_refused_too(
    context: Context, home: Path, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    for uuid, one in (("train", data), ("pairs", pairs)):
        datasets.create(context, CreateDatasetRequest.model_validate({"uuid": uuid, "dataset": one}))
    same = write_rows(home / "data" / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    created = {"uuid": "same", "dataset": dataset(same, **PREFERENCES)}
    datasets.create(context, CreateDatasetRequest.model_validate(created))
    for submit, uuid, words in [
        (tune, "pairs", "supervised fine-tuning needs one column of type dialog"),
        (prefer, "train", "prompt, chosen and rejected"),
        (reward, "train", "prompt, chosen and rejected"),
        (prefer, "same", "row 1: the chosen and the rejected answer are the same"),
    ]:
        error = refusal(submit, context, uuid)
        assert (type(error), (error.param or "").split(".")[0]) == (BadInput, "dataset")
        assert words in error.message


# Once, and with room


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_the_same_request_again_is_the_same_job_even_when_its_data_is_gone(
    context: Context, home: Path, data: dict[str, Any], pairs: dict[str, Any], kind: str
) -> None:
    submit = {"sft": tune, "dpo": prefer, "reward": reward}[kind]
    of, file = (data, "train.jsonl") if kind == "sft" else (pairs, "pairs.jsonl")
    first = submit(context, of)
    (home / "data" / file).unlink()
    assert submit(context, of) == first


def test_the_same_request_again_is_the_same_job_even_when_its_model_is_gone(
    context: Context, data: dict[str, Any]
) -> None:
    first = tune(context, data)
    other = context.config.models[0].model_copy(update={"id": "other"})
    without = replace(context, config=context.config.model_copy(update={"models": [other]}))
    assert tune(without, data) == first


def test_the_same_request_again_is_the_same_job_when_its_result_is_there(
    context: Context, home: Path, data: dict[str, Any]
) -> None:
    tune(context, data, **FULL)
    job = samples.start(context.store, "tune-1")
    context.artifacts.publish("models/tune-1", home / "data")
    made = samples.trained("small-tune-1")
    assert context.store.jobs.complete(job.id, 1, {"checkpoints": []}, model=made)
    assert tune(context, data, **FULL).status == "completed"


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_job_is_of_the_content_that_it_was_accepted_with(
    context: Context, home: Path, data: dict[str, Any], field: str
) -> None:
    other = dataset(write_rows(home / "data" / "other.jsonl", dialogs(3)))
    wanted = sft(data, **{field: other})
    job = post_training.supervised_fine_tune(context, wanted)
    write_rows(home / "data" / "other.jsonl", dialogs(5))
    accepted = PostTrainingSFTRequest.model_validate(job.request)
    with pytest.raises(Conflict, match="has changed"):
        datasets.resolve(context, getattr(accepted, field))
    assert post_training.supervised_fine_tune(context, wanted) == job


def test_another_request_with_the_same_uuid_is_a_conflict(
    context: Context, data: dict[str, Any], pairs: dict[str, Any]
) -> None:
    tune(context, data)
    prefer(context, pairs)
    for submit, of, changes in [
        (tune, data, {"algorithm_config": lora(rank=4)}),
        (tune, data, training(seed=1)),
        (prefer, pairs, {"algorithm_config": DPO | {"beta": 0.2}}),
        (prefer, pairs, {"job_uuid": "tune-1"}),
        (reward, pairs, {"job_uuid": "prefer-1"}),
    ]:
        error = refusal(submit, context, of, **changes)
        assert (type(error), error.param) == (Conflict, "job_uuid")


def test_a_training_without_room_is_refused_when_it_is_accepted_and_when_it_starts(
    context: Context, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free in (10_000, 2**40):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free == 2**40:
            assert post_training.resources(context, sft(data)) == {"workers": 1, "per_worker": {"CPU": 1}}
            assert tune(context, data).status == "scheduled"
            continue
        with pytest.raises(StorageFull, match="has 10000 bytes left"):
            post_training.resources(context, sft(data))
        assert isinstance(refusal(tune, context, data), StorageFull)


def test_room_is_needed_for_all_that_is_trained_and_kept(
    context: Context, home: Path, data: dict[str, Any], pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"model.layers.0.mlp.wide.weight": np.zeros((1_000, 1_000), np.float32)}
    save_file(large, home / "models" / "small" / "model-2.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
    many = training(keep_checkpoints=100)
    for submit, of, changes in [
        (tune, data, FULL),
        (tune, data, training(merge=True)),
        (tune, data, {"algorithm": "dora"}),
        (tune, data, many),
        (prefer, pairs, {"lora_config": None}),
        (reward, pairs, {}),
    ]:
        assert isinstance(refusal(submit, context, of, **changes), StorageFull), changes
    tune(context, data)
    prefer(context, pairs)
    adapter = add_adapter(context, home)
    prefer(context, pairs, job_uuid="on", finetuned_model=context.artifacts.url(adapter), lora_config=None)


def test_a_search_needs_room_for_two_of_its_largest_trial(
    context: Context, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        quotas, "require_room_for_job", lambda _, kept, temporary, work: asked.append((kept, temporary))
    )  # fmt: skip
    largest = lora(rank=16, apply_lora_to_mlp=True)
    post_training.resources(context, sft(data, validation_dataset=data, algorithm_config=largest))
    ranks = {"algorithm_config.rank": [4, 16, 8], "algorithm_config.apply_lora_to_mlp": [True, False]}
    post_training.resources(context, sft(data, validation_dataset=data, **search(ranks)))
    (kept, alone), (kept_of_search, searching) = asked
    assert kept_of_search == kept
    weights_and_moments = 3 * kept // 2  # of what is kept there are two
    assert searching == alone + (post_training.CHECKPOINTS + 1) * weights_and_moments


def test_jobs_are_listed(context: Context, data: dict[str, Any]) -> None:
    assert post_training.list_jobs(context, None, None, None, 100) == []
    for uuid in ("tune-1", "tune-2"):
        tune(context, data, job_uuid=uuid)
    assert {job.job_uuid for job in post_training.list_jobs(context, None, None, None, 100)} == {"tune-1", "tune-2"}


def test_the_status_and_artifacts_of_a_job_that_has_made_nothing_yet(context: Context, data: dict[str, Any]) -> None:
    tune(context, data)
    status = post_training.job_status(context, "tune-1")
    assert (status.status, status.checkpoints, status.resources_allocated) == ("scheduled", [], None)
    artifacts = post_training.job_artifacts(context, "tune-1")
    assert (artifacts.job_uuid, artifacts.checkpoints, artifacts.metrics) == ("tune-1", [], [])


def test_a_completed_job_tells_its_checkpoints_resources_and_metrics(context: Context, data: dict[str, Any]) -> None:
    tune(context, data)
    samples.start(context.store, "tune-1")
    progress = {"done": 2, "total": 2, "unit": "steps", "seconds_left": 0.0}
    samples.report(context.store, "tune-1", progress, [("loss", 1, 2.0), ("loss", 2, 1.0)])
    file = {"name": "adapter_model.safetensors", "bytes": 9, "sha256": "0" * 64}
    checkpoint = {"model": "small:tune-1", "path": "file:///adapters/tune-1", "iters": 2, "files": [file]}
    samples.complete(context.store, "tune-1", {"checkpoints": [checkpoint]})
    status = post_training.job_status(context, "tune-1")
    assert status.metrics == {"loss": 1.0}
    assert status.resources_allocated == {"workers": 1}
    assert [one.model_dump(exclude_none=True) for one in status.checkpoints] == [checkpoint]
    artifacts = post_training.job_artifacts(context, "tune-1")
    assert artifacts.checkpoints == status.checkpoints
    assert [(point.name, point.step, point.value) for point in artifacts.metrics] == [
        ("loss", 1, 2.0),
        ("loss", 2, 1.0),
    ]


def test_jobs_of_other_kinds_are_not_found(context: Context) -> None:
    samples.add_job(context.store, "evaluation-1", "evaluate")
    for look in (post_training.job_status, post_training.job_artifacts):
        with pytest.raises(NotFound, match="'evaluation-1'"):
            look(context, "evaluation-1")

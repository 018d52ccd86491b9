"""Fine-tuning: what is accepted, what is refused and why, and what a job has made."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stack import datasets, post_training
from stack.api.datasets import CreateDatasetRequest
from stack.api.post_training import PostTrainingSFTRequest
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError, StorageFull
from tests import samples
from tests.samples import dataset, dialogs, fine_tuning, write_rows

LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": False,
    "rank": 8,
    "alpha": 16,
}
TRAINING = {"n_epochs": 1, "n_iters": 0, "batch_size": 8, "shuffle": True}
OPTIMIZER = {"optimizer_type": "adamw", "lr": 0.001, "lr_min": 0.0, "weight_decay": 0.1}


@pytest.fixture
def data(context: Context, home: Path) -> dict[str, Any]:
    return dataset(write_rows(home / "data" / "train.jsonl", dialogs(4)))


def request(data: Any, **changes: Any) -> PostTrainingSFTRequest:
    return PostTrainingSFTRequest.model_validate(fine_tuning(data, **changes))


def refusal(context: Context, data: Any, **changes: Any) -> StackError:
    with pytest.raises(StackError) as caught:
        post_training.supervised_fine_tune(context, request(data, **changes))
    assert context.store.jobs.get("default", "tune-1") is None
    return caught.value


def test_a_right_request_is_accepted_as_a_scheduled_job(context: Context, home: Path, data: dict[str, Any]) -> None:
    job = post_training.supervised_fine_tune(context, request(data))
    assert (job.uuid, job.kind, job.status) == ("tune-1", "supervised_fine_tune", "scheduled")
    sha256 = hashlib.sha256((home / "data" / "train.jsonl").read_bytes()).hexdigest()
    assert PostTrainingSFTRequest.model_validate(job.request) == request(data | {"sha256": sha256})


def test_data_sets_may_be_registered_ones(context: Context, data: dict[str, Any]) -> None:
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "train", "dataset": data}))
    post_training.supervised_fine_tune(context, request("train", validation_dataset="train"))


def test_only_attention_or_only_mlp_layers_may_get_an_adapter(context: Context, data: dict[str, Any]) -> None:
    choices: list[dict[str, Any]] = [{"lora_attn_modules": []}, {"apply_lora_to_mlp": False}]
    for number, layers in enumerate(choices):
        accepted = request(data, job_uuid=f"tune-{number}", algorithm_config=LORA | layers)
        assert post_training.supervised_fine_tune(context, accepted).status == "scheduled"


def test_the_greatest_rank_that_is_served_is_accepted(context: Context, data: dict[str, Any]) -> None:
    post_training.supervised_fine_tune(context, request(data, algorithm_config=LORA | {"rank": 16}))


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"algorithm": "full"}, "algorithm", ["full", "allowed: lora"]),
        ({"algorithm": "qlora"}, "algorithm", ["qlora", "allowed: lora"]),
        ({"algorithm": "dora"}, "algorithm", ["dora", "allowed: lora"]),
        (
            {"algorithm_config": LORA | {"lora_attn_modules": [], "apply_lora_to_mlp": False}},
            "algorithm_config",
            ["no layer would get an adapter", "lora_attn_modules", "apply_lora_to_mlp"],
        ),
        (
            {"algorithm_config": LORA | {"apply_lora_to_output": True}},
            "algorithm_config.apply_lora_to_output",
            ["output layer", "allowed: false"],
        ),
        ({"algorithm_config": LORA | {"rank": 17}}, "algorithm_config.rank", ["17", "up to rank 16"]),
        (
            {"optimizer_config": OPTIMIZER | {"lr_min": 0.25}},
            "optimizer_config.lr_min",
            ["lr_min", "0.25", "0.001"],
        ),
        (
            {"training_config": TRAINING | {"memory_efficient_fsdp_wrap": True}},
            "training_config.memory_efficient_fsdp_wrap",
            ["memory_efficient_fsdp_wrap", "allowed: false"],
        ),
        (
            {"training_config": TRAINING | {"fsdp_cpu_offload": True}},
            "training_config.fsdp_cpu_offload",
            ["fsdp_cpu_offload", "allowed: false"],
        ),
        ({"hyperparam_search_config": {"a": 1}}, "hyperparam_search_config", ["allowed: {}"]),
        ({"logger_config": {"report_to": ["mlflow"]}}, "logger_config", ["mlflow", "not installed"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_is_refused_with_its_field_and_what_is_allowed(
    context: Context, data: dict[str, Any], changes: dict[str, Any], param: str, words: list[str]
) -> None:
    error = refusal(context, data, **changes)
    assert isinstance(error, BadInput)
    assert error.param == param
    for word in words:
        assert word in error.message


def test_an_unknown_model_is_refused_with_the_known_ones(context: Context, data: dict[str, Any]) -> None:
    error = refusal(context, data, model="big")
    assert isinstance(error, NotFound)
    assert (error.param, error.code) == ("model", "model_not_found")
    assert error.message == "there is no model 'big'; there are: small"


def test_an_adapter_cannot_be_trained_on_but_its_base_is_named(context: Context, data: dict[str, Any]) -> None:
    samples.add_adapter(context.store, "small:tune-0", "small", "tune-0")
    error = refusal(context, data, model="small:tune-0")
    assert isinstance(error, BadInput)
    assert error.param == "model"
    assert "name its base, 'small'" in error.message


@pytest.fixture
def wrong_data(home: Path) -> dict[str, Any]:
    """Data sets that nothing can be trained on, by what is wrong with them."""
    malformed = home / "data" / "malformed.jsonl"
    malformed.write_text("{\n")
    question = write_rows(home / "data" / "question.jsonl", [{"question": "a"}])
    return {
        "'none'": "none",
        "there is no file": dataset(home / "data" / "none.jsonl"),
        "row 1 is not JSON": dataset(malformed),
        "one column of type dialog": dataset(question, question="text"),
    }


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_wrong_data_set_is_refused_with_what_is_wrong(
    context: Context, data: dict[str, Any], wrong_data: dict[str, Any], field: str
) -> None:
    for words, wrong in wrong_data.items():
        assert words in refusal(context, data, **{field: wrong}).message


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_wrong_data_set_is_refused_with_its_field(
    context: Context, data: dict[str, Any], wrong_data: dict[str, Any], field: str
) -> None:
    params = [refusal(context, data, **{field: wrong}).param or "" for wrong in wrong_data.values()]
    assert [param.split(".")[0] for param in params] == [field] * len(wrong_data)


def test_the_same_request_again_is_the_same_job_even_when_its_data_is_gone(
    context: Context, home: Path, data: dict[str, Any]
) -> None:
    first = post_training.supervised_fine_tune(context, request(data))
    (home / "data" / "train.jsonl").unlink()
    assert post_training.supervised_fine_tune(context, request(data)) == first


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_job_is_of_the_content_that_it_was_accepted_with(
    context: Context, home: Path, data: dict[str, Any], field: str
) -> None:
    other = dataset(write_rows(home / "data" / "other.jsonl", dialogs(3)))
    wanted = request(data, **{field: other})
    job = post_training.supervised_fine_tune(context, wanted)
    write_rows(home / "data" / "other.jsonl", dialogs(5))
    accepted = PostTrainingSFTRequest.model_validate(job.request)
    with pytest.raises(Conflict, match="has changed"):
        datasets.resolve(context, getattr(accepted, field))
    assert post_training.supervised_fine_tune(context, wanted) == job


def test_a_training_without_room_is_refused_when_it_is_accepted_and_when_it_starts(
    context: Context, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free in (10_000, 2**40):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free == 2**40:
            assert post_training.resources(context, request(data)) == {"workers": 1, "per_worker": {"CPU": 1}}
            assert post_training.supervised_fine_tune(context, request(data)).status == "scheduled"
            continue
        with pytest.raises(StorageFull, match="has 10000 bytes left"):
            post_training.resources(context, request(data))
        with pytest.raises(StorageFull, match="has 10000 bytes left"):
            post_training.supervised_fine_tune(context, request(data))
        assert context.store.jobs.get("default", "tune-1") is None


def test_another_request_with_the_same_uuid_is_a_conflict(context: Context, data: dict[str, Any]) -> None:
    post_training.supervised_fine_tune(context, request(data))
    with pytest.raises(Conflict):
        post_training.supervised_fine_tune(context, request(data, algorithm_config=LORA | {"rank": 4}))


def test_jobs_are_listed(context: Context, data: dict[str, Any]) -> None:
    assert post_training.list_jobs(context, None, None, None, 100) == []
    for uuid in ("tune-1", "tune-2"):
        post_training.supervised_fine_tune(context, request(data, job_uuid=uuid))
    assert {job.job_uuid for job in post_training.list_jobs(context, None, None, None, 100)} == {"tune-1", "tune-2"}


def test_the_status_and_artifacts_of_a_job_that_has_made_nothing_yet(context: Context, data: dict[str, Any]) -> None:
    post_training.supervised_fine_tune(context, request(data))
    status = post_training.job_status(context, "tune-1")
    assert (status.status, status.checkpoints, status.resources_allocated) == ("scheduled", [], None)
    artifacts = post_training.job_artifacts(context, "tune-1")
    assert (artifacts.job_uuid, artifacts.checkpoints, artifacts.metrics) == ("tune-1", [], [])


def test_a_completed_job_tells_its_checkpoints_resources_and_metrics(context: Context, data: dict[str, Any]) -> None:
    post_training.supervised_fine_tune(context, request(data))
    samples.start(context.store, "tune-1")
    progress = {"done": 2, "total": 2, "unit": "steps", "seconds_left": 0.0}
    samples.report(context.store, "tune-1", progress, [("loss", 1, 2.0), ("loss", 2, 1.0)])
    file = {"name": "adapter_model.safetensors", "bytes": 9, "sha256": "0" * 64}
    checkpoint = {"model": "small:tune-1", "path": "file:///adapters/tune-1", "iters": 2, "files": [file]}
    samples.complete(context.store, "tune-1", {"checkpoints": [checkpoint]})
    status = post_training.job_status(context, "tune-1")
    assert status.metrics == {"loss": 1.0}
    assert status.resources_allocated == {"workers": 1}
    assert [one.model_dump() for one in status.checkpoints] == [checkpoint]
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


def test_an_adapter_is_served_as_base_and_job() -> None:
    assert post_training.model_id("default", "small", "tune-1") == "small:tune-1"
    assert post_training.model_id("acme", "small", "tune-1") == "small:acme/tune-1"
    assert post_training.adapter_name("default", "tune-1") == "adapters/tune-1"
    for tenant in ("default", "acme"):
        model = post_training.model_id(tenant, "small", "tune-1")
        assert post_training.adapter_of_model("small", model) == post_training.adapter_name(tenant, "tune-1")


def test_a_uuid_whose_adapter_is_there_already_is_a_conflict(
    context: Context, home: Path, data: dict[str, Any]
) -> None:
    context.artifacts.publish("adapters/tune-1", home / "data")
    error = refusal(context, data)
    assert isinstance(error, Conflict)
    assert error.param == "job_uuid"
    assert "choose another job_uuid" in error.message

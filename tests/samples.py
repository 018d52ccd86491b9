"""Rows, data sets and requests that are right as they are; tests change what they are about."""

import json
from pathlib import Path
from typing import Any

from stack.store import Adapter, AddedModel, Job, Store, now
from stack.store.jobs import NewJob

DIALOG: list[dict[str, Any]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
]


# The columns of preferences, for `dataset`.
PREFERENCES = {"prompt": "text", "chosen": "text", "rejected": "text"}


def dialogs(count: int) -> list[dict[str, Any]]:
    """Rows with one column, `dialog`."""
    return [{"dialog": DIALOG} for _ in range(count)]


def preferences(count: int) -> list[dict[str, Any]]:
    """Rows with the columns PREFERENCES."""
    return [{"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"} for _ in range(count)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def dataset(file: Path | str, **columns: str) -> dict[str, Any]:
    """The description of a data set in a file, or at an address; without columns, of one column `dialog`."""
    address = file if isinstance(file, str) else file.as_uri()
    return {"columns": columns or {"dialog": "dialog"}, "content_url": address}


def function_calls(file: Path, *questions: str) -> dict[str, Any]:
    """The description of a data set in BFCL's format, in whose rows the weather is asked for by these words."""
    parameters = {
        "type": "dict",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    }
    rows = [
        {
            "id": f"weather-{number}",
            "question": [[{"role": "user", "content": question}]],
            "function": [{"name": "get_weather", "description": "The forecast.", "parameters": parameters}],
            "ground_truth": [{"get_weather": {"city": ["Paris", "Paris, France"], "days": ["", 1]}}],
        }
        for number, question in enumerate(questions or ["How will the weather be in Paris?"], 1)
    ]
    columns = {"id": "text", "question": "json", "function": "json", "ground_truth": "json"}
    return dataset(write_rows(file, rows), **columns)


def add_job(store: Store, uuid: str, kind: str = "evaluate", tenant: str = "default", **request: Any) -> Job:
    """A job that waits."""
    job, _ = store.jobs.add(NewJob(tenant, uuid, kind, request, experiment=kind), max_waiting=10_000)
    assert job is not None
    return job


def start(store: Store, uuid: str, tenant: str = "default") -> Job:
    """Lets an accepted job run, as its first attempt does."""
    job = store.jobs.get(tenant, uuid)
    assert job is not None
    assert store.jobs.open_attempt(job.id, 1, f"{tenant}.{uuid}.1")
    assert store.jobs.begin(job.id, 1, {"workers": 1})
    return job


def report(store: Store, uuid: str, progress: dict[str, Any], values: list[tuple[str, int, float]]) -> None:
    """Writes the progress and the metrics of a running job."""
    job = store.jobs.get("default", uuid)
    assert job is not None
    assert store.jobs.record(job.id, 1, progress=progress)
    store.telemetry.add_metrics("default", job.run_id, values)


def complete(store: Store, uuid: str, result: dict[str, Any], adapter: Adapter | None = None) -> None:
    job = store.jobs.get("default", uuid)
    assert job is not None
    assert store.jobs.complete(job.id, 1, result, adapter)


def fail(store: Store, uuid: str, reason: str) -> None:
    """Fails an accepted job, which starts first if it has not."""
    job = store.jobs.get("default", uuid)
    assert job is not None
    if job.status == "scheduled":
        start(store, uuid)
    assert store.jobs.fail(job.id, 1, reason)


def add_adapter(store: Store, model_id: str, base: str, job_uuid: str) -> None:
    """Registers an adapter as the fine-tuning job that made it does."""
    add_job(store, job_uuid, "supervised_fine_tune", model=base)
    start(store, job_uuid)
    adapter = Adapter("default", model_id, base, job_uuid, f"adapters/{job_uuid}", created_at=now())
    complete(store, job_uuid, {"checkpoints": []}, adapter)


def trained(id: str, tenant: str = "default", **entry: Any) -> AddedModel:
    """A model of its tenant alone."""
    entry = {"id": id, "path": "models/small"} | entry
    return AddedModel(id, tenant, entry, created_at=now(), removed_at=None, problem=None, private=True)


def add_trained(store: Store, id: str, tenant: str = "default", job_uuid: str = "whole-1", **entry: Any) -> None:
    """Registers a model as the fine-tuning job that trained all its weights does."""
    add_job(store, job_uuid, "supervised_fine_tune", tenant, model="small")
    job = start(store, job_uuid, tenant)
    checkpoint = {"model": id, "path": f"file:///models/{job_uuid}", "iters": 2, "files": []}
    assert store.jobs.complete(job.id, 1, {"checkpoints": [checkpoint]}, model=trained(id, tenant, **entry))


def add_trained_reward(store: Store, id: str, tenant: str = "default", job_uuid: str = "reward-1") -> None:
    """Registers a reward model as the job that trained it does."""
    add_job(store, job_uuid, "train_reward_model", tenant, model="small")
    job = start(store, job_uuid, tenant)
    model = trained(id, tenant, kind="classifier", min_replicas=0, max_replicas=1)
    assert store.jobs.complete(job.id, 1, {"checkpoints": []}, model=model)


def fine_tuning(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /post_training/supervised_fine_tune."""
    return _training(data) | {"model": "small", "algorithm": "lora", "algorithm_config": lora()} | changes


def preference_optimization(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /post_training/preference_optimize."""
    settings = {"reward_scale": 1.0, "reward_clip": 0.0, "epsilon": 0.0, "gamma": 0.0, "beta": 0.1}
    model = {"finetuned_model": "small", "algorithm": "dpo", "algorithm_config": settings, "lora_config": lora()}
    return _training(data) | model | {"job_uuid": "prefer-1"} | changes


def reward_training(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /post_training/train_reward_model."""
    return fine_tuning(data) | {"job_uuid": "reward-1"} | changes


def lora(**changes: Any) -> dict[str, Any]:
    """What is trained where it is an adapter."""
    layers = {"lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": False}
    return layers | {"rank": 8, "alpha": 16} | changes


def _training(data: Any) -> dict[str, Any]:
    return {
        "job_uuid": "tune-1",
        "dataset": data,
        "optimizer_config": {"optimizer_type": "adamw", "lr": 0.001, "lr_min": 0.0, "weight_decay": 0.1},
        "training_config": {"n_epochs": 1, "n_iters": 0, "batch_size": 8, "shuffle": True},
    }


def evaluation(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /evaluate/question_answering/."""
    return {
        "job_uuid": "evaluation-1",
        "dataset": data,
        "checkpoint": "small",
        "sampling_params": {"strategy": "greedy", "max_tokens": 8},
        "metrics": ["em", "f1"],
    } | changes


def generation(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /synthetic_data_generation/jobs."""
    return {"job_uuid": "generation-1", "dataset": data, "filtering_function": "top_k"} | changes


def ingestion(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /memory_banks/ingest."""
    return {"job_uuid": "ingest-1", "dataset": data} | changes


def batch(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /batch_inference/jobs."""
    return {"job_uuid": "batch-1", "kind": "chat_completion", "model": "small", "dataset": data} | changes

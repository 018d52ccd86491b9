"""Rows, data sets and requests that are right as they are; tests change what they are about."""

import json
from pathlib import Path
from typing import Any

from stack.store import Adapter, Store, now

DIALOG: list[dict[str, Any]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
]


def dialogs(count: int) -> list[dict[str, Any]]:
    """Rows with one column, `dialog`."""
    return [{"dialog": DIALOG} for _ in range(count)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def dataset(file: Path, **columns: str) -> dict[str, Any]:
    """The description of a data set; without columns, of one column `dialog`."""
    return {"columns": columns or {"dialog": "dialog"}, "content_url": file.as_uri()}


def add_adapter(store: Store, model_id: str, base: str, job_uuid: str) -> None:
    """Registers an adapter as the fine-tuning job that made it does."""
    store.add_job(job_uuid, "supervised_fine_tune", {"model": base}, None)
    store.start_job(job_uuid)
    assert store.complete_job(job_uuid, {"checkpoints": []}, Adapter(model_id, base, job_uuid, created_at=now()))


def fine_tuning(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /post_training/supervised_fine_tune."""
    lora = {"lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": False}
    return {
        "job_uuid": "tune-1",
        "model": "small",
        "dataset": data,
        "algorithm": "lora",
        "algorithm_config": lora | {"rank": 8, "alpha": 16},
        "optimizer_config": {"optimizer_type": "adamw", "lr": 0.001, "lr_min": 0.0, "weight_decay": 0.1},
        "training_config": {"n_epochs": 1, "n_iters": 0, "batch_size": 8, "shuffle": True},
    } | changes


def evaluation(data: Any, **changes: Any) -> dict[str, Any]:
    """The body of POST /evaluate/question_answering/."""
    return {
        "job_uuid": "evaluation-1",
        "dataset": data,
        "checkpoint": "small",
        "sampling_params": {"strategy": "greedy", "max_tokens": 8},
        "metrics": ["em", "f1"],
    } | changes

"""Fine-tunes a model on a data set of dialogs, by LoRA; its adapter is served as MODEL:JOB from then on.

    python -m scripts.drivers.tune --model SmolLM2-135M-Instruct --rows train.jsonl
    python -m scripts.drivers.tune --model Llama-3.1-8B-Instruct --dataset answers --workers 8 --rank 32

Other ways to train (whole models, preferences, searches) are in docs/post-training.md: `--request FILE` takes the body
of /post_training/supervised_fine_tune or, with `--preferences`, of /post_training/preference_optimize.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from scripts.drivers.client import Stack, drive, new_id
from scripts.drivers.generate import register

API = "/post_training"


def options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", metavar="UUID", help="a registered data set of dialogs, with the answers to learn")
    what.add_argument("--rows", type=Path, metavar="FILE", help="a file of such dialogs to send, in JSON Lines")
    what.add_argument("--request", type=Path, metavar="FILE", help="a whole request, in YAML or JSON")
    parser.add_argument("--preferences", action="store_true", help="the request is one of preference_optimize")
    parser.add_argument("--model", help="the model to tune")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="how often every row is seen (1)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows of a step, of all workers (8)")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="of the adapter (16)")
    parser.add_argument("--lr", type=float, default=1e-3, help="the learning rate (0.001)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="workers, each with a GPU if there are any (1)"
    )
    parser.add_argument("--job", metavar="UUID", help="the job's name: the same again is the same job")


def run(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.request:
        request = yaml.safe_load(arguments.request.read_text())
        return train(stack, request, "preference_optimize" if arguments.preferences else "supervised_fine_tune")
    job = arguments.job or new_id("tune")
    dataset = arguments.dataset or register(stack, f"{job}-rows", arguments.rows)
    request = lora(job, arguments.model or first_model(stack), dataset, arguments.epochs, arguments.batch_size,
                   arguments.rank, arguments.lr, arguments.workers)  # fmt: skip
    return train(stack, request, "supervised_fine_tune")


def first_model(stack: Stack) -> str:
    return str(stack.get("/v1/models")["data"][0]["id"])


def lora(
    job: str, model: str, dataset: str, epochs: int, batch_size: int, rank: int, lr: float, workers: int = 1
) -> dict[str, Any]:
    """The request of a fine-tuning by LoRA on all linear layers."""
    return {
        "job_uuid": job,
        "model": model,
        "dataset": dataset,
        "algorithm": "lora",
        "algorithm_config": {
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": False,
            "rank": rank,
            "alpha": 2 * rank,
        },
        "optimizer_config": {"optimizer_type": "adamw", "lr": lr, "lr_min": 0.0, "weight_decay": 0.0},
        "training_config": {
            "n_epochs": epochs, "n_iters": 0, "batch_size": batch_size, "shuffle": True, "workers": workers,
        },
    }  # fmt: skip


def train(stack: Stack, request: dict[str, Any], operation: str) -> dict[str, Any]:
    """Trains, and waits for it: the model that is served then, and the figures of the job."""
    job = request["job_uuid"]
    stack.post(f"{API}/{operation}", request)
    status = stack.finished(API, job)
    models = [one["model"] for one in status["checkpoints"] if one.get("model")]
    return {"job_uuid": job, "model": models[0] if models else None, "metrics": status["metrics"]}


def words(result: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {value:g}" for name, value in sorted(result["metrics"].items()))
    return f"trained {result['model'] or 'what ' + result['job_uuid'] + ' has among its artifacts'}: {figures}"


if __name__ == "__main__":
    sys.exit(drive(__doc__, options, run, words))

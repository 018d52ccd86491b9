"""Evaluates a model, or a tuned one, on a data set of dialogs that end with the expected answers.

    python -m scripts.drivers.evaluate --rows test.jsonl --model SmolLM2-135M-Instruct
    python -m scripts.drivers.evaluate --dataset test --model SmolLM2-135M-Instruct:my-tune --compare-with JOB

`--compare-with` names an earlier evaluation of the same data set, and tells the difference with its interval. More
kinds of evaluation are in docs/evaluations.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from scripts.drivers.client import Stack, drive, new_id
from scripts.drivers.generate import register
from scripts.drivers.tune import first_model

API = "/evaluate"
METRICS = {
    "question_answering": ["em", "f1"],
    "summarization": ["rouge", "bleu"],
    "text_generation": ["rouge", "perplexity"],
}


def options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset", metavar="UUID", help="a registered data set")
    data.add_argument("--rows", type=Path, metavar="FILE", help="a file of dialogs to send, in JSON Lines")
    parser.add_argument("--model", help="the model to evaluate (the first one)")
    parser.add_argument("--task", choices=METRICS, default="question_answering", help="(question_answering)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of an answer (64)")
    parser.add_argument("--compare-with", metavar="JOB", help="an earlier evaluation of the same data set")
    parser.add_argument("--job", metavar="UUID", help="the job's name: the same again is the same job")


def run(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    job = arguments.job or new_id("evaluate")
    dataset = arguments.dataset or register(stack, f"{job}-rows", arguments.rows)
    model = arguments.model or first_model(stack)
    result = evaluate(stack, job, dataset, model, arguments.task, arguments.max_tokens)
    if arguments.compare_with:
        result["compared"] = compare(stack, arguments.compare_with, job)
    return result


def evaluate(stack: Stack, job: str, dataset: str, model: str, task: str, max_tokens: int) -> dict[str, Any]:
    """Evaluates, and waits for it: the metrics."""
    body = {
        "job_uuid": job, "dataset": dataset, "checkpoint": model, "metrics": METRICS[task],
        "sampling_params": {"strategy": "greedy", "max_tokens": max_tokens},
    }  # fmt: skip
    stack.post(f"{API}/{task}/", body)
    return {"job_uuid": job, "model": model, "metrics": stack.finished(API, job)["metrics"]}


def compare(stack: Stack, first: str, second: str) -> list[dict[str, Any]]:
    """How the metrics of two evaluations of a data set differ, each with its 95 % interval."""
    metrics: list[dict[str, Any]] = stack.post(f"{API}/compare", {"first": first, "second": second})["metrics"]
    return [{"name": one["name"], **one["difference"]} for one in metrics]


def words(result: dict[str, Any]) -> str:
    lines = [f"{result['model']} ({result['job_uuid']})"]
    lines += [f"  {name} {value:g}" for name, value in sorted(result["metrics"].items())]
    for one in result.get("compared", []):
        lines.append(f"  difference of {one['name']}: {one['value']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(drive(__doc__, options, run, words))

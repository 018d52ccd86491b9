"""Makes training data: a model answers the prompts of a data set several times, and the best answers are kept.

    python -m scripts.drivers.generate --rows prompts.jsonl --model SmolLM2-135M-Instruct
    python -m scripts.drivers.generate --dataset questions --output preferences

`--rows` sends a file, with a `dialog` in each row; `--dataset` names one that is registered. The result is a data set,
for scripts.drivers.tune (see docs/synthetic-data.md).
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from scripts.drivers.client import Missing, Refused, Stack, drive, new_id, say

API = "/synthetic_data_generation"


def options(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--dataset", metavar="UUID", help="a registered data set of dialogs")
    prompts.add_argument("--rows", type=Path, metavar="FILE", help="a file of dialogs to send, in JSON Lines")
    parser.add_argument("--model", help="who answers (the config's first model)")
    parser.add_argument("--reward-model", metavar="ID", help="who scores the answers (the config's first)")
    parser.add_argument("--output", choices=("sft", "preferences", "scored"), default="sft", help="what is made (sft)")
    parser.add_argument("--generations", type=int, default=4, metavar="N", help="answers to each prompt (4)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (256)")
    parser.add_argument("--job", metavar="UUID", help="the job's name: the same again is the same job")


def run(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    job = arguments.job or new_id("generate")
    dataset = arguments.dataset or register(stack, f"{job}-prompts", arguments.rows)
    more = {"model": arguments.model, "reward_model": arguments.reward_model}
    return generate(
        stack, job, dataset, arguments.output, arguments.generations, arguments.max_tokens,
        **{name: value for name, value in more.items() if value},
    )  # fmt: skip


def register(stack: Stack, uuid: str, rows: Path) -> str:
    """Sends a file of dialogs and registers it as a data set; returns its id.

    A data set that has it already is taken, and nothing is sent. Raises Refused where its content is another one.
    """
    with rows.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    # By the hash the stack itself tells whether it is the same.
    url = _content_url(stack, uuid) or stack.upload(rows)
    described = {"columns": {"dialog": "dialog"}, "content_url": url, "sha256": digest}
    stack.post("/datasets/create", {"uuid": uuid, "dataset": described})
    say(f"registered {rows} as {uuid}")
    return uuid


def _content_url(stack: Stack, uuid: str) -> str | None:
    """Where the content of a data set is that is registered already."""
    try:
        return str(stack.get("/datasets/get", dataset_uuid=uuid)["content_url"])
    except Missing:
        return None


def generate(
    stack: Stack, job: str, dataset: str, output: str, generations: int, max_tokens: int, **more: str
) -> dict[str, Any]:
    """Generates, and waits for it: the data set that was made, and the figures of the job.

    Raises Refused where nothing was kept: `rejected_cut_off`, for example, are answers longer than `max_tokens`.
    """
    sampling = {"strategy": "top_p", "temperature": 1.0, "top_p": 0.95, "max_tokens": max_tokens}
    body = {
        "job_uuid": job, "source": "dataset", "dataset": dataset, "filtering_function": "top_k", "filter_k": 1,
        "num_generations": generations, "sampling_params": sampling, "output": output, **more,
    }  # fmt: skip
    if output == "preferences":
        body["filtering_function"] = "none"
    stack.post(f"{API}/jobs", body)
    status = stack.finished(API, job)
    made = stack.get(f"{API}/job/artifacts", job_uuid=job)["datasets"]
    if output not in made:
        raise Refused(f"the job {job} has kept no answer, so there is no data set: {_figures(status['metrics'])}")
    return {"job_uuid": job, "dataset": made[output], "metrics": status["metrics"]}


def words(result: dict[str, Any]) -> str:
    return f"made the data set {result['dataset']}: {_figures(result['metrics'])}"


def _figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sorted(metrics.items()))


if __name__ == "__main__":
    sys.exit(drive(__doc__, options, run, words))

"""A model learns from the best of its own answers: generate, fine-tune, and compare on prompts that it never saw.

    python -m scripts.improve_model [--keep] [--port PORT]

Starts the stack on this machine, or uses the one that runs, and does everything over HTTP:

1. evaluates the base model on held-out questions beside the preferred answers (/evaluate/text_generation/: ROUGE, and
   how likely these are to the model), and scores its answers by the reward model that ships,
2. has the model answer other questions several times, told to answer in one short sentence, and keeps the answer to
   each that the reward model likes best, of those that came to an end (best-of-n, as in RAFT: Dong et al. 2023, arXiv
   2304.06767),
3. trains an adapter to answer so without being told (context distillation: Snell et al. 2022, arXiv 2209.15189),
4. evaluates the adapter on the held-out questions like the base model, and compares (/evaluate/compare).

What is to rise is named here, before anything is run: rougeL of the answers to the held-out questions beside the
preferred ones. No training sees those, nor was anything selected by it. The questions are those of
scripts/preferences.py, which has the beginnings of the preferred answers, of some fifteen words: the base model says
far more than these, and a part of the rise is that the adapter does not. The exit status is 1 unless all of the 95 %
interval of the difference is above 0. The score of the reward model, by which the answers to learn were chosen, and
the other metrics are shown beside it, whatever they are.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from scripts import local_stack, preferences
from scripts.preferences import SYSTEM_PROMPT, Pair
from scripts.quickstart import MODEL, StepFailed, console, fine_tuning, get, post, stack, title, watch
from stack.config import home

# What is to rise.
METRIC = "rougeL"
REWARD_MODEL = "reward-on-MiniLM"
# What the model is told while it makes answers to learn from.
INSTRUCTION = "Answer in one short sentence."
GENERATIONS = 8
# An answer to learn from has come to its end within so many tokens: generations that were cut off are never kept.
SAMPLED = {"strategy": "top_p", "temperature": 0.8, "top_p": 0.95, "max_tokens": 48}
GREEDY = {"strategy": "greedy", "max_tokens": 96}
EPOCHS = 3
# What was made of them is read back in one page of a data set.
MOST_PROMPTS = {"train": 100, "validation": 0, "test": 100}
BOOTSTRAP_SAMPLES = 10_000
COLUMNS = {"id": "text", "dialog": "dialog"}
GENERATE = "/synthetic_data_generation"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.improve_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--keep", action="store_true", help="leave the stack up at the end of the run")
    parser.add_argument("--port", type=int, default=8321, help="the gateway's port (8321)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with stack(local_stack.checked_port(arguments.port, "--port"), arguments.keep) as url:
            run(url)
    except (StepFailed, local_stack.StartFailed) as error:
        console.print(f"failed: {error}", style="bold red", markup=False)
        return 1
    except httpx.HTTPError as error:
        console.print(f"failed: the stack did not answer ({error!r})", style="bold red", markup=False)
        return 1
    return 0


@dataclass(frozen=True)
class Found:
    """What was found of a model before and after: the score of each held-out prompt's answer, by its id, and what
    /evaluate/compare says of the two evaluations, metric by metric."""

    before: dict[str, float]
    after: dict[str, float]
    compared: list[dict[str, Any]]

    def difference(self) -> tuple[float, float, float]:
        """Of the scores, as `difference` gives it."""
        return difference([*self.before.values()], [self.after[prompt] for prompt in self.before])

    def require_risen(self) -> None:
        """Raises StepFailed unless all of the interval of METRIC's difference is above 0."""
        (change,) = (metric["difference"] for metric in self.compared if metric["name"] == METRIC)
        if change["low"] <= 0:
            told = f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
            raise StepFailed(f"{METRIC} has not risen for sure: by {told}")


def run(url: str) -> None:
    """The four steps. Raises StepFailed if one fails, or METRIC does not rise."""
    run_id = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    splits = preferences.split(preferences.read_pairs(home() / "packaged-data" / "preferences"))
    pairs = {name: splits[name][:most] for name, most in MOST_PROMPTS.items()}
    with httpx.Client(base_url=url, timeout=120) as client:
        found = improve(client, home() / "data" / "improve-model", run_id, pairs)
    console.print(table(found))
    found.require_risen()


def improve(client: httpx.Client, folder: Path, run_id: str, pairs: Mapping[str, Sequence[Pair]]) -> Found:
    """The four steps, on the pairs `train` and `test`, which are written to a folder that the stack can read."""
    tuned = f"{MODEL}:tune-{run_id}"
    title(1, "Looking at the base model's answers to questions that are held out")
    register(client, folder, f"train-{run_id}", pairs["train"], INSTRUCTION)
    register(client, folder, f"test-{run_id}", pairs["test"])
    before = scores(client, f"before-{run_id}", f"test-{run_id}", MODEL)
    evaluate(client, f"evaluate-before-{run_id}", f"test-{run_id}", MODEL)
    console.print(f"  a score of {np.mean(list(before.values())):.3f} on {len(before)} questions")

    title(2, f"Keeping the best of {GENERATIONS} answers to each of {len(pairs['train'])} other questions")
    generated = generate(client, f"best-{run_id}", f"train-{run_id}", num_generations=GENERATIONS, output="sft")
    console.print(f"  {generated['rows']:.0f} answers to learn from {generated['generated']:.0f}")
    register(client, folder, f"learn-{run_id}", kept(client, f"best-{run_id}", pairs["train"]))

    title(3, "Training an adapter on them, without what the model was told")
    training = fine_tuning(f"tune-{run_id}", f"learn-{run_id}", "")
    training["training_config"]["n_epochs"] = EPOCHS
    del training["validation_dataset"]
    post(client, "/post_training/supervised_fine_tune", training)
    watch(client, "/post_training/job/status", training["job_uuid"], "training")

    title(4, "Looking at the adapter's answers to the held-out questions")
    after = scores(client, f"after-{run_id}", f"test-{run_id}", tuned)
    if missing := sorted(before.keys() ^ after.keys()):
        raise StepFailed(f"{len(missing)} prompts have no answer of one of the two, the first of them {missing[0]!r}")
    evaluate(client, f"evaluate-after-{run_id}", f"test-{run_id}", tuned)
    both = {"first": f"evaluate-before-{run_id}", "second": f"evaluate-after-{run_id}", "most": 0}
    return Found(before, after, post(client, "/evaluate/compare", both)["metrics"])


def register(
    client: httpx.Client, folder: Path, uuid: str, pairs: Sequence[Pair], system_prompt: str = SYSTEM_PROMPT
) -> None:
    """Makes a data set of the questions of pairs, with their preferred answers."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{uuid}.jsonl"
    write(file, pairs, system_prompt)
    post(client, "/datasets/create", {"uuid": uuid, "dataset": {"columns": COLUMNS, "content_url": file.as_uri()}})


def write(file: Path, pairs: Sequence[Pair], system_prompt: str) -> None:
    """Writes dialogs with their numbers as ids. Who is asked them does not see the answers at their end."""
    system = {"role": "system", "content": system_prompt}
    rows = [
        {
            "id": str(number),
            "dialog": [
                system,
                {"role": "user", "content": pair.question},
                {"role": "assistant", "content": pair.chosen},
            ],
        }
        for number, pair in enumerate(pairs)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def kept(client: httpx.Client, job_uuid: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The questions of pairs with the answers that a generation has kept, in the place of the preferred ones."""
    rows = made_rows(client, job_uuid, "sft")
    return [replace(pairs[int(row["id"])], chosen=row["dialog"][-1]["content"].strip()) for row in rows]


def made_rows(client: httpx.Client, job_uuid: str, output: str) -> list[dict[str, Any]]:
    """The rows, a hundred at most, of the data set that a generation has made."""
    made = get(client, f"{GENERATE}/job/artifacts", job_uuid)["datasets"][output]
    reply = client.get("/datasets/preview", params={"dataset_uuid": made, "rows": 100})
    rows: list[dict[str, Any]] = reply.raise_for_status().json()["rows"]
    return rows


def evaluate(client: httpx.Client, job_uuid: str, dataset: str, model: str) -> None:
    """Evaluates a model beside the preferred answers, to its end."""
    body = {
        "job_uuid": job_uuid,
        "dataset": dataset,
        "checkpoint": model,
        "sampling_params": GREEDY,
        "metrics": ["rouge", "perplexity"],
    }
    post(client, "/evaluate/text_generation/", body)
    watch(client, "/evaluate/job/status", job_uuid, "evaluating")


def generate(client: httpx.Client, job_uuid: str, dataset: str, **changes: Any) -> dict[str, float]:
    """Runs a generation to its end. Its figures."""
    body = {
        "job_uuid": job_uuid,
        "dataset": dataset,
        "model": MODEL,
        "reward_model": REWARD_MODEL,
        "filtering_function": "none",
        "sampling_params": SAMPLED,
    }
    post(client, f"{GENERATE}/jobs", body | changes)
    metrics: dict[str, float] = watch(client, f"{GENERATE}/job/status", job_uuid, "generating")["metrics"]
    return metrics


def scores(client: httpx.Client, job_uuid: str, dataset: str, model: str) -> dict[str, float]:
    """The score of a model's greedy answer to each prompt, by the prompt's id."""
    generate(client, job_uuid, dataset, model=model, num_generations=1, sampling_params=GREEDY, output="scored")
    rows = made_rows(client, job_uuid, "scored")
    return {row["id"]: float(row["generations"][0]["score"]) for row in rows}


def difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the paired differences, between the ends of its 95 % interval (bootstrap, percentiles)."""
    differences = np.array(after) - np.array(before)
    drawn = np.random.default_rng(0).choice(differences, (BOOTSTRAP_SAMPLES, len(differences)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(low), float(differences.mean()), float(high)


def table(found: Found) -> Table:
    """What was found for the terminal: METRIC, by which it is decided, the reward model's score, and the others."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in ("", "before", "after", "difference (95 %)"):
        shown.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    low, mean, high = found.difference()
    means = [f"{np.mean(list(one.values())):.3f}" for one in (found.before, found.after)]
    rows = {metric["name"]: _cells(metric) for metric in found.compared}
    shown.add_row(*rows.pop(METRIC))
    shown.add_row(f"score of {REWARD_MODEL}", *means, f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
    for cells in rows.values():
        shown.add_row(*cells)
    return shown


def _cells(metric: Mapping[str, Any]) -> list[str]:
    both = [f"{metric[which]['value']:.3f}" for which in ("first", "second")]
    change = metric["difference"]
    told = f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
    return [f"{metric['name']} ({metric['better']} is better)", *both, told]


if __name__ == "__main__":
    sys.exit(main())

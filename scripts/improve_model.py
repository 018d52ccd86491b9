"""A model learns from the best of its own answers: generate, fine-tune, and compare on prompts that it never saw.

    python -m scripts.improve_model [--keep] [--port PORT]

Starts the stack on this machine, or uses the one that runs, and does everything over HTTP:

1. looks at the base model's answers to held-out prompts: scores them by the reward model that ships, and evaluates the
   model beside the preferred answers (/evaluate/text_generation/: ROUGE, and how likely these are to the model),
2. has the model answer other prompts several times, and keeps the best answer to each as a data set to learn from
   (best-of-n, as in RAFT: Dong et al. 2023, arXiv 2304.06767),
3. trains an adapter on it,
4. looks at the adapter's answers to the held-out prompts in the same way, and compares, prompt by prompt
   (/evaluate/compare for the evaluations).

The prompts are the questions of scripts/preferences.py, from whose answers the reward model has learned. What is to
rise is its own score: that shows that the loop closes, and not that people would like the answers better; what the
evaluations tell of that is shown beside it, whatever it is. The exit status is 1 unless the score rises by more than
chance explains: the 95 % interval of the mean difference, from 10,000 bootstrap samples of the prompts, is above 0.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from scripts import local_stack, preferences
from scripts.preferences import Pair
from scripts.quickstart import MODEL, StepFailed, console, fine_tuning, get, post, stack, title, watch
from stack.config import home

REWARD_MODEL = "reward-on-MiniLM"
SYSTEM_PROMPT = "Answer in one short sentence."
GENERATIONS = 8
MAX_TOKENS = 96
GREEDY = {"strategy": "greedy", "max_tokens": MAX_TOKENS}
# Those that are held out are read back in one page of their data set.
MOST_PROMPTS = {"train": 1_000, "validation": 0, "test": 100}
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


def run(url: str) -> None:
    """The four steps. Raises StepFailed if one fails, or the score does not rise."""
    run_id = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    splits = preferences.split(preferences.read_pairs(home() / "packaged-data" / "preferences"))
    pairs = {name: splits[name][:most] for name, most in MOST_PROMPTS.items()}
    with httpx.Client(base_url=url, timeout=120) as client:
        found = improve(client, home() / "data" / "improve-model", run_id, pairs)
    console.print(table(found))
    low, mean, high = found.difference()
    if low <= 0:
        raise StepFailed(f"the score has not risen for sure: by {mean:+.3f} ({low:+.3f} to {high:+.3f})")


def improve(client: httpx.Client, folder: Path, run_id: str, pairs: Mapping[str, Sequence[Pair]]) -> Found:
    """The four steps, on the pairs `train` and `test`, which are written to a folder that the stack can read."""
    tuned = f"{MODEL}:tune-{run_id}"
    title(1, "Looking at the base model's answers to prompts that are held out")
    for name in ("train", "test"):
        register(client, folder, f"{name}-{run_id}", pairs[name])
    before = scores(client, f"before-{run_id}", f"test-{run_id}", MODEL)
    evaluate(client, f"evaluate-before-{run_id}", f"test-{run_id}", MODEL)
    console.print(f"  {np.mean(list(before.values())):.3f} on {len(before)} prompts")

    title(2, f"Keeping the best of {GENERATIONS} answers to each of {len(pairs['train'])} other prompts")
    generated = generate(client, f"best-{run_id}", f"train-{run_id}", num_generations=GENERATIONS, output="sft")
    console.print(f"  {generated['rows']:.0f} answers to learn from {generated['generated']:.0f}")

    title(3, "Training an adapter on them")
    training = fine_tuning(f"tune-{run_id}", f"best-{run_id}", "")
    del training["validation_dataset"]
    post(client, "/post_training/supervised_fine_tune", training)
    watch(client, "/post_training/job/status", training["job_uuid"], "training")

    title(4, "Looking at the adapter's answers to the held-out prompts")
    after = scores(client, f"after-{run_id}", f"test-{run_id}", tuned)
    if missing := sorted(before.keys() ^ after.keys()):
        raise StepFailed(f"{len(missing)} prompts have no answer of one of the two, the first of them {missing[0]!r}")
    evaluate(client, f"evaluate-after-{run_id}", f"test-{run_id}", tuned)
    both = {"first": f"evaluate-before-{run_id}", "second": f"evaluate-after-{run_id}", "most": 0}
    return Found(before, after, post(client, "/evaluate/compare", both)["metrics"])


def register(client: httpx.Client, folder: Path, uuid: str, pairs: Sequence[Pair]) -> None:
    """Makes a data set of the questions of pairs, with their preferred answers."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{uuid}.jsonl"
    write(file, pairs)
    post(client, "/datasets/create", {"uuid": uuid, "dataset": {"columns": COLUMNS, "content_url": file.as_uri()}})


def write(file: Path, pairs: Sequence[Pair]) -> None:
    """Writes dialogs with their numbers as ids. Who is asked them does not see the answers at their end."""
    system = {"role": "system", "content": SYSTEM_PROMPT}
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
        "sampling_params": {"strategy": "top_p", "temperature": 1.0, "top_p": 0.95, "max_tokens": MAX_TOKENS},
    }
    post(client, f"{GENERATE}/jobs", body | changes)
    metrics: dict[str, float] = watch(client, f"{GENERATE}/job/status", job_uuid, "generating")["metrics"]
    return metrics


def scores(client: httpx.Client, job_uuid: str, dataset: str, model: str) -> dict[str, float]:
    """The score of a model's greedy answer to each prompt, by the prompt's id."""
    generate(client, job_uuid, dataset, model=model, num_generations=1, sampling_params=GREEDY, output="scored")
    made = get(client, f"{GENERATE}/job/artifacts", job_uuid)["datasets"]["scored"]
    reply = client.get("/datasets/preview", params={"dataset_uuid": made, "rows": 100})
    rows = reply.raise_for_status().json()["rows"]
    return {row["id"]: float(row["generations"][0]["score"]) for row in rows}


def difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the paired differences, between the ends of its 95 % interval (bootstrap, percentiles)."""
    differences = np.array(after) - np.array(before)
    drawn = np.random.default_rng(0).choice(differences, (BOOTSTRAP_SAMPLES, len(differences)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(low), float(differences.mean()), float(high)


def table(found: Found) -> Table:
    """The scores for the terminal."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in ("", "before", "after", "difference (95 %)"):
        shown.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    low, mean, high = found.difference()
    means = [f"{np.mean(list(one.values())):.3f}" for one in (found.before, found.after)]
    shown.add_row(f"score of {REWARD_MODEL}", *means, f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
    for metric in found.compared:
        both = [f"{metric[which]['value']:.3f}" for which in ("first", "second")]
        change = metric["difference"]
        told = f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
        shown.add_row(f"{metric['name']} ({metric['better']} is better)", *both, told)
    return shown


if __name__ == "__main__":
    sys.exit(main())

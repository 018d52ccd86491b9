"""Evaluation by question answering: Ray Data asks the model that serves, and each answer is scored.

    ray job submit -- python -m jobs.evaluate --config jobs/examples/evaluate.yaml

The file holds the body of POST /evaluate/question_answering/. The scores become the job's metrics, and every example
with its output and scores a line of `examples.jsonl` among the artifacts. The model answers as it answers users: behind
its shields. A question or an answer that they do not pass is an example with an empty answer and the shield's reason.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.data
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

from jobs import dataset_source, driver
from jobs.asking import BATCH_SIZE, Ask
from jobs.reporter import resources
from stack import datasets, evaluations
from stack.api.evaluations import EvaluateQuestionAnsweringRequest, QuestionAnsweringMetric
from stack.inference import sampling_body

# SQuAD's metrics as transformers has them: metric(expected, answer), from 0 to 1.
METRICS = {QuestionAnsweringMetric.em: compute_exact, QuestionAnsweringMetric.f1: compute_f1}


def question_answering(work: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
    """Asks a model every question of a data set and scores its answers against the expected ones."""
    context, job = work.context, work.job
    model = evaluations.model_of(context, request.checkpoint)
    checked = datasets.resolve(context, request.dataset)
    # Read through before any question is asked, so that what is wrong is found first.
    total = sum(1 for _ in datasets.examples(context, checked))
    results = work.folder / "results"
    results.mkdir(exist_ok=True)
    file = results / "examples.jsonl"
    answered = frozenset(example["row"] for example in _whole_lines(file))  # by an attempt that was lost
    if answered:
        print(f"going on from {len(answered)} of {total} examples")
    if len(answered) < total:
        body = dict(sampling_body(request.sampling_params), model=model.id, stream=False)
        answers = dataset_source.rows(context, checked, datasets.EXAMPLES, but=answered).map_batches(
            Ask,
            fn_constructor_args=(context.config.model_dump(mode="json"), job.tenant, body),
            batch_size=BATCH_SIZE,
            concurrency=1,
            num_cpus=evaluations.ASKER_CPUS,
        )
        _score(work, request, answers, total, file)
    totals = _totals(request, file)
    work.reporter.metrics.log(0, totals.items())
    work.reporter.metrics.progress(total, total, "examples", 0)
    name = evaluations.results_name(job.tenant, job.uuid)
    files = driver.publish(work, name, results)
    kept = {"path": context.artifacts.url(name), "files": [asdict(one) for one in files]}
    return driver.Outcome(kept, driver.artifact_row(work, name, "metric", files, {"model": model.id, **totals}))


def _score(
    work: driver.Work, request: EvaluateQuestionAnsweringRequest, answers: ray.data.Dataset, total: int, file: Path
) -> None:
    """Scores the answers as they come, and adds each to the file."""
    metrics = {metric.value: METRICS[metric] for metric in request.metrics}
    before = done = sum(1 for _ in _whole_lines(file))
    first, process = time.time(), psutil.Process()
    with file.open("a") as lines:
        for row in _rows(answers):
            example = json.loads(row.pop("value"))
            scores = {name: float(metric(example["answer"], row["answer"])) for name, metric in metrics.items()}
            kept = row | {"messages": example["messages"], "expected": example["answer"], **scores}
            lines.write(json.dumps(kept) + "\n")
            done += 1
            if done % BATCH_SIZE == 0:
                lines.flush()
                print(f"{done} of {total} examples", flush=True)
                speed = (done - before) / (time.time() - first)
                work.reporter.metrics.log(done, [("examples_per_second", speed), *resources(process).items()])
                work.reporter.metrics.progress(done, total, "examples", (total - done) / speed)


def _totals(request: EvaluateQuestionAnsweringRequest, file: Path) -> dict[str, float]:
    """The mean of each metric, the sums of the tokens, how many examples the model's shields did not pass, and the time
    from the first question to the last answer."""
    names = [metric.value for metric in request.metrics]
    sums = dict.fromkeys([*names, "prompt_tokens", "completion_tokens"], 0.0)
    first, last, done, violations = float("inf"), 0.0, 0, 0
    for example in _whole_lines(file):
        for name in sums:
            sums[name] += example[name]
        first, last, done = min(first, example["started"]), max(last, example["ended"]), done + 1
        violations += bool(example.get("shield_violation"))
    totals = {name: value / done if name in names else value for name, value in sums.items()}
    return totals | {"examples": float(done), "shield_violations": float(violations), "seconds": last - first}


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The examples in a file; a line that a lost attempt did not finish is cut off."""
    if not file.exists():
        return
    with file.open("rb+") as lines:
        end = 0
        while (line := lines.readline()).endswith(b"\n"):
            end += len(line)
            yield json.loads(line)
        lines.truncate(end)


def _rows(answers: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for row in answers.iter_rows():
        yield {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(
        driver.run(
            EvaluateQuestionAnsweringRequest, evaluations.question_answering, evaluations.resources, question_answering
        )
    )

"""Evaluation by question answering: Ray Data asks the model that serves, and each answer is scored.

    ray job submit -- python -m jobs.evaluate --config jobs/examples/evaluate.yaml

The file holds the body of POST /evaluate/question_answering/. The scores become the job's metrics, and every example
with its output and scores a line of `examples.jsonl` among the artifacts.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.data
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

from jobs import driver
from stack import datasets, evaluations
from stack.api.evaluations import EvaluateQuestionAnsweringRequest, QuestionAnsweringMetric
from stack.config import Config
from stack.context import Context
from stack.errors import StackError, Unavailable
from stack.inference import sampling_body

# SQuAD's metrics as transformers has them: metric(expected, answer), from 0 to 1.
METRICS = {QuestionAnsweringMetric.em: compute_exact, QuestionAnsweringMetric.f1: compute_f1}
# How many questions one worker asks at once; the engine batches them.
BATCH_SIZE = 32
# How often a question is asked while the model cannot answer for the moment.
TRIES = 6


def question_answering(context: Context, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
    """Asks a model every question of a data set and scores its answers against the expected ones."""
    model = evaluations.model_of(context, request.checkpoint)
    dataset = datasets.resolve(context, request.dataset)
    questions = [
        {"row": number, "messages": json.dumps(example.messages), "expected": example.answer}
        for number, example in enumerate(datasets.examples(context, dataset), start=1)
    ]
    body = dict(sampling_body(request.sampling_params), model=model.id, stream=False)
    answered = ray.data.from_items(questions).map_batches(
        Ask,
        fn_constructor_args=(context.config.model_dump(mode="json"), body),
        batch_size=BATCH_SIZE,
        concurrency=1,
        num_cpus=0.25,
    )
    with TemporaryDirectory() as folder:
        totals = _score(context, request, answered, len(questions), Path(folder))
        name = evaluations.results_name(request.job_uuid)
        files = context.artifacts.publish(name, Path(folder))
    context.store.record_progress(
        request.job_uuid,
        {"done": len(questions), "total": len(questions), "unit": "examples", "seconds_left": 0},
        [(metric, 0, value) for metric, value in totals.items()],
    )
    kept = {"path": context.artifacts.url(name), "files": [asdict(file) for file in files]}
    return driver.Outcome(kept, artifact=name)


class Ask:
    """A worker of Ray Data that asks the questions of a batch side by side."""

    def __init__(self, config: dict[str, Any], body: dict[str, Any]) -> None:
        self._models = Context.open(Config.parse(config, "config")).models
        self._body = body

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        questions = zip(batch["row"], batch["messages"], strict=True)
        answers = await asyncio.gather(*(self._ask(row, json.loads(messages)) for row, messages in questions))
        yield dict(batch) | {name: [answer[name] for answer in answers] for name in answers[0]}

    async def _ask(self, row: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.time()
        try:
            answer = json.loads(await self._answer(dict(self._body, messages=messages)))
        except StackError as error:
            raise type(error)(f"row {row}: {error.message}") from error
        return {
            "answer": answer["choices"][0]["message"]["content"] or "",
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "completion_tokens": answer["usage"]["completion_tokens"],
            "started": started,
            "ended": time.time(),
        }

    async def _answer(self, body: dict[str, Any]) -> bytes:
        for _ in range(TRIES - 1):
            try:
                return await self._models.answer("chat", body)
            except Unavailable as error:  # a replica is being replaced, say
                await asyncio.sleep(error.retry_after or 1)
        return await self._models.answer("chat", body)


def _score(
    context: Context,
    request: EvaluateQuestionAnsweringRequest,
    answered: ray.data.Dataset,
    total: int,
    folder: Path,
) -> dict[str, float]:
    """Scores the answers as they come, writes each to `examples.jsonl`, and returns the totals."""
    metrics = {metric.value: METRICS[metric] for metric in request.metrics}
    sums = dict.fromkeys([*metrics, "prompt_tokens", "completion_tokens"], 0.0)
    first, last, done = float("inf"), 0.0, 0
    with (folder / "examples.jsonl").open("w") as lines:
        for row in _rows(answered):
            scores = {name: float(metric(row["expected"], row["answer"])) for name, metric in metrics.items()}
            for name in sums:
                sums[name] += scores[name] if name in scores else row[name]
            first, last, done = min(first, row["started"]), max(last, row["ended"]), done + 1
            example = {"row": row["row"], "messages": json.loads(row["messages"])}
            lines.write(json.dumps(example | {"expected": row["expected"], "answer": row["answer"], **scores}) + "\n")
            if done % BATCH_SIZE == 0:
                progress = {"done": done, "total": total, "unit": "examples"}
                left = (last - first) / done * (total - done)
                context.store.record_progress(request.job_uuid, progress | {"seconds_left": left}, [])
    totals = {name: value / done if name in metrics else value for name, value in sums.items()}
    return totals | {"examples": float(done), "seconds": last - first}


def _rows(answered: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for row in answered.iter_rows():
        yield {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(driver.run(EvaluateQuestionAnsweringRequest, evaluations.question_answering, question_answering))

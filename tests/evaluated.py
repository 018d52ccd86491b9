"""Evaluations that have ended, with the files that they write: real scores of answers that tests give."""

import json
from pathlib import Path
from typing import Any

from jobs import evaluation_results, scores
from stack import evaluations
from stack.api.evaluations import (
    EvaluateJudgedRequest,
    EvaluateQuestionAnsweringRequest,
    EvaluateTextGenerationRequest,
)
from stack.context import Context
from tests import samples
from tests.samples import evaluation

QUESTIONS = {
    "question_answering": EvaluateQuestionAnsweringRequest,
    "text_generation": EvaluateTextGenerationRequest,
    "judged": EvaluateJudgedRequest,
}


def example(row: int, answer: str | None, metrics: list[str], nll: float = 2.0) -> dict[str, Any]:
    """A row of results; without an answer, one that failed."""
    found: dict[str, Any] = dict(row=row, id=f"q{row}", expected="Paris", answer=answer or "", shield_violation="")
    found |= dict(messages=[{"role": "user", "content": "Which city?"}], started=1.0, ended=2.0, error="")
    found |= dict(prompt_tokens=7, completion_tokens=3)
    if answer is None:
        found |= dict(error="away", prompt_tokens=0, completion_tokens=0, started=None, ended=None)
    else:
        for score in scores.scorers(metrics):
            found |= score("Paris", answer)
        if "perplexity" in metrics:
            found |= scores.perplexity(nll, 2)
        if "rating" in metrics:
            found["rating"] = 3.0
        if "win_rate" in metrics:
            found |= scores.win_rate(0.9, 0.9)
    return found


def completed(
    context: Context, folder: Path, uuid: str, answers: list[str | None], task: str = "question_answering",
    metrics: tuple[str, ...] = ("em", "f1"), sha256: str = "0" * 64, nll: float = 2.0, tenant: str = "default",
    **changes: Any,
) -> None:  # fmt: skip
    """An evaluation that has ended, with its artifact, as its job leaves it."""
    results = folder / uuid
    results.mkdir()
    file = results / "examples.jsonl"
    rows = [example(row, answer, list(metrics), nll) for row, answer in enumerate(answers, 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))  # as they come
    request = QUESTIONS[task].model_validate(evaluation("test", metrics=metrics, **changes))
    summary = evaluation_results.summarize(request, file, "small", sha256, 1.0, changes.get("opponent"))
    evaluation_results.write_parquet(file, request.metrics)
    kind = "evaluate" if task == "question_answering" else f"evaluate_{task}"
    samples.add_job(context.store, uuid, kind, tenant)
    job = samples.start(context.store, uuid, tenant)
    context.artifacts.publish(evaluations.results_name(tenant, uuid), results)
    assert context.store.jobs.complete(job.id, 1, {"path": "file:///x", "files": [], **summary.kept()})

"""The results of an evaluation: its examples in a file of JSON Lines and as Parquet, and what they come to."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from jobs import scores
from jobs.row_log import lines_of
from stack import intervals
from stack.api.evaluations import AnyEvaluationRequest, EvaluateJudgedRequest
from stack.evaluations import PARQUET_FILE
from stack.intervals import Estimate

EXAMPLES_FILE = "examples.jsonl"
BATCH_ROWS = 1_000
_MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
_COLUMNS: dict[str, pyarrow.DataType] = {
    "row": pyarrow.int64(),
    "id": pyarrow.string(),
    "messages": _MESSAGES,
    "expected": pyarrow.string(),
    "answer": pyarrow.string(),
    "opponent_answer": pyarrow.string(),
    "error": pyarrow.string(),
    "shield_violation": pyarrow.string(),
    "prompt_tokens": pyarrow.int64(),
    "completion_tokens": pyarrow.int64(),
    "started": pyarrow.float64(),
    "ended": pyarrow.float64(),
}


@dataclass(frozen=True)
class Summary:
    """What an evaluation has found. `estimates` are the scores by name; those of which no example has a value are
    missing. `seconds` are those that all attempts took until the last row was answered. `judged` says by whom, against
    whom and by the hash of which rubric, where a judge has."""

    task: str
    model: str
    dataset_sha256: str
    estimates: dict[str, Estimate]
    examples: int
    failed: int
    shield_violations: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    bleu_signature: str | None
    judged: dict[str, str | None]

    def figures(self) -> dict[str, float]:
        """All that are numbers, as metrics of the job's run."""
        ends = {f"{name}_low": one.low for name, one in self.estimates.items()}
        ends |= {f"{name}_high": one.high for name, one in self.estimates.items()}
        counts = ("examples", "failed", "shield_violations", "prompt_tokens", "completion_tokens", "seconds")
        values = {name: one.value for name, one in self.estimates.items()}
        return values | ends | {name: float(getattr(self, name)) for name in counts}

    def kept(self) -> dict[str, Any]:
        """What the job's row keeps of it, by which it can be compared with another one."""
        about = dict(task=self.task, model=self.model, dataset_sha256=self.dataset_sha256, scores=[*self.estimates])
        return about | ({"bleu_signature": self.bleu_signature} if self.bleu_signature else {}) | self.judged


def summarize(
    request: AnyEvaluationRequest,
    file: Path,
    model: str,
    dataset_sha256: str,
    seconds: float,
    opponent: str | None = None,
) -> Summary:
    """Adds up the examples in a file, which took so many seconds. `opponent` is the id of the model that the answers
    were compared with."""
    sums = dict.fromkeys(("prompt_tokens", "completion_tokens"), 0)
    examples, failed, violations = 0, 0, 0
    for example in lines_of(file):
        examples += 1
        failed += bool(example["error"])
        violations += bool(example["shield_violation"])
        for name in sums:
            sums[name] += example[name]
    return Summary(
        task=request.task,
        model=model,
        dataset_sha256=dataset_sha256,
        estimates=_estimates(request.metrics, file),
        examples=examples,
        failed=failed,
        shield_violations=violations,
        seconds=seconds,
        bleu_signature=scores.bleu_signature() if "bleu" in request.metrics else None,
        judged=_judged(request, opponent),
        **sums,
    )


def _judged(request: AnyEvaluationRequest, opponent: str | None) -> dict[str, str | None]:
    if not isinstance(request, EvaluateJudgedRequest):
        return {}
    rubric = hashlib.sha256(request.rubric.encode("utf-8", "surrogatepass")).hexdigest()
    return {"judge": request.judge, "opponent": opponent, "rubric_sha256": rubric}


def write_parquet(file: Path, metrics: Sequence[str]) -> None:
    """Writes the examples in a file of JSON Lines as Parquet beside it, a batch at a time."""
    schema = pyarrow.schema([*_COLUMNS.items(), *((name, pyarrow.float64()) for name in scores.columns(metrics))])
    examples = lines_of(file)
    with pyarrow.parquet.ParquetWriter(file.with_name(PARQUET_FILE), schema, compression="zstd") as writer:
        while batch := list(islice(examples, BATCH_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist([_as_utf8(example) for example in batch], schema))


def _estimates(metrics: Sequence[str], file: Path) -> dict[str, Estimate]:
    """The scores of the examples in a file, of which few are in memory at once."""
    columns = scores.columns(metrics)
    sums = {name: intervals.Sums(intervals.aggregate(name)) for name in scores.names(metrics)}
    places = {name: [columns.index(one) for one in intervals.aggregate(name).columns] for name in sums}
    rows = ((example["row"], *(example.get(one, math.nan) for one in columns)) for example in lines_of(file))
    while batch := list(islice(rows, BATCH_ROWS)):
        values = np.array(batch, dtype=np.float64)
        for name, one in sums.items():
            one.add(values[:, 0].astype(np.int64), values[:, 1:][:, places[name]])
    found = {name: one.estimate() for name, one in sums.items()}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _as_utf8(value: Any) -> Any:
    """The same without halves of characters, which JSON can hold, and Parquet cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: _as_utf8(one) for name, one in value.items()}
    return [_as_utf8(one) for one in value] if isinstance(value, list) else value

"""Two evaluations of the same examples side by side: what differs by metric, how sure that is, and where.

The examples are paired by their rows, as both evaluations had the same content of a data set. What one of the two could
not score counts in neither.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from stack import evaluations, intervals, jobs
from stack.api.evaluations import (
    ChangedExample,
    ComparedMetric,
    CompareEvaluationsRequest,
    CompareEvaluationsResponse,
    Interval,
    Outcomes,
)
from stack.api.jobs import JobStatus
from stack.context import Context
from stack.errors import BadInput, Conflict, StackError, TooLarge

# A request is answered while it waits: by a thread of the gateway, which has others to answer.
MAX_EXAMPLES = 200_000
# What is told of a text.
MAX_TEXT = 2_000
# Whose value of an example is 0 or 1.
BINARY = ("em", "ast")
# What else a score depends on, by the names under which jobs keep it. It must be the same in both evaluations.
_JUDGED = ("judge", "rubric_sha256")
_DEPENDS_ON = {
    "bleu": ("bleu_signature",),
    "rating": _JUDGED,
    "win_rate": (*_JUDGED, "opponent"),
    "consistent": (*_JUDGED, "opponent"),
}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Evaluation:
    """A completed evaluation: what its job's row keeps, and its examples."""

    uuid: str
    about: dict[str, Any]
    file: Path


@dataclass(frozen=True)
class _Scored:
    """Columns of the examples of an evaluation, in the order of their rows; NaN where there is no value."""

    rows: NDArray[np.int64]
    columns: dict[str, Array]
    failed: NDArray[np.bool_]

    def at(self, places: NDArray[np.int64]) -> "_Scored":
        return _Scored(
            self.rows[places], {name: one[places] for name, one in self.columns.items()}, self.failed[places]
        )

    def of(self, names: Sequence[str]) -> Array:
        return np.column_stack([self.columns[name] for name in names])


def compare(context: Context, request: CompareEvaluationsRequest) -> CompareEvaluationsResponse:
    """Compares two completed evaluations.

    Raises NotFound, Conflict for one that is not completed, of another data set or by another judge, BadInput where
    they have nothing that could be compared, and TooLarge.
    """
    first = _completed(context, request.first, "first")
    second = _completed(context, request.second, "second")
    names = _common_scores(first, second)
    columns = list(dict.fromkeys([*names, *(one for name in names for one in intervals.aggregate(name).columns)]))
    left, right = _read(first.file, columns), _read(second.file, columns)
    _, of_left, of_right = np.intersect1d(left.rows, right.rows, assume_unique=True, return_indices=True)
    left, right = left.at(of_left), right.at(of_right)
    metrics = [found for name in names if (found := _compared(name, left, right)) is not None]
    changed = _changed(names[0], left, right)
    return CompareEvaluationsResponse(
        task=first.about["task"],
        first=first.uuid,
        second=second.uuid,
        dataset_sha256=first.about["dataset_sha256"],
        examples=len(left.rows),
        left_out=int((left.failed | right.failed).sum()),
        metrics=metrics,
        changed_examples=len(changed),
        changed=_told(names[0], [int(row) for row in left.rows[changed[: request.most]]], first.file, second.file),
    )


def _completed(context: Context, uuid: str, field: str) -> _Evaluation:
    try:
        job = jobs.get(context, uuid, evaluations.KINDS)
        if job.status != JobStatus.completed:
            raise Conflict(f"the evaluation {uuid!r} is {job.status}; allowed: completed ones")
        about = job.result or {}
        if "dataset_sha256" not in about:
            raise BadInput(
                f"the evaluation {uuid!r} keeps no examples of a data set: it is a benchmark, or of an earlier "
                "release; allowed: other ones"
            )
        folder = context.artifacts.local(evaluations.results_name(context.tenant, uuid))
        return _Evaluation(uuid, about, folder / evaluations.PARQUET_FILE)
    except StackError as error:
        error.param = field
        raise


def _common_scores(first: _Evaluation, second: _Evaluation) -> list[str]:
    """The scores that both have. Raises BadInput and Conflict where the two cannot be compared."""
    if first.about["task"] != second.about["task"]:
        raise BadInput(
            f"{first.uuid!r} is an evaluation of {first.about['task']}, {second.uuid!r} one of "
            f"{second.about['task']}; allowed: two of the same",
            param="second",
        )
    hashes = [one.about["dataset_sha256"] for one in (first, second)]
    if hashes[0] != hashes[1]:
        raise Conflict(
            f"the evaluations are of different data: {first.uuid!r} is of the content with the SHA-256 {hashes[0]}, "
            f"{second.uuid!r} of {hashes[1]}; allowed: two of the same",
            param="second",
        )
    scores, others = first.about["scores"], second.about["scores"]
    if common := [name for name in scores if name in others]:
        _require_same_measure(common, first, second)
        return common
    raise BadInput(
        f"the evaluations have no score in common: {first.uuid!r} has {_listed(scores)}, {second.uuid!r} "
        f"{_listed(others)}; allowed: two with one in common",
        param="second",
    )


def _require_same_measure(scores: Sequence[str], first: _Evaluation, second: _Evaluation) -> None:
    for score in scores:
        for what in _DEPENDS_ON.get(score, ()):
            one, other = first.about.get(what), second.about.get(what)
            if one != other:
                raise Conflict(
                    f"the evaluations have not the same {score}: the {what} of {first.uuid!r} is {one!r}, that of "
                    f"{second.uuid!r} {other!r}; allowed: two with the same",
                    param="second",
                )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _read(file: Path, columns: Sequence[str]) -> _Scored:
    examples = pyarrow.parquet.ParquetFile(file)
    if examples.metadata.num_rows > MAX_EXAMPLES:
        message = f"the evaluation has {examples.metadata.num_rows} examples; allowed: at most {MAX_EXAMPLES}"
        raise TooLarge(message)
    table: pyarrow.Table = examples.read(columns=["row", "error", *columns]).sort_by("row")
    values = {name: table[name].to_numpy() for name in columns}
    return _Scored(table["row"].to_numpy(), values, pyarrow.compute.not_equal(table["error"], "").to_numpy())


def _compared(name: str, left: _Scored, right: _Scored) -> ComparedMetric | None:
    """A metric of both, over the examples of which both have it; None where there are none."""
    aggregate = intervals.aggregate(name)
    first, second = left.of(aggregate.columns), right.of(aggregate.columns)
    known = ~np.isnan(np.hstack([first, second])).any(axis=1)
    first, second = first[known], second[known]
    one, other = intervals.estimate(aggregate, first), intervals.estimate(aggregate, second)
    difference = intervals.difference(aggregate, first, second)
    if one is None or other is None or difference is None:
        return None
    better: Literal["higher", "lower"] = "higher" if aggregate.higher_is_better else "lower"
    return ComparedMetric(
        name=name,
        better=better,
        first=Interval(**asdict(one)),
        second=Interval(**asdict(other)),
        difference=Interval(**asdict(difference)),
        outcomes=_outcomes(first[:, 0] == 1, second[:, 0] == 1) if name in BINARY else None,
    )


def _outcomes(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Outcomes:
    """The counts of McNemar's test (1947)."""
    return Outcomes(
        both=int((first & second).sum()),
        only_first=int((first & ~second).sum()),
        only_second=int((~first & second).sum()),
        neither=int((~first & ~second).sum()),
    )


def _changed(name: str, left: _Scored, right: _Scored) -> NDArray[np.int64]:
    """Where the examples stand whose score differs, the greatest difference first."""
    differences = np.nan_to_num(np.abs(right.columns[name] - left.columns[name]))
    order: NDArray[np.int64] = np.lexsort((left.rows, -differences))
    return order[: np.count_nonzero(differences)]


def _told(name: str, rows: list[int], first: Path, second: Path) -> list[ChangedExample]:
    """The examples of these rows, in their order."""
    before, after = _texts(first, name, rows), _texts(second, name, rows)
    return [
        ChangedExample(
            row=row,
            id=before[row]["id"],
            prompt=_cut(before[row]["messages"][-1]["content"] or "") if before[row]["messages"] else "",
            expected=_cut(before[row]["expected"]),
            metric=name,
            first_answer=_cut(before[row]["answer"]),
            second_answer=_cut(after[row]["answer"]),
            first_score=before[row][name],
            second_score=after[row][name],
        )
        for row in rows
    ]


def _texts(file: Path, name: str, rows: list[int]) -> dict[int, dict[str, Any]]:
    if not rows:
        return {}
    columns = ["row", "id", "messages", "expected", "answer", name]
    table = pyarrow.parquet.read_table(file, columns=columns, filters=[("row", "in", rows)])
    return {example["row"]: example for example in table.to_pylist()}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"

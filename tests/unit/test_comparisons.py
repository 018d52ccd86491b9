"""Two evaluations side by side: the scores of real answers, in the files that evaluations write."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jobs import scores
from stack import comparisons
from stack.api.evaluations import CompareEvaluationsRequest, CompareEvaluationsResponse
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError, TooLarge
from tests import samples
from tests.evaluated import completed


def compared(context: Context, **changes: Any) -> CompareEvaluationsResponse:
    return comparisons.compare(
        context, CompareEvaluationsRequest.model_validate({"first": "a", "second": "b"} | changes)
    )


def refusal(context: Context, **changes: Any) -> StackError:
    with pytest.raises(StackError) as caught:
        compared(context, **changes)
    return caught.value


BEFORE: list[str | None] = ["Paris", "London", "London", "Paris", None, "Paris"]
AFTER: list[str | None] = ["Paris", "Paris", "Paris", "Rome", "Paris", None]


def test_scores_differences_and_counts_are_of_the_examples_that_both_have(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE)
    completed(context, tmp_path, "b", AFTER)
    found = compared(context)
    assert (found.examples, found.left_out, found.task) == (6, 2, "question_answering")
    em, f1 = found.metrics
    assert (em.name, em.better, em.first.value, em.second.value) == ("em", "higher", 0.5, 0.75)
    assert (em.difference.value, em.difference.examples) == (0.25, 4)
    assert em.difference.low < 0.25 < em.difference.high
    assert em.outcomes is not None
    assert em.outcomes.model_dump() == {"both": 1, "only_first": 1, "only_second": 2, "neither": 0}
    assert f1.outcomes is None


def test_the_examples_that_flipped_are_told_with_both_answers(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE)
    completed(context, tmp_path, "b", AFTER)
    found = compared(context)
    assert found.changed_examples == 3
    assert [(one.row, one.id, one.first_score, one.second_score) for one in found.changed] == [
        (2, "q2", 0.0, 1.0),
        (3, "q3", 0.0, 1.0),
        (4, "q4", 1.0, 0.0),
    ]
    last = found.changed[-1]
    assert (last.prompt, last.expected, last.first_answer, last.second_answer) == (
        "Which city?", "Paris", "Paris", "Rome",
    )  # fmt: skip
    assert [one.row for one in compared(context, most=1).changed] == [2]
    assert compared(context, most=0).changed == []
    assert compared(context, most=0).changed_examples == 3


def test_an_evaluation_differs_from_itself_in_nothing(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE)
    found = compared(context, second="a")
    assert all((one.difference.low, one.difference.high) == (0, 0) for one in found.metrics)
    assert found.changed == []


def test_bleu_and_perplexity_are_compared_as_those_of_the_sets(context: Context, tmp_path: Path) -> None:
    answers: list[str | None] = ["Paris is big", "the city of light", "Paris"]
    metrics = ("bleu", "perplexity", "rouge")
    completed(context, tmp_path, "a", answers, "text_generation", metrics)
    completed(context, tmp_path, "b", answers[::-1], "text_generation", metrics, nll=4.0)
    found = {one.name: one for one in compared(context).metrics}
    assert list(found) == ["bleu", "perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert found["perplexity"].better == "lower"
    assert found["perplexity"].difference.value == pytest.approx(2.718281828**2 - 2.718281828)
    assert found["bleu"].difference.value == 0
    assert found["rouge1"].difference.value == 0


def test_only_scores_that_both_have_are_compared(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE)
    completed(context, tmp_path, "b", AFTER, metrics=("f1",))
    assert [one.name for one in compared(context).metrics] == ["f1"]
    completed(context, tmp_path, "c", AFTER, metrics=("em",))
    error = refusal(context, first="b", second="c")
    assert isinstance(error, BadInput)
    assert "'b' has f1, 'c' em" in error.message


def test_evaluations_of_different_data_are_a_conflict_with_both_hashes(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE)
    completed(context, tmp_path, "b", AFTER, sha256="1" * 64)
    error = refusal(context)
    assert isinstance(error, Conflict)
    assert "0" * 64 in error.message
    assert "1" * 64 in error.message
    assert error.param == "second"


JUDGED = {"task": "judged", "judge": "small", "rubric": "Be brief.", "metrics": ("rating", "win_rate")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": "other"}, "the judge of 'a' is 'small', that of 'b' 'other'"),
        ({"rubric": "Be long."}, "the rubric_sha256 of 'a' is"),
        ({"opponent": "other"}, "the evaluations have not the same win_rate: the opponent of 'a' is None"),
    ],
)
def test_what_different_judges_say_or_of_different_opponents_is_not_compared(
    context: Context, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    completed(context, tmp_path, "a", BEFORE, **JUDGED)
    completed(context, tmp_path, "b", AFTER, **JUDGED | changes)
    error = refusal(context)
    assert isinstance(error, Conflict)
    assert words in error.message
    assert error.param == "second"


def test_what_one_judge_says_is_compared_and_ratings_whatever_the_opponent(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE, **JUDGED)
    completed(context, tmp_path, "b", AFTER, **JUDGED)
    assert [one.name for one in compared(context).metrics] == ["rating", "win_rate", "consistent"]
    completed(context, tmp_path, "c", AFTER, **JUDGED | {"metrics": ("rating",)})
    completed(context, tmp_path, "d", AFTER, **JUDGED | {"opponent": "other"})
    assert [one.name for one in compared(context, first="c", second="d").metrics] == ["rating"]


def test_bleu_is_compared_only_where_it_was_computed_alike(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    completed(context, tmp_path, "a", BEFORE, "text_generation", ("bleu", "rouge"))
    monkeypatch.setattr(scores, "bleu_signature", lambda: "of another release")
    completed(context, tmp_path, "b", AFTER, "text_generation", ("bleu", "rouge"))
    error = refusal(context)
    assert isinstance(error, Conflict)
    assert "that of 'b' 'of another release'" in error.message
    completed(context, tmp_path, "c", AFTER, "text_generation", ("rouge",))
    assert "rouge1" in [one.name for one in compared(context, second="c").metrics]


def test_evaluations_of_different_tasks_are_refused(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE)
    completed(context, tmp_path, "b", AFTER, "text_generation", ("bleu",))
    error = refusal(context)
    assert isinstance(error, BadInput)
    assert "question_answering" in error.message
    assert "text_generation" in error.message


def test_only_completed_evaluations_are_compared(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", BEFORE)
    error = refusal(context)
    assert isinstance(error, NotFound)
    assert error.param == "second"
    samples.add_job(context.store, "b")
    error = refusal(context)
    assert isinstance(error, Conflict)
    assert error.message == "the evaluation 'b' is scheduled; allowed: completed ones"
    samples.add_job(context.store, "tune", "supervised_fine_tune")
    assert isinstance(refusal(context, second="tune"), NotFound)


def test_an_evaluation_of_an_earlier_release_is_refused(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "b", BEFORE)
    samples.add_job(context.store, "a")
    samples.start(context.store, "a")
    samples.complete(context.store, "a", {"path": "file:///x", "files": []})
    assert "earlier release" in refusal(context).message


def test_evaluations_that_would_keep_the_gateway_busy_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "examples.parquet"
    count = 200_001
    columns = {"row": range(count), "error": [""] * count, "em": [1.0] * count}
    pyarrow.parquet.write_table(pyarrow.table({name: list(one) for name, one in columns.items()}), file)
    with pytest.raises(TooLarge, match="has 200001 examples; allowed: at most 200000"):
        comparisons._read(file, ["em"])


def test_long_texts_are_cut(context: Context, tmp_path: Path) -> None:
    completed(context, tmp_path, "a", ["x" * 10_000])
    completed(context, tmp_path, "b", ["Paris"])
    (changed,) = compared(context).changed
    assert len(changed.first_answer) == comparisons.MAX_TEXT

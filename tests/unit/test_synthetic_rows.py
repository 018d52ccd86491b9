"""What becomes of scored generations: rows that trainings take, and rejections with their reasons."""

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from stack.api.datasets import TrainEvalDataset
from stack.api.synthetic_data_generation import FilteringFunction, SyntheticDataJobRequest
from stack.api.wire import describe
from stack.synthetic_rows import (
    Chosen,
    Generation,
    Pairs,
    Rejection,
    Scored,
    ScoredPair,
    columns,
    of_passage,
    of_prompt,
)
from stack.training_rows import DIALOGS, PREFERENCES

QUESTION = {"role": "user", "content": "Where?"}


def request(**fields: Any) -> SyntheticDataJobRequest:
    body = {"job_uuid": "grow-1", "dataset": "prompts", "filtering_function": "none"} | fields
    return SyntheticDataJobRequest.model_validate(body)


def generation(text: str, score: float, stop_reason: str = "end_of_turn") -> Generation:
    message = {"role": "assistant", "content": text, "stop_reason": stop_reason, "tool_calls": []}
    return Generation(message, score)


def chosen(*generations: Generation, **fields: Any) -> Chosen:
    return of_prompt(request(**fields), Scored(7, "a", [QUESTION], list(generations)))


def reasons(found: Chosen) -> Counter[str]:
    return Counter(one.reason for one in found.rejections)


def read(found: Chosen, shape: Any, **fields: Any) -> list[Any]:
    """The rows as a training reads them."""
    described = TrainEvalDataset(columns=columns(request(**fields)), content_url="upload://a/b.jsonl")
    assert shape.columns_problem(described) is None
    assert all(row.keys() == described.columns.keys() for row in found.rows)
    return [shape.read(number, row, described) for number, row in enumerate(found.rows, 1)]


GENERATIONS = [generation("b", 1.0), generation("best", 3.0), generation("worst", -2.0), generation("c", 1.0)]


def test_the_best_of_k_is_an_example_to_learn() -> None:
    found = chosen(*GENERATIONS)
    (example,) = read(found, DIALOGS)
    assert [message["content"] for message in example.messages] == ["Where?", "best"]
    assert (found.rows[0]["id"], found.rows[0]["score"]) == ("a", 3.0)
    assert reasons(found) == {"not_the_best": 3}


def test_of_equal_ones_the_first_is_the_best() -> None:
    assert chosen(generation("x", 1), generation("y", 1)).rows[0]["dialog"][-1]["content"] == "x"


def test_nothing_is_learned_where_none_passes_and_the_reasons_say_why() -> None:
    found = chosen(*GENERATIONS, threshold=10)
    assert found.rows == []
    assert reasons(found) == {"below_threshold": 4}
    found = chosen(*GENERATIONS, threshold=0, filtering_function="top_k")
    assert reasons(found) == {"below_threshold": 1, "filtered": 2}


def test_an_answer_that_was_cut_off_is_not_learned() -> None:
    found = chosen(generation("cut", 5, "out_of_tokens"), generation("whole", 1))
    assert found.rows[0]["dialog"][-1]["content"] == "whole"
    assert reasons(found) == {"cut_off": 1}
    assert chosen(generation("cut", 5, "out_of_tokens")).rows == []


def test_best_and_worst_are_a_pair_that_dpo_takes() -> None:
    found = chosen(*GENERATIONS, output="preferences")
    (pair,) = read(found, PREFERENCES, output="preferences")
    assert (pair.chosen, pair.rejected) == ("best", "worst")
    assert [message["content"] for message in pair.messages] == ["Where?"]
    assert (found.rows[0]["chosen_score"], found.rows[0]["rejected_score"]) == (3.0, -2.0)


@pytest.mark.parametrize(("margin", "rows"), [(0, 1), (4.9, 1), (5, 1), (5.1, 0)])
def test_a_pair_needs_the_margin(margin: float, rows: int) -> None:
    found = chosen(*GENERATIONS, output="preferences", min_margin=margin)
    assert len(found.rows) == rows
    assert reasons(found) == ({"in_between": 2} if rows else {"margin": 4})


def test_equal_scores_and_equal_texts_are_no_pair() -> None:
    assert reasons(chosen(generation("a", 1), generation("b", 1), output="preferences")) == {"margin": 2}
    assert reasons(chosen(generation("a", 1), generation("a", 2), output="preferences")) == {"margin": 2}
    assert chosen(generation("a", 1), output="preferences", num_generations=2).rows == []


def test_the_rejected_one_may_be_what_the_filter_drops_but_the_chosen_one_may_not() -> None:
    found = chosen(*GENERATIONS, output="preferences", threshold=2)
    assert (found.rows[0]["chosen"], found.rows[0]["rejected"]) == ("best", "worst")
    assert reasons(found) == {"below_threshold": 2}, "the worst one is in the row"
    assert chosen(*GENERATIONS, output="preferences", threshold=4).rows == []


@pytest.mark.parametrize("output", ["sft", "preferences", "scored"])
@pytest.mark.parametrize("function", list(FilteringFunction))
@pytest.mark.parametrize("threshold", [None, 0.0, 1.5, 9.0])
def test_every_generation_is_in_a_row_or_is_rejected_once(output: str, function: str, threshold: float | None) -> None:
    generations = [*GENERATIONS, generation("cut", 4.0, "out_of_tokens"), generation(" ", 5.0), generation("", -9.0)]
    wanted = dict(output=output, filtering_function=function, filter_k=3, threshold=threshold)
    found = chosen(*generations, **wanted)
    in_rows = {"sft": 1, "preferences": 2, "scored": sum(len(row.get("generations", ())) for row in found.rows)}
    assert len(found.rows) <= 1
    assert len(found.rows) * in_rows[output] + len(found.rejections) == len(generations)


def test_what_says_nothing_is_neither_learned_nor_in_a_pair() -> None:
    empty = [generation(" \n", 9.0), generation("", -9.0)]
    found = chosen(*GENERATIONS, *empty)
    assert found.rows[0]["dialog"][-1]["content"] == "best"
    assert reasons(found) == {"not_the_best": 3, "empty": 2}
    found = chosen(*GENERATIONS, *empty, output="preferences")
    assert (found.rows[0]["chosen"], found.rows[0]["rejected"]) == ("best", "worst")
    assert reasons(found) == {"in_between": 2, "empty": 2}


def test_what_sigmoid_drops_by_chance_is_not_said_to_be_below_a_threshold() -> None:
    found = chosen(*[generation(str(at), -5.0) for at in range(20)], filtering_function="sigmoid", threshold=0.0)
    assert set(reasons(found)) <= {"filtered", "not_the_best"}
    assert reasons(found)["filtered"] > 10


def test_scored_dialogs_have_all_that_is_kept() -> None:
    found = chosen(*GENERATIONS, output="scored", filtering_function="top_k", filter_k=2)
    (row,) = found.rows
    assert row.keys() == columns(request(output="scored")).keys()
    assert row["dialog"] == [QUESTION]
    assert [one["score"] for one in row["generations"]] == [1.0, 3.0]
    assert reasons(found) == {"filtered": 2}
    assert chosen(*GENERATIONS, output="scored", threshold=9).rows == []


def pairs(*scores: float) -> Pairs:
    made = [ScoredPair(f"Question {at}?", f"Answer {at}", "the quote", 5, 14, score) for at, score in enumerate(scores)]
    return Pairs(3, "doc", 4, made)


def test_each_grounded_pair_that_is_kept_is_an_example_with_its_source() -> None:
    wanted = request(source="documents", filtering_function="top_k", filter_k=2)
    found = of_passage(wanted, pairs(1.0, 2.0, -1.0, 3.0))
    first, second = read(found, DIALOGS, source="documents")
    assert [message["content"] for message in first.messages] == ["Question 1?", "Answer 1"]
    assert [message["content"] for message in second.messages] == ["Question 3?", "Answer 3"]
    source = {name: found.rows[0][name] for name in ("id", "document", "quote", "start", "end")}
    assert source == {"id": "doc.4.0", "document": "doc", "quote": "the quote", "start": 5, "end": 14}
    assert found.rows[1]["id"] == "doc.4.1"
    assert reasons(found) == {"filtered": 2}


def test_scored_pairs_of_documents_have_their_source_too() -> None:
    wanted = dict(source="documents", output="scored", threshold=0.0)
    found = of_passage(request(**wanted), pairs(1.0, -1.0))
    (row,) = found.rows
    assert row.keys() == columns(request(**wanted)).keys()
    assert row["generations"][0]["message"]["content"] == "Answer 0"
    assert reasons(found) == {"below_threshold": 1}


def test_what_is_shown_of_a_rejection_is_bounded() -> None:
    told = Rejection(1, "a", "filtered", "x" * 5_000, 0.5).shown()
    assert (len(told["text"]), told["score"]) == (2_000, 0.5)
    assert "score" not in Rejection(1, "a", "error", "x").shown()
    assert Rejection(0, "", "duplicate", "x", of="y" * 5_000).shown()["of"] == "y" * 2_000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": None}, ["dataset is required with the source 'dataset'"]),
        ({"source": "documents", "dataset": None}, ["dataset or bank_id is required with the source 'documents'"]),
        ({"source": "self_instruct", "dataset": None}, ["seed_prompts is required"]),
        (
            {"source": "self_instruct", "seed_prompts": ["a"]},
            ["dataset cannot be used with the source 'self_instruct'"],
        ),
        ({"seed_prompts": ["a"]}, ["seed_prompts cannot be used with the source 'dataset'"]),
        ({"source": "memory_bank"}, ["source", "'dataset', 'self_instruct' or 'documents', not 'memory_bank'"]),
        ({"source": "self_instruct", "dataset": None, "seed_prompts": []}, ["seed_prompts", "at least 1 item"]),
        ({"source": "documents", "output": "preferences"}, ["allowed with the source 'documents': 'sft', 'scored'"]),
        ({"output": "preferences", "num_generations": 1}, ["needs num_generations of at least 2, not 1"]),
        ({"output": "text"}, ["'sft', 'preferences' or 'scored', not 'text'"]),
        ({"num_generations": 0}, ["num_generations", "not 0"]),
        ({"num_generations": 10_000}, ["num_generations", "not 10000"]),
        ({"max_failed_rows": -1}, ["max_failed_rows"]),
        ({"min_margin": -1}, ["min_margin"]),
        ({"max_similarity": 1}, ["max_similarity"]),
        ({"num_prompts": 20_001}, ["num_prompts"]),
        ({"passage_characters": 10}, ["passage_characters"]),
        ({"job_uuid": "x" * 81}, ["job_uuid", "80"]),
        ({"job_uuid": "../a"}, ["job_uuid"]),
        ({"dialogs": []}, ["unknown key 'dialogs'"]),
    ],
    ids=str,
)
def test_a_wrong_job_is_refused_with_what_is_allowed(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        request(**fields)
    for word in words:
        assert word in describe(caught.value)

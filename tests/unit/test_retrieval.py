"""The labelled retrieval data, and what answers are scored by: computed by hand."""

import gzip
import json
import math
from pathlib import Path

import pytest

from scripts import retrieval
from scripts.retrieval import Document, asked_in, documents_of, ndcg, read_documents, read_questions, recall
from stack.config import home

DATA = home() / "packaged-data" / "retrieval"  # as scripts/setup prepares it


def test_an_order_s_gain_is_discounted_by_the_rank() -> None:
    # a and c are relevant, and d, which is not found: 1/log2(2) + 1/log2(4) of 1/log2(2) + 1/log2(3) + 1/log2(4).
    assert ndcg(["a", "b", "c"], {"a", "c", "d"}) == pytest.approx(1.5 / (1.5 + 1 / math.log2(3)))
    assert ndcg(["a", "b", "c"], {"a", "c", "d"}) == pytest.approx(0.7039, abs=1e-4)


def test_the_best_order_is_1_and_one_without_anything_relevant_is_0() -> None:
    assert ndcg(["a", "b", "c"], {"a", "b"}) == 1
    assert ndcg(["x", "y"], {"a", "b"}) == 0
    assert ndcg([], {"a"}) == 0


def test_where_more_is_relevant_than_is_looked_at_the_best_order_is_still_1() -> None:
    assert ndcg(["a", "b"], {"a", "b", "c"}, k=2) == 1


def test_what_is_found_later_counts_less() -> None:
    assert ndcg(["a", "x"], {"a"}) > ndcg(["x", "a"], {"a"}) == pytest.approx(1 / math.log2(3))


def test_only_the_first_are_scored() -> None:
    found = [*"0123456789", "a"]
    assert (ndcg(found, {"a"}), recall(found, {"a"})) == (0, 0)
    assert recall(found, {"a"}, k=11) == 1


def test_recall_is_the_share_of_what_is_relevant() -> None:
    assert recall(["a", "x", "c"], {"a", "b", "c", "d"}) == 0.5


def test_a_document_is_where_its_best_chunk_is() -> None:
    assert documents_of(["b", "a", "b", "c", "a"]) == ["b", "a", "c"]


@pytest.mark.parametrize("title", ["**Opening:**", "**Opening (BE VAGUE):**", "1. **Start naturally:** Explain it:"])
def test_a_question_is_what_the_customer_says_first(title: str) -> None:
    words = "Hi, I'd like to close my Gold Rewards Card.\nIt is too dear."
    instructions = f'You work for "Chen\'s Green Spaces".\n\n{title} "{words}"\n\n2. **Then:** "Thanks."'
    assert asked_in(instructions) == "Hi, I'd like to close my Gold Rewards Card. It is too dear."


def test_without_such_words_a_question_is_the_whole_instructions() -> None:
    assert asked_in("You want a card.\n\nIt must be blue.") == "You want a card. It must be blue."


def test_documents_and_questions_are_read(tmp_path: Path) -> None:
    rows = [{"id": "doc_1", "title": "Cards", "content": "## Blue\n\nAll of them."}]
    (tmp_path / retrieval.DOCUMENTS).write_bytes(gzip.compress(json.dumps(rows).encode()))
    task = {"id": "task_1", "user_scenario": {"instructions": "A card."}, "required_documents": ["doc_1"]}
    (tmp_path / retrieval.TASKS).write_text(json.dumps([task]))
    assert read_documents(tmp_path) == [Document("doc_1", "# Cards\n\n## Blue\n\nAll of them.")]
    assert read_questions(tmp_path) == [retrieval.Question("task_1", "A card.", frozenset({"doc_1"}))]


def test_the_set_is_whole_and_its_labels_are_documents_of_it() -> None:
    documents, questions = read_documents(DATA), read_questions(DATA)
    assert (len(documents), len(questions), sum(len(one.relevant) for one in questions)) == (698, 97, 949)
    assert frozenset[str]().union(*(one.relevant for one in questions)) <= {one.id for one in documents}
    assert sum(len(one.text) < 600 for one in questions) >= 88, "those that tell what the customer says first"

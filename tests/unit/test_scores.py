"""The scores of answers: those of the libraries that everybody uses, of single answers and of sets."""

import math
import random
import re
import string
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from transformers.data.metrics import squad_metrics

from jobs import scores
from stack import intervals
from stack.errors import BadInput

WORDS = [
    "the",
    "The",
    "a",
    "an",
    "cat",
    "cats",
    "sat",
    "on",
    "mat",
    "Émile",
    "naïve",
    "Paris",
    "猫",
    "42",
    "3.5",
    "U.S.",
]
MARKS = [".", ",", "!", "?", "'s", " - ", "…", "\n", "  ", '"']


def pairs(count: int = 200) -> list[tuple[str, str]]:
    """References and answers with articles, punctuation, lines, other scripts, and some that are empty."""
    draw = random.Random(7)

    def text() -> str:
        words = draw.choices(WORDS, k=draw.randrange(12))
        return "".join(word + draw.choice([" ", " ", " ", *MARKS]) for word in words)

    made = []
    for _ in range(count):
        reference = text()
        answer = draw.choice([text(), text(), reference, reference.upper(), f"the {reference}.", ""])
        made.append((reference, answer))
    return made


PAIRS = pairs()


def columns(metric: str, examples: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    (score,) = scores.scorers([metric])
    rows = [score(reference, answer) for reference, answer in examples]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def of_set(name: str, found: dict[str, np.ndarray]) -> intervals.Estimate:
    aggregate = intervals.aggregate(name)
    estimate = intervals.estimate(aggregate, np.column_stack([found[column] for column in aggregate.columns]))
    assert estimate is not None
    return estimate


# SQuAD's own evaluate-v2.0.py.


def normalize_answer(text: str) -> str:
    lower = "".join(one for one in text.lower() if one not in set(string.punctuation))
    return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", lower).split())


def squad_f1(gold: str, predicted: str) -> float:
    golds, predictions = normalize_answer(gold).split(), normalize_answer(predicted).split()
    common = sum((Counter(golds) & Counter(predictions)).values())
    if not golds or not predictions:
        return float(golds == predictions)
    if not common:
        return 0.0
    precision, recall = common / len(predictions), common / len(golds)
    return 2 * precision * recall / (precision + recall)


def test_the_examples_hold_what_is_hard() -> None:
    assert any(not answer for _, answer in PAIRS)
    assert any(not reference.strip() for reference, _ in PAIRS)
    assert any("猫" in answer for _, answer in PAIRS)
    assert any("\n" in answer.strip() for _, answer in PAIRS)


def test_exact_match_and_f1_are_squads() -> None:
    em, f1 = columns("em", PAIRS)["em"], columns("f1", PAIRS)["f1"]
    assert em.tolist() == [float(normalize_answer(gold) == normalize_answer(answer)) for gold, answer in PAIRS]
    assert f1 == pytest.approx([squad_f1(gold, answer) for gold, answer in PAIRS])
    assert em.tolist() == [squad_metrics.compute_exact(gold, answer) for gold, answer in PAIRS]
    assert f1 == pytest.approx([squad_metrics.compute_f1(gold, answer) for gold, answer in PAIRS])
    assert 0 < em.mean() < f1.mean() < 1
    assert of_set("f1", {"f1": f1}).value == pytest.approx(f1.mean())


def test_rouge_is_that_of_rouge_score() -> None:
    found = columns("rouge", PAIRS)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    wanted = [scorer.score(target=reference, prediction=answer) for reference, answer in PAIRS]
    for name in scores.ROUGE:
        each = [one[name].fmeasure for one in wanted]
        assert found[name].tolist() == each
        assert of_set(name, found).value == pytest.approx(np.mean(each))
    assert found["rougeL"].tolist() != found["rougeLsum"].tolist()


@pytest.mark.parametrize("count", [200, 1])
def test_bleu_is_that_of_sacrebleu(count: int) -> None:
    examples = PAIRS[:count]
    answers, references = [answer for _, answer in examples], [reference for reference, _ in examples]
    metric = sacrebleu.BLEU()
    whole = metric.corpus_score(answers, [references])
    found = columns("bleu", examples)
    assert of_set("bleu", found).value == pytest.approx(whole.score)
    assert found["bleu"].tolist() == [sacrebleu.sentence_bleu(answer, [gold]).score for gold, answer in examples]
    assert scores.bleu_signature() == str(metric.get_signature())
    if count > 1:
        assert whole.score > 1


@pytest.mark.parametrize("separator", [" ", ",", "é"])
def test_texts_whose_words_are_too_many_to_be_compared_are_refused(separator: str) -> None:
    scores.require_rouge(separator.join("a" * 4_000), separator.join("b" * 5_000))
    with pytest.raises(BadInput, match=r"has 4001 words and the answer 5000, .* allowed: 20000000 pairs"):
        scores.require_rouge(separator.join("a" * 4_001), separator.join("b" * 5_000))


@pytest.mark.parametrize(
    ("first", "second", "wins", "consistent"),
    [(0.9, 0.6, 1, 1), (0.9, 0.4, 0.5, 0), (0.1, 0.2, 0, 1), (0.5, 0.5, 0.5, 1), (0.5, 0.9, 0.75, 0)],
)
def test_an_answer_wins_that_is_preferred_in_both_places_and_a_tie_is_half(
    first: float, second: float, wins: float, consistent: float
) -> None:
    assert scores.win_rate(first, second) == {"win_rate": wins, "consistent": consistent}


def test_perplexity_is_per_token_of_all_references() -> None:
    first, second = scores.perplexity(6.0, 3), scores.perplexity(1.0, 1)
    assert first["perplexity"] == pytest.approx(math.exp(2))
    found = {name: np.array([first[name], second[name]]) for name in first}
    assert of_set("perplexity", found).value == pytest.approx(math.exp(7 / 4))


def test_a_reference_of_no_probability_has_a_perplexity_all_the_same() -> None:
    found = scores.perplexity(9_999.0, 1)
    assert math.isfinite(found["perplexity"])
    assert math.isfinite(of_set("perplexity", {name: np.array([value]) for name, value in found.items()}).value)


def test_the_columns_of_metrics_are_their_scores_and_what_those_of_a_set_follow_from() -> None:
    assert scores.names(["rouge", "bleu"]) == [*scores.ROUGE, "bleu"]
    assert scores.columns(["em"]) == ["em"]
    assert scores.columns(["perplexity"]) == ["perplexity", "nll", "reference_tokens"]
    assert scores.columns(["bleu"]) == ["bleu", *intervals.BLEU_COLUMNS]
    assert len(scores.scorers(["perplexity", "bleu"])) == 1

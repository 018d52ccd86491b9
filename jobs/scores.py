"""The scores of one answer beside its reference, and the columns from which those of a whole set follow.

- em, f1: exact match and F1 of the words, after SQuAD's normalisation (Rajpurkar et al. 2016), as transformers has
  them. They are written out here: to import them from there takes longer than most sets of answers.
- rouge: the F1 of unigrams, bigrams and the longest common subsequence, of the whole (rougeL) and line by line
  (rougeLsum), as rouge-score has them (Lin 2004). Its words are of the letters a to z and digits: other scripts have
  none. It has a table of each word beside each.
- bleu: sacrebleu's, with its defaults (Papineni et al. 2002; Post 2018). Of a set it is that of the corpus, which
  follows from the counts of n-grams; of a single answer it is of the orders that the answer is long enough for.
- perplexity: exp of the negative log likelihood of a reference's tokens, given the prompt, per token. Of a set it is
  per token of all references.
- rating, win_rate, consistent: what a judge says; see JudgedMetric.

A library is imported where its metric is wanted: together they take seconds.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from stack.errors import BadInput
from stack.intervals import BLEU_COLUMNS, MAX_EXPONENT, aggregate

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# How many places the table of ROUGE may have, of 8 bytes each.
MAX_ROUGE_PLACES = 20_000_000
# The metrics of which there are several scores.
_SEVERAL = {"rouge": ROUGE, "win_rate": ("win_rate", "consistent")}
# Of a reference and an answer, the values of some columns.
Scorer = Callable[[str, str], dict[str, float]]


def names(metrics: Sequence[str]) -> list[str]:
    """The scores that there are of the metrics of a request."""
    return [name for metric in metrics for name in _SEVERAL.get(metric, (metric,))]


def columns(metrics: Sequence[str]) -> list[str]:
    """The columns that an example has of the metrics of a request: its scores, and what those of a set follow from."""
    scores = names(metrics)
    return list(dict.fromkeys([*scores, *(column for name in scores for column in aggregate(name).columns)]))


def scorers(metrics: Sequence[str]) -> list[Scorer]:
    """What scores answers by the metrics of a request. Perplexity is none of answers, and a judge has other ways."""
    return [_SCORERS[metric]() for metric in metrics if metric in _SCORERS]


def require_rouge(reference: str, answer: str) -> None:
    """Raises BadInput for texts that are too long for ROUGE."""
    from rouge_score.tokenize import tokenize

    words, others = len(tokenize(reference, None)), len(tokenize(answer, None))
    if words * others > MAX_ROUGE_PLACES:
        raise BadInput(
            f"the reference has {words} words and the answer {others}, of which rouge compares each with each; "
            f"allowed: {MAX_ROUGE_PLACES} pairs"
        )


def perplexity(nll: float, tokens: int) -> dict[str, float]:
    """The columns of a reference that has so many tokens and this negative log likelihood."""
    # An engine says -9999 for no probability at all, whose exp is beyond what a float holds.
    return {"perplexity": math.exp(min(nll / tokens, MAX_EXPONENT)), "nll": nll, "reference_tokens": float(tokens)}


def win_rate(shown_first: float, shown_second: float) -> dict[str, float]:
    """The columns of an answer that a judge prefers to another one with these probabilities, as it was shown first and
    second: it wins, loses or ties each time. Where the two differ its place has decided."""
    first, second = ((1 + np.sign(probability - 0.5)) / 2 for probability in (shown_first, shown_second))
    return {"win_rate": float(first + second) / 2, "consistent": float(first == second)}


def bleu_signature() -> str:
    """How sacrebleu computes the BLEU of a set, in its own words, by which it can be compared to others'."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    metric.corpus_score([""], [[""]])  # it must have seen how many references there are
    return str(metric.get_signature())


def _exact_match() -> Scorer:
    return lambda reference, answer: {"em": float(_words(reference) == _words(answer))}


def _f1() -> Scorer:
    def score(reference: str, answer: str) -> dict[str, float]:
        expected, given = _words(reference), _words(answer)
        if not expected or not given:
            return {"f1": float(expected == given)}
        same = (Counter(expected) & Counter(given)).total()
        return {"f1": 2 * same / (len(expected) + len(given))}

    return score


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    """The words of a text after SQuAD's normalisation: without case, punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _rouge() -> Scorer:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE)

    def score(reference: str, answer: str) -> dict[str, float]:
        return {name: float(one.fmeasure) for name, one in scorer.score(reference, answer).items()}

    return score


def _bleu() -> Scorer:
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)  # which changes the score of one answer alone, and no count

    def score(reference: str, answer: str) -> dict[str, float]:
        one = metric.sentence_score(answer, [reference])
        counts = [*one.counts, *one.totals, one.sys_len, one.ref_len]
        return {"bleu": float(one.score), **dict(zip(BLEU_COLUMNS, map(float, counts), strict=True))}

    return score


_SCORERS: dict[str, Callable[[], Scorer]] = {"em": _exact_match, "f1": _f1, "rouge": _rouge, "bleu": _bleu}

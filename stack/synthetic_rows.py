"""What becomes of scored generations: the rows of a data set, and what is rejected, with the reason.

`Scored` is what was made of a prompt, `Pairs` what was made of a document. Pure: a job may do it again.

SFT rows have the columns id, dialog (with the best of the generations that the filter keeps) and score. Preference rows
are what stack/training_rows.py calls PREFERENCES: prompt, chosen (the best of those kept) and rejected (the worst of
all), of which the scores are at least `min_margin` apart. Scored rows have all generations that are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stack.api.datasets import TrainEvalDatasetColumnType
from stack.api.messages import StopReason
from stack.api.synthetic_data_generation import PromptSource, SyntheticDataJobRequest, SyntheticOutput
from stack.filtering import kept, passes
from stack.synthetic_data_generation import filter_of

_KIND = TrainEvalDatasetColumnType
_DOCUMENT_COLUMNS = {"document": _KIND.text, "quote": _KIND.text, "start": _KIND.number, "end": _KIND.number}
_COLUMNS = {
    SyntheticOutput.sft: {"id": _KIND.text, "dialog": _KIND.dialog, "score": _KIND.number},
    SyntheticOutput.scored: {"id": _KIND.text, "dialog": _KIND.dialog, "generations": _KIND.json},
    SyntheticOutput.preferences: {
        "id": _KIND.text,
        "prompt": _KIND.dialog,
        "chosen": _KIND.text,
        "rejected": _KIND.text,
        "chosen_score": _KIND.number,
        "rejected_score": _KIND.number,
    },
}
MAX_SHOWN = 2_000
Message = dict[str, Any]


@dataclass(frozen=True)
class Generation:
    message: Message
    score: float

    @property
    def is_whole(self) -> bool:
        """Whether it was ended by the model, not by its bound of tokens."""
        return bool(self.message["stop_reason"] != StopReason.out_of_tokens)


@dataclass(frozen=True)
class Scored:
    """A prompt, by the number and the id of its row, with all its generations."""

    row: int
    id: str
    dialog: list[Message]
    generations: list[Generation]


@dataclass(frozen=True)
class ScoredPair:
    """A grounded pair of a document's passage (its number), with the score of its answer."""

    passage: int
    question: str
    answer: str
    quote: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Pairs:
    """A document, by the number and the id of its row, with the grounded pairs about it."""

    row: int
    id: str
    pairs: list[ScoredPair]


@dataclass(frozen=True)
class Rejection:
    """What was dropped, from which row, and why."""

    row: int
    id: str
    reason: str
    text: str
    score: float | None = None

    def shown(self) -> dict[str, Any]:
        """As it is told: texts are cut."""
        told = {"row": self.row, "id": self.id, "reason": self.reason, "text": self.text[:MAX_SHOWN]}
        return told if self.score is None else told | {"score": self.score}


@dataclass(frozen=True)
class Chosen:
    """The rows that come of one prompt or document, and what does not come into them."""

    rows: list[dict[str, Any]]
    rejections: list[Rejection]


def columns(request: SyntheticDataJobRequest) -> dict[str, TrainEvalDatasetColumnType]:
    """The columns of the data set that a job makes."""
    of_documents = request.source == PromptSource.documents
    return dict(_COLUMNS[request.output]) | (_DOCUMENT_COLUMNS if of_documents else {})


def of_prompt(request: SyntheticDataJobRequest, one: Scored) -> Chosen:
    """What becomes of a prompt."""
    indices, rejections = _filtered(request, one)
    if request.output == SyntheticOutput.scored:
        told = [{"message": one.generations[at].message, "score": one.generations[at].score} for at in indices]
        rows = [{"id": one.id, "dialog": one.dialog, "generations": told}] if told else []
        return Chosen(rows, rejections)
    whole = [at for at in indices if one.generations[at].is_whole]
    rejections += [_rejection(one, at, "cut_off") for at in indices if at not in whole]
    if not whole:
        return Chosen([], rejections)
    best = max(whole, key=lambda at: (one.generations[at].score, -at))
    if request.output == SyntheticOutput.sft:
        rejections += [_rejection(one, at, "not_the_best") for at in whole if at != best]
        row = {"id": one.id, "dialog": [*one.dialog, one.generations[best].message]}
        return Chosen([row | {"score": one.generations[best].score}], rejections)
    return _preference(request, one, best, rejections)


def of_document(request: SyntheticDataJobRequest, one: Pairs) -> Chosen:
    """What becomes of a document: a row for each pair that the filter keeps, which chooses by passage."""
    rows: list[dict[str, Any]] = []
    rejections: list[Rejection] = []
    for passage in sorted({pair.passage for pair in one.pairs}):
        pairs = [pair for pair in one.pairs if pair.passage == passage]
        # Another number for each passage of each row, for what is drawn.
        number = one.row * 1_000_003 + passage
        by, scores = filter_of(request), [pair.score for pair in pairs]
        chosen, passing = kept(by, scores, number), passes(by, scores)
        for at, pair in enumerate(pairs):
            if at in chosen:
                rows.append(_pair_row(request, one, pair, len(rows)))
            else:
                reason = "filtered" if at in passing else "below_threshold"
                rejections.append(Rejection(one.row, one.id, reason, f"{pair.question}\n{pair.answer}", pair.score))
    return Chosen(rows, rejections)


def _filtered(request: SyntheticDataJobRequest, one: Scored) -> tuple[list[int], list[Rejection]]:
    """The indices of the generations that the filter keeps, and the others."""
    by, scores = filter_of(request), [generation.score for generation in one.generations]
    chosen, passing = kept(by, scores, one.row), passes(by, scores)
    reasons = {at: "filtered" if at in passing else "below_threshold" for at in range(len(scores)) if at not in chosen}
    return chosen, [_rejection(one, at, reason) for at, reason in reasons.items()]


def _preference(request: SyntheticDataJobRequest, one: Scored, best: int, rejections: Sequence[Rejection]) -> Chosen:
    """The best against the worst of all: what the filter has dropped is what should not be said."""
    chosen = one.generations[best]
    worst = min(range(len(one.generations)), key=lambda at: (one.generations[at].score, at))
    rejected = one.generations[worst]
    margin = chosen.score - rejected.score
    if margin <= 0 or margin < request.min_margin or chosen.message["content"] == rejected.message["content"]:
        return Chosen([], [*rejections, _rejection(one, best, "margin")])
    row = {
        "id": one.id,
        "prompt": one.dialog,
        "chosen": chosen.message["content"],
        "rejected": rejected.message["content"],
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
    return Chosen([row], list(rejections))


def _pair_row(request: SyntheticDataJobRequest, one: Pairs, pair: ScoredPair, number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": pair.question}
    answer = {"role": "assistant", "content": pair.answer, "stop_reason": StopReason.end_of_turn.value}
    row: dict[str, Any] = {"id": f"{one.id}.{number}"}
    if request.output == SyntheticOutput.scored:
        row |= {"dialog": [asked], "generations": [{"message": answer, "score": pair.score}]}
    else:
        row |= {"dialog": [asked, answer], "score": pair.score}
    return row | {"document": one.id, "quote": pair.quote, "start": pair.start, "end": pair.end}


def _rejection(one: Scored, at: int, reason: str) -> Rejection:
    generation = one.generations[at]
    return Rejection(one.row, one.id, reason, str(generation.message["content"]), generation.score)

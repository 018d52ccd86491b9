"""What becomes of scored generations: the rows of a data set, and what is rejected, with the reason.

`Scored` is what was made of a prompt, `Pairs` what was made of a passage. Pure: a job may do it again.

SFT rows have the columns id, dialog (with the best of the generations that the filter keeps) and score. Preference rows
are what stack/training_rows.py calls PREFERENCES: prompt, chosen (the best of those kept) and rejected (the worst of
all), of which the scores are at least `min_margin` apart. Scored rows have all generations that are kept.
"""

from collections.abc import Mapping
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

    @property
    def is_empty(self) -> bool:
        return not str(self.message["content"]).strip()


@dataclass(frozen=True)
class Scored:
    """A prompt, by the number and the id of its row, with all its generations."""

    row: int
    id: str
    dialog: list[Message]
    generations: list[Generation]


@dataclass(frozen=True)
class ScoredPair:
    """A grounded pair about a passage, with the score of its answer."""

    question: str
    answer: str
    quote: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Pairs:
    """A passage, by the number of its row, its document's id and its number there, with the grounded pairs about it."""

    row: int
    id: str
    passage: int
    pairs: list[ScoredPair]


@dataclass(frozen=True)
class Rejection:
    """What was dropped, from which row, and why; of a duplicate, of what it is one."""

    row: int
    id: str
    reason: str
    text: str
    score: float | None = None
    of: str | None = None

    def shown(self) -> dict[str, Any]:
        """As it is told: texts are cut."""
        told: dict[str, Any] = {"row": self.row, "id": self.id, "reason": self.reason, "text": self.text[:MAX_SHOWN]}
        if self.score is not None:
            told["score"] = self.score
        if self.of is not None:
            told["of"] = self.of[:MAX_SHOWN]
        return told


@dataclass(frozen=True)
class Chosen:
    """The rows that come of one prompt or passage, and what does not come into them: each generation is in one."""

    rows: list[dict[str, Any]]
    rejections: list[Rejection]


def columns(request: SyntheticDataJobRequest) -> dict[str, TrainEvalDatasetColumnType]:
    """The columns of the data set that a job makes."""
    of_documents = request.source == PromptSource.documents
    return dict(_COLUMNS[request.output]) | (_DOCUMENT_COLUMNS if of_documents else {})


def generations_in(row: dict[str, Any]) -> int:
    """How many generations a row of the data set holds."""
    return 2 if "rejected" in row else len(row.get("generations", (None,)))


def of_prompt(request: SyntheticDataJobRequest, one: Scored) -> Chosen:
    """What becomes of a prompt."""
    reasons = _left_out(request, [generation.score for generation in one.generations], one.row)
    if request.output == SyntheticOutput.scored:
        left = [generation for at, generation in enumerate(one.generations) if at not in reasons]
        told = [{"message": generation.message, "score": generation.score} for generation in left]
        rows = [{"id": one.id, "dialog": one.dialog, "generations": told}] if told else []
        return Chosen(rows, _rejections(one, reasons))
    for at, generation in enumerate(one.generations):
        if not generation.is_whole:
            reasons.setdefault(at, "cut_off")
        elif generation.is_empty:
            reasons.setdefault(at, "empty")
    able = [at for at in range(len(one.generations)) if at not in reasons]
    if not able:
        return Chosen([], _rejections(one, reasons))
    best = max(able, key=lambda at: (one.generations[at].score, -at))
    if request.output == SyntheticOutput.preferences:
        return _preference(request, one, best, reasons)
    row = {"id": one.id, "dialog": [*one.dialog, one.generations[best].message], "score": one.generations[best].score}
    return Chosen([row], _rejections(one, reasons | {at: "not_the_best" for at in able if at != best}))


def of_passage(request: SyntheticDataJobRequest, one: Pairs) -> Chosen:
    """What becomes of a passage: a row for each pair that the filter keeps."""
    reasons = _left_out(request, [pair.score for pair in one.pairs], one.row)
    left = [pair for at, pair in enumerate(one.pairs) if at not in reasons]
    return Chosen(
        [_pair_row(request, one, pair, number) for number, pair in enumerate(left)],
        [
            Rejection(one.row, one.id, reason, f"{one.pairs[at].question}\n{one.pairs[at].answer}", one.pairs[at].score)
            for at, reason in sorted(reasons.items())
        ],
    )


def _left_out(request: SyntheticDataJobRequest, scores: list[float], row: int) -> dict[int, str]:
    """Why the filter keeps some of what was made of a row not, by their indices."""
    by = filter_of(request)
    chosen, passing = kept(by, scores, row), passes(by, scores)
    return {at: "filtered" if at in passing else "below_threshold" for at in range(len(scores)) if at not in chosen}


def _preference(request: SyntheticDataJobRequest, one: Scored, best: int, reasons: Mapping[int, str]) -> Chosen:
    """The best against the worst of all that say something: what the filter has dropped is what should not be said.

    `reasons` are those of what the best one cannot be.
    """
    said = [at for at, generation in enumerate(one.generations) if not generation.is_empty]
    worst = min(said, key=lambda at: (one.generations[at].score, at))
    left = [at for at in said if at not in reasons]
    chosen, rejected = one.generations[best], one.generations[worst]
    margin = chosen.score - rejected.score
    if margin <= 0 or margin < request.min_margin or chosen.message["content"] == rejected.message["content"]:
        return Chosen([], _rejections(one, dict(reasons) | dict.fromkeys(left, "margin")))
    row = {
        "id": one.id,
        "prompt": one.dialog,
        "chosen": chosen.message["content"],
        "rejected": rejected.message["content"],
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
    every = dict(reasons) | dict.fromkeys(left, "in_between")
    return Chosen([row], _rejections(one, {at: why for at, why in every.items() if at not in (best, worst)}))


def _pair_row(request: SyntheticDataJobRequest, one: Pairs, pair: ScoredPair, number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": pair.question}
    answer = {"role": "assistant", "content": pair.answer, "stop_reason": StopReason.end_of_turn.value}
    row: dict[str, Any] = {"id": f"{one.id}.{one.passage}.{number}"}
    if request.output == SyntheticOutput.scored:
        row |= {"dialog": [asked], "generations": [{"message": answer, "score": pair.score}]}
    else:
        row |= {"dialog": [asked, answer], "score": pair.score}
    return row | {"document": one.id, "quote": pair.quote, "start": pair.start, "end": pair.end}


def _rejections(one: Scored, reasons: Mapping[int, str]) -> list[Rejection]:
    return [
        Rejection(one.row, one.id, reason, str(one.generations[at].message["content"]), one.generations[at].score)
        for at, reason in sorted(reasons.items())
    ]

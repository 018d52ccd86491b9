"""Injection and jailbreak shields: a sequence classifier, such as Prompt Guard, on windows of texts, in one batch."""

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stack.context import Context
from stack.errors import BadInput
from stack.models import Scores
from stack.shield_config import ClassifierShield
from stack.shields.verdict import PASSED, Said, Verdict
from stack.shields.word_shield import judged_texts

VERSION = "1"
# What classifiers call texts that are none of what they look for. LABEL_0 is Prompt Guard's, and Prompt Guard 2's.
_BENIGN = frozenset(("BENIGN", "SAFE", "LABEL_0", "LEGIT", "NEGATIVE"))
# Prompt Guard's jailbreaks, of three labels: benign, injection, jailbreak.
_JAILBREAK = frozenset(("JAILBREAK", "LABEL_2"))


async def judge(context: Context, shield: ClassifierShield, said: Sequence[Said]) -> Verdict:
    """Classifies each message that is judged; the window that is likeliest to be a violation counts."""
    texts = await asyncio.to_thread(judged_texts, said)
    if not texts:
        return PASSED
    model = next(one for one in context.config.classifiers if one.id == shield.model)
    scores = await context.models.classify(model, texts, windows=True)
    return read(shield, scores)


def read(shield: ClassifierShield, scores: Scores) -> Verdict:
    """The verdict of the likeliest window. Raises BadInput where the classifier's labels are not known."""
    columns = _columns(shield, scores.labels)
    chances = probabilities(scores.values, is_multi_label=scores.is_multi_label)[:, columns]
    together = chances.max(axis=1) if scores.is_multi_label else chances.sum(axis=1)
    row = int(together.argmax())
    score = min(1.0, float(together[row]))
    if score < shield.threshold:
        return Verdict(is_violation=False, score=score)
    label = scores.labels[columns[int(chances[row].argmax())]]
    return Verdict(True, label, f"The content looks like: {label.lower()}.", score)


def probabilities(logits: NDArray[np.float32], *, is_multi_label: bool = False) -> NDArray[np.float64]:
    """Those of each label (rows, labels): the softmax of its logits.

    Of one label, and of those of which several can be true, each has the logistic function of its own.
    """
    values = logits.astype(np.float64)
    if is_multi_label or values.shape[1] == 1:
        logistic: NDArray[np.float64] = np.exp(-np.logaddexp(0, -values))
        return logistic
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _columns(shield: ClassifierShield, labels: tuple[str, ...]) -> list[int]:
    """Which labels are violations."""
    listed = ", ".join(labels)
    if shield.labels is not None:
        for label in shield.labels:
            if label not in labels:
                raise BadInput(f"the shield {shield.id!r} looks for {label!r}; its model has the labels {listed}")
        return [labels.index(label) for label in shield.labels]
    names = [label.upper() for label in labels]
    bad = [at for at, name in enumerate(names) if name not in _BENIGN]
    if not 0 < len(bad) < len(labels):
        raise BadInput(
            f"the shield {shield.id!r} needs `labels`, as its model's do not say which of them is a violation: {listed}"
        )
    if shield.type == "jailbreak_shield" and (jailbreaks := [at for at in bad if names[at] in _JAILBREAK]):
        return jailbreaks
    return bad

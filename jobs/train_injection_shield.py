"""The default injection shield: a logistic regression on the vectors of an embedding model, in a few kilobytes.

    python -m jobs.train_injection_shield --out stack/shields/injection_head

It is trained on S-Labs' training split, and its threshold is chosen on the validation split; `scripts/prepare.py` has
taken both from a package. It needs no stack, and a minute of two cores. The threshold goes into the bias, so that a
probability of 0.5 is the limit. jobs/injection_scores.py says how good it is, on splits that it has not seen.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.injection_scores import DATA, Row, read_split, scores_of, sha256_of
from stack import heads
from stack.config import home
from stack.shields.text import unmasked

ENCODER = "models/all-MiniLM-L6-v2"
LABELS = ["BENIGN", "INJECTION"]
COMMAND = "python -m jobs.train_injection_shield --out stack/shields/injection_head"
# Of the harmless validation rows, at most so many may be taken for injections: fewer than on texts never seen.
MAX_FALSE_POSITIVES = 0.03
# The inverse of the strength of L2 regularisation.
C = 3.0
# What people say beside questions, of which the labelled rows have nothing: each counts as so many of them.
SMALL_TALK_WEIGHT = 5.0
SMALL_TALK = (
    "Hello", "Hi", "Hey there", "Good morning", "Good evening", "Hi, how are you?", "Nice to meet you", "Welcome back",
    "Thanks", "Thank you very much", "Thanks, that helps", "Great", "Perfect, thanks", "Well done", "That is wrong",
    "Yes", "Yes, please", "No", "No, thanks", "Okay", "Sure", "Maybe", "Right", "Exactly", "I see",
    "Sounds good", "Goodbye", "Bye", "See you tomorrow", "Good night", "Please go on", "Continue", "One moment",
    "Wait", "Sorry",
    "What do you mean?", "Why?", "How so?", "Can you help me?", "I need some help", "Who are you?",
    "What is your name?",
    "Could you say that again?", "Can you give me an example?", "Please make it shorter", "A bit longer, please",
    "I do not understand", "I have a question", "Let us begin", "Next one, please", "The first one", "Both", "42",
    "test",
)  # fmt: skip
Vectors = NDArray[np.float32]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the head, which is made")
    out: Path = parser.parse_args().out
    weight, bias, encode, max_tokens = train(home() / DATA, home() / ENCODER)
    scores = scores_of(lambda texts: probabilities(encode(texts), weight, bias), home() / DATA)
    head = heads.Head(
        encoder=ENCODER,
        encoder_sha256=heads.encoder_sha256(home() / ENCODER),
        labels=LABELS,
        max_tokens=max_tokens,
        command=COMMAND,
        data_sha256=sha256_of(home() / DATA),
        scores=scores.figures(),
    )
    heads.save(out, head, weight, bias)
    print(scores.report())
    return 0


def train(data: Path, model: Path) -> tuple[Vectors, Vectors, Callable[[Sequence[str]], Vectors], int]:
    """The weight (labels, dimensions) and the bias (labels,) of a head, what makes vectors of texts, and their length.

    Raises OSError where the data or the embedding model is not there.
    """
    from sklearn.linear_model import LogisticRegression

    rows = read_split(data, "s-labs-train")
    encode, max_tokens = encoder(model)
    vectors = encode([*(row.text for row in rows), *SMALL_TALK])
    labels = np.array([row.label for row in rows] + [0] * len(SMALL_TALK))
    weights = np.array([1.0] * len(rows) + [SMALL_TALK_WEIGHT] * len(SMALL_TALK))
    fitted = LogisticRegression(C=C, max_iter=1_000).fit(vectors, labels, sample_weight=weights)
    direction, offset = fitted.coef_[0].astype(np.float32), float(fitted.intercept_[0])
    validation = read_split(data, "s-labs-validation")
    limit = best_limit(encode([row.text for row in validation]) @ direction + offset, validation)
    weight = np.stack([np.zeros_like(direction), direction])
    return weight, np.array([0.0, offset - limit], dtype=np.float32), encode, max_tokens


def best_limit(logits: NDArray[np.float32], rows: Sequence[Row]) -> float:
    """The logit from which on a text is taken for an injection: the most accurate one with few false positives."""
    labels = np.array([row.label for row in rows]) == 1
    ordered = np.unique(logits)
    limits = (ordered[1:] + ordered[:-1]) / 2
    allowed = [limit for limit in limits if (logits[~labels] >= limit).mean() <= MAX_FALSE_POSITIVES]
    return float(max(allowed, key=lambda limit: ((logits >= limit) == labels).mean()))


def probabilities(vectors: Vectors, weight: Vectors, bias: Vectors) -> NDArray[np.float64]:
    """That of INJECTION, of each vector."""
    logits = (vectors @ weight.T + bias).astype(np.float64)
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


def encoder(folder: Path) -> tuple[Callable[[Sequence[str]], Vectors], int]:
    """What makes vectors of texts, and how many tokens of each it reads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encode(texts: Sequence[str]) -> Vectors:
        vectors: Vectors = model.encode([unmasked(text) for text in texts], batch_size=64, show_progress_bar=False)
        return vectors

    assert model.max_seq_length is not None
    return encode, model.max_seq_length


if __name__ == "__main__":
    sys.exit(main())

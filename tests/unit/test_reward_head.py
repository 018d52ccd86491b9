"""The default reward model: how it is fitted, and what is shipped."""

from pathlib import Path

import numpy as np
import pytest

from scripts import reward_head
from stack import config, heads
from stack.config import RewardModel

MINILM = config.home() / "models" / "all-MiniLM-L6-v2"  # as scripts/setup prepares it


def test_the_weights_are_those_under_which_the_chosen_answers_are_likeliest() -> None:
    drawing = np.random.default_rng(1)
    truth = drawing.normal(size=6)
    differences = drawing.normal(size=(500, 6))
    differences *= np.sign(differences @ truth + drawing.normal(size=500))[:, None]  # chosen, with some noise
    weights = reward_head.fitted(differences)
    assert weights @ truth / np.linalg.norm(weights) / np.linalg.norm(truth) > 0.98

    def likelihood(weights: reward_head.Array) -> float:
        return float(-np.logaddexp(0, -differences @ weights).sum() - reward_head.L2 / 2 * weights @ weights)

    nearby = [weights + 0.05 * drawing.normal(size=6) for _ in range(20)]
    assert all(likelihood(weights) > likelihood(other) for other in nearby)


def test_held_out_pairs_are_no_better_than_chance_where_there_is_nothing_to_learn() -> None:
    drawing = np.random.default_rng(2)
    noise = drawing.normal(size=(400, 100))
    assert (noise @ reward_head.fitted(noise) > 0).mean() > 0.65, "what was learned by heart"
    assert reward_head.held_out_accuracy(noise) == pytest.approx(0.5, abs=0.1)


def test_a_row_is_read_as_messages() -> None:
    said = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": " Why? "}]
    row = {
        "conversations": said,
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    assert reward_head.dialog(row, "rejected") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "No."},
    ]


def test_what_is_shipped_says_where_it_comes_from_and_is_small() -> None:
    head, weight, _ = heads.load(reward_head.FOLDER)
    assert (head.labels, weight.shape) == (["reward"], (1, 384))
    assert head.command == "python -m scripts.reward_head"
    assert head.scores["held-out pair accuracy"] > 0.6
    assert sum(file.stat().st_size for file in reward_head.FOLDER.iterdir()) < 10_000


def test_what_is_shipped_scores_the_answer_alone(home: Path) -> None:
    from serve_apps.classifiers import Classifier

    (home / "models" / "all-MiniLM-L6-v2").symlink_to(MINILM)
    model = RewardModel(kind="classifier", id="reward", path="stack/reward_head", max_tokens=512)
    classifier = Classifier(model)
    assert classifier.max_tokens == 512
    inputs = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (("Why?", "By photosynthesis."), ("How?", "By photosynthesis."), ("Why?", "No idea."))
    ]
    one, same, other = classifier.logits(classifier.tokenize(inputs, windows=False)[0])[:, 0]
    assert one == pytest.approx(same, abs=1e-5)
    assert abs(one - other) > 0.01

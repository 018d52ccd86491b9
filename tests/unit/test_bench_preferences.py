"""The bench of preferences: its figures from known log-probabilities, and the jobs that it asks for."""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts import bench_preferences as bench
from scripts import preferences
from scripts.bench_preferences import DPO, REWARD, Answer, Judged
from scripts.bench_servers import local_model
from scripts.figures import Share, write_json, write_shares
from scripts.preferences import Pair
from stack import post_training
from stack.api.post_training import PostTrainingRLHFRequest, RewardModelRequest
from stack.config import Config
from stack.context import Context
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

# Shares


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, table I
    assert Share("", 81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Share("", 0, 20).interval == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_a_target_is_of_the_share_or_of_its_whole_interval() -> None:
    assert Share("", 61, 100, above=0.6).met
    assert not Share("", 60, 100, above=0.6).met
    assert not Share("", 59, 100, above=0.5, surely=True).met
    assert Share("", 60, 100, above=0.5, surely=True).met
    assert Share("", 0, 100).met, "it has no target"


def test_shares_are_read_by_people_and_by_programs(tmp_path: Path) -> None:
    shares = [Share("a", 61.5, 100, above=0.6), Share("b", 50, 100, above=0.5, surely=True), Share("c", 50, 100)]
    assert write_shares(shares).splitlines()[2:] == [
        "| a | 0.615 | 0.517–0.704 | 100 | > 0.6 | met |",
        "| b | 0.500 | 0.404–0.596 | 100 | all of it > 0.5 | MISSED |",
        "| c | 0.500 | 0.404–0.596 | 100 |  |  |",
    ]
    write_json(tmp_path / "figures.json", shares)
    assert json.loads((tmp_path / "figures.json").read_text())["figures"][1] == {
        "name": "b", "right": 50, "of": 100, "above": 0.5, "surely": True, "met": False
    }  # fmt: skip


# Figures of judged pairs


def answers(*both: tuple[float, int]) -> tuple[Answer, Answer]:
    chosen, rejected = both
    return Answer(*chosen), Answer(*rejected)


def test_the_implicit_reward_is_what_the_training_has_changed() -> None:
    base = [answers((-9.0, 3), (-4.0, 2)), answers((-1.0, 1), (-2.0, 1))]
    policy = [answers((-8.0, 3), (-5.0, 2)), answers((-3.0, 1), (-3.0, 1))]
    assert bench.implicit_margins(base, policy) == [2.0, -1.0]
    assert bench.implicit_margins(base, base) == [0.0, 0.0]


def test_a_likelihood_is_that_of_all_tokens_or_of_one_in_the_mean() -> None:
    of_pairs = [answers((-9.0, 9), (-4.0, 2))]
    assert bench.likelihood_margins(of_pairs) == [-5.0]
    assert bench.likelihood_margins(of_pairs, per_token=True) == [1.0]


def judged(rewards: tuple[float, float], base: tuple[Answer, Answer], policy: tuple[Answer, Answer]) -> Judged:
    return Judged(Pair("?", "long answer", "short"), base, policy, rewards)


def test_each_way_of_telling_is_counted_with_ties_as_halves() -> None:
    low, high = (-9.0, 3), (-4.0, 2)
    right = judged((2.0, 1.0), answers(low, high), answers(high, low))
    wrong = judged((1.0, 2.0), answers(low, high), answers(low, high))
    shares = {one.name: one.share for one in bench.found([right, wrong])}
    assert shares == {
        "reward model": 0.5,
        "DPO: implicit reward (before: 0.5)": 0.75,
        "likelihood, before": 0,
        "likelihood, after DPO": 0.5,
        "likelihood per token, before": 0,
        "likelihood per token, after DPO": 0.5,
        "the shorter answer": 0,
        "the longer answer": 1,
    }


def test_a_policy_that_has_learned_nothing_and_a_reward_model_of_chance_miss_their_targets() -> None:
    same = answers((-9.0, 3), (-4.0, 2))
    learned = answers((-8.0, 3), (-5.0, 2))
    nothing = [judged((1.0, 0.0), same, same)] * 6 + [judged((0.0, 1.0), same, same)] * 4
    assert [one.name for one in bench.found(nothing) if not one.met] == [
        "reward model",
        "DPO: implicit reward (before: 0.5)",
    ]
    assert all(one.met for one in bench.found([judged((1.0, 0.0), same, learned)] * 10))


# Models


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer of few words, the end of a message among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "user", "assistant", "good", "bad"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer


class Scripted(torch.nn.Module):
    """Gives the next token probabilities by the one before: after `assistant` half to `good`, a quarter to `bad`."""

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        probabilities = torch.full((6, 6), 1e-6)
        probabilities[3, 4], probabilities[3, 5], probabilities[3, 0] = 0.5, 0.25, 0.25
        probabilities[4, 4], probabilities[4, 1] = 0.1, 0.9
        probabilities[5, 1] = 1.0
        return SimpleNamespace(logits=(probabilities / probabilities.sum(1, keepdim=True)).log()[input_ids])


def test_an_answer_is_as_probable_as_its_tokens_and_its_end(tokenizer: Any) -> None:
    pairs = [Pair("good bad good", "good", "bad"), Pair("bad", "bad", "good good")]
    (good, bad), (_, twice) = bench.log_probabilities(Scripted(), tokenizer, pairs)
    assert (good.tokens, bad.tokens, twice.tokens) == (2, 2, 3)
    assert good.log_probability == pytest.approx(math.log(0.5 * 0.9), abs=1e-3)
    assert bad.log_probability == pytest.approx(math.log(0.25 * 1.0), abs=1e-3)
    assert twice.log_probability == pytest.approx(math.log(0.5 * 0.1 * 0.9), abs=1e-3)


class Length(torch.nn.Module):
    """Rewards long texts."""

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor([[float(input_ids.shape[1])]]))


def test_a_reward_is_of_a_question_with_its_answer(tokenizer: Any) -> None:
    # The system, the user and the assistant, what each says, and its end.
    told = 1 + len(preferences.SYSTEM_PROMPT.split()) + 1 + len(("user", "good", "bad", "<eos>"))
    rewards = bench.rewards(Length(), tokenizer, [Pair("good bad", "bad", "good good bad")])
    assert rewards == [(told + 3.0, told + 5.0)]


# Jobs


@pytest.fixture
def small(home: Path, store_url: str) -> Iterator[Context]:
    """A context in which the model of the bench is a small one."""
    model = {"id": local_model().id, "path": "models/small", "context": 2_048, "adapter_rank": bench.RANK}
    config = Config.parse(CONFIG | {"store": store_url, "models": [model]}, "the tests' config")
    with closing(Context.open(config, engine=ScriptedEngine())) as context:
        yield context


def test_the_jobs_are_accepted(small: Context, home: Path) -> None:
    rows = preferences.write([Pair("Is it so?", "Yes.", "No.")], home / "data" / "rows.jsonl")
    dpo = PostTrainingRLHFRequest.model_validate(bench.request_of(DPO, rows))
    assert post_training.preference_optimize(small, dpo).uuid == DPO
    reward = RewardModelRequest.model_validate(bench.request_of(REWARD, rows))
    assert post_training.train_reward_model(small, reward).uuid == REWARD

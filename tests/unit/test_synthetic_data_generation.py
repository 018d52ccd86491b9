"""Synthetic data that is answered at once: how dialogs are told apart, what is sampled, scored, kept and counted."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stack import synthetic_data_generation
from stack.api.synthetic_data_generation import (
    SyntheticDataGenerationRequest,
    SyntheticDataGenerationResponse,
)
from stack.api.wire import describe
from stack.config import Config, SequenceClassifier
from stack.context import Context
from stack.errors import BadInput, EngineFailed, NotFound, TooManyRequests, Unavailable
from stack.models import Classifiable, Scores
from stack.synthetic_data_generation import histogram, seed_of
from tests.conftest import CONFIG
from tests.varied_engine import VariedEngine

REWARD_MODELS: list[dict[str, Any]] = [
    {"kind": "classifier", "id": "reward", "path": "models/reward", "max_tokens": 64},
    {"kind": "judge", "id": "judge", "model": "small", "rubric": "Is it right?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Where?"}
ANSWER = {"role": "assistant", "content": "There."}
ATTACHED: list[Any] = ["See", {"content": "https://example.com/a.txt", "mime_type": "text/plain"}]


@pytest.fixture
def engine() -> VariedEngine:
    """Its reward model counts the words of the answer and its dialog."""
    engine = VariedEngine()
    engine.logits_of = lambda text: [float(len(text.split()))]
    return engine


@pytest.fixture
def context(home: Path, store_url: str, engine: VariedEngine) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "reward_models": REWARD_MODELS}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


def request(*dialogs: Any, **fields: Any) -> SyntheticDataGenerationRequest:
    body = {"dialogs": list(dialogs) or [QUESTION], "filtering_function": "none"} | fields
    return SyntheticDataGenerationRequest.model_validate(body)


async def generated(context: Context, *dialogs: Any, **fields: Any) -> SyntheticDataGenerationResponse:
    return await synthetic_data_generation.generate(context, request(*dialogs, **fields))


def scores(response: SyntheticDataGenerationResponse) -> list[list[float]]:
    return [[one.score for one in row.scored_generations] for row in response.synthetic_data]


def texts(response: SyntheticDataGenerationResponse) -> list[list[Any]]:
    return [[one.message.content for one in row.scored_generations] for row in response.synthetic_data]


@pytest.mark.parametrize(
    ("messages", "lengths"),
    [
        ([QUESTION], [1]),
        ([QUESTION, QUESTION, QUESTION], [1, 1, 1]),
        ([SYSTEM, QUESTION], [2]),
        ([SYSTEM, QUESTION, SYSTEM, QUESTION], [2, 2]),
        ([SYSTEM, QUESTION, QUESTION], [2, 1]),
        ([QUESTION, ANSWER, QUESTION], [3]),
        ([SYSTEM, QUESTION, ANSWER, QUESTION, QUESTION], [4, 1]),
        ([QUESTION, ANSWER, {"role": "ipython", "call_id": "1", "tool_name": "t", "content": "5"}], [3]),
    ],
)
def test_a_list_of_messages_is_cut_into_dialogs(messages: list[Any], lengths: list[int]) -> None:
    dialogs = request(*messages).each
    assert [len(one) for one in dialogs] == lengths
    assert [message.role for one in dialogs for message in one] == [message["role"] for message in messages]


def test_a_list_of_lists_is_taken_as_it_is() -> None:
    assert [len(one) for one in request([QUESTION, QUESTION], [SYSTEM, QUESTION]).each] == [2, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"dialogs": []}, ["dialogs", "at least 1 item"]),
        ({"dialogs": [[]]}, ["dialogs.0", "at least 1 item"]),
        ({"dialogs": [SYSTEM]}, ["the dialog 0 ends with a message of the role 'system'"]),
        ({"dialogs": [QUESTION, SYSTEM, QUESTION, ANSWER]}, ["the dialog 1", "'assistant'; allowed: user, ipython"]),
        ({"dialogs": [{"role": "user"}]}, ["dialogs.0", "content", "is required"]),
        ({"dialogs": [[QUESTION], QUESTION]}, ["dialogs.1", "list"]),
        ({"dialogs": [QUESTION] * 257}, ["257 dialogs; allowed: at most 256"]),
        ({"dialogs": [[QUESTION]] * 257}, ["257 entries; allowed: at most 256"]),
        ({"dialogs": [[QUESTION] * 500] * 21}, ["10500 messages; allowed: at most 10000"]),
        ({"dialogs": [*[QUESTION, ANSWER] * 500, QUESTION]}, ["the dialog 0 has 1001 messages; allowed: at most 1000"]),
        ({"dialogs": [QUESTION, {"role": "user", "content": ATTACHED}]}, ["the dialog 1 has an attachment", "text"]),
        ({"dialogs": [[QUESTION | {"context": ATTACHED[1]}]]}, ["the dialog 0 has an attachment"]),
        ({"filtering_function": "best"}, ["filtering_function", "'none', 'random', 'top_k'", "'best'"]),
        ({"num_generations": 0}, ["num_generations", "greater than or equal to 1"]),
        ({"num_generations": 10_000}, ["num_generations", "less than or equal to 64"]),
        ({"num_generations": 64, "dialogs": [QUESTION] * 33}, ["2112 generations; allowed: at most 2048"]),
        ({"num_generations": 64, "dialogs": [QUESTION | {"content": "x" * 130_000}]}, ["8320000 characters"]),
        ({"filter_k": 0}, ["filter_k"]),
        ({"filter_k": 10_000}, ["filter_k"]),
        ({"filter_p": 0}, ["filter_p", "greater than 0"]),
        ({"filter_p": 1.5}, ["filter_p"]),
        ({"threshold": "high"}, ["threshold"]),
        ({"seed": -1}, ["seed"]),
        ({"sampling_params": {"strategy": "greedy"}}, ["'greedy' gives the same each time", "num_generations 1"]),
        ({"sampling_params": {"strategy": "top_p", "temperature": 0}}, ["the temperature 0 gives the same each time"]),
        ({"sampling_params": {"strategy": "top_k", "top_k": 5, "temperature": 0}}, ["the temperature 0 gives"]),
        ({"sampling_params": {"strategy": "top_k", "top_k": 1}}, ["the top_k 1 gives the same each time"]),
        ({"k": 4}, ["unknown key 'k'", "num_generations"]),
    ],
    ids=str,
)
def test_a_wrong_request_is_refused_with_what_is_allowed(body: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        SyntheticDataGenerationRequest.model_validate({"dialogs": [QUESTION], "filtering_function": "none"} | body)
    for word in words:
        assert word in describe(caught.value)


async def test_each_dialog_has_its_generations_with_their_scores(context: Context, engine: VariedEngine) -> None:
    response = await generated(context, [QUESTION], [SYSTEM, QUESTION], num_generations=5)
    assert [len(one) for one in texts(response)] == [5, 5]
    for row, words in zip(response.synthetic_data, (1, 3), strict=True):
        for one in row.scored_generations:
            assert one.score == len(str(one.message.content).split()) + words
    assert len({one for row in texts(response) for one in row}) > 1
    assert {asked.body["seed"] for asked in engine.asked} == {seed_of(0, row, n) for row in (0, 1) for n in range(5)}
    assert {asked.body["temperature"] for asked in engine.asked} == {1.0}
    assert response.errors == []


async def test_the_same_seed_gives_the_same_again_and_another_one_does_not(context: Context) -> None:
    first = await generated(context, num_generations=8)
    assert scores(await generated(context, num_generations=8)) == scores(first)
    assert scores(await generated(context, num_generations=8, seed=1)) != scores(first)


async def test_the_filter_chooses_by_the_scores(context: Context) -> None:
    (all_scores,) = scores(await generated(context, num_generations=6))
    (best,) = scores(await generated(context, num_generations=6, filtering_function="top_k", filter_k=2))
    assert sorted(best) == sorted(all_scores)[-2:]
    (above,) = scores(await generated(context, num_generations=6, threshold=max(all_scores)))
    assert set(above) == {max(all_scores)}
    assert scores(await generated(context, num_generations=6, threshold=1e6)) == [[]]


async def test_statistics_count_what_was_generated_kept_and_failed(context: Context, engine: VariedEngine) -> None:
    engine.refusals["long"] = BadInput("the prompt has 300 tokens; allowed: at most 256", param="messages")
    dialogs = [[QUESTION], [QUESTION | {"content": "Too long"}], [QUESTION]]
    response = await generated(context, *dialogs, num_generations=3, filtering_function="top_k")
    assert [len(one) for one in texts(response)] == [1, 0, 1]
    (error,) = response.errors
    assert (error.index, error.error.param) == (1, "dialogs.1")
    assert error.error.message == "the prompt has 300 tokens; allowed: at most 256"
    statistics = response.statistics
    assert statistics is not None
    counts = {name: statistics[name] for name in ("dialogs", "failed", "generated", "kept")}
    assert counts == {"dialogs": 3, "failed": 1, "generated": 6, "kept": 2}
    assert (statistics["model"], statistics["reward_model"]) == ("small", "reward")
    assert sum(statistics["score_histogram"]["counts"]) == 6
    assert len(statistics["score_histogram"]["edges"]) == len(statistics["score_histogram"]["counts"]) + 1
    assert (statistics["prompt_tokens"], statistics["completion_tokens"]) == (6 * 7, 6)
    assert statistics["seconds"] > 0


async def test_what_the_reward_model_cannot_read_fails_its_dialog_alone(context: Context) -> None:
    response = await generated(context, [QUESTION], [QUESTION | {"content": "x " * 70}])
    assert [len(one) for one in texts(response)] == [4, 0]
    assert "allowed: at most 64" in response.errors[0].error.message


async def test_a_reward_model_that_is_down_is_named_and_ends_the_request(
    context: Context, engine: VariedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("the model 'reward' has no running replica yet", retry_after=30)

    monkeypatch.setattr(engine, "classify", away)
    with pytest.raises(Unavailable, match=r"the reward model 'reward' cannot score now: .* no running") as caught:
        await generated(context, [QUESTION], [QUESTION])
    assert (caught.value.param, caught.value.retry_after) == ("reward_model", 30)


@pytest.mark.parametrize("error", [Unavailable("it starts"), EngineFailed("it died")])
async def test_what_keeps_all_dialogs_from_an_answer_is_raised(
    context: Context, engine: VariedEngine, error: Exception
) -> None:
    engine.fail(error)
    with pytest.raises(type(error)):
        await generated(context, [QUESTION], [QUESTION])


async def test_a_full_queue_is_waited_for(
    context: Context, engine: VariedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def no_pause(seconds: float) -> None:
        waits.append(seconds)
        engine.fault = None

    monkeypatch.setattr("stack.batch_inference.pause", no_pause)
    engine.fail(TooManyRequests("full", retry_after=1))
    assert len(scores(await generated(context, num_generations=2))[0]) == 2
    assert waits


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "big"}, "model", "there is no model 'big'"),
        ({"reward_model": "big"}, "reward_model", "there is no reward model 'big'; there are: reward, judge"),
        ({"reward_model": "small"}, "reward_model", "models for that: reward, judge"),
        ({"model": "reward"}, "model", "models for that: small"),
        ({"sampling_params": {"strategy": "top_k"}}, "sampling_params.top_k", "needs a top_k"),
    ],
)
async def test_models_and_sampling_that_there_are_not_are_refused_before_any_work(
    context: Context, engine: VariedEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises((BadInput, NotFound), match=words) as caught:
        await generated(context, **fields)
    assert caught.value.param == param
    assert engine.asked == []


async def test_without_reward_models_there_is_nothing_to_score_with(context: Context) -> None:
    bare = Context.open(Config.parse(CONFIG | {"store": context.config.store}, "config"), engine=context.engine)
    with pytest.raises(NotFound, match="the config lists no reward_models"):
        await generated(bare)
    bare.close()


def test_seeds_differ_and_are_what_an_engine_takes() -> None:
    seeds = {seed_of(seed, number, index) for seed in range(3) for number in range(10) for index in range(10)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_histogram_counts_every_score_as_numpy_does() -> None:
    drawn = random.Random(0)
    scores = [0.0, 1.0, 1.0, 10.0, *(drawn.uniform(0, 10) for _ in range(500))]
    found = histogram(iter(scores), 0.0, 10.0)
    counts, edges = np.histogram(scores, synthetic_data_generation.HISTOGRAM_BINS)
    assert found["counts"] == counts.tolist()
    assert found["edges"] == pytest.approx(edges.tolist())


@pytest.mark.parametrize("score", [0.5, 0.0, -1e30])
def test_equal_scores_have_a_histogram_too(score: float) -> None:
    found = histogram([score, score], score, score)
    assert sum(found["counts"]) == 2
    assert found["edges"][0] == score


class Scorer(VariedEngine):
    """Notes how often it scores at once."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = self.most = 0

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        self.at_once += len(inputs)
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.02)
        self.at_once -= len(inputs)
        return await super().classify(model, inputs, windows)


@pytest.mark.parametrize("engine", [Scorer()])
async def test_a_reward_model_is_asked_side_by_side_and_in_bounds(context: Context, engine: Scorer) -> None:
    response = await generated(context, *[[QUESTION]] * 200, num_generations=4)
    assert sum(len(one) for one in scores(response)) == 800
    assert 4 < engine.most <= 64

"""Reward scoring: classifiers with one head and with several, judges, and which models can be asked."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stack import reward_scoring
from stack.api.reward_scoring import MAX_GENERATIONS, RewardScoringRequest, RewardScoringResponse
from stack.batch_inference import PatientEngine
from stack.config import Config, Judge, RewardModel
from stack.context import Context
from stack.errors import BadInput, NotFound, TooManyRequests
from stack.models import Endpoint, Model
from stack.reward_scoring import expected_rating
from stack.store import models
from tests import samples
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

REWARD_MODELS: list[dict[str, Any]] = [
    {"kind": "classifier", "id": "reward", "path": "models/reward", "max_tokens": 64},
    {"kind": "classifier", "id": "several", "path": "models/several", "heads": {"kind": 0.5, "true": 2, "long": -1}},
    {"kind": "judge", "id": "judge", "model": "small", "rubric": "Is it right?"},
    {"kind": "judge", "id": "astray", "model": "small:gone", "rubric": "Is it right?"},
]
QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "reward_models": REWARD_MODELS}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def request(*generations: list[dict[str, Any]], **fields: Any) -> RewardScoringRequest:
    rows = [{"dialog": [QUESTION], "sampled_generations": one} for one in generations]
    return RewardScoringRequest.model_validate({"dialog_generations": rows, "model": "reward"} | fields)


def scores(response: RewardScoringResponse) -> list[list[float]]:
    return [[one.score for one in row.scored_generations] for row in response.scored_generations]


def texts(response: RewardScoringResponse) -> list[list[Any]]:
    return [[one.message.content for one in row.scored_generations] for row in response.scored_generations]


# Classifiers


async def test_each_generation_is_scored_as_the_next_message_and_the_order_is_kept(
    context: Context, engine: ScriptedEngine
) -> None:
    engine.logits_of = lambda text: [float(len(text.split()) - len(QUESTION["content"].split()))]
    asked = request([answer("one two three"), answer("one")], [], [answer("one two")])
    response = await reward_scoring.score(context, asked)
    assert scores(response) == [[3, 1], [], [2]]
    assert texts(response) == [["one two three", "one"], [], ["one two"]]
    (call,) = engine.asked_to_classify
    assert call.inputs[0] == [QUESTION, answer("one two three")]
    assert (call.model.id, len(call.inputs), call.windows) == ("reward", 3, False)


async def test_several_heads_are_summed_with_their_weights(context: Context, engine: ScriptedEngine) -> None:
    engine.labels = ("kind", "other", "long", "true")
    engine.logits_of = lambda text: [4.0, 100.0, 3.0, 0.25]
    response = await reward_scoring.score(context, request([answer("Paris")], model="several"))
    assert scores(response) == [[0.5 * 4 - 3 + 2 * 0.25]]


async def test_labels_that_the_config_does_not_weigh_are_told(context: Context, engine: ScriptedEngine) -> None:
    engine.labels, engine.logits_of = ("kind", "true"), lambda text: [1.0, 2.0]
    with pytest.raises(BadInput, match="'reward' needs `heads`, as it has the labels kind, true"):
        await reward_scoring.score(context, request([answer("Paris")]))
    with pytest.raises(BadInput, match=r"'several' has no label 'long' \(heads\): kind, true"):
        await reward_scoring.score(context, request([answer("Paris")], model="several"))


async def test_those_below_the_threshold_are_left_out_and_their_dialogs_stay(
    context: Context, engine: ScriptedEngine
) -> None:
    engine.logits_of = lambda text: [float(text.split()[-1])]
    rows = [[answer("1"), answer("3"), answer("2")], [answer("1")]]
    response = await reward_scoring.score(context, request(*rows, threshold=2))
    assert texts(response) == [["3", "2"], []]
    assert len(response.scored_generations) == 2
    below = await reward_scoring.score(context, request([answer("-1"), answer("0")], threshold=0))
    assert texts(below) == [["0"]]


async def test_without_generations_nobody_is_asked(context: Context, engine: ScriptedEngine) -> None:
    response = await reward_scoring.score(context, request([], []))
    assert scores(response) == [[], []]
    assert engine.asked_to_classify == []


async def test_calls_of_tools_are_said_in_words_to_a_model_that_knows_none(
    context: Context, engine: ScriptedEngine
) -> None:
    call = {"call_id": "c1", "tool_name": "clock", "arguments": {"zone": "UTC"}}
    dialog = [
        QUESTION,
        answer("", tool_calls=[call]),
        dict(role="ipython", call_id="c1", tool_name="clock", content="9"),
    ]
    rows = [{"dialog": dialog, "sampled_generations": [answer("Nine.")]}]
    asked = RewardScoringRequest.model_validate({"dialog_generations": rows, "model": "reward"})
    await reward_scoring.score(context, asked)
    messages: Any = engine.asked_to_classify[0].inputs[0]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert '{"name": "clock", "parameters": {"zone": "UTC"}}' in messages[1]["content"]
    assert "Result of clock" in messages[2]["content"]


async def test_a_generation_that_is_too_long_is_named_by_its_place(context: Context) -> None:
    rows = [[answer("one")], [answer("two"), answer("word " * 64)]]
    with pytest.raises(BadInput, match=r"the generation with its dialog has \d+ tokens; allowed: at most 64") as caught:
        await reward_scoring.score(context, request(*rows))
    assert caught.value.param == "dialog_generations.1.sampled_generations.1"


async def test_an_attachment_is_refused_by_its_place(context: Context) -> None:
    picture = {"content": "data:image/png;base64,AAAA", "mime_type": "image/png"}
    with pytest.raises(BadInput, match="allowed: text") as caught:
        await reward_scoring.score(context, request([answer("one"), {"role": "assistant", "content": picture}]))
    assert caught.value.param == "dialog_generations.0.sampled_generations.1.content"


async def test_whoever_leaves_takes_the_scoring_along(context: Context, engine: ScriptedEngine) -> None:
    for model in ("reward", "judge"):
        engine.closed_early.clear()
        engine.fail("hang")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reward_scoring.score(context, request([answer("one")], model=model)), 0.1)
        assert engine.closed_early.is_set()


# Judges

JUDGE = Judge(kind="judge", id="judge", model="small", rubric="Is it right?")


def token(text: str, probability: float) -> dict[str, Any]:
    return {"token": text, "logprob": math.log(probability)}


def test_a_rating_is_the_mean_over_the_probabilities_of_the_ratings_alone() -> None:
    tokens = [
        token("The", 0.5),
        token("5", 0.2),
        token("3", 0.1),
        token(" 5", 0.05),
        token("10", 0.1),
        token("0", 0.02),
    ]
    assert expected_rating(JUDGE, tokens) == pytest.approx((5 * 0.25 + 3 * 0.1) / 0.35)
    assert expected_rating(JUDGE, [token("2", 1e-6)]) == pytest.approx(2)


@pytest.mark.parametrize("tokens", [[], [token("The", 0.9), token("6", 0.1)], [{"token": "4", "logprob": -9999.0}]])
def test_a_judge_that_gives_no_rating_is_refused(tokens: list[dict[str, Any]]) -> None:
    with pytest.raises(BadInput, match="the judge 'judge' gives no rating from 1 to 5: it would begin with"):
        expected_rating(JUDGE, tokens)


class Rating(ScriptedEngine):
    """A chat model that rates an answer by the number in it, 3 to 1 against the lowest rating; it refuses the first
    questions with a full queue."""

    def __init__(self, refusals: int = 0) -> None:
        super().__init__()
        self.refusals = refusals
        self.answering = 0
        self.most = 0
        self.lock = threading.Lock()

    async def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        async for _ in super().generate(model, endpoint, body):
            pass
        if self.refusals:
            self.refusals -= 1
            raise TooManyRequests("too many wait", retry_after=1)
        self.answering += 1
        self.most = max(self.most, self.answering)
        await asyncio.sleep(0)
        self.answering -= 1
        rating = body["messages"][0]["content"].split("--- The answer to rate ---\n")[1][0]
        tops = [token(rating, 0.6), token("1", 0.2), token("I", 0.1)]
        choice = {"index": 0, "logprobs": {"content": [{**tops[2], "top_logprobs": tops}]}}
        yield json.dumps({"choices": [choice]}).encode()


@pytest.fixture
def judged(home: Path, store_url: str) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "reward_models": REWARD_MODELS}
    context = Context.open(Config.parse(config, "the tests' config"), engine=Rating())
    yield context
    context.close()


async def test_a_judge_is_asked_by_its_rubric_for_the_probabilities_of_one_token(judged: Context) -> None:
    response = await reward_scoring.score(judged, request([answer("5 of 5"), answer("3")], model="judge"))
    assert scores(response)[0] == pytest.approx([(5 * 3 + 1) / 4, (3 * 3 + 1) / 4])
    body = judged.engine.asked[0].body  # type: ignore[attr-defined]
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == ("small", 1, True, 20)
    (question,) = body["messages"]
    for words in ("Is it right?", "user: What is the capital of France?", "5 of 5", "from 1 (worst) to 5 (best)"):
        assert words in question["content"]


async def test_a_judge_that_is_asked_often_is_asked_side_by_side_and_in_bounds(judged: Context) -> None:
    ratings = [str(2 + number % 4) for number in range(200)]
    response = await reward_scoring.score(judged, request([answer(one) for one in ratings], model="judge"))
    assert scores(response)[0] == pytest.approx([(int(one) * 3 + 1) / 4 for one in ratings])
    assert 1 < judged.engine.most <= 64  # type: ignore[attr-defined]


async def test_a_judge_whose_queue_is_full_is_asked_again(judged: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def pause(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("stack.batch_inference.pause", pause)
    judged.engine.refusals = 2  # type: ignore[attr-defined]
    response = await reward_scoring.score(judged, request([answer("4")], model="judge"))
    assert scores(response)[0] == pytest.approx([3.25])
    assert waits == [1, 1]


async def test_a_judge_is_not_waited_for_twice_as_long_by_who_is_patient_already(
    judged: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def pause(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("stack.batch_inference.pause", pause)
    monkeypatch.setattr("stack.batch_inference.PATIENCE_S", 3)
    judged.engine.refusals = 1_000  # type: ignore[attr-defined]
    patient = replace(judged, engine=PatientEngine(judged.engine))
    with pytest.raises(TooManyRequests):
        await reward_scoring.score(patient, request([answer("4")], model="judge"))
    assert waits == [1, 1, 1]


async def test_what_a_judges_model_refuses_is_told_with_the_place(context: Context, engine: ScriptedEngine) -> None:
    engine.fail(BadInput("the context has 256 tokens"))
    with pytest.raises(BadInput, match="'judge' cannot read it: the context has 256 tokens") as caught:
        await reward_scoring.score(context, request([answer("one")], model="judge"))
    assert caught.value.param == "dialog_generations.0.sampled_generations.0"


async def test_a_judge_without_its_model_says_so(context: Context) -> None:
    with pytest.raises(NotFound, match="the judge 'astray' has lost its model: there is no model 'small:gone'"):
        await reward_scoring.score(context, request([answer("one")], model="astray"))


# Which models there are


async def test_an_unknown_model_is_told_with_the_known_ones(context: Context) -> None:
    known = "reward, several, judge, astray"
    with pytest.raises(NotFound, match=f"there is no reward model 'best'; there are: {known}") as caught:
        await reward_scoring.score(context, request([answer("one")], model="best"))
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(BadInput, match=f"'small' makes text and no scores; models for that: {known}"):
        await reward_scoring.score(context, request([answer("one")], model="small"))


@pytest.mark.parametrize("id", ["reward", "judge"])
async def test_a_reward_model_is_no_language_model(context: Context, id: str) -> None:
    assert context.models.get_any(id) in context.models.all()
    with pytest.raises(BadInput, match=f"the model '{id}' gives scores and no text; models for that: small"):
        await context.models.find(id)
    with pytest.raises(BadInput, match="gives scores and no embeddings"):
        await context.models.find_embedding_model(id)


async def test_a_reward_model_that_a_job_has_trained_scores_for_its_tenant_alone(
    context: Context, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "RECENT_S", 0.0)
    samples.add_trained_reward(context.store, "small-reward-1")
    response = await reward_scoring.score(context, request([answer("one")], model="small-reward-1"))
    assert len(scores(response)[0]) == 1
    model = engine.asked_to_classify[0].model
    assert isinstance(model, RewardModel)
    assert (model.id, model.path) == ("small-reward-1", "models/small")
    assert model in context.models.all()
    assert "small-reward-1" not in {one.id for one in context.models.language_models()}
    with pytest.raises(BadInput, match="gives scores and no text"):
        context.models.get("small-reward-1")
    other = context.of_tenant("other")
    with pytest.raises(NotFound, match="no reward model 'small-reward-1'"):
        await reward_scoring.score(other, request([answer("one")], model="small-reward-1"))


# Bounds


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"dialog_generations": []}, "at least 1 item"),
        ({"dialog_generations": [{"dialog": [], "sampled_generations": []}]}, "at least 1 item"),
        ({"dialog_generations": [{"dialog": [QUESTION]}]}, "sampled_generations"),
        ({"dialog_generations": [{"dialog": [QUESTION], "sampled_generations": [1] * 1_025}] * 2}, "2050 generations"),
        ({"dialog_generations": [{"dialog": [QUESTION], "sampled_generations": []}] * 1_025}, "has 1025 entries"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": 1e31}, "threshold"),
        ({"model": ""}, "model"),
    ],
)
def test_what_is_beyond_its_bounds_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        request([answer("one")], **body)


def test_a_dialog_counts_once_for_each_of_its_generations() -> None:
    long = {"dialog": [{"role": "user", "content": "a" * 100_000}], "sampled_generations": [answer("b")] * 79}
    RewardScoringRequest.model_validate({"model": "reward", "dialog_generations": [long]})
    long["sampled_generations"] = [answer("b")] * 80
    with pytest.raises(ValueError, match="8000080 characters would be read"):
        RewardScoringRequest.model_validate({"model": "reward", "dialog_generations": [long]})
    assert MAX_GENERATIONS >= 80


@pytest.mark.parametrize(
    "message",
    [
        answer("", tool_calls=[{"call_id": "", "tool_name": "f", "arguments": {"a": "b" * 1_000}}]),
        answer("", tool_calls=[{"call_id": "", "tool_name": "f", "arguments": {"b" * 1_000: 1}}]),
        answer("", tool_calls=[{"call_id": "", "tool_name": "f", "arguments": {"a": [123] * 200}}]),
        answer("", tool_calls=[{"call_id": "c" * 200, "tool_name": "f" * 200, "arguments": {}}] * 3),
        {"role": "ipython", "call_id": "c" * 200, "tool_name": "f" * 200, "content": "r" * 600},
    ],
)
def test_calls_of_tools_and_their_results_count(message: dict[str, Any]) -> None:
    """8,000 times and more than 1,000 characters are too many."""
    dialogs = [{"dialog": [message] * 80, "sampled_generations": [answer("b")] * 100}]
    with pytest.raises(ValueError, match=r"8\d{6} characters would be read|9\d{6} characters would be read"):
        RewardScoringRequest.model_validate({"model": "reward", "dialog_generations": dialogs})


def test_arguments_that_are_nested_too_deeply_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    call = {"call_id": "1", "tool_name": "f", "arguments": {"a": deep}}
    with pytest.raises(ValueError, match="the arguments of the call of 'f' are nested too deeply"):
        request([answer("b", tool_calls=[call])])

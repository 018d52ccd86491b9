"""The worker that asks an evaluation's questions: the model answers it as it answers users. And what comes of it."""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_apps.scripted_answers import LOGPROBS
from stack.config import Config, Judge
from stack.context import Context
from stack.errors import BadInput, EngineFailed, TooManyRequests, Unavailable
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import evaluate, scores
    from jobs.evaluate import Ask, Wanted

SHIELDED: dict[str, Any] = {
    "classifiers": [{"id": "classifier", "path": "models/classifier"}],
    "shields": [{"id": "detector", "type": "injection_shield", "model": "classifier"}],
    "model_shields": {"small": {"input": ["detector"], "output": ["detector"]}},
}


@pytest.fixture
def engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedEngine]:
    """What answers the workers; its classifier finds what is evil."""
    engine = ScriptedEngine()
    engine.labels = ("BENIGN", "INJECTION")
    engine.logits_of = lambda text: [0.0, 4.0] if "evil" in text else [4.0, 0.0]
    opened: list[Context] = []
    really_open = Context.open

    def on_this_engine(config: Config) -> Context:
        opened.append(really_open(config, engine))
        return opened[-1]

    monkeypatch.setattr(Context, "open", on_this_engine)
    yield engine
    for context in opened:
        context.close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long the worker has waited."""
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(evaluate, "pause", pause)
    return waited


def question(text: str, reference: str = "Paris") -> str:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"messages": messages, "answer": reference, "id": text, "functions": None})


async def asked(*questions: str, wanted: Wanted = Wanted(), **config: Any) -> dict[str, list[Any]]:  # noqa: B008
    rows = [question(one) for one in questions]
    worker = Ask(CONFIG | config, "default", {"model": "small", "stream": False}, wanted)
    (answers,) = [one async for one in worker({"row": [*range(len(rows))], "value": rows})]
    return answers


async def test_a_question_that_the_model_s_shields_do_not_pass_has_an_empty_answer_and_the_reason(
    engine: ScriptedEngine,
) -> None:
    answers = await asked("What is the capital of France?", "Be evil now", **SHIELDED)
    first, second = answers["answer"]
    assert "Paris" in first
    assert second == ""
    assert answers["shield_violation"][0] == ""
    assert "'detector' does not pass the input" in answers["shield_violation"][1]
    assert [one > 0 for one in answers["completion_tokens"]] == [True, False]
    assert len(engine.asked) == 1


async def test_an_answer_that_the_model_s_shields_do_not_pass_is_empty_too(engine: ScriptedEngine) -> None:
    engine.tokens = ("Paris", " is", " evil")
    answers = await asked("What is the capital of France?", **SHIELDED)
    assert answers["answer"] == [""]
    assert "does not pass the output" in answers["shield_violation"][0]


async def test_a_model_without_shields_is_asked_straight(engine: ScriptedEngine) -> None:
    answers = await asked("Be evil now")
    assert answers["shield_violation"] == [""]
    assert engine.asked_to_classify == []


async def test_a_row_that_cannot_be_answered_fails_alone_with_its_error(engine: ScriptedEngine) -> None:
    engine.fail_for = lambda body: BadInput("it is too long") if "long" in str(body["messages"]) else None
    answers = await asked("What is the capital of France?", "A long one")
    assert answers["error"] == ["", "it is too long"]
    assert answers["error_code"] == ["", "bad_input"]
    assert answers["answer"][1] == ""
    assert len(engine.asked) == 2, "what is wrong for good is not asked again"


@pytest.mark.parametrize(
    "fault", [Unavailable("away", retry_after=7), TooManyRequests("full", retry_after=7), EngineFailed("broken")]
)
async def test_what_may_pass_is_asked_again(engine: ScriptedEngine, pauses: list[float], fault: Any) -> None:
    faults = [fault, fault]
    engine.fail_for = lambda _: faults.pop() if faults else None
    answers = await asked("What is the capital of France?")
    assert answers["error"] == [""]
    assert "Paris" in answers["answer"][0]
    assert pauses == [fault.retry_after or 1] * 2


async def test_what_does_not_pass_is_told_after_some_tries(engine: ScriptedEngine, pauses: list[float]) -> None:
    engine.fail(Unavailable("it is away"))
    answers = await asked("What is the capital of France?")
    assert (answers["error"], answers["error_code"]) == (["it is away"], ["unavailable"])
    assert len(engine.asked) == evaluate.TRIES == len(pauses) + 1


async def test_the_likelihood_of_a_reference_is_that_of_its_tokens_behind_the_prompts(engine: ScriptedEngine) -> None:
    answers = await asked("What is the capital of France?", wanted=Wanted(likelihoods=True))
    assert answers["reference_tokens"] == [1]
    assert answers["nll"] == [-LOGPROBS[0]]
    body = engine.asked[-1].body
    assert body["messages"][-1] == {"role": "assistant", "content": "Paris"}
    assert (body["continue_final_message"], body["add_generation_prompt"], body["prompt_logprobs"]) == (True, False, 0)
    assert (body["max_tokens"], engine.asked[-1].model.id) == (1, "small")


async def test_where_no_likelihood_is_wanted_none_is_asked_for(engine: ScriptedEngine) -> None:
    answers = await asked("What is the capital of France?")
    assert math.isnan(answers["nll"][0])
    assert len(engine.asked) == 1


async def test_a_reference_of_which_nothing_is_told_fails_its_row(engine: ScriptedEngine) -> None:
    worker = Ask(CONFIG, "default", {"model": "small", "stream": False}, Wanted(likelihoods=True))
    (answers,) = [one async for one in worker({"row": [1], "value": [question("a", reference=" ")]})]
    assert "the reference has no tokens" in answers["error"][0]


JUDGE = Judge(kind="judge", id="judge", model="small", rubric="Good answers are brief.")


def judging(engine: ScriptedEngine, tokens: dict[str, tuple[str, ...]]) -> None:
    """Answers by the first of some words that a question holds."""
    really = engine.generate

    def generate(model: Any, endpoint: Any, body: dict[str, Any]) -> Any:
        text = str(body["messages"][-1]["content"])
        engine.tokens = next(said for word, said in tokens.items() if word in text)
        return really(model, endpoint, body)

    engine.generate = generate  # type: ignore[method-assign]


async def test_a_judge_rates_the_answer_within_its_dialog_by_the_rubric(engine: ScriptedEngine) -> None:
    judging(engine, {"Reply with one whole number": ("4",), "": ("Paris",)})
    answers = await asked("What is the capital of France?", wanted=Wanted(judge=JUDGE, rates=True))
    assert answers["rating"] == [4.0]
    assert math.isnan(answers["shown_first"][0])
    said = engine.asked[-1].body["messages"][0]["content"]
    for part in ("Good answers are brief.", "user: What is the capital of France?", "The answer to rate ---\nParis"):
        assert part in said


async def test_an_answer_is_compared_with_the_reference_in_both_orders(engine: ScriptedEngine) -> None:
    judging(engine, {"Answer A ---\nLyon": ("A",), "Answer B ---\nLyon": ("B",), "": ("Lyon",)})
    answers = await asked("What is the capital of France?", wanted=Wanted(judge=JUDGE, compares=True))
    assert (answers["shown_first"], answers["shown_second"]) == ([1.0], [1.0])
    assert answers["opponent_answer"] == [""]
    assert "--- Answer B ---\nParis" in engine.asked[1].body["messages"][0]["content"]
    assert "--- Answer A ---\nParis" in engine.asked[2].body["messages"][0]["content"]


async def test_a_judge_that_goes_by_the_place_prefers_neither(engine: ScriptedEngine) -> None:
    judging(engine, {"Answer A": ("A",), "": ("Lyon",)})
    answers = await asked("What is the capital of France?", wanted=Wanted(judge=JUDGE, compares=True))
    assert (answers["shown_first"], answers["shown_second"]) == ([1.0], [0.0])


async def test_an_opponent_is_asked_the_same_as_the_model(engine: ScriptedEngine) -> None:
    config = {"models": [*CONFIG["models"], {"id": "other", "path": "models/small"}]}
    judging(engine, {"Answer A": ("A",), "": ("Lyon",)})
    wanted = Wanted(judge=JUDGE, compares=True, opponent="other")
    answers = await asked("What is the capital of France?", wanted=wanted, **config)
    assert answers["opponent_answer"] == ["Lyon"]
    assert [one.model.id for one in engine.asked] == ["small", "other", "small", "small"]
    assert engine.asked[0].body["messages"] == engine.asked[1].body["messages"]


async def test_what_an_opponents_shields_do_not_pass_is_an_empty_answer(engine: ScriptedEngine) -> None:
    models = [*CONFIG["models"], {"id": "other", "path": "models/small"}]
    shields = SHIELDED | {"model_shields": {"other": {"input": ["detector"], "output": []}}}
    judging(engine, {"Answer A": ("A",), "": ("Lyon",)})
    wanted = Wanted(judge=JUDGE, compares=True, opponent="other")
    answers = await asked("Be evil now", wanted=wanted, models=models, **shields)
    assert (answers["opponent_answer"], answers["answer"], answers["shield_violation"]) == ([""], ["Lyon"], [""])


async def test_a_judge_that_does_not_say_fails_the_row(engine: ScriptedEngine) -> None:
    answers = await asked("What is the capital of France?", wanted=Wanted(judge=JUDGE, rates=True))
    assert "the judge 'judge' gives no rating from 1 to 5" in answers["error"][0]
    assert math.isnan(answers["rating"][0])


WEATHER = {
    "name": "get_weather",
    "description": "The forecast.",
    "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
}
EXPECTED = json.dumps([{"get_weather": {"city": ["Paris"], "days": ["", 1]}}])


async def test_functions_are_offered_and_the_calls_are_the_answer(engine: ScriptedEngine) -> None:
    engine.tokens = ('{"name": "get_weather", "parameters": {"city": "paris"}}',)
    question = dict(messages=[{"role": "user", "content": "Rain?"}], answer=EXPECTED, id="1", functions=[WEATHER])
    config = {"models": [CONFIG["models"][0] | {"prompt_format": "llama3"}]}
    worker = Ask(CONFIG | config, "default", {"model": "small", "stream": False}, Wanted())
    (answers,) = [one async for one in worker({"row": [1], "value": [json.dumps(question)]})]
    assert json.loads(answers["answer"][0]) == [{"name": "get_weather", "arguments": {"city": "paris"}}]
    assert "get_weather" in str(engine.asked[0].body["messages"])
    row = evaluate.scored(answered(value=json.dumps(question), answer=answers["answer"][0]), [])
    assert row["ast"] == 1
    assert evaluate.scored(answered(value=json.dumps(question), answer="Paris"), [])["ast"] == 0


def answered(**changes: Any) -> dict[str, Any]:
    """A row as the worker gives it."""
    found: dict[str, Any] = dict(row=1, value=question("Which city?"), answer="the Paris!", error="", error_code="")
    found |= dict(shield_violation="", started=1.0, ended=2.0, **evaluate._NOT_WANTED)
    return found | changes


@pytest.mark.parametrize(
    ("first", "second", "wins", "consistent"), [(0.9, 0.6, 1, 1), (0.9, 0.5, 0.5, 0), (0.1, 0.2, 0, 1)]
)
def test_an_answer_wins_that_is_preferred_in_both_places(
    first: float, second: float, wins: float, consistent: float
) -> None:
    row = evaluate.scored(answered(shown_first=first, shown_second=second, opponent_answer="Lyon", rating=3.5), [])
    assert (row["win_rate"], row["consistent"], row["opponent_answer"], row["rating"]) == (
        wins, consistent, "Lyon", 3.5,
    )  # fmt: skip
    assert "shown_first" not in row


def test_a_row_of_the_results_has_prompt_reference_answer_scores_and_times() -> None:
    row = evaluate.scored(answered(), scores.scorers(["em", "f1"]))
    assert (row["id"], row["expected"], row["answer"]) == ("Which city?", "Paris", "the Paris!")
    assert row["messages"] == [{"role": "user", "content": "Which city?"}]
    assert (row["em"], row["f1"], row["started"], row["ended"]) == (1.0, 1.0, 1.0, 2.0)
    assert "value" not in row
    assert "nll" not in row


def test_a_failed_row_has_no_score_not_even_0() -> None:
    row = evaluate.scored(answered(answer="", error="away"), scores.scorers(["em", "bleu"]))
    assert not {"em", "bleu", "perplexity"} & set(row)


def test_a_row_with_a_likelihood_has_a_perplexity() -> None:
    row = evaluate.scored(answered(nll=4.0, reference_tokens=2), scores.scorers(["perplexity"]))
    assert (row["perplexity"], row["nll"], row["reference_tokens"]) == (pytest.approx(math.exp(2)), 4.0, 2.0)


def test_failed_rows_end_the_evaluation_only_when_they_are_more_than_it_allows() -> None:
    last = answered(row=9, error="it is too long", error_code="bad_input")
    evaluate.require_few(2, 20, 0.1, last)
    evaluate.require_few(20, 20, 1.0, last)
    with pytest.raises(BadInput, match="3 of 20 examples have failed; allowed: max_failed_share") as caught:
        evaluate.require_few(3, 20, 0.1, last)
    assert "row 9: it is too long" in caught.value.message
    with pytest.raises(BadInput):
        evaluate.require_few(1, 20, 0.0, last)


def test_rows_that_fail_as_the_model_is_away_leave_the_rest_to_another_attempt() -> None:
    with pytest.raises(Unavailable):
        evaluate.require_few(3, 20, 0.1, answered(error="away", error_code="unavailable"))
    with pytest.raises(BadInput):  # it was there, and failed
        evaluate.require_few(3, 20, 0.1, answered(error="broken", error_code="engine_failed"))

"""Evaluations: the worker that asks the questions, behind the shields of the models, and what the job makes of it."""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_apps.scripted_answers import LOGPROBS
from stack import evaluations
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.config import Config, Judge
from stack.context import Context
from stack.errors import BadInput, TooManyRequests, Unavailable
from tests.conftest import CONFIG
from tests.samples import dataset, evaluation, write_rows
from tests.scripted_engine import ScriptedEngine
from tests.varied_engine import VariedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking, evaluate, scores
    from jobs.evaluate import Ask, Wanted
    from jobs.row_log import line_of
    from tests.asked_here import answered, lines, work_here, work_of
    from tests.ray_errors import in_a_ray_task

SHIELDED: dict[str, Any] = {
    "classifiers": [{"id": "classifier", "path": "models/classifier"}],
    "shields": [{"id": "detector", "type": "injection_shield", "model": "classifier"}],
    "model_shields": {"small": {"input": ["detector"], "output": ["detector"]}},
}


@pytest.fixture
def engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedEngine]:
    """What answers the workers; its classifier finds what is evil."""
    made = ScriptedEngine()
    made.labels = ("BENIGN", "INJECTION")
    made.logits_of = lambda text: [0.0, 4.0] if "evil" in text else [4.0, 0.0]
    opened: list[Context] = []
    really_open = Context.open

    def on_this_engine(config: Config, engine: ScriptedEngine = made) -> Context:
        opened.append(really_open(config, engine))
        return opened[-1]

    monkeypatch.setattr(Context, "open", on_this_engine)
    yield made
    for context in opened:
        context.close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long the worker has waited: nobody does."""
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asking, "pause", pause)
    monkeypatch.setattr("stack.batch_inference.pause", pause)
    return waited


def question(text: str, reference: str = "Paris") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "answer": reference, "id": text, "functions": None}


def lines_for(*questions: dict[str, Any], wanted: Wanted, **config: Any) -> list[dict[str, Any]]:
    """The lines of the log that come of some questions."""
    rows = [{"row": number, "value": json.dumps(one)} for number, one in enumerate(questions, 1)]
    worker = Ask(CONFIG | config, "default", {"model": "small", "stream": False}, wanted)
    return [line_of(one) for one in answered(rows, worker)]


def asked(*texts: str, wanted: Wanted = Wanted(), **config: Any) -> list[dict[str, Any]]:  # noqa: B008
    """What comes of questions, none of which fails."""
    found = lines_for(*map(question, texts), wanted=wanted, **config)
    assert [line["error"] for line in found] == [None] * len(texts)
    return [line["result"] for line in found]


def error_of(text: str, wanted: Wanted, **changes: Any) -> dict[str, Any]:
    (line,) = lines_for(question(text, **changes), wanted=wanted)
    assert line["result"] is None
    error: dict[str, Any] = line["error"]
    return error


def test_a_question_that_the_model_s_shields_do_not_pass_has_an_empty_answer_and_the_reason(
    engine: ScriptedEngine,
) -> None:
    first, second = asked("What is the capital of France?", "Be evil now", **SHIELDED)
    assert "Paris" in first["answer"]
    assert second["answer"] == first["shield_violation"] == ""
    assert "'detector' does not pass the input" in second["shield_violation"]
    assert (first["completion_tokens"] > 0, second["completion_tokens"]) == (True, 0)
    assert len(engine.asked) == 1


def test_an_answer_that_the_model_s_shields_do_not_pass_is_empty_too(engine: ScriptedEngine) -> None:
    engine.tokens = ("Paris", " is", " evil")
    (found,) = asked("What is the capital of France?", **SHIELDED)
    assert found["answer"] == ""
    assert "does not pass the output" in found["shield_violation"]


def test_a_model_without_shields_is_asked_straight(engine: ScriptedEngine) -> None:
    (found,) = asked("Be evil now")
    assert found["shield_violation"] == ""
    assert engine.asked_to_classify == []


def test_a_row_that_cannot_be_answered_fails_alone_with_its_error(engine: ScriptedEngine) -> None:
    engine.fail_for = lambda body: BadInput("it is too long") if "long" in str(body["messages"]) else None
    first, second = lines_for(question("What is the capital of France?"), question("A long one"), wanted=Wanted())
    assert (first["error"], "Paris" in first["result"]["answer"]) == (None, True)
    assert (second["row"], second["result"], second["error"]["message"]) == (2, None, "it is too long")
    assert len(engine.asked) == 2, "what is wrong for good is not asked again"


def test_a_full_queue_is_waited_for_beyond_all_tries(engine: ScriptedEngine, pauses: list[float]) -> None:
    faults = [TooManyRequests("full", retry_after=1) for _ in range(5 * asking.TRIES)]
    engine.fail_for = lambda _: faults.pop() if faults else None
    (found,) = asked("What is the capital of France?")
    assert "Paris" in found["answer"]
    assert len(pauses) == 5 * asking.TRIES


def test_the_likelihood_of_a_reference_is_that_of_its_tokens_behind_the_prompts(engine: ScriptedEngine) -> None:
    (found,) = asked("What is the capital of France?", wanted=Wanted(likelihoods=True))
    assert (found["reference_tokens"], found["nll"]) == (1, -LOGPROBS[0])
    body = engine.asked[-1].body
    assert body["messages"][-1] == {"role": "assistant", "content": "Paris"}
    assert (body["continue_final_message"], body["add_generation_prompt"], body["prompt_logprobs"]) == (True, False, 0)
    assert (body["max_tokens"], engine.asked[-1].model.id) == (1, "small")


def test_a_reference_before_which_the_prompt_has_other_tokens_fails_its_row(engine: ScriptedEngine) -> None:
    """Some chat templates write something before an answer that is there, and some tokenizers join tokens."""
    really = engine.generate

    async def generate(model: Any, endpoint: Any, body: dict[str, Any]) -> Any:
        async for item in really(model, endpoint, body):
            given = json.loads(item)
            if body.get("continue_final_message"):
                given["prompt_token_ids"][6] = 99
            yield json.dumps(given).encode()

    engine.generate = generate  # type: ignore[method-assign, assignment]
    error = error_of("What is the capital of France?", Wanted(likelihoods=True))
    assert "the prompt has other tokens where the reference follows" in error["message"]


def test_an_answer_that_is_too_long_for_rouge_fails_its_row_where_rouge_is_wanted(engine: ScriptedEngine) -> None:
    engine.tokens = ("a " * 5_000,)
    asks = question("Say a lot", reference="b " * 5_000)
    (failed,) = lines_for(asks, wanted=Wanted(rouge=True))
    assert "the reference has 5000 words and the answer 5000" in failed["error"]["message"]
    (found,) = lines_for(asks, wanted=Wanted())
    assert found["error"] is None


def test_where_no_likelihood_is_wanted_none_is_asked_for(engine: ScriptedEngine) -> None:
    (found,) = asked("What is the capital of France?")
    assert "nll" not in found
    assert len(engine.asked) == 1


def test_a_reference_of_which_nothing_is_told_fails_its_row(engine: ScriptedEngine) -> None:
    error = error_of("a", Wanted(likelihoods=True), reference=" ")
    assert "the reference has no tokens" in error["message"]


JUDGE = Judge(kind="judge", id="judge", model="small", rubric="Good answers are brief.")


def judging(engine: ScriptedEngine, tokens: dict[str, tuple[str, ...]]) -> None:
    """Answers by the first of some words that a question holds."""
    really = engine.generate

    def generate(model: Any, endpoint: Any, body: dict[str, Any]) -> Any:
        text = str(body["messages"][-1]["content"])
        engine.tokens = next(said for word, said in tokens.items() if word in text)
        return really(model, endpoint, body)

    engine.generate = generate  # type: ignore[method-assign]


def test_a_judge_rates_the_answer_within_its_dialog_by_the_rubric(engine: ScriptedEngine) -> None:
    judging(engine, {"Reply with one whole number": ("4",), "": ("Paris",)})
    (found,) = asked("What is the capital of France?", wanted=Wanted(judge=JUDGE, rates=True))
    assert found["rating"] == 4.0
    assert "shown_first" not in found
    said = engine.asked[-1].body["messages"][0]["content"]
    for part in ("Good answers are brief.", "user: What is the capital of France?", "The answer to rate ---\nParis"):
        assert part in said


def test_an_answer_is_compared_with_the_reference_in_both_orders(engine: ScriptedEngine) -> None:
    judging(engine, {"Answer A ---\nLyon": ("A",), "Answer B ---\nLyon": ("B",), "": ("Lyon",)})
    (found,) = asked("What is the capital of France?", wanted=Wanted(judge=JUDGE, compares=True))
    assert (found["shown_first"], found["shown_second"]) == (1.0, 1.0)
    assert "opponent_answer" not in found
    assert "--- Answer B ---\nParis" in engine.asked[1].body["messages"][0]["content"]
    assert "--- Answer A ---\nParis" in engine.asked[2].body["messages"][0]["content"]


def test_a_judge_that_goes_by_the_place_prefers_neither(engine: ScriptedEngine) -> None:
    judging(engine, {"Answer A": ("A",), "": ("Lyon",)})
    (found,) = asked("What is the capital of France?", wanted=Wanted(judge=JUDGE, compares=True))
    assert (found["shown_first"], found["shown_second"]) == (1.0, 0.0)


def test_an_answer_that_the_shields_do_not_pass_is_judged_as_an_empty_one_and_has_a_likelihood(
    engine: ScriptedEngine,
) -> None:
    judging(engine, {"Reply with one whole number": ("1",), "Answer A ---\nParis": ("A",), "": ("B",)})
    wanted = Wanted(likelihoods=True, judge=JUDGE, rates=True, compares=True)
    (found,) = asked("Be evil now", wanted=wanted, **SHIELDED)
    assert (found["answer"], "'detector'" in found["shield_violation"]) == ("", True)
    assert (found["rating"], found["shown_first"], found["shown_second"]) == (1.0, 0.0, 0.0)
    assert found["reference_tokens"] == 1
    row = evaluate.scored(line(**found), [])
    assert (row["win_rate"], row["rating"], "perplexity" in row) == (0, 1.0, True)


def test_an_opponent_is_asked_the_same_as_the_model(engine: ScriptedEngine) -> None:
    config = {"models": [*CONFIG["models"], {"id": "other", "path": "models/small"}]}
    judging(engine, {"Answer A": ("A",), "": ("Lyon",)})
    wanted = Wanted(judge=JUDGE, compares=True, opponent="other")
    (found,) = asked("What is the capital of France?", wanted=wanted, **config)
    assert found["opponent_answer"] == "Lyon"
    assert [one.model.id for one in engine.asked] == ["small", "other", "small", "small"]
    assert engine.asked[0].body["messages"] == engine.asked[1].body["messages"]


def test_what_an_opponents_shields_do_not_pass_is_an_empty_answer(engine: ScriptedEngine) -> None:
    models = [*CONFIG["models"], {"id": "other", "path": "models/small"}]
    shields = SHIELDED | {"model_shields": {"other": {"input": ["detector"], "output": []}}}
    judging(engine, {"Answer A": ("A",), "": ("Lyon",)})
    wanted = Wanted(judge=JUDGE, compares=True, opponent="other")
    (found,) = asked("Be evil now", wanted=wanted, models=models, **shields)
    assert (found["opponent_answer"], found["answer"], found["shield_violation"]) == ("", "Lyon", "")


def test_a_judge_that_does_not_say_fails_the_row(engine: ScriptedEngine) -> None:
    error = error_of("What is the capital of France?", Wanted(judge=JUDGE, rates=True))
    assert "the judge 'judge' gives no rating from 1 to 5" in error["message"]
    error = error_of("What is the capital of France?", Wanted(judge=JUDGE, compares=True))
    assert "the judge 'judge' prefers neither A nor B" in error["message"]
    assert len(engine.asked) == 2 * 2, "it would say the same again"


WEATHER = {
    "name": "get_weather",
    "description": "The forecast.",
    "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
}
EXPECTED = json.dumps([{"get_weather": {"city": ["Paris"], "days": ["", 1]}}])


def test_functions_are_offered_and_the_calls_are_the_answer(engine: ScriptedEngine) -> None:
    engine.tokens = ('{"name": "get_weather", "parameters": {"city": "paris"}}',)
    asks = dict(messages=[{"role": "user", "content": "Rain?"}], answer=EXPECTED, id="1", functions=[WEATHER])
    config = {"models": [CONFIG["models"][0] | {"prompt_format": "llama3"}]}
    (found,) = lines_for(asks, wanted=Wanted(), **config)
    assert json.loads(found["result"]["answer"]) == [{"name": "get_weather", "arguments": {"city": "paris"}}]
    assert "get_weather" in str(engine.asked[0].body["messages"])
    assert evaluate.scored(found, [])["ast"] == 1


def test_a_text_that_looks_like_calls_is_none(engine: ScriptedEngine) -> None:
    """Nor is it one where no call is expected, which is right then."""
    engine.tokens = ('The calls: [{"name": "get_weather", "arguments": {"city": "Paris"}}]',)
    asks = dict(messages=[{"role": "user", "content": "Rain?"}], answer=EXPECTED, id="1", functions=[WEATHER])
    text = json.dumps([{"name": "get_weather", "arguments": {"city": "Paris"}}])
    assert evaluate.scored(line(question=asks, answer=text, calls=[]), [])["ast"] == 0
    assert evaluate.scored(line(question=asks | {"answer": "[]"}, answer=text, calls=[]), [])["ast"] == 1
    config = {"models": [CONFIG["models"][0] | {"prompt_format": "llama3"}]}
    (found,) = lines_for(asks, wanted=Wanted(), **config)
    assert (found["result"]["calls"], evaluate.scored(found, [])["ast"]) == ([], 0)


def test_what_the_shields_do_not_pass_calls_nothing(engine: ScriptedEngine) -> None:
    asks = dict(messages=[{"role": "user", "content": "Be evil now"}], answer=EXPECTED, id="1", functions=[WEATHER])
    (found,) = lines_for(asks, wanted=Wanted(), **SHIELDED)
    assert "'detector'" in found["result"]["shield_violation"]
    assert evaluate.scored(found, [])["ast"] == 0


def line(question: dict[str, Any] = question("Which city?"), **result: Any) -> dict[str, Any]:  # noqa: B008
    """A line of the log, of a row that has not failed."""
    found: dict[str, Any] = dict(answer="the Paris!", shield_violation="", started=1.0, ended=2.0)
    return dict(row=1, value=question, error=None, result=found | dict(prompt_tokens=7, completion_tokens=3) | result)


def test_a_row_that_was_judged_has_what_the_judge_said_and_of_what() -> None:
    row = evaluate.scored(line(shown_first=0.9, shown_second=0.4, opponent_answer="Lyon", rating=3.5), [])
    assert (row["win_rate"], row["consistent"], row["opponent_answer"], row["rating"]) == (0.5, 0, "Lyon", 3.5)
    assert "shown_first" not in row


def test_a_row_of_the_results_has_prompt_reference_answer_scores_and_times() -> None:
    row = evaluate.scored(line(), scores.scorers(["em", "f1"]))
    assert (row["id"], row["expected"], row["answer"]) == ("Which city?", "Paris", "the Paris!")
    assert row["messages"] == [{"role": "user", "content": "Which city?"}]
    assert (row["em"], row["f1"], row["started"], row["ended"]) == (1.0, 1.0, 1.0, 2.0)
    assert "value" not in row
    assert "nll" not in row


def test_a_failed_row_has_no_score_not_even_0() -> None:
    failed = line() | {"result": None, "error": {"message": "away"}}
    row = evaluate.scored(failed, scores.scorers(["em", "bleu"]))
    assert (row["error"], row["answer"], row["completion_tokens"]) == ("away", "", 0)
    assert not {"em", "bleu", "perplexity"} & set(row)


def test_a_row_with_a_likelihood_has_a_perplexity() -> None:
    row = evaluate.scored(line(nll=4.0, reference_tokens=2), scores.scorers(["perplexity"]))
    assert (row["perplexity"], row["nll"], row["reference_tokens"]) == (pytest.approx(math.exp(2)), 4.0, 2.0)


@pytest.fixture
def driven(context: Context, monkeypatch: pytest.MonkeyPatch) -> VariedEngine:
    """What answers the workers of evaluations that are run as a whole, in this process."""
    varied = VariedEngine()
    varied.say = lambda body: "Paris"
    work_here(monkeypatch, varied, evaluate)
    return varied


def cities(home: Path, count: int = 10) -> dict[str, Any]:
    rows = [{"prompt": f"City {number}?", "completion": "Paris"} for number in range(count)]
    return dataset(write_rows(home / "data" / "cities.jsonl", rows), prompt="text", completion="text")


def run(context: Context, data: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """The examples that an attempt at an evaluation publishes."""
    rows, problem = run_to_its_end(context, data, **changes)
    assert problem is None
    return rows


def run_to_its_end(context: Context, data: dict[str, Any], **changes: Any) -> tuple[list[dict[str, Any]], str | None]:
    """The examples that an attempt at an evaluation publishes, and the problem by which it has failed."""
    wanted = EvaluateQuestionAnsweringRequest.model_validate(evaluation(data, **changes))
    job = evaluations.question_answering(context, wanted)
    with work_of(context, job) as work:
        outcome = evaluate.evaluate(work, EvaluateQuestionAnsweringRequest.model_validate(job.request))
        work.reporter.metrics.flush()
    folder = Path(outcome.result["path"].removeprefix("file://"))
    assert (folder / "report.html").exists() == (outcome.problem is None), "a part of an evaluation has no report"
    return lines(folder / "examples.jsonl"), outcome.problem


def test_an_evaluation_that_was_lost_goes_on_with_the_rows_that_it_has_not(
    context: Context, home: Path, driven: VariedEngine
) -> None:
    driven.away_after = 6
    data = cities(home)
    with pytest.raises(Unavailable, match="row 7: the model is being started"):
        run(context, data)
    driven.away_after = None
    before = len(driven.asked)
    rows = run(context, data)
    assert len(driven.asked) - before == 4, "what was answered before the model went away is kept"
    assert sorted(row["row"] for row in rows) == list(range(1, 11))
    assert all(row["em"] == 1 for row in rows)
    metrics = evaluations.job_status(context, "evaluation-1").metrics
    assert (metrics["examples"], metrics["failed"], metrics["em"]) == (10, 0, 1)
    assert metrics["seconds"] > 0


def test_a_row_that_failed_by_itself_is_not_asked_again_by_the_next_attempt(
    context: Context, home: Path, driven: VariedEngine
) -> None:
    driven.refusals["City 1?"] = BadInput("it is too long")
    driven.away_after = 5
    data = cities(home)
    with pytest.raises(Unavailable):
        run(context, data)
    driven.refusals.clear()
    driven.away_after = None
    (failed,) = [row for row in run(context, data) if row["error"]]
    assert (failed["row"], failed["error"], "em" in failed) == (2, "it is too long", False)


def test_more_failed_rows_than_allowed_end_the_evaluation_by_the_first_and_what_was_answered_is_kept(
    context: Context, home: Path, driven: VariedEngine
) -> None:
    driven.refusals = {f"City {number}?": BadInput("it is too long") for number in (1, 2, 5)}
    rows, problem = run_to_its_end(context, cities(home), max_failed_rows=2)
    assert problem is not None
    assert "allowed: max_failed_rows, 2; the first of them: row 2: it is too long" in problem
    assert [row["row"] for row in rows if row["error"]] == [2, 3, 6]
    assert all(row["em"] == 1 for row in rows if not row["error"])
    assert evaluations.job_status(context, "evaluation-1").metrics == {}


def test_an_evaluation_of_which_every_row_has_failed_has_failed(
    context: Context, home: Path, driven: VariedEngine
) -> None:
    driven.refusals["City"] = BadInput("it is too long")
    rows, problem = run_to_its_end(context, cities(home))
    assert problem == "all 10 rows have failed; the first of them: row 1: it is too long"
    assert [row["error"] for row in rows] == ["it is too long"] * 10


def test_a_mistake_of_ours_keeps_what_was_answered_before_it(
    context: Context, home: Path, driven: VariedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = evaluate.asked

    def broken(*told: Any, own: Any) -> Iterator[dict[str, Any]]:
        yield from list(really(*told))[:4]
        raise in_a_ray_task(TypeError("'int' object is not iterable"))

    monkeypatch.setattr(evaluate, "asked", broken)
    rows, problem = run_to_its_end(context, cities(home))
    assert problem is not None
    assert "'int' object is not iterable" in problem
    assert len(rows) == 4


def test_an_evaluation_that_lacks_rows_is_not_completed(
    context: Context, home: Path, driven: VariedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = evaluate.asked
    monkeypatch.setattr(evaluate, "asked", lambda *told, own: (row for row in list(really(*told))[:-3]))
    with pytest.raises(Unavailable, match="3 of 10 rows have no answer"):
        run(context, cities(home))

"""The worker that asks an evaluation's questions: the model answers it as it answers users."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.config import Config
from stack.context import Context
from tests.conftest import CONFIG
from tests.samples import evaluation
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import evaluate
    from jobs.evaluate import Ask

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


async def asked(*questions: str, **config: Any) -> dict[str, list[Any]]:
    rows = [json.dumps({"messages": [{"role": "user", "content": one}], "answer": "Paris"}) for one in questions]
    worker = Ask(CONFIG | config, "default", {"model": "small", "stream": False})
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


def test_what_shields_did_not_pass_is_counted(tmp_path: Path) -> None:
    common = {"em": 0.0, "prompt_tokens": 1, "completion_tokens": 0, "started": 1.0, "ended": 2.0}
    lines = [common | {"shield_violation": "no"}, common | {"shield_violation": ""}, common]
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = EvaluateQuestionAnsweringRequest.model_validate(evaluation("test", metrics=["em"]))
    totals = evaluate._totals(request, file)
    assert (totals["examples"], totals["shield_violations"]) == (3.0, 1.0)

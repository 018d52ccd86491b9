"""Benchmarks: lm-eval itself, with tasks of one's own, against the scripted engine."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stack import evaluations
from stack.api.evaluations import EvaluateBenchmarkRequest
from stack.context import Context
from stack.errors import BadInput, NotFound, StackError
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import engine_door, evaluate_benchmark

WORDS = ["What", "is", "the", "capital", "of", "France", "?", "Paris", "a", "long", "answer", "in", "words"]
ASKING = """task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSING = """task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["Paris", "a long answer in words"]
doc_to_target: !function labels.label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with two tasks of one's own, their data beside them; and the model's tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    made = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}, "<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        home / "models" / "small"
    )
    folder = home / "tasks"
    folder.mkdir()
    rows = [{"question": "What is the capital of France ?", "answer": answer} for answer in ("Paris", "London")]
    (folder / "capitals.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "capitals.yaml").write_text(ASKING.replace("FOLDER", str(folder)))
    (folder / "choices.yaml").write_text(CHOOSING.replace("FOLDER", str(folder)))
    (folder / "labels.py").write_text("def label(row):\n    return 0 if row['answer'] == 'Paris' else 1\n")
    return folder


@pytest.fixture
def door(context: Context) -> Iterator[engine_door.Door]:
    with engine_door.opened(context) as door:
        yield door


def request(*tasks: str, **changes: Any) -> EvaluateBenchmarkRequest:
    body = {"job_uuid": "benchmark-1", "tasks": tasks, "checkpoint": "small"} | changes
    return EvaluateBenchmarkRequest.model_validate(body)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_lm_eval_runs_tasks_of_ones_own_against_the_engine(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door, tmp_path: Path
) -> None:
    engine.tokens = ("Paris",)
    found = evaluate_benchmark.run(door, context.models.get("small"), request("capitals", "choices"), tasks)
    scores = evaluate_benchmark.scores(found)
    # The shorter continuation is the likelier one: each of its tokens is as likely as any other.
    assert (scores["capitals/exact_match"], scores["choices/acc"]) == (0.5, 0.5)
    assert "capitals/exact_match_stderr" in scores
    assert {one.endpoint for one in engine.asked} == {"completions"}
    assert {one.model.id for one in engine.asked} == {"small"}
    assert len(engine.asked) == 2 + 2 * 2
    evaluate_benchmark._write(tmp_path, found)
    assert "|capitals|" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["results"]["choices"]["acc,none"] == 0.5
    assert len((tmp_path / "samples_capitals.jsonl").read_text().splitlines()) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_limit_is_of_the_examples_of_each_task(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door
) -> None:
    engine.tokens = ("Paris",)
    found = evaluate_benchmark.run(door, context.models.get("small"), request("capitals", limit=1), tasks)
    assert evaluate_benchmark.scores(found)["capitals/exact_match"] == 1
    assert len(engine.asked) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused_with_those_that_are_there(
    context: Context, tasks: Path, door: engine_door.Door
) -> None:
    with pytest.raises(BadInput, match="no task 'capitols'") as caught:
        evaluate_benchmark.run(door, context.models.get("small"), request("capitols"), tasks)
    assert caught.value.message.endswith(f"{tasks}: capitals, choices")


def test_the_door_opens_to_nobody_without_its_key(door: engine_door.Door, engine: ScriptedEngine) -> None:
    url = f"{door.url}/v1/completions"
    body = {"model": "small", "prompt": "a"}
    assert httpx.post(url, json=body).status_code == 401
    assert httpx.post(url, json=body, headers={"Authorization": "Bearer other"}).status_code == 401
    assert engine.asked == []
    assert httpx.post(url, json=body, headers=door.headers).json()["choices"][0]["text"] == "Paris is big."
    assert httpx.post(url, json=body | {"model": "big"}, headers=door.headers).status_code == 404
    assert door.url.startswith("http://127.0.0.1:")


def test_a_closed_door_is_closed(context: Context) -> None:
    with engine_door.opened(context) as door:
        pass
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{door.url}/v1/completions", json={}, headers=door.headers)


def test_a_benchmark_is_accepted_as_a_job(context: Context) -> None:
    job = evaluations.benchmark(context, request("capitals"))
    assert (job.kind, job.bundles) == ("evaluate_benchmark", [])
    assert evaluations.benchmark(context, request("capitals")) == job
    assert evaluations.job_status(context, "benchmark-1").status == "scheduled"


def test_a_benchmark_of_what_is_not_served_is_refused(context: Context) -> None:
    with pytest.raises(NotFound) as caught:
        evaluations.benchmark(context, request("capitals", checkpoint="big"))
    assert caught.value.param == "checkpoint"


@pytest.mark.parametrize("task", ["", "../a", "a b", "/etc/passwd", "a,b"])
def test_a_task_is_a_name_and_no_path(task: str) -> None:
    with pytest.raises((ValueError, StackError), match=r"tasks\.0"):
        request(task)

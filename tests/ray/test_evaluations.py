"""Evaluations on real Ray with the real model: perplexity, rows that fail, comparisons, function calls, benchmarks."""

import json
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.running_stack import MODEL, SCRIPTED, Stack, ended
from tests.samples import dataset, function_calls, write_rows

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo"}
TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def evaluation(job_uuid: str, data: Any, metrics: list[str], **changes: Any) -> dict[str, Any]:
    sampling = {"strategy": "greedy", "max_tokens": 8}
    body = {"job_uuid": job_uuid, "dataset": data, "checkpoint": MODEL, "sampling_params": sampling}
    return body | {"metrics": metrics} | changes


def completed(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation that is asked for, if it was not yet, and awaited."""
    assert client.post(f"/evaluate/{path}", json=body).status_code == 200
    status = ended(client, "evaluate", body["job_uuid"])
    assert status["status"] == "completed", status
    metrics: dict[str, float] = status["metrics"]
    return metrics


def results(stack: Stack, client: httpx.Client, job_uuid: str) -> Path:
    artifacts = client.get("/evaluate/job/artifacts", params={"job_uuid": job_uuid}).json()
    return stack.files_at(artifacts["path"])


@pytest.fixture(scope="module")
def capitals(stack: Stack) -> dict[str, Any]:
    rows = [{"prompt": f"What is the capital of {name}?", "completion": city} for name, city in CAPITALS.items()]
    file = write_rows(stack.home / "data" / "capitals.jsonl", rows)
    return dataset(stack.data_at(file), prompt="text", completion="text")


def nll_of_transformers(folder: Path, prompt: str, reference: str) -> tuple[float, int]:
    """The negative log likelihood of a reference as the answer to a prompt, and how many tokens it has."""
    import torch

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(before + reference, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(before, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens).logits[0], dim=-1)
    told = [logprobs[place - 1, tokens[0, place]].item() for place in range(start, tokens.shape[1])]
    return -sum(told), len(told)


def test_perplexity_is_that_of_the_model_itself_though_it_serves_adapters(
    stack: Stack, client: httpx.Client, capitals: dict[str, Any]
) -> None:
    metrics = completed(client, "text_generation/", evaluation("perplexity", capitals, ["perplexity", "rouge", "bleu"]))
    folder = results(stack, client, "perplexity")
    assert {one.name for one in folder.iterdir()} >= {"examples.jsonl", "examples.parquet", "report.html"}
    rows = pyarrow.parquet.read_table(folder / "examples.parquet").to_pylist()
    assert [row["error"] for row in rows] == [""] * 5
    for row in rows:
        prompt, reference = row["messages"][-1]["content"], row["expected"]
        nll, tokens = nll_of_transformers(stack.home / "models" / MODEL, prompt, reference)
        assert row["reference_tokens"] == tokens
        assert row["nll"] == pytest.approx(nll, abs=1e-3)
    assert metrics["perplexity_low"] <= metrics["perplexity"] <= metrics["perplexity_high"]
    assert 0 < metrics["rouge1"] <= 1
    assert (metrics["examples"], metrics["failed"]) == (5, 0)
    assert "<svg" in (folder / "report.html").read_text()


def test_a_row_that_fails_is_told_and_ends_nothing_until_they_are_too_many(stack: Stack, client: httpx.Client) -> None:
    rows = [{"id": n, "prompt": f"Question {n}", "completion": "Paris is big."} for n in range(20)]
    rows[7]["prompt"] = "fault:error"
    file = write_rows(stack.home / "data" / "failing.jsonl", rows)
    data = dataset(stack.data_at(file), id="number", prompt="text", completion="text")
    # Without a limit it answers with one round of its script.
    body = evaluation("some-fail", data, ["em"], checkpoint=SCRIPTED, sampling_params={"strategy": "greedy"})
    metrics = completed(client, "question_answering/", body)
    assert (metrics["examples"], metrics["failed"], metrics["em"]) == (20, 1, 1)
    lines = (results(stack, client, "some-fail") / "examples.jsonl").read_text().splitlines()
    (failed,) = [row for row in map(json.loads, lines) if row["error"]]
    assert (failed["id"], "em" in failed) == ("7", False)
    client.post("/evaluate/question_answering/", json=body | {"job_uuid": "too-many", "max_failed_rows": 0})
    status = ended(client, "evaluate", "too-many")
    assert status["status"] == "failed"
    assert status["error"].startswith("row 8: ")
    kept = (results(stack, client, "too-many") / "examples.jsonl").read_text().splitlines()
    assert [one["id"] for one in map(json.loads, kept) if one["error"]] == ["7"]


def test_two_lengths_of_answers_are_compared(client: httpx.Client, capitals: dict[str, Any]) -> None:
    bodies = [
        evaluation(f"length-{length}", capitals, ["f1"], sampling_params={"strategy": "greedy", "max_tokens": length})
        for length in (1, 16)
    ]
    for body in bodies:  # which run together
        assert client.post("/evaluate/question_answering/", json=body).status_code == 200
    for body in bodies:
        completed(client, "question_answering/", body)
    found = client.post("/evaluate/compare", json={"first": "length-1", "second": "length-16"}).json()
    (f1,) = found["metrics"]
    assert f1["difference"]["value"] == pytest.approx(f1["second"]["value"] - f1["first"]["value"])
    assert found["examples"] == 5


def test_a_judge_rates_and_prefers(client: httpx.Client, capitals: dict[str, Any]) -> None:
    body = evaluation("judged", capitals, ["rating", "win_rate"], judge=MODEL, rubric="A good answer is right.")
    # A small model may give no rating: such a row has failed, and were it so of all, the evaluation.
    metrics = completed(client, "judged/", body)
    assert (metrics["examples"], metrics["failed"] < 5) == (5, True)
    assert 1 <= metrics["rating"] <= 5
    assert 0 <= metrics["win_rate"] <= 1


def test_calls_of_functions_are_compared(stack: Stack, client: httpx.Client) -> None:
    """By a model that calls what it is told to."""
    said = {
        '{"name": "get_weather", "parameters": {"city": "paris france"}}': 1,
        '{"name": "get_weather", "parameters": {"city": "Rome"}}': 0,
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}': 0,
        "In Paris it rains.": 0,
    }
    file = stack.home / "data" / "calls.jsonl"
    data = function_calls(file, *(f"How is the weather? say:{text}" for text in said))
    data["content_url"] = stack.data_at(file)
    metrics = completed(client, "function_calling/", evaluation("calls", data, ["ast"], checkpoint=SCRIPTED))
    assert (metrics["ast"], metrics["failed"]) == (1 / 4, 0)
    rows = map(json.loads, (results(stack, client, "calls") / "examples.jsonl").read_text().splitlines())
    found = {row["id"]: (row["ast"], row["answer"]) for row in rows}
    assert [found[f"weather-{number}"][0] for number in range(1, 5)] == [*said.values()]
    assert json.loads(found["weather-1"][1]) == [{"name": "get_weather", "arguments": {"city": "paris france"}}]
    assert found["weather-4"][1] == "In Paris it rains."


def test_a_task_of_lm_eval_has_the_same_score_as_with_its_own_backend(stack: Stack, client: httpx.Client) -> None:
    """100 examples, of each choice of which the likelihood is compared."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = stack.home / "tasks"
    folder.mkdir(exist_ok=True)  # those of others may be there
    rows = [
        {"question": f"What is {a} plus {b}?", "choices": [str(a + b), str(a + b + 1)], "label": 0}
        for a in range(10)
        for b in range(10)
    ]
    write_rows(folder / "sums.jsonl", rows)
    (folder / "sums.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    ours = completed(client, "benchmark/", {"job_uuid": "sums", "tasks": ["sums"], "checkpoint": MODEL})
    model = HFLM(pretrained=str(stack.home / "models" / MODEL), dtype="float32", device="cpu", batch_size=8)
    theirs = simple_evaluate(model=model, tasks=["sums"], task_manager=TaskManager(include_path=str(folder)))
    assert theirs is not None
    assert ours["sums/acc"] == theirs["results"]["sums"]["acc,none"]
    lines = (results(stack, client, "sums") / "samples_sums.jsonl").read_text().splitlines()
    for sample, other in zip(map(json.loads, lines), theirs["samples"]["sums"], strict=True):
        for told, expected in zip(sample["filtered_resps"], other["filtered_resps"], strict=True):
            assert told[0] == pytest.approx(expected[0], abs=1e-2)

"""Synthetic data and batches of any size, on real Ray and with the real model."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import improve_model
from scripts.preferences import Pair
from tests import samples
from tests.running_stack import MODEL, Stack, ended, wait_for

REWARD = "reward-on-MiniLM"
SAMPLING = {"strategy": "top_p", "temperature": 1.0, "top_p": 0.95, "max_tokens": 48}
EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"
TEXT = (
    "The Rhine rises in the Swiss Alps and ends in the North Sea. It is 1,230 kilometres long. Ships go up the river "
    "as far as Basel. The Loire is the longest river of France, and ends in the Atlantic at Saint-Nazaire."
)


@pytest.fixture(scope="module")
def prompts(stack: Stack) -> dict[str, Any]:
    """Eight prompts with ids, of which one is too long for the model."""
    words = ["river", "colour", "city", "fruit", "tool", "bird", "metal"]
    rows = [{"id": word, "prompt": f"Name a {word}."} for word in words] + [{"id": "long", "prompt": "word " * 3_000}]
    file = samples.write_rows(stack.home / "data" / "prompts.jsonl", rows)
    return samples.dataset(stack.data_at(file), id="text", prompt="text")


def made(client: httpx.Client, api: str, body: dict[str, Any]) -> dict[str, Any]:
    """The artifacts of a job, once it is completed; it is asked for, if it was not yet."""
    reply = client.post(f"/{api}/jobs", json=body)
    assert reply.status_code == 200, reply.text
    status = ended(client, api, body["job_uuid"])
    assert status["status"] == "completed", status
    artifacts: dict[str, Any] = client.get(f"/{api}/job/artifacts", params={"job_uuid": body["job_uuid"]}).json()
    return artifacts | {"metrics": status["metrics"], "progress": status["progress"]}


def rows_of(client: httpx.Client, uuid: str) -> list[dict[str, Any]]:
    reply = client.get("/datasets/preview", params={"dataset_uuid": uuid, "rows": 100})
    assert reply.status_code == 200, reply.text
    rows: list[dict[str, Any]] = reply.json()["rows"]
    return rows


def generation(data: Any, uuid: str, **changes: Any) -> dict[str, Any]:
    settings = {"model": MODEL, "reward_model": REWARD, "num_generations": 4, "sampling_params": SAMPLING}
    return samples.generation(data, job_uuid=uuid, filtering_function="none") | settings | changes


@pytest.mark.long
def test_generations_become_preferences_from_which_dpo_learns(client: httpx.Client, prompts: dict[str, Any]) -> None:
    found = made(client, "synthetic_data_generation", generation(prompts, "make-pairs", output="preferences"))
    assert found["datasets"] == {"preferences": "make-pairs"}
    assert (found["metrics"]["prompts"], found["metrics"]["failed"]) == (8, 1)
    assert found["metrics"]["generated"] == 28
    assert found["progress"]["done"] == 8
    rows = rows_of(client, "make-pairs")
    assert rows
    for row in rows:
        assert row["chosen_score"] > row["rejected_score"]
        assert row["chosen"] != row["rejected"]
    names = [file["name"] for file in found["files"]]
    assert names == ["rejected.jsonl", "statistics.json"]
    tune = samples.preference_optimization("make-pairs", job_uuid="prefer-made", finetuned_model=MODEL)
    reply = client.post("/post_training/preference_optimize", json=tune)
    assert reply.status_code == 200, reply.text
    status = ended(client, "post_training", "prefer-made")
    assert status["status"] == "completed", status


def test_prompts_are_grown_from_seeds(client: httpx.Client) -> None:
    seeds = ["Name three rivers in Europe.", "Write a short poem about rain.", "Explain how a sail works."]
    grown: dict[str, Any] = {"source": "self_instruct", "seed_prompts": seeds, "num_prompts": 4}
    body = generation(None, "grow-prompts", num_generations=2, output="scored", **grown)
    found = made(client, "synthetic_data_generation", body)
    rows = rows_of(client, "grow-prompts")
    assert 1 <= len(rows) <= 4
    assert found["metrics"]["prompts"] == len({row["dialog"][0]["content"] for row in rows})


def test_documents_become_pairs_that_cite_them(stack: Stack, client: httpx.Client) -> None:
    file = samples.write_rows(stack.home / "data" / "rivers.jsonl", [{"id": "rivers", "text": TEXT}])
    data = samples.dataset(stack.data_at(file), id="text", text="text")
    sampling = SAMPLING | {"temperature": 0.7, "max_tokens": 200}
    body = generation(data, "ask-documents", source="documents", num_generations=8, sampling_params=sampling)
    found = made(client, "synthetic_data_generation", body)
    rejected = sum(value for name, value in found["metrics"].items() if name.startswith("rejected_"))
    assert found["metrics"]["rows"] + rejected == 8, "each of the eight is a row, or is rejected"
    for row in rows_of(client, "ask-documents") if found["datasets"] else ():
        assert TEXT[int(row["start"]) : int(row["end"])] == row["quote"]


def test_a_batch_answers_each_row_by_its_id(client: httpx.Client, prompts: dict[str, Any]) -> None:
    body = samples.batch(prompts, job_uuid="ask-all", model=MODEL, sampling_params={"max_tokens": 4})
    found = made(client, "batch_inference", body)
    assert found["datasets"] == {"answers": "ask-all.answers", "errors": "ask-all.errors"}
    answered = {row["id"] for row in rows_of(client, "ask-all.answers")}
    (error,) = rows_of(client, "ask-all.errors")
    assert (error["id"], error["row"]) == ("long", 8)
    assert "2048" in error["message"]
    assert answered == {"river", "colour", "city", "fruit", "tool", "bird", "metal"}


@pytest.mark.long
def test_a_batch_with_an_engine_of_its_own_answers_as_the_one_that_serves(client: httpx.Client, stack: Stack) -> None:
    words = ["river", "colour", "city", "fruit", "tool", "bird"]
    rows = [{"id": word, "prompt": f"Name a {word}."} for word in words]
    file = samples.write_rows(stack.home / "data" / "six.jsonl", rows)
    data = samples.dataset(stack.data_at(file), id="text", prompt="text")
    before, found = engines(stack), {}
    assert len(before) >= 2, "those of the model that serves"
    for engine in ("serving", "own"):
        uuid, sampling = f"by-{engine}", {"strategy": "greedy", "max_tokens": 12}
        body = samples.batch(data, job_uuid=uuid, model=MODEL, sampling_params=sampling, engine=engine)
        assert made(client, "batch_inference", body)["metrics"]["failed"] == 0
        found[engine] = {row["id"]: row["answer"] for row in rows_of(client, f"{uuid}.answers")}
    assert found["own"] == found["serving"]
    assert set(found["own"]) == set(words)
    log = client.get("/batch_inference/job/logs", params={"job_uuid": "by-own"}).json()["log_lines"]
    assert any("starting an engine of the model" in line for line in log)
    status = client.get("/batch_inference/job/status", params={"job_uuid": "by-own"}).json()
    assert status["resources_allocated"] == {"workers": 1, "per_worker": {"CPU": 1.25}}
    wait_for(lambda: engines(stack) == before, 60, lambda: engines(stack))


def engines(stack: Stack) -> set[int]:
    """The processes of engines, and of what compiles grammars for them."""
    return {process.pid for part in ("VLLM::EngineCore", "grammar_compiler") for process in stack.processes(part)}


def test_a_batch_of_texts_is_embedded(client: httpx.Client, stack: Stack) -> None:
    file = samples.write_rows(stack.home / "data" / "words.jsonl", [{"text": f"word {number}"} for number in range(50)])
    data = samples.dataset(stack.data_at(file), text="text")
    body = samples.batch(data, job_uuid="embed-all", kind="embeddings", model="all-MiniLM-L6-v2")
    assert made(client, "batch_inference", body)["metrics"]["rows"] == 50
    rows = rows_of(client, "embed-all.answers")  # as many as a preview shows of them
    assert len(rows) > 1
    assert {len(row["embedding"]) for row in rows} == {384}


def test_the_examples_are_right(client: httpx.Client, stack: Stack) -> None:
    """Their bodies, on data of their own."""
    data = samples.dataset(stack.data_at(samples.write_rows(stack.home / "data" / "hello.jsonl", samples.dialogs(4))))
    bodies = [
        (api, yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()) | {"dataset": data, "job_uuid": f"of-{name}"})
        for name, api in (
            ("batch_inference", "batch_inference"),
            ("generate_synthetic_data", "synthetic_data_generation"),
        )
    ]
    for api, body in bodies:  # which run together
        assert client.post(f"/{api}/jobs", json=body).status_code == 200
    for api, body in bodies:
        assert made(client, api, body)["metrics"]["failed"] == 0


@pytest.mark.long
def test_the_loop_closes_on_a_few_prompts(client: httpx.Client, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it goes round; whether the model is better for it, so few prompts cannot tell."""
    monkeypatch.setattr(improve_model, "GENERATIONS", 2)
    words = ["river", "colour", "city", "fruit", "tool", "bird", "metal", "tree"]
    pairs = [Pair(f"Name a {word}.", f"A {word} that everybody knows.", "No.") for word in words]
    found = improve_model.improve(client, stack.home / "data", "few", {"train": pairs[:5], "test": pairs[5:]})
    assert found.before.keys() == found.after.keys() == {"0", "1", "2"}
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum", "perplexity"} <= {metric["name"] for metric in found.compared}
    assert all(metric["difference"]["examples"] == 3 for metric in found.compared)
    low, mean, high = found.difference()
    assert low <= mean <= high

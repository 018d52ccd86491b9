"""The examples of the README and of docs/, run as they stand, in their order."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_stack import Stack, ended

# All examples run before the first test.
pytestmark = pytest.mark.timeout(1_800)
ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "inference.md",
    ROOT / "docs" / "jobs-and-data.md",
    ROOT / "docs" / "post-training.md",
    ROOT / "docs" / "safety-and-rewards.md",
    ROOT / "docs" / "synthetic-data.md",
    ROOT / "docs" / "evaluations.md",
    ROOT / "docs" / "memory-banks.md",
    ROOT / "docs" / "agents.md",
]
EXAMPLES = [
    example
    for page in PAGES
    for example in re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]


def values_in(output: str) -> list[Any]:
    """What an example prints that prints JSON alone, one value behind the other."""
    values, rest = [], output.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        values.append(value)
        rest = rest[end:].lstrip()
    return values


@pytest.fixture(scope="module")
def outputs(stack: Stack) -> list[str]:
    """What each example prints."""
    printed = []
    for language, code in EXAMPLES:
        code = code.replace("http://127.0.0.1:8321", stack.url)
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = stack.run(*command)
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed.append(done.stdout)
    return printed


def test_both_doors_answer_by_curl_and_by_client(outputs: list[str]) -> None:
    assert len(outputs) == 36
    for output in outputs[:4]:
        assert "Paris" in output


def test_the_data_set_is_registered_and_the_job_accepted(client: httpx.Client, outputs: list[str]) -> None:
    assert '"rows":4' in outputs[4]
    assert '"job_uuid":"my-tune"' in outputs[5]
    assert ended(client, "post_training", "my-tune")["status"] == "completed"


def test_the_jobs_by_file_are_completed(client: httpx.Client, outputs: list[str]) -> None:
    assert '"status":"completed"' in outputs[6]
    assert ended(client, "post_training", "example-tune")["status"] == "completed"


def test_answers_are_calls_shapes_vectors_batches_and_read_attachments(outputs: list[str]) -> None:
    (call,) = json.loads(outputs[7])["completion_message"]["tool_calls"]
    assert (call["tool_name"], type(call["arguments"]["celsius"])) == ("get_weather", bool)
    assert set(json.loads(outputs[8])) == {"city", "inhabitants"}
    assert outputs[9].startswith('{"embeddings":[[')
    assert outputs[10].startswith("2 384 ")
    batch = json.loads(outputs[11])
    assert "Paris" in batch["completion_message_batch"][0]["content"]
    assert [error["index"] for error in batch["errors"]] == [1]
    assert "Fred" in outputs[12]


def test_a_compressed_csv_file_becomes_a_data_set(outputs: list[str]) -> None:
    assert '"rows":4' in outputs[13]
    assert "Bonjour" in outputs[13]


def test_a_job_is_followed_to_its_end(outputs: list[str]) -> None:
    assert "step 6/6" in outputs[14]
    assert '"status":"completed"' in outputs[14]
    assert "tensorboard/" in outputs[14]


def test_metrics_logs_and_files_are_kept_and_found(outputs: list[str]) -> None:
    assert '"value":0.38' in outputs[15]
    assert outputs[15].count("looked at 20 answers") == 1
    assert outputs[15].endswith("looked")


def test_prometheus_is_served(outputs: list[str]) -> None:
    assert "# TYPE" in outputs[16]


def test_answers_are_scored_in_their_order(outputs: list[str]) -> None:
    (row,) = json.loads(outputs[18])["scored_generations"]
    assert [one["message"]["content"] for one in row["scored_generations"]] == ["Paris.", "Who knows."]
    assert len({one["score"] for one in row["scored_generations"]}) == 2


def test_shields_judge_messages_and_are_listed(outputs: list[str]) -> None:
    judged, end = json.JSONDecoder().raw_decode(outputs[19])
    assert [(one["shield_type"], one["is_violation"]) for one in judged["responses"]] == [
        ("injection_shield", True),
        ("code_scanner_guard", False),
    ]
    listed = {one["shield_type"] for one in json.loads(outputs[19][end:])["data"]}
    # Beside them is the one that these tests add.
    assert listed - {"guard", "llama_guard"} == {"injection_shield", "code_scanner_guard", "third_party_shield"}


def test_the_best_of_four_answers_to_each_dialog_is_kept(outputs: list[str]) -> None:
    found = json.loads(outputs[20])
    assert [len(one["scored_generations"]) for one in found["synthetic_data"]] == [1, 1]
    assert [one["dialog"][0]["content"] for one in found["synthetic_data"]] == [
        "What is the capital of France?",
        "Name three rivers.",
    ]
    statistics = found["statistics"]
    assert (statistics["generated"], statistics["kept"], statistics["failed"]) == (8, 2, 0)
    assert found["errors"] == []


def test_generations_become_pairs_of_the_data_set(client: httpx.Client, outputs: list[str]) -> None:
    accepted, status, artifacts = values_in(outputs[21])
    assert accepted == {"job_uuid": "better-greetings"}
    assert status["job_uuid"] == artifacts["job_uuid"] == "better-greetings"
    done = ended(client, "synthetic_data_generation", "better-greetings")
    assert (done["status"], done["metrics"]["prompts"], done["metrics"]["generated"]) == ("completed", 4, 16)


def test_the_rows_of_the_data_set_are_answered(client: httpx.Client, outputs: list[str]) -> None:
    accepted, status = values_in(outputs[22])
    assert accepted["job_uuid"] == status["job_uuid"] == "answers-1"
    assert ended(client, "batch_inference", "answers-1")["status"] == "completed"
    made = client.get("/datasets/preview", params={"dataset_uuid": "answers-1.answers", "rows": 9}).json()["rows"]
    assert sorted(row["id"] for row in made) == ["1", "2", "3", "4"]


def test_two_lengths_of_answers_are_scored(outputs: list[str]) -> None:
    for length in (16, 32):
        assert f'"job_uuid":"greetings-{length}"' in outputs[23]
    status, artifacts = values_in(outputs[23].splitlines()[-1])
    assert status["status"] == "completed"
    metrics = status["metrics"]
    assert (metrics["examples"], metrics["failed"]) == (4, 0)
    assert metrics["perplexity_low"] <= metrics["perplexity"] <= metrics["perplexity_high"]
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"} <= metrics.keys()
    names = {file["name"] for file in artifacts["files"]}
    assert names == {"examples.jsonl", "examples.parquet", "report.html"}


def test_a_judge_and_the_calls_of_functions_are_evaluations_too(client: httpx.Client, outputs: list[str]) -> None:
    assert '"job_uuid":"greetings-judged"' in outputs[24]
    judged = ended(client, "evaluate", "greetings-judged")
    assert (judged["status"], judged["metrics"]["examples"]) == ("completed", 4)
    assert '"job_uuid":"weather"' in outputs[25]
    called = ended(client, "evaluate", "weather")
    # Whether so small a model calls it right is not told by the page: tests/ray/test_evaluations.py has one that does.
    metrics = called["metrics"]
    assert (called["status"], metrics["examples"], metrics["failed"]) == ("completed", 1, 0)
    assert metrics["ast_low"] == metrics["ast"] == metrics["ast_high"]


def test_what_has_changed_is_told_by_metric_and_by_example(outputs: list[str]) -> None:
    found = json.loads(outputs[26])
    assert (found["first"], found["second"]) == ("greetings-16", "greetings-32")
    assert (found["task"], found["examples"], found["left_out"]) == ("text_generation", 4, 0)
    assert {"perplexity", "bleu", "rouge1"} <= {metric["name"] for metric in found["metrics"]}
    assert len(found["changed"]) == min(found["changed_examples"], 3)


def test_tasks_of_ones_own_are_a_benchmark(outputs: list[str]) -> None:
    assert '"job_uuid":"capitals"' in outputs[27]
    (status,) = values_in(outputs[27].splitlines()[-1])
    assert status["status"] == "completed"
    assert {"capitals/acc", "capitals/acc_stderr", "rivers/named"} <= status["metrics"].keys()


def test_memory_banks_answer_by_curl_and_by_client(outputs: list[str]) -> None:
    inserted, found = values_in(outputs[28])
    assert inserted is None
    assert [chunk["document_id"] for chunk in found["chunks"]] == ["leave"]
    assert outputs[29].endswith("seine The Seine flows through Paris.\nThe Seine flows through Paris.\n")


def test_documents_are_filtered_changed_given_back_and_deleted(outputs: list[str]) -> None:
    inserted, found, updated, danube, seine, deleted, dropped = values_in(outputs[30])
    assert [inserted, updated, deleted] == [None] * 3
    assert [chunk["document_id"] for chunk in found["chunks"]] == ["rhone"]
    assert (danube["content"], seine["document_id"]) == ("The Danube flows through Budapest.", "seine")
    assert dropped.startswith("bank-")


def test_the_rows_of_a_data_set_are_written_into_a_bank(client: httpx.Client, outputs: list[str]) -> None:
    registered, accepted, status = values_in(outputs[31])
    assert (registered["rows"], accepted["job_uuid"], status["job_uuid"]) == (2, "rivers-1", "rivers-1")
    done = ended(client, "memory_banks/ingest", "rivers-1")
    assert (done["status"], done["metrics"]["written"], done["metrics"]["failed"]) == ("completed", 2, 0)
    banks = map(json.loads, client.get("/memory_banks/list").text.splitlines())
    (bank_id,) = [bank["bank_id"] for bank in banks if bank["name"] == "all rivers"]
    body = {"bank_id": bank_id, "query": "Which river flows through Vienna?", "params": {"max_chunks": 1}}
    (chunk,) = client.post("/memory_bank/query", json=body).json()["chunks"]
    assert (chunk["document_id"], chunk["metadata"]) == ("danube", {"country": "Austria"})


def events_in(output: str) -> dict[str, Any]:
    """The payloads of server-sent events, by their ids."""
    events = (dict(line.split(": ", 1) for line in event.splitlines()) for event in output.strip().split("\n\n"))
    return {event["id"]: json.loads(event["data"])["event"]["payload"] for event in events}


def test_a_turn_is_streamed_and_followed_once_more_from_an_event(outputs: list[str]) -> None:
    first, start, again = outputs[32].partition("id: 1.1.1\n")
    assert list(events_in(first)) == ["start", "1.1.0"]
    *_, last = events_in(start + again).values()
    assert "Paris" in last["turn"]["output_message"]["content"]
    # Both the stream and what follows the event later end with the turn.
    assert outputs[32].count('"turn_complete"') == 2


def test_a_function_of_the_client_is_called_and_its_answer_told(outputs: list[str]) -> None:
    call, _, said = outputs[33].partition("\n")
    assert call.startswith("get_weather {'city': ")
    assert said.strip()


def test_code_is_run_in_the_sandbox(outputs: list[str]) -> None:
    turn = json.loads(outputs[34])
    assert [step["step_type"] for step in turn["steps"]] == ["inference", "tool_execution", "inference"]
    assert turn["steps"][1]["tool_responses"][0]["content"]


def test_what_memory_and_an_attachment_say_is_cited(outputs: list[str]) -> None:
    turn = json.loads(outputs[35])
    memory = turn["steps"][0]
    assert {"Marie Curie was born in Warsaw.", "Irene Curie was born in Paris."} == {
        line for line in memory["inserted_context"].splitlines() if "Curie" in line
    }
    assert len(memory["citations"]) == 2
    assert "curie" in [citation["document_id"] for citation in memory["citations"]]
    assert turn["output_message"]["content"]

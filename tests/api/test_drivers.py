"""The driver scripts, which know a stack by its address alone: on the gateway's routes, and on scripted answers."""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from scripts.drivers import agent, client, evaluate, generate, life_cycle, serve, tune
from scripts.drivers.client import Refused, Stack
from stack.added_models import Application
from stack.api.evaluations import CompareEvaluationsRequest, EvaluateQuestionAnsweringRequest
from stack.api.models import ModelState
from stack.api.post_training import PostTrainingSFTRequest
from stack.api.synthetic_data_generation import SyntheticDataJobRequest
from stack.config import ROOT
from stack.context import Context
from stack.store import Adapter, now
from tests.samples import complete, dialogs, fail, report, start, write_rows
from tests.scripted_deployer import RUNNING, ScriptedDeployer

NAMES = ("serve", "generate", "tune", "evaluate", "agent", "life_cycle")
DONE = {"done": 2, "total": 2, "unit": "rows"}


def parsed(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.options(parser)
    return parser.parse_args(words)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", dialogs(4))


# On the gateway's own routes


def test_a_model_is_tuned_on_a_file_that_is_sent_and_is_served_then(
    client: TestClient, context: Context, rows: Path
) -> None:
    def work(seconds: float) -> None:
        start(context.store, "tune-1")
        report(context.store, "tune-1", DONE, [("loss", 1, 0.5)])
        checkpoint = {"model": "small:tune-1", "path": "file:///adapters/tune-1", "iters": 2, "files": []}
        adapter = Adapter("default", "small:tune-1", "small", "tune-1", "adapters/tune-1", created_at=now())
        complete(context.store, "tune-1", {"checkpoints": [checkpoint]}, adapter)

    result = tune.run(Stack(client, work), parsed(tune, "--rows", str(rows), "--rank", "8", "--job", "tune-1"))
    assert result == {"job_uuid": "tune-1", "model": "small:tune-1", "metrics": {"loss": 0.5}}
    job = context.store.jobs.get("default", "tune-1")
    assert job is not None
    request = PostTrainingSFTRequest.model_validate(job.request)
    assert (request.model, request.dataset) == ("small", "tune-1-rows")
    assert (request.algorithm_config.rank, request.algorithm_config.alpha) == (8, 16)  # type: ignore[union-attr]
    assert tune.words(result) == "trained small:tune-1: loss 0.5"


def uploads(client: TestClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/datasets/uploads").json()
    return found


def test_a_run_that_was_broken_off_goes_on_with_the_same_rows_and_the_same_job(
    client: TestClient, context: Context, rows: Path
) -> None:
    def breaks_off(seconds: float) -> None:
        raise KeyboardInterrupt

    def work(seconds: float) -> None:
        start(context.store, "tune-1")
        complete(context.store, "tune-1", {"checkpoints": []})

    arguments = parsed(tune, "--rows", str(rows), "--job", "tune-1")
    with pytest.raises(KeyboardInterrupt):
        tune.run(Stack(client, breaks_off), arguments)
    assert tune.run(Stack(client, work), arguments)["job_uuid"] == "tune-1"
    assert len(uploads(client)) == 1, "nothing was sent again"


def test_other_rows_under_the_name_of_a_data_set_are_refused_and_not_kept(client: TestClient, rows: Path) -> None:
    stack = Stack(client)
    generate.register(stack, "prompts", rows)
    write_rows(rows, dialogs(5))
    with pytest.raises(Refused, match=r"POST /datasets/create answered 409: .*another data set .* 'prompts'"):
        generate.register(stack, "prompts", rows)
    assert len(uploads(client)) == 1


def test_a_job_that_fails_is_told_with_its_reason(client: TestClient, context: Context, rows: Path) -> None:
    stack = Stack(client, lambda seconds: fail(context.store, "evaluate-1", "the disk is full"))
    with pytest.raises(Refused, match="the job evaluate-1 failed: the disk is full"):
        evaluate.run(stack, parsed(evaluate, "--rows", str(rows), "--job", "evaluate-1"))


def test_a_model_is_evaluated(client: TestClient, context: Context, rows: Path) -> None:
    def work(seconds: float) -> None:
        start(context.store, "evaluate-1")
        report(context.store, "evaluate-1", DONE, [("em", 1, 0.25), ("f1", 1, 0.5)])
        complete(context.store, "evaluate-1", {})

    result = evaluate.run(Stack(client, work), parsed(evaluate, "--rows", str(rows), "--job", "evaluate-1"))
    assert result == {"job_uuid": "evaluate-1", "model": "small", "metrics": {"em": 0.25, "f1": 0.5}}
    assert evaluate.words(result) == "small (evaluate-1)\n  em 0.25\n  f1 0.5"


def test_a_model_is_added_and_waited_for(client: TestClient, deployer: ScriptedDeployer, home: Path) -> None:
    entry = home / "model.yaml"
    entry.write_text("{id: other, path: models/small, context: 256}")
    stack = Stack(client)
    arguments = parsed(serve, "--add", str(entry))

    def work(seconds: float) -> None:
        deployer.running["other"] = RUNNING

    stack.post("/models/add", json.loads('{"id": "other", "path": "models/small", "context": 256}'))
    models = serve.ready(stack, "other", work)
    assert {one["id"]: one["state"] for one in models} == {"small": "running", "other": "running"}
    assert arguments.add == entry
    assert "other  added, running, 1 replicas" in serve.words({"models": models})


FAILED = Application(ModelState.failed, 0, "No GPU.")


def test_a_model_that_ray_serve_starts_again_is_waited_for(
    client: TestClient, deployer: ScriptedDeployer, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(seconds: float) -> None:
        deployer.running["small"] = RUNNING

    deployer.running["small"] = Application(ModelState.starting, 0, "It is ill.")
    assert [one["state"] for one in serve.ready(Stack(client), None, work)] == ["running"]
    assert capsys.readouterr().err == "waiting for small (starting: It is ill.)\n"


def test_only_the_model_that_was_added_is_refused_where_it_cannot_start(
    client: TestClient, deployer: ScriptedDeployer, home: Path
) -> None:
    stack = Stack(client)
    stack.post("/models/add", {"id": "other", "path": "models/small", "context": 256})
    deployer.running |= {"small": FAILED, "other": RUNNING}
    models = serve.ready(stack, "other")
    assert {one["id"]: one["state"] for one in models} == {"small": "failed", "other": "running"}
    assert "small  config, failed, 0 replicas: No GPU." in serve.words({"models": models})
    assert serve.ready(stack) == models
    deployer.running["other"] = FAILED
    with pytest.raises(Refused, match=r"the model other cannot start: No GPU\."):
        serve.ready(stack, "other")


def test_a_model_that_was_removed_is_waited_for_until_it_is_gone(
    client: TestClient, context: Context, deployer: ScriptedDeployer
) -> None:
    stack = Stack(client)
    stack.post("/models/add", {"id": "other", "path": "models/small", "context": 256})
    deployer.running |= {"small": Application(ModelState.starting), "other": RUNNING}
    stack.post("/models/remove", {"model_id": "other"})
    models = serve.ready(stack, "other", lambda seconds: context.store.models.forget("other"))
    assert [one["id"] for one in models] == ["small"], "for others, which may take long, it does not wait"


def test_what_the_stack_refuses_is_told_in_its_words(client: TestClient) -> None:
    stack = Stack(client)
    with pytest.raises(Refused, match=r"GET /datasets/get answered 404: .*'nothing'"):
        stack.get("/datasets/get", dataset_uuid="nothing")
    with pytest.raises(Refused, match="POST /evaluate/question_answering/ answered 400"):
        stack.post("/evaluate/question_answering/", {"job_uuid": "a b"})


# On scripted answers


def scripted(answers: dict[str, Any], asked: dict[str, Any] | None = None) -> Stack:
    """A stack that gives an answer to each path, 404 to others, and notes what it was asked by POST."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if asked is not None and request.method == "POST" and "json" in request.headers.get("content-type", ""):
            asked.setdefault(path, []).append(json.loads(request.content))
        if path not in answers:
            return httpx.Response(404, json={"error": {"message": f"there is nothing at {path}"}})
        found = answers[path]
        if callable(found):
            found = found(request)
        return httpx.Response(200, content=found) if isinstance(found, bytes) else httpx.Response(200, json=found)

    return Stack(httpx.Client(base_url="http://stack", transport=httpx.MockTransport(answer)), lambda seconds: None)


def status(metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"status": "completed", "metrics": metrics, **more}


def events(*payloads: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps({"event": {"payload": one}}).encode() + b"\n\n" for one in payloads)


TURN = {
    "turn_id": "turn-1",
    "steps": [{"step_type": "tool_execution"}, {"step_type": "inference"}],
    "output_message": {"role": "assistant", "content": "Paris"},
}
TOOLS = {
    "step_type": "tool_execution",
    "tool_calls": [{"call_id": "1", "tool_name": "look_up", "arguments": {"what": "France"}}],
    "tool_responses": [{"call_id": "1", "tool_name": "look_up", "content": "its capital is Paris"}],
}
AGENT: dict[str, Any] = {
    "/v1/models": {"data": [{"id": "small"}]},
    "/agentic_system/create": {"agent_id": "agent-1"},
    "/agentic_system/session/create": {"session_id": "session-1"},
    "/agentic_system/turn/create": events(
        {"event_type": "turn_start", "turn_id": "turn-1"},
        {"event_type": "step_start", "step_id": "step-1", "step_type": "tool_execution"},
        {"event_type": "step_complete", "step_type": "tool_execution", "step_details": TOOLS},
        {"event_type": "turn_complete", "turn": TURN},
    ),
}


def test_an_agent_is_talked_with(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}
    result = agent.run(scripted(AGENT, asked), parsed(agent, "What is the capital of France?", "And of Spain?"))
    turns = [{"turn_id": "turn-1", "answer": "Paris", "steps": ["tool_execution", "inference"]}] * 2
    assert result == {"agent_id": "agent-1", "session_id": "session-1", "turns": turns}
    assert asked["/agentic_system/create"][0]["agent_config"]["model"] == "small"
    first, second = asked["/agentic_system/turn/create"]
    assert first["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert (second["agent_id"], second["session_id"], second["stream"]) == ("agent-1", "session-1", True)
    assert "look_up({'what': 'France'})" in capsys.readouterr().err
    assert agent.words(result) == "Paris\nParis"


def test_a_session_is_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}
    agent.run(scripted(AGENT, asked), parsed(agent, "Hello", "--agent", "a", "--session", "s"))
    assert set(asked) == {"/agentic_system/turn/create"}
    assert asked["/agentic_system/turn/create"][0]["session_id"] == "s"


def test_a_turn_that_breaks_off_is_told() -> None:
    broken = AGENT | {"/agentic_system/turn/create": b'data: {"error": {"message": "the engine has died"}}\n\n'}
    with pytest.raises(Refused, match="the engine has died"):
        agent.run(scripted(broken), parsed(agent, "Hello"))


START = {"event_type": "turn_start", "turn_id": "turn-1"}
AWAITING = {
    "event_type": "turn_awaiting_approval",
    "turn_id": "turn-1",
    "tool_calls": [{"call_id": "call_7", "tool_name": "send_mail", "arguments": {"to": "Ann"}}],
}


@pytest.mark.parametrize(
    ("payloads", "told"),
    [
        ((START, AWAITING), r"turn-1 of the agent agent-1 awaits .* of send_mail\({'to': 'Ann'}\): .* of call_7,"),
        ((START,), "the stream of the turn turn-1 of the agent agent-1 has ended before it"),
    ],
)
def test_a_turn_that_is_not_whole_when_its_stream_ends_is_told(payloads: tuple[dict[str, Any], ...], told: str) -> None:
    with pytest.raises(Refused, match=told):
        agent.run(scripted(AGENT | {"/agentic_system/turn/create": events(*payloads)}), parsed(agent, "Hello"))


GENERATED = {
    "/datasets/upload": {"content_url": "upload://rows.jsonl"},
    "/datasets/create": {},
    "/synthetic_data_generation/jobs": {"job_uuid": "made"},
    "/synthetic_data_generation/job/status": status({"kept": 4.0}),
    "/synthetic_data_generation/job/artifacts": {"datasets": {"sft": "made", "preferences": "made"}},
}


def test_that_nothing_was_kept_is_told_with_the_figures() -> None:
    answers = GENERATED | {"/synthetic_data_generation/job/artifacts": {"datasets": {}}}
    with pytest.raises(Refused, match=r"my-job has kept no answer, so there is no data set: \w+ \d"):
        generate.run(scripted(answers, {}), parsed(generate, "--dataset", "prompts", "--job", "my-job"))


@pytest.mark.parametrize(("output", "function"), [("sft", "top_k"), ("preferences", "none")])
def test_data_are_generated_from_a_file_of_prompts(output: str, function: str, rows: Path) -> None:
    asked: dict[str, Any] = {}
    words = ("--rows", str(rows), "--output", output, "--job", "made", "--reward-model", "likes")
    result = generate.run(scripted(GENERATED, asked), parsed(generate, *words))
    assert result == {"job_uuid": "made", "dataset": "made", "metrics": {"kept": 4.0}}
    (body,) = asked["/synthetic_data_generation/jobs"]
    request = SyntheticDataJobRequest.model_validate(body)
    assert (request.dataset, request.reward_model, request.output) == ("made-prompts", "likes", output)
    assert request.filtering_function == function
    assert asked["/datasets/create"][0]["dataset"]["content_url"] == "upload://rows.jsonl"


def cycle() -> dict[str, Any]:
    difference = {"value": 0.5, "low": 0.4, "high": 0.6, "examples": 4}
    evaluated = {"cycle-before": {"em": 0.0, "f1": 0.1}, "cycle-after": {"em": 0.5, "f1": 0.6}}

    def of_job(request: httpx.Request) -> Any:
        return status(evaluated[request.url.params["job_uuid"]])

    return (
        GENERATED
        | AGENT
        | {
            "/evaluate/question_answering/": {},
            "/evaluate/job/status": of_job,
            "/evaluate/compare": {"metrics": [{"name": "em", "difference": difference}]},
            "/post_training/supervised_fine_tune": {},
            "/post_training/job/status": status({"loss": 0.1}, checkpoints=[{"model": "small:cycle-tune"}]),
        }
    )


def test_the_whole_life_cycle_in_one(rows: Path) -> None:
    asked: dict[str, Any] = {}
    words = ("--train", str(rows), "--test", str(rows), "--generations", "2", "--name", "cycle", "--ask", "Capital?")
    result = life_cycle.run(scripted(cycle(), asked), parsed(life_cycle, *words))
    assert (result["model"], result["before"]["em"], result["after"]["em"]) == ("small:cycle-tune", 0.0, 0.5)
    before, after = (
        EvaluateQuestionAnsweringRequest.model_validate(one) for one in asked["/evaluate/question_answering/"]
    )
    assert (before.checkpoint, after.checkpoint) == ("small", "small:cycle-tune")
    assert before.dataset == after.dataset == "cycle-test"
    (training,) = asked["/post_training/supervised_fine_tune"]
    assert PostTrainingSFTRequest.model_validate(training).dataset == "made", "what it has generated itself"
    compared = CompareEvaluationsRequest.model_validate(asked["/evaluate/compare"][0])
    assert (compared.first, compared.second) == ("cycle-before", "cycle-after")
    assert asked["/agentic_system/create"][0]["agent_config"]["model"] == "small:cycle-tune"
    assert life_cycle.words(result).splitlines() == [
        "small:cycle-tune is served",
        "  em: 0.000 → 0.500 (+0.400 to +0.600)",
        "  it says: Paris",
    ]


def test_without_generations_it_learns_the_answers_that_are_there(rows: Path) -> None:
    asked: dict[str, Any] = {}
    words = ("--train", str(rows), "--test", str(rows), "--name", "cycle")
    result = life_cycle.run(scripted(cycle(), asked), parsed(life_cycle, *words))
    assert "/synthetic_data_generation/jobs" not in asked
    assert asked["/post_training/supervised_fine_tune"][0]["dataset"] == "cycle-train"
    assert "turn" not in result


def test_two_that_begin_in_one_second_have_two_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 4, 2, 0)))
    first, second = client.new_id("tune"), client.new_id("tune")
    assert first.startswith("tune-20260102-030405-")
    assert first != second


# From the command line


@pytest.mark.parametrize("name", NAMES)
def test_every_driver_says_how_it_is_used(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.drivers.{name}", "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    for word in ("--address", "--json", client.KEY, f"python -m scripts.drivers.{name}"):
        assert word in done.stdout
    assert importlib.import_module(f"scripts.drivers.{name}").__doc__


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the driver `serve` with arguments, at an address where its list of models is answered to a key alone."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers.get("authorization") != "Bearer lsr_1":
            return httpx.Response(401, json={"error": {"message": "no API key"}})
        one = {"id": "small", "source": "config", "state": "running", "replicas": 1}
        return httpx.Response(200, json={"data": [one]})

    def made(base_url: str, headers: dict[str, str], timeout: float) -> httpx.Client:
        assert base_url == "https://stack.example.com"
        return real(base_url=base_url, headers=headers, transport=httpx.MockTransport(answer))

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["serve", "--address", "https://stack.example.com", *words])
        return client.drive(serve.__doc__, serve.options, serve.run, serve.words)

    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", made)
    return run


def test_the_key_is_of_the_environment(
    driven: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(client.KEY, raising=False)
    assert driven() == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "refused: GET /models/list answered 401: no API key\n")
    monkeypatch.setenv(client.KEY, "lsr_1")
    assert driven() == 0
    assert capsys.readouterr().out == "small  config, running, 1 replicas\n"


def test_the_result_is_one_object_with_json(
    driven: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(client.KEY, "lsr_1")
    assert driven("--json") == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["id"] == "small"


def test_a_stack_that_is_not_there_is_told_in_a_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.drivers.serve", "--address", "http://127.0.0.1:9"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("failed: the stack at http://127.0.0.1:9 did not answer")

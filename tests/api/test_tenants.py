"""Two tenants and all routes: what is one's does not exist for the other, and what both have by one name is apart.

A new route goes into one of the tables below; a test says so when it is in none.
"""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stack import keys
from stack.api.messages import ToolCall
from stack.context import Context, Principal
from stack.store import Adapter, now
from tests import samples
from tests.api.envelope import error_of
from tests.evaluated import completed
from tests.memory import document
from tests.samples import (
    PREFERENCES,
    batch,
    dataset,
    dialogs,
    evaluation,
    fine_tuning,
    function_calls,
    generation,
    ingestion,
    preference_optimization,
    preferences,
    reward_training,
    write_rows,
)
from tests.scripted_sessions import ScriptedSessions

OWNER = "acme"
LOG = {"message": "hello", "level": "info", "timestamp": "2030-01-01T00:00:00.000Z"}
EVENT = {
    "type": "unstructured_log", "trace_id": "trace-1", "span_id": "span-1", "timestamp": LOG["timestamp"],
    "message": "hello", "severity": "info",
}  # fmt: skip
CHAT = {"model": "small:tune-1", "messages": [{"role": "user", "content": "a"}]}
GENERATIONS = [{"dialog": CHAT["messages"], "sampled_generations": [{"role": "assistant", "content": "b"}]}]
GENERATION = {"dialogs": CHAT["messages"], "filtering_function": "none"}
UPLOADED = {"columns": {"dialog": "dialog"}, "content_url": "UPLOAD_URL"}
AGENT_CONFIG = {"model": "small", "instructions": "Be brief."}
MEMORY = {"type": "memory", "memory_bank_configs": [{"type": "keyvalue", "bank_id": "BANK", "keys": ["a"]}]}
FUNCTION = {"type": "function_call", "function_name": "run_it", "description": "Runs it.", "parameters": {}}
SAID = [{"role": "user", "content": "a"}]


def on_model(named: str) -> dict[str, Any]:
    """A preference optimization of one's own data, which starts from a model."""
    return preference_optimization("PAIRS", job_uuid="new", finetuned_model=named, lora_config={})


# Requests that name something of acme's: a method, a path with its query, a body. Words in capitals stand for ids.
NAMING: list[tuple[str, str, Any]] = [
    ("GET", "/datasets/get?dataset_uuid=train", None),
    ("GET", "/datasets/preview?dataset_uuid=train", None),
    ("GET", "/datasets/list?after=train", None),
    ("GET", "/datasets/uploads?after=UPLOAD", None),
    ("POST", "/datasets/create", {"uuid": "new", "dataset": UPLOADED}),
    ("POST", "/datasets/delete", {"dataset_uuid": "train"}),
    ("POST", "/datasets/uploads/delete", {"upload_id": "UPLOAD"}),
    ("GET", "/memory_banks/get?bank_id=BANK", None),
    ("GET", "/memory_banks/list?after=BANK", None),
    ("POST", "/memory_banks/drop", {"bank_id": "BANK"}),
    ("POST", "/memory_bank/insert", {"bank_id": "BANK", "documents": [document("b")]}),
    ("POST", "/memory_bank/update", {"bank_id": "BANK", "documents": [document("a", "new")]}),
    ("POST", "/memory_bank/query", {"bank_id": "BANK", "query": "a"}),
    ("POST", "/memory_bank/documents/get?bank_id=BANK", {"document_ids": ["a"]}),
    ("POST", "/memory_bank/documents/delete", {"bank_id": "BANK", "document_ids": ["a"]}),
    ("POST", "/post_training/supervised_fine_tune", fine_tuning("train", job_uuid="new")),
    ("POST", "/post_training/supervised_fine_tune", fine_tuning("MINE", job_uuid="new", model="small-whole-1")),
    ("POST", "/post_training/preference_optimize", preference_optimization("pairs", job_uuid="new")),
    ("POST", "/post_training/preference_optimize", on_model("small:tune-1")),
    ("POST", "/post_training/preference_optimize", on_model("tune-1")),
    ("POST", "/post_training/preference_optimize", on_model("small-whole-1")),
    ("POST", "/post_training/preference_optimize", on_model("whole-1")),
    ("POST", "/post_training/train_reward_model", reward_training("pairs", job_uuid="new")),
    ("POST", "/post_training/train_reward_model", reward_training("PAIRS", job_uuid="new", model="small-whole-1")),
    ("GET", "/post_training/job/status?job_uuid=tune-1", None),
    ("GET", "/post_training/job/logs?job_uuid=tune-1", None),
    ("GET", "/post_training/job/artifacts?job_uuid=tune-1", None),
    ("POST", "/post_training/job/cancel", {"job_uuid": "tune-1"}),
    ("GET", "/post_training/jobs?after=tune-1", None),
    ("POST", "/evaluate/question_answering/", evaluation("train", job_uuid="new")),
    ("POST", "/evaluate/question_answering/", evaluation(UPLOADED, job_uuid="new")),
    ("POST", "/evaluate/question_answering/", evaluation("MINE", job_uuid="new", checkpoint="small:tune-1")),
    ("POST", "/evaluate/summarization/", evaluation("train", job_uuid="new", metrics=["rouge"])),
    ("POST", "/evaluate/text_generation/", evaluation("train", job_uuid="new", metrics=["bleu"])),
    ("POST", "/evaluate/judged/", evaluation("train", job_uuid="new", metrics=["rating"], judge="small", rubric="a")),
    (
        "POST",
        "/evaluate/judged/",
        evaluation("MINE", job_uuid="new", metrics=["rating"], judge="small:tune-1", rubric="a"),
    ),
    ("POST", "/evaluate/function_calling/", evaluation("calls", job_uuid="new", metrics=["ast"])),
    ("POST", "/evaluate/benchmark/", {"job_uuid": "new", "tasks": ["a"], "checkpoint": "small:tune-1"}),
    ("POST", "/evaluate/compare", {"first": "evaluated-1", "second": "evaluated-1"}),
    ("GET", "/evaluate/job/status?job_uuid=evaluation-1", None),
    ("GET", "/evaluate/job/logs?job_uuid=evaluation-1", None),
    ("GET", "/evaluate/job/artifacts?job_uuid=evaluation-1", None),
    ("POST", "/evaluate/job/cancel", {"job_uuid": "evaluation-1"}),
    ("GET", "/evaluate/jobs?after=evaluation-1", None),
    ("POST", "/synthetic_data_generation/generate", GENERATION | {"model": "small:tune-1"}),
    ("POST", "/synthetic_data_generation/generate", GENERATION | {"reward_model": "small-reward-1"}),
    ("POST", "/synthetic_data_generation/jobs", generation("train", job_uuid="new")),
    ("POST", "/synthetic_data_generation/jobs", generation("MINE", job_uuid="new", model="small:tune-1")),
    ("GET", "/synthetic_data_generation/job/status?job_uuid=generation-1", None),
    ("GET", "/synthetic_data_generation/job/logs?job_uuid=generation-1", None),
    ("GET", "/synthetic_data_generation/job/artifacts?job_uuid=generation-1", None),
    ("POST", "/synthetic_data_generation/job/cancel", {"job_uuid": "generation-1"}),
    ("GET", "/synthetic_data_generation/jobs?after=generation-1", None),
    ("POST", "/batch_inference/jobs", batch("train", job_uuid="new")),
    ("POST", "/batch_inference/jobs", batch("MINE", job_uuid="new", model="small:tune-1")),
    ("GET", "/batch_inference/job/status?job_uuid=batch-1", None),
    ("GET", "/batch_inference/job/logs?job_uuid=batch-1", None),
    ("GET", "/batch_inference/job/artifacts?job_uuid=batch-1", None),
    ("POST", "/batch_inference/job/cancel", {"job_uuid": "batch-1"}),
    ("GET", "/batch_inference/jobs?after=batch-1", None),
    ("POST", "/memory_banks/ingest", ingestion("documents", job_uuid="new", bank_id="BANK")),
    ("GET", "/memory_banks/ingest/job/status?job_uuid=ingest-1", None),
    ("GET", "/memory_banks/ingest/job/logs?job_uuid=ingest-1", None),
    ("GET", "/memory_banks/ingest/job/artifacts?job_uuid=ingest-1", None),
    ("POST", "/memory_banks/ingest/job/cancel", {"job_uuid": "ingest-1"}),
    ("GET", "/memory_banks/ingest/jobs?after=ingest-1", None),
    ("POST", "/inference/chat_completion", CHAT),
    ("POST", "/inference/completion", {"model": "small:tune-1", "content": "a"}),
    ("POST", "/batch_inference/chat_completion", {"model": "small:tune-1", "messages_batch": [CHAT["messages"]]}),
    ("POST", "/batch_inference/completion", {"model": "small:tune-1", "content_batch": ["a"]}),
    ("POST", "/reward_scoring/score", {"model": "small-reward-1", "dialog_generations": GENERATIONS}),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions", {"model": "small:tune-1", "prompt": "a"}),
    ("POST", "/v1/chat/completions", CHAT | {"model": "small-whole-1"}),
    ("POST", "/inference/chat_completion", CHAT | {"model": "small-whole-1"}),
    ("POST", "/evaluate/question_answering/", evaluation("MINE", job_uuid="new", checkpoint="small-whole-1")),
    ("GET", "/v1/models/small:tune-1", None),
    ("GET", "/v1/models/small-whole-1", None),
    ("GET", "/experiments/get?experiment_id=EXPERIMENT", None),
    ("GET", "/experiments/list?after=EXPERIMENT", None),
    ("GET", "/experiments/runs?experiment_id=EXPERIMENT", None),
    ("POST", "/experiments/update", {"experiment_id": "EXPERIMENT", "metadata": {"a": 1}}),
    ("POST", "/experiments/create_run", {"experiment_id": "EXPERIMENT"}),
    ("POST", "/experiments/artifacts/get", {"experiment_id": "EXPERIMENT"}),
    (
        "POST",
        "/experiments/artifacts/upload",
        {"experiment_id": "EXPERIMENT", "name": "b.txt", "artifact_type": "other", "content": "aGVsbG8="},
    ),
    ("GET", "/runs/get?run_id=RUN", None),
    ("GET", "/runs/metrics?run_id=RUN", None),
    ("POST", "/runs/update", {"run_id": "RUN", "metadata": {"a": 1}}),
    ("POST", "/runs/log_metrics", {"run_id": "RUN", "metrics": []}),
    ("GET", "/artifacts/get?artifact_id=ARTIFACT", None),
    ("GET", "/artifacts/content?artifact_id=ARTIFACT", None),
    ("POST", "/artifacts/delete", {"artifact_id": "ARTIFACT"}),
    ("POST", "/logging/log_messages", {"run_id": "RUN", "logs": [LOG]}),
    ("POST", "/logging/get_logs", {"query": "", "filters": {"run_id": "RUN"}}),
    ("POST", "/logging/get_logs", {"query": "", "filters": {"job_uuid": "tune-1"}}),
    ("GET", "/telemetry/get_trace?trace_id=trace-1", None),
    ("GET", "/agentic_system/get?agent_id=AGENT", None),
    ("POST", "/agentic_system/update", {"agent_id": "AGENT", "agent_config": AGENT_CONFIG}),
    ("POST", "/agentic_system/create", {"agent_config": AGENT_CONFIG | {"model": "small:tune-1"}}),
    ("POST", "/agentic_system/create", {"agent_config": AGENT_CONFIG | {"tools": [MEMORY]}}),
    ("GET", "/agentic_system/session/list?agent_id=AGENT", None),
    ("POST", "/agentic_system/session/create", {"agent_id": "AGENT", "session_name": "talk"}),
    ("POST", "/agentic_system/session/get?agent_id=AGENT&session_id=SESSION", {}),
    ("POST", "/agentic_system/turn/create", {"agent_id": "AGENT", "session_id": "SESSION", "messages": SAID}),
    (
        "POST",
        "/agentic_system/turn/create",
        {"agent_id": "AGENT", "session_id": "SESSION", "messages": SAID, "tools": [MEMORY]},
    ),
    ("GET", "/agentic_system/turn/get?agent_id=AGENT&turn_id=TURN", None),
    ("GET", "/agentic_system/turn/events?agent_id=AGENT&turn_id=TURN", None),
    ("GET", "/agentic_system/step/get?agent_id=AGENT&turn_id=TURN&step_id=STEP", None),
    ("POST", "/agentic_system/turn/cancel", {"agent_id": "AGENT", "turn_id": "TURN"}),
    (
        "POST",
        "/agentic_system/turn/approve",
        {"agent_id": "AGENT", "turn_id": "AWAITING", "approvals": {"call-1": True}},
    ),
    ("POST", "/agentic_system/session/delete", {"agent_id": "AGENT", "session_id": "SESSION"}),
    ("POST", "/agentic_system/delete", {"agent_id": "AGENT"}),
]
# Requests that are answered with lists, in which there is something of acme's for acme alone.
LISTING: list[tuple[str, str, Any]] = [
    ("GET", "/datasets/list", None),
    ("GET", "/datasets/uploads", None),
    ("GET", "/memory_banks/list", None),
    ("GET", "/post_training/jobs", None),
    ("GET", "/evaluate/jobs", None),
    ("GET", "/synthetic_data_generation/jobs", None),
    ("GET", "/batch_inference/jobs", None),
    ("GET", "/memory_banks/ingest/jobs", None),
    ("GET", "/experiments/list", None),
    ("GET", "/agentic_system/list", None),
    ("POST", "/logging/get_logs", {"query": ""}),
    ("POST", "/logging/get_logs", {"query": "", "filters": {"trace_id": "trace-1"}}),
]
# Routes that name nothing and list nothing of a tenant's, or have a test of their own below.
APART = {
    ("GET", "/health"),
    ("GET", "/models/list"),  # the administrator's, who adds models for all; private ones have a test below
    ("POST", "/models/add"),
    ("POST", "/models/remove"),
    ("GET", "/metrics"),  # the administrator's, of all tenants
    ("GET", "/v1/models"),
    ("POST", "/datasets/upload"),
    ("POST", "/memory_banks/create"),
    ("POST", "/experiments/create"),
    ("GET", "/safety/shields"),  # the config's, which are everybody's
    ("POST", "/safety/run_shields"),
    ("POST", "/inference/embeddings"),  # by the config's models, which are everybody's
    ("POST", "/v1/embeddings"),
    ("POST", "/telemetry/log_event"),
}


@dataclass
class Tenants:
    """Two tenants' clients, and the ids of what the first one has."""

    owner: TestClient
    other: TestClient
    ids: dict[str, str]

    def ask(self, client: TestClient, method: str, path: str, body: Any) -> Any:
        return client.request(method, self._filled(path), json=self._filled(body))

    def _filled(self, value: Any) -> Any:
        """A path or a body with the ids in place."""
        if isinstance(value, dict):
            return {key: self._filled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._filled(one) for one in value]
        if isinstance(value, str):
            return re.sub("|".join(self.ids), lambda found: self.ids[found[0]], value)
        return value


def of_tenant(app: FastAPI, context: Context, tenant: str, *more_scopes: str) -> TestClient:
    key = keys.create(context.store, tenant, "test", ["inference", "data", "training", "agents", *more_scopes])[1]
    return TestClient(app, raise_server_exceptions=False, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def tenants(app: FastAPI, context: Context, home: Path, data: dict[str, Any], sessions: ScriptedSessions) -> Tenants:
    owner, other = of_tenant(app, context, OWNER), of_tenant(app, context, "other")

    def made(client: TestClient, path: str, **body: Any) -> Any:
        reply = client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json() if reply.content else None

    made(owner, "/datasets/create", uuid="train", dataset=data)
    made(other, "/datasets/create", uuid="mine", dataset=data)
    made(owner, "/datasets/create", uuid="mine", dataset=data)
    pairs = dataset(write_rows(home / "data" / "pairs.jsonl", preferences(4)), **PREFERENCES)
    made(owner, "/datasets/create", uuid="pairs", dataset=pairs)
    made(owner, "/datasets/create", uuid="calls", dataset=function_calls(home / "data" / "calls.jsonl"))
    for client in (owner, other):
        made(client, "/datasets/create", uuid="my-pairs", dataset=pairs)
    rows = b'{"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    upload = owner.post("/datasets/upload", files={"file": ("rows.jsonl", rows)}).json()
    made(owner, "/evaluate/question_answering/", **evaluation(data))
    experiment = made(owner, "/experiments/create", name="mine")["id"]
    run = made(owner, "/experiments/create_run", experiment_id=experiment)["id"]
    bank = made(owner, "/memory_banks/create", name="mine", config={"type": "keyvalue"})["bank_id"]
    made(owner, "/memory_bank/insert", bank_id=bank, documents=[document("a")])
    content = base64.b64encode(b"hello").decode()
    sent = dict(experiment_id=experiment, name="a.txt", artifact_type="other", content=content)
    artifact = made(owner, "/experiments/artifacts/upload", **sent)["id"]
    made(owner, "/logging/log_messages", run_id=run, logs=[LOG])
    made(owner, "/telemetry/log_event", event=EVENT)
    tune(context, OWNER, "tune-1")
    context.artifacts.publish(f"tenants/{OWNER}/adapters/tune-1", home / "data")
    completed(context, home, "evaluated-1", ["Paris"], tenant=OWNER)
    samples.add_trained(context.store, "small-whole-1", OWNER)
    samples.add_trained_reward(context.store, "small-reward-1", OWNER)
    made(owner, "/synthetic_data_generation/jobs", **generation(data))
    made(owner, "/batch_inference/jobs", **batch(data))
    texts = write_rows(home / "data" / "documents.jsonl", [{"document_id": "b", "content": "a text"}])
    made(owner, "/datasets/create", uuid="documents", dataset=dataset(texts, document_id="text", content="text"))
    made(owner, "/memory_banks/ingest", **ingestion("documents", bank_id=bank))
    agent = made(owner, "/agentic_system/create", agent_config=AGENT_CONFIG | {"tools": [FUNCTION]})["agent_id"]
    session = made(owner, "/agentic_system/session/create", agent_id=agent, session_name="talk")["session_id"]
    turn = made(owner, "/agentic_system/turn/create", agent_id=agent, session_id=session, messages=SAID)
    sessions.calls = [ToolCall(call_id="call-1", tool_name="run_it", arguments={})]
    asking = dict(agent_id=agent, session_id=session, messages=SAID, approval=["run_it"])
    awaiting = made(owner, "/agentic_system/turn/create", **asking)["turn_id"]
    sessions.calls = []
    # The longer words first: UPLOAD_URL is not UPLOAD.
    ids = {
        "UPLOAD_URL": upload["content_url"],
        "UPLOAD": upload["id"],
        "EXPERIMENT": experiment,
        "RUN": run,
        "BANK": bank,
    }
    ids |= {"AGENT": agent, "SESSION": session, "TURN": turn["turn_id"], "STEP": turn["steps"][0]["step_id"]}
    ids |= {"AWAITING": awaiting}
    return Tenants(owner, other, ids | {"ARTIFACT": artifact, "MINE": "mine", "PAIRS": "my-pairs"})


def tune(context: Context, tenant: str, uuid: str) -> None:
    """A fine-tuning job that is completed, with its adapter."""
    samples.add_job(context.store, uuid, "supervised_fine_tune", tenant, model="small")
    job = samples.start(context.store, uuid, tenant)
    adapter = Adapter(tenant, f"small:{uuid}", "small", uuid, f"tenants/{tenant}/adapters/{uuid}", created_at=now())
    assert context.store.jobs.complete(job.id, 1, {"checkpoints": []}, adapter)


def name(case: tuple[str, str, Any]) -> str:
    return f"{case[0]} {case[1]}"


@pytest.mark.parametrize("case", NAMING, ids=name)
def test_anothers_is_404_and_ones_own_is_not(tenants: Tenants, case: tuple[str, str, Any]) -> None:
    error = error_of(tenants.ask(tenants.other, *case), 404)
    assert error["code"] in ("not_found", "model_not_found")
    assert OWNER not in error["message"]
    reply = tenants.ask(tenants.owner, *case)
    assert reply.status_code in (200, 206), reply.text


def rows_of(reply: Any) -> Any:
    if reply.headers["content-type"] == "application/jsonl":
        return [json.loads(line) for line in reply.text.splitlines()]
    return reply.json()


@pytest.mark.parametrize("case", LISTING, ids=name)
def test_lists_show_ones_own_alone(tenants: Tenants, case: tuple[str, str, Any]) -> None:
    mine, others = tenants.ask(tenants.owner, *case), tenants.ask(tenants.other, *case)
    assert (mine.status_code, others.status_code) == (200, 200)
    assert len(rows_of(mine)) > 0
    assert [one for one in rows_of(others) if one in rows_of(mine)] == []
    if "datasets/list" not in case[1]:
        assert rows_of(others) == []


def test_models_are_the_configs_and_ones_own(tenants: Tenants) -> None:
    def models(client: TestClient) -> list[str]:
        return [model["id"] for model in client.get("/v1/models").json()["data"]]

    assert models(tenants.owner) == ["small", "small-whole-1", "small:tune-1", "small-reward-1"]
    assert models(tenants.other) == ["small"]


def test_an_administrator_does_not_see_anothers_models_either(tenants: Tenants, app: FastAPI, context: Context) -> None:
    owner, other = of_tenant(app, context, OWNER, "admin"), of_tenant(app, context, "other", "admin")
    model = {"id": "small-whole-1", "path": "models/small"}
    for _ in range(2):  # also of one that is being removed
        listed = [client.get("/models/list").json()["data"] for client in (owner, other)]
        mine, others = ([one["id"] for one in models] for models in listed)
        assert (mine, others) == (["small", model["id"], "small-reward-1"], ["small"])
        for refused in (
            error_of(other.post("/models/remove", json={"model_id": model["id"]}), 404),
            error_of(other.post("/models/add", json=model), 409),
        ):
            assert "whole" not in refused["message"].replace(repr(model["id"]), "")
        assert owner.post("/models/remove", json={"model_id": model["id"]}).status_code == 200


def test_both_may_have_the_same_names(tenants: Tenants, context: Context, home: Any) -> None:
    other = dataset(write_rows(home / "data" / "other.jsonl", dialogs(1)))
    for path, body in [
        ("/datasets/create", {"uuid": "train", "dataset": other}),
        ("/evaluate/question_answering/", evaluation(other)),
        ("/post_training/supervised_fine_tune", fine_tuning(other)),
        ("/post_training/preference_optimize", preference_optimization("my-pairs")),
        ("/post_training/train_reward_model", reward_training("my-pairs")),
        ("/experiments/create", {"name": "mine", "metadata": {"a": 1}}),
        ("/telemetry/log_event", {"event": EVENT | {"message": "mine"}}),
    ]:
        assert tenants.other.post(path, json=body).status_code == 200, path
    assert tenants.owner.get("/datasets/get?dataset_uuid=train").json()["rows"] == 4
    assert tenants.other.get("/datasets/get?dataset_uuid=train").json()["rows"] == 1
    assert tenants.owner.get("/post_training/job/status?job_uuid=tune-1").json()["status"] == "completed"
    assert tenants.other.get("/post_training/job/status?job_uuid=tune-1").json()["status"] == "scheduled"
    cancel = {"job_uuid": "evaluation-1"}
    assert tenants.other.post("/evaluate/job/cancel", json=cancel).json()["status"] == "cancelled"
    assert tenants.owner.get("/evaluate/job/status?job_uuid=evaluation-1").json()["status"] == "scheduled"
    for client, words in ((tenants.owner, "hello"), (tenants.other, "mine")):
        logs = client.get("/telemetry/get_trace?trace_id=trace-1").json()["logs"]
        assert [log["message"] for log in logs] == [words]


def test_what_anothers_request_could_not_do_is_not_done(tenants: Tenants) -> None:
    before = [rows_of(tenants.ask(tenants.owner, *case)) for case in LISTING]
    for case in NAMING:
        error_of(tenants.ask(tenants.other, *case), 404)
    assert [rows_of(tenants.ask(tenants.owner, *case)) for case in LISTING] == before


def test_without_its_tenant_a_context_sees_nothing(context: Context, tenants: Tenants) -> None:
    nobody = context.of(Principal("nobody", frozenset()))
    assert [model.id for model in nobody.models.all()] == ["small"]
    assert context.store.keys.list("nobody") == []


def test_every_route_is_in_a_table(app: FastAPI) -> None:
    served = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    tabled = {(method, path.split("?")[0]) for method, path, _ in [*NAMING, *LISTING]}
    tabled.add(("GET", "/v1/models/{model}"))
    tabled -= {("GET", "/v1/models/small:tune-1"), ("GET", "/v1/models/small-whole-1")}
    assert served == tabled | APART

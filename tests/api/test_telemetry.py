"""Metrics, logs and traces over HTTP, and the RFC client's own calls."""

import datetime as dt
import json
from typing import Any

import httpx
import llama_stack
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from llama_stack import AsyncLlamaStack

from stack import keys
from stack.context import Context
from tests import samples
from tests.api.envelope import error_of

T0 = "2030-01-01T00:00:00.000Z"
JSON = {"content-type": "application/json"}
LONE = "\ud83d"  # one half of a character that takes two


@pytest.fixture
def run_id(context: Context) -> str:
    return samples.add_job(context.store, "job-1").run_id


def metric(run_id: str, /, **changes: Any) -> dict[str, Any]:
    return {"name": "loss", "value": 0.5, "timestamp": T0, "run_id": run_id} | changes


def log(**changes: Any) -> dict[str, Any]:
    return {"message": "hello", "level": "info", "timestamp": T0, "additional_info": {}} | changes


def event(**changes: Any) -> dict[str, Any]:
    return {
        "type": "metric",
        "trace_id": "t-1",
        "span_id": "s-1",
        "timestamp": T0,
        "metric": "tokens",
        "value": 1,
        "unit": "tokens",
    } | changes


def span_event(payload: Any, **changes: Any) -> dict[str, Any]:
    of_span = {"type": "structured_log", "trace_id": "t-1", "span_id": "s-1", "timestamp": T0}
    return of_span | {"payload": payload} | changes


def post(client: TestClient, path: str, body: Any) -> Any:
    """Also what only Python takes for JSON: NaN, and halves of characters."""
    return client.post(path, content=json.dumps(body), headers=JSON)


# Metrics


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_metrics_come_back_as_what_they_are(client: TestClient, run_id: str, wrapped: bool) -> None:
    values = [0.5, 3, "warm", True, False, 2**62 + 1]
    body = {"run_id": run_id, "metrics": [metric(run_id, value=value) for value in values]}
    reply = client.post("/runs/log_metrics", json={"request": body} if wrapped else body)
    assert (reply.status_code, reply.content) == (200, b"")
    found = client.get("/runs/metrics", params={"run_id": run_id})
    assert found.json() == [metric(run_id, value=value, step=step) for step, value in enumerate(values)]
    assert json.dumps([point["value"] for point in found.json()]) == json.dumps(values)


def test_metrics_are_asked_for_by_name_steps_and_number(client: TestClient, run_id: str) -> None:
    points = [metric(run_id, name=name, step=step) for name in ("a", "b") for step in range(10)]
    assert client.post("/runs/log_metrics", json={"run_id": run_id, "metrics": points}).status_code == 200

    def steps(**query: Any) -> list[int]:
        found = client.get("/runs/metrics", params={"run_id": run_id, "name": "a"} | query).json()
        return [point["step"] for point in found]

    assert steps() == list(range(10))
    assert steps(from_step=7) == [7, 8, 9]
    assert steps(from_step=2, to_step=3) == [2, 3]
    assert steps(max_points=4) == [0, 3, 6, 9]
    assert len(client.get("/runs/metrics", params={"run_id": run_id, "max_points": 4}).json()) == 4


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"name": ""}, "metrics.0.name"),
        ({"name": "x" * 201}, "metrics.0.name"),
        ({"name": "a\0"}, "metrics.0.name"),
        ({"name": LONE}, "metrics.0.name"),
        ({"name": 5}, "metrics.0.name"),
        ({"value": None}, "metrics.0.value"),
        ({"value": [1]}, "metrics.0.value"),
        ({"value": float("nan")}, "metrics.0.value"),
        ({"value": float("-inf")}, "metrics.0.value"),
        ({"value": 2**63}, "metrics.0.value"),
        ({"value": 10**400}, "metrics.0.value"),
        ({"value": LONE}, "metrics.0.value"),
        ({"value": "\0"}, "metrics.0.value"),
        ({"timestamp": "yesterday"}, "metrics.0.timestamp"),
        ({"timestamp": 1_700_000_000}, "metrics.0.timestamp"),
        ({"step": -1}, "metrics.0.step"),
        ({"step": 2**53 + 1}, "metrics.0.step"),
        ({"step": 0.5}, "metrics.0.step"),
        ({"run_id": "elsewhere"}, "metrics.0.run_id"),
        ({"colour": "red"}, "metrics.0"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() if isinstance(value, dict) else "",
)
def test_a_wrong_metric_is_400_and_named(client: TestClient, run_id: str, wrong: dict[str, Any], param: str) -> None:
    body = {"run_id": run_id, "metrics": [metric(run_id, **wrong), metric(run_id)]}
    assert error_of(post(client, "/runs/log_metrics", body), 400)["param"] == param
    assert client.get("/runs/metrics", params={"run_id": run_id}).json() == []


def test_a_metric_of_another_run_is_refused_with_both_ids(client: TestClient, run_id: str) -> None:
    reply = client.post("/runs/log_metrics", json={"run_id": run_id, "metrics": [metric("elsewhere")]})
    message = error_of(reply, 400)["message"]
    assert "'elsewhere'" in message
    assert run_id in message


@pytest.mark.parametrize("path", ["/runs/log_metrics", "/logging/log_messages"])
def test_too_many_at_once_are_400_before_any_is_looked_at(client: TestClient, run_id: str, path: str) -> None:
    field = "metrics" if path.startswith("/runs") else "logs"
    error = error_of(client.post(path, json={"run_id": run_id, field: [0] * 10_001}), 400)
    assert (error["param"], "at most 10000" in error["message"]) == (field, True)


def test_none_at_once_are_fine(client: TestClient, run_id: str) -> None:
    assert client.post("/runs/log_metrics", json={"run_id": run_id, "metrics": []}).status_code == 200
    assert client.post("/logging/log_messages", json={"logs": []}).status_code == 200


@pytest.mark.parametrize("path", ["/runs/log_metrics", "/logging/log_messages"])
def test_an_unknown_run_is_404(client: TestClient, path: str) -> None:
    field = {"metrics": [metric("none")]} if path.startswith("/runs") else {"logs": [log()]}
    assert error_of(client.post(path, json={"run_id": "none"} | field), 404)["param"] == "run_id"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_points": 1},
        {"max_points": 10_001},
        {"from_step": -1},
        {"to_step": "x"},
        {"from_step": 2**64},
        {"name": "x" * 201},
    ],
    ids=str,
)
def test_a_wrong_query_of_metrics_is_400_and_named(client: TestClient, run_id: str, wrong: dict[str, Any]) -> None:
    reply = client.get("/runs/metrics", params={"run_id": run_id} | wrong)
    assert error_of(reply, 400)["param"] == next(iter(wrong))


def test_a_name_that_no_metric_can_have_is_400(client: TestClient, run_id: str) -> None:
    reply = client.get("/runs/metrics", params={"run_id": run_id, "name": "a\0"})
    assert "NUL" in error_of(reply, 400)["message"]


# Logs


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_logs_are_kept_and_searched(client: TestClient, run_id: str, wrapped: bool) -> None:
    deep = json.loads("[" * 19 + "]" * 19)
    info = {"worker": 1, "number": 10**100, "mixed": {"list": [1.5, None, "ä", "\0"]}, "deep": deep}
    body = {"run_id": run_id, "logs": [log(message="Disk is full", additional_info=info), log(level="error")]}
    reply = client.post("/logging/log_messages", json={"request": body} if wrapped else body)
    assert (reply.status_code, reply.content) == (200, b"")
    search = {"query": "DISK", "filters": {"run_id": run_id, "level": ["info", "warning"]}}
    (found,) = client.post("/logging/get_logs", json={"request": search} if wrapped else search).json()
    assert found == log(message="Disk is full", additional_info=info, run_id=run_id, trace_id=None, id=found["id"])
    hello, disk = client.post("/logging/get_logs", json={"query": "", "filters": None}).json()
    assert (hello["level"], disk["id"]) == ("error", found["id"])


def test_logs_are_read_page_by_page(client: TestClient) -> None:
    client.post("/logging/log_messages", json={"logs": [log(message=str(number)) for number in range(5)]})
    body: dict[str, Any] = {"query": "", "limit": 2}
    pages = []
    while page := client.post("/logging/get_logs", json=body).json():
        pages.append([found["message"] for found in page])
        body["after_id"] = page[-1]["id"]
    assert pages == [["4", "3"], ["2", "1"], ["0"]]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"message": "x" * 16_385}, "logs.0.message"),
        ({"message": "a\0b"}, "logs.0.message"),
        ({"message": LONE}, "logs.0.message"),
        ({"message": None}, "logs.0.message"),
        ({"level": ""}, "logs.0.level"),
        ({"level": "x" * 21}, "logs.0.level"),
        ({"timestamp": "2030-02-30T00:00:00Z"}, "logs.0.timestamp"),
        ({"additional_info": []}, "logs.0.additional_info"),
        ({"additional_info": {"a": float("nan")}}, "logs.0.additional_info"),
        ({"additional_info": {"a": LONE}}, "logs.0.additional_info"),
        ({"additional_info": {"a": "x" * 16_384}}, "logs.0.additional_info"),
        ({"additional_info": {"a": json.loads("[" * 300 + "]" * 300)}}, "logs.0.additional_info"),
        ({"additional_info": {str(number): 0 for number in range(1_001)}}, "logs.0.additional_info"),
        ({"run_id": "r"}, "logs.0"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() if isinstance(value, dict) else "",
)
def test_a_wrong_log_is_400_and_named(client: TestClient, wrong: dict[str, Any], param: str) -> None:
    reply = post(client, "/logging/log_messages", {"logs": [log(), log(**wrong)]})
    assert error_of(reply, 400)["param"] == param.replace("0", "1", 1)
    assert client.post("/logging/get_logs", json={"query": ""}).json() == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"query": "x" * 1_001}, "query"),
        ({"query": "\0"}, "query"),
        ({"query": LONE}, "query"),
        ({"query": None}, "query"),
        ({"limit": 0}, "limit"),
        ({"limit": 1_001}, "limit"),
        ({"after_id": -1}, "after_id"),
        ({"after_id": 2**63}, "after_id"),
        ({"filters": "run"}, "filters"),
        ({"filters": {"colour": "red"}}, "filters"),
        ({"filters": {"level": 5}}, "filters.level"),
        ({"filters": {"level": ["info"] * 21}}, "filters.level"),
        ({"filters": {"after": "now"}}, "filters.after"),
        ({"filters": {"job_uuid": "../x"}}, "filters.job_uuid"),
        ({"filters": {"trace_id": "\0"}}, "filters.trace_id"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() if isinstance(value, dict) else "",
)
def test_a_wrong_search_is_400_and_named(client: TestClient, wrong: dict[str, Any], param: str) -> None:
    assert error_of(post(client, "/logging/get_logs", {"query": ""} | wrong), 400)["param"] == param


def test_an_unknown_filter_is_400_with_the_known_ones(client: TestClient) -> None:
    reply = client.post("/logging/get_logs", json={"query": "", "filters": {"colour": "red"}})
    message = error_of(reply, 400)["message"]
    assert "'colour'; allowed: run_id, job_uuid, trace_id, level, after, before" in message


@pytest.mark.parametrize("filters", [{"run_id": "none"}, {"job_uuid": "none"}], ids=str)
def test_an_unknown_run_or_job_of_a_search_is_404(client: TestClient, filters: dict[str, str]) -> None:
    reply = client.post("/logging/get_logs", json={"query": "", "filters": filters})
    assert error_of(reply, 404)["param"] == f"filters.{next(iter(filters))}"


def test_a_query_is_a_text_and_not_a_pattern_or_sql(client: TestClient) -> None:
    texts = ["100%", "a_b", "c\\d", "it's /* fine */", "x'; DROP TABLE logs; --"]
    client.post("/logging/log_messages", json={"logs": [log(message=text) for text in texts]})
    for text in texts:
        found = client.post("/logging/get_logs", json={"query": text}).json()
        assert [entry["message"] for entry in found] == [text]
    assert client.post("/logging/get_logs", json={"query": "%_%"}).json() == []


# Traces


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (event(type="span"), "event"),
        (event(type=None), "event"),
        ({}, "event"),
        ([], "event"),
        (event(value=True), "event.value"),
        (event(value="1"), "event.value"),
        (event(value=float("inf")), "event.value"),
        (event(value=10**400), "event.value"),
        (event(metric="x" * 201), "event.metric"),
        (event(trace_id=""), "event.trace_id"),
        (event(trace_id="x" * 101), "event.trace_id"),
        (event(span_id="\0"), "event.span_id"),
        (event(timestamp="now"), "event.timestamp"),
        (event(attributes={"a": float("nan")}), "event.attributes"),
        (event(message="no"), "event"),
        (event(type="unstructured_log"), "event"),
        (span_event({"type": "span_middle"}), "event.payload"),
        (span_event(None), "event.payload"),
        (span_event({"type": "span_start", "name": ""}), "event.payload.name"),
        (span_event({"type": "span_start"}), "event.payload.name"),
        (span_event({"type": "span_end", "status": "fine"}), "event.payload.status"),
    ],
    ids=lambda value: str(value)[:0],
)
def test_a_wrong_event_is_400_and_named(client: TestClient, wrong: Any, param: str) -> None:
    assert error_of(post(client, "/telemetry/log_event", {"event": wrong}), 400)["param"] == param
    error_of(client.get("/telemetry/get_trace", params={"trace_id": "t-1"}), 404)


def test_an_unknown_type_of_event_is_refused_with_the_known_ones(client: TestClient) -> None:
    message = error_of(client.post("/telemetry/log_event", json={"event": event(type="span")}), 400)["message"]
    assert all(kind in message for kind in ("unstructured_log", "metric", "structured_log"))


@pytest.mark.parametrize("limit", [0, 10_001])
def test_a_wrong_limit_of_a_trace_is_400(client: TestClient, limit: int) -> None:
    reply = client.get("/telemetry/get_trace", params={"trace_id": "t-1", "limit": limit})
    assert error_of(reply, 400)["param"] == "limit"


# Tenants and scopes


def test_tenants_see_their_own_alone_and_need_the_scope_training(client: TestClient, context: Context) -> None:
    def as_(tenant: str, scope: str = "training") -> dict[str, str]:
        return {"authorization": f"Bearer {keys.create(context.store, tenant, 'test', (scope,))[1]}"}

    run_id = samples.add_job(context.store, "job-1", tenant="acme").run_id
    owner, stranger, reader = as_("acme"), as_("rival"), as_("acme", "data")
    sent = {
        "/runs/log_metrics": {"run_id": run_id, "metrics": [metric(run_id)]},
        "/logging/log_messages": {"run_id": run_id, "logs": [log()]},
        "/logging/get_logs": {"query": "", "filters": {"run_id": run_id}},
        "/telemetry/log_event": {"event": event()},
    }
    asked = {"/runs/metrics": {"run_id": run_id}, "/telemetry/get_trace": {"trace_id": "t-1"}}
    for path, body in sent.items():
        assert client.post(path, json=body, headers=owner).status_code == 200
        assert "training" in error_of(client.post(path, json=body, headers=reader), 403)["message"]
        if path != "/telemetry/log_event":
            error_of(client.post(path, json=body, headers=stranger), 404)
    for path, query in asked.items():
        assert client.get(path, params=query, headers=owner).status_code == 200
        error_of(client.get(path, params=query, headers=reader), 403)
        error_of(client.get(path, params=query, headers=stranger), 404)
    assert client.post("/logging/get_logs", json={"query": ""}, headers=stranger).json() == []
    assert len(client.get("/runs/metrics", params={"run_id": run_id}, headers=owner).json()) == 1


# The RFC's own client


async def test_the_rfc_client_tells_a_trace_and_gets_it_back(app: FastAPI) -> None:
    at = dt.datetime(2030, 1, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=1)))
    of_span: dict[str, Any] = {"trace_id": "t-1", "span_id": "s-1"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        telemetry = AsyncLlamaStack(base_url="http://127.0.0.1", http_client=http).telemetry
        start: Any = {"type": "structured_log", "payload": {"type": "span_start", "name": "ask"}, "timestamp": at}
        await telemetry.log(event=of_span | start)
        line: Any = {"type": "unstructured_log", "message": "hello", "severity": "warn", "timestamp": at}
        await telemetry.log(event=of_span | line | {"attributes": {"a": [1, "b", None]}})
        measured: Any = {"type": "metric", "metric": "tokens", "value": 2.5, "unit": "t", "timestamp": at}
        await telemetry.log(event=of_span | measured)
        running = await telemetry.get_trace(trace_id="t-1")
        assert (running.root_span_id, running.start_time, running.end_time) == ("s-1", at, None)
        later = at + dt.timedelta(seconds=1)
        end: Any = {"type": "structured_log", "payload": {"type": "span_end", "status": "ok"}, "timestamp": later}
        await telemetry.log(event=of_span | end)
        trace = await telemetry.get_trace(trace_id="t-1")
        assert (trace.trace_id, trace.root_span_id, trace.start_time, trace.end_time) == ("t-1", "s-1", at, later)
        more: Any = trace.model_dump()
        assert [(span["name"], span["status"]) for span in more["spans"]] == [("ask", "ok")]
        assert [(log["message"], log["level"]) for log in more["logs"]] == [("hello", "warn")]
        assert [(metric["metric"], metric["value"]) for metric in more["metrics"]] == [("tokens", 2.5)]
        with pytest.raises(llama_stack.NotFoundError, match="'t-2'"):
            await telemetry.get_trace(trace_id="t-2")

"""What Prometheus reads: counts that are right, of few series, at little cost."""

import threading
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event, insert, text

from serve_apps import metrics
from serve_apps.metrics import Jobs
from stack import keys
from stack.context import Context
from stack.store import now
from stack.store.schema import jobs
from tests import samples
from tests.api.conftest import HERE, URL, gateway
from tests.api.envelope import error_of
from tests.scripted_engine import ScriptedEngine

CHAT = {"model": "small", "messages": [{"role": "user", "content": "a"}]}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(client: TestClient, **headers: str) -> Samples:
    """All samples, by name and labels."""
    reply = client.get("/metrics", headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(reply.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def requests(samples: Samples) -> dict[tuple[str, str, str], float]:
    """How many requests there were, by method, route and status."""
    counts = {}
    for (name, labels), count in samples.items():
        if name == "stack_http_requests_total":
            by_name = dict(labels)
            counts[by_name["method"], by_name["route"], by_name["status"]] = count
    return counts


def test_requests_are_counted_by_route_method_and_status(client: TestClient, engine: ScriptedEngine) -> None:
    for _ in range(3):
        client.get("/v1/models")
    client.get("/v1/models/small")
    client.get("/v1/models/none")
    client.post("/datasets/create", json={})
    client.delete("/health")
    engine.fail(RuntimeError("broken"))
    client.post("/v1/chat/completions", json=CHAT)
    assert requests(scraped(client)) == {
        ("GET", "/v1/models", "200"): 3,
        ("GET", "/v1/models/{model:path}", "200"): 1,
        ("GET", "/v1/models/{model:path}", "404"): 1,
        ("POST", "/datasets/create", "400"): 1,
        ("DELETE", "/health", "405"): 1,
        ("POST", "/v1/chat/completions", "500"): 1,
    }


def test_what_clients_invent_makes_no_series(client: TestClient) -> None:
    for number in range(50):
        client.get(f"/nowhere/{number}")
        client.request(f"M{number}", "/v1/models")
        client.get(f"/v1/models/{number}")
    counts = requests(scraped(client))
    assert counts == {
        ("GET", "unknown", "404"): 50,
        ("other", "/v1/models", "405"): 50,
        ("GET", "/v1/models/{model:path}", "404"): 50,
    }


def test_refused_requests_are_counted(client: TestClient, context: Context) -> None:
    key = keys.create(context.store, "acme", "n", ["admin"])[1]
    error_of(client.get("/v1/models"), 401)
    assert requests(scraped(client, authorization=f"Bearer {key}")) == {("GET", "unknown", "401"): 1}


def test_times_are_measured_to_the_end_of_a_stream(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1_000, 3))
    monkeypatch.setattr(metrics, "perf_counter", lambda: float(next(seconds)))
    client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    taken = scraped(client)
    route = {"route": "/v1/chat/completions"}
    assert value(taken, "stack_http_request_seconds_count", **route) == 1
    assert value(taken, "stack_http_request_seconds_sum", **route) == 3
    assert value(taken, "stack_http_request_seconds_bucket", le="2.5", **route) == 0
    assert value(taken, "stack_http_request_seconds_bucket", le="5.0", **route) == 1


def test_requests_under_way_are_shown(client: TestClient) -> None:
    assert value(scraped(client), "stack_http_requests_under_way") == 1
    assert value(scraped(client), "stack_http_requests_under_way") == 1, "none is left over"


def test_jobs_and_attempts_of_all_tenants_are_counted(client: TestClient, context: Context) -> None:
    store = context.store
    for tenant in ("default", "acme"):
        for number in range(2):
            samples.add_job(store, f"job-{number}", "evaluate", tenant)
        samples.start(store, "job-0", tenant)
    samples.fail(store, "job-0", "broken")
    samples.add_job(store, "tune", "supervised_fine_tune", "acme")
    lost = samples.start(store, "job-1")
    store.jobs.lose_attempt(lost.id, 1, "the node is gone")
    counted = scraped(client)
    jobs = {tuple(sorted(labels)): count for (name, labels), count in counted.items() if name == "stack_jobs"}
    assert {tuple(value for _, value in labels): count for labels, count in jobs.items()} == {
        ("evaluate", "failed", "default"): 1,
        ("evaluate", "scheduled", "default"): 1,
        ("evaluate", "running", "acme"): 1,
        ("evaluate", "scheduled", "acme"): 1,
        ("supervised_fine_tune", "scheduled", "acme"): 1,
    }
    attempts = {
        status: value(counted, "stack_job_attempts", status=status) for status in ("under way", "lost", "ended")
    }
    assert attempts == {"under way": 1, "lost": 1, "ended": 1}


def test_the_process_is_measured(client: TestClient) -> None:
    assert value(scraped(client), "process_resident_memory_bytes") > 2**20


def test_jobs_are_counted_no_more_often_than_every_few_seconds(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 100.0
    monkeypatch.setattr(metrics, "monotonic", lambda: seconds)
    statements: list[str] = []
    event.listen(context.store.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    jobs = Jobs(context.store, ttl=5)
    assert statements == [], "not when it is made"
    threads = [threading.Thread(target=jobs.collect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = len(statements)
    assert asked == 2
    seconds += 4.9
    jobs.collect()
    assert len(statements) == asked
    seconds += 0.2
    jobs.collect()
    assert len(statements) == 2 * asked


def test_jobs_are_counted_without_a_look_at_their_rows(context: Context) -> None:
    # So many, with requests as large as real ones, that the database itself finds the index the cheapest by far.
    one = samples.add_job(context.store, "job-0")
    request = {"dataset": "rows" * 250}
    same = dict(tenant="default", kind="evaluate", request=request, priority=0, bundles=[], run_id=one.run_id)
    rows = [same | {"uuid": f"job-{n}", "status": "completed", "scheduled_at": now()} for n in range(1, 5_000)]
    postgresql = context.store.engine.dialect.name == "postgresql"
    with context.store.engine.begin() as connection:
        if postgresql:  # the tests' server does not, and VACUUM passes over what is not written yet
            connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
        connection.execute(insert(jobs), rows)
    statements: list[Any] = []
    event.listen(context.store.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    assert sum(context.store.jobs.counts().values()) == 5_000
    with context.store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if postgresql:
            connection.exec_driver_sql("VACUUM (ANALYZE) jobs")
            words, command = "Index Only Scan using jobs_by_", "EXPLAIN"
        else:
            words, command = "COVERING INDEX", "EXPLAIN QUERY PLAN"
        plan = connection.execute(text(f"{command} {statements[0]}")).all()
    assert words in str(plan), plan


def test_applications_count_for_themselves(client: TestClient, context: Context) -> None:
    client.get("/v1/models")
    with TestClient(gateway.create_app(replace(context), nothing), client=HERE, base_url=URL) as other:
        assert requests(scraped(other)) == {}


async def nothing() -> dict[str, str]:
    return {}


def test_a_database_that_does_not_answer_is_an_error(client: TestClient, context: Context) -> None:
    client.get("/v1/models")
    with context.store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO gone")
    error_of(client.get("/metrics"), 500)
    error_of(client.get("/metrics"), 500)

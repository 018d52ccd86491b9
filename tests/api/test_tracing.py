"""One trace from a request to the job that it makes."""

from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace

from stack import tracing
from stack.context import Context
from tests.api.conftest import HERE, URL, gateway
from tests.api.envelope import error_of
from tests.otlp import Receiver, Span, receiver
from tests.samples import evaluation
from tests.scripted_engine import ScriptedEngine

TRACE = "0af7651916cd43dd8448eb211c80319c"
FROM_OUTSIDE = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
CHAT = {"model": "small", "messages": [{"role": "user", "content": "a"}]}


async def ready() -> dict[str, str]:
    return {}


@pytest.fixture
def traces() -> Iterator[Receiver]:
    with receiver() as server:
        tracing.start("gateway", server.address)
        yield server
        tracing.stop()


@pytest.fixture
def traced(context: Context, traces: Receiver) -> Iterator[TestClient]:
    """A client of a gateway that sends traces."""
    config = context.config.model_copy(update={"otlp_address": traces.address})
    app = gateway.create_app(replace(context, config=config), ready)
    with TestClient(app, raise_server_exceptions=False, client=HERE, base_url=URL) as client:
        yield client


def sent(traces: Receiver) -> dict[str, Span]:
    """The spans of a test by name, once it has made all of them."""
    tracing.stop()
    return {span.name: span for span in traces.spans}


def test_a_request_is_a_span(traced: TestClient, traces: Receiver) -> None:
    reply = traced.get("/v1/models/small", headers=FROM_OUTSIDE)
    span = sent(traces)["GET /v1/models/{model:path}"]
    assert (span.trace_id, span.parent_span_id) == (TRACE, "b7ad6b7169203331")
    assert span.attributes == {
        "http.request.method": "GET",
        "http.route": "/v1/models/{model:path}",
        "http.response.status_code": 200,
        "url.path": "/v1/models/small",
        "request_id": reply.headers["x-request-id"],
        "tenant": "default",
    }
    assert reply.headers["x-trace-id"] == TRACE


def test_a_request_without_a_trace_begins_one(traced: TestClient, traces: Receiver) -> None:
    reply = traced.get("/v1/models")
    span = sent(traces)["GET /v1/models"]
    assert span.parent_span_id == ""
    assert reply.headers["x-trace-id"] == span.trace_id != TRACE


def test_the_row_of_a_job_leads_back_to_its_request(
    traced: TestClient, traces: Receiver, context: Context, data: dict[str, Any]
) -> None:
    body = evaluation(data)
    assert traced.post("/evaluate/question_answering/", json=body, headers=FROM_OUTSIDE).status_code == 200
    job = context.store.jobs.get("default", body["job_uuid"])
    assert job is not None
    span = sent(traces)["POST /evaluate/question_answering/"]
    assert job.trace == f"00-{TRACE}-{span.span_id}-01"
    (waiting,) = context.store.jobs.waiting()
    assert waiting.trace == job.trace


@pytest.mark.parametrize("path", ["/inference/chat_completion", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_models_answer_is_a_span_below_its_request(
    traced: TestClient, traces: Receiver, path: str, stream: bool
) -> None:
    assert traced.post(path, json=CHAT | {"stream": stream}, headers=FROM_OUTSIDE).status_code == 200
    spans = sent(traces)
    request, model = spans[f"POST {path}"], spans["model"]
    assert (model.trace_id, model.parent_span_id) == (TRACE, request.span_id)
    assert model.attributes == {"model": "small", "endpoint": "chat"}


def test_the_span_of_a_stream_ends_with_the_stream(
    traced: TestClient, traces: Receiver, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, under_way = engine.generate, []

    async def watched(*question: Any) -> AsyncGenerator[bytes]:
        async for item in generate(*question):
            under_way.append((tracing.traceparent(), trace.get_current_span().is_recording()))
            yield item

    monkeypatch.setattr(engine, "generate", watched)
    reply = traced.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=FROM_OUTSIDE)
    assert reply.text.endswith("[DONE]\n\n")
    span = sent(traces)["POST /v1/chat/completions"]
    assert set(under_way) == {(f"00-{TRACE}-{span.span_id}-01", True)}
    assert len(under_way) > 3


def test_refused_and_failed_requests_are_spans_too(
    traced: TestClient, traces: Receiver, engine: ScriptedEngine
) -> None:
    engine.fail(RuntimeError("secret"))
    error_of(traced.post("/v1/chat/completions", json=CHAT), 500)
    error_of(traced.get("/nowhere"), 404)
    spans = sent(traces)
    assert spans["POST /v1/chat/completions"].attributes["http.response.status_code"] == 500
    assert spans["GET unknown"].attributes["http.response.status_code"] == 404


def test_without_an_address_answers_name_no_trace(client: TestClient) -> None:
    reply = client.get("/v1/models", headers=FROM_OUTSIDE)
    assert "x-trace-id" not in reply.headers


def test_a_receiver_that_is_away_fails_no_request(context: Context) -> None:
    config = context.config.model_copy(update={"otlp_address": "http://127.0.0.1:1"})
    tracing.start("gateway", config.otlp_address)
    try:
        with TestClient(
            gateway.create_app(replace(context, config=config), ready), client=HERE, base_url=URL
        ) as client:
            assert {client.get("/v1/models").status_code for _ in range(20)} == {200}
    finally:
        tracing.stop()

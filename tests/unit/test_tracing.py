"""Traces: what arrives at a receiver, from several processes, and what happens when there is none."""

import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from stack import jobs, tracing
from stack.api.wire import Request
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput
from tests.conftest import CONFIG
from tests.otlp import Receiver, receiver
from tests.running_stack import wait_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
# What a driver does, in a process of its own: the row of its job names the span above it.
DRIVER = """
import sys
from stack import tracing
tracing.start("job", sys.argv[1])
with tracing.span("job", parent=sys.argv[2], kind="evaluate", job_uuid="job-1", attempt=1):
    pass
if sys.argv[3] == "stop":
    tracing.stop()
"""


@pytest.fixture
def traces() -> Iterator[Receiver]:
    with receiver() as server:
        yield server
        tracing.stop()


def test_without_an_address_nothing_is_traced() -> None:
    tracing.start("gateway", None)
    assert not tracing.is_on()
    with tracing.span("a", parent=PARENT, size=1) as span, tracing.leaf("b"):
        assert tracing.traceparent() is None
        assert not span.is_recording()
    tracing.stop()


def test_spans_within_each_other_are_one_trace(traces: Receiver) -> None:
    tracing.start("gateway", traces.address)
    with tracing.span("outer", tenant="acme"), tracing.span("inner"), tracing.leaf("leaf"), tracing.span("beside"):
        pass
    tracing.stop()
    spans = {span.name: span for span in traces.spans}
    assert {span.trace_id for span in spans.values()} == {spans["outer"].trace_id}
    above = {span.span_id: span.name for span in spans.values()}
    parents = {name: above.get(span.parent_span_id, "") for name, span in spans.items()}
    assert parents == {"outer": "", "inner": "outer", "leaf": "inner", "beside": "inner"}
    assert spans["outer"].attributes == {"tenant": "acme"}
    assert {span.service for span in spans.values()} == {"gateway"}


def test_a_trace_goes_on_from_another_processs(traces: Receiver) -> None:
    tracing.start("gateway", traces.address)
    with tracing.span("request", parent=PARENT):
        inner = tracing.traceparent()
    tracing.stop()
    (span,) = traces.spans
    assert (span.trace_id, span.parent_span_id) == (TRACE, "b7ad6b7169203331")
    assert inner == f"00-{TRACE}-{span.span_id}-01"


@pytest.mark.parametrize("end", ["stop", "exit"])
def test_a_job_goes_on_with_the_trace_of_its_request(context: Context, traces: Receiver, end: str) -> None:
    tracing.start("gateway", traces.address)
    with tracing.span("POST /evaluate", parent=PARENT):
        job = jobs.submit(context, jobs.EVALUATE, "job-1", Request())
    tracing.stop()
    assert job.trace is not None
    row = context.store.jobs.get("default", "job-1")
    assert row is not None
    assert row.trace == job.trace
    subprocess.run([sys.executable, "-c", DRIVER, traces.address, job.trace, end], check=True, env=dict(os.environ))
    spans = {span.service: span for span in traces.spans}
    assert {span.trace_id for span in spans.values()} == {TRACE}
    assert spans["job"].parent_span_id == spans["gateway"].span_id
    assert spans["job"].attributes == {"kind": "evaluate", "job_uuid": "job-1", "attempt": 1}


@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-01", f"00-{'0' * 32}-b7ad6b7169203331-01", "ä" * 10_000])
def test_a_parent_that_is_none_begins_a_trace(traces: Receiver, parent: str) -> None:
    tracing.start("gateway", traces.address)
    with tracing.span("request", parent=parent):
        pass
    tracing.stop()
    (span,) = traces.spans
    assert span.parent_span_id == ""
    assert re.fullmatch(r"[0-9a-f]{32}", span.trace_id)


def test_a_trace_that_its_caller_does_not_want_is_not_sent(traces: Receiver) -> None:
    tracing.start("gateway", traces.address)
    with tracing.span("request", parent=PARENT.removesuffix("01") + "00"):
        pass
    tracing.stop()
    assert traces.spans == []


def test_a_process_starts_once(traces: Receiver) -> None:
    tracing.start("gateway", traces.address)
    tracing.start("other", "http://127.0.0.1:1")
    with tracing.span("a"):
        pass
    tracing.stop()
    assert [span.service for span in traces.spans] == ["gateway"]


@pytest.mark.parametrize("end", ["", "/", "/v1/traces", "/v1/traces/"])
def test_an_address_may_have_the_path_or_not(traces: Receiver, end: str) -> None:
    tracing.start("gateway", traces.address + end)
    with tracing.span("a"):
        pass
    tracing.stop()
    assert len(traces.spans) == 1


def test_spans_arrive_without_a_stop(traces: Receiver) -> None:
    tracing.start("gateway", traces.address)
    with tracing.span("a"):
        pass
    wait_for(lambda: traces.spans, 30)


def test_an_error_ends_its_spans_and_keeps_its_words_to_itself(traces: Receiver) -> None:
    tracing.start("gateway", traces.address)
    with pytest.raises(BadInput), tracing.span("a"), tracing.leaf("b"):
        raise BadInput("what a user sent")
    tracing.stop()
    assert {span.name for span in traces.spans} == {"a", "b"}


def test_a_receiver_that_is_away_costs_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tracing.start("gateway", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    for _ in range(5_000):  # more than are kept for sending
        with tracing.span("a"):
            pass
    assert time.monotonic() - started < 5, "spans wait for nothing"
    wait_for(lambda: caplog.messages, 60)
    tracing.stop()
    assert len(caplog.messages) == 1, caplog.messages[:5]
    assert f"traces are dropped, as they cannot be sent to http://127.0.0.1:{port}/v1/traces" in caplog.messages[0]


def test_a_receiver_that_refuses_costs_one_line_in_the_log(traces: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tracing.start("gateway", traces.address + "/elsewhere")
    for _ in range(3):
        with tracing.span("a"):
            pass
    tracing.stop()
    assert len(caplog.messages) == 1, caplog.messages


@pytest.mark.parametrize("address", ["collector:4318", "grpc://collector", "", "http://", "http://a b"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="otlp_address"):
        Config.parse(CONFIG | {"otlp_address": address}, "test")

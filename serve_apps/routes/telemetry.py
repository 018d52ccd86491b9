"""Metrics of runs, logs, and traces. The specification's lists of JSON lines are JSON arrays here."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from serve_apps.routes.common import ContextOf, needs
from stack import telemetry
from stack.api.telemetry import (
    MAX_POINTS,
    MAX_STEP,
    LogEntry,
    LogEventRequest,
    LogMessagesRequest,
    LogMetricsRequest,
    LogSearchRequest,
    MetricEntry,
    Name,
    Trace,
)

router = APIRouter(tags=["telemetry"], dependencies=[needs("training")])
Step = Annotated[int | None, Query(ge=0, le=MAX_STEP)]


@router.post("/runs/log_metrics", response_class=Response)
def log_metrics(context: ContextOf, body: LogMetricsRequest) -> None:
    """Adds values of metrics to a run: all of them, or none."""
    telemetry.log_metrics(context, body)


@router.get("/runs/metrics")
def metrics(
    context: ContextOf,
    run_id: Annotated[str, Query(max_length=100)],
    name: Annotated[Name | None, Query(description="only the metric of this name")] = None,
    from_step: Step = None,
    to_step: Step = None,
    max_points: Annotated[int, Query(ge=2, le=MAX_POINTS)] = MAX_POINTS,
) -> list[MetricEntry]:
    """The values of a run's metrics, in the order of their steps.

    All of them, if they are at most `max_points`. Otherwise metrics with few values keep all of them, and each of the
    others keeps an equal share, evenly spaced by the number of its values, with its first and its last.
    """
    return telemetry.metrics(context, run_id, name, from_step, to_step, max_points)


@router.post("/logging/log_messages", response_class=Response)
def log_messages(context: ContextOf, body: LogMessagesRequest) -> None:
    """Adds messages to the logs, and to the log of a run if one is given."""
    telemetry.log_messages(context, body)


@router.post("/logging/get_logs")
def get_logs(context: ContextOf, body: LogSearchRequest) -> list[LogEntry]:
    """The logs that hold a text and fit the filters: what arrived last comes first. An empty text is in all of them."""
    return telemetry.get_logs(context, body)


@router.post("/telemetry/log_event", response_class=Response)
def log_event(context: ContextOf, body: LogEventRequest) -> None:
    """Keeps an event of a trace: a message, a metric, or the start or end of a span."""
    telemetry.log_event(context, body.event)


@router.get("/telemetry/get_trace", response_model_exclude_none=True)
def get_trace(
    context: ContextOf,
    trace_id: Annotated[str, Query(max_length=100)],
    limit: Annotated[int, Query(ge=1, le=1_000, description="of spans, logs and metrics, each")] = 1_000,
) -> Trace:
    """A trace: its root span, and the spans, logs and metrics that it is made of."""
    return telemetry.get_trace(context, trace_id, limit)

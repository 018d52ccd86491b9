"""Telemetry: metrics of runs, logs and their search, and traces, which are told event by event."""

from typing import Any

from stack.api.telemetry import (
    Event,
    LogEntry,
    LogFilters,
    LogMessagesRequest,
    LogMetricsRequest,
    LogSearchRequest,
    MetricEntry,
    MetricEvent,
    SpanStartPayload,
    StructuredLogEvent,
    Trace,
    TraceMetric,
    TraceSpan,
)
from stack.context import Context
from stack.errors import BadInput, NotFound
from stack.store.telemetry import Log, Message, Metric
from stack.store.traces import UNNAMED, Span

MAX_NAMES = 1_000
# The level of a metric of a trace, which is kept among the logs: no message of a trace can have it.
METRIC = "metric"


def log_metrics(context: Context, request: LogMetricsRequest) -> None:
    """Adds values of metrics to a run: all of them, or none.

    Raises NotFound for an unknown run, and BadInput for a metric of another run or more than MAX_NAMES names in a run.
    """
    require_run(context, request.run_id, "run_id")
    for number, metric in enumerate(request.metrics):
        if metric.run_id != request.run_id:
            raise BadInput(
                f"the metric {metric.name!r} is of the run {metric.run_id!r}, not of the request's {request.run_id!r}",
                param=f"metrics.{number}.run_id",
            )
    context.store.telemetry.add_after(context.tenant, request.run_id, lambda last: _points(request, last))


def metrics(
    context: Context, run_id: str, name: str | None, from_step: int | None, to_step: int | None, max_points: int
) -> list[MetricEntry]:
    """The values of a run's metrics, in the order of their steps, thinned out where there are more than `max_points`.

    Names with few values keep all of them. Each of the others keeps an equal share, evenly spaced by the number of its
    values, with its first and its last. Raises NotFound, and BadInput where not even those two have room.
    """
    require_run(context, run_id, "run_id")
    found = context.store.telemetry.metrics(context.tenant, run_id, name, from_step, to_step, max_points)
    if len(found) > max_points:
        names = len({metric.name for metric in found})
        message = f"{max_points} are too few for {names} metrics; allowed: from {2 * names}, or name one metric"
        raise BadInput(message, param="max_points")
    return [MetricEntry(**vars(metric)) for metric in found]


def log_messages(context: Context, request: LogMessagesRequest) -> None:
    """Adds messages to the tenant's logs, and to that of a run if one is given. Raises NotFound."""
    if request.run_id is not None:
        require_run(context, request.run_id, "run_id")
    messages = [Message(log.timestamp, log.level, log.message, log.additional_info) for log in request.logs]
    context.store.telemetry.add_messages(context.tenant, messages, request.run_id)


def get_logs(context: Context, request: LogSearchRequest) -> list[LogEntry]:
    """The logs that fit, newest first. Raises NotFound for an unknown run or job."""
    filters = request.filters or LogFilters()
    of: dict[str, str] = {}
    if filters.run_id is not None:
        of["run_id"] = require_run(context, filters.run_id, "filters.run_id")
    if filters.job_uuid is not None:
        job = context.store.jobs.get(context.tenant, filters.job_uuid)
        if job is None:
            raise NotFound(f"there is no job {filters.job_uuid!r}", param="filters.job_uuid")
        if of.setdefault("run_id", job.run_id) != job.run_id:
            return []
    if filters.trace_id is not None:
        of["trace_id"] = filters.trace_id
    levels = [filters.level] if isinstance(filters.level, str) else filters.level
    found = context.store.telemetry.search_logs(
        context.tenant,
        request.query,
        of=of,
        levels=None if levels is None else [level.lower() for level in levels],
        since=filters.after,
        until=filters.before,
        before_id=request.after_id,
        limit=request.limit,
    )
    return [_entry(log) for log in found]


def log_event(context: Context, event: Event) -> None:
    """Keeps an event of a trace.

    Events come in any order, and some of them twice, as clients send again what they have had no answer to: the first
    start and the first end of a span stand. Others that say something else are kept as warnings in the trace's logs.
    """
    if isinstance(event, StructuredLogEvent):
        _log_span(context, event)
    elif isinstance(event, MetricEvent):
        text = f"{event.metric} = {event.value} {event.unit}".rstrip()
        info = dict(metric=event.metric, value=event.value, unit=event.unit)
        _log(context, event, METRIC, text, info)
    else:
        _log(context, event, event.severity, event.message, {})


def get_trace(context: Context, trace_id: str, limit: int) -> Trace:
    """A trace, with at most `limit` of its spans, its logs and its metrics each. Raises NotFound."""
    if "\0" in trace_id:  # PostgreSQL would not even look for it
        raise _no_trace(trace_id)
    store, tenant = context.store, context.tenant
    root = store.traces.root(tenant, trace_id)
    logs = store.telemetry.logs_of_trace(tenant, trace_id, limit + 1, without=METRIC)
    metrics = store.telemetry.logs_of_trace(tenant, trace_id, limit + 1, only=METRIC)
    first = min(logs[:1] + metrics[:1], key=lambda log: log.id, default=None)
    spans = store.traces.spans(tenant, trace_id, limit + 1)
    parts = (("spans", spans), ("logs", logs), ("metrics", metrics))
    return Trace(
        trace_id=trace_id,
        **_head(trace_id, root, first),
        spans=[_span(span) for span in spans[:limit]],
        logs=[_entry(log) for log in logs[:limit]],
        metrics=[TraceMetric(timestamp=log.timestamp, **log.additional_info) for log in metrics[:limit]],
        cut=[name for name, found in parts if len(found) > limit],
    )


def require_run(context: Context, run_id: str, field: str) -> str:
    """The id of a run of the tenant. Raises NotFound, naming the field of the request."""
    if context.store.telemetry.run(context.tenant, run_id) is None:
        raise NotFound(f"there is no run {run_id!r}", param=field)
    return run_id


def _points(request: LogMetricsRequest, last: dict[str, int]) -> list[Metric]:
    """The metrics of a request, with a step each. `last` are the greatest steps so far, and then those with these."""
    new = {metric.name for metric in request.metrics} - set(last)
    if new and len(last) + len(new) > MAX_NAMES:
        message = f"the run has {len(last)} names of metrics, and {len(new)} would be new; allowed: {MAX_NAMES}"
        raise BadInput(message, param="metrics")
    points = []
    for metric in request.metrics:
        step = last.get(metric.name, -1) + 1 if metric.step is None else metric.step
        last[metric.name] = max(step, last.get(metric.name, step))
        points.append(Metric(request.run_id, metric.name, step, metric.value, metric.timestamp))
    return points


def _head(trace_id: str, root: Span | None, first: Log | None) -> dict[str, Any]:
    """The id and the times of a trace's root span, or of its first event where no span is known."""
    if root is not None:
        return dict(root_span_id=root.span_id, start_time=root.started_at, end_time=root.ended_at)
    if first is not None:
        return dict(root_span_id=first.additional_info["span_id"], start_time=first.timestamp)
    raise _no_trace(trace_id)


def _no_trace(trace_id: str) -> NotFound:
    return NotFound(f"there is no trace {trace_id!r}", param="trace_id")


def _log_span(context: Context, event: StructuredLogEvent) -> None:
    of, payload, traces = (context.tenant, event.trace_id, event.span_id), event.payload, context.store.traces
    if isinstance(payload, SpanStartPayload):
        known = traces.start_span(*of, payload.name, event.timestamp, payload.parent_span_id, event.attributes)
        same = known is not None and (known.name, known.started_at, known.parent_span_id) == (
            payload.name,
            event.timestamp,
            payload.parent_span_id,
        )
        what = f"the span {event.span_id!r} was started again, as {payload.name!r}"
    else:
        known = traces.end_span(*of, event.timestamp, payload.status, event.attributes)
        same = known is not None and (known.status, known.ended_at) == (payload.status, event.timestamp)
        what = f"the span {event.span_id!r} was ended again, with the status {payload.status!r}"
    if known is None or (same and known.attributes | event.attributes == known.attributes):
        return
    _log(context, event, "warn", what, {"event": payload.model_dump()})


def _log(context: Context, event: Event, level: str, text: str, info: dict[str, Any]) -> None:
    info = info | {"span_id": event.span_id, "attributes": event.attributes}
    message = Message(event.timestamp, level, text, info)
    context.store.telemetry.add_messages(context.tenant, [message], trace_id=event.trace_id)


def _entry(log: Log) -> LogEntry:
    return LogEntry(**vars(log))


def _span(span: Span) -> TraceSpan:
    return TraceSpan(
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        name=None if span.name == UNNAMED else span.name,
        start_time=span.started_at,
        end_time=span.ended_at,
        status=span.status,
        attributes=span.attributes,
    )

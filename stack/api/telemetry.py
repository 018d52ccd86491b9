"""Wire types of telemetry: metrics of runs, logs, and the events of traces.

Times are ISO 8601; one without a zone is in UTC. They are kept, and answered, in UTC with milliseconds.

Texts have no NUL character, which PostgreSQL does not take: it is refused. Numbers are finite, as JSON has no others.
"""

import datetime as dt
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from stack.api.wire import Id, Info, Request, Wire, at_most, without_nul

MAX_METRICS = 10_000
MAX_LOGS = 10_000
MAX_POINTS = 10_000
MAX_STEP = 2**53  # the greatest number that JSON's readers agree on
MAX_VALUE_CHARACTERS = 1_000


def _utc(value: str) -> str:
    try:
        time = dt.datetime.fromisoformat(value)
        zoned = time if time.tzinfo else time.replace(tzinfo=dt.UTC)
        return zoned.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{value!r} is no time; allowed: ISO 8601, as in 2030-01-31T12:00:00Z") from error


def _metric_value(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("is an integer of more than 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"is {value}, which JSON cannot hold; leave such a point out")
    elif not isinstance(value, str):
        raise ValueError("is to be a number, a text, true or false")
    elif len(without_nul(value)) > MAX_VALUE_CHARACTERS:
        raise ValueError(f"has {len(value)} characters; allowed: at most {MAX_VALUE_CHARACTERS}")
    elif not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds half of a character")
    return value


Time = Annotated[
    str,
    Field(max_length=40, json_schema_extra={"format": "date-time"}),
    AfterValidator(without_nul),
    AfterValidator(_utc),
]
RunId = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(without_nul)]
TraceId = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(without_nul)]
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(without_nul)]
Level = Annotated[str, Field(min_length=1, max_length=20), AfterValidator(without_nul)]
Text = Annotated[str, Field(max_length=16_384), AfterValidator(without_nul)]
MetricValue = Annotated[float | int | str | bool, BeforeValidator(_metric_value)]
Step = Annotated[int, Field(ge=0, le=MAX_STEP)]


class Metric(Wire):
    """A value of a metric of a run.

    Without a step, an addition to the specification, it gets the number after the greatest step that this metric has
    in this run so far: 0, 1, 2 and so on for those that never give one.
    """

    name: Name
    value: MetricValue
    timestamp: Time
    run_id: RunId
    step: Step | None = None


class LogMetricsRequest(Request):
    run_id: RunId
    metrics: Annotated[list[Metric], at_most(MAX_METRICS)]


class MetricEntry(Wire):
    """A metric as it is kept."""

    name: str
    value: float | int | str | bool
    timestamp: str
    run_id: str
    step: int


class Log(Wire):
    """A message. Any level will do; the usual ones are debug, info, warning and error."""

    message: Text
    level: Level
    timestamp: Time
    additional_info: Info = {}


class LogMessagesRequest(Request):
    logs: Annotated[list[Log], at_most(MAX_LOGS)]
    run_id: RunId | None = None


class LogFilters(Wire):
    """What logs to find: those that fit all that is given. `after` is a time at or before them, `before` one behind.

    `level` is one or several, in upper or lower case. The log of a job is that of its run.
    """

    run_id: RunId | None = None
    job_uuid: Id | None = None
    trace_id: TraceId | None = None
    level: Level | Annotated[list[Level], at_most(20)] | None = None
    after: Time | None = None
    before: Time | None = None


class LogSearchRequest(Request):
    """What to look for: a text in the message, in upper or lower case, and filters.

    `limit` and `after_id` are additions to the specification: to go on, ask again with the `id` of the last log that
    was answered as `after_id`.
    """

    query: Annotated[str, Field(max_length=1_000), AfterValidator(without_nul)]
    filters: LogFilters | None = None
    limit: Annotated[int, Field(ge=1, le=1_000)] = 100
    after_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class LogEntry(Wire):
    """A log as it is kept. Ids rise in the order in which logs arrived."""

    id: int
    message: str
    level: str
    timestamp: str
    additional_info: dict[str, Any]
    run_id: str | None = None
    trace_id: str | None = None


# The events of traces, as the RFC's own client sends them


class UnstructuredLogEvent(Wire):
    """A message within a span."""

    type: Literal["unstructured_log"]
    trace_id: TraceId
    span_id: TraceId
    timestamp: Time
    message: Text
    severity: Literal["verbose", "debug", "info", "warn", "error", "critical"]
    attributes: Info = {}


class MetricEvent(Wire):
    """A number that was measured within a span."""

    type: Literal["metric"]
    trace_id: TraceId
    span_id: TraceId
    timestamp: Time
    metric: Name
    value: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    unit: Annotated[str, Field(max_length=100), AfterValidator(without_nul)]
    attributes: Info = {}


class SpanStartPayload(Wire):
    type: Literal["span_start"]
    name: Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(without_nul)]
    parent_span_id: TraceId | None = None


class SpanEndPayload(Wire):
    type: Literal["span_end"]
    status: Literal["ok", "error"]


def _type_of(value: Any) -> str:
    """The tag of a member of a union, in brackets, which a validation error's place is told without."""
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"[{kind}]"


class StructuredLogEvent(Wire):
    """The start or the end of a span."""

    type: Literal["structured_log"]
    trace_id: TraceId
    span_id: TraceId
    timestamp: Time
    payload: Annotated[
        Annotated[SpanStartPayload, Tag("[span_start]")] | Annotated[SpanEndPayload, Tag("[span_end]")],
        Discriminator(
            _type_of,
            custom_error_type="payload_type",
            custom_error_message="its type is to be span_start or span_end",
        ),
    ]
    attributes: Info = {}


Event = Annotated[
    Annotated[UnstructuredLogEvent, Tag("[unstructured_log]")]
    | Annotated[MetricEvent, Tag("[metric]")]
    | Annotated[StructuredLogEvent, Tag("[structured_log]")],
    Discriminator(
        _type_of,
        custom_error_type="event_type",
        custom_error_message="its type is to be unstructured_log, metric or structured_log",
    ),
]


class LogEventRequest(Request):
    event: Event


class TraceSpan(Wire):
    """A span of a trace. One whose end alone has been told has no name, and its end for its start."""

    span_id: str
    parent_span_id: str | None = None
    name: str | None = None
    start_time: str
    end_time: str | None = None
    status: str | None = None
    attributes: dict[str, Any]


class TraceMetric(Wire):
    metric: str
    value: float
    unit: str
    timestamp: str
    span_id: str
    attributes: dict[str, Any]


class Trace(Wire):
    """A trace: its root span's id and times, and, beyond what the RFC's client reads, all that it is made of.

    The root is the first span without a parent, or the first span where all have one; a trace that has no span at all
    has the id and the time of its first event. Spans come in the order of their starts, logs and metrics in that of
    their arrival. `cut` names those of the three lists that are not whole.
    """

    trace_id: str
    root_span_id: str
    start_time: str
    end_time: str | None = None
    spans: list[TraceSpan]
    logs: list[LogEntry]
    metrics: list[TraceMetric]
    cut: list[Literal["spans", "logs", "metrics"]] = []

"""Traces by OpenTelemetry, sent in batches by OTLP over HTTP where the configuration has an address for them.

A trace begins with a request at the gateway, or goes on from the one in its `traceparent` (W3C Trace Context), and
goes on in the job that the request made: the job's row keeps the `traceparent` for the supervisor and the driver.
Each process calls `start` once; where that had no address, spans cost next to nothing. What cannot be sent is dropped:
no request waits for it, none fails. OpenTelemetry's own environment variables (OTEL_EXPORTER_OTLP_HEADERS,
OTEL_TRACES_SAMPLER, …) hold too.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_NAMESPACE, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

logger = logging.getLogger("ray.serve")

PATH = "/v1/traces"
TIMEOUT_S = 3.0
DELAY_S = 1.0
_W3C = TraceContextTextMapPropagator()
# The provider of this process, once it has started.
_started: list[TracerProvider] = []


def start(service: str, address: str | None) -> None:
    """Starts to send this process's spans, as those of a service, to an OTLP receiver; without an address, nothing.

    `address` is the receiver's, with or without /v1/traces at its end.
    """
    if address is None or _started:
        return
    # It takes a quarter of a second, which only those who want traces should pay.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    # They log every batch that cannot be sent, and every span for which there is no room.
    for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    url = address.rstrip("/").removesuffix(PATH) + PATH
    provider = TracerProvider(resource=Resource.create({SERVICE_NAMESPACE: "llama-stack-ray", SERVICE_NAME: service}))
    exporter = _LogOnce(OTLPSpanExporter(url, timeout=TIMEOUT_S), url)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=DELAY_S * 1_000))
    _started.append(provider)


def stop() -> None:
    """Sends what is not sent yet, for some seconds at most."""
    while _started:
        _started.pop().shutdown()


def is_on() -> bool:
    return bool(_started)


def traceparent() -> str | None:
    """The span under way as a W3C `traceparent`, by which another process goes on with its trace."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def span(
    name: str, parent: str | None = None, span_kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int
) -> Iterator[Span]:
    """A span around what is done within, below `parent` (a `traceparent`) or else the span under way."""
    if not _started:
        yield INVALID_SPAN
        return
    with _begun(name, parent, span_kind, attributes) as begun:
        token = context.attach(trace.set_span_in_context(begun))
        try:
            yield begun
        finally:
            context.detach(token)


@contextmanager
def leaf(name: str, **attributes: str | int) -> Iterator[Span]:
    """A span that none goes below: for generators, whose steps need not all run in the same context."""
    if not _started:
        yield INVALID_SPAN
        return
    with _begun(name, None, SpanKind.CLIENT, attributes) as begun:
        yield begun


@contextmanager
def _begun(name: str, parent: str | None, span_kind: SpanKind, attributes: dict[str, str | int]) -> Iterator[Span]:
    above = _W3C.extract({"traceparent": parent}) if parent else None
    begun = _started[0].get_tracer(__name__).start_span(name, above, span_kind, attributes)
    try:
        yield begun
    except Exception as error:
        # Its message may hold what a user sent.
        begun.set_status(Status(StatusCode.ERROR, type(error).__name__))
        raise
    finally:
        begun.end()


class _LogOnce(SpanExporter):
    """An exporter with one line in the log when sending begins to fail, and one when it works again."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        self._url = url
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        fails = result is not SpanExportResult.SUCCESS
        if fails != self._fails:
            self._fails = fails
            what = "are dropped, as they cannot be sent to" if fails else "are sent again to"
            logger.warning("traces %s %s", what, self._url)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

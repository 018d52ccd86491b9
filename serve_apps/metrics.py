"""What Prometheus can ask of a gateway: its requests, the jobs of all tenants, and its own process.

Each replica of the gateway counts its own requests; the jobs are the same at all of them.
"""

import threading
from collections.abc import Iterable
from time import monotonic, perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.middleware import route_of
from stack import safety
from stack.store import Store

METHODS = frozenset(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"))
# From a look-up in a table to a long stream.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
# What a client that left before the answer began counts as.
LEFT = 499


class Metrics:
    """The metrics of one application."""

    def __init__(self, store: Store) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "stack_http_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "stack_http_request_seconds", "Time to the end of the answer.", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.under_way = Gauge("stack_http_requests_under_way", "Requests not answered yet.", registry=self.registry)
        self.registry.register(Jobs(store))
        self.registry.register(safety.VERDICTS)
        self.registry.register(safety.SECONDS)
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All of them, in Prometheus's text format. Asks the database."""
        return generate_latest(self.registry)


class Jobs(Collector):
    """How many jobs and attempts there are; counted anew after `ttl` seconds, as often as may be asked."""

    def __init__(self, store: Store, ttl: float = 5.0) -> None:
        self._store = store
        self._ttl = ttl
        self._lock = threading.Lock()
        self._counted_at = float("-inf")
        self._counted: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not ask the database."""
        return []

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if monotonic() >= self._counted_at + self._ttl:
                self._counted = [self._jobs(), self._attempts()]
                self._counted_at = monotonic()
            return self._counted

    def _jobs(self) -> Metric:
        family = GaugeMetricFamily("stack_jobs", "Jobs, by how they stand.", labels=("tenant", "kind", "status"))
        for labels, count in sorted(self._store.jobs.counts().items()):
            family.add_metric(labels, count)
        return family

    def _attempts(self) -> Metric:
        family = GaugeMetricFamily("stack_job_attempts", "Attempts at jobs, by how they stand.", labels=("status",))
        for status, count in sorted(self._store.jobs.attempt_counts().items()):
            family.add_metric((status,), count)
        return family


class Measure:
    """Counts each request, and measures it to the end of its answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = LEFT, perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.under_way.inc()
        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500 if status == LEFT else status
            raise
        finally:
            self.metrics.under_way.dec()
            route = route_of(scope)
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(method, route, status).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - started)

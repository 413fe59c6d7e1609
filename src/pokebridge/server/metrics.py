"""Prometheus metrics: plain numbers, read when they are scraped.

Nothing on a hot path touches a Prometheus object: a poke adds to an integer, an HTTP request to a
list of integers, and the collectors here turn them into families at a scrape.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from itertools import accumulate
from time import perf_counter

from fastapi import Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import (
    Metric as Family,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pokebridge.telemetry import Metric

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})


def expose(registry: CollectorRegistry, read: Callable[[], Mapping[Metric, float]]) -> None:
    """Have ``registry`` show the numbers that ``read`` returns at every scrape."""
    registry.register(_Numbers(read))


def exposition(registry: CollectorRegistry) -> Response:
    """All of ``registry`` in Prometheus's text format."""
    headers = {"Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
    return Response(generate_latest(registry), headers=headers)


class _Numbers(Collector):
    def __init__(self, read: Callable[[], Mapping[Metric, float]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Family]:
        for metric, value in self._read().items():
            if metric.endswith("_total"):
                yield CounterMetricFamily(metric, metric.meaning, value=value)
            else:
                yield GaugeMetricFamily(metric, metric.meaning, value=value)


class _Timings:
    """How long the requests of one kind took: a histogram of plain numbers."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, duration_s: float) -> None:
        self.counts[bisect_left(BUCKETS_S, duration_s)] += 1
        self.sum_s += duration_s


class RequestMetrics(Collector):
    """ASGI middleware that times every HTTP request, by method, route and status.

    The route is the template, never the path, and an unknown method is ``other``: a caller can't
    make up labels. A request that fails with an exception counts as the 500 that it becomes.
    """

    def __init__(self, app: ASGIApp, *, registry: CollectorRegistry) -> None:
        self._app = app
        self._timings: dict[tuple[str, str, str], _Timings] = {}
        registry.register(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request and note how long it took."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = perf_counter()
        status = int(HTTPStatus.INTERNAL_SERVER_ERROR)

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            key = (method, route, str(status))
            if key not in self._timings:
                self._timings[key] = _Timings()
            self._timings[key].add(perf_counter() - started_at)

    def collect(self) -> Iterable[Family]:
        """The histogram as it stands."""
        family = HistogramMetricFamily(
            Metric.HTTP_SECONDS, Metric.HTTP_SECONDS.meaning, labels=("method", "route", "status")
        )
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        for key, timings in self._timings.items():
            buckets = list(zip(bounds, accumulate(timings.counts), strict=True))
            family.add_metric(key, buckets, timings.sum_s)
        yield family

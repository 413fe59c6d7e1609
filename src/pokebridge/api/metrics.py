"""Prometheus metrics: plain numbers, read when they are scraped.

No hot path touches a Prometheus object. A poke increments an integer, an HTTP request an integer in
a list, and the collectors here turn them into metric families at a scrape.
"""

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus

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

from pokebridge.api.exchange import NEVER_CACHED, Response
from pokebridge.durations import RequestDurations
from pokebridge.telemetry import Metric

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LABELS = {
    Metric.BUILD_INFO: ("version", "instance"),
    Metric.HANDSHAKES: ("status",),
    Metric.PUSHES: ("result",),
    Metric.DISAGREEMENTS: ("setting",),
    Metric.INGRESS_MESSAGES: ("result",),
    Metric.UNFORESEEN_INPUTS: ("border",),
    Metric.TASK_FAILURES: ("task",),
    Metric.WORKER_SESSIONS: ("worker",),
    Metric.WORKER_CPU: ("worker",),
    Metric.WORKER_STARTS: ("worker",),
    Metric.HTTP_SECONDS: ("method", "route", "status"),
}


Value = float | Mapping[tuple[str, ...], float]
"""A metric's one number, or one for each combination of its labels' values."""


def expose(registry: CollectorRegistry, read: Callable[[], Mapping[Metric, Value]]) -> None:
    """Have ``registry`` show the numbers that ``read`` returns at every scrape."""
    registry.register(_Numbers(read))


def exposition(registry: CollectorRegistry) -> Response:
    """All of ``registry`` in Prometheus's text format."""
    headers = [(b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode()), NEVER_CACHED]
    return Response(HTTPStatus.OK, headers, generate_latest(registry))


class _Numbers(Collector):
    def __init__(self, read: Callable[[], Mapping[Metric, Value]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Family]:
        for metric, value in self._read().items():
            yield _family(metric, value)


def _family(metric: Metric, value: Value) -> Family:
    kind = CounterMetricFamily if metric.endswith("_total") else GaugeMetricFamily
    family = kind(metric, metric.meaning, labels=_LABELS.get(metric, ()))
    for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
        family.add_metric(labels, number)
    return family


class RequestMetrics(Collector):
    """The durations of the HTTP requests, as a histogram.

    The route is the template, never the path (``none`` outside the API), and an unknown method is
    ``other``, so that callers can't make up labels.
    """

    def __init__(self, durations: RequestDurations) -> None:
        self._durations = durations

    def collect(self) -> Iterable[Family]:
        """The histogram as it stands."""
        metric = Metric.HTTP_SECONDS
        family = HistogramMetricFamily(metric, metric.meaning, labels=_LABELS[metric])
        for labels, durations in self._durations.by_labels.items():
            counts = [*durations.up_to(BUCKETS_S), sum(durations.counts)]
            bounds = [*map(str, BUCKETS_S), "+Inf"]
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), durations.sum_s)
        yield family

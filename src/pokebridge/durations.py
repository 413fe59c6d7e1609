"""How long HTTP requests take: the one place that counts them, for metrics, load and pull rate.

Counts only grow, so each reader keeps what it last saw and takes the difference.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

PULL = ("GET", "/v1/messages")
"""Method and route of a pull."""
BOUNDS_S = (
    *(0.0005, 0.001, 0.002, 0.0025, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0),
)
"""The upper bounds of the buckets, in seconds."""


class Durations:
    """A histogram of durations."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        """One for each bound, and one for what took longer than the last."""
        self.sum_s = 0.0

    def add(self, duration_s: float) -> None:
        """Count one more."""
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def up_to(self, bounds_s: Iterable[float]) -> list[int]:
        """How many took at most each of ``bounds_s``, which must be among ``BOUNDS_S``."""
        up_to = dict(zip(BOUNDS_S, accumulate(self.counts), strict=False))
        return [up_to[bound_s] for bound_s in bounds_s]


class RequestDurations:
    """The durations of all HTTP requests, by method, route and status."""

    def __init__(self) -> None:
        self.by_labels: defaultdict[tuple[str, str, str], Durations] = defaultdict(Durations)

    def pulls(self) -> Durations:
        """The durations of all pulls, whatever their status."""
        total = Durations()
        for labels, durations in self.by_labels.items():
            if labels[:2] == PULL:
                pairs = zip(total.counts, durations.counts, strict=True)
                total.counts = [one + other for one, other in pairs]
                total.sum_s += durations.sum_s
        return total


def p99_ms(counts: Sequence[float]) -> float:
    """The 99th percentile in milliseconds, as far as the bounds tell; 0 without any counts.

    It is interpolated between two bounds, as Prometheus's ``histogram_quantile`` does.
    """
    wanted = sum(counts) * 0.99
    if not wanted:
        return 0.0
    position = bisect_left(list(accumulate(counts)), wanted)
    if position == len(BOUNDS_S):
        return BOUNDS_S[-1] * 1000
    low_s = BOUNDS_S[position - 1] if position else 0.0
    share = (wanted - sum(counts[:position])) / counts[position]
    return (low_s + share * (BOUNDS_S[position] - low_s)) * 1000

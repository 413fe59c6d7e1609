"""How long pulls take: a histogram, read as the time that so many of a hundred stay within."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

BOUNDS_MS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2000)
_SHARE = 0.99


class PullTimes:
    """Counts pulls by how long they took; the counts only grow."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_MS) + 1)
        """One for each bound, and one for what took longer than the last."""

    def add(self, duration_s: float) -> None:
        """A pull took ``duration_s``."""
        self.counts[bisect_left(BOUNDS_MS, duration_s * 1000)] += 1


def p99_ms(counts: Sequence[float]) -> float:
    """What 99 of 100 stayed within, as far as the bounds tell; 0 when there are none.

    Between two bounds it is interpolated, as Prometheus's ``histogram_quantile`` does.
    """
    wanted = sum(counts) * _SHARE
    if not wanted:
        return 0.0
    position = bisect_left(list(accumulate(counts)), wanted)
    if position == len(BOUNDS_MS):
        return float(BOUNDS_MS[-1])
    low_ms = BOUNDS_MS[position - 1] if position else 0.0
    share = (wanted - sum(counts[:position])) / counts[position]
    return low_ms + share * (BOUNDS_MS[position] - low_ms)

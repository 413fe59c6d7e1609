"""What a bit of work costs, by the thread's CPU clock."""

import time

from pokebridge.gateway.meter import Stopwatch

BUSY_S = 0.01


def test_a_stopwatch_tells_cpu_time() -> None:
    """All that was used since it was made, and next to nothing when that is nothing."""
    stopwatch = Stopwatch()
    until_s = time.thread_time() + BUSY_S
    while time.thread_time() < until_s:
        pass
    assert BUSY_S * 0.9 < stopwatch.stop() < BUSY_S * 2
    assert min(Stopwatch().stop() for _ in range(100)) < BUSY_S / 1000

"""How much reaches this instance, and how much of its CPU goes into others' pokes (seed, 3).

CPU time is read from the thread's CPU clock, around one signal in ``SAMPLE_EVERY``: a reading
costs about as much as decoding a signal, so reading for each would cost as much as it measures.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 10.0
SAMPLE_EVERY = 64


@dataclass(frozen=True, slots=True)
class Traffic:
    """A reading over the window that has just passed.

    ``noise_ratio`` is the CPU time of decoding and dropping signals for others, over all CPU time
    that the process used: 0 to 1.
    """

    messages_per_s: float
    noise_ratio: float


@dataclass(frozen=True, slots=True)
class _Mark:
    at_s: float
    signals: int
    noise_cpu_s: float
    process_cpu_s: float


class Meter:
    """Keeps a window of readings: the count of signals, CPU time on others' pokes, CPU time.

    ``mark`` is to be called about once a second; ``read`` compares now with a window ago.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        process_cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock = clock
        self._process_cpu = process_cpu
        self._noise_cpu_s = 0.0
        self._marks: deque[_Mark] = deque([self._now(0)])

    def add_noise(self, cpu_s: float) -> None:
        """A sampled signal was for others and cost ``cpu_s``: it stands for all it was one of."""
        self._noise_cpu_s += cpu_s * SAMPLE_EVERY

    def mark(self, signals: int) -> None:
        """Remember where the counters stand, and forget what is older than the window."""
        now = self._now(signals)
        self._marks.append(now)
        while len(self._marks) > 1 and self._marks[1].at_s <= now.at_s - WINDOW_S:
            self._marks.popleft()

    def read(self, signals: int) -> Traffic:
        """The rates over the window, or since the start when that is shorter."""
        then, now = self._marks[0], self._now(signals)
        elapsed_s = max(now.at_s - then.at_s, 1e-9)
        cpu_s = max(now.process_cpu_s - then.process_cpu_s, 1e-9)
        return Traffic(
            messages_per_s=(now.signals - then.signals) / elapsed_s,
            noise_ratio=min(1.0, (now.noise_cpu_s - then.noise_cpu_s) / cpu_s),
        )

    def _now(self, signals: int) -> _Mark:
        return _Mark(self._clock(), signals, self._noise_cpu_s, self._process_cpu())

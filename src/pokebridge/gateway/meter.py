"""How much reaches this instance, and how much of its CPU goes into others' pokes (seed, 3).

CPU time is read from the thread's CPU clock, around one signal in ``SAMPLE_EVERY``: a reading
costs about as much as decoding a signal, so reading for each would cost as much as it measures, and
what is read has to be freed of what reading it costs.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WINDOW_S = 10.0
SAMPLE_EVERY = 64

Clock = Callable[[], float]


class Window:
    """By how much some running totals have grown over the window that has just passed.

    ``mark`` is to be called about once a second; ``growth`` compares now with a window ago, or with
    the start when that is later.
    """

    def __init__(self, totals: Sequence[float], clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, Sequence[float]]] = deque([(clock(), totals)])

    def mark(self, totals: Sequence[float]) -> None:
        """Remember where ``totals`` stand, and forget what is older than the window."""
        now_s = self._clock()
        self._marks.append((now_s, totals))
        while len(self._marks) > 1 and self._marks[1][0] <= now_s - WINDOW_S:
            self._marks.popleft()

    def growth(self, totals: Sequence[float]) -> tuple[float, list[float]]:
        """The seconds since then, never quite 0, and the growth of each total."""
        then_s, then = self._marks[0]
        elapsed_s = max(self._clock() - then_s, 1e-9)
        return elapsed_s, [now - before for now, before in zip(totals, then, strict=True)]


@dataclass(frozen=True, slots=True)
class Traffic:
    """A reading over the window that has just passed.

    ``noise_ratio`` is the CPU time of decoding and dropping signals for others, over all CPU time
    that the process used: 0 to 1.
    """

    messages_per_s: float
    noise_ratio: float


class Meter:
    """Keeps a window of the count of signals, CPU time on others' pokes, and all CPU time."""

    def __init__(
        self, clock: Clock = time.monotonic, process_cpu: Clock = time.process_time
    ) -> None:
        self._process_cpu = process_cpu
        self._noise_cpu_s = 0.0
        self._window = Window(self._totals(0), clock)

    def add_noise(self, cpu_s: float) -> None:
        """A sampled signal was for others and cost ``cpu_s``: it stands for all it was one of."""
        self._noise_cpu_s += cpu_s * SAMPLE_EVERY

    def mark(self, signals: int) -> None:
        """Remember where the counts stand; to be called about once a second."""
        self._window.mark(self._totals(signals))

    def read(self, signals: int) -> Traffic:
        """The rates over the window."""
        elapsed_s, (received, noise_cpu_s, cpu_s) = self._window.growth(self._totals(signals))
        return Traffic(
            messages_per_s=received / elapsed_s,
            noise_ratio=min(1.0, noise_cpu_s / max(cpu_s, 1e-9)),
        )

    def _totals(self, signals: int) -> tuple[float, float, float]:
        return signals, self._noise_cpu_s, self._process_cpu()

"""The rate of signals at this instance, and the share of CPU time for other instances' pokes.

The CPU time of one signal in ``SAMPLE_EVERY`` is measured, with the thread's CPU clock. Reading
that clock costs about as much as decoding a signal. So not every signal is measured, and the cost
of the reading is subtracted.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WINDOW_S = 10.0
SAMPLE_EVERY = 64

Clock = Callable[[], float]


class Window:
    """How much some running totals have grown over the last ``WINDOW_S`` seconds.

    Call ``mark`` about once a second. ``growth`` compares the totals with those of a window ago, or
    with those of the start when that is later.
    """

    def __init__(self, totals: Sequence[float], clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, Sequence[float]]] = deque([(clock(), totals)])

    def mark(self, totals: Sequence[float]) -> None:
        """Remember ``totals``, and forget what is older than the window."""
        now_s = self._clock()
        self._marks.append((now_s, totals))
        while len(self._marks) > 1 and self._marks[1][0] <= now_s - WINDOW_S:
            self._marks.popleft()

    def growth(self, totals: Sequence[float]) -> tuple[float, list[float]]:
        """The length of the window in seconds, above 0, and the growth of each total."""
        then_s, then = self._marks[0]
        elapsed_s = max(self._clock() - then_s, 1e-9)
        return elapsed_s, [now - before for now, before in zip(totals, then, strict=True)]


@dataclass(frozen=True, slots=True)
class Traffic:
    """A reading over the last ``WINDOW_S`` seconds.

    ``noise_ratio`` is the CPU time of decoding and dropping signals for others, over all CPU time
    that the process used: 0 to 1.
    """

    messages_per_s: float
    noise_ratio: float


class Meter:
    """Measures the rate of signals, and the share of CPU time that others' pokes take."""

    def __init__(
        self, clock: Clock = time.monotonic, process_cpu: Clock = time.process_time
    ) -> None:
        self._process_cpu = process_cpu
        self._noise_cpu_s = 0.0
        self._window = Window(self._totals(0), clock)

    def add_noise(self, cpu_s: float) -> None:
        """A sampled signal for others took ``cpu_s``. It stands for ``SAMPLE_EVERY`` signals."""
        self._noise_cpu_s += cpu_s * SAMPLE_EVERY

    def mark(self, signals: int) -> None:
        """Remember the counts. Call it about once a second."""
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

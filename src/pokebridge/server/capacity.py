"""How many pulls per second this instance can answer: measured, because any guess is wrong.

If the figure is too high, the pulls after a gap arrive in a wave that overloads the mailbox. If it
is too low, clients wait needlessly. So the figure is found as TCP finds the rate of a path (RFC
5681): it grows while pulls are quick and use it up, and falls at once when pulls become slow.
"""

from pokebridge.durations import Durations

SLOW_S = 0.25
"""A mean duration of a pull above this means that pulls come too fast."""
START_PER_S, LEAST_PER_S, MOST_PER_S = 1_000.0, 50.0, 50_000.0
_GROW, _SHRINK = 1.25, 0.6
_USED = 0.8


class PullCapacity:
    """The rate to spread pulls to, in ``per_s``. Call ``settle`` once a second."""

    def __init__(self) -> None:
        self.per_s = START_PER_S
        self._count = 0
        self._sum_s = 0.0

    def settle(self, pulls: Durations) -> None:
        """Judge by the pulls of the last second; ``pulls`` are all since the start."""
        count = sum(pulls.counts)
        new, busy_s = count - self._count, pulls.sum_s - self._sum_s
        self._count, self._sum_s = count, pulls.sum_s
        if not new:
            return
        if busy_s / new > SLOW_S:
            self.per_s = max(LEAST_PER_S, self.per_s * _SHRINK)
        elif new >= self.per_s * _USED:
            self.per_s = min(MOST_PER_S, self.per_s * _GROW)

"""How many pulls a second this instance can bear: measured, since a guess is wrong twice.

Too high a figure, and the pulls after a gap come in a wave that drowns the mailbox; too low, and
clients wait for nothing. So it is found as TCP finds a path's rate (RFC 5681): while pulls are
quick it grows as far as it is made use of, and when they become slow it falls at once.
"""

SLOW_S = 0.25
"""From this mean duration of a pull on, they come too fast."""
START_PER_S, LEAST_PER_S, MOST_PER_S = 1_000.0, 50.0, 50_000.0
_GROW, _SHRINK = 1.25, 0.6
_USED = 0.8


class PullCapacity:
    """The pulls a second to spread to. ``add`` each pull, ``settle`` once a second."""

    def __init__(self) -> None:
        self.per_s = START_PER_S
        self._pulls = 0
        self._busy_s = 0.0

    def add(self, duration_s: float) -> None:
        """A pull took ``duration_s``."""
        self._pulls += 1
        self._busy_s += duration_s

    def settle(self) -> None:
        """A second has passed: judge by what was pulled in it."""
        pulls, busy_s = self._pulls, self._busy_s
        self._pulls, self._busy_s = 0, 0.0
        if not pulls:
            return
        if busy_s / pulls > SLOW_S:
            self.per_s = max(LEAST_PER_S, self.per_s * _SHRINK)
        elif pulls >= self.per_s * _USED:
            self.per_s = min(MOST_PER_S, self.per_s * _GROW)

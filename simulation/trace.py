"""The log of a run: its last lines for people, and a hash of all lines for comparison."""

from collections import deque
from hashlib import blake2b

from simulation.loop import Scheduler

_LAST_KEPT = 60


class Trace:
    """The log of one run. Two runs of one seed have the same hash."""

    def __init__(self, scheduler: Scheduler, kept: int = _LAST_KEPT) -> None:
        self.lines = 0
        self._scheduler = scheduler
        self._hash = blake2b(digest_size=8)
        self._last: deque[str] = deque(maxlen=kept)

    def note(self, where: str, what: str) -> None:
        """Something happened at ``where``, now."""
        line = f"{self._scheduler.now:9.4f}  {where:<9} {what}"
        self.lines += 1
        self._last.append(line)
        self._hash.update(line.encode())

    @property
    def last(self) -> list[str]:
        """The newest lines."""
        return list(self._last)

    @property
    def digest(self) -> str:
        """The hash of every line so far."""
        return self._hash.hexdigest()

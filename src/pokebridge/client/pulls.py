"""When a client pulls. Pure, since it is a part of ``client.core``."""

from math import inf


class Pulls:
    """When to pull: at once, at a time picked earlier, or after a failure's delay."""

    def __init__(self, cursor: int) -> None:
        self.cursor = cursor
        self.running = False
        self.failures = 0
        self._wanted_at = inf
        self._wanted_version: int | None = None  # None: unknown, so no cursor makes it needless
        self._not_before = -inf

    @property
    def due_at(self) -> float:
        """When the next pull is to start; never while one is running."""
        return inf if self.running else max(self._wanted_at, self._not_before)

    def want(self, at: float, version: int | None = None) -> None:
        """Pull at ``at`` or earlier, unless the cursor is at ``version`` by then."""
        if version is not None and version <= self.cursor:
            return
        if self._wanted_at == inf:
            self._wanted_version = version
        elif version is None or self._wanted_version is None:
            self._wanted_version = None
        else:
            self._wanted_version = max(self._wanted_version, version)
        self._wanted_at = min(self._wanted_at, at)

    def start(self) -> None:
        """A pull starts, and answers all that was heard before."""
        self.running = True
        self._wanted_at = inf

    def succeeded(self, cursor: int) -> None:
        """Everything up to ``cursor`` is dealt with; what was heard meanwhile may need no pull."""
        self.running = False
        self.cursor = cursor
        self.retry_now()
        if self._wanted_version is not None and self._wanted_version <= cursor:
            self._wanted_at = inf

    def failed(self, now: float, delay_s: float) -> None:
        """Pull again, but not before ``delay_s`` seconds, whatever is heard meanwhile."""
        self.running = False
        self.failures += 1
        self._not_before = now + delay_s
        self.want(now)

    def retry_now(self) -> None:
        """Forget the failures and their delay."""
        self.failures = 0
        self._not_before = -inf

"""The red line: the load above which fan-out is no longer advisable (docs/redline.md).

:class:`RedLineWatch` decides from measured figures when the load has crossed the line and when it
has left it.
"""

from dataclasses import dataclass
from typing import Literal

RED_LINE_OPS_PER_S = 5000.0  # docs/roadmap.md


@dataclass(frozen=True, slots=True)
class WatchRules:
    """How long the load must be over or under the line before it counts.

    Attributes:
        over_for_s: the line is crossed after this time above it.
        under_for_s: the line is left after this time below ``leave_at``.
        leave_at: a share of the line, under 1.
    """

    over_for_s: float
    under_for_s: float
    leave_at: float


LOG_RULES = WatchRules(over_for_s=2.0, under_for_s=30.0, leave_at=0.8)
"""For the log, the metric and ``over_red_line``. The figure is an average over 10 s already."""
MIGRATE_RULES = WatchRules(over_for_s=300.0, under_for_s=1800.0, leave_at=0.5)
"""For ``mode = auto``: when the line is crossed the cluster is partitioned, when it is left the
cluster returns to fan-out."""

Crossing = Literal["crossed", "left"]


class RedLineWatch:
    """Reports when the line is crossed and when it is left, with hysteresis.

    The line is crossed when the figure has been above it for ``over_for_s``. It is left when the
    figure has been below ``leave_at`` of it for ``under_for_s``. One figure that does not fit
    starts the time again. Callers pass ``now`` in seconds.

    Attributes:
        over: whether the line was crossed, and not left since.
    """

    def __init__(self, line_ops_per_s: float, rules: WatchRules) -> None:
        self._line_ops_per_s = line_ops_per_s
        self._rules = rules
        self._since: float | None = None
        self.over = False

    def observe(self, ops_per_s: float, now: float) -> Crossing | None:
        """Take a figure, and return what it changed, if anything.

        ``ops_per_s`` is what fan-out does *or would do*: messages per second in the whole cluster
        times instances. A partitioned cluster's real deliveries fall with the migration, and would
        cause the migration back.
        """
        if self.over:
            is_turning = ops_per_s < self._line_ops_per_s * self._rules.leave_at
            needed_s = self._rules.under_for_s
        else:
            is_turning = ops_per_s > self._line_ops_per_s
            needed_s = self._rules.over_for_s
        if not is_turning:
            self._since = None
            return None
        if self._since is None:
            self._since = now
        if now - self._since < needed_s:
            return None
        self._since = None
        self.over = not self.over
        return "crossed" if self.over else "left"

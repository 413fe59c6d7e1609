"""The load against the red line: told when it is crossed, and acted on in mode ``auto``."""

from typing import Protocol

import structlog

from pokebridge.costs import LOG_RULES, RedLineWatch, WatchRules
from pokebridge.errors import ConflictError, CoordinationError
from pokebridge.model import Mode

log = structlog.get_logger(__name__)


class Migrate(Protocol):
    """Changes the cluster's mode."""

    async def __call__(self, mode: Mode, *, force: bool) -> None:
        """Return when the change is written."""


class RedLine:
    """What one instance makes of the cluster's load; it acts on it only while it leads.

    Every instance watches, so that a new leader knows since when. ``migrate`` is called in mode
    ``auto``, and ``None`` otherwise: when the line is crossed or left by ``rules``, and once, so
    that an operator who decides otherwise has the last word until then.
    """

    def __init__(self, line_ops_per_s: float, rules: WatchRules, migrate: Migrate | None) -> None:
        self._line_ops_per_s = line_ops_per_s
        self._now = RedLineWatch(line_ops_per_s, LOG_RULES)
        self._in_fan_out = RedLineWatch(line_ops_per_s, rules)
        self._migrate = migrate
        self._mode: Mode | None = None
        self._wanted: Mode | None = None

    @property
    def is_over(self) -> bool:
        """Whether the cluster is over the line now."""
        return self._now.over

    async def observe(
        self,
        *,
        ops_per_s: float,
        fan_out_ops_per_s: float,
        mode: Mode,
        is_leader: bool,
        now: float,
    ) -> None:
        """Take the load: what it is, and what it would be in fan-out; ``now`` in seconds."""
        crossing = self._now.observe(ops_per_s, now)
        if crossing is not None and is_leader:
            tell = log.warning if crossing == "crossed" else log.info
            tell(
                f"red line {crossing}",
                ops_per_s=round(ops_per_s),
                red_line=self._line_ops_per_s,
                mode=mode,
            )
        if self._mode is None:  # what an earlier leader has decided
            self._in_fan_out.over = mode == "partitioned"
        if self._in_fan_out.observe(fan_out_ops_per_s, now):
            self._wanted = "partitioned" if self._in_fan_out.over else "fanout"
        if mode != self._mode and mode == self._wanted:
            self._wanted = None
        self._mode = mode
        if self._migrate is not None and is_leader and self._wanted not in {None, mode}:
            await self._act(self._migrate, self._wanted, fan_out_ops_per_s)

    async def _act(self, migrate: Migrate, wanted: Mode, fan_out_ops_per_s: float) -> None:
        try:
            await migrate(wanted, force=False)
        except ConflictError as refused:
            self._wanted = None
            log.warning("not migrated", mode=wanted, reason=str(refused))
        except CoordinationError as error:  # to be tried again
            log.warning("not migrated yet", mode=wanted, reason=str(error))
        else:
            log.info("migrating by itself", mode=wanted, fan_out_ops_per_s=round(fan_out_ops_per_s))

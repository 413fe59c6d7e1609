"""The load compared with the red line: logged when it crosses, and acted on in mode ``auto``."""

from typing import Protocol

import structlog

from pokebridge.cluster.load import ClusterLoad
from pokebridge.errors import ConflictError, CoordinationError
from pokebridge.model import Mode
from pokebridge.red_line import LOG_RULES, RedLineWatch, WatchRules

log = structlog.get_logger(__name__)


class Migrate(Protocol):
    """Changes the cluster's mode."""

    async def __call__(self, mode: Mode, *, force: bool) -> None:
        """Return when the new mode is written."""


class RedLineMonitor:
    """Compares the cluster's load with the red line; only the leader logs and migrates.

    Every instance observes, so that a new leader knows how long the load has been over the line.
    In mode ``auto``, ``migrate`` is called once for each crossing by ``rules``, so a different
    decision of an operator stands until the next crossing. In the other modes it is ``None``.
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

    async def observe(self, load: ClusterLoad, mode: Mode, *, is_leader: bool, now: float) -> None:
        """Take the load, and the mode that it was measured in; ``now`` in seconds."""
        crossing = self._now.observe(load.ops_per_s, now)
        if crossing is not None and is_leader:
            self._log_crossing(load, mode)
        if self._mode is None:  # the mode is the last leader's decision
            self._in_fan_out.over = mode == "partitioned"
        if self._in_fan_out.observe(load.fan_out_ops_per_s, now):
            self._wanted = "partitioned" if self._in_fan_out.over else "fanout"
        if mode != self._mode and mode == self._wanted:
            self._wanted = None
        self._mode = mode
        if self._migrate is not None and is_leader and self._wanted not in {None, mode}:
            await self._act(self._migrate, self._wanted, load)

    def _log_crossing(self, load: ClusterLoad, mode: Mode) -> None:
        fields = {
            "ops_per_s": round(load.ops_per_s),
            "red_line": self._line_ops_per_s,
            "mode": mode,
        }
        if self._now.over:
            log.warning("red_line_crossed", **fields)
        else:
            log.info("red_line_left", **fields)

    async def _act(self, migrate: Migrate, wanted: Mode, load: ClusterLoad) -> None:
        try:
            await migrate(wanted, force=False)
        except ConflictError as refused:
            self._wanted = None
            log.warning("migration_refused", mode=wanted, reason=str(refused))
        except CoordinationError as error:  # tried again at the next observation
            log.warning("migration_delayed", mode=wanted, reason=str(error))
        else:
            log.info(
                "migration_started",
                mode=wanted,
                fan_out_ops_per_s=round(load.fan_out_ops_per_s),
            )

"""How many cores this process may use."""

import os
import sys
from contextlib import suppress
from math import inf
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # in a container, its own


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """The cores of this process's affinity, within the limit of its ``cgroup``.

    A limit of 2.5 cores counts as 2, and one below 1 as 1.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, int(min(cores, _limit_of(cgroup))))


def _limit_of(cgroup: Path) -> float:
    """How many cores the cgroup may use, by version 2 of cgroups or else version 1."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)  # "max", no limit, is no number
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (
            (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
            for name in ("quota", "period")
        )
        if int(quota) > 0:  # -1: no limit
            return int(quota) / int(period)
    return inf

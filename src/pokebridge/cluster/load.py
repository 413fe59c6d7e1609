"""The load on the cluster, and how one instance measures its own part of it."""

import asyncio
import resource
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from pokebridge.coordination.base import Member, Report, WorkerLoad
from pokebridge.durations import RequestDurations, p99_ms
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.meter import Window
from pokebridge.model import Mode

_SHARDS_REPORTED_AT_MOST = 1000
_VERSION = version("pokebridge")


class ClusterLoad(NamedTuple):
    """What the cluster carries."""

    messages_per_s: float
    """Signals published."""
    ops_per_s: float
    """Signals delivered, to all instances together."""
    instances: int

    @property
    def fan_out_ops_per_s(self) -> float:
        """What ``ops_per_s`` is in fan-out, or would be."""
        return self.messages_per_s * self.instances


def cluster_load(members: Collection[Member], mode: Mode) -> ClusterLoad:
    """The load that the members report.

    In fan-out every instance receives every message. In partitioned mode a message reaches the
    owner of its shard and the other instances with sessions of that shard, and a message without
    a shard reaches every instance. Without a shared store no other member is known, so the load is
    that of this instance alone.
    """
    reports = [member.report for member in members]
    rates = [report.messages_per_s for report in reports]
    if mode == "partitioned":
        untagged = [report.messages_per_s * report.untagged_share for report in reports]
        published = sum(report.owned_per_s for report in reports) + max(untagged, default=0.0)
        return ClusterLoad(published, sum(rates), len(reports))
    messages_per_s = max(rates, default=0.0)
    return ClusterLoad(messages_per_s, messages_per_s * len(reports), len(reports))


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """One member, and what the shard map says of it."""

    member: Member
    state: str
    """``active``, ``draining`` or ``deaf``."""
    shards: Sequence[int]
    """The shards that it owns, in order."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster as one instance sees it."""

    name: str
    """The name that its instances have in common."""
    mode: Mode
    epoch: int
    """The epoch of the shard map in force."""
    shard_count: int
    instances: Sequence[InstanceStatus]
    load: ClusterLoad
    noise_ratio: float
    """Share of this instance's CPU time spent on pokes for other instances' clients, 0 to 1."""
    red_line_ops_per_s: float
    is_over_red_line: bool
    engine: str
    """What carries the signals: the scheme of the transport's URL."""
    seen_by: str
    """The instance that sees it."""
    history_count: int
    """Number of history entries since that instance's start."""
    trouble: str
    """What that instance can't reach; empty if it reaches everything."""


class InstanceMeter:
    """Measures this instance for its :class:`Report`: rates over a window of about 10 s.

    - ``workers``: its worker processes, as they are now
    - ``workers_cpu_s``: the CPU time of all workers so far
    - ``_gateway``, ``_requests``: what is measured
    - ``_doubt_s``: seconds in which pokes may have been lost
    - ``_memory_bytes``: of this process, as of the last tick
    - ``_window``: the totals of the last seconds
    """

    def __init__(self, gateway: Gateway, requests: RequestDurations) -> None:
        self.workers: Sequence[WorkerLoad] = ()
        self.workers_cpu_s = 0.0
        self._gateway = gateway
        self._requests = requests
        self._doubt_s = 0.0
        self._memory_bytes = 0
        self._window = Window(self._totals())

    async def tick(self, elapsed_s: float) -> None:
        """Take a reading; to be called about once a second, ``elapsed_s`` after the last."""
        self._memory_bytes = await asyncio.to_thread(memory_bytes)
        self._doubt_s += elapsed_s * self._gateway.subscriptions.is_in_doubt
        self._window.mark(self._totals())

    def report(self) -> Report:
        """The report for the other instances."""
        gateway = self._gateway
        subscriptions, traffic = gateway.subscriptions, gateway.bridge.traffic
        elapsed_s, totals = self._window.growth(self._totals())
        signals, untagged, owned, delivered, cpu_s, *pulls = totals
        interest = sorted(gateway.shard_routing.interest)
        return Report(
            epoch=gateway.shard_routing.shard_map.epoch,
            settled=subscriptions.settled,
            subscriptions=len(subscriptions.selections),
            interest=tuple(interest[:_SHARDS_REPORTED_AT_MOST]),
            messages_per_s=traffic.messages_per_s,
            owned_per_s=owned / elapsed_s,
            pokes_per_s=delivered / elapsed_s,
            noise_ratio=traffic.noise_ratio,
            untagged_share=min(1.0, untagged / signals) if signals else 0.0,
            gaps=subscriptions.gaps,
            lost=gateway.lost_pokes,
            doubt_s=self._doubt_s,
            pulls_per_s=sum(pulls) / elapsed_s,
            pull_p99_ms=p99_ms(pulls),
            cpu_share=cpu_s / elapsed_s,
            memory_bytes=self._memory_bytes + sum(each.memory_bytes for each in self.workers),
            workers=tuple(self.workers),
            version=_VERSION,
        )

    def _totals(self) -> Sequence[float]:
        counters, subscriptions = self._gateway.bridge.counters, self._gateway.subscriptions
        return (
            counters.signals,
            subscriptions.untagged,
            subscriptions.owned,
            counters.delivered,
            time.process_time() + self.workers_cpu_s,
            *self._requests.pulls().counts,
        )


def memory_bytes() -> int:
    """The process's resident memory; its peak where the kernel tells only that."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()

"""This instance's place in its cluster: it joins, follows the shard map, and tells of itself.

Membership brings the map and the members; the gateway is given both and does the rest. Nothing
here is needed for a poke to arrive: without the store the last map stays in force.
"""

import asyncio
import resource
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import structlog

from pokebridge.api import schema
from pokebridge.cluster.auto_mode import RedLine
from pokebridge.cluster.history import Events
from pokebridge.cluster.membership import Membership, View
from pokebridge.cluster.pull_times import PullTimes, p99_ms
from pokebridge.coordination.base import Coordination, Member, Report
from pokebridge.costs import MIGRATE_RULES
from pokebridge.errors import ConflictError, CoordinationError, NotFoundError
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.meter import Window
from pokebridge.gateway.shard_routing import Reach
from pokebridge.model import Mode
from pokebridge.settings import Settings
from pokebridge.sharding import shard_of
from pokebridge.wire import CONNECT_PATH

log = structlog.get_logger(__name__)

# A share that is smaller comes of strays, and of signals by hand: they are heard all the same.
_UNTAGGED_SHARE_ALLOWED = 0.01
_SHARDS_SHOWN_AT_MOST = 1000
_TICK_S = 1.0
# Events that the log has already, of whom it concerns and of who decided it.
_TOLD_BY_ONE = frozenset({"gap", "moved"})


class Cluster:
    """Membership and the gateway, as the API and the operator see them.

    ``url`` is where clients reach just this instance (``wss://host``), empty when they can't.
    ``has_peers`` says whether the transport reaches other instances. ``on_drain`` is called when
    the cluster wants this instance drained.
    """

    def __init__(
        self,
        settings: Settings,
        gateway: Gateway,
        coordination: Coordination,
        *,
        url: str,
        has_peers: bool,
        on_drain: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._gateway = gateway
        self._on_drain = on_drain
        self._url = url
        self._is_member = "gateway" in settings.roles
        self._is_static = coordination.is_static
        self._is_cut_off = has_peers and not coordination.is_shared
        self._incarnation = secrets.token_hex(8)
        self._joined_at_ms = int(time.time() * 1000)
        self.pulls = PullTimes()
        """How long the pulls take that this instance answers."""
        self.events = Events()
        """What has happened to the cluster."""
        self._window = Window(self._totals())
        self._memory_bytes = 0
        self._doubt_s = 0.0
        self.ops_per_s = 0.0
        """Deliveries of signals in the whole cluster, as of a second ago."""
        self.red_line = RedLine(
            settings.red_line_ops_per_s,
            replace(
                MIGRATE_RULES, over_for_s=settings.auto_over_s, under_for_s=settings.auto_under_s
            ),
            self.migrate if settings.mode == "auto" else None,
        )
        self._applied: View | None = None
        self._seen = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._membership = Membership(
            coordination,
            self._describe if self._is_member else None,
            holder=f"{settings.instance}:{self._incarnation}",
            shard_count=settings.shard_count,
            mode=settings.initial_mode,
            on_view=self._on_view,
            lease_s=settings.lease_s,
            leads="coordinator" in settings.roles,
            by_ring=settings.assignment == "ring" and not self._is_static,
        )

    @property
    def view(self) -> View:
        """The cluster as last seen."""
        return self._membership.view

    @property
    def is_leader(self) -> bool:
        """Whether this instance plans the shard map now."""
        return self._membership.is_leader

    @property
    def trouble(self) -> str | None:
        """Why the store can't be had; ``None`` when it can."""
        return self._membership.trouble

    async def start(self) -> None:
        """Join.

        Raises:
            CoordinationError: the store can't be had.
            ConfigError: the cluster has another number of shards.
        """
        await self._membership.start()
        me = self._settings.instance
        if me in self.view.shard_map.draining:  # of an earlier life
            await self._membership.change(lambda m: replace(m, draining=m.draining - {me}))
        self._ticker = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Leave."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        await self._membership.close()

    # --- what the map asks of this instance -----------------------------------------------------

    def _on_view(self, view: View) -> None:
        self._seen.set()
        before, self._applied = self._applied, view
        reached = {
            each.id: Reach(connect_url(each.url), each.incarnation)
            for each in view.members.values()
            if each.url
        }
        if before is None or (before.shard_map, _standings(before)) != (
            view.shard_map,
            _standings(view),
        ):
            self._gateway.apply(view.shard_map, reached)
            self._check_name(view)
        for event in self.events.see(view):
            if event.kind not in _TOLD_BY_ONE:
                log.info(event.text, kind=event.kind, epoch=view.shard_map.epoch)
        me = self._settings.instance
        if me in view.shard_map.draining and before is not None:
            self._on_drain()

    def _check_name(self, view: View) -> None:
        mine = view.members.get(self._settings.instance)
        if self._is_member and mine is not None and mine.incarnation != self._incarnation:
            log.warning("another instance has the same name", member=mine.id)

    async def hand_over(self) -> None:
        """Give the shards up, so that the sessions can follow them; takes at most a lease.

        In fan-out nobody waits: every instance hears everything as it is.
        """
        if not self._is_member or self._is_static:
            return
        me = self._settings.instance
        try:
            async with asyncio.timeout(self._settings.lease_s):
                await self._membership.refresh()
                while self._others() and self.view.shard_map.owned_by(me):
                    self._seen.clear()
                    await self._seen.wait()
        except (CoordinationError, TimeoutError) as error:
            log.warning("shards not handed over", reason=str(error) or "no leader did it in time")

    def _others(self) -> Collection[Member]:
        if self.view.shard_map.mode == "fanout":
            return ()
        me, draining = self._settings.instance, self.view.shard_map.draining
        return [
            member
            for member in self.view.members.values()
            if member.id != me and member.state == "active" and member.id not in draining
        ]

    # --- what an operator asks for --------------------------------------------------------------

    async def migrate(self, mode: Mode, *, force: bool) -> None:
        """Have every instance change to ``mode``; returns when it is written, not when it is done.

        Raises:
            ConflictError: the cluster can't change to it now; the message says why.
            CoordinationError: the store can't be had.
        """
        if mode == "partitioned" and not force:
            reports = [member.report for member in self._members().values()]
            share = max((report.untagged_share for report in reports), default=0.0)
            if share > _UNTAGGED_SHARE_ALLOWED:
                raise ConflictError(
                    f"{share:.0%} of the signals carry no valid shard: every instance would go on"
                    " receiving those. Tag them (protocol.md section 2), or ask with force",
                )
        if self._is_cut_off:
            raise ConflictError(
                "the instances share no coordination store (coordination is memory://), so they"
                " can't change their mode together",
            )
        if self._is_static:
            raise ConflictError(
                "with static:// coordination the mode is each instance's setting: change it there,"
                " and restart them one after the other",
            )
        await self._membership.change(lambda shard_map: replace(shard_map, mode=mode))

    async def drain(self, instance: str) -> None:
        """Have ``instance`` give up its shards, then its sessions.

        Raises:
            NotFoundError: the cluster has no such instance.
            CoordinationError: the store can't be had.
        """
        if instance == self._settings.instance:
            self._on_drain()
        elif instance in self.view.members:
            await self._membership.change(
                lambda shard_map: replace(shard_map, draining=shard_map.draining | {instance})
            )
        else:
            raise NotFoundError("this cluster has no such instance")

    def home_of(self, recipient: str) -> tuple[int, str, str]:
        """The shard of ``recipient``, and the instance to connect to for it: its id and URL.

        That is the shard's owner, or this instance when there is none to be reached; the URL may
        be empty.
        """
        shard = shard_of(recipient, self._settings.shard_count)
        owner = self.view.owner_of(shard)
        if self.view.shard_map.mode == "partitioned" and owner is not None and owner.url:
            return shard, owner.id, connect_url(owner.url)
        return shard, self._settings.instance, connect_url(self._settings.advertise_url or "")

    # --- what this instance tells ---------------------------------------------------------------

    def _describe(self) -> Member:
        settings = self._settings
        return Member(
            id=settings.instance,
            url=self._url,
            incarnation=self._incarnation,
            weight=settings.weight,
            joined_at_ms=self._joined_at_ms,
            sessions=len(self._gateway.sessions),
            state="draining" if self._gateway.draining else "active",
            report=self._report(),
        )

    def _report(self) -> Report:
        gateway = self._gateway
        subscriptions, traffic = gateway.subscriptions, gateway.bridge.traffic
        elapsed_s, totals = self._window.growth(self._totals())
        signals, untagged, owned, delivered, cpu_s, *pulls = totals
        interest = sorted(gateway.shard_routing.interest)
        return Report(
            epoch=gateway.shard_routing.shard_map.epoch,
            settled=subscriptions.settled,
            subscriptions=len(subscriptions.selections),
            interest=tuple(interest[:_SHARDS_SHOWN_AT_MOST]),
            messages_per_s=traffic.messages_per_s,
            owned_per_s=owned / elapsed_s,
            pokes_per_s=delivered / elapsed_s,
            noise_ratio=traffic.noise_ratio,
            untagged_share=untagged / signals if signals else 0.0,
            gaps=subscriptions.gaps,
            doubt_s=self._doubt_s,
            pulls_per_s=sum(pulls) / elapsed_s,
            pull_p99_ms=p99_ms(pulls),
            cpu_share=cpu_s / elapsed_s,
            memory_bytes=self._memory_bytes,
        )

    def _totals(self) -> Sequence[float]:
        counters = self._gateway.bridge.counters
        return (
            counters.signals,
            self._gateway.subscriptions.untagged,
            self._gateway.subscriptions.owned,
            counters.delivered,
            time.process_time(),
            *self.pulls.counts,
        )

    async def _tick(self) -> None:
        while True:
            self._memory_bytes = await asyncio.to_thread(_memory_bytes)
            await asyncio.sleep(_TICK_S)
            self._doubt_s += _TICK_S * self._gateway.subscriptions.is_in_doubt
            self._window.mark(self._totals())
            await self._watch_red_line()

    async def _watch_red_line(self) -> None:
        load = self._load(self._members())
        self.ops_per_s = load.ops_per_s
        await self.red_line.observe(
            ops_per_s=load.ops_per_s,
            fan_out_ops_per_s=load.messages_per_s * load.instances,
            mode=self.view.shard_map.mode,
            is_leader=self.is_leader,
            now=asyncio.get_running_loop().time(),
        )

    def _members(self) -> Mapping[str, Member]:
        """Everyone, and of this instance what is true now."""
        members = dict(self.view.members)
        if self._is_member:
            members[self._settings.instance] = self._describe()
        return members

    def show(self) -> schema.Cluster:
        """The whole cluster, as far as this instance sees it."""
        shard_map, members = self.view.shard_map, self._members()
        load = self._load(members)
        return schema.Cluster(
            mode=shard_map.mode,
            epoch=shard_map.epoch,
            shard_count=shard_map.shard_count,
            instances=[
                _shown(member, shard_map.owned_by(member.id), shard_map.draining)
                for _, member in sorted(members.items())
            ],
            traffic=schema.Traffic(
                messages_per_s=load.messages_per_s,
                global_ops_per_s=load.ops_per_s,
                red_line=self._settings.red_line_ops_per_s,
                noise_ratio=self._gateway.bridge.traffic.noise_ratio,
                over_red_line=self.red_line.is_over,
            ),
            seen_by=self._settings.instance,
            events=self.events.count,
            trouble="; ".join(self._troubles()),
        )

    def _troubles(self) -> Iterator[str]:
        if self.trouble is not None:
            yield f"coordination: {self.trouble}"
        subscriptions = self._gateway.subscriptions
        if subscriptions.is_in_doubt:
            yield f"transport: {subscriptions.trouble or 'what is held may have missed something'}"

    def show_events(self) -> schema.Events:
        """What has happened, as far as this instance has seen it."""
        return schema.Events(self._settings.instance, self.events.count, list(self.events))

    def _load(self, members: Mapping[str, Member]) -> "_Load":
        """The load on the cluster.

        In fan-out every instance receives every message. Partitioned, a shard's owner does, and who
        else has sessions of it; what carries no shard still reaches everyone. Without a shared
        store there is no other member to see, so the load is that of this instance alone.
        """
        reports = [member.report for member in members.values()]
        rates = [report.messages_per_s for report in reports]
        instances = len(members)
        if self.view.shard_map.mode == "partitioned":
            to_all = [report.messages_per_s * report.untagged_share for report in reports]
            published = sum(report.owned_per_s for report in reports) + max(to_all, default=0.0)
            return _Load(published, sum(rates), instances)
        messages_per_s = max(rates, default=0.0)
        return _Load(messages_per_s, messages_per_s * instances, instances)


class _Load(NamedTuple):
    messages_per_s: float
    """Signals published."""
    ops_per_s: float
    """Signals delivered, to all instances together."""
    instances: int


def connect_url(base: str) -> str:
    """The WebSocket's URL under ``base``; empty when that is."""
    return base and f"{base.rstrip('/')}{CONNECT_PATH}"


def _standings(view: View) -> frozenset[tuple[object, ...]]:
    return frozenset(member.standing for member in view.members.values())


def _shown(member: Member, owned: Collection[int], draining: Collection[str]) -> schema.Instance:
    report = asdict(member.report)
    return schema.Instance(
        id=member.id,
        url=member.url,
        state="draining" if member.id in draining else member.state,
        sessions=member.sessions,
        shards=sorted(owned),
        weight=member.weight,
        joined_at_ms=member.joined_at_ms,
        **report,
    )


def _memory_bytes() -> int:
    """What this process has in memory now; where the kernel does not say, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()

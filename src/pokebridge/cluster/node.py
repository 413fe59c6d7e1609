"""This instance's place in its cluster: it joins, follows the shard map, and reports on itself.

Membership brings the shard map and the members, and the gateway applies both. No poke depends on
this: while the store is unavailable the last shard map stays in force.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import structlog

from pokebridge.cluster.auto_mode import RedLineMonitor
from pokebridge.cluster.history import History
from pokebridge.cluster.load import ClusterStatus, InstanceMeter, InstanceStatus, cluster_load
from pokebridge.cluster.membership import Membership, View
from pokebridge.coordination.base import Coordination, Member
from pokebridge.durations import RequestDurations
from pokebridge.errors import ConflictError, CoordinationError, NotFoundError
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.roster import Whereabouts
from pokebridge.gateway.shard_routing import Reach
from pokebridge.model import Mode
from pokebridge.red_line import WatchRules
from pokebridge.sharding import shard_of
from pokebridge.supervisor import cancel, supervise
from pokebridge.wire import CONNECT_PATH

log = structlog.get_logger(__name__)

# A smaller share comes from stray signals and from those sent by hand. They are delivered too.
_UNTAGGED_SHARE_ALLOWED = 0.01
_TICK_S = 1.0
# Entries that the log has already, from the instance concerned or from the leader.
_LOGGED_ELSEWHERE = frozenset({"gap", "moved"})


# The texts of Python and the drivers about an address that can't be reached, and before it.
_REFUSED = re.compile(
    r"(?:Multiple exceptions: )?(?:(?:, )?\[Errno \d+\] Connect call failed \([^)]*\))+"
)
_ERRNO = re.compile(r"\[Errno -?\d+\] ")
_REPEATED = re.compile(r"(\S+: )\1+")


class Home(NamedTuple):
    """Where a recipient's clients are served best."""

    shard: int
    instance: str
    url: str
    """The WebSocket URL; empty when it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """An instance's part in its cluster, and the settings of the cluster."""

    instance: str
    """This instance's id."""
    cluster: str
    """The name of its cluster."""
    engine: str
    """What carries the signals: the scheme of the transport's URL."""
    weight: float
    """This instance's capacity, relative to the others'."""
    advertise_url: str
    """The URL that this instance gives its own clients; empty when they keep the one they used."""
    is_member: bool
    """Whether this instance holds sessions, and so owns shards."""
    can_lead: bool
    """Whether this instance may be elected coordinator."""
    by_ring: bool
    """Whether every instance computes the shard map, instead of an elected one."""
    shard_count: int
    mode: Mode
    """The mode of a cluster that has no shard map yet."""
    lease_s: float
    """After this time without a sign of life a member counts as dead."""
    red_line_ops_per_s: float
    migrates: bool
    """Whether the leader changes the mode when the load crosses the red line."""
    migrate_rules: WatchRules
    """How long the load must be over or under the line before it does."""


class Cluster:
    """The cluster as this instance takes part in it, for the API and for operators.

    Attributes:
        history: what has happened to the cluster.
        red_line: compares the load with the red line, and migrates in mode ``auto``.
        ops_per_s: deliveries of signals per second in the whole cluster, as of a second ago.
        meter: measures this instance.
    """

    def __init__(
        self,
        config: ClusterConfig,
        gateway: Gateway,
        coordination: Coordination,
        requests: RequestDurations,
        *,
        url: str,
        has_peers: bool,
        on_drain: Callable[[], None],
    ) -> None:
        """Prepare to join.

        Args:
            config: this instance's part in it.
            gateway: applies the shard map.
            coordination: the store that the members share.
            requests: the durations of the requests that this instance answers.
            url: where clients reach this instance and no other (``wss://host``), or empty.
            has_peers: whether the transport reaches other instances.
            on_drain: called when the cluster wants this instance drained.
        """
        self._config = config
        self._gateway = gateway
        self._on_drain = on_drain
        self._url = url
        self._is_static = coordination.is_static
        self._has_leases = coordination.is_shared and not coordination.is_static
        self._is_cut_off = has_peers and not coordination.is_shared
        self._incarnation = secrets.token_hex(8)
        self._joined_at_ms = int(time.time() * 1000)
        self.meter = InstanceMeter(gateway, requests)
        # For how long this instance has been deaf, without a break.
        self._deaf_s = 0.0
        self.count_consoles: Callable[[], int] = lambda: 0
        """How many sessions here are consoles that watch: they are not reported as sessions."""
        self.history = History()
        self.ops_per_s = 0.0
        self.red_line = RedLineMonitor(
            config.red_line_ops_per_s,
            config.migrate_rules,
            self.migrate if config.migrates else None,
        )
        self._applied: View | None = None
        self._has_new_view = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._membership = Membership(
            coordination,
            self._describe if config.is_member else None,
            holder=f"{config.instance}:{self._incarnation}",
            shard_count=config.shard_count,
            mode=config.mode,
            on_view=self._on_view,
            lease_s=config.lease_s,
            leads=config.can_lead,
            by_ring=config.by_ring and not self._is_static,
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
        """Why the store is unavailable; ``None`` when it is available."""
        return self._membership.trouble

    async def start(self) -> None:
        """Join.

        Raises:
            CoordinationError: the store is unavailable.
            ConfigError: the cluster has another number of shards.
        """
        await self._membership.start()
        me = self._config.instance
        if me in self.view.shard_map.draining:  # left by an earlier process of this name
            await self._membership.change(lambda m: replace(m, draining=m.draining - {me}))
        self._ticker = supervise("cluster_tick", self._keep_ticking)

    async def close(self) -> None:
        """Leave."""
        await cancel(self._ticker)
        await self._membership.close()

    # --- what the shard map asks of this instance -----------------------------------------------

    def _on_view(self, view: View) -> None:
        self._has_new_view.set()
        if self._has_leases:
            # Release 0.1.0, which does not say its version, publishes no beacons.
            self._gateway.beacons.members = frozenset(
                member.id for member in view.members.values() if member.report.version
            )
        before, self._applied = self._applied, view
        if before is None or _without_reports(before) != _without_reports(view):
            reachable = {
                member.id: Reach(
                    connect_url(member.url), member.incarnation, hears=member.state != "deaf"
                )
                for member in view.members.values()
                if member.url
            }
            self._gateway.apply(view.shard_map, reachable)
            self._check_name(view)
        for entry in self.history.add(view):
            if entry.kind not in _LOGGED_ELSEWHERE:
                log.info(
                    "cluster_changed",
                    kind=entry.kind,
                    member=entry.instance,
                    detail=entry.text,
                    epoch=view.shard_map.epoch,
                )
        me = self._config.instance
        if me in view.shard_map.draining and before is not None:
            self._on_drain()

    def _check_name(self, view: View) -> None:
        mine = view.members.get(self._config.instance)
        if self._config.is_member and mine is not None and mine.incarnation != self._incarnation:
            log.warning("instance_name_taken", member=mine.id)

    async def hand_over(self) -> None:
        """Give up this instance's shards so that its sessions can follow them, within one lease.

        In fan-out it returns at once, because every instance receives every message anyway.
        """
        if not self._config.is_member or self._is_static:
            return
        me = self._config.instance
        try:
            async with asyncio.timeout(self._config.lease_s):
                await self._membership.refresh()
                while self._successors() and self.view.shard_map.owned_by(me):
                    self._has_new_view.clear()
                    await self._has_new_view.wait()
        except (CoordinationError, TimeoutError) as error:
            log.warning("shards_not_handed_over", reason=str(error) or "no leader did it in time")

    def _successors(self) -> Collection[Member]:
        """The members that can take over shards."""
        return () if self.view.shard_map.mode == "fanout" else self._others_that_hear()

    def _others_that_hear(self) -> Collection[Member]:
        me, draining = self._config.instance, self.view.shard_map.draining
        return [
            member
            for member in self.view.members.values()
            if member.id != me and member.state == "active" and member.id not in draining
        ]

    # --- what operators and clients ask for -----------------------------------------------------

    async def whereabouts(self, recipient: str) -> Whereabouts:
        """Where ``recipient`` is connected. All instances are asked.

        An instance without the role ``gateway`` receives no answers, so all others count as silent.
        """
        me = self._config.instance
        others = sorted(member for member in self._members() if member != me)
        if not self._gateway.entrance.serves:
            return Whereabouts({}, others)
        return await self._gateway.roster.find(recipient, others)

    async def migrate(self, mode: Mode, *, force: bool) -> None:
        """Write ``mode`` into the shard map; the instances change to it afterwards.

        Raises:
            ConflictError: the cluster can't change to it now; the message says why.
            CoordinationError: the store is unavailable.
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
        """Make ``instance`` give up its shards, then its sessions.

        Raises:
            NotFoundError: the cluster has no such instance.
            CoordinationError: the store is unavailable.
        """
        if instance == self._config.instance:
            self._on_drain()
        elif instance in self.view.members:
            await self._membership.change(
                lambda shard_map: replace(shard_map, draining=shard_map.draining | {instance})
            )
        else:
            raise NotFoundError("this cluster has no such instance")

    def home_of(self, recipient: str) -> Home:
        """Where to connect for ``recipient``: its shard's owner, else this instance."""
        shard = shard_of(recipient, self._config.shard_count)
        routing, owner = self._gateway.shard_routing, None
        if self.view.shard_map.mode == "partitioned":
            owner = self.view.owner_of(shard)
        if routing.lets_go and (owner is None or owner.id == self._config.instance):
            owner = self.view.members.get(routing.refuge_for(recipient) or "")
        if owner is not None and owner.url and owner.state != "deaf":
            return Home(shard, owner.id, connect_url(owner.url))
        return Home(shard, self._config.instance, connect_url(self._config.advertise_url))

    def status(self) -> ClusterStatus:
        """The whole cluster, as far as this instance sees it."""
        shard_map, members = self.view.shard_map, self._members()
        return ClusterStatus(
            name=self._config.cluster,
            mode=shard_map.mode,
            epoch=shard_map.epoch,
            shard_count=shard_map.shard_count,
            instances=[
                InstanceStatus(
                    member,
                    state="draining" if member.id in shard_map.draining else member.state,
                    shards=sorted(shard_map.owned_by(member.id)),
                )
                for _, member in sorted(members.items())
            ],
            load=cluster_load(members.values(), shard_map.mode),
            noise_ratio=self._gateway.bridge.traffic.noise_ratio,
            red_line_ops_per_s=self._config.red_line_ops_per_s,
            is_over_red_line=self.red_line.is_over,
            engine=self._config.engine,
            seen_by=self._config.instance,
            history_count=self.history.count,
            trouble=" ".join(self._troubles()),
        )

    def _troubles(self) -> Iterator[str]:
        if self.trouble is not None:
            yield (
                f"The coordination store does not answer ({_in_words(self.trouble)})."
                " Until it is back, the last shard map stays in force."
            )
        subscriptions = self._gateway.subscriptions
        if subscriptions.is_in_doubt:
            reason = subscriptions.trouble or "what is subscribed may have missed something"
            yield (
                f"The transport is not known to deliver ({_in_words(reason)})."
                " Until it is, pokes may be late, and every session is checked by itself."
            )

    # --- what this instance reports -------------------------------------------------------------

    def _describe(self) -> Member:
        return Member(
            id=self._config.instance,
            url=self._url,
            incarnation=self._incarnation,
            weight=self._config.weight,
            joined_at_ms=self._joined_at_ms,
            sessions=len(self._gateway.sessions) - self.count_consoles(),
            state=self._state,
            report=self.meter.report(),
        )

    @property
    def _state(self) -> str:
        if self._gateway.draining:
            return "draining"
        return "deaf" if self._gateway.is_deaf else "active"

    def _members(self) -> Mapping[str, Member]:
        """All members as last seen, and this instance as it is now."""
        members = dict(self.view.members)
        if self._config.is_member:
            members[self._config.instance] = self._describe()
        return members

    async def _keep_ticking(self) -> None:
        await self.meter.tick(0.0)
        while True:
            await asyncio.sleep(_TICK_S)
            await self.meter.tick(_TICK_S)
            self._let_go_when_deaf()
            await self._watch_red_line()

    def _let_go_when_deaf(self) -> None:
        """Send the sessions elsewhere when only this instance is deaf.

        An outage of the engine makes all instances deaf, one within seconds of another. So this one
        waits as long as the leader does, two leases, to see whether the others still hear.
        """
        self._deaf_s = self._deaf_s + _TICK_S if self._gateway.is_deaf else 0.0
        waited = self._deaf_s >= 2 * self._config.lease_s
        can_go = (
            waited and self.trouble is None and not self._is_static and self._others_that_hear()
        )
        self._gateway.let_go(lets_go=bool(can_go))

    async def _watch_red_line(self) -> None:
        mode = self.view.shard_map.mode
        load = cluster_load(self._members().values(), mode)
        self.ops_per_s = load.ops_per_s
        now = asyncio.get_running_loop().time()
        await self.red_line.observe(load, mode, is_leader=self.is_leader, now=now)


def _in_words(reason: str) -> str:
    """``reason`` without numbers of errors, and with each address once."""
    reason = _REFUSED.sub("Connection refused", reason)
    return _REPEATED.sub(r"\1", _ERRNO.sub("", reason))


def connect_url(base: str) -> str:
    """The URL for WebSockets under ``base``; empty when ``base`` is empty."""
    return base and f"{base.rstrip('/')}{CONNECT_PATH}"


def _without_reports(view: View) -> tuple[object, ...]:
    """The parts of ``view`` that the gateway depends on."""
    return view.shard_map, frozenset(member.standing for member in view.members.values())

"""Membership, and the leader's work: one shard map for all, changed by compare-and-swap.

Every instance is a member: it renews its lease, reads the shard map and applies it. One member at a
time also leads: it plans the next map from the current members. A leader that slept through its
lease does no harm, because its write names an outdated revision and is refused.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import structlog

from pokebridge.assignment import balance, repair, ring
from pokebridge.backoff import spread
from pokebridge.coordination.base import Coordination, Document, Member
from pokebridge.errors import ConfigError, CoordinationError, PokebridgeError
from pokebridge.model import Mode
from pokebridge.placement import ShardMap
from pokebridge.supervisor import cancel, supervise

log = structlog.get_logger(__name__)

_encode = msgspec.json.Encoder(order="sorted").encode
_decode = msgspec.json.Decoder(ShardMap).decode
_WRITE_ATTEMPTS = 10


def empty_map(shard_count: int, mode: Mode) -> ShardMap:
    """The shard map of a cluster that has not written one yet."""
    return ShardMap(epoch=0, mode=mode, owners=(None,) * shard_count)


class Planner:
    """Plans the next shard map from the current one and the members; ``now`` is in seconds.

    A shard whose owner is gone or drains moves at once. A shard whose owner is deaf moves when the
    owner has been deaf for ``settle_s`` and another member hears: an outage of the engine makes all
    members deaf, one within seconds of another, and then nothing should move. A move that only
    evens the load waits until no member has joined, left, become deaf or heard again for
    ``settle_s``, so that a rolling restart does not shuffle the cluster at every step.
    """

    def __init__(self, settle_s: float = 10.0) -> None:
        self._settle_s = settle_s
        self._seen: frozenset[tuple[str, str, bool]] = frozenset()
        self._changed_at = float("-inf")
        # Since when each deaf member is known to be deaf.
        self._deaf_since: Mapping[str, float] = {}

    def see(self, members: Sequence[Member], now: float) -> None:
        """Note the current members. A follower notes them too, in case it becomes the leader."""
        seen = frozenset(
            (member.id, member.incarnation, member.state == "deaf") for member in members
        )
        if seen != self._seen:
            self._seen, self._changed_at = seen, now
        self._deaf_since = {
            id_: self._deaf_since.get(id_, now) for id_, _, is_deaf in seen if is_deaf
        }

    def weights(
        self, members: Collection[Member], draining: Collection[str], now: float
    ) -> dict[str, float]:
        """The members that may own shards, and their weights."""
        states = {"active", "deaf"}
        able = [each for each in members if each.id not in draining and each.state in states]
        if any(each.state == "active" for each in able):
            able = [
                each for each in able if now - self._deaf_since.get(each.id, now) < self._settle_s
            ]
        return {each.id: each.weight for each in able}

    def plan(self, current: ShardMap, members: Sequence[Member], now: float) -> ShardMap | None:
        """The map that should replace ``current``; ``None`` when ``current`` can stay."""
        self.see(members, now)
        settled = now - self._changed_at >= self._settle_s
        draining = current.draining & {member.id for member in members}
        weights = self.weights(members, draining, now)
        owners = current.owners
        if any(owner is not None for owner in owners) or settled:
            owners = repair(owners, weights)
        if settled:
            owners = balance(owners, weights)
        if (owners, draining) == (current.owners, current.draining):
            return None
        return replace(current, epoch=current.epoch + 1, owners=owners, draining=draining)


@dataclass(frozen=True, slots=True)
class View:
    """The cluster as one member last saw it."""

    shard_map: ShardMap
    members: Mapping[str, Member]

    def owner_of(self, shard: int) -> Member | None:
        """The member that owns ``shard``; ``None`` when it has no owner, or one that is gone."""
        owner = self.shard_map.owners[shard]
        return None if owner is None else self.members.get(owner)


class Membership:
    """One member's part: it renews its lease, reads the cluster, and leads when it is elected.

    Args:
        coordination: the store that all members share.
        describe: returns this member's record, at every renewal. ``None`` for a coordinator that
            runs alone: it leads and owns no shards.
        holder: the name under which it leads, different for each process.
        shard_count: the number of shards, the same for every member.
        mode: the initial mode. Ignored once the cluster has a shard map.
        on_view: called with every new view, on the event loop's thread.
        lease_s: seconds after which a silent member counts as gone.
        leads: whether this member may lead.
        by_ring: whether the ring of live members decides who owns a shard, instead of a leader.
        planner: plans the shard map; one with ``settle_s`` of two leases by default.
    """

    def __init__(
        self,
        coordination: Coordination,
        describe: Callable[[], Member] | None,
        *,
        holder: str,
        shard_count: int,
        mode: Mode,
        on_view: Callable[[View], None],
        lease_s: float,
        leads: bool = True,
        by_ring: bool = False,
        planner: Planner | None = None,
    ) -> None:
        self._coordination = coordination
        self._describe = describe
        self._holder = holder
        self._on_view = on_view
        self._lease_s = lease_s
        self._leads = leads and not by_ring
        self._by_ring = by_ring
        self._planner = planner or Planner(settle_s=2 * lease_s)
        self._view = View(empty_map(shard_count, mode), {})
        self._task: asyncio.Task[None] | None = None
        self._one_round = asyncio.Lock()
        self._is_leader = False
        self._in_touch_since_s = self._last_seen_s = float("-inf")
        self._trouble: str | None = "the cluster has not been seen yet"

    @property
    def view(self) -> View:
        """The cluster as last seen."""
        return self._view

    @property
    def is_leader(self) -> bool:
        """Whether this member was the leader at its last round."""
        return self._is_leader and self._trouble is None

    @property
    def trouble(self) -> str | None:
        """Why the store is unavailable; ``None`` when it is available."""
        return self._trouble

    async def start(self) -> None:
        """Join, see the cluster once, then keep up with it.

        Raises:
            CoordinationError: the store is unavailable. A start fails then instead of waiting.
            ConfigError: the cluster has another number of shards.
        """
        await self._round()
        self._task = supervise("membership", self._keep_up)

    async def close(self) -> None:
        """Leave at once, so that the other members need not wait for the lease to run out."""
        await cancel(self._task)
        self._task = None
        try:
            if self._leads:
                await self._coordination.resign(self._holder)
            if self._describe is not None:
                member = self._describe()
                await self._coordination.leave(member.id, member.incarnation)
        except CoordinationError as error:
            log.warning("cluster_leave_failed", reason=str(error))

    async def refresh(self) -> None:
        """Renew now, so that the other members see this one as it is, and read the cluster.

        Raises:
            CoordinationError: the store is unavailable.
        """
        await self._round()

    async def change(self, edit: Callable[[ShardMap], ShardMap]) -> ShardMap:
        """Write ``edit`` of the current map, leader or not; returns the map in force afterwards.

        Raises:
            CoordinationError: the store is unavailable, or other members kept writing first.
        """
        for _ in range(_WRITE_ATTEMPTS):
            shard_map, stored = await self._read()
            edited = edit(shard_map)
            if edited == shard_map:
                return shard_map
            edited = replace(edited, epoch=shard_map.epoch + 1)
            if await self._write(edited, stored):
                self._see(edited, self._view.members.values())
                return edited
        raise CoordinationError("other instances keep changing the shard map: try again")

    # --- keeping up -------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        while True:
            try:
                # Three renewals per lease: one may be lost and the next one late.
                pause_s = spread(self._lease_s / 3, 0.8, 1.0)
                await self._coordination.wait_for_change(pause_s)
                async with asyncio.timeout(self._lease_s):
                    await self._round()
            except (PokebridgeError, TimeoutError) as error:
                self._lose(str(error) or "the store does not answer")
                await asyncio.sleep(spread(self._lease_s / 3, 0.5, 1.0))
            except Exception:
                self._lose("an unforeseen error, see the log")
                raise

    def _lose(self, trouble: str) -> None:
        if self._trouble is None:
            log.warning("coordination_lost", reason=trouble)
        self._trouble = trouble

    async def _round(self) -> None:
        async with self._one_round:
            await self._renew_and_see()

    async def _renew_and_see(self) -> None:
        if self._describe is not None:
            await self._coordination.renew(self._describe(), self._lease_s)
        members = await self._coordination.members()
        shard_map, stored = await self._read()
        self._note_contact(lost_data=stored is None)
        self._planner.see(members, self._last_seen_s)
        self._is_leader = self._leads and await self._coordination.lead(self._holder, self._lease_s)
        if self._is_leader:
            shard_map = await self._lead(shard_map, stored, members)
        elif self._remembers(shard_map) and shard_map.epoch > 0:
            shard_map = await self._restore(shard_map, stored)
        if self._trouble is not None:
            log.info("cluster_seen", epoch=shard_map.epoch, members=len(members))
            self._trouble = None
        self._see(shard_map, members)

    def _note_contact(self, *, lost_data: bool) -> None:
        """Note since when the list of members has been seen without a break.

        A break is an outage of the store or a pause of this process longer than a lease, or a loss
        of the store's data. For a lease after it, a member that is not listed may only be late.
        """
        now_s = asyncio.get_running_loop().time()
        if lost_data or now_s - self._last_seen_s > self._lease_s:
            self._in_touch_since_s = now_s
        self._last_seen_s = now_s

    async def _lead(
        self, shard_map: ShardMap, stored: Document | None, members: Sequence[Member]
    ) -> ShardMap:
        """Do the leader's work of one round; returns the map in force afterwards."""
        planned = None
        if self._last_seen_s - self._in_touch_since_s >= self._lease_s:
            planned = self._planner.plan(shard_map, members, self._last_seen_s)
        if planned is None and self._remembers(shard_map):
            return await self._restore(shard_map, stored)
        if planned is None or not await self._write(planned, stored):
            return shard_map
        log.info("shard_map_changed", epoch=planned.epoch, members=len(members))
        return planned

    def _remembers(self, shard_map: ShardMap) -> bool:
        """Whether ``shard_map`` is remembered here, and the store's is older or missing."""
        return shard_map is self._view.shard_map

    async def _restore(self, shard_map: ShardMap, stored: Document | None) -> ShardMap:
        """Write the remembered map into a store that is new, or has lost its data.

        Every member that remembers a map does so, not only the leader. A leader that has just
        started would begin a map of its own, and members that know a higher epoch ignore that.
        """
        restored = replace(shard_map, epoch=shard_map.epoch + 1)
        if not await self._write(restored, stored):
            return shard_map
        log.info("shard_map_restored", epoch=restored.epoch)
        return restored

    async def _read(self) -> tuple[ShardMap, Document | None]:
        """The map in force, and the document to replace.

        A document older than the map known here means that the store has lost data. Then the known
        map stays in force, and the next write restores it.
        """
        stored = await self._coordination.read()
        known = self._view.shard_map
        if stored is None or not stored.body:
            return known, stored
        try:
            shard_map = _decode(stored.body)
        except msgspec.MsgspecError as error:
            raise CoordinationError(f"the shard map in the store is invalid: {error}") from None
        if shard_map.shard_count != known.shard_count:
            raise ConfigError(
                f"shard_count: the cluster has {shard_map.shard_count}, "
                f"this instance {known.shard_count}"
            )
        return (shard_map if shard_map.epoch >= known.epoch else known), stored

    async def _write(self, shard_map: ShardMap, stored: Document | None) -> bool:
        revision = None if stored is None else stored.revision
        return await self._coordination.write(_encode(shard_map), revision)

    def _see(self, shard_map: ShardMap, members: Collection[Member]) -> None:
        """Adopt a view, unless its map is older than the one in force."""
        if shard_map.epoch < self._view.shard_map.epoch:
            return
        if self._by_ring:
            weights = self._planner.weights(members, shard_map.draining, self._last_seen_s)
            shard_map = replace(shard_map, owners=ring(shard_map.shard_count, weights))
        view = View(shard_map, {member.id: member for member in members})
        if view != self._view:
            self._view = view
            self._on_view(view)

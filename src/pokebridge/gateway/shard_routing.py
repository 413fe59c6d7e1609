"""Which instance serves a recipient, and what this instance must subscribe to."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from pokebridge.model import Selection
from pokebridge.placement import Placement, ShardMap
from pokebridge.sharding import shard_of


class Reach(NamedTuple):
    """The URL of a member, and its incarnation: a restarted member has a new one."""

    url: str
    incarnation: str


class ShardRouting:
    """The last shard map, the URLs of the members, and the shards of the sessions here."""

    def __init__(self, instance: str, shard_map: ShardMap, placement: Placement) -> None:
        self._instance = instance
        self._map = shard_map
        self._members: Mapping[str, Reach] = {}
        self._placement = placement
        self._interest: Counter[int] = Counter()

    @property
    def shard_map(self) -> ShardMap:
        """The map in force."""
        return self._map

    @property
    def interest(self) -> frozenset[int]:
        """The shards of the sessions here."""
        return frozenset(self._interest)

    def see(self, shard_map: ShardMap, members: Mapping[str, Reach]) -> frozenset[int]:
        """Take over a shard map and the URLs of its members.

        Returns the shards that are now served elsewhere, and were not before: their sessions here
        should follow. That includes the shards of an owner that restarted within its lease,
        because its sessions have fled to other instances.
        """
        owners = {shard: self._owner_of(shard) for shard in self._interest}
        self._map, self._members = shard_map, members
        return frozenset(
            shard
            for shard, before in owners.items()
            if self._url_of(shard) is not None and self._owner_of(shard) != before
        )

    def url_for(self, recipient: str) -> str | None:
        """The URL of the owner of ``recipient``'s shard, ``None`` if that is here or unknown."""
        return self._url_of(shard_of(recipient, self._map.shard_count))

    def wanted(self, now: float) -> frozenset[Selection]:
        """What to subscribe to. ``now`` is seconds on a monotonic clock."""
        return self._placement.decide(self._map, self.interest, now)

    def enter(self, recipient: str) -> bool:
        """A session of ``recipient`` begins here. Returns whether it is the first of its shard."""
        shard = shard_of(recipient, self._map.shard_count)
        self._interest[shard] += 1
        return self._interest[shard] == 1

    def leave(self, recipient: str) -> None:
        """A session of ``recipient`` has ended here."""
        shard = shard_of(recipient, self._map.shard_count)
        self._interest[shard] -= 1
        if not self._interest[shard]:
            del self._interest[shard]

    def _owner_of(self, shard: int) -> tuple[str, str | None] | None:
        owner = self._map.owners[shard] if self._map.mode == "partitioned" else None
        if owner is None:
            return None
        member = self._members.get(owner)
        return owner, member and member.incarnation

    def _url_of(self, shard: int) -> str | None:
        if self._map.mode == "fanout":
            return None
        owner, here = self._map.owners[shard], self._members.get(self._instance)
        member = None if owner is None or owner == self._instance else self._members.get(owner)
        # Behind a shared URL a client can't choose its instance, so a move would be pointless.
        return None if member is None or (here and here.url == member.url) else member.url

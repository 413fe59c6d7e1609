"""Which instance serves a recipient, and what this instance must subscribe to."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32

from pokebridge.model import Selection
from pokebridge.placement import Placement, ShardMap
from pokebridge.sharding import shard_of


class Reach(NamedTuple):
    """Where a member is reached.

    A restarted member has a new ``incarnation``. ``hears`` is false while its transport fails.
    """

    url: str
    incarnation: str
    hears: bool = True


class ShardRouting:
    """The last shard map, the URLs of the members, and the shards of the sessions here."""

    def __init__(self, instance: str, shard_map: ShardMap, placement: Placement) -> None:
        self._instance = instance
        self._map = shard_map
        self._members: Mapping[str, Reach] = {}
        self._placement = placement
        self._interest: Counter[int] = Counter()
        self.lets_go = False
        """Whether clients are sent to any other member that hears, because this one is deaf."""

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
        should follow. That includes the shards of an owner that restarted within its lease, because
        its sessions have moved to other instances.
        """
        owners = {shard: self._owner_of(shard) for shard in self._interest}
        self._map, self._members = shard_map, members
        return frozenset(
            shard
            for shard, before in owners.items()
            if self._url_of(shard) is not None and self._owner_of(shard) != before
        )

    def url_for(self, recipient: str) -> str | None:
        """The URL of the member that should serve ``recipient``.

        It is the owner of the recipient's shard. ``None`` if that is this instance or unknown, and
        while the owner is deaf. While this instance gives up its sessions, another member replaces
        it.
        """
        url = self._url_of(shard_of(recipient, self._map.shard_count))
        if url is None and self.lets_go and (refuge := self.refuge_for(recipient)) is not None:
            return self._members[refuge].url
        return url

    def refuge_for(self, recipient: str) -> str | None:
        """Another member that hears, for a client that this instance can't serve; spread evenly."""
        here = self._members.get(self._instance)
        others = sorted(
            id_
            for id_, member in self._members.items()
            if id_ != self._instance and member.hears and not (here and here.url == member.url)
        )
        return others[crc32(recipient.encode()) % len(others)] if others else None

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

    def _owner_of(self, shard: int) -> tuple[str, str | None, bool] | None:
        owner = self._map.owners[shard] if self._map.mode == "partitioned" else None
        if owner is None:
            return None
        member = self._members.get(owner)
        return (owner, None, False) if member is None else (owner, *member[1:])

    def _url_of(self, shard: int) -> str | None:
        if self._map.mode == "fanout":
            return None
        owner, here = self._map.owners[shard], self._members.get(self._instance)
        member = None if owner is None or owner == self._instance else self._members.get(owner)
        if member is None or not member.hears:
            return None
        # Behind a shared URL a client can't choose its instance, so a move would be pointless.
        return None if here and here.url == member.url else member.url

"""Where a recipient is at home, and what this instance must therefore hold."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from pokebridge.model import Selection
from pokebridge.placement import Placement, ShardMap
from pokebridge.sharding import shard_of


class Reach(NamedTuple):
    """Where a member is reached, and which of its lives that is."""

    url: str
    incarnation: str


class ShardRouting:
    """The last shard map, where the members are reached, and the shards of the sessions here."""

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
        """Take over a map and where its members are reached.

        Returns the shards that have their home elsewhere now and had not before: their sessions
        here should follow. An owner that is back from the dead before anybody missed it is a new
        home: its sessions have fled from it.
        """
        homes = {shard: self._home_of(shard) for shard in self._interest}
        self._map, self._members = shard_map, members
        return frozenset(
            shard
            for shard, before in homes.items()
            if self._url_of(shard) is not None and self._home_of(shard) != before
        )

    def url_for(self, recipient: str) -> str | None:
        """Where ``recipient`` is at home, when that is another instance that can be reached."""
        return self._url_of(shard_of(recipient, self._map.shard_count))

    def wanted(self, now: float) -> frozenset[Selection]:
        """What to have subscribed; ``now`` in seconds of a monotonic clock."""
        return self._placement.decide(self._map, self.interest, now)

    def enter(self, recipient: str) -> bool:
        """A session of ``recipient`` begins here; whether it is the first of its shard."""
        shard = shard_of(recipient, self._map.shard_count)
        self._interest[shard] += 1
        return self._interest[shard] == 1

    def leave(self, recipient: str) -> None:
        """A session of ``recipient`` has ended here."""
        shard = shard_of(recipient, self._map.shard_count)
        self._interest[shard] -= 1
        if not self._interest[shard]:
            del self._interest[shard]

    def _home_of(self, shard: int) -> tuple[str, str | None] | None:
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
        # Instances that share one URL can't be told apart by it: a move would lead anywhere.
        return None if member is None or (here and here.url == member.url) else member.url

"""Which shards an instance subscribes to: ``subscribed = owned + interest`` (ARCHITECTURE.md).

Ownership is for efficiency: the shard map gives each shard one owner, and clients are led there.
Interest is for correctness: whoever has a session has its shard too, owner or not. So a stale map,
two believed owners or a dead Coordinator cost extra deliveries, and never silence.

Every change is make-before-break: ``next_steps`` lets an old subscription go only when whatever it
covered is covered by others that are proven live.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from pokebridge.model import Feed, Mode, Selection


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Who owns what, stamped with an epoch that only grows.

    ``owners[shard]`` is an instance's id, ``None`` while nobody has it. ``draining`` are the
    instances that are to give everything up.
    """

    epoch: int
    mode: Mode
    owners: tuple[str | None, ...]
    draining: frozenset[str] = frozenset()

    @property
    def shard_count(self) -> int:
        """How many shards there are, the same everywhere in a cluster."""
        return len(self.owners)

    def owned_by(self, instance: str) -> frozenset[int]:
        """The shards that ``instance`` owns."""
        return frozenset(shard for shard, owner in enumerate(self.owners) if owner == instance)


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """When what an instance subscribes to changes its kind."""

    linger_s: float = 30.0
    """A shard without owner's duty and sessions stays so long: its clients often come back."""
    widen_at: float = 0.8
    """From this share of the shards on, one unfiltered subscription serves instead ..."""
    narrow_at: float = 0.65
    """... and down to this one, single shards again."""


class Placement:
    """Decides what one instance wants subscribed. Callers pass ``now`` in seconds."""

    def __init__(self, instance: str, rules: PlacementRules | None = None) -> None:
        self._instance = instance
        self._rules = rules or PlacementRules()
        self._needed_at: dict[int, float] = {}
        self._wide = False

    def decide(
        self, shard_map: ShardMap, interest: AbstractSet[int], now: float
    ) -> frozenset[Selection]:
        """What to have subscribed, given the map and the shards of the sessions here."""
        if shard_map.mode == "fanout":
            self._needed_at.clear()
            return frozenset({Feed.ALL})
        for shard in shard_map.owned_by(self._instance) | interest:
            self._needed_at[shard] = now
        self._needed_at = {
            shard: needed_at
            for shard, needed_at in self._needed_at.items()
            if now - needed_at < self._rules.linger_s and shard < shard_map.shard_count
        }
        share = len(self._needed_at) / shard_map.shard_count
        self._wide = share >= (self._rules.narrow_at if self._wide else self._rules.widen_at)
        if self._wide:
            return frozenset({Feed.ALL})
        return frozenset({Feed.UNTAGGED, *self._needed_at})


class Steps(NamedTuple):
    """What to do now: subscribe (and prove), and drop. Whatever else is held is kept."""

    subscribe: frozenset[Selection]
    drop: frozenset[Selection]


def next_steps(wanted: AbstractSet[Selection], held: Mapping[Selection, bool]) -> Steps:
    """The way from what is ``held`` (selection → proven live) towards what is ``wanted``.

    A subscription goes when nobody wants it and whatever replaces it is proven live: between
    kinds, that is all that is wanted; among shards, nothing, for nobody here needs that shard.
    """
    changes_kind = (Feed.ALL in held) != (Feed.ALL in wanted) or Feed.ALL in wanted
    settled = all(held.get(selection, False) for selection in wanted)
    drop = held.keys() - wanted if settled or not changes_kind else frozenset()
    return Steps(frozenset(wanted - held.keys()), frozenset(drop))

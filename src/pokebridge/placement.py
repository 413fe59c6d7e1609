"""Which shards an instance subscribes to: ``subscribed = owned + interest`` (ARCHITECTURE.md).

Ownership is for efficiency: the shard map gives each shard one owner, and clients are sent there.
Interest is for correctness: an instance with a session is subscribed to the session's shard, even
if another instance owns it. So an outdated map, two instances that believe they own one shard, or a
dead Coordinator cost extra deliveries, but never silence.

Every change is make-before-break: ``next_steps`` drops an old subscription only when all that it
covered is covered by others that are proven live.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from pokebridge.model import Feed, Mode, Selection


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Which instance owns each shard. The epoch grows with every change.

    ``owners[shard]`` is an instance's id, ``None`` while the shard has no owner. ``draining`` are
    the instances that must give up all their shards.
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
    """When an instance changes what it subscribes to."""

    linger_s: float = 30.0
    """How long a shard that is no longer needed stays subscribed. Clients often come back."""
    widen_at: float = 0.8
    """With this share of the shards or more, one subscription for everything replaces them."""
    narrow_at: float = 0.65
    """Below this share, subscriptions for single shards replace it again."""


class Placement:
    """Decides what one instance subscribes to. Callers pass ``now`` in seconds."""

    def __init__(self, instance: str, rules: PlacementRules | None = None) -> None:
        self._instance = instance
        self._rules = rules or PlacementRules()
        self._needed_at: dict[int, float] = {}
        self._wide = False

    def decide(
        self, shard_map: ShardMap, interest: AbstractSet[int], now: float
    ) -> frozenset[Selection]:
        """What to subscribe to, given the map and the shards of the sessions here."""
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
    """What to open and prove, and what to close. All other subscriptions are kept."""

    subscribe: frozenset[Selection]
    drop: frozenset[Selection]


def next_steps(wanted: AbstractSet[Selection], held: Mapping[Selection, bool]) -> Steps:
    """The next steps from what is ``held`` (selection → proven live) to what is ``wanted``.

    A subscription that is not wanted is dropped once its replacement is live:

    - From everything to single shards, or back: all that is wanted must be live first.
    - From some shards to others: nothing replaces a shard, because nobody here needs it any more.
      It is dropped at once.
    """
    changes_kind = (Feed.ALL in held) != (Feed.ALL in wanted) or Feed.ALL in wanted
    settled = all(held.get(selection, False) for selection in wanted)
    drop = held.keys() - wanted if settled or not changes_kind else frozenset()
    return Steps(frozenset(wanted - held.keys()), frozenset(drop))

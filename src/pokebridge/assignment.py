"""Who should own which shard: pure functions from members to owners (docs/roadmap.md).

There are two ways. The *ring* is rendezvous hashing (Thaler and Ravishankar, 1998): every instance
computes the same owners from the same members, and nothing has to be stored. The *balanced* way is
the Coordinator's: it starts from the present owners, keeps the counts within one of each member's
fair share, and moves only what must move.
"""

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import shake_128

Owners = Sequence[str | None]
Weights = Mapping[str, float]
"""Instance id → its weight, above 0: one with twice the weight gets twice the shards."""

_HASH_BYTES = 8
_HASHES = 2.0 ** (8 * _HASH_BYTES)


def ring(shard_count: int, weights: Weights) -> tuple[str | None, ...]:
    """The owner of each shard by weighted rendezvous hashing. ``None`` when there is no member.

    Each member's hashes for all shards are one output of SHAKE-128 of its id, so that a thousand
    members and ten thousand shards take about a second. The highest ``-weight / ln(hash)`` of a
    shard wins it, with hashes in (0, 1). A member that leaves gives up its own
    shards and no others move; one that joins takes its share, evenly from all.
    """
    owners: list[str | None] = [None] * shard_count
    best = [-math.inf] * shard_count
    for weight, members in _by_weight(weights).items():
        # Among equals the highest hash wins; only the winner's needs its weighted score.
        for shard, (number, member) in enumerate(_highest(members, shard_count)):
            score = -weight / math.log((number + 0.5) / _HASHES)
            if score > best[shard]:
                best[shard] = score
                owners[shard] = member
    return tuple(owners)


def _by_weight(weights: Weights) -> dict[float, list[str]]:
    groups: dict[float, list[str]] = {}
    for member in sorted(weights):
        groups.setdefault(weights[member], []).append(member)
    return groups


def _highest(members: Sequence[str], shard_count: int) -> list[tuple[int, str]]:
    """For each shard the highest hash among ``members``, and whose it is."""
    highest = [-1] * shard_count
    owners = [""] * shard_count
    for member in members:
        digest = shake_128(member.encode()).digest(shard_count * _HASH_BYTES)
        for shard, number in enumerate(array("Q", digest)):
            if number > highest[shard]:
                highest[shard] = number
                owners[shard] = member
    return list(zip(highest, owners, strict=True))


def quotas(shard_count: int, weights: Weights, held: Mapping[str, int]) -> dict[str, int]:
    """How many shards each member should own: its fair share, rounded down or up.

    The rounding favours members that have more shards now, so that it never moves a shard.
    """
    total = sum(weights.values())
    shares = {member: shard_count * weight / total for member, weight in weights.items()}
    result = {member: math.floor(share + 1e-9) for member, share in shares.items()}
    spare = shard_count - sum(result.values())

    def claim(member: str) -> tuple[bool, float, str]:
        keeps_it = held.get(member, 0) > result[member]
        return (not keeps_it, result[member] - shares[member], member)

    # A member whose share is whole has no claim to more.
    fractional = [member for member in shares if shares[member] - result[member] > 1e-9]
    for member in sorted(fractional, key=claim)[:spare]:
        result[member] += 1
    return result


def repair(owners: Owners, weights: Weights) -> tuple[str | None, ...]:
    """Give the shards of former members to the members with the most room. Move no others."""
    if not weights:
        return (None,) * len(owners)
    held = Counter(owner for owner in owners if owner in weights)
    room = [(held[member] / weight, member) for member, weight in weights.items()]
    heapq.heapify(room)
    repaired = list(owners)
    for shard, owner in enumerate(owners):
        if owner not in weights:
            _, member = room[0]
            repaired[shard] = member
            held[member] += 1
            heapq.heapreplace(room, (held[member] / weights[member], member))
    return tuple(repaired)


def balance(owners: Owners, weights: Weights) -> tuple[str | None, ...]:
    """Owners with every member at its quota, by the fewest moves.

    Losing one of N members moves only its own shards, adding one at most ⌈shards / N⌉.
    """
    if not weights:
        return (None,) * len(owners)
    held = Counter(owner for owner in owners if owner is not None)
    left = quotas(len(owners), weights, held)
    balanced: list[str | None] = []
    for owner in owners:
        if owner is not None and left.get(owner, 0) > 0:
            left[owner] -= 1
            balanced.append(owner)
        else:
            balanced.append(None)
    takers = [member for member in sorted(left) for _ in range(left[member])]
    return tuple(takers.pop() if owner is None else owner for owner in balanced)

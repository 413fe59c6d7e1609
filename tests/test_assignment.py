"""Who owns which shard: balance, and how little moves."""

import math
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokebridge.assignment import balance, quotas, repair, ring

ids = st.text("abcdefghij0123456789-", min_size=1, max_size=6)
weights = st.dictionaries(ids, st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=9)
equal = st.sets(ids, min_size=1, max_size=12).map(lambda names: dict.fromkeys(names, 1.0))
shard_counts = st.integers(1, 300)


def moved(before: tuple[str | None, ...], after: tuple[str | None, ...]) -> set[int]:
    """The shards whose owner changed."""
    return {shard for shard, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}


def within_one(owners: tuple[str | None, ...], members: dict[str, float]) -> bool:
    """Whether every member is within one shard of its fair share."""
    held = Counter(owners)
    total = sum(members.values())
    return all(
        abs(held[member] - len(owners) * weight / total) < 1 + 1e-6
        for member, weight in members.items()
    )


@given(shard_counts, weights)
def test_from_nothing_everyone_gets_a_fair_share(count: int, members: dict[str, float]) -> None:
    """The first assignment gives every shard an owner, and the shares differ by at most one."""
    owners = balance((None,) * count, members)
    assert set(owners) <= members.keys()
    assert within_one(owners, members)
    assert sum(quotas(count, members, {}).values()) == count


@given(shard_counts, equal, st.data())
def test_losing_a_member_moves_only_its_shards(
    count: int, members: dict[str, float], data: st.DataObject
) -> None:
    """Both ways, and the ring: the survivors keep what they had, and stay in balance."""
    lost = data.draw(st.sampled_from(sorted(members)))
    survivors = {member: weight for member, weight in members.items() if member != lost}
    before = balance((None,) * count, members)
    its_shards = {shard for shard, owner in enumerate(before) if owner == lost}
    for change in (balance, repair):
        after = change(before, survivors)
        assert moved(before, after) == its_shards
        assert not survivors or within_one(after, survivors)
    by_ring = ring(count, members)
    its_ring_shards = {shard for shard, owner in enumerate(by_ring) if owner == lost}
    assert moved(by_ring, ring(count, survivors)) == its_ring_shards


@given(shard_counts, equal, ids)
def test_a_new_member_takes_its_share_and_no_more(
    count: int, members: dict[str, float], new: str
) -> None:
    """Adding one of N moves at most ceil(shards / N), all of them to the new one."""
    before = balance((None,) * count, members)
    grown = {**members, new: 1.0}
    after = balance(before, grown)
    changed = moved(before, after)
    assert len(changed) <= math.ceil(count / len(grown))
    assert {after[shard] for shard in changed} <= {new}
    assert within_one(after, grown)
    by_ring, grown_ring = ring(count, members), ring(count, grown)
    assert {grown_ring[shard] for shard in moved(by_ring, grown_ring)} <= {new}


@given(shard_counts, weights, st.integers(0, 2**32))
def test_balance_is_a_fixed_point(count: int, members: dict[str, float], seed: int) -> None:
    """Balancing a balanced assignment moves nothing, whatever its owners are."""
    names = [*sorted(members), None, "gone"]
    start = tuple(names[(seed * (shard + 1) + shard) % len(names)] for shard in range(count))
    once = balance(start, members)
    assert within_one(once, members)
    assert balance(once, members) == once


@given(weights, st.lists(st.tuples(st.booleans(), ids), max_size=20))
def test_rolling_changes_leave_the_map_balanced(
    members: dict[str, float], changes: list[tuple[bool, str]]
) -> None:
    """After any joins and leaves, repaired and then balanced, everyone has a fair share."""
    members = dict(members)
    owners = balance((None,) * 100, members)
    for join, who in changes:
        if join:
            members[who] = 1.0
        elif len(members) > 1:
            members.pop(who, None)
        owners = balance(repair(owners, members), members)
        assert within_one(owners, members)


def test_the_ring_shares_out_by_weight() -> None:
    """With many shards each member's part of the ring comes near its weight."""
    held = Counter(ring(10_000, {"a": 1.0, "b": 1.0, "c": 2.0}))
    assert held["a"] == pytest.approx(2500, rel=0.1)
    assert held["b"] == pytest.approx(2500, rel=0.1)
    assert held["c"] == pytest.approx(5000, rel=0.1)


def test_nobody_left() -> None:
    """Without members no shard has an owner."""
    assert ring(3, {}) == repair(("a",) * 3, {}) == balance(("a",) * 3, {}) == (None,) * 3


def test_a_large_cluster_is_assigned_fast() -> None:
    """1,000 instances and 10,000 shards: from scratch in bounded time, several times over."""
    members = {f"instance-{number}": 1.0 for number in range(1000)}
    started_s = time.process_time()
    owners = balance((None,) * 10_000, members)
    assert set(Counter(owners).values()) == {10}
    assert time.process_time() - started_s < 1.0
    started_s = time.process_time()
    assert len(set(ring(10_000, members))) > 990
    assert time.process_time() - started_s < 10.0

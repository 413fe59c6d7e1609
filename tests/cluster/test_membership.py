"""The Coordinator's plan, and members that keep up with it over the in-process store."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from pokebridge.cluster.membership import Membership, Planner, View, empty_map
from pokebridge.coordination.base import Member
from pokebridge.coordination.memory import MemoryCoordination
from pokebridge.errors import CoordinationError
from pokebridge.placement import ShardMap
from tests.support.waiting import wait_until

SETTLE_S = 10.0
COUNT = 12


def member(name: str, incarnation: str = "1") -> Member:
    """An active member's record."""
    return Member(name, f"ws://{name}.example", incarnation, weight=1.0, joined_at_ms=0)


def settled_map(planner: Planner, names: str, current: ShardMap | None = None) -> ShardMap:
    """The map once ``names`` have been members for the settle time."""
    members = [member(name) for name in names]
    current = current or empty_map(COUNT, "partitioned")
    current = planner.plan(current, members, 0) or current
    return planner.plan(current, members, SETTLE_S) or current


def test_a_new_cluster_waits_until_its_members_have_settled() -> None:
    """The first member does not grab every shard: the first map comes after the settle time."""
    planner = Planner(SETTLE_S)
    nothing = empty_map(COUNT, "partitioned")
    assert planner.plan(nothing, [member("a")], 0) is None
    assert planner.plan(nothing, [member("a"), member("b")], 9) is None
    planned = planner.plan(nothing, [member("a"), member("b")], 19)
    assert planned is not None
    assert Counter(planned.owners) == {"a": 6, "b": 6}
    assert planned.epoch == 1


def test_a_dead_members_shards_move_at_once_and_no_others() -> None:
    """Shards of a dead member move at once. All others stay."""
    planner = Planner(SETTLE_S)
    before = settled_map(planner, "abc")
    after = planner.plan(before, [member("a"), member("b")], SETTLE_S + 0.1)
    assert after is not None
    moved = {s for s in range(COUNT) if before.owners[s] != after.owners[s]}
    assert moved == before.owned_by("c")
    assert Counter(after.owners) == {"a": 6, "b": 6}


def test_a_newcomer_gets_its_share_only_after_the_settle_time() -> None:
    """A rolling restart does not shuffle the cluster at every step."""
    planner = Planner(SETTLE_S)
    before = settled_map(planner, "ab")
    three = [member(name) for name in "abc"]
    assert planner.plan(before, three, 11) is None
    after = planner.plan(before, three, 11 + SETTLE_S)
    assert after is not None
    assert Counter(after.owners) == {"a": 4, "b": 4, "c": 4}
    assert planner.plan(after, three, 100) is None


def test_a_draining_member_gives_everything_up_at_once() -> None:
    """A draining member's shards move. The mark is removed once the member has left."""
    planner = Planner(SETTLE_S)
    before = replace(settled_map(planner, "ab"), draining=frozenset("b"))
    after = planner.plan(before, [member("a"), member("b")], 11)
    assert after is not None
    assert set(after.owners) == {"a"}
    gone = planner.plan(after, [member("a")], 12)
    assert gone is not None
    assert gone.draining == frozenset()


def test_a_leader_of_old_does_not_lead_on_old_knowledge() -> None:
    """Changes that a former leader did not see restart the settle time."""
    planner = Planner(SETTLE_S)
    three = [member(name) for name in "abc"]
    unfair = replace(settled_map(planner, "abc"), owners=("a",) * COUNT)
    planner.see(three, 11)
    planner.see([member("a"), member("b")], 90)
    planner.see(three, 99)
    assert planner.plan(unfair, three, 100) is None
    assert planner.plan(unfair, three, 99 + SETTLE_S) is not None


class Cluster:
    """Members over one in-process store, with short leases."""

    def __init__(self, lease_s: float = 0.3) -> None:
        self.lease_s = lease_s
        self.store = MemoryCoordination()
        self.views: dict[str, View] = {}
        self.members: dict[str, Membership] = {}

    async def join(
        self, name: str, *, by_ring: bool = False, shard_count: int = COUNT
    ) -> Membership:
        """Start a member."""
        record = member(name)
        membership = self.members[name] = Membership(
            self.store.connect(),
            lambda: record,
            holder=name,
            shard_count=COUNT,
            mode="partitioned",
            on_view=lambda view: self.views.__setitem__(name, view),
            lease_s=self.lease_s,
            by_ring=by_ring,
            planner=Planner(settle_s=0.2),
        )
        await membership.start()
        return membership

    def agree(self, owners: set[str]) -> bool:
        """Whether all see one map that gives every shard to one of ``owners``, all of them."""
        maps = {self.views[name].shard_map.owners for name in owners if name in self.views}
        return len(maps) == 1 and set(maps.pop()) == owners

    async def close(self) -> None:
        """Stop everyone."""
        for membership in self.members.values():
            await membership.close()


@pytest.mark.parametrize("by_ring", [False, True], ids=["coordinator", "ring"])
async def test_members_agree_and_survive_a_death(*, by_ring: bool) -> None:
    """All see the same owners; one that falls silent is replaced within about its lease."""
    cluster = Cluster()
    for name in "abc":
        await cluster.join(name, by_ring=by_ring)
    await wait_until(lambda: cluster.agree({"a", "b", "c"}))
    dead = cluster.members.pop("a")  # often the leader
    assert dead._task is not None
    dead._task.cancel()
    await wait_until(lambda: cluster.agree({"b", "c"}), 5)
    await cluster.close()


async def test_a_change_is_seen_by_everyone_and_epochs_only_grow() -> None:
    """A mode written through one member reaches the others, under a higher epoch."""
    cluster = Cluster()
    one, two = await cluster.join("a"), await cluster.join("b")
    await wait_until(lambda: cluster.agree({"a", "b"}))
    epoch = two.view.shard_map.epoch
    changed = await one.change(lambda shard_map: replace(shard_map, mode="fanout"))
    assert changed.epoch > epoch
    await wait_until(lambda: two.view.shard_map.mode == "fanout")
    assert two.view.shard_map.epoch >= changed.epoch
    await cluster.close()


async def test_a_store_that_lost_its_data_gets_the_map_back() -> None:
    """The members write their map into an empty store again, and no epoch goes back."""
    cluster = Cluster()
    one = await cluster.join("a")
    await wait_until(lambda: cluster.agree({"a"}))
    before = one.view.shard_map
    cluster.store._store.document = None
    await wait_until(lambda: cluster.store._store.document is not None)
    assert one.view.shard_map.owners == before.owners
    await wait_until(lambda: one.view.shard_map.epoch > before.epoch)
    await cluster.close()


@pytest.mark.parametrize("by_ring", [False, True], ids=["coordinator", "ring"])
async def test_a_lost_map_is_restored_by_whoever_remembers_it(*, by_ring: bool) -> None:
    """A newcomer that leads an empty store begins no map that those who know more never follow."""
    cluster = Cluster()
    one = await cluster.join("a", by_ring=by_ring)
    await wait_until(lambda: cluster.agree({"a"}))
    for mode in ("fanout", "partitioned", "fanout"):
        before = await one.change(lambda shard_map, mode=mode: replace(shard_map, mode=mode))  # type: ignore[misc]
    store = cluster.store._store
    store.document, store.leader = None, None
    assert by_ring or await cluster.store.lead("b", 60)
    two = await cluster.join("b", by_ring=by_ring)
    await wait_until(lambda: two.view.shard_map.epoch > before.epoch)
    await wait_until(lambda: one.view.shard_map == two.view.shard_map)
    assert one.view.shard_map.mode == "fanout"
    await cluster.close()


@pytest.mark.parametrize("loses", ["contact", "data"])
async def test_who_is_late_after_an_outage_keeps_its_shards(
    loses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All leases have run out when the store is back: the first to renew is not all there is."""
    cluster = Cluster(lease_s=3)  # long enough for a delayed test
    one, two = await cluster.join("a"), await cluster.join("b")
    await wait_until(lambda: cluster.agree({"a", "b"}))
    owners = one.view.shard_map.owners
    is_away = True

    async def fail(*_: object) -> None:
        if is_away:
            raise CoordinationError("away")
        await renew(record, cluster.lease_s)

    record, renew = member("b"), two._coordination.renew
    monkeypatch.setattr(two._coordination, "renew", fail)
    if loses == "contact":
        one._last_seen_s -= 60
    else:
        cluster.store._store.document = None
    cluster.store._store.members.clear()
    await wait_until(lambda: list(one.view.members) == ["a"], what="a seeing itself alone")
    is_away = False
    await wait_until(lambda: len(one.view.members) == 2, what="b being back")
    assert one.view.shard_map.owners == owners
    await cluster.close()


async def test_a_document_that_is_none_is_trouble_and_no_end() -> None:
    """Somebody wrote something else into the store: the last map stays until that is mended."""
    cluster = Cluster()
    one = await cluster.join("a")
    await wait_until(lambda: cluster.agree({"a"}))
    view = one.view
    store, document = cluster.store._store, cluster.store._store.document
    assert document is not None
    store.document = replace(document, body=b"not a map", revision=document.revision + 1)
    await wait_until(lambda: one.trouble is not None)
    assert one.view == view
    store.document = document
    await wait_until(lambda: one.trouble is None)
    await cluster.close()


async def test_a_leader_that_slept_is_fenced_by_the_revision() -> None:
    """A write planned from an old revision is refused, even if its writer thinks it leads."""
    cluster = Cluster()
    one = await cluster.join("a")
    await wait_until(lambda: cluster.agree({"a"}))
    old_map, old_document = await one._read()
    await one.change(lambda shard_map: replace(shard_map, mode="fanout"))
    assert not await one._write(replace(old_map, epoch=old_map.epoch + 1), old_document)
    await cluster.close()


async def test_a_lost_store_leaves_the_last_map_in_force() -> None:
    """While the store is away the view stays, and the trouble is told."""
    cluster = Cluster()
    one = await cluster.join("a")
    await wait_until(lambda: cluster.agree({"a"}))
    view = one.view
    await one._coordination.close()
    await wait_until(lambda: one.trouble is not None)
    assert one.view == view
    with pytest.raises(CoordinationError):
        await one.change(lambda shard_map: replace(shard_map, mode="fanout"))
    await asyncio.wait_for(one.close(), 5)


def deaf(name: str) -> Member:
    """The record of a member whose transport fails."""
    return replace(member(name), state="deaf")


def test_a_deaf_member_gives_its_shards_up_once_it_is_clear_that_others_hear() -> None:
    """Not at once: the others may be about to become deaf as well."""
    planner = Planner(SETTLE_S)
    before = settled_map(planner, "ab")
    members = [member("a"), deaf("b")]
    assert planner.plan(before, members, 20) is None
    assert planner.plan(before, members, 20 + SETTLE_S - 0.1) is None
    after = planner.plan(before, members, 20 + SETTLE_S)
    assert after is not None
    assert set(after.owners) == {"a"}
    back = [member("a"), member("b")]
    assert planner.plan(after, back, 40) is None
    again = planner.plan(after, back, 40 + SETTLE_S)
    assert again is not None
    assert Counter(again.owners) == {"a": 6, "b": 6}


def test_nothing_moves_while_all_are_deaf() -> None:
    """The engine is away for all: no other owner would be better."""
    planner = Planner(SETTLE_S)
    before = settled_map(planner, "ab")
    assert planner.plan(before, [member("a"), deaf("b")], 20) is None
    for now in (25, 25 + 10 * SETTLE_S):
        assert planner.plan(before, [deaf("a"), deaf("b")], now) is None

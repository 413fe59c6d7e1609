"""A StatefulSet's ordinals instead of a store."""

import asyncio
from dataclasses import replace

import pytest

from pokebridge.cluster.membership import Membership, View
from pokebridge.coordination.base import Coordination
from pokebridge.coordination.static import Replicas, StaticCoordination
from pokebridge.errors import ConfigError, CoordinationError
from pokebridge.model import Mode
from pokebridge.testing.coordination import every_call, member
from tests.support import wait_until

PATTERN = "&url=wss://pokebridge-{ordinal}.example.com"
SHARD_COUNT = 10


async def connect(
    ordinal: int, instance: str = "", options: str = "", mode: Mode = "partitioned"
) -> StaticCoordination:
    """The coordination of one of three replicas."""
    return await StaticCoordination.connect(
        f"static://?ordinal={ordinal}&replicas=3{options}",
        instance=instance or f"pokebridge-{ordinal}",
        shard_count=SHARD_COUNT,
        mode=mode,
    )


async def joined(coordination: Coordination, instance: str) -> Membership:
    """A started membership, as an instance has it."""
    membership = Membership(
        coordination,
        lambda: member(instance),
        holder=instance,
        shard_count=SHARD_COUNT,
        mode="fanout",
        on_view=lambda view: None,
        lease_s=0.3,
    )
    await membership.start()
    return membership


def owned(view: View, instance: str) -> set[int]:
    """What the view says that ``instance`` owns."""
    return set(view.shard_map.owned_by(instance))


async def test_every_replica_computes_the_same_owners() -> None:
    """Each member computes shard % replicas in the configured mode, and there is no leader."""
    stores = [await connect(ordinal) for ordinal in range(3)]
    memberships = [await joined(store, f"pokebridge-{n}") for n, store in enumerate(stores)]
    maps = {membership.view.shard_map for membership in memberships}
    assert len(maps) == 1
    assert maps.pop().mode == "partitioned"
    assert owned(memberships[0].view, "pokebridge-0") == {0, 3, 6, 9}
    assert owned(memberships[0].view, "pokebridge-2") == {2, 5, 8}
    assert not any([await store.lead("x", 60) for store in stores])
    for membership in memberships:
        await membership.close()


async def test_clients_are_led_by_the_pattern() -> None:
    """The others' URLs come from the pattern; this one's own record is the one that it renewed."""
    store = await connect(1, options=PATTERN)
    await store.renew(member("pokebridge-1", sessions=7), 5)
    await store.renew(member("stranger"), 5)
    zero, one, two = await store.members()
    assert zero.url == "wss://pokebridge-0.example.com"
    assert two.url == "wss://pokebridge-2.example.com"
    assert one == member("pokebridge-1", sessions=7)
    assert {each.state for each in (zero, one, two)} == {"active"}


async def test_without_a_pattern_nobody_is_led() -> None:
    """The others have no URL, so the replica that a client reached serves it."""
    store = await connect(1)
    assert [each.url for each in await store.members()] == ["", "", ""]


@pytest.mark.parametrize(
    ("instance", "ids"),
    [
        ("bridge-1", ["bridge-0", "bridge-1", "bridge-2"]),
        ("7f3a", ["7f3a", "replica-0", "replica-2"]),
        ("bridge-7", ["bridge-7", "replica-0", "replica-2"]),
    ],
)
async def test_ids_follow_from_this_ones(instance: str, ids: list[str]) -> None:
    """One that ends in its ordinal tells all; another names the others by their ordinals."""
    store = await connect(1, instance)
    assert [each.id for each in await store.members()] == ids
    document = await store.read()
    assert document is not None
    membership = await joined(store, instance)
    assert owned(membership.view, instance) == {1, 4, 7}
    await membership.close()


async def test_a_change_at_run_time_is_refused_with_the_reason() -> None:
    """There is nowhere to write, and the operator hears so; the map stays."""
    store = await connect(0)
    membership = await joined(store, "pokebridge-0")
    with pytest.raises(CoordinationError, match="static:// the mode and the owners are settings"):
        await membership.change(lambda shard_map: replace(shard_map, mode="fanout"))
    assert membership.view.shard_map.mode == "partitioned"
    assert membership.trouble is None
    await membership.close()


async def test_fanout_is_kept_as_well() -> None:
    """The mode is the one of the settings, whichever."""
    membership = await joined(await connect(0, mode="fanout"), "pokebridge-0")
    assert membership.view.shard_map.mode == "fanout"
    await membership.close()


async def test_own_numbers_stay_fresh() -> None:
    """The instance's own record is renewed in its view, as with any store."""
    sessions = 0
    membership = Membership(
        await connect(0),
        lambda: member("pokebridge-0", sessions=sessions),
        holder="pokebridge-0",
        shard_count=SHARD_COUNT,
        mode="fanout",
        on_view=lambda view: None,
        lease_s=0.3,
    )
    await membership.start()
    sessions = 7
    await wait_until(lambda: membership.view.members["pokebridge-0"].sessions == 7)
    await membership.close()


async def test_a_wait_ends_with_its_time_or_with_the_store() -> None:
    """Nothing changes, so a wait takes as long as it may; close() ends it, and all calls."""
    store = await connect(0)
    await store.wait_for_change(0.01)
    waiter = asyncio.create_task(store.wait_for_change(60))
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    await asyncio.wait_for(waiter, 5)
    for call in every_call(store):
        with pytest.raises(CoordinationError):
            await call


@pytest.mark.parametrize(
    ("url", "hostname", "ordinal"),
    [
        ("static://?ordinal=2&replicas=3", "anything", 2),
        ("static://?replicas=12", "pokebridge-11", 11),
        ("static://?ordinal=0&replicas=12", "pokebridge-11", 0),
    ],
)
def test_the_ordinal_is_given_or_ends_the_host_name(url: str, hostname: str, ordinal: int) -> None:
    """A StatefulSet's pods need no setting each."""
    assert Replicas.parse(url, hostname).ordinal == ordinal


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("static://", "static://[?]ordinal=N&replicas=M"),
        ("static://host?ordinal=0&replicas=3", "static://[?]ordinal=N&replicas=M"),
        ("static://?ordinal=0", "static://[?]ordinal=N&replicas=M"),
        ("static://?replicas=3", "'laptop' does not end in one, as pokebridge-0 does"),
        ("static://?ordinal=3&replicas=3", "ordinal '3' is invalid: with '3' replicas"),
        ("static://?ordinal=-1&replicas=3", "ordinal '-1'"),
        ("static://?ordinal=x&replicas=3", "ordinal 'x'"),
        ("static://?ordinal=0&replicas=0", "with '0' replicas"),
        ("static://?ordinal=0&replicas=3&colour=red", "no option 'colour'"),
        ("static://?ordinal=0&replicas=3&url=wss://same.example", "with {ordinal}"),
        ("static://?ordinal=0&replicas=3&url=https://b-{ordinal}.example", "wss:// URL"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, said: str) -> None:
    """One line says which part of it, and what it may be."""
    with pytest.raises(ConfigError, match=said) as error:
        Replicas.parse(url, "laptop")
    assert str(error.value).startswith("the coordination URL")

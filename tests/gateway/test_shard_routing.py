"""Where a recipient is at home, and whether there is a way there."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from pokebridge.gateway.shard_routing import Reach, ShardRouting
from pokebridge.model import Mode
from pokebridge.placement import Placement, ShardMap
from pokebridge.sharding import shard_of

BOB = "urn:user:bob"
SHARDS = 4


def owned_by(owner: str | None, epoch: int = 1) -> ShardMap:
    """A partitioned map in which Bob's shard is ``owner``'s, and the others are this instance's."""
    owners: list[str | None] = ["here"] * SHARDS
    owners[shard_of(BOB, SHARDS)] = owner
    return ShardMap(epoch, "partitioned", tuple(owners))


def reached(urls: Mapping[str, str], incarnation: str = "first") -> dict[str, Reach]:
    """The members at ``urls``."""
    return {name: Reach(url, incarnation) for name, url in urls.items()}


def make_routing() -> ShardRouting:
    """The instance ``here``, on which Bob has a session."""
    made = ShardRouting("here", ShardMap(0, "fanout", (None,) * SHARDS), Placement("here"))
    made.enter(BOB)
    return made


@pytest.mark.parametrize(
    ("owner", "urls", "url"),
    [
        ("there", {"here": "wss://here", "there": "wss://there"}, "wss://there"),
        ("there", {"here": "wss://all", "there": "wss://all"}, None),
        ("there", {"here": "wss://here"}, None),
        ("there", {"there": "wss://there"}, "wss://there"),
        ("here", {"here": "wss://here", "there": "wss://there"}, None),
        (None, {"there": "wss://there"}, None),
    ],
    ids=["reached", "one URL for all", "not reached", "no own URL", "here", "no owner"],
)
def test_a_session_follows_its_shard_where_the_owner_can_be_reached(
    owner: str | None, urls: Mapping[str, str], url: str | None
) -> None:
    """It is sent to the owner's URL, or stays if no URL leads to that instance only."""
    routing = make_routing()
    moved = routing.see(owned_by(owner), reached(urls))
    assert routing.url_for(BOB) == url
    assert moved == (frozenset() if url is None else {shard_of(BOB, SHARDS)})


def test_sessions_are_not_told_twice() -> None:
    """A map that does not change a session's shard sends it no second move."""
    routing, members = make_routing(), reached({"there": "wss://there"})
    assert routing.see(owned_by("there"), members)
    assert not routing.see(owned_by("there", epoch=2), members)


def test_sessions_go_home_to_an_owner_that_is_back_before_anybody_missed_it() -> None:
    """It died and came back within its lease: the map is the same, and its sessions had fled."""
    routing, shard = make_routing(), shard_of(BOB, SHARDS)
    assert routing.see(owned_by("there"), reached({"there": "wss://there"})) == {shard}
    again = reached({"there": "wss://there"}, incarnation="second")
    assert routing.see(owned_by("there"), again) == {shard}
    assert not routing.see(owned_by("there"), again)


def test_nobody_is_led_to_a_deaf_owner_until_it_hears_again() -> None:
    """Meanwhile its clients are served where they are; then they follow their shard."""
    routing = make_routing()
    urls = {"here": "wss://here", "there": "wss://there"}
    deaf = {name: reach._replace(hears=name != "there") for name, reach in reached(urls).items()}
    assert not routing.see(owned_by("there"), deaf)
    assert routing.url_for(BOB) is None
    assert routing.see(owned_by("there"), reached(urls)) == {shard_of(BOB, SHARDS)}
    assert routing.url_for(BOB) == "wss://there"


@pytest.mark.parametrize("mode", ["fanout", "partitioned"])
def test_an_instance_that_lets_go_leads_to_others_that_hear(mode: Mode) -> None:
    """In both modes its clients go to instances that receive, or stay if there are none."""
    routing = make_routing()
    shard_map = replace(owned_by("here"), mode=mode)
    names = ("here", "there", "deaf", "lost")
    members = reached({name: f"wss://{name}" for name in names if name != "lost"})
    members["deaf"] = members["deaf"]._replace(hears=False)
    routing.see(shard_map, members)
    assert routing.url_for(BOB) is None
    routing.lets_go = True
    assert routing.url_for(BOB) == "wss://there"
    del members["there"]
    routing.see(shard_map, members)
    assert routing.url_for(BOB) is None

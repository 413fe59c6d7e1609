"""The bridge's promise: ``ready`` only when live, and nobody left asleep by a gap."""

import asyncio
from collections.abc import Set as AbstractSet
from dataclasses import replace

import pytest

from pokebridge.gateway.shard_routing import Reach
from pokebridge.placement import ShardMap
from pokebridge.sharding import shard_of
from pokebridge.transport.base import Feed, Selection
from tests.gateway.harness import BOB, QUICK, Running, running
from tests.support.waiting import wait_until


async def test_ready_waits_until_the_subscription_is_proven() -> None:
    """``ready`` is sent only once the probes have come back."""
    async with running() as server:
        server.transport.deaf = True
        await wait_until(lambda: not server.gateway.subscriptions.covers(BOB))
        client = await server.connect()
        with pytest.raises(TimeoutError):
            await client.frame(0.4)
        server.transport.deaf = False
        assert (await client.message())["type"] == "ready"


async def test_never_proven_is_1013_in_bounded_time() -> None:
    """A client is sent elsewhere when the subscription does not become live."""
    async with running(QUICK) as server:
        server.transport.deaf = True
        await wait_until(lambda: not server.gateway.subscriptions.covers(BOB))
        client = await server.connect()
        assert await client.closed() == 1013


async def test_silent_deafness_is_noticed_and_healed() -> None:
    """A subscription that stops delivering without a word goes red, and then wakes everyone."""
    async with running() as server:
        clients = [await server.open(f"urn:user:{number}") for number in range(3)]
        server.transport.deaf = True
        assert not server.gateway.subscriptions.is_in_doubt
        await wait_until(lambda: server.gateway.subscriptions.trouble is not None)
        assert server.gateway.subscriptions.is_in_doubt
        await server.poke("urn:user:0")  # lost
        server.transport.deaf = False
        for client in clients:
            assert (await client.message())["type"] == "poke"
        assert server.gateway.subscriptions.trouble is None
        assert not server.gateway.subscriptions.is_in_doubt


async def test_a_reported_gap_wakes_everyone_with_a_window() -> None:
    """After a gap each session is poked, ``within_ms`` growing with their number."""
    async with running() as server:
        clients = [await server.open(f"urn:user:{number}") for number in range(20)]
        for receiver in server.transport.receivers:
            receiver.on_gap(Feed.ALL, "the test says so")
        for client in clients:
            assert await client.message() == {"type": "poke", "within_ms": 20}
        assert server.gateway.subscriptions.gaps == 1


async def test_a_quiet_bridge_probes_and_a_busy_one_does_not() -> None:
    """Probes are sent when nothing is heard, and spared while signals flow."""
    async with running() as server:
        subscriptions = server.gateway.subscriptions
        await wait_until(lambda: subscriptions.probes >= 3)
        before = subscriptions.probes
        for _ in range(20):
            await server.poke()
            await asyncio.sleep(0.05)
        assert subscriptions.probes <= before + 1


async def test_pokes_for_nobody_here_are_noise() -> None:
    """Dropped and delivered pokes are counted."""
    async with running() as server:
        client = await server.open()
        for recipient in (BOB, "urn:user:nobody", "urn:user:else"):
            await server.poke(recipient)
        await client.message()
        counters = server.gateway.bridge.counters
        assert (counters.pokes, counters.noise, counters.delivered) == (3, 2, 1)


async def test_a_client_of_another_owner_is_moved_once_and_then_served() -> None:
    """Partitioned: a session lands elsewhere, is told where its home is, and served if it stays."""
    async with running() as server:
        count = server.gateway.shard_routing.shard_map.shard_count
        there = ShardMap(1, "partitioned", ("other",) * count)
        server.gateway.apply(there, {"other": Reach("ws://other.example/v1/connect", "1")})
        client = await server.connect()
        assert await client.message() == {"type": "move", "url": "ws://other.example/v1/connect"}
        assert await client.closed() == 4307
        moved = await server.open(path="/v1/connect?moved=1")
        await wait_until(lambda: shard_of(BOB) in server.gateway.subscriptions.selections)
        await server.poke(version=3)
        assert await moved.message() == {"type": "poke", "version": 3}


async def test_a_migration_under_traffic_loses_no_poke() -> None:
    """Fan-out to partitioned and back: every poke arrives, and the old subscription goes last."""
    async with running() as server:
        client = await server.open()
        count = server.gateway.shard_routing.shard_map.shard_count
        mine = ShardMap(1, "partitioned", ("i-1",) + ("other",) * (count - 1))
        for version, shard_map in enumerate([mine, replace(mine, mode="fanout")] * 3, start=1):
            server.gateway.apply(shard_map, {})
            await server.poke(version=version)
            heard = await client.message()
            while heard.get("version") != version:  # doubled where old and new overlap
                heard = await client.message()
            wanted: set[Selection] = {0, shard_of(BOB), Feed.UNTAGGED}
            await subscribed_to(server, {Feed.ALL} if shard_map.mode == "fanout" else wanted)


async def subscribed_to(server: Running, wanted: AbstractSet[Selection]) -> None:
    """Return once the instance is subscribed to what is wanted, and to nothing else."""
    await wait_until(lambda: server.gateway.subscriptions.selections == wanted)


def bobs_mine(server: Running) -> ShardMap:
    """The map that gives Bob's shard to the instance under test, and the others to nobody."""
    count = server.gateway.shard_routing.shard_map.shard_count
    owners = ["i-1" if shard == shard_of(BOB) else None for shard in range(count)]
    return ShardMap(1, "partitioned", tuple(owners))


async def test_a_gap_in_what_is_about_to_go_wakes_everyone() -> None:
    """A migration does not close the old subscription over a gap that it is about to report."""
    async with running() as server:
        client = await server.open()
        subscriptions = server.gateway.subscriptions
        server.gateway.apply(bobs_mine(server), {})
        await wait_until(
            lambda: shard_of(BOB) in subscriptions.selections and subscriptions.all_live
        )
        assert Feed.ALL in subscriptions.selections
        server.transport.receivers[0].on_gap(Feed.ALL, "the test says so")
        assert "within_ms" in await client.message()
        await wait_until(lambda: subscriptions.settled)


async def test_what_goes_without_an_answer_may_have_missed_something() -> None:
    """If a subscription was deaf without notice, its replacement wakes its sessions."""
    async with running() as server:
        client = await server.open()
        old = server.transport.receivers[0]
        old.on_signal = lambda body, tag: None  # type: ignore[method-assign]
        await server.poke()  # lost
        server.gateway.apply(bobs_mine(server), {})
        assert "within_ms" in await client.message()
        await wait_until(lambda: server.gateway.subscriptions.settled)


async def test_what_is_needed_again_stays() -> None:
    """If the cluster migrates back before the old subscription is closed, it is kept."""
    async with running() as server:
        await server.open()
        subscriptions, mine = server.gateway.subscriptions, bobs_mine(server)
        server.gateway.apply(mine, {})
        await wait_until(lambda: subscriptions.all_live and len(subscriptions.selections) > 1)
        server.gateway.apply(replace(mine, epoch=2, mode="fanout"), {})
        await wait_until(lambda: subscriptions.settled)
        assert server.transport.subscribed.count(Feed.ALL) == 1


async def test_a_session_is_not_left_when_what_covers_it_goes() -> None:
    """Accepted on the strength of the old subscription, it has its shard subscribed at once."""
    async with running() as server:
        subscriptions = server.gateway.subscriptions
        count = server.gateway.shard_routing.shard_map.shard_count
        elsewhere = ShardMap(1, "partitioned", ("i-1",) + (None,) * (count - 1))
        server.gateway.apply(elsewhere, {})
        assert subscriptions.covers(BOB)
        await server.open()
        assert shard_of(BOB) in subscriptions.selections


async def test_without_a_mailbox_sessions_are_poked_while_a_member_is_not_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The member's signals may be lost, although this instance's own signals come back."""
    monkeypatch.setattr("pokebridge.gateway.gateway._DOUBT_POKE_EVERY_S", 1)
    monkeypatch.setattr("pokebridge.gateway.beacons.SILENT_AFTER", 0)
    async with running() as server:
        client = await server.open()
        server.gateway.beacons.members = {"i-1", "i-2"}
        for _ in range(2):
            assert (await client.message())["type"] == "poke"
        assert not server.gateway.is_deaf


async def test_without_a_mailbox_sessions_are_poked_while_the_transport_is_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is unknown who is behind, so all sessions are poked regularly while that lasts."""
    monkeypatch.setattr("pokebridge.gateway.gateway._DOUBT_POKE_EVERY_S", 1)
    async with running(deaf_after_s=1) as server:
        client = await server.open()
        server.transport.deaf = True
        for _ in range(2):
            assert (await client.message())["type"] == "poke"
        assert server.gateway.is_deaf
        server.transport.deaf = False
        await wait_until(lambda: not server.gateway.is_deaf, what="the gateway hearing again")

"""The bridge's promise: ``ready`` only when live, and nobody left asleep by a gap."""

import asyncio
from dataclasses import replace

import pytest
from tests.gateway.harness import BOB, QUICK, running
from tests.support.waiting import wait_until

from pokebridge.placement import ShardMap
from pokebridge.sharding import shard_of
from pokebridge.transport.base import Feed


async def test_ready_waits_until_the_subscription_is_proven() -> None:
    """No ``ready`` while probes do not come back; it comes once they do."""
    async with running() as server:
        server.transport.deaf = True
        await wait_until(lambda: not server.gateway.hold.covers(BOB))
        client = await server.connect()
        with pytest.raises(TimeoutError):
            await client.frame(0.4)
        server.transport.deaf = False
        assert (await client.message())["type"] == "ready"


async def test_never_proven_is_1013_in_bounded_time() -> None:
    """A client is sent elsewhere when the subscription does not become live."""
    async with running(QUICK) as server:
        server.transport.deaf = True
        await wait_until(lambda: not server.gateway.hold.covers(BOB))
        client = await server.connect()
        assert await client.closed() == 1013


async def test_silent_deafness_is_noticed_and_healed() -> None:
    """A subscription that stops delivering without a word goes red, and then wakes everyone."""
    async with running() as server:
        clients = [await server.open(f"urn:user:{number}") for number in range(3)]
        server.transport.deaf = True
        await wait_until(lambda: server.gateway.hold.trouble is not None)
        await server.poke("urn:user:0")  # lost
        server.transport.deaf = False
        for client in clients:
            assert (await client.message())["type"] == "poke"
        assert server.gateway.hold.trouble is None


async def test_a_reported_gap_wakes_everyone_with_a_window() -> None:
    """After a gap each session is poked, ``within_ms`` growing with their number."""
    async with running() as server:
        clients = [await server.open(f"urn:user:{number}") for number in range(20)]
        for receiver in server.transport.receivers:
            receiver.on_gap(Feed.ALL, "the test says so")
        for client in clients:
            assert await client.message() == {"type": "poke", "within_ms": 20}
        assert server.gateway.hold.gaps == 1


async def test_a_quiet_bridge_probes_and_a_busy_one_does_not() -> None:
    """Probes are sent when nothing is heard, and spared while signals flow."""
    async with running() as server:
        hold = server.gateway.hold
        await wait_until(lambda: hold.probes >= 3)
        before = hold.probes
        for _ in range(20):
            await server.poke()
            await asyncio.sleep(0.05)
        assert hold.probes <= before + 1


async def test_pokes_for_nobody_here_are_noise() -> None:
    """What is dropped is counted, what is delivered too."""
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
        count = server.gateway.homing.shard_map.shard_count
        there = ShardMap(1, "partitioned", ("other",) * count)
        server.gateway.apply(there, {"other": "ws://other.example/v1/connect"})
        client = await server.connect()
        assert await client.message() == {"type": "move", "url": "ws://other.example/v1/connect"}
        assert await client.closed() == 4307
        moved = await server.open(path="/v1/connect?moved=1")
        await wait_until(lambda: shard_of(BOB) in server.gateway.hold.selections)
        await server.poke(version=3)
        assert await moved.message() == {"type": "poke", "version": 3}


async def test_a_migration_under_traffic_loses_no_poke() -> None:
    """Fan-out to partitioned and back: every poke arrives, and the old subscription goes last."""
    async with running() as server:
        client = await server.open()
        count = server.gateway.homing.shard_map.shard_count
        mine = ShardMap(1, "partitioned", ("i-1",) + ("other",) * (count - 1))
        for version, shard_map in enumerate([mine, replace(mine, mode="fanout")] * 3, start=1):
            server.gateway.apply(shard_map, {})
            await server.poke(version=version)
            heard = await client.message()
            while heard.get("version") != version:  # doubled where old and new overlap
                heard = await client.message()
            wanted = {Feed.ALL} if shard_map.mode == "fanout" else {0, shard_of(BOB), Feed.UNTAGGED}
            await wait_until(lambda wanted=wanted: server.gateway.hold.selections == wanted)  # type: ignore[misc]

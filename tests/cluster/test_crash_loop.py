"""An instance that crashes again and again leaves next to nothing behind, and harms nobody."""

import asyncio
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pokebridge.telemetry import Metric
from tests.cluster import starts
from tests.cluster.clusters import metrics
from tests.cluster.traffic import Traffic
from tests.support import Daemon, Serve, wait_until
from tests.support.engines import run_pubsub_server
from tests.transport.pubsub_world import World

STARTS, AT_ONCE = 50, 10
DEAD_AFTER_S = 2.0
TIMEOUT_S = 200.0


@pytest.fixture
def pubsub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """Our own Pub/Sub server, which does not feed the dead for as long as Google's emulator."""
    with run_pubsub_server(tmp_path) as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        yield server


async def test_fifty_crashes_leave_one_orphan_at_the_most(
    pubsub: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """``kill -9`` of 50 instances that have just subscribed, ten at a time, and then sweeps by two.

    All the while another instance serves a client; it is left alone, and so is the client. An
    instance that is younger than the sweep may be left to the next one: hence the one.
    """
    async with asyncio.timeout(TIMEOUT_S), World(pubsub.address) as world:
        own: dict[str, Any] = {"transport": f"pubsub://{world.project}", "mailbox": "memory://"}
        living = await asyncio.to_thread(serve, instance="living", **own)
        traffic, alice = Traffic(), f"urn:user:alice-{secrets.token_hex(4)}"
        async with (
            traffic.client(living, alice, "phone") as client,
            traffic.flowing(living, [alice]),
        ):
            await client.wait_ready(60)
            for count in range(AT_ONCE, STARTS + 1, AT_ONCE):
                with starts.instances(AT_ONCE, own, tmp_path / "crashing.log"):
                    await wait_until(partial(_have_subscribed, world, count), 60.0)
            janitors = [await world.connect() for _ in range(2)]

            async def are_swept() -> bool:
                sweeps = (janitor.sweep(dead_after_s=DEAD_AFTER_S) for janitor in janitors)
                await asyncio.gather(*sweeps)
                return len(await world.subscriptions()) <= 1 + 1

            await wait_until(are_swept, 60.0)
            assert "poke-sub-living" in await world.subscriptions()
            await traffic.more(5)
            await traffic.all_pulled(["phone"])
        assert await metrics(living, Metric.GAPS) == [0]


async def _have_subscribed(world: World, count: int) -> bool:
    return len(await world.subscriptions()) == 1 + count

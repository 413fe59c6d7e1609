"""Instances that should hear each other: an engine of several servers, and settings that differ."""

import asyncio
import json
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from pokebridge.telemetry import Metric
from pokebridge.testing.pubsub import PubSubServer
from tests.cluster.clusters import metrics
from tests.cluster.traffic import session
from tests.support import CutProxy, Daemon, Instance, Serve, wait_until
from tests.support.engines import ask, has_role, run_valkey, running_nats_pair
from tests.support.silence import Silence

BOB = "urn:user:bob"
SLOW_TO_VERIFY = 600
"""What is heard in a test that sets ``verify_every_s`` to this was not found by verification."""


async def _send(instance: Instance) -> None:
    async with instance.async_http("urn:backend", "send") as http:
        answer = await http.post("/v1/messages", json={"recipient": BOB, "body": "hello"})
        assert answer.status_code == httpx.codes.ACCEPTED


async def _reason(instance: Instance, part: str) -> str:
    """Why ``instance`` is not ready, once that says something about ``part``."""

    async def reason() -> str:
        async with instance.async_http() as http:
            answer = await http.get("/readyz")
        reasons = [] if answer.is_success else str(answer.json()["detail"]).split("; ")
        return next((each for each in reasons if each.startswith(f"{part}: ")), "")

    return await wait_until(reason, 30)


@pytest.mark.parametrize("down_s", [0, pytest.param(13, marks=pytest.mark.long)])
async def test_what_a_broken_route_lost_is_found(
    serve: Serve, tmp_path: Path, down_s: float, silence: Silence
) -> None:
    """Messages are sent while the route is down: bob is poked soon after it is back.

    It is down for so long, and at least until some beacons are lost on it.
    """
    async with running_nats_pair(tmp_path) as (*servers, route):
        x, y = await asyncio.gather(
            *(
                asyncio.to_thread(
                    serve,
                    transport=server.url,
                    mailbox="sqlite:///shared.db",
                    verify_every_s=SLOW_TO_VERIFY,
                )
                for server in servers
            )
        )
        async with session(y, BOB) as bob:

            async def hears() -> bool:
                await _send(x)
                try:
                    async with asyncio.timeout(1):
                        return bool(json.loads(await bob.recv())["type"] == "poke")
                except TimeoutError:
                    return False

            await wait_until(hears, 30)  # the servers have found each other
            [signals] = await metrics(x, Metric.SIGNALS)
            route.cut()
            route.reset()
            heard = silence("a route between two NATS servers is cut, until beacons are lost on it")
            for _ in range(10):
                await _send(x)

            async def has_sent_beacons() -> bool:
                return (await metrics(x, Metric.SIGNALS))[0] > signals + 12

            await wait_until(has_sent_beacons, 60)
            await asyncio.sleep(down_s)
            route.heal()
            async with asyncio.timeout(60):
                assert json.loads(await bob.recv())["type"] == "poke"
            heard()
        lost, gaps = await metrics(y, Metric.BEACONS_LOST, Metric.GAPS)
        assert lost > 0
        assert gaps > 0


async def test_a_failover_that_leaves_connections_open_is_found(
    serve: Serve, tmp_path: Path, silence: Silence
) -> None:
    """One instance stays at the demoted server and the next comes to the new primary."""
    for name in ("primary", "replica"):
        (tmp_path / name).mkdir()
    async with CutProxy("127.0.0.1", 0) as address:
        with run_valkey(tmp_path / "primary") as primary, run_valkey(tmp_path / "replica") as other:
            address.lead_to(primary.port)
            await ask(other, "REPLICAOF", "127.0.0.1", primary.port)
            await wait_until(partial(has_role, other, b"connected"))

            async def start() -> Instance:
                return await asyncio.to_thread(
                    serve,
                    transport=f"redis://{address.address}",
                    mailbox="sqlite:///shared.db",
                    verify_every_s=SLOW_TO_VERIFY,
                )

            stays = await start()
            await ask(primary, "FAILOVER")
            await wait_until(partial(has_role, other, b"master"))
            address.lead_to(other.port)
            comes = await start()
            async with session(comes, BOB) as bob:
                heard = silence("Valkey fails over, and connections to the old primary stay")
                await _send(stays)
                async with asyncio.timeout(30):
                    assert json.loads(await bob.recv())["type"] == "poke"
                heard()
            assert (await metrics(stays, Metric.GAPS))[0] > 0


async def test_ready_holds_for_what_another_server_is_given(
    serve: Serve, tmp_path: Path, silence: Silence
) -> None:
    """With 500 ms on the route, a message right after ``ready`` still pokes its recipient."""
    async with running_nats_pair(tmp_path, route_delay_s=0.5) as (*servers, _):
        x, y = await asyncio.gather(
            *(
                asyncio.to_thread(
                    serve,
                    instance=f"i-{ordinal}",
                    transport=server.url,
                    mailbox="sqlite:///shared.db",
                    coordination=f"static://?ordinal={ordinal}&replicas=2",
                    mode="partitioned",
                    verify_every_s=SLOW_TO_VERIFY,
                )
                for ordinal, server in enumerate(servers)
            )
        )

        async def have_met() -> bool:
            return min(await metrics(x, Metric.PEERS) + await metrics(y, Metric.PEERS)) > 0

        await wait_until(have_met, 30)

        async def is_poked(recipient: str) -> bool:
            async with session(y, recipient) as socket, x.async_http("urn:back", "send") as http:
                heard = silence("a message right after `ready`, with 500 ms on the route")
                await http.post("/v1/messages", json={"recipient": recipient, "body": None})
                try:
                    async with asyncio.timeout(15):
                        is_poke = bool(json.loads(await socket.recv())["type"] == "poke")
                except TimeoutError:
                    return False
                heard()
                return is_poke

        poked = await asyncio.gather(*(is_poked(f"urn:user:{number}") for number in range(24)))
        assert all(poked)


async def test_a_shard_that_is_gained_leaves_an_instance_ready(
    serve: Serve, nats_server: Daemon
) -> None:
    """Sessions wait until their new shard is proven; no load balancer sees the instance red."""
    instance = await asyncio.to_thread(
        serve,
        cluster="gains",
        transport=f"{nats_server.url}?interest_spread_s=2",
        coordination="static://?ordinal=0&replicas=2",
        mode="partitioned",
    )
    [before] = await metrics(instance, Metric.SUBSCRIPTIONS)
    async with AsyncExitStack() as opened, instance.async_http() as http:
        sessions = (session(instance, f"urn:user:{number}") for number in range(8))
        opening = asyncio.gather(*map(opened.enter_async_context, sessions))

        async def all_are_ready() -> bool:
            assert (await http.get("/readyz")).status_code == httpx.codes.OK
            return opening.done()

        await wait_until(all_are_ready, 30)
        await opening
    [after] = await metrics(instance, Metric.SUBSCRIPTIONS)
    assert after > before


async def test_shard_counts_that_differ_are_told(serve: Serve, nats_server: Daemon) -> None:
    """Without a store to compare them in, both instances hear of it, and are not ready."""
    instances = await asyncio.gather(
        *(
            asyncio.to_thread(
                serve,
                instance=f"i-{ordinal}",
                cluster="differs",
                transport=nats_server.url,
                mailbox="sqlite:///shared.db",
                coordination=f"static://?ordinal={ordinal}&replicas=2",
                mode="partitioned",
                shard_count=shard_count,
                started_at="/healthz",
            )
            for ordinal, shard_count in enumerate((100, 64))
        )
    )
    for instance, other in zip(instances, ("i-1", "i-0"), strict=True):
        reason = await _reason(instance, "settings")
        assert "shard_count" in reason
        assert other in reason
        assert "64" in reason


async def test_groups_that_differ_are_told(serve: Serve, nats_server: Daemon) -> None:
    """A processor without sessions has other groups than the gateway, which says so.

    The one would delete by an ack what the other keeps for all readers of a room.
    """
    common: dict[str, Any] = {
        "cluster": "groups",
        "transport": nats_server.url,
        "mailbox": "sqlite:///shared.db",
    }
    gateway = await asyncio.to_thread(
        serve, roles="gateway", group_prefixes="urn:room:,urn:doc:", **common
    )
    await asyncio.to_thread(serve, roles="api,processor", instance="other", **common)
    told = ("settings_disagree", "setting=group_prefixes", "peer=other", "ours=urn:doc:,urn:room:")
    await wait_until(lambda: all(each in gateway.log() for each in told))


async def test_mailboxes_that_are_not_one_are_told(serve: Serve, nats_server: Daemon) -> None:
    """Messages sent through one are not at the other: both count it, and say which they have."""
    instances = await asyncio.gather(
        *(
            asyncio.to_thread(
                serve,
                instance=name,
                cluster="mailboxes",
                transport=nats_server.url,
                mailbox=f"sqlite:///{name}.db",
            )
            for name in ("one", "two")
        )
    )
    told = "setting=mailbox"
    await wait_until(lambda: all(told in each.log() for each in instances))
    for instance in instances:
        assert instance.log().count(told) == 1
        async with instance.async_http() as http:
            page = (await http.get("/metrics")).text
        told_lines = [line for line in page.splitlines() if line.startswith(Metric.DISAGREEMENTS)]
        assert f'{Metric.DISAGREEMENTS}{{setting="mailbox"}} 1.0' in told_lines


async def test_carriers_that_differ_are_told(
    request: pytest.FixtureRequest, valkey_server: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One filters a topic, the other has a topic for each shard: neither is ready."""
    async with PubSubServer() as pubsub:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", pubsub.address)
        serve: Serve = request.getfixturevalue("serve")  # it inherits the environment
        instances = await asyncio.gather(
            *(
                asyncio.to_thread(
                    serve,
                    instance=carrier,
                    cluster="carriers",
                    transport="pubsub://test/pokes",
                    mailbox="sqlite:///shared.db",
                    coordination=valkey_server.url,
                    carrier=carrier,
                    shard_count=4,
                    started_at="/healthz",
                )
                for carrier in ("filter", "topic")
            )
        )
        for instance in instances:
            reason = await _reason(instance, "settings")
            assert "carrier is" in reason

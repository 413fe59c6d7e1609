"""An instance whose line to the engine is cut for long, while others hear: it lets go."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from tests.cluster.traffic import session
from tests.support import CutProxy, Daemon, Instance, Serve, wait_until
from tests.support.engines import run_configured_nats
from tests.support.serving import owners_in
from tests.support.silence import Silence

PEOPLE = [f"urn:user:{n}" for n in range(40)]
TIMEOUT_S = 200.0


async def cluster_of(instance: Instance) -> Any:
    """What ``GET /v1/cluster`` answers."""
    async with instance.async_http("urn:admin", "admin") as http:
        return (await http.get("/v1/cluster")).json()


async def states(instance: Instance) -> dict[str, str]:
    """Each instance's state, as this one sees it."""
    return {each["id"]: each["state"] for each in (await cluster_of(instance))["instances"]}


async def where(instance: Instance, recipient: str) -> str:
    """Which instance ``connect-info`` leads to."""
    async with instance.async_http(recipient) as http:
        return str((await http.get("/v1/connect-info")).json()["instance"])


@pytest.mark.parametrize("mode", ["fanout", "partitioned"])
async def test_a_deaf_instance_lets_go(
    nats_server: Daemon, valkey_server: Daemon, serve: Serve, silence: Silence, mode: str
) -> None:
    """Its shards and clients move to an instance that receives, and no client is led to it."""
    common: dict[str, Any] = {
        "mailbox": "sqlite:///shared.db",
        "coordination": valkey_server.url,
        "cluster": f"deaf-{mode}",
        "mode": mode,
        "shard_count": 8,
        "lease_s": 2,
        "deaf_after_s": 1,
    }
    async with asyncio.timeout(TIMEOUT_S), CutProxy("127.0.0.1", nats_server.port) as line:
        one = await asyncio.to_thread(serve, instance="one", transport=nats_server.url, **common)
        two = await asyncio.to_thread(
            serve, instance="two", transport=f"nats://{line.address}", **common
        )
        bob = await someone_served_by(one, "two", mode)
        async with session(two, bob) as socket:
            line.cut()
            heard = silence(f"an instance loses its line to NATS for long ({mode})")
            await send(one, bob)
            moved = json.loads(await next_frame(socket, "move"))
            assert moved["url"] == one.ws_url
            assert (await states(one))["two"] == "deaf"
            assert {await where(instance, bob) for instance in (one, two)} == {"one"}
        async with websockets.connect(
            f"{moved['url']}?moved=1", additional_headers=one.headers(bob)
        ) as socket:
            assert json.loads(await socket.recv())["type"] == "ready"
            heard()
            await send(two, bob)  # commits there; the poke is published when its connection is back
            await send(one, bob)
            assert json.loads(await next_frame(socket, "poke"))["version"] >= 1
        if mode == "partitioned":
            await wait_until(lambda: owns_all(one, "one"), what="the shards with the other")
        line.heal()
        await wait_until(lambda: hears(one, "two"), what="the instance hearing again")
        bob = await someone_served_by(one, "two", mode)
        async with session(two, bob) as socket:
            await send(one, bob)
            assert json.loads(await next_frame(socket, "poke"))["version"] >= 1


def permissions(*denied: int) -> str:
    """The configuration of a NATS server whose user ``two`` may not subscribe to some shards."""
    subjects = ", ".join(f'"push-notifications~partly.{shard}"' for shard in denied)
    return f"""authorization {{ users: [
        {{ user: one, password: p }},
        {{ user: two, password: p, permissions: {{ subscribe: {{ deny: [{subjects}] }} }} }}
    ] }}"""


@pytest.mark.long
async def test_an_instance_that_cannot_hear_some_shards_lets_go(
    valkey_server: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """The others have all of its shards for as long as that lasts, and then share them again."""
    common: dict[str, Any] = {
        "mailbox": "sqlite:///shared.db",
        "coordination": valkey_server.url,
        "cluster": "partly",
        "mode": "partitioned",
        "shard_count": 8,
        "lease_s": 2,
        "deaf_after_s": 1,
    }
    with run_configured_nats(tmp_path, permissions(*range(7))) as nats:
        async with asyncio.timeout(TIMEOUT_S):
            one, _ = await asyncio.gather(
                *(
                    asyncio.to_thread(
                        serve,
                        instance=name,
                        transport=nats.url.replace("nats://", f"nats://{name}:p@"),
                        **common,
                    )
                    for name in ("one", "two")
                )
            )
            for _ in range(2):  # it is not given them again
                await wait_until(lambda: owns_all(one, "one"), what="the shards with the other")
                assert (await states(one))["two"] == "deaf"
                await asyncio.sleep(3 * common["lease_s"])
            async with session(one, PEOPLE[0]) as socket:
                await send(one, PEOPLE[0])
                assert json.loads(await next_frame(socket, "poke"))["version"] >= 1
            (tmp_path / "nats.conf").write_text(permissions())
            os.kill(nats.pid, signal.SIGHUP)
            await wait_until(lambda: hears(one, "two"), what="the instance hearing again")

            async def divided() -> bool:
                return list(owners_in(await cluster_of(one)).values()).count("two") == 4

            await wait_until(divided, what="both owning their share")


async def someone_served_by(instance: Instance, owner: str, mode: str) -> str:
    """A recipient whom ``owner`` serves, once both instances have their share."""
    if mode == "fanout":

        async def both() -> bool:
            return await states(instance) == {"one": "active", "two": "active"}

        await wait_until(both, what="both instances")
        return PEOPLE[0]

    async def divided() -> bool:
        owners = list(owners_in(await cluster_of(instance)).values())
        return owners.count("one") == owners.count("two") == 4

    await wait_until(divided, what="both owning their share")
    for recipient in PEOPLE:
        if await where(instance, recipient) == owner:
            return recipient
    raise AssertionError("nobody's shard is there")


async def next_frame(socket: ClientConnection, kind: str) -> str:
    """The next frame of that type; others are passed over."""
    async for frame in socket:
        if json.loads(frame)["type"] == kind:
            return str(frame)
    raise AssertionError(f"closed with {socket.close_code}, and no {kind}")


async def send(instance: Instance, recipient: str) -> None:
    """Send a message, which is answered 202."""
    async with instance.async_http("urn:backend", "send") as http:
        answer = await http.post("/v1/messages", json={"recipient": recipient, "body": None})
        assert answer.status_code == 202


async def owns_all(instance: Instance, owner: str) -> bool:
    """Whether all shards are one's."""
    return set(owners_in(await cluster_of(instance)).values()) == {owner}


async def hears(instance: Instance, name: str) -> bool:
    """Whether that one is active again."""
    return (await states(instance))[name] == "active"

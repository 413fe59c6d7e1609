"""``DELETE /v1/sessions``: it survives a gap, and revokes tokens."""

import asyncio
import time
from contextlib import suppress
from typing import Any

import httpx
import jwt
import pytest
import websockets

from pokebridge.sharding import shard_of
from tests.cluster.traffic import session
from tests.support import CutProxy, Daemon, Instance, Serve, wait_until
from tests.support.serving import JWT_SECRET
from tests.support.silence import Silence

BOB = "urn:user:bob"
TIMEOUT_S = 200.0


@pytest.mark.parametrize(
    "mailbox", [["--mailbox", "memory://"], ["--no-mailbox"]], ids=["one each", "none"]
)
async def test_a_disconnect_survives_a_gap(
    nats_server: Daemon, serve: Serve, silence: Silence, mailbox: list[str]
) -> None:
    """An instance that was cut off when it was published closes the sessions after the gap."""
    cluster = f"gap-{len(mailbox)}"
    async with asyncio.timeout(TIMEOUT_S), CutProxy("127.0.0.1", nats_server.port) as line:
        one = await asyncio.to_thread(serve, *mailbox, transport=nats_server.url, cluster=cluster)
        two = await asyncio.to_thread(
            serve, *mailbox, transport=f"nats://{line.address}", cluster=cluster
        )
        async with session(two, BOB) as bob, session(two, "urn:user:eve") as eve:
            line.cut()
            line.reset()
            async with one.async_http("urn:admin", "admin") as http:
                assert (await http.delete(f"/v1/sessions/{BOB}")).status_code == 204
            await wait_until(lambda: has_gap_or_doubt(two), what="the instance noticing")
            line.heal()
            closed = silence("a disconnect that was lost in a gap, from the end of the cut")
            assert await close_code(bob) == 4401
            closed()
            await (await eve.ping())


async def test_a_disconnect_that_nobody_heard_survives_a_gap(
    nats_server: Daemon, serve: Serve
) -> None:
    """Partitioned, the instance that is asked does not subscribe to that shard, and still knows."""
    bob = next(each for each in map("urn:user:{}".format, range(9)) if shard_of(each) % 2)
    common: dict[str, Any] = {"cluster": "unheard", "mode": "partitioned", "no_mailbox": True}
    async with asyncio.timeout(TIMEOUT_S), CutProxy("127.0.0.1", nats_server.port) as line:
        one, two = await asyncio.gather(
            *(
                asyncio.to_thread(
                    serve,
                    transport=url,
                    coordination=f"static://?ordinal={ordinal}&replicas=2",
                    **common,
                )
                for ordinal, url in enumerate((nats_server.url, f"nats://{line.address}"))
            )
        )
        async with session(two, bob) as socket:
            line.cut()
            line.reset()
            async with one.async_http("urn:admin", "admin") as http:
                assert (await http.delete(f"/v1/sessions/{bob}")).status_code == 204
            line.heal()
            assert await close_code(socket) == 4401


async def test_a_disconnect_that_is_asked_of_an_instance_without_sessions(
    nats_server: Daemon, serve: Serve
) -> None:
    """No gateway can be reached, so the mailbox keeps the disconnect until after the gap."""
    common: dict[str, Any] = {"cluster": "apart", "mailbox": "sqlite:///shared.db"}
    async with asyncio.timeout(TIMEOUT_S), CutProxy("127.0.0.1", nats_server.port) as line:
        api = await asyncio.to_thread(
            serve, transport=nats_server.url, roles="api,processor", **common
        )
        gateway = await asyncio.to_thread(
            serve, transport=f"nats://{line.address}", roles="gateway", **common
        )
        async with session(gateway, BOB) as bob, session(gateway, "urn:user:eve") as eve:
            line.cut()
            line.reset()
            async with api.async_http("urn:admin", "admin") as http:
                assert (await http.delete(f"/v1/sessions/{BOB}")).status_code == 204
            line.heal()
            assert await close_code(bob) == 4401
            await (await eve.ping())


async def close_code(socket: websockets.ClientConnection) -> int | None:
    """What the session is closed with, after whatever comes before."""
    with suppress(websockets.ConnectionClosed):
        async for _ in socket:
            pass
    return socket.close_code


async def has_gap_or_doubt(instance: Instance) -> bool:
    """Whether its readiness says that the transport is away."""
    async with instance.async_http() as http:
        return (await http.get("/readyz")).status_code == 503


def token(issued_at: float | None) -> str:
    """A token of Bob's, which may say when it was issued."""
    claims = {"sub": BOB, "exp": time.time() + 3600}
    if issued_at is not None:
        claims["iat"] = issued_at
    return jwt.encode(claims, JWT_SECRET, "HS256")


async def status_of(instance: Instance, given: str) -> int:
    """What a pull with this token is answered."""
    async with instance.async_http() as http:
        headers = {"Authorization": f"Bearer {given}"}
        return (await http.get("/v1/messages", headers=headers)).status_code


async def test_revoked_tokens_are_refused_everywhere_and_after_a_restart(
    nats_server: Daemon, serve: Serve
) -> None:
    """At handshake, renewal and over HTTP; one issued later is accepted."""
    common: dict[str, Any] = {
        "transport": nats_server.url,
        "cluster": "revoking",
        "mailbox": "sqlite:///shared.db",
    }
    async with asyncio.timeout(TIMEOUT_S):
        one, two = await asyncio.gather(*(asyncio.to_thread(serve, **common) for _ in range(2)))
        old = [token(time.time() - 60), token(None)]
        for instance in (one, two):
            assert [await status_of(instance, each) for each in old] == [200, 200]
        async with session(two, BOB) as bob, one.async_http("urn:admin", "admin") as http:
            assert (await http.delete(f"/v1/sessions/{BOB}?revoke=true")).status_code == 204
            assert await close_code(bob) == 4401
        new = token(time.time() + 1)
        await asyncio.to_thread(two.kill)
        await asyncio.to_thread(two.start)
        for instance in (one, two):
            assert [await status_of(instance, each) for each in (*old, new)] == [401, 401, 200]
            with pytest.raises(websockets.InvalidStatus, match="401"):
                await dial(instance, old[0])
            async with await dial(instance, new) as socket:
                await socket.recv()
                await socket.send(f'{{"type":"auth","token":"{old[0]}"}}')
                assert await close_code(socket) == 4401


async def dial(instance: Instance, given: str) -> websockets.ClientConnection:
    """A WebSocket with this token."""
    headers = {"Authorization": f"Bearer {given}"}
    return await websockets.connect(instance.ws_url, additional_headers=headers)


async def test_nobody_can_write_a_revocation_by_sending(serve: Serve) -> None:
    """The mailbox that keeps them takes no messages."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    async with instance.async_http("urn:eve", "send") as http:
        answer = await http.post(
            "/v1/messages", json={"recipient": "urn:pokebridge:revocations", "body": {}}
        )
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY

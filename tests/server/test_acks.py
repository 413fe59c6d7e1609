"""Acks over the socket of real instances, into each kind of mailbox."""

import asyncio
import json
import re
import secrets
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from pokebridge.client import PokeClient, ReceivedMessage
from pokebridge.telemetry import Metric
from tests.support import CutProxy, Daemon, Instance, Serve, wait_until

BOB = "urn:user:bob"
HTTP_ACKS = rf'{Metric.HTTP_SECONDS}_count{{method="POST",route="/v1/messages/ack"'


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def instance(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Instance:
    """An instance with an empty mailbox of each kind."""
    if request.param == "postgresql":
        database = request.getfixturevalue("postgres_database")
        transport = request.getfixturevalue("nats_server").url
        return await asyncio.to_thread(serve_shared, serve, database, transport)
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'mailbox.db'}"
    return await asyncio.to_thread(serve, mailbox=url)


def serve_shared(serve: Serve, mailbox: str, transport: str) -> Instance:
    """An instance with a mailbox that others might share, in a cluster of its own."""
    cluster = f"acks-{secrets.token_hex(4)}"
    return serve(mailbox=mailbox, transport=transport, cluster=cluster)


@asynccontextmanager
async def session(instance: Instance, device: str) -> AsyncIterator[ClientConnection]:
    """A session of one of Bob's devices, after its ``ready``."""
    headers = instance.headers(BOB)
    url = f"{instance.ws_url}?device={device}"
    async with websockets.connect(url, additional_headers=headers) as socket:
        ready = json.loads(await socket.recv())
        assert (ready["type"], ready["acks"]) == ("ready", True)
        yield socket


async def send(instance: Instance, count: int) -> None:
    """Send Bob messages."""
    async with instance.async_http("urn:user:alice", "send") as http:
        for number in range(count):
            answer = await http.post("/v1/messages", json={"recipient": BOB, "body": number})
            answer.raise_for_status()


async def stored(instance: Instance, device: str = "default") -> list[int]:
    """The versions that Bob's mailbox still has."""
    async with instance.async_http(BOB) as http:
        query = {"limit": 500} | ({} if device == "default" else {"device": device})
        page = (await http.get("/v1/messages", params=query)).json()
        return [message["version"] for message in page["messages"]]


async def kept(instance: Instance, versions: Sequence[int]) -> None:
    """Wait until Bob's mailbox has exactly these versions."""

    async def are_kept() -> bool:
        return await stored(instance) == list(versions)

    await wait_until(are_kept, what=f"exactly {versions}")


async def ack(socket: ClientConnection, version: int) -> None:
    """Ack over the socket."""
    await socket.send(json.dumps({"type": "ack", "version": version}))


async def count(instance: Instance, pattern: str) -> int:
    """The metric whose line begins with ``pattern``; 0 if there is none."""
    async with instance.async_http() as http:
        found = re.search(rf"^{pattern}\S* (\d+)", (await http.get("/metrics")).text, re.MULTILINE)
    return int(found[1]) if found else 0


async def test_message_poke_pull_ack(instance: Instance) -> None:
    """What all devices have acked is deleted, whichever way each has acked."""
    async with session(instance, "phone") as phone, session(instance, "desk") as desk:
        for device in ("phone", "desk"):
            assert await stored(instance, device) == []  # which makes it known
        await send(instance, 2)
        for socket in (phone, desk):
            assert json.loads(await socket.recv())["type"] == "poke"
        assert await stored(instance) == [1, 2]
        await ack(phone, 2)
        await ack(desk, 1)
        await kept(instance, [2])
        async with instance.async_http(BOB) as http:
            await http.post("/v1/messages/ack", json={"version": 2, "device": "desk"})
        await kept(instance, [])
        await send(instance, 1)
        async with instance.async_http(BOB) as http:
            await http.post("/v1/messages/ack", json={"version": 3, "device": "phone"})
        await ack(desk, 10**9)
        await kept(instance, [])
        await send(instance, 1)
        await kept(instance, [4])
    assert await count(instance, HTTP_ACKS) == 2


async def test_a_burst_of_acks_makes_few_calls(instance: Instance) -> None:
    """Several hundred acks of one session are merged into a few, the newest among them."""
    await send(instance, 300)
    async with session(instance, "default") as socket:
        for version in range(1, 301):
            await ack(socket, version)
        await kept(instance, [])
    assert await count(instance, Metric.ACKS_HEARD) == 300
    assert await count(instance, Metric.ACKS_RECORDED) < 30


async def test_our_client_acks_over_its_socket(instance: Instance) -> None:
    """Not one of its acks comes over HTTP, and the mailbox is empty in the end."""
    received: list[int] = []

    async def take(messages: Sequence[ReceivedMessage]) -> None:
        received.extend(message.version for message in messages)

    async with PokeClient(instance.url, instance.token(BOB), take, device="phone") as client:
        await client.wait_ready()
        await send(instance, 20)
        await wait_until(lambda: received == list(range(1, 21)))
        await kept(instance, [])
        # This ack and the one before it come within the shortest time between two acks.
        await send(instance, 1)
        await wait_until(lambda: len(received) == 21)
        await wait_until(lambda: client.cursor == 21)
    await kept(instance, [])
    assert await count(instance, Metric.ACKS_HEARD) >= 1
    assert await count(instance, HTTP_ACKS) == 0


async def test_an_instance_without_a_mailbox_offers_no_acks(serve: Serve) -> None:
    """A client of own data is told nothing about acks."""
    instance = serve("--no-mailbox")
    headers = instance.headers(BOB)
    async with websockets.connect(instance.ws_url, additional_headers=headers) as socket:
        assert "acks" not in json.loads(await socket.recv())
        await ack(socket, 1)
        await socket.wait_closed()
        assert socket.close_code == 1008


async def test_a_locked_file_delays_an_ack(serve: Serve, tmp_path: Path) -> None:
    """While another process has the file locked an ack fails; it is recorded afterwards."""
    path = tmp_path / "mailbox.db"
    instance = serve(mailbox=f"sqlite:///{path}")
    await send(instance, 3)
    async with session(instance, "default") as socket:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await ack(socket, 3)
            async with instance.async_http(BOB) as http:
                refused = await http.post("/v1/messages/ack", json={"version": 1})
            assert refused.status_code == 503
            other.execute("ROLLBACK")
        await kept(instance, [])
        assert await count(instance, Metric.ACKS_HEARD) == 1
        await (await socket.ping())  # the session is open


async def test_a_database_that_is_away_delays_an_ack(
    serve: Serve, nats_server: Daemon, postgres_database: str
) -> None:
    """While PostgreSQL does not answer an ack fails; it is recorded once it answers again."""
    parts = urlsplit(postgres_database)
    assert parts.hostname is not None
    assert parts.port is not None
    async with CutProxy(parts.hostname, parts.port) as proxy:
        user = parts.netloc.rpartition("@")[0]
        url = urlunsplit(parts._replace(netloc=f"{user}@{proxy.address}"))
        instance = await asyncio.to_thread(serve_shared, serve, url, nats_server.url)
        await send(instance, 3)
        async with session(instance, "default") as socket:
            proxy.cut()
            await ack(socket, 2)
            async with instance.async_http(BOB) as http:
                refused = await http.post("/v1/messages/ack", json={"version": 1})
            assert refused.status_code == 503
            await ack(socket, 3)
            proxy.heal()
            await kept(instance, [])
            assert await count(instance, Metric.ACKS_RECORDED) <= 2
            await (await socket.ping())  # the session is open

"""Roles apart: gateways, API and processor as processes of their own, on real engines."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import websockets

from pokebridge.client import PokeClient
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import Poke
from pokebridge.testing.mailbox_kit import ALICE, BOB, message
from tests.support import Daemon, Instance, Serve, wait_until


async def readiness(instance: Instance) -> str:
    """Why ``instance`` is not ready; empty when it is."""
    async with instance.async_http() as http:
        answer = await http.get("/readyz")
        return "" if answer.status_code == httpx.codes.OK else str(answer.json()["detail"])


async def is_ready(instance: Instance) -> bool:
    """Whether it is."""
    return await readiness(instance) == ""


@asynccontextmanager
async def awake(gateway: Instance) -> AsyncIterator[list[int]]:
    """The versions that Bob was poked with at ``gateway``, where he pulls nothing."""
    poked: list[int] = []

    async def pull(cursor: int) -> int:
        poked.append(cursor)
        return cursor

    async with PokeClient(gateway.url, gateway.token(BOB), on_poke=pull) as client:
        await client.wait_ready(60)
        yield poked


async def send(api: Instance) -> int:
    """Send Bob a message; its version."""
    async with api.async_http(ALICE, "send") as http:
        answer = await http.post("/v1/messages", json={"recipient": BOB, "body": 1})
        assert answer.status_code == httpx.codes.ACCEPTED, answer.text
        return int(answer.json()["version"])


async def pulled(api: Instance) -> list[int]:
    """The versions that Bob pulls."""
    async with api.async_http(BOB) as http:
        answer = await http.get("/v1/messages")
        return [kept["version"] for kept in answer.json()["messages"]]


async def test_roles_apart_work_together(
    nats_server: Daemon, own_postgres_server: Daemon, serve: Serve
) -> None:
    """A gateway, an API and a processor: what is sent here is poked there, and pulled here.

    Each one's readiness tells of its own parts: without the mailbox the gateway serves on.
    """
    start = partial(serve, transport=nats_server.url, mailbox=own_postgres_server.url, drain_s=0)
    cluster = f"roles-{time.monotonic_ns()}"
    gateway, api, processor = await asyncio.gather(
        *(
            asyncio.to_thread(start, "--roles", role, cluster=cluster)
            for role in ("gateway", "api", "processor")
        )
    )
    async with awake(gateway) as poked:
        seen = len(poked)
        assert await send(api) == 1
        await wait_until(lambda: len(poked) > seen)
        assert await pulled(api) == [1]
        async with gateway.async_http(BOB) as http:
            assert (await http.get("/v1/messages")).status_code == httpx.codes.NOT_FOUND
        async with processor.async_http(BOB) as http:
            assert (await http.get("/v1/messages")).status_code == httpx.codes.NOT_FOUND
        await asyncio.to_thread(own_postgres_server.kill)
        for instance in (api, processor):
            await wait_until(partial(readiness, instance))
            assert (await readiness(instance)).startswith("mailbox: ")
        assert await readiness(gateway) == ""
        await asyncio.to_thread(own_postgres_server.start)
        for instance in (api, processor):
            await wait_until(partial(is_ready, instance))
        seen = len(poked)
        assert await send(api) == 2
        await wait_until(lambda: len(poked) > seen)


async def test_only_a_processor_looks_after_the_mailbox(
    nats_server: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """What a dead process left is poked, and what has expired purged, by the role processor alone.

    The API's instance pokes what it committed itself.
    """
    path = tmp_path / "mailbox.db"
    long_ago = await SqliteMailbox.open(path, clock=lambda: time.time() - 600)
    await long_ago.append(message(ttl_s=1))
    start = partial(
        serve, transport=nats_server.url, mailbox=f"sqlite:///{path}", cluster=f"c{time.time_ns()}"
    )
    api = await asyncio.to_thread(start, "--roles", "api")
    gateway = await asyncio.to_thread(start, "--roles", "gateway")
    async with awake(gateway) as poked:
        seen = len(poked)
        async with api.async_http(ALICE, "send") as http:
            eve = {"recipient": "urn:user:eve", "body": 1}
            await http.post("/v1/messages", json=eve)

        async def only_bob_is_owed() -> bool:
            return (await long_ago.stats()).outbox == 1

        await wait_until(only_bob_is_owed)  # the API has poked and confirmed what is its own
        stats = await long_ago.stats()
        assert (stats.outbox, stats.messages) == (1, 2)
        assert len(poked) == seen
        await asyncio.to_thread(start, "--roles", "processor")
        await wait_until(lambda: len(poked) > seen)

        async def all_is_done() -> bool:
            stats = await long_ago.stats()
            return (stats.outbox, stats.messages) == (0, 1)

        await wait_until(all_is_done)
    await long_ago.close()


async def test_a_gateway_alone_needs_no_mailbox(
    nats_server: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """It runs where the mailbox can't be reached at all."""
    nowhere = f"sqlite:///{tmp_path}/missing/mailbox.db"
    gateway = await asyncio.to_thread(
        serve, "--roles", "gateway", transport=nats_server.url, mailbox=nowhere
    )
    assert await readiness(gateway) == ""


async def test_a_gateway_alone_reads_the_mailbox_that_it_is_told(
    nats_server: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """It finds pokes that were lost, and revocations: also when the mailbox comes after it."""
    path = tmp_path / "mailbox.db"
    start = partial(
        serve,
        transport=nats_server.url,
        mailbox=f"sqlite:///{path}",
        cluster=f"c{time.time_ns()}",
        verify_every_s=2,
    )
    gateway = await asyncio.to_thread(start, "--roles", "gateway")
    async with awake(gateway) as poked:
        mailbox = await SqliteMailbox.open(path)
        seen = len(poked)
        receipt = await mailbox.append(message())
        # As if the poke had been published and lost.
        await mailbox.confirm_outbox([Poke(BOB, receipt.version)])
        await wait_until(lambda: len(poked) > seen)
        await mailbox.close()
    api = await asyncio.to_thread(start, "--roles", "api")
    async with api.async_http("urn:admin", "admin") as http:
        answer = await http.delete(f"/v1/sessions/{ALICE}", params={"revoke": "true"})
        assert answer.status_code == httpx.codes.NO_CONTENT
    later = await asyncio.to_thread(start, "--roles", "gateway")

    async def refuses_alice() -> bool:
        try:
            await (await websockets.connect(later.ws_url, additional_headers=headers)).close()
        except websockets.InvalidStatus as refusal:
            return refusal.response.status_code == httpx.codes.UNAUTHORIZED
        return False

    headers = later.headers(ALICE)  # a token that does not say when it was issued counts as old
    await wait_until(refuses_alice)


async def test_a_processor_tells_that_its_pokes_are_stuck(
    own_nats_server: Daemon, serve: Serve, postgres_database: str
) -> None:
    """Without a gateway no subscription tells of a dead transport, but what can't be published.

    The API takes messages all the same: their pokes are owed.
    """
    start = partial(serve, transport=own_nats_server.url, mailbox=postgres_database)
    api, processor = await asyncio.gather(
        *(asyncio.to_thread(start, "--roles", role) for role in ("api", "processor"))
    )
    await asyncio.to_thread(own_nats_server.kill)
    await send(api)
    await wait_until(partial(readiness, processor))
    assert await readiness(processor) == "transport: pokes can't be published"
    assert await readiness(api) == ""
    await asyncio.to_thread(own_nats_server.start)
    await wait_until(partial(is_ready, processor))
    mailbox = await PostgresMailbox.open(postgres_database)

    async def nothing_is_owed() -> bool:
        return (await mailbox.stats()).outbox == 0

    await wait_until(nothing_is_owed)
    await mailbox.close()

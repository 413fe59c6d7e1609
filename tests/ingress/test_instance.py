"""Ingress into real instances, which are killed amid it."""

import asyncio
import json
import secrets
from functools import partial
from pathlib import Path

import asyncpg
import httpx

from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.telemetry import Metric
from pokebridge.testing.mailbox_kit import ALICE, BOB, head
from tests.ingress.queues import NatsQueue
from tests.support import Daemon, Instance, Serve, wait_until
from tests.support.silence import Silence

COUNT = 1_000


async def test_every_message_is_committed_once_whoever_is_killed(
    nats_server: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """Two processors share a stream; one is killed with SIGKILL amid it, and starts again.

    Each message is committed once, in dense versions, and its poke is owed to nobody in the end.
    """
    queue = await NatsQueue.make(nats_server.url)
    await queue.make_consumer(ack_wait_s=2)  # instead of 10 s
    path = tmp_path / "mailbox.db"
    start = partial(
        serve,
        "--roles",
        "processor",
        transport=nats_server.url,
        mailbox=f"sqlite:///{path}",
        ingress=queue.url,
        cluster=queue.cluster,
    )
    dying, _ = await asyncio.gather(asyncio.to_thread(start), asyncio.to_thread(start))
    mailbox = await SqliteMailbox.open(path)
    bodies = [
        json.dumps({"sender": ALICE, "recipient": BOB, "body": n}).encode() for n in range(COUNT)
    ]
    publishing = asyncio.create_task(queue.publish(*bodies))

    async def has(count: int) -> bool:
        return await head(mailbox, BOB) >= count

    await wait_until(partial(has, COUNT // 10))
    await asyncio.to_thread(dying.kill)
    await asyncio.to_thread(dying.start)
    await publishing
    await queue.publish(b"Dear Bob")
    await wait_until(partial(has, COUNT), timeout_s=30)
    read: list[int] = []
    while len(read) < COUNT:
        page = await mailbox.read(BOB, after=len(read), limit=500)
        assert [kept.version for kept in page.messages] == list(
            range(len(read) + 1, len(read) + len(page.messages) + 1)
        )
        read += [int(kept.body) for kept in page.messages]
    assert sorted(read) == list(range(COUNT))

    async def nothing_is_left() -> bool:
        return await queue.unacked() == 0 and (await mailbox.stats()).outbox == 0

    await wait_until(nothing_is_left, timeout_s=30)
    assert await head(mailbox, BOB) == COUNT
    assert [letter.body for letter in await queue.dead_letters()] == [b"Dear Bob"]
    async with dying.async_http() as http:
        metrics = (await http.get("/metrics")).text
        assert "pokebridge_ingress_up 1.0" in metrics
        assert (await http.get("/readyz")).status_code == httpx.codes.OK
    await mailbox.close()
    await queue.close()


async def test_a_role_that_is_refused_is_waited_out(
    nats_server: Daemon, postgres_database: str, serve: Serve, silence: Silence
) -> None:
    """While PostgreSQL refuses the instance, its queue waits, and callers get 503 without names."""
    queue = await NatsQueue.make(nats_server.url)
    role = f"role_{secrets.token_hex(8)}"
    by_hand = await asyncpg.connect(postgres_database)
    await by_hand.execute(f"CREATE ROLE {role} LOGIN; CREATE SCHEMA {role} AUTHORIZATION {role}")
    url = postgres_database.replace("postgres@", f"{role}@")
    instance = await asyncio.to_thread(
        serve,
        transport=nats_server.url,
        mailbox=f"{url}?schema={role}",
        ingress=queue.url,
        cluster=queue.cluster,
    )
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1"
    await by_hand.execute(f"ALTER ROLE {role} NOLOGIN")
    await by_hand.execute(end, role)
    told = silence("PostgreSQL refuses the mailbox's role, until readiness tells")
    await wait_until(lambda: is_not_ready(instance))
    told()
    await queue.publish(
        *(json.dumps({"sender": ALICE, "recipient": BOB, "body": n}).encode() for n in range(20))
    )
    async with instance.async_http(ALICE, "send") as http:
        answer = await http.post("/v1/messages", json={"recipient": BOB, "body": 1})
    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert "Retry-After" in answer.headers
    assert role not in answer.text
    await wait_until(lambda: has_retried(instance))
    await by_hand.execute(f"ALTER ROLE {role} LOGIN")
    pulled = silence("PostgreSQL accepts the mailbox's role again, until 20 queued messages came")

    async def has_all() -> bool:
        async with instance.async_http(BOB) as http:
            answer = await http.get("/v1/messages")
        return answer.is_success and len(answer.json()["messages"]) == 20

    await wait_until(has_all)
    pulled()
    assert await queue.dead_letters() == []
    await queue.close()
    await by_hand.close()


async def is_not_ready(instance: Instance) -> bool:
    """Whether readiness tells of trouble."""
    async with instance.async_http() as http:
        return (await http.get("/readyz")).status_code == httpx.codes.SERVICE_UNAVAILABLE


async def has_retried(instance: Instance) -> bool:
    """Whether queued messages went back into the queue."""
    async with instance.async_http() as http:
        page = (await http.get("/metrics")).text
    return f'{Metric.INGRESS_MESSAGES}{{result="retried"}} 0.0' not in page

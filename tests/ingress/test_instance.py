"""Ingress into real instances, which are killed amid it."""

import asyncio
import json
from functools import partial
from pathlib import Path

import httpx

from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.testing.mailbox_kit import ALICE, BOB, head
from tests.ingress.queues import NatsQueue
from tests.support import Daemon, Serve, wait_until

COUNT = 1_000


async def test_every_message_is_committed_once_whoever_is_killed(
    nats_server: Daemon, serve: Serve, tmp_path: Path
) -> None:
    """Two processors share a stream; one is killed with SIGKILL amid it, and starts again.

    Each message is committed once, in dense versions, and its poke is owed to nobody in the end.
    """
    queue = await NatsQueue.make(nats_server.url)
    await queue.make_consumer(ack_wait_s=2)  # instead of 10 s, after which the killed one's come
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

"""Processes that receive signals: ``python -m benchmarks.receivers ENGINE ours|bare URL TOPIC``.

Prints ``ready`` when it is subscribed (on Pub/Sub URL is the project); then for each line COUNT on
stdin it receives so many signals, and prints the CPU seconds (user and system) that took, and the
seconds from the first to the last. ``ours`` is the transport and the bridge, which has no session
for any poke. ``bare`` is the engine's own client for asyncio, whose messages are dropped.
Both run on uvloop.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import nats
import uvloop
from google.pubsub_v1 import SubscriberAsyncClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from google.pubsub_v1.types import StreamingPullRequest
from nats.aio.msg import Msg
from redis.asyncio import Redis

from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.session_map import SessionMap
from pokebridge.telemetry import configure_logging
from pokebridge.transport.base import Feed, Selection, Transport
from pokebridge.transport.google_pubsub import GooglePubSubTransport
from pokebridge.transport.nats import NatsTransport
from pokebridge.transport.redis import RedisTransport

ACK_EVERY_S = 0.1  # as the transport does


class Count:
    """Counts signals until the expected number has arrived."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self._left = 0
        self._done = asyncio.Event()

    def add(self, signals: int = 1) -> None:
        """Count ``signals`` signals."""
        if not self.first_s:
            self.first_s = time.perf_counter()
        self._left -= signals
        if self._left <= 0:
            self._done.set()

    async def down(self, signals: int) -> None:
        """Wait until ``signals`` more have arrived."""
        self.first_s = 0.0
        self._left += signals
        if self._left > 0:
            self._done.clear()
            await self._done.wait()


async def connect(engine: str, url: str, topic: str, instance: str) -> Transport:
    """Our transport on ``engine``, with ``topic`` instead of ``push-notifications``."""
    if engine == "nats":
        return await NatsTransport.connect(url, subject=topic)
    if engine == "redis":
        return await RedisTransport.connect(url, channel=topic)
    return await GooglePubSubTransport.connect(url, topic, instance=instance, sweep_every_s=None)


class NobodyHere:
    """A receiver whose bridge parses each signal, and finds no session for it."""

    def __init__(self, count: Count) -> None:
        self._bridge = Bridge(SessionMap(max_sessions_per_recipient=1))
        self._count = count

    def on_signal(self, body: bytes, tag: str | None) -> None:  # noqa: ARG002 - a Receiver's
        """See the port."""
        self._bridge.on_signal(body)
        self._count.add()

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Fail: lost signals would never arrive."""
        sys.exit(f"a gap in {selection}: {reason}")


@contextlib.asynccontextmanager
async def _ours(engine: str, url: str, topic: str, count: Count) -> AsyncIterator[None]:
    transport = await connect(engine, url, topic, "receiver")
    await transport.subscribe(Feed.ALL, NobodyHere(count))
    yield
    await transport.close()


@contextlib.asynccontextmanager
async def _bare_nats(url: str, topic: str, count: Count) -> AsyncIterator[None]:
    client = await nats.connect(url)

    async def on_message(_: Msg) -> None:
        count.add()

    for subject in (topic, f"{topic}.*"):
        await client.subscribe(subject, cb=on_message)
    await client.flush()
    yield
    await client.close()


@contextlib.asynccontextmanager
async def _bare_redis(url: str, topic: str, count: Count) -> AsyncIterator[None]:
    async with Redis.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.subscribe(topic)
        await pubsub.psubscribe(f"{topic}.*")

        async def listen() -> None:
            async for message in pubsub.listen():
                if message["type"] in {"message", "pmessage"}:
                    count.add()

        async with _background(listen()):
            yield


@contextlib.asynccontextmanager
async def _bare_pubsub(url: str, topic: str, count: Count) -> AsyncIterator[None]:
    """Google's ``SubscriberAsyncClient``; its ``subscribe()`` with threads takes twice the CPU."""
    acks: list[str] = []
    name = f"projects/{url}/subscriptions/bare"

    async def requests() -> AsyncIterator[StreamingPullRequest]:
        yield StreamingPullRequest(subscription=name, stream_ack_deadline_seconds=10)
        while True:
            await asyncio.sleep(ACK_EVERY_S)
            if acks:
                batch = acks.copy()
                acks.clear()
                yield StreamingPullRequest(ack_ids=batch)

    async with grpc.aio.insecure_channel(os.environ["PUBSUB_EMULATOR_HOST"]) as channel:
        client = SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))
        await client.create_subscription(name=name, topic=f"projects/{url}/topics/{topic}")

        async def listen() -> None:
            async for response in await client.streaming_pull(requests=requests()):
                received = response.received_messages
                acks.extend(message.ack_id for message in received)
                count.add(len(received))

        async with _background(listen()):
            yield


@contextlib.asynccontextmanager
async def _background(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


_BARE: dict[str, Callable[..., Any]] = {
    "nats": _bare_nats,
    "redis": _bare_redis,
    "pubsub": _bare_pubsub,
}


async def _obey(engine: str, kind: str, url: str, topic: str) -> None:
    loop, commands = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    count = Count()
    receiving = (
        _ours(engine, url, topic, count) if kind == "ours" else _BARE[engine](url, topic, count)
    )
    async with receiving:
        print("ready", flush=True)
        while signals := await commands.readline():
            started_s = time.process_time()
            await count.down(int(signals))
            used_s = time.process_time() - started_s
            print(used_s, time.perf_counter() - count.first_s, flush=True)


if __name__ == "__main__":
    configure_logging("json", "warning")
    uvloop.run(_obey(*sys.argv[1:]))

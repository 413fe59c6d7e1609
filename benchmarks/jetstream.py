"""NATS JetStream over WebSocket: publish, store, push, explicit ack (for ``cycle``)."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import nats
import psutil
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from benchmarks.carriers import Carrier
from benchmarks.harness import PATIENCE_S, Server, recipient
from benchmarks.mailbox import BODY
from tests.support import free_port
from tests.support.engines import run_configured_nats

_CONFIG = """
websocket {{ listen: "127.0.0.1:{port}", no_tls: true }}
jetstream {{ store_dir: "store"{sync} }}
"""


@contextlib.asynccontextmanager
async def jetstream(
    name: str, clients: int, messages: int, *, flushes_each: bool
) -> AsyncIterator[Carrier]:
    """A nats-server with a WebSocket for each client, and one for the sender.

    It writes its files to the disk every two minutes, which is its default, or ``flushes_each``
    message.
    """
    port = free_port()
    sync = ", sync_interval: always" if flushes_each else ""
    async with contextlib.AsyncExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory())
        running = run_configured_nats(Path(folder), _CONFIG.format(port=port, sync=sync))
        daemon = opened.enter_context(running)

        async def connect() -> Client:
            client = await nats.connect(f"ws://127.0.0.1:{port}")
            opened.push_async_callback(client.close)
            return client

        async with asyncio.timeout(PATIENCE_S):
            sender = (await connect()).jetstream()
            await sender.add_stream(name="messages", subjects=["to.>"])
            receivers = [
                await _Receiver(sender, f"to.{recipient(number)}").subscribe(await connect())
                for number in range(clients)
            ]
        yield Carrier(name, Server(port, psutil.Process(daemon.pid)), receivers, messages)


class _Receiver:
    """A client with a push consumer of its own."""

    def __init__(self, sender: JetStreamContext, subject: str) -> None:
        self._sender = sender
        self._subject = subject
        self._heard: asyncio.Future[float]
        self._turn = asyncio.Lock()

    async def subscribe(self, client: Client) -> Self:
        """Make the consumer."""
        config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, deliver_policy=DeliverPolicy.NEW)
        await client.jetstream().subscribe(
            self._subject, cb=self._on_message, manual_ack=True, config=config
        )
        return self

    async def cycle(self) -> float:
        """See the protocol."""
        sent_s = time.perf_counter()
        async with self._turn:
            self._heard = asyncio.get_running_loop().create_future()
            await self._sender.publish(self._subject, BODY)
            return await self._heard - sent_s

    async def _on_message(self, message: Msg) -> None:
        heard_s = time.perf_counter()
        await message.ack()
        self._heard.set_result(heard_s)

"""A hub and its workers in one process: real gateways, channels and sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from pokebridge.gateway.acks import RecordAcks
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.gateway import Gateway
from pokebridge.publisher import Publisher
from pokebridge.server.http import HttpProtocol
from pokebridge.session import Timing
from pokebridge.tokens import TokenVerifier
from pokebridge.workers.channel import Channel
from pokebridge.workers.frames import ToWorker, decode_to_worker
from pokebridge.workers.host_publisher import HostPublisher
from pokebridge.workers.link import WorkerLink
from pokebridge.workers.worker_gateway import WorkerGateway
from tests.gateway.harness import BOB, SECRET, Client, DeafTransport, not_found, token


@dataclass
class InProcessWorker:
    """One worker, on a port of its own, so that a test chooses where a client connects."""

    gateway: WorkerGateway = field(init=False)
    channel: Channel[ToWorker] = field(init=False)
    port: int = 0

    def take(self, message: ToWorker) -> None:
        """A message of the hub arrives."""
        self.gateway.take(message)


@dataclass
class Host:
    """A hub with workers."""

    gateway: Gateway
    transport: DeafTransport
    publisher: Publisher
    timing: Timing = field(default_factory=Timing)
    links: list[WorkerLink] = field(default_factory=list)
    workers: list[InProcessWorker] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    async def connect(self, worker: int, subject: str = BOB, path: str = "/v1/connect") -> Client:
        """A client of ``worker`` (0, 1, …) whose handshake was answered."""
        client = await Client.dial(self.workers[worker].port)
        self.clients.append(client)
        await client.handshake(path, (f"Authorization: Bearer {token(subject)}",))
        return client

    async def open(self, worker: int, subject: str = BOB, path: str = "/v1/connect") -> Client:
        """A client that has heard ``ready``."""
        client = await self.connect(worker, subject, path)
        assert client.status == 101, client.head
        assert (await client.message())["type"] == "ready"
        return client


@asynccontextmanager
async def running_host(
    workers: int = 2, record_acks: RecordAcks | None = None, **config: Any
) -> AsyncIterator[Host]:
    """A hub whose gateway has ``config``, and ``workers``."""
    of_hub = GatewayConfig(instance="i-1", max_sessions_per_recipient=64, verify_every_s=60)
    transport = DeafTransport()
    gateway = Gateway(
        replace(of_hub, **config),
        transport,
        TokenVerifier(secret=SECRET),
        record_acks=record_acks,
    )
    await gateway.start()
    publisher = HostPublisher(transport, linger_s=0)
    publisher.deliver = gateway.deliver
    host = Host(gateway, transport, publisher, config.get("timing", Timing()))
    async with AsyncExitStack() as stack:
        for number in range(1, workers + 1):
            await stack.enter_async_context(_working(host, number))
        try:
            yield host
        finally:
            for client in host.clients:
                await client.close()
            await host.publisher.close()
    await gateway.close()


@asynccontextmanager
async def _working(host: Host, number: int) -> AsyncIterator[None]:
    loop, worker = asyncio.get_running_loop(), InProcessWorker()
    link = WorkerLink(number, host.gateway)
    ours, its = socket.socketpair()
    worker.channel = Channel(decode_to_worker, worker.take, lambda: None)
    config = GatewayConfig(
        instance="i-1", max_sessions_per_recipient=64, verify_every_s=60, timing=host.timing
    )
    takes_acks = host.gateway.on_ack is not None
    verifier = TokenVerifier(secret=SECRET)
    worker.gateway = WorkerGateway(config, verifier, worker.channel.send, takes_acks=takes_acks)
    worker.channel.on_flush = worker.gateway.send_acks
    worker.gateway.start(serves=True)
    await link.channel.connect(ours)
    await worker.channel.connect(its)
    state = ServerState()
    server_config = uvicorn.Config(not_found, http=HttpProtocol, ws="none", log_config=None)
    server_config.load()
    server = await loop.create_server(
        lambda: HttpProtocol(server_config, state, {}, gateway=worker.gateway), "127.0.0.1", 0
    )
    worker.port = server.sockets[0].getsockname()[1]
    host.links.append(link)
    host.workers.append(worker)
    try:
        yield
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        worker.gateway.close()
        worker.channel.close()
        link.channel.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.wait_closed(), 1.0)

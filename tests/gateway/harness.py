"""A real gateway on a loopback port in the test's own loop, and a client that may break rules."""

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import uvicorn
from uvicorn.server import ServerState
from websockets.frames import Frame
from websockets.frames import Opcode as TheirOpcode

from pokebridge.asgi import ASGIApp
from pokebridge.gateway.acks import RecordAcks
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.subscriptions import SubscriptionTiming
from pokebridge.gateway.verification import Heads
from pokebridge.model import Poke
from pokebridge.publisher import Publisher
from pokebridge.server.http import HttpProtocol
from pokebridge.session import Timing
from pokebridge.tokens import TokenVerifier, sign_token
from pokebridge.transport.base import Receiver, Selection, Signal, Subscription
from pokebridge.transport.memory import MemoryTransport

SECRET = "0123456789abcdef" * 4
BOB = "urn:user:bob"
TIMEOUT_S = 5.0
# Short enough for tests, and long enough for a busy machine.
QUICK = Timing(ping_interval_s=0.4, pong_timeout_s=0.6, ready_timeout_s=1.0, close_timeout_s=0.5)
PATIENT = Timing()


def token(subject: str = BOB, ttl_s: float = 600, secret: str = SECRET) -> str:
    """A valid token."""
    return sign_token(secret, subject, [], ttl_s)


class DeafTransport(MemoryTransport):
    """An in-process bus that delivers to nobody while ``deaf``."""

    deaf = False
    receivers: list[Receiver]

    def __init__(self) -> None:
        super().__init__()
        self.receivers = []
        self.subscribed: list[Selection] = []

    async def publish(self, signals: Any) -> None:
        """Deliver, unless deaf."""
        if not self.deaf:
            await super().publish(signals)

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:  # type: ignore[override]
        """Subscribe, and keep the receiver so that a test can report a gap to it."""
        self.receivers.append(receiver)
        self.subscribed.append(selection)
        return await super().subscribe(selection, receiver)


async def not_found(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI app beside the gateway: reads the body, answers 404."""
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    await send(
        {"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]}
    )
    await send({"type": "http.response.body", "body": b""})


@dataclass
class Running:
    """A gateway that listens."""

    gateway: Gateway
    transport: DeafTransport
    publisher: Publisher
    port: int
    clients: "list[Client]" = field(default_factory=list)

    @property
    def connections(self) -> list[Connection]:
        """The sessions' sockets."""
        return [each for each in self.gateway.sessions if isinstance(each, Connection)]

    async def dial(self, receive_buffer: int | None = None) -> "Client":
        """A client that has said nothing yet."""
        client = await Client.dial(self.port, receive_buffer)
        self.clients.append(client)
        return client

    async def poke(self, recipient: str = BOB, version: int | None = None) -> None:
        """Publish a poke; it is with the sockets when this returns."""
        await self.publisher.publish([Poke(recipient, version)])

    async def publish_raw(self, body: bytes) -> None:
        """Publish a signal made by hand."""
        await self.transport.publish([Signal(body)])

    async def open(self, subject: str = BOB, path: str = "/v1/connect", **options: Any) -> "Client":
        """A client that has heard ``ready``."""
        client = await self.connect(subject, path, **options)
        assert (await client.message())["type"] == "ready"
        return client

    async def connect(
        self,
        subject: str = BOB,
        path: str = "/v1/connect",
        *,
        bearer: str | None = None,
        headers: tuple[str, ...] = (),
        receive_buffer: int | None = None,
    ) -> "Client":
        """A client whose handshake was accepted."""
        client = await self.dial(receive_buffer)
        given = bearer or token(subject)
        await client.handshake(path, (f"Authorization: Bearer {given}", *headers))
        assert client.status == 101, client.head
        return client


@contextlib.asynccontextmanager
async def running(
    timing: Timing = PATIENT,
    verifier: Any = None,
    record_acks: RecordAcks | None = None,
    heads: Heads | None = None,
    create_app: Callable[[Gateway], ASGIApp] = lambda _: not_found,
    **config: Any,
) -> AsyncIterator[Running]:
    """Serve a gateway with ``config`` until the block ends."""
    transport = DeafTransport()
    settings = replace(
        GatewayConfig(
            instance="i-1",
            max_sessions_per_recipient=64,
            verify_every_s=60,
            timing=timing,
            subscription_timing=SubscriptionTiming(
                silence_s=0.2, probe_timeout_s=0.2, retry_s=0.05, retire_delay_s=0.1
            ),
        ),
        **config,
    )
    verifier = verifier or TokenVerifier(secret=SECRET)
    gateway = Gateway(settings, transport, verifier, heads, record_acks)
    await gateway.start()
    state = ServerState()
    app: Any = create_app(gateway)
    server_config = uvicorn.Config(app, http=HttpProtocol, ws="none", log_config=None)
    server_config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: HttpProtocol(server_config, state, {}, gateway=gateway), "127.0.0.1", 0
    )
    publisher = Publisher(transport, linger_s=0)
    server_end = Running(gateway, transport, publisher, server.sockets[0].getsockname()[1])
    try:
        yield server_end
    finally:
        for client in server_end.clients:
            await client.close()
        await publisher.close()
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await gateway.close()
        await server.wait_closed()


class Client:
    """A WebSocket client in the raw, for saying what no library would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def dial(cls, port: int, receive_buffer: int | None = None) -> Self:
        """Connect; nothing is said yet."""
        sock = socket.socket()
        sock.setblocking(False)  # noqa: FBT003 - its only form
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            return cls(*await asyncio.open_connection(sock=sock, limit=2**16))
        except BaseException:
            sock.close()
            raise

    async def handshake(
        self,
        path: str = "/v1/connect",
        headers: tuple[str, ...] = (),
        *,
        bare: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> int:
        """Ask for the upgrade; ``bare`` leaves every usual header to ``headers``."""
        usual = (
            ()
            if bare
            else (
                "Host: localhost",
                "Upgrade: websocket",
                "Connection: Upgrade",
                f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
                "Sec-WebSocket-Version: 13",
            )
        )
        lines = (f"GET {path} HTTP/1.1", *usual, *headers, "", "")
        return await self.request("\r\n".join(lines), timeout_s)

    async def request(self, text: str | bytes, timeout_s: float = TIMEOUT_S) -> int:
        """Send a request as it stands; the status of the answer."""
        self.writer.write(text.encode() if isinstance(text, str) else text)
        async with asyncio.timeout(timeout_s):
            self.head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = self.head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        return self.status

    async def problem(self) -> Any:
        """The problem details that follow a refusal."""
        assert self.headers["content-type"] == "application/problem+json"
        body = await self.reader.readexactly(int(self.headers["content-length"]))
        return json.loads(body)

    def send(self, opcode: TheirOpcode, payload: bytes, *, fin: bool = True) -> None:
        """Send a masked frame."""
        self.send_raw(Frame(opcode, payload, fin).serialize(mask=True))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)

    def say(self, message: Any) -> None:
        """Send a JSON message."""
        self.send(TheirOpcode.TEXT, json.dumps(message).encode())

    async def frame(self, timeout_s: float = TIMEOUT_S) -> tuple[int, bytes]:
        """The next frame: opcode and payload."""
        async with asyncio.timeout(timeout_s):
            first, size = await self.reader.readexactly(2)
            assert first & 0x80, "servers here never fragment"
            if size == 126:
                (size,) = struct.unpack("!H", await self.reader.readexactly(2))
            return first & 0x0F, await self.reader.readexactly(size)

    async def message(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The next JSON message; pings on the way are answered."""
        while True:
            opcode, payload = await self.frame(timeout_s)
            if opcode == TheirOpcode.PING:
                self.send(TheirOpcode.PONG, payload)
                continue
            assert opcode == TheirOpcode.TEXT, (opcode, payload)
            return json.loads(payload)

    async def closed(self, timeout_s: float = TIMEOUT_S) -> int:
        """The code of the close frame that comes, and the end of the stream after our answer."""
        async with asyncio.timeout(timeout_s):
            while True:
                opcode, payload = await self.frame(timeout_s)
                if opcode == TheirOpcode.CLOSE:
                    break
            with contextlib.suppress(ConnectionError):
                self.send(TheirOpcode.CLOSE, payload[:2])
                assert await self.reader.read() == b""
        return int.from_bytes(payload[:2], "big")

    async def gone(self, timeout_s: float = TIMEOUT_S) -> bool:
        """True once the stream has ended, whatever came before."""
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(65536):
                    pass
        return True

    def stop_reading(self) -> None:
        """Leave what comes in the kernel's buffer."""
        self.writer.transport.pause_reading()  # type: ignore[attr-defined] # a socket's has it

    def read_on(self) -> None:
        """Undo ``stop_reading``."""
        self.writer.transport.resume_reading()  # type: ignore[attr-defined] # a socket's has it

    async def close(self) -> None:
        """Hang up without a word."""
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


__all__ = ["BOB", "QUICK", "Client", "Running", "running", "token"]

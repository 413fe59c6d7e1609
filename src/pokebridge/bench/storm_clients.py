"""Light clients: the smart client's own rules, over a socket without a library.

Each is a :class:`~pokebridge.client.core.ClientCore`, so it behaves as any client of pokebridge:
full jitter, ``Retry-After`` heeded, pull on ``ready`` and on pokes. Around it is as little as will
do: no task, queue or buffer that stays, so that one process can be tens of thousands of them.
"""

import asyncio
import re
import struct
from collections.abc import Iterator
from datetime import datetime
from time import monotonic

import msgspec

from pokebridge.bench.storm_fleet import Balancer, Endpoint
from pokebridge.bench.storm_http import HOST, Answer
from pokebridge.client.core import ClientCore, Policy
from pokebridge.client.driver import Driver
from pokebridge.client.events import (
    Closed,
    Opened,
    Pulled,
    PullFailed,
    Refused,
    Start,
    Text,
    Token,
)
from pokebridge.client.pulling import retry_after_s
from pokebridge.framing import Opcode
from pokebridge.wire import CONNECT_PATH

ABNORMAL_CLOSURE = 1006
# What the balancer in front of all instances is called; a move names one of them.
BALANCER_URL = f"ws://balancer{CONNECT_PATH}"
_POLICY = Policy()
_HEAD_ENDS = b"\r\n\r\n"
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)\r\n", re.IGNORECASE)
# A client must mask (RFC 6455, section 5.3). This mask leaves the payload as it is.
_MASK = bytes(4)


class PulledMessage(msgspec.Struct):
    """What is wanted to be known of a message; ``sent_at`` is when it was committed."""

    id: str
    sent_at: datetime


class _Page(msgspec.Struct):
    messages: list[PulledMessage]
    version: int
    more: bool


class Observer:
    """What the clients tell whoever watches the storm; every time is of the monotonic clock."""

    def on_handshake(self, where: Endpoint, status: int, asked_s: float) -> None:
        """A handshake that was sent at ``asked_s`` has been answered."""

    def on_connected(self, change: int) -> None:
        """A client more is ready, or one less: ``change`` is 1 or -1."""

    def on_poke(self, client: "StormClient") -> None:
        """``client`` hears a poke."""

    def on_pull(self, client: "StormClient", messages: list[PulledMessage]) -> None:
        """``client`` has pulled, and got ``messages``."""


class StormClient(Driver):
    """One recipient's client."""

    __slots__ = (
        "_balancer",
        "_loop",
        "_observer",
        "_pulled_after_ready",
        "_readies",
        "_socket",
        "_token",
        "recipient",
        "where",
    )

    def __init__(self, balancer: Balancer, observer: Observer, recipient: str, token: str) -> None:
        super().__init__(ClientCore(BALANCER_URL, policy=_POLICY))
        self._loop = asyncio.get_running_loop()
        self._balancer = balancer
        self._observer = observer
        self._token = token
        self._socket: _Socket | None = None
        self._readies = 0
        self._pulled_after_ready = 0
        self.recipient = recipient
        self.where: Endpoint | None = None
        """The instance of its socket, if it has one."""

    @property
    def ready(self) -> bool:
        """Whether it hears pokes."""
        return self._core.ready

    @property
    def caught_up(self) -> bool:
        """Whether it is ready and has pulled since."""
        return self._core.ready and self._pulled_after_ready == self._readies

    def start(self) -> None:
        """Connect, and stay connected."""
        self._feed(Start())

    def stop(self) -> None:
        """Hang up without a word."""
        self._set_timer(None)
        self._disconnect()

    def _on_ready_changed(self) -> None:
        self._readies += self._core.ready
        self._observer.on_connected(1 if self._core.ready else -1)

    def _fetch_token(self) -> None:
        self._feed(Token())

    def _stop(self, code: int) -> None:  # noqa: ARG002 - whatever the reason
        self._disconnect()

    # --- the socket -------------------------------------------------------------------------------

    def _connect(self, url: str, *, moved: bool) -> None:
        self._disconnect()
        where = self._balancer.pick() if url == BALANCER_URL else self._balancer.at(url)
        query = "?moved=1" if moved else ""
        request = (
            f"GET {CONNECT_PATH}{query} HTTP/1.1\r\nHost: {HOST}:{where.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Authorization: Bearer {self._token}\r\n\r\n"
        )
        self.where = where
        self._socket = socket = _Socket(self, request.encode())
        task = self._loop.create_task(self._dial(socket, where.port))
        socket.dialling = task  # a loop keeps only a weak reference to its tasks

    def _ping(self) -> None:
        self._send(b'{"type":"ping"}')

    def _authenticate(self) -> None:
        self._send(b'{"type":"auth","token":"%b"}' % self._token.encode())

    def _send(self, text: bytes) -> None:
        if self._socket is not None:
            self._socket.send(Opcode.TEXT, text)

    async def _dial(self, socket: "_Socket", port: int) -> None:
        try:
            await self._loop.create_connection(lambda: socket, HOST, port)
        except OSError:
            socket.dialling = None
            self.on_socket_end(socket, Closed(ABNORMAL_CLOSURE))

    def _disconnect(self) -> None:
        socket, self._socket, self.where = self._socket, None, None
        if socket is not None:
            socket.abort()

    def on_handshake(self, socket: "_Socket", status: int, asked_s: float) -> None:
        """The instance has answered the handshake."""
        if socket is self._socket and self.where is not None:
            self._observer.on_handshake(self.where, status, asked_s)

    def on_open(self, socket: "_Socket") -> None:
        """The instance has accepted the handshake."""
        if socket is self._socket:
            self._feed(Opened())

    def on_text(self, socket: "_Socket", payload: bytes) -> None:
        """A message has come."""
        if socket is self._socket:
            if b'"poke"' in payload:
                self._observer.on_poke(self)
            self._feed(Text(payload.decode()))

    def on_socket_end(self, socket: "_Socket", event: Closed | Refused) -> None:
        """The socket is of no use any more."""
        if socket is self._socket:
            self._disconnect()
            self._feed(event)

    # --- pulls ------------------------------------------------------------------------------------

    def _pull(self, after: int) -> None:
        request = (
            f"GET /v1/messages?after={after} HTTP/1.1\r\nHost: {HOST}\r\n"
            f"Authorization: Bearer {self._token}\r\n\r\n"
        )
        readies = self._readies

        def done(answer: Answer | None) -> None:
            self._on_pulled(answer, readies)

        self._balancer.pick().http.send(request.encode(), done)

    def _on_pulled(self, answer: Answer | None, readies: int) -> None:
        if answer is None or answer.status != 200:
            self._feed(PullFailed(retry_after_s=answer.retry_after_s if answer else None))
            return
        page = msgspec.json.decode(answer.body, type=_Page)
        self._pulled_after_ready = readies
        self._observer.on_pull(self, page.messages)
        self._feed(Pulled(page.version, page.more))


class _Socket(asyncio.Protocol):
    """One connection of a client, from the handshake on."""

    __slots__ = ("_asked_s", "_buffer", "_client", "_is_open", "_request", "_transport", "dialling")

    def __init__(self, client: StormClient, request: bytes) -> None:
        self._client = client
        self._request = request
        self._buffer = b""
        self._is_open = False
        self._asked_s = 0.0
        self._transport: asyncio.Transport | None = None
        self.dialling: asyncio.Task[None] | None = None

    def send(self, opcode: Opcode, payload: bytes) -> None:
        """Send a short frame."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(bytes((0x80 | opcode, 0x80 | len(payload))) + _MASK + payload)

    def abort(self) -> None:
        """Hang up, or stop trying."""
        if self._transport is not None:
            self._transport.abort()
        elif self.dialling is not None:
            self.dialling.cancel()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # TCP
        """Ask for the upgrade."""
        self._transport, self.dialling = transport, None
        self._asked_s = monotonic()
        transport.write(self._request)
        self._request = b""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The connection broke, or was closed by the instance."""
        self._client.on_socket_end(self, Closed(ABNORMAL_CLOSURE))

    def data_received(self, data: bytes) -> None:
        """An answer to the handshake, then frames."""
        self._buffer += data
        if not self._is_open:
            if _HEAD_ENDS not in self._buffer:
                return
            head, _, self._buffer = self._buffer.partition(_HEAD_ENDS)
            self._on_head(head + b"\r\n")
        if self._is_open:
            for opcode, payload in self._frames():
                self._on_frame(opcode, payload)

    def _on_head(self, head: bytes) -> None:
        status = int(head[9:12])
        self._client.on_handshake(self, status, self._asked_s)
        self._is_open = status == 101
        if self._is_open:
            self._client.on_open(self)
            return
        asked = _RETRY_AFTER.search(head)
        wait_s = retry_after_s(asked[1].decode()) if asked else None
        self._client.on_socket_end(self, Refused(status, wait_s))

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        """Cut whole frames off the buffer; servers here do not fragment, nor mask."""
        while len(self._buffer) >= 2:
            size, start = self._buffer[1], 2
            if size == 126:
                if len(self._buffer) < 4:
                    return
                (size,), start = struct.unpack_from("!H", self._buffer, 2), 4
            if len(self._buffer) < start + size:
                return
            opcode, payload = self._buffer[0] & 0x0F, self._buffer[start : start + size]
            self._buffer = self._buffer[start + size :]
            yield opcode, payload

    def _on_frame(self, opcode: int, payload: bytes) -> None:
        if opcode == Opcode.TEXT:
            self._client.on_text(self, payload)
        elif opcode == Opcode.PING:
            self.send(Opcode.PONG, payload)
        elif opcode == Opcode.CLOSE:
            self.send(Opcode.CLOSE, payload[:2])
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            self._client.on_socket_end(self, Closed(code))

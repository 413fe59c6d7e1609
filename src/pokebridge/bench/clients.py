"""Light clients for load tests: the core of every client, over a bare socket.

Each client has the same :class:`~pokebridge.client.core.ClientCore` as a
:class:`~pokebridge.client.PokeClient`, so it reconnects with full jitter, heeds ``Retry-After``,
and pulls on ``ready`` and on pokes. It keeps no task, queue or buffer, so that one process can run
tens of thousands.
"""

import asyncio
import re
import struct
from collections.abc import Iterator
from datetime import datetime
from time import monotonic

import msgspec

from pokebridge.bench.fleet import Balancer, Endpoint
from pokebridge.bench.http_pool import HOST, Answer
from pokebridge.client.core import ClientCore
from pokebridge.client.driver import Driver
from pokebridge.client.events import (
    Closed,
    Connect,
    Opened,
    Pulled,
    PullFailed,
    Refused,
    Start,
    Text,
    Token,
)
from pokebridge.client.policy import Policy
from pokebridge.client.polling import ABNORMAL_CLOSURE
from pokebridge.framing import Opcode
from pokebridge.outgoing import retry_after_s
from pokebridge.wire import CONNECT_PATH

# Names the balancer; the URL of a ``move`` frame names an instance.
BALANCER_URL = f"ws://balancer{CONNECT_PATH}"
_POLICY = Policy()
_HEAD_ENDS = b"\r\n\r\n"
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)\r\n", re.IGNORECASE)
# A client must mask (RFC 6455, section 5.3). This mask leaves the payload as it is.
_MASK = bytes(4)


class PulledMessage(msgspec.Struct):
    """What load tests need of a message; ``sent_at`` is the time of its commit."""

    id: str
    sent_at: datetime


class _Page(msgspec.Struct):
    messages: list[PulledMessage]
    version: int
    more: bool


class Observer:
    """What clients report as it happens; times are seconds of the monotonic clock."""

    def on_handshake(self, where: Endpoint, status: int, asked_s: float) -> None:
        """A handshake was answered with ``status``; its request was sent at ``asked_s``."""

    def on_connected(self, change: int) -> None:
        """One more client is ready, or one fewer: ``change`` is 1 or -1."""

    def on_poke(self, client: "StormClient") -> None:
        """``client`` received a poke."""

    def on_pull(self, client: "StormClient", messages: list[PulledMessage]) -> None:
        """``client`` pulled ``messages``."""


class StormClient(Driver):
    """The only client of ``recipient``; ``observer`` is told what happens to it."""

    __slots__ = (
        "_balancer",
        "_loop",
        "_observer",
        "_pulled_after_ready",
        "_socket",
        "_token",
        "readies",
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
        self.readies = 0
        """How often it has become ready."""
        self._pulled_after_ready = 0
        self.recipient = recipient
        self.where: Endpoint | None = None
        """The instance that its socket goes to."""

    @property
    def ready(self) -> bool:
        """Whether it receives pokes."""
        return self._core.ready

    @property
    def caught_up(self) -> bool:
        """Whether it is ready, and has pulled since it became ready."""
        return self._core.ready and self._pulled_after_ready == self.readies

    def start(self) -> None:
        """Connect, and reconnect until stopped."""
        self._feed(Start())

    def stop(self) -> None:
        """Drop the connection and do nothing any more."""
        self._set_timer(None)
        self._disconnect()

    def _on_ready_changed(self) -> None:
        self.readies += self._core.ready
        self._observer.on_connected(1 if self._core.ready else -1)

    def _fetch_token(self) -> None:
        self._feed(Token())

    def _stop(self, code: int) -> None:  # noqa: ARG002 - whatever the reason
        self._disconnect()

    # --- the socket -------------------------------------------------------------------------------

    def _connect(self, action: Connect) -> None:
        self._disconnect()
        url = action.url
        where = self._balancer.pick() if url == BALANCER_URL else self._balancer.at(url)
        query = "?moved=1" if action.moved else ""
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

    def _ack(self, version: int) -> None:
        self._send(b'{"type":"ack","version":%d}' % version)

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
        """A text frame has arrived."""
        if socket is self._socket:
            if b'"poke"' in payload:
                self._observer.on_poke(self)
            self._feed(Text(payload.decode()))

    def on_socket_end(self, socket: "_Socket", event: Closed | Refused) -> None:
        """The socket is closed, or the handshake was refused."""
        if socket is self._socket:
            self._disconnect()
            self._feed(event)

    # --- pulls ------------------------------------------------------------------------------------

    def _pull(self, after: int) -> None:
        request = (
            f"GET /v1/messages?after={after} HTTP/1.1\r\nHost: {HOST}\r\n"
            f"Authorization: Bearer {self._token}\r\n\r\n"
        )
        readies = self.readies

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
        self._feed(Pulled(page.version, page.more, unacked=self._core.acks_by_socket))


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
        """Close the connection at once, or stop connecting."""
        if self._transport is not None:
            self._transport.abort()
        elif self.dialling is not None:
            self.dialling.cancel()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # TCP
        """Send the request for the upgrade."""
        self._transport, self.dialling = transport, None
        self._asked_s = monotonic()
        transport.write(self._request)
        self._request = b""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The connection broke, or the instance closed it."""
        self._client.on_socket_end(self, Closed(ABNORMAL_CLOSURE))

    def data_received(self, data: bytes) -> None:
        """Parse the answer to the handshake, then frames."""
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
        """Take the complete frames off the buffer: an instance neither fragments nor masks."""
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

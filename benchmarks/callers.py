"""The clients of ``cycle``: HTTP connections that are kept alive, and WebSockets.

They do as little as they can, so that the server is the slower side, and check every answer.
"""

import asyncio
import re
from http import HTTPStatus
from typing import NamedTuple, Self, cast

import msgspec

from benchmarks.harness import PATIENCE_S, BenchmarkError

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ETAG = re.compile(rb"\r\netag: *([^\r]+)", re.IGNORECASE)
_TEXT, _PING, _PONG = 0x81, 0x89, 0x8A
_SHORT, _MEDIUM = 125, 126  # frames up to 125 bytes; 126 stands for a length of two bytes


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    head: bytes
    body: bytes

    @property
    def etag(self) -> str:
        """Its entity tag."""
        found = _ETAG.search(self.head)
        if found is None:
            raise BenchmarkError(f"no ETag in {self.head.decode()}")
        return found[1].decode()


def request(method: str, path: str, token: str, body: object = None, headers: str = "") -> bytes:
    """An HTTP request as bytes. ``headers`` are further lines, each with its line end."""
    content = b"" if body is None else msgspec.json.encode(body)
    if content:
        headers += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}{headers}\r\n".encode() + content


class _Connection(asyncio.Protocol):
    """A connection to a port of this machine, which answers one question at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._buffer = b""
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the question that waits, if any."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BenchmarkError(f"the server hung up: {exc!r}"))

    def data_received(self, data: bytes) -> None:
        """Answer the question once its answer is complete."""
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found or self._answer is None:
            return
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if len(rest) >= size:
            self._buffer = rest[size:]
            answer, self._answer = self._answer, None
            answer.set_result(Answer(int(head[9:12]), head, rest[:size]))

    async def ask(self, question: bytes) -> Answer:
        """The answer to a request. Connects when there is no connection."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            self._buffer = b""
            await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        self._answer = loop.create_future()
        self._write(question)
        return await self._answer

    def close(self) -> None:
        """Disconnect."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        assert self._transport is not None, "it has connected"
        self._transport.write(data)


class HttpConnection(_Connection):
    """An HTTP connection that is kept alive, until the server closes it because it is idle."""

    async def expect(self, status: int, question: bytes) -> Answer:
        """The answer to a request, which must have this ``status``."""
        answer = await self.ask(question)
        if answer.status != status:
            line = question.partition(b"\r\n")[0].decode()
            text = answer.body.decode()
            raise BenchmarkError(f"{line}: {answer.status} where {status} was expected: {text}")
        return answer


class Socket(_Connection):
    """A WebSocket that has received ``ready``.

    - ``ready``: that frame, decoded
    - ``on_text``: called with every later text frame
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.ready: dict[str, object] = {}
        self.on_text = self._keep_ready
        self._is_open = False
        self._pong: asyncio.Future[None] | None = None
        self._has_ready = asyncio.Event()

    async def shake_hands(self, token: str) -> Self:
        """Upgrade the connection, and wait for ``ready``."""
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        answer = await self.ask(request("GET", "/v1/connect", token, headers=upgrade + key))
        if answer.status != HTTPStatus.SWITCHING_PROTOCOLS:
            raise BenchmarkError(f"GET /v1/connect: {answer.status} {answer.body.decode()}")
        self._is_open = True
        self._read_frames()
        async with asyncio.timeout(PATIENCE_S):
            await self._has_ready.wait()
        return self

    def data_received(self, data: bytes) -> None:
        """Read the frames, after the handshake."""
        if self._is_open:
            self._buffer += data
            self._read_frames()
        else:
            super().data_received(data)

    def send_text(self, text: bytes) -> None:
        """Send a text frame."""
        self._send(_TEXT, text)

    async def ping(self) -> None:
        """Return when the server has read everything that was sent before."""
        self._pong = asyncio.get_running_loop().create_future()
        self._send(_PING, b"")
        async with asyncio.timeout(PATIENCE_S):
            await self._pong

    def _keep_ready(self, text: bytes) -> None:
        self.ready = msgspec.json.decode(text)
        self._has_ready.set()

    def _send(self, kind: int, payload: bytes) -> None:
        assert len(payload) <= _SHORT
        # The mask is zero, which leaves the payload as it is.
        self._write(bytes((kind, 0x80 | len(payload), 0, 0, 0, 0)) + payload)

    def _read_frames(self) -> None:
        while len(self._buffer) >= 2:
            start, size = 2, self._buffer[1]
            if size == _MEDIUM:
                start, size = 4, int.from_bytes(self._buffer[2:4], "big")
            if len(self._buffer) < start + size:
                return
            kind, payload = self._buffer[0], self._buffer[start : start + size]
            self._buffer = self._buffer[start + size :]
            self._on_frame(kind, payload)

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == _TEXT:
            self.on_text(payload)
        elif kind == _PING:
            self._send(_PONG, payload)
        elif kind == _PONG and self._pong is not None:
            self._pong.set_result(None)
        else:
            raise BenchmarkError(f"a frame of kind {kind:#x} came: {payload!r}")

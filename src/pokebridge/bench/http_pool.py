"""A pool of keep-alive connections for many small HTTP requests, without a task for each.

The client of an HTTP library takes about a millisecond of CPU for a request. A storm sends
thousands of requests a second, and its generator must not be the bottleneck.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import httptools

from pokebridge.outgoing import retry_after_s

HOST = "127.0.0.1"


class Answer(NamedTuple):
    """What an instance answered."""

    status: int
    body: bytes
    retry_after_s: float | None


Done = Callable[[Answer | None], None]
"""Takes the answer; ``None`` when the connection failed and the outcome is unknown."""


class HttpPool:
    """Requests to a port of this machine over at most ``size`` connections; others wait."""

    def __init__(self, port: int, size: int) -> None:
        self.port = port
        self._size = size
        self._open: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._waiting: deque[tuple[bytes, Done]] = deque()
        self._dialling: set[asyncio.Task[None]] = set()

    def send(self, request: bytes, done: Done) -> None:
        """Send ``request``, head and body; ``done`` is always called, later."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                connection.send(request, done)
                return
        self._waiting.append((request, done))
        if len(self._open) + len(self._dialling) < self._size:
            task = asyncio.get_running_loop().create_task(self._dial())
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)

    def close(self) -> None:
        """Drop every connection; requests under way get no answer."""
        self._waiting.clear()
        for task in self._dialling:
            task.cancel()
        for connection in self._open:
            connection.abort()

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _Connection(self), HOST, self.port)
        except OSError:
            # The instance is down. Without an answer the waiting requests would hang forever.
            if not self._open:
                waiting, self._waiting = self._waiting, deque()
                for _, done in waiting:
                    done(None)

    # --- a connection's calls ---------------------------------------------------------------------

    def opened(self, connection: "_Connection") -> None:
        """A new connection can take a request."""
        self._open.add(connection)
        self.freed(connection)

    def freed(self, connection: "_Connection") -> None:
        """A connection can take another request."""
        if self._waiting and connection.is_open:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def lost(self, connection: "_Connection") -> None:
        """A connection is closed."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting:
            self.send(*self._waiting.popleft())


class _Connection(asyncio.Protocol):
    """One connection; also the callbacks of its parser."""

    def __init__(self, pool: HttpPool) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._done: Done | None = None
        self._body = b""
        self._retry_after: str | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        # connection_lost() comes a turn of the loop after the transport was closed.
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, done: Done) -> None:
        self._done = done
        self._body, self._retry_after = b"", None
        if self._transport is not None:
            self._transport.write(request)

    def abort(self) -> None:
        self._done = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # TCP
        """Asyncio's call."""
        self._transport = transport
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        """Asyncio's call."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Asyncio's call."""
        self._pool.lost(self)
        done, self._done = self._done, None
        if done is not None:
            done(None)

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's call."""
        if name.lower() == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """The parser's call."""
        self._body += body

    def on_message_complete(self) -> None:
        """The parser's call."""
        answer = Answer(
            self._parser.get_status_code(), self._body, retry_after_s(self._retry_after)
        )
        done, self._done = self._done, None
        self._pool.freed(self)
        if done is not None:
            done(answer)

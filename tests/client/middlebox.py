"""A box between a client and its bridge that breaks WebSockets in one way or another."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from tests.client.between import Between
from tests.support.stream_server import relay

Mode = Literal["pass", "refuse", "kill", "buffer", "token"]

KILL_AFTER_S = 0.2
_REFUSAL = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\nContent-Length: 2\r\n"
    b"Connection: close\r\n\r\nno"
)


class Middlebox(Between):
    """Carries HTTP/1.1 to ``port``, and treats WebSockets as its ``mode`` says.

    - ``pass``: as a box should
    - ``refuse``: every handshake is answered with its own 403
    - ``kill``: each WebSocket is cut after 200 ms
    - ``buffer``: a WebSocket's frames from the bridge are held back
    - ``token``: a handshake is refused whose token is not in the query
    """

    def __init__(self, port: int, mode: Mode) -> None:
        super().__init__(port)
        self.mode = mode
        self._sockets: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Cut all WebSockets."""
        for writer in self._sockets:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"upgrade: websocket" not in head.lower():
            await relay(reader, writer, self._port, first=head)
            return
        mode = self.mode
        if mode == "refuse" or (mode == "token" and b"access_token=" not in head):
            writer.write(_REFUSAL)
            return
        self._sockets.add(writer)
        try:
            async with asyncio.timeout(KILL_AFTER_S if mode == "kill" else None):
                carry = self._hold_back if mode == "buffer" else relay
                await carry(reader, writer, self._port, first=head)
        except TimeoutError:
            pass
        finally:
            self._sockets.discard(writer)

    async def _hold_back(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, *, first: bytes
    ) -> None:
        """Relay, but answer the handshake alone."""
        from_bridge, to_bridge = await asyncio.open_connection("127.0.0.1", port)
        to_bridge.write(first)
        ends: list[asyncio.Task[None]] = []
        try:
            writer.write(await from_bridge.readuntil(b"\r\n\r\n"))
            ends.append(asyncio.create_task(_read_all(reader, to_bridge.write)))
            ends.append(asyncio.create_task(_read_all(from_bridge, lambda _: None)))
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
            to_bridge.transport.abort()


async def _read_all(source: asyncio.StreamReader, take: Callable[[bytes], None]) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            take(data)

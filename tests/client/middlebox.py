"""A box between a client and its bridge that breaks WebSockets in one way or another."""

import asyncio
from typing import Literal

from tests.client.between import Between

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
            await self._relay(reader, writer, head)
            return
        mode = self.mode
        if mode == "refuse" or (mode == "token" and b"access_token=" not in head):
            writer.write(_REFUSAL)
            await writer.drain()
            return
        self._sockets.add(writer)
        try:
            async with asyncio.timeout(KILL_AFTER_S if mode == "kill" else None):
                await self._relay(reader, writer, head, holds_back=mode == "buffer")
        except TimeoutError:
            pass
        finally:
            self._sockets.discard(writer)

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        head: bytes,
        *,
        holds_back: bool = False,
    ) -> None:
        from_bridge, to_bridge = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            to_bridge.write(head)
            if holds_back:
                writer.write(await from_bridge.readuntil(b"\r\n\r\n"))
                writer = to_bridge  # never to the client
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, to_bridge))
                both.create_task(_drop(from_bridge) if holds_back else _pump(from_bridge, writer))
        except* (OSError, EOFError):
            pass
        finally:
            to_bridge.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise EOFError


async def _drop(reader: asyncio.StreamReader) -> None:
    while await reader.read(65536):
        pass
    raise EOFError

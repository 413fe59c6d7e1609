"""The channel between a hub and one worker: a pair of connected sockets on one host.

It does not lose, repeat or reorder messages. It is never repaired: when it breaks, the worker ends
and the hub starts another.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import structlog

from pokebridge.supervisor import note_failure
from pokebridge.workers.frames import ChannelError, Deframer, Framer, Message

CONGESTED_BYTES: Final = 1024 * 1024
"""With this many unsent bytes the channel is congested: messages that can be recovered later are
dropped, and calls and their answers wait."""
MAX_UNSENT_BYTES: Final = 64 * 1024 * 1024
"""With more unsent bytes the channel breaks. All that may be long waits for room, so only a peer
that reads nothing causes that."""

log = structlog.get_logger(__name__)

Received = TypeVar("Received", bound=Message)


class Channel(asyncio.Protocol, Generic[Received]):
    """One end of the channel.

    Messages that are sent in one turn of the loop leave in one write.

    - ``is_congested``: whether the peer reads more slowly than this end writes
    - ``on_drained``: called when the channel is no longer congested
    - ``on_flush``: called before each write, to send what was still being put together
    - ``_decode``, ``_on_message``: decode a frame, and take each message of it
    - ``_on_broken``: called once, when the channel has ended
    - ``_framer``, ``_deframer``: messages not written yet, and frames that have not arrived
      completely
    - ``_flush_is_due``: whether a write is scheduled
    - ``_written``: set when what waits for room may find some
    """

    def __init__(
        self,
        decode: Callable[[memoryview], list[Received]],
        on_message: Callable[[Received], None],
        on_broken: Callable[[], None],
    ) -> None:
        self.is_congested = False
        self.on_drained: Callable[[], None] = lambda: None
        self.on_flush: Callable[[], None] = lambda: None
        self._decode = decode
        self._on_message = on_message
        self._on_broken = on_broken
        self._framer = Framer()
        self._deframer = Deframer()
        self._flush_is_due = False
        self._written = asyncio.Event()
        self._transport: asyncio.WriteTransport | None = None
        self._loop = asyncio.get_running_loop()

    async def connect(self, own_end: socket.socket) -> None:
        """Use ``own_end``, one socket of a connected pair."""
        await self._loop.create_unix_connection(lambda: self, sock=own_end)

    def send(self, message: Message) -> None:
        """Send ``message`` soon. Does nothing when the channel is broken.

        Raises:
            ChannelError: the message is too long.
        """
        if self._transport is None:
            return
        self._framer.add(message)
        self.flush_soon()

    async def room(self) -> None:
        """Return when at most CONGESTED_BYTES are unsent, or the channel is broken.

        Call it before each message that may be long. Those of one turn could break the channel.
        """
        while self._unsent_bytes() > CONGESTED_BYTES:
            self._written.clear()
            await self._written.wait()

    def flush_soon(self) -> None:
        """Write at the end of this turn of the loop."""
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """End the channel once everything is written."""
        if self._transport is not None:
            self._flush()
            if self._transport is not None:
                self._transport.close()

    def _flush(self) -> None:
        self.on_flush()
        self._flush_is_due = False
        transport = self._transport
        if transport is None or not len(self._framer):
            return
        if self._unsent_bytes() > MAX_UNSENT_BYTES:
            log.error("channel_overflowed", bytes=MAX_UNSENT_BYTES)
            transport.abort()
            return
        transport.write(self._framer.take())
        if not self.is_congested:
            self._written.set()

    def _unsent_bytes(self) -> int:
        transport = self._transport
        return 0 if transport is None else transport.get_write_buffer_size() + len(self._framer)

    # --- called by asyncio ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]
        """The channel can be used."""
        transport.set_write_buffer_limits(high=CONGESTED_BYTES)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take the messages that have arrived."""
        try:
            for frame in self._deframer.feed(data):
                for message in self._decode(frame):
                    self._on_message(message)
        except Exception as error:  # noqa: BLE001 - both ends are ours: it is a defect
            note_failure("worker_channel", error)
            if self._transport is not None:
                self._transport.abort()

    def pause_writing(self) -> None:
        """The peer does not read as fast as this end writes."""
        self.is_congested = True

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self.is_congested = False
        self._written.set()
        self.on_drained()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The peer is gone, or the channel was closed."""
        self._transport = None
        self._written.set()
        self._on_broken()


__all__ = ["CONGESTED_BYTES", "MAX_UNSENT_BYTES", "Channel", "ChannelError"]

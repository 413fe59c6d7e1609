"""TCP between a client and an instance: ordered, slow, sometimes silent, and soon full.

The instance's end is an ``asyncio.Transport``, so the real :class:`Connection` runs on it. Bytes
that a client does not read fill a small window; then the instance is told to pause writing.
"""

import asyncio
import struct
from collections.abc import Callable
from random import Random
from typing import Any, Literal, NamedTuple, Protocol

from pokebridge.framing import Opcode
from pokebridge.gateway.entrance import Entrance
from pokebridge.gateway.handshake import UpgradeRequest
from simulation.loop import VirtualLoop

WINDOW_BYTES = 512
"""Bytes that the kernels buffer for a client that does not read: few, so that it is soon full."""
END = None
"""Arrives in place of bytes when the other side has closed."""
_RESET = b""
_MASK = b"\x25\x0c\x77\xe1"


class ClientEnd(Protocol):
    """The client at one end of a :class:`Wire`."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def recipient(self) -> str:
        """Whose client it is."""

    @property
    def loop(self) -> VirtualLoop:
        """The loop of its process."""

    def on_data(self, wire: "Wire", data: bytes) -> None:
        """Bytes have arrived."""

    def on_end(self, wire: "Wire") -> None:
        """The other end has closed, or the connection broke."""


class Frame(NamedTuple):
    """A frame from the server."""

    opcode: Opcode
    payload: bytes


def read_frame(data: bytes) -> tuple[Frame, bytes] | None:
    """The first frame in ``data`` and the rest; ``None`` while it is not whole."""
    if len(data) < 2:
        return None
    size, start = data[1], 2
    if size == 126:
        size, start = int.from_bytes(data[2:4], "big"), 4
    if len(data) < start + size:
        return None
    return Frame(Opcode(data[0] & 0x0F), data[start : start + size]), data[start + size :]


def masked_frame(opcode: Opcode, payload: bytes) -> bytes:
    """A frame as a client sends it (RFC 6455, section 5.3)."""
    size = len(payload)
    head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    if size > 125:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    body = bytes(byte ^ _MASK[place % 4] for place, byte in enumerate(payload))
    return head + _MASK + body


class Network:
    """The network of a client. While it is quiet, everything waits until it is back."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.quiet = False
        self.middlebox: Literal["refuse", "cut", "buffer"] | None = None
        """What lets no WebSocket work: it refuses upgrades, kills sockets after a moment, or lets
        nothing of them through."""
        self.wires: list[Wire] = []

    def latency_s(self) -> float:
        """How long one message takes."""
        return self.rng.uniform(0.001, 0.02)

    def come_back(self) -> None:
        """Deliver what has waited."""
        self.quiet = False
        for wire in tuple(self.wires):
            wire.release()

    def change(self) -> None:
        """Change to another network: the old connections are lost, and no end is told."""
        for wire in tuple(self.wires):
            wire.lose()
        self.come_back()


class Wire:
    """One TCP connection, and the client's end of it."""

    def __init__(self, network: Network, client: ClientEnd, server_loop: VirtualLoop) -> None:
        self.network = network
        self.client = client
        self.server_loop = server_loop
        self.socket: Socket | None = None
        self.reads = True
        """Whether the client reads."""
        self.listened: set[str] = set()
        """The further recipients that the instance has said to be heard."""
        self.unread_bytes = 0
        """What the instance has handed to the kernel and the client has not read."""
        self._lost = False
        self._hung_up = False
        self._held: list[tuple[VirtualLoop, Callable[..., object], tuple[Any, ...]]] = []
        self._arrived: list[bytes | None] = []
        self._last_at = {id(client.loop): 0.0, id(server_loop): 0.0}
        network.wires = [wire for wire in network.wires if not wire.is_over]
        network.wires.append(self)

    # --- both ways ----------------------------------------------------------------------------

    def carry(self, loop: VirtualLoop, call: Callable[..., object], *args: Any) -> None:
        """Make ``call`` at the other end, after everything that was sent that way before."""
        if self._lost:
            return
        if self.network.quiet:
            self._held.append((loop, call, args))
            return
        now = loop.scheduler.now
        at = max(now + self.network.latency_s(), self._last_at[id(loop)])
        self._last_at[id(loop)] = at
        loop.deliver(at - now, call, *args)

    def release(self) -> None:
        """The network is back."""
        held, self._held = self._held, []
        for loop, call, args in held:
            self.carry(loop, call, *args)

    def lose(self) -> None:
        """Nothing comes through any more, and neither end is told."""
        self._lost = True
        self._held.clear()

    @property
    def is_over(self) -> bool:
        """Whether nothing will come through it any more."""
        return self._lost or (self._hung_up and not self._held)

    # --- the client's end ---------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """To the instance."""
        if not self._hung_up and self.socket is not None:
            self.carry(self.server_loop, self.socket.arrive, data)

    def hang_up(self, *, rudely: bool = False) -> None:
        """Close; drop what arrives later."""
        if not self._hung_up and self.socket is not None:
            self.carry(self.server_loop, self.socket.arrive, _RESET if rudely else END)
        self._hung_up = True

    def arrive(self, data: bytes | None) -> None:
        """Something has come from the instance."""
        if self._hung_up:
            self._take(data)
        elif self.reads:
            self._hand_over(data)
        else:
            self._arrived.append(data)

    def read_on(self) -> None:
        """Read what has arrived, and what will arrive."""
        self.reads = True
        arrived, self._arrived = self._arrived, []
        for data in arrived:
            self.arrive(data)

    def _hand_over(self, data: bytes | None) -> None:
        self._take(data)
        if data:
            self.client.on_data(self, data)
        else:
            self.hang_up()
            self.client.on_end(self)

    def _take(self, data: bytes | None) -> None:
        if data and self.socket is not None:
            self.unread_bytes -= len(data)
            if self.socket.unsent_bytes:
                self.carry(self.server_loop, self.socket.flush)


class Socket(asyncio.Transport):
    """The instance's end, as an asyncio transport.

    ``on_write`` is called with the bytes written and the number of bytes that wait.
    """

    def __init__(self, wire: Wire, on_write: Callable[[bytes, int], None]) -> None:
        super().__init__()
        self.wire = wire
        self._on_write = on_write
        self._protocol: asyncio.Protocol | None = None
        self._unsent = bytearray()
        self._unheard: list[bytes | None] = []
        self._paused_writing = False
        self._paused_reading = False
        self._closing = False
        self._gone = False
        self._reset = False
        wire.socket = self

    @property
    def is_gone(self) -> bool:
        """Whether it is closed for good."""
        return self._gone

    @property
    def unsent_bytes(self) -> int:
        """What waits for room in the window."""
        return len(self._unsent)

    # --- what the protocol does -----------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See asyncio."""
        if self._closing or self._gone:
            return
        if self._reset:
            self._lose(ConnectionResetError())
            return
        self._unsent += data
        self.flush()
        self._on_write(bytes(data), len(self._unsent))
        if self._unsent and not self._paused_writing and self._protocol is not None:
            self._paused_writing = True
            self._protocol.pause_writing()

    def flush(self) -> None:
        """Send as much as there is room for."""
        wire = self.wire
        size = min(len(self._unsent), WINDOW_BYTES - wire.unread_bytes)
        if size > 0 and not self._gone:
            data = bytes(self._unsent[:size])
            del self._unsent[:size]
            wire.unread_bytes += size
            wire.carry(wire.client.loop, wire.arrive, data)
        if self._unsent:
            return
        if self._paused_writing and self._protocol is not None:
            self._paused_writing = False
            self._protocol.resume_writing()
        if self._closing:
            self._finish(None)

    def close(self) -> None:
        """See asyncio."""
        if not self._closing:
            self._closing = True
            if not self._unsent:
                self._finish(None)

    def abort(self) -> None:
        """See asyncio."""
        self._closing = True
        self._lose(None)

    def is_closing(self) -> bool:
        """See asyncio."""
        return self._closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See asyncio."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Always as with ``high=0``: the window is the buffer."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002 - asyncio's signature
        """Nothing is known."""
        return default

    def can_write_eof(self) -> bool:
        """See asyncio."""
        return True

    def write_eof(self) -> None:
        """Close our side; the client then closes its own."""
        self.wire.carry(self.wire.client.loop, self.wire.arrive, END)

    def pause_reading(self) -> None:
        """See asyncio."""
        self._paused_reading = True

    def resume_reading(self) -> None:
        """See asyncio."""
        self._paused_reading = False
        unheard, self._unheard = self._unheard, []
        for data in unheard:
            self.wire.server_loop.call_soon(self.arrive, data)

    # --- what the network brings ------------------------------------------------------------------

    def arrive(self, data: bytes | None) -> None:
        """Something has come from the client."""
        if self._gone:
            return
        self._reset = self._reset or data == _RESET
        if self._paused_reading:
            self._unheard.append(data)
        elif data == _RESET:
            self._lose(ConnectionResetError())
        elif data is END:
            if self._protocol is not None:
                self._protocol.eof_received()
            self.close()
        elif self._protocol is not None and not self._closing:
            self._protocol.data_received(data)

    def cut(self) -> None:
        """The process has died, and the kernel tells the client."""
        self._gone = True
        self.wire.carry(self.wire.client.loop, self.wire.arrive, _RESET)

    def _lose(self, error: Exception | None) -> None:
        self._unsent.clear()
        self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        if self._gone:
            return
        self._gone = True
        wire = self.wire
        wire.carry(wire.client.loop, wire.arrive, END)
        if self._protocol is not None:
            wire.server_loop.call_soon(self._protocol.connection_lost, error)


class Port:
    """Where clients connect: the sockets of one process.

    - ``is_open``: whether connections are accepted; at first they are not
    - ``sockets``: the open sockets
    - ``_entrance``: takes WebSockets
    - ``_written``: called with the wire, the bytes and the number of bytes that wait
    - ``_http``: makes the protocol of an HTTP connection
    """

    def __init__(
        self,
        entrance: Entrance,
        written: Callable[[Wire, bytes, int], None],
        http: Callable[[asyncio.Transport], asyncio.Protocol],
    ) -> None:
        self.is_open = False
        self.sockets: list[Socket] = []
        self._entrance = entrance
        self._written = written
        self._http = http

    @property
    def load(self) -> int:
        """How many sockets are open."""
        return sum(not socket.is_gone for socket in self.sockets)

    def accept(self, wire: Wire, request: UpgradeRequest) -> None:
        """A client connects and asks for an upgrade."""
        if socket := self._socket(wire):
            self._entrance.upgrade(socket, request, lambda: None)

    def accept_http(self, wire: Wire) -> None:
        """A client connects for calls that wait."""
        if socket := self._socket(wire):
            socket.set_protocol(self._http(socket))

    def _socket(self, wire: Wire) -> Socket | None:
        self.sockets = [socket for socket in self.sockets if not socket.is_gone]
        written = self._written
        socket = Socket(wire, lambda data, unsent: written(wire, data, unsent))
        if not self.is_open:
            socket.cut()
            return None
        self.sockets.append(socket)
        return socket

    def close(self, *, tells: bool) -> None:
        """The process has ended. Unless the kernel ``tells`` the clients, they must find out."""
        self.is_open = False
        for socket in self.sockets:
            if tells:
                socket.cut()
            else:
                socket.wire.lose()

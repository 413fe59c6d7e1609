"""How a client is connected: by a WebSocket, or by HTTP calls that wait for its frames.

Between the client and the bridge there may be a middlebox that lets no WebSocket work.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from pokebridge.framing import Opcode
from pokebridge.gateway.handshake import UpgradeRequest
from simulation.instance import SimInstance, ask
from simulation.loop import VirtualLoop
from simulation.sockets import Network, Port, Wire, masked_frame, read_frame

ABNORMAL = 1006  # RFC 6455, section 7.4.1: no close frame came
WAIT_S = 25.0
"""How long a call waits for a frame (``client.polling``)."""
_CUT_AFTER_S = 0.2
# What shows a core that the bridge is there although it has nothing to say.
_NOTHING_NEW = '{"type":"pong"}'


class Owner(Protocol):
    """The client whose connection it is."""

    loop: VirtualLoop
    network: Network
    recipient: str
    device: str
    token: str

    @property
    def name(self) -> str:
        """For people."""

    def opened(self, connection: "Connection") -> None:
        """The bridge has accepted."""

    def heard(self, connection: "Connection", text: str) -> None:
        """A frame has come."""

    def refused(self, connection: "Connection", status: int, retry_after_s: float | None) -> None:
        """The bridge has refused."""

    def ended(self, connection: "Connection", code: int) -> None:
        """It is closed, or could not be opened."""


class Connection(ABC):
    """A connection to one instance; the end of a wire.

    - ``owner``: whose it is
    - ``wire``: what carries it, if somebody answers at all
    - ``instance``: where to
    - ``is_open``: whether the bridge has accepted
    - ``_is_dropped``: whether the owner wants to hear no more of it
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.wire: Wire | None = None
        self.instance: SimInstance | None = None
        self.is_open = False
        self._is_dropped = False

    @property
    def name(self) -> str:
        """For people."""
        return self.owner.name

    @property
    def recipient(self) -> str:
        """Whose client it is."""
        return self.owner.recipient

    @property
    def loop(self) -> VirtualLoop:
        """The loop of the client."""
        return self.owner.loop

    def open(self, instance: SimInstance | None, *, moved: bool) -> None:
        """Connect to ``instance``."""
        if instance is not None and instance.vanished:
            return  # nobody answers: the core has a deadline
        door = None if instance is None or not instance.listens else self._door(instance)
        if door is None:
            self.loop.deliver(self.owner.network.latency_s(), self.end, ABNORMAL)
            return
        server_loop, port = door
        self.instance = instance
        self.wire = Wire(self.owner.network, self, server_loop)
        self._begin(self.wire, port, moved=moved)

    def drop(self, *, rudely: bool = False) -> None:
        """Close it, and tell its owner nothing more."""
        self._is_dropped = True
        if self.wire is not None:
            self.wire.hang_up(rudely=rudely)

    def end(self, code: int) -> None:
        """It is over."""
        if not self._is_dropped:
            self.drop()
            self.owner.ended(self, code)

    def refuse(self, status: int, retry_after_s: float | None) -> None:
        """The bridge does not accept."""
        if not self._is_dropped:
            self.drop()
            self.owner.refused(self, status, retry_after_s)

    @abstractmethod
    def _door(self, instance: SimInstance) -> tuple[VirtualLoop, Port] | None:
        """Where it gets to."""

    @abstractmethod
    def _begin(self, wire: Wire, port: Port, *, moved: bool) -> None:
        """Say the first thing."""

    @abstractmethod
    def say(self, message: dict[str, Any]) -> None:
        """Send ``message``."""

    @abstractmethod
    def on_data(self, wire: Wire, data: bytes) -> None:
        """Bytes from the instance."""

    @abstractmethod
    def on_end(self, wire: Wire) -> None:
        """The instance has closed, or the connection broke."""


class WebSocket(Connection):
    """A WebSocket."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._unparsed = b""
        self._close_code = ABNORMAL

    def _door(self, instance: SimInstance) -> tuple[VirtualLoop, Port] | None:
        return instance.door()

    def _begin(self, wire: Wire, port: Port, *, moved: bool) -> None:
        owner, middlebox = self.owner, self.owner.network.middlebox
        if middlebox == "refuse":
            self.loop.deliver(owner.network.latency_s(), self.end, ABNORMAL)
        if middlebox == "cut":
            self.loop.call_later(_CUT_AFTER_S, self.end, ABNORMAL)
        if middlebox in {"refuse", "buffer"}:
            return
        query = f"device={owner.device}" + ("&moved=1" if moved else "")
        headers = [
            (b"host", b"home"),
            (b"upgrade", b"websocket"),
            (b"connection", b"Upgrade"),
            (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
            (b"sec-websocket-version", b"13"),
            (b"authorization", b"Bearer " + owner.token.encode()),
        ]
        request = UpgradeRequest("GET", f"/v1/connect?{query}", headers, self.name)
        wire.carry(wire.server_loop, port.accept, wire, request)

    def say(self, message: dict[str, Any]) -> None:
        """Send a text frame."""
        if self.wire is not None:
            self.wire.send(masked_frame(Opcode.TEXT, msgspec.json.encode(message)))

    def on_data(self, wire: Wire, data: bytes) -> None:
        """Bytes from the instance."""
        self._unparsed += data
        while not self._is_dropped and (self.is_open or self._has_opened()):
            found = read_frame(self._unparsed)
            if found is None:
                return
            frame, self._unparsed = found
            if frame.opcode is Opcode.TEXT:
                self.owner.heard(self, frame.payload.decode())
            elif frame.opcode is Opcode.PING:
                wire.send(masked_frame(Opcode.PONG, frame.payload))
            elif frame.opcode is Opcode.CLOSE:
                self._close_code = int.from_bytes(frame.payload[:2], "big")
                wire.send(masked_frame(Opcode.CLOSE, frame.payload[:2]))

    def _has_opened(self) -> bool:
        """Read the answer to the handshake; whether it is there and says yes."""
        head, end, rest = self._unparsed.partition(b"\r\n\r\n")
        if not end:
            return False
        status = int(head.split()[1])
        if status == 101:
            self._unparsed, self.is_open = rest, True
            self.owner.opened(self)
            return not self._is_dropped
        asked_s = None
        for line in head.decode().split("\r\n"):
            name, _, value = line.partition(": ")
            if name == "Retry-After":
                asked_s = float(value)
        self.refuse(status, asked_s)
        return False

    def on_end(self, wire: Wire) -> None:  # noqa: ARG002 - it has one wire
        """The instance has closed, or the connection broke."""
        self.end(self._close_code)


class Polled(Connection):
    """A session without a socket: one call after the other, on one HTTP connection.

    What its client sends goes by calls of their own, one after the other.
    """

    def __init__(self, owner: Owner, on_unsent: Callable[[], None]) -> None:
        """``on_unsent`` is called when the instance does not take what is sent."""
        super().__init__(owner)
        self._on_unsent = on_unsent
        self._session = ""
        self._unparsed = b""
        self._unsent: list[dict[str, Any]] = []
        self._is_sending = False

    def _door(self, instance: SimInstance) -> tuple[VirtualLoop, Port] | None:
        return instance.loop, instance.port

    def _begin(self, wire: Wire, port: Port, *, moved: bool) -> None:
        wire.carry(wire.server_loop, port.accept_http, wire)
        wire.carry(wire.server_loop, self._first_call, wire, moved)

    def _first_call(self, wire: Wire, moved: bool) -> None:  # noqa: FBT001 - as it was carried
        """The connection is accepted: the call that came with it arrives."""
        query = {"device": self.owner.device, "moved": moved}
        if wire.socket is not None:
            wire.socket.arrive(self._request(query, 5.0))

    def _request(self, query: dict[str, Any], wait_s: float) -> bytes:
        call = {"token": self.owner.token, "wait_s": wait_s, **query}
        return msgspec.json.encode(call) + b"\n"

    def on_data(self, wire: Wire, data: bytes) -> None:
        """Bytes from the instance."""
        self._unparsed += data
        while not self._is_dropped and b"\n" in self._unparsed:
            line, _, self._unparsed = self._unparsed.partition(b"\n")
            self._take(wire, msgspec.json.decode(line))

    def _take(self, wire: Wire, answer: dict[str, Any]) -> None:
        if "status" in answer:
            self.refuse(answer["status"], answer["retry_after_s"])
            return
        if not self.is_open:
            self.is_open = True
            self.owner.opened(self)
        self._session = answer["session"]
        close = answer.get("close")
        for frame in answer["frames"] or ([] if close else [msgspec.json.decode(_NOTHING_NEW)]):
            if not self._is_dropped:
                self.owner.heard(self, msgspec.json.encode(frame).decode())
        if close:
            self.end(close["code"])
        elif not self._is_dropped:
            wire.send(self._request({"session": self._session}, WAIT_S))

    def say(self, message: dict[str, Any]) -> None:
        """Send ``message``, if a call can bring it."""
        if message["type"] in {"listen", "unlisten"}:
            self._unsent.append(message)
            if not self._is_sending:
                self._send()

    def _send(self) -> None:
        owner, session = self.owner, self._session
        frames, self._unsent = self._unsent, []
        self._is_sending = bool(frames)
        if frames:
            body, token = msgspec.json.encode({"frames": frames}), owner.token
            ask(
                self.loop,
                owner.network,
                self.instance,
                lambda at: at.send_frames(token, session, body),
                self._on_sent,
            )

    def _on_sent(self, taken: object) -> None:
        if taken is not None:
            self._send()
            return
        self._is_sending = False
        self._unsent.clear()
        if not self._is_dropped:
            self._on_unsent()

    def on_end(self, wire: Wire) -> None:  # noqa: ARG002 - it has one wire
        """The instance has closed, or the connection broke."""
        self.end(ABNORMAL)

"""The socket of a session: an asyncio protocol that only does what its session says.

An instance has tens of thousands of connections, and nearly all are silent. So a connection has no
task, timer, queue or buffer: its deadline is on the instance's wheel, its parser exists only while
bytes are pending, and a poke goes to the kernel in the call that brings it.
"""

import asyncio
import contextlib
import functools
import logging
import socket
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from pokebridge.border import note_unforeseen
from pokebridge.errors import FrameError
from pokebridge.framing import (
    FrameEvent,
    FrameParser,
    Opcode,
    decode_close,
    encode_frame,
    whole_text,
)
from pokebridge.gateway.listener import HasSession
from pokebridge.gateway.listening import ListeningHost
from pokebridge.session import UNKNOWN_VERSION, Session, State
from pokebridge.wire import (
    PONG_FRAME,
    Ack,
    Auth,
    Listen,
    Ping,
    decode_client_message,
    move_frame,
)

log = structlog.get_logger(__name__)
# Knows at once whether a level is logged. structlog takes 8 us to find out, for every session.
_logger = logging.getLogger(__name__)

# The kernel would buffer megabytes of pokes for a peer that does not read. With this limit it
# reports a full buffer early, and the session merges further pokes (tcp(7), TCP_NOTSENT_LOWAT).
_UNSENT_BYTES_AT_MOST = 256


@functools.lru_cache(maxsize=1)
def whole_second(second: int) -> int:
    """``second`` as one object for all sessions that begin in it: an int takes 32 bytes."""
    return second


def _socket_under(transport: asyncio.Transport) -> socket.SocketType | None:
    """A socket object to send with, bypassing ``transport``, if that has a socket.

    TLS ends before an instance, so what is sent is what the peer reads. The transport owns the
    descriptor: the object must be detached before the transport closes it, in ``connection_lost``.
    """
    shown = transport.get_extra_info("socket")
    if shown is None:
        return None
    # The base type, which is half as large as its subclass ``socket.socket``.
    own = socket.SocketType(shown.family, shown.type, shown.proto, shown.fileno())
    own.settimeout(0)
    return own


class Doorkeeper(Protocol):
    """What judges the tokens that come over a connection."""

    def renew(self, connection: "Connection", token: str) -> None:
        """The client of ``connection`` has sent a new token."""

    def listen(self, connection: "Connection", wanted: Listen) -> None:
        """The client of ``connection`` wants to hear a further recipient."""

    def unlisten(self, connection: "Connection", recipient: str) -> None:
        """The client of ``connection`` need not hear ``recipient`` any more."""


class ConnectionHost(ListeningHost, Protocol):
    """What a connection needs from the gateway that it belongs to."""

    instance: str
    """The instance's id."""

    @property
    def entrance(self) -> Doorkeeper:
        """Judges tokens."""

    @property
    def on_ack(self) -> Callable[[str, str, int], None] | None:
        """Takes the recipient, the device and the version of an ack. ``None``: none is taken."""

    def forget(self, connection: "Connection") -> None:
        """The socket of ``connection`` is closed."""


class Connection(asyncio.Protocol, HasSession):
    """The WebSocket of one session."""

    __slots__ = (
        "_deaf",
        "_direct",
        "_host",
        "_parser",
        "_socket",
        "_transport",
        "address",
        "began_at",
        "session",
        "wheel_slot",
    )

    def __init__(
        self, host: ConnectionHost, transport: asyncio.Transport, session: Session, address: str
    ) -> None:
        self.session = session
        self.address = address
        """The address that the session counts against; empty when there is no such limit."""
        self.began_at = whole_second(int(time.time()))
        """When the session began, in Unix seconds, rounded down."""
        self.wheel_slot = 0
        """A note of the wheel's; see :class:`~pokebridge.gateway.wheel.Timed`."""
        self._host = host
        self._transport = transport
        # The transport's socket, if it has one ...
        self._socket: socket.SocketType | None = None
        # ... and the same while pokes may be sent past the transport.
        self._direct: socket.SocketType | None = None
        # While a part of a frame or of a message is pending.
        self._parser: FrameParser | None = None
        # The peer broke a rule: whatever else it sends is discarded.
        self._deaf = False

    def begin(self) -> None:
        """Take the transport over from the HTTP protocol."""
        transport = self._transport
        transport.set_protocol(self)
        transport.set_write_buffer_limits(high=0)
        self._socket = sock = _socket_under(transport)
        if sock is not None:
            with contextlib.suppress(OSError, AttributeError):  # not TCP, or not Linux
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES_AT_MOST)

    def hold(self) -> None:
        """Read nothing until the handshake is answered."""
        self._transport.pause_reading()

    def refuse(self, response: bytes) -> None:
        """Refuse the handshake."""
        self.session.state = State.CLOSED
        self._transport.write(response)
        self._transport.close()

    def answer(self, response: bytes) -> None:
        """Accept the handshake, and read nothing until ``ready`` is sent."""
        self._transport.pause_reading()
        self._transport.write(response)
        self._follow()

    def open(self, first_ping_s: float, response: bytes = b"") -> None:
        """Send ``ready``: the recipient's subscription is live.

        ``response`` accepts the handshake, if that was not answered before. Sent together with
        ``ready``, it costs both ends one system call.
        """
        if self.session.state is State.WAITING:
            host = self._host
            ready = self.session.open(
                instance=host.instance,
                now=host.now(),
                first_ping_s=first_ping_s,
                takes_acks=host.on_ack is not None,
            )
            self._transport.write(response + ready)
            self._transport.resume_reading()
            self._follow()

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Send the poke ``frame``, or merge it. Returns whether it was sent."""
        session = self.session
        if version is None:
            session.told = UNKNOWN_VERSION
        elif version > session.told:
            session.told = version
        sent = 0
        if self._direct is not None:
            try:
                sent = self._direct.send(frame)
            except OSError:
                sent = 0  # full or broken: the transport finds out as well, and acts
        elif not session.poke(version):
            return False
        if sent < len(frame):
            self._transport.write(frame[sent:])
        return True

    def send(self, frame: bytes) -> None:
        """Send ``frame``, which concerns a recipient that the session listens to."""
        sent = 0
        if self._direct is not None:
            with contextlib.suppress(OSError):  # the transport finds out as well, and acts
                sent = self._direct.send(frame)
        if sent < len(frame):
            self._transport.write(frame[sent:])

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake."""
        frame = self.session.close(code, reason, self._host.now())
        if frame:
            log.info("session_closing", session=self.session.id, code=code, reason=reason)
            self._transport.resume_reading()
            self._transport.write(frame)
            self._follow()

    def move(self, url: str) -> None:
        """Send the client to another instance."""
        if self.session.state in {State.WAITING, State.OPEN}:
            self._transport.write(move_frame(url))
            self.close(4307, "moved")

    def renew(self, expires_at: float) -> None:
        """A new token was accepted. It expires at ``expires_at`` on the loop's clock."""
        self._transport.write(self.session.renew(expires_at=expires_at, now=self._host.now()))
        self._follow()

    def abort(self) -> None:
        """Drop the socket without a closing handshake."""
        self.session.state = State.CLOSED
        self._direct = None
        self._transport.abort()

    def wake(self, now: float) -> None:
        """The session's deadline has passed."""
        data = self.session.tick(now)
        if self.session.state is State.CLOSED:
            self.abort()
            return
        if data:
            self._transport.write(data)
        self._follow()

    # --- called by asyncio ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._deaf:
            return
        try:
            text = whole_text(data, self.session.hear) if self._parser is None else None
            if text is None:
                self._parse(data)
            elif self.is_open:
                self._on_text(text)
        except FrameError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the guard of this border
            note_unforeseen("frames", error)
            self._fail(FrameError(1011, "a defect of the server: see its log"))

    def pause_writing(self) -> None:
        """The peer does not read: merge pokes, and read nothing more from it."""
        self.session.block(self._host.now())
        self._transport.pause_reading()
        self._follow()

    def resume_writing(self) -> None:
        """The peer has read everything: send the merged poke."""
        data = self.session.drain(self._host.now()) + b"".join(self.session.drain_listened())
        self._follow()
        if self.session.state is not State.WAITING:
            self._transport.resume_reading()
        if data:
            self._transport.write(data)

    def eof_received(self) -> None:
        """The peer has closed its side; asyncio closes ours."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The socket is gone."""
        self.session.state = State.CLOSED
        self._direct = None
        if self._socket is not None:
            self._socket.detach()
        self._host.forget(self)
        if _logger.isEnabledFor(logging.DEBUG):
            log.debug("session_ended", session=self.session.id)

    # --- what the client sends --------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        parser = self._parser or FrameParser()
        for event in parser.feed(data, self.session.hear):
            self._on_frame(event)
        self._parser = None if parser.idle else parser

    def _on_frame(self, event: FrameEvent) -> None:
        session = self.session
        if event.opcode is Opcode.CLOSE:
            self._on_close(event.payload)
            return
        if session.state is not State.OPEN:
            return
        if event.opcode is Opcode.PONG:
            session.pong(self._host.now())
            self._follow()  # the next ping may be due before the deadline of this pong
        elif event.opcode is Opcode.PING:
            self._transport.write(encode_frame(Opcode.PONG, event.payload))
        else:
            self._on_text(event.payload)

    def _on_text(self, text: bytes) -> None:
        message = decode_client_message(text)
        if isinstance(message, Ack):
            self._on_ack(message.version)
        elif isinstance(message, Ping):
            self._transport.write(PONG_FRAME)
        elif isinstance(message, Auth):
            self._host.entrance.renew(self, message.token)
        elif not self.session.listens_at_most:
            raise FrameError(1008, "this instance takes no `listen`: `ready` did not offer it")
        elif isinstance(message, Listen):
            self._host.entrance.listen(self, message)
        else:
            self._host.entrance.unlisten(self, message.recipient)

    def _on_ack(self, version: int) -> None:
        on_ack, session = self._host.on_ack, self.session
        if on_ack is None:
            raise FrameError(1008, "this instance takes no acks: `ready` did not offer them")
        on_ack(session.recipient, session.device, version)

    def _on_close(self, payload: bytes) -> None:
        """Answer the peer's close frame with its own code, unless it is the answer to ours."""
        code = decode_close(payload)
        if self.session.state is not State.CLOSING:
            self.close(code or 1000, "")
        self._transport.close()

    def _fail(self, error: FrameError) -> None:
        """Fail the connection (RFC 6455, section 7.1.7).

        Send the reason and close our side, but read on: a socket that is closed with unread bytes
        is reset, and the reset could overtake the reason.
        """
        self._deaf = True
        self._parser = None
        self.close(error.close_code, str(error))
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def _follow(self) -> None:
        """Schedule the session's new deadline, and send directly only while the session flows.

        Directly means past the session and the transport; docs/benchmarks.md says what that saves.
        It overtakes nothing: a session does not flow while its transport has bytes buffered.
        """
        self._host.wheel.schedule(self, self.session.due_at)
        self._direct = self._socket if self.session.flows else None

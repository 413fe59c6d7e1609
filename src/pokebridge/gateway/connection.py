"""The socket of a session: an asyncio protocol that does no more than its session says.

There may be tens of thousands of these, nearly all silent, so one keeps no task, timer, queue or
buffer: deadlines are on the instance's wheel, a parser exists only while bytes are pending, and
a poke goes to the kernel in the call that brings it.
"""

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import structlog

from pokebridge.errors import FrameError
from pokebridge.framing import FrameEvent, FrameParser, Opcode, decode_close, encode_frame
from pokebridge.session import Session, State
from pokebridge.wire import PONG_FRAME, Ping, decode_client_message, move_frame

if TYPE_CHECKING:
    from pokebridge.gateway.gateway import Gateway

log = structlog.get_logger(__name__)

# A kernel would keep megabytes of pokes for a peer that reads nothing. With this little of it
# unsent, the kernel says "full", and the session merges (tcp(7), TCP_NOTSENT_LOWAT).
_UNSENT_BYTES_AT_MOST = 256


def _socket_under(transport: asyncio.Transport) -> socket.SocketType | None:
    """A way to send past ``transport``, if it has a socket; TLS ends before an instance.

    The descriptor remains the transport's, so this must be detached before the transport closes
    it: in ``connection_lost``, which is called before.
    """
    shown = transport.get_extra_info("socket")
    if shown is None:
        return None
    # The type in C, half as large as its subclass ``socket.socket``.
    own = socket.SocketType(shown.family, shown.type, shown.proto, shown.fileno())
    own.settimeout(0)
    return own


class Connection(asyncio.Protocol):
    """One accepted WebSocket."""

    __slots__ = (
        "_deaf",
        "_direct",
        "_gateway",
        "_parser",
        "_socket",
        "_transport",
        "address",
        "session",
        "wheel_slot",
    )

    def __init__(
        self, gateway: "Gateway", transport: asyncio.Transport, session: Session, address: str
    ) -> None:
        self._gateway = gateway
        self._transport = transport
        self._socket: socket.SocketType | None = None
        self._direct: socket.SocketType | None = None
        self._parser: FrameParser | None = None
        self._deaf = False
        self.session = session
        self.address = address
        self.wheel_slot = 0

    @property
    def recipient(self) -> str:
        """Whose it is."""
        return self.session.recipient

    def begin(self, response: bytes) -> None:
        """Take the transport over from the HTTP protocol and accept the handshake."""
        transport = self._transport
        transport.set_protocol(self)
        transport.set_write_buffer_limits(high=0)
        self._socket = sock = _socket_under(transport)
        if sock is not None:
            with contextlib.suppress(OSError, AttributeError):  # not TCP, or not Linux
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES_AT_MOST)
        transport.pause_reading()  # nothing is heard before ``ready`` is said
        transport.write(response)
        self._follow()

    def open(self, first_ping_s: float) -> None:
        """The recipient's subscription is live: say ``ready``."""
        if self.session.state is State.WAITING:
            gateway = self._gateway
            self._transport.write(
                self.session.open(
                    instance=gateway.instance, now=gateway.now(), first_ping_s=first_ping_s
                )
            )
            self._transport.resume_reading()
            self._follow()

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Send a poke, ``frame``, or merge it; whether it was sent."""
        sent = 0
        if self._direct is not None:
            try:
                sent = self._direct.send(frame)
            except OSError:
                sent = 0  # full, or broken: the transport finds that out too, and acts
        elif not self.session.poke(version):
            return False
        if sent < len(frame):
            self._transport.write(frame[sent:])
        return True

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake."""
        frame = self.session.close(code, reason, self._gateway.now())
        if frame:
            log.info("session closing", session=self.session.id, code=code, reason=reason)
            self._transport.resume_reading()
            self._transport.write(frame)
            self._follow()

    def move(self, url: str) -> None:
        """Send the client to another instance."""
        if self.session.state in {State.WAITING, State.OPEN}:
            self._transport.write(move_frame(url))
            self.close(4307, "moved")

    def renew(self, expires_at: float) -> None:
        """A new token was accepted: it runs out at ``expires_at`` on the loop's clock."""
        self._transport.write(self.session.renew(expires_at=expires_at, now=self._gateway.now()))
        self._follow()

    def abort(self) -> None:
        """Drop the socket without a word."""
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

    # --- asyncio's calls ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """The client said something."""
        if self._deaf:
            return
        parser = self._parser or FrameParser()
        try:
            for event in parser.feed(data):
                self._on_event(event)
        except FrameError as error:
            self._fail(error)
        self._parser = None if parser.idle else parser

    def pause_writing(self) -> None:
        """The peer does not read: merge pokes, and take no more work from it."""
        self.session.block(self._gateway.now())
        self._transport.pause_reading()
        self._follow()

    def resume_writing(self) -> None:
        """The peer has read everything: pay what is owed."""
        data = self.session.drain(self._gateway.now())
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
        self._gateway.forget(self)

    # --- what a client says ---------------------------------------------------------------------

    def _on_event(self, event: FrameEvent) -> None:
        session = self.session
        if event.opcode is Opcode.CLOSE:
            self._on_close(event.payload)
            return
        if session.state is not State.OPEN:
            return
        if not session.hear():
            raise FrameError(1008, "too many messages")
        if event.opcode is Opcode.PONG:
            session.pong(self._gateway.now())
            self._follow()  # the next ping may be due before the deadline of this pong was
        elif event.opcode is Opcode.PING:
            self._transport.write(encode_frame(Opcode.PONG, event.payload))
        else:
            message = decode_client_message(event.payload)
            if isinstance(message, Ping):
                self._transport.write(PONG_FRAME)
            else:
                self._gateway.renew(self, message.token)

    def _on_close(self, payload: bytes) -> None:
        """Answer the peer's close frame with its own code, unless it is the answer to ours."""
        code = decode_close(payload)
        if self.session.state is not State.CLOSING:
            self.close(code or 1000, "")
        self._transport.close()

    def _fail(self, error: FrameError) -> None:
        """Fail the connection (RFC 6455, section 7.1.7).

        Say why and hang up our side, but read on: closing a socket with unread bytes would reset
        it, and the reset could overtake the reason.
        """
        self._deaf = True
        self.close(error.close_code, str(error))
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def _follow(self) -> None:
        """The session has changed: wake it in time, and send directly only while it flows.

        Directly is past the session and the transport; docs/benchmarks.md says what that saves. It
        overtakes nothing: a session does not flow while its transport holds anything back.
        """
        self._gateway.wheel.schedule(self, self.session.due_at)
        self._direct = self._socket if self.session.flows else None

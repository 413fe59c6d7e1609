"""RFC 6455 framing for a server whose peers may say little: no extensions, no binary, 4 KiB.

The parser is sans-IO and lives only while a client's bytes are pending: a session that is silent,
as almost all are almost always, keeps none.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

from pokebridge.errors import FrameError

MAX_MESSAGE_BYTES = 4096
MAX_CONTROL_BYTES = 125  # RFC 6455, section 5.5

_FIN = 0x80
_RESERVED_BITS = 0x70
_MASKED = 0x80


class Opcode(IntEnum):
    """RFC 6455, section 5.2."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class FrameEvent(NamedTuple):
    """A whole text message, or a control frame, that the peer sent."""

    opcode: Opcode
    payload: bytes


def encode_frame(opcode: Opcode, payload: bytes) -> bytes:
    """One unmasked, final frame, as a server sends it (RFC 6455, section 5.1)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", _FIN | opcode, size) + payload
    if size < 65536:
        return struct.pack("!BBH", _FIN | opcode, 126, size) + payload
    return struct.pack("!BBQ", _FIN | opcode, 127, size) + payload


def encode_close(code: int, reason: str = "") -> bytes:
    """A close frame; the reason is cut to what a control frame can hold."""
    text = reason.encode()[: MAX_CONTROL_BYTES - 2].decode(errors="ignore").encode()
    return encode_frame(Opcode.CLOSE, struct.pack("!H", code) + text)


def decode_close(payload: bytes) -> int | None:
    """The code of a received close frame, ``None`` when it has none (RFC 6455, section 7.4).

    Raises:
        FrameError: 1002 for a code that must not be sent, 1007 for a reason that is not UTF-8.
    """
    if not payload:
        return None
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not (code in _SENDABLE_CODES or 3000 <= code <= 4999):
        raise FrameError(1002, "invalid close frame")
    check_utf8(payload[2:])
    return code


_SENDABLE_CODES = frozenset((1000, 1001, 1002, 1003, *range(1007, 1015)))


def check_utf8(payload: bytes) -> None:
    """Raise :class:`FrameError` 1007 when ``payload`` is not UTF-8 (RFC 6455, section 8.1)."""
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise FrameError(1007, "not UTF-8") from None


class FrameParser:
    """Turns the bytes of one client into events; raises on the first that breaks a rule."""

    __slots__ = ("_buffer", "_fragments")

    def __init__(self) -> None:
        self._buffer = b""
        self._fragments: bytearray | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is pending, so that the parser may be dropped and made anew."""
        return not self._buffer and self._fragments is None

    def feed(self, data: bytes) -> list[FrameEvent]:
        """The events that ``data`` completes.

        Raises:
            FrameError: a rule is broken; what came before it in ``data`` is void too, as the
                connection is closed.
        """
        self._buffer += data
        events = []
        while (frame := self._next_frame()) is not None:
            event = self._take(*frame)
            if event is not None:
                events.append(event)
        return events

    def _next_frame(self) -> tuple[bool, Opcode, bytes] | None:
        """Cut one frame off the buffer: (final, opcode, payload), or ``None`` when incomplete.

        Rules are checked as early as the bytes allow, so that an oversize frame is never buffered.
        """
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        first, second = buffer[0], buffer[1]
        final = bool(first & _FIN)
        opcode = self._check_header(first, second, final=final)
        size = second & 0x7F
        offset = 2
        if size == 126:
            if len(buffer) < 4:
                return None
            size, offset = int.from_bytes(buffer[2:4], "big"), 4
            if size < 126:
                raise FrameError(1002, "length not in its shortest form")
        elif size == 127:
            raise FrameError(1009, f"a message is at most {MAX_MESSAGE_BYTES} bytes")
        if size + len(self._fragments or b"") > MAX_MESSAGE_BYTES and opcode < Opcode.CLOSE:
            raise FrameError(1009, f"a message is at most {MAX_MESSAGE_BYTES} bytes")
        end = offset + 4 + size
        if len(buffer) < end:
            return None
        self._buffer = buffer[end:]
        return final, opcode, _unmask(buffer[offset + 4 : end], buffer[offset : offset + 4])

    def _check_header(self, first: int, second: int, *, final: bool) -> Opcode:
        """The opcode, once the two bytes are seen to follow RFC 6455, sections 5.2 to 5.5."""
        try:
            opcode = Opcode(first & 0x0F)
        except ValueError:
            raise FrameError(1002, "reserved opcode") from None
        if first & _RESERVED_BITS:
            raise FrameError(1002, "reserved bits set, and no extension was agreed")
        if not second & _MASKED:
            raise FrameError(1002, "client frames must be masked")
        if opcode >= Opcode.CLOSE:
            if not final or second & 0x7F > MAX_CONTROL_BYTES:
                raise FrameError(1002, "control frames are short and whole")
        elif (opcode is Opcode.CONTINUATION) != (self._fragments is not None):
            raise FrameError(1002, "continuation out of place")
        if opcode is Opcode.BINARY:
            raise FrameError(1003, "text messages only")
        return opcode

    def _take(self, final: bool, opcode: Opcode, payload: bytes) -> FrameEvent | None:  # noqa: FBT001 - a frame's own fields, in order
        """Add a frame to what is pending; the event that it completes, if it does."""
        if opcode >= Opcode.CLOSE:
            return FrameEvent(opcode, payload)
        if self._fragments is None:
            if final:
                check_utf8(payload)
                return FrameEvent(Opcode.TEXT, payload)
            self._fragments = bytearray(payload)
            return None
        self._fragments += payload
        if not final:
            return None
        message = bytes(self._fragments)
        self._fragments = None
        check_utf8(message)
        return FrameEvent(Opcode.TEXT, message)


def _unmask(payload: bytes, mask: bytes) -> bytes:
    """XOR with the repeated mask (RFC 6455, section 5.3), as one wide integer operation."""
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")

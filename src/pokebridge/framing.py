"""RFC 6455 framing for a server that limits its peers: no extensions, no binary, at most 9 KiB.

The parser does no I/O. It exists only while bytes of a client are pending, so a silent session,
which is the usual case, has none.
"""

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from pokebridge.errors import FrameError

MAX_MESSAGE_BYTES = 9 * 1024
"""The largest text message, which brings a new token of up to 8 KiB."""
MAX_CONTROL_BYTES = 125  # RFC 6455, section 5.5
MAX_FRAMES_PER_MESSAGE = 128
"""The most frames from the first fragment of a message to its last, control frames included."""

_FIN = 0x80
_RESERVED_BITS = 0x70
_MASKED = 0x80


class Opcode(IntEnum):
    """The opcodes of RFC 6455, section 5.2."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class FrameEvent(NamedTuple):
    """A complete text message or a control frame from the peer."""

    opcode: Opcode
    payload: bytes


def encode_frame(opcode: Opcode, payload: bytes) -> bytes:
    """Return one unmasked, final frame, as a server sends it (RFC 6455, section 5.1)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", _FIN | opcode, size) + payload
    if size < 65536:
        return struct.pack("!BBH", _FIN | opcode, 126, size) + payload
    return struct.pack("!BBQ", _FIN | opcode, 127, size) + payload


def encode_close(code: int, reason: str = "") -> bytes:
    """Return a close frame. The reason is cut to what a control frame can hold."""
    text = reason.encode()[: MAX_CONTROL_BYTES - 2].decode(errors="ignore").encode()
    return encode_frame(Opcode.CLOSE, struct.pack("!H", code) + text)


def decode_close(payload: bytes) -> int | None:
    """Return the code of a received close frame; ``None`` if it has none (RFC 6455, section 7.4).

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
    """Raise :class:`FrameError` 1007 if ``payload`` is not UTF-8 (RFC 6455, section 8.1)."""
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise FrameError(1007, "not UTF-8") from None


def whole_text(data: bytes, count: Callable[[], bool] = lambda: True) -> bytes | None:
    """The message in ``data``, if that is one short text frame and nothing else: the usual case.

    ``None``: it is something else, so a parser has to look at it. ``count`` and the errors are
    those of :meth:`FrameParser.feed`.
    """
    size = len(data) - 6
    if not 0 <= size < 126 or data[0] != _FIN | Opcode.TEXT or data[1] != _MASKED | size:
        return None
    if not count():
        raise _too_many_frames()
    payload = _unmask(data[6:], data[2:6])
    check_utf8(payload)
    return payload


class FrameParser:
    """Turns the bytes of one client into events, and raises at the first broken rule.

    The work is linear in the bytes that are fed, however they are cut into frames and chunks.
    """

    __slots__ = ("_buffer", "_fragments", "_frames")

    def __init__(self) -> None:
        # The beginning of a frame that is incomplete.
        self._buffer = bytearray()
        # The payload of a message whose last fragment is still to come ...
        self._fragments: bytearray | None = None
        # ... and the frames since its first one.
        self._frames = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is pending, so that the parser may be dropped."""
        return not self._buffer and self._fragments is None

    def feed(self, data: bytes, count: Callable[[], bool] = lambda: True) -> list[FrameEvent]:
        """Return the events that ``data`` completes.

        ``count`` is called for each frame, whether it completes an event or not. It returns whether
        the peer may send one more.

        Raises:
            FrameError: a rule is broken. Events earlier in ``data`` are lost too, because the
                connection is closed.
        """
        self._buffer += data
        events = []
        start = 0
        while (frame := self._frame_at(start)) is not None:
            if not count():
                raise _too_many_frames()
            final, opcode, payload, start = frame
            event = self._take(final, opcode, payload)
            if event is not None:
                events.append(event)
        del self._buffer[:start]  # once for all frames, as each time moves the rest
        return events

    def _frame_at(self, start: int) -> tuple[bool, Opcode, bytes, int] | None:
        """Return the frame at ``start``: (final, opcode, payload, end), or ``None`` if incomplete.

        Rules are checked as early as the bytes allow, so that an oversize frame is never buffered.
        """
        buffer = self._buffer
        if len(buffer) < start + 2:
            return None
        first, second = buffer[start], buffer[start + 1]
        final = bool(first & _FIN)
        opcode = self._check_header(first, second, final=final)
        size = second & 0x7F
        offset = start + 2
        if size == 126:
            if len(buffer) < start + 4:
                return None
            size, offset = int.from_bytes(buffer[offset : offset + 2], "big"), start + 4
            if size < 126:
                raise FrameError(1002, "the length must be in its shortest form")
        elif size == 127:
            raise FrameError(1009, f"a message is at most {MAX_MESSAGE_BYTES} bytes")
        if size + len(self._fragments or b"") > MAX_MESSAGE_BYTES and opcode < Opcode.CLOSE:
            raise FrameError(1009, f"a message is at most {MAX_MESSAGE_BYTES} bytes")
        end = offset + 4 + size
        if len(buffer) < end:
            return None
        return final, opcode, _unmask(buffer[offset + 4 : end], buffer[offset : offset + 4]), end

    def _check_header(self, first: int, second: int, *, final: bool) -> Opcode:
        """Check the first two bytes by RFC 6455, sections 5.2 to 5.5, and return the opcode."""
        try:
            opcode = Opcode(first & 0x0F)
        except ValueError:
            raise FrameError(1002, "reserved opcode") from None
        if first & _RESERVED_BITS:
            raise FrameError(1002, "reserved bits must be 0, because no extension was agreed")
        if not second & _MASKED:
            raise FrameError(1002, "client frames must be masked")
        if opcode >= Opcode.CLOSE:
            if not final or second & 0x7F > MAX_CONTROL_BYTES:
                raise FrameError(
                    1002, f"control frames must be whole, with at most {MAX_CONTROL_BYTES} bytes"
                )
        elif (opcode is Opcode.CONTINUATION) != (self._fragments is not None):
            raise FrameError(1002, "the fragments of a message must follow each other")
        if opcode is Opcode.BINARY:
            raise FrameError(1003, "only text messages are accepted")
        return opcode

    def _take(self, final: bool, opcode: Opcode, payload: bytes) -> FrameEvent | None:  # noqa: FBT001 - a frame's own fields, in order
        """Add a frame to what is pending, and return the event that it completes, if any."""
        self._frames = 0 if self._fragments is None else self._frames + 1
        if self._frames >= MAX_FRAMES_PER_MESSAGE:
            raise FrameError(1008, f"a message has at most {MAX_FRAMES_PER_MESSAGE} frames")
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


def _too_many_frames() -> FrameError:
    return FrameError(1008, "too many frames")


def _unmask(payload: bytes | bytearray, mask: bytes | bytearray) -> bytes:
    """XOR with the repeated mask (RFC 6455, section 5.3), as one wide integer operation."""
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")

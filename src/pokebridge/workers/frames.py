"""What a hub and its workers say to each other, and how it is framed.

A frame is its length, four bytes, and an array of messages in MessagePack: what one end sends in
one turn of its loop. So the other end decodes all of it by one call. Both ends are always the same
release, since the hub starts its workers. So these messages may change at any time.

Sessions, and the further recipients that they listen to, are identified by numbers, which their
worker assigns. The worker reuses a number only after the hub has confirmed that its last user is
:class:`Forgotten`. So neither end can confuse two sessions, whatever is in flight between them.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pokebridge.errors import InputError, PokebridgeError
from pokebridge.model import Ack
from pokebridge.wire import Disconnect

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Longer messages are an error. A full page of a mailbox has a little more than 1 MiB."""
_FULL_BYTES = 16 * 1024
"""A frame that has so many bytes takes no further message. All messages of a frame are in memory at
a time."""
_LENGTH = struct.Struct("!I")
# With what follows the length: the head of an array (MessagePack's array 32).
_HEAD = struct.Struct("!IBI")
_ARRAY = 0xDD


class ChannelError(PokebridgeError):
    """The peer sent an invalid frame, or more than fits: the channel can't be used any more."""


class Message(msgspec.Struct, array_like=True, gc=False):
    """The base class of all messages."""


# --- from the hub to a worker ---------------------------------------------------------------------


class Welcome(Message, tag=0):
    """What the worker needs before it serves. Only revocations come before it.

    ``settings`` are pickled. ``takes_acks``: whether clients may ack over their sockets.
    """

    worker: int
    settings: bytes
    takes_acks: bool


class Answer(Message, tag=1):
    """Accept the session's handshake; ``ready`` follows later."""

    session: int


class Open(Message, tag=2):
    """Send ``ready``, and accept the handshake first if that has not been done."""

    session: int


class Refuse(Message, tag=3):
    """Refuse the session's handshake."""

    session: int
    status: int
    detail: str
    headers: dict[str, str]


class Move(Message, tag=4):
    """Send the session's client to another instance."""

    session: int
    url: str


class Close(Message, tag=5):
    """Close the session."""

    session: int
    code: int
    reason: str


class Poke(Message, tag=6):
    """Send the sessions the WebSocket frame ``frame``, a poke for ``version``."""

    sessions: list[int]
    version: int | None
    frame: bytes


class Wake(Message, tag=7):
    """Poke every session of the worker: pokes for it were dropped. Pulls spread over the time."""

    within_ms: int


class Revoke(Message, tag=8):
    """Refuse tokens from now on."""

    disconnect: Disconnect


class Result(Message, tag=9):
    """What a call returned."""

    call: int
    value: msgspec.Raw


class Failure(Message, tag=10):
    """What a call raised: the name of the error's class, its text, and its further attributes."""

    call: int
    kind: str
    text: str
    details: dict[str, Any]


class Ask(Message, tag=11):
    """Report: are you alive?"""

    number: int


class Stop(Message, tag=12):
    """Finish the running requests and end. The sessions are closed already."""


class Forgotten(Message, tag=13):
    """The hub knows that the session has ended: its number may be given to another one."""

    session: int


class Want(Message, tag=14):
    """Send the body of an HTTP request that was passed on: what answers it reads that."""

    number: int


ToWorker = (
    Welcome
    | Answer
    | Open
    | Refuse
    | Move
    | Close
    | Poke
    | Wake
    | Revoke
    | Result
    | Failure
    | Ask
    | Stop
    | Forgotten
    | Want
)


# --- from a worker to the hub ---------------------------------------------------------------------


class Ready(Message, tag=0):
    """The worker serves the connections that it is given from now on."""


class Enter(Message, tag=1):
    """A client with a valid token wants a session. It waits for the hub's answer.

    ``moved``: it was sent here by another instance. Without ``is_session``, the client's session
    wants to listen to this recipient beside its own.
    """

    session: int
    recipient: str
    device: str
    address: str
    began_at: int
    moved: bool
    is_session: bool = True


class Leave(Message, tag=2):
    """The session's socket is closed, or its handshake was refused."""

    session: int


class Acked(Message, tag=3):
    """Acks came over the sockets of sessions."""

    acks: list[Ack]


class Pulled(Message, tag=4):
    """The recipient has pulled, up to ``version``."""

    recipient: str
    version: int


class Call(Message, tag=5):
    """Do ``method`` with ``arguments``, and answer with a Result or a Failure."""

    number: int
    method: str
    arguments: msgspec.Raw


class Report(Message, tag=6):
    """The answer to :class:`Ask`. Counts are those since the worker's start.

    - ``number``: the Ask's
    - ``accepted``: connections that it was given
    - ``connections``, ``sessions``: those open now
    - ``cpu_s``, ``memory_bytes``: of the process
    - ``merged``: pokes that were merged because their client did not read
    - ``committed``, ``refused``: messages, where the worker has a mailbox of its own
    - ``limited``: HTTP connections that a limit has closed or refused
    - ``handshakes``: by status
    - ``unforeseen``, ``failures``: errors by border, and by background task
    - ``failing``: background tasks that fail now
    - ``durations``: of requests: labels, the histogram's counts, and the sum in seconds
    """

    number: int
    accepted: int
    connections: int
    sessions: int
    cpu_s: float
    memory_bytes: int
    merged: int
    limited: int
    committed: int
    refused: int
    handshakes: dict[str, int]
    unforeseen: dict[str, int]
    failures: dict[str, int]
    failing: Sequence[str]
    durations: Sequence[tuple[tuple[str, str, str], Sequence[int], float]]


class Gone(Message, tag=7):
    """The client of an HTTP request that was passed on has gone away."""

    number: int


class Body(Message, tag=8):
    """The body of an HTTP request, as the hub wanted it."""

    number: int
    body: bytes


ToHub = Ready | Enter | Leave | Acked | Pulled | Call | Report | Gone | Body

decode_to_worker = msgspec.msgpack.Decoder(list[ToWorker]).decode
"""Decode a frame of a hub."""
decode_to_hub = msgspec.msgpack.Decoder(list[ToHub]).decode
"""Decode a frame of a worker."""


class Framer:
    """Collects messages to send as one piece of bytes, which is one frame unless they are large.

    - ``_pending``: the frames
    - ``_start``: where the last of them begins
    - ``_count``: how many messages that one has
    """

    def __init__(self) -> None:
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._pending = bytearray()
        self._start = self._count = 0

    def __len__(self) -> int:
        """How many bytes are collected."""
        return len(self._pending)

    def add(self, message: Message) -> None:
        """Add a message.

        Raises:
            InputError: it has a text or a number that has no encoding. It is not added.
            ChannelError: it is too long. It is not added.
        """
        pending = self._pending
        if not self._count:
            self._start = len(pending)
            pending += bytes(_HEAD.size)
        start = len(pending)
        try:
            self._encode_into(message, pending, start)
        except (UnicodeEncodeError, OverflowError):
            self._drop(start)
            raise InputError("a text or a number cannot be encoded") from None
        length = len(pending) - start
        if length > MAX_MESSAGE_BYTES:
            self._drop(start)
            raise ChannelError(f"{length} bytes are too long for a call: {MAX_MESSAGE_BYTES} fit")
        self._count += 1
        if len(pending) - self._start > _FULL_BYTES:
            self._end()

    def take(self) -> bytes:
        """Everything that was added since the last call."""
        if self._count:
            self._end()
        pending, self._pending = self._pending, bytearray()
        return bytes(pending)

    def _drop(self, start: int) -> None:
        """Remove the message that begins at ``start``, and its frame if that has no other."""
        del self._pending[start if self._count else self._start :]

    def _end(self) -> None:
        """End the last frame."""
        length = len(self._pending) - self._start - _LENGTH.size
        _HEAD.pack_into(self._pending, self._start, length, _ARRAY, self._count)
        self._count = 0


class Deframer:
    """Cuts received bytes into the frames' contents."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The contents of the frames that are complete with ``data``.

        Raises:
            ChannelError: a frame is too long.
        """
        data = self._rest + data if self._rest else data
        view, start = memoryview(data), 0
        while len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > MAX_MESSAGE_BYTES + _FULL_BYTES + _HEAD.size:
                raise ChannelError(f"a frame says that it has {length} bytes")
            end = start + _LENGTH.size + length
            if end > len(data):
                break
            yield view[start + _LENGTH.size : end]
            start = end
        self._rest = data[start:]

"""The JSON on the wire: signals on the transport, and messages on the WebSocket.

Signals are protocol.md section 2, WebSocket messages section 3. Everything a session sends is
returned as a complete WebSocket frame, so a poke costs one write and no formatting.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from pokebridge.errors import FrameError, SignalError
from pokebridge.framing import Opcode, encode_frame
from pokebridge.model import MAX_VERSION, Poke, Version

CONNECT_PATH = "/v1/connect"
"""The path at which every instance accepts WebSockets."""

PROBLEM_TYPE = "application/problem+json"
"""The media type of every refusal over HTTP (RFC 9457)."""


class _Problem(msgspec.Struct):
    type: str
    title: str
    status: int
    detail: str


def problem_detail(status: int, media_type: str | None, body: bytes) -> str | None:
    """Return why an instance refused with ``status``; ``None`` if no instance sent the answer.

    Proxies, firewalls and login pages answer as well, and know nothing about tokens.
    """
    if (media_type or "").partition(";")[0].strip().lower() != PROBLEM_TYPE:
        return None
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (ValueError, RecursionError):
        return None
    return problem.detail if problem.status == status else None


def refusal_text(url: str, status: int, detail: str | None) -> str:
    """Return what happened, for people; ``detail`` is what :func:`problem_detail` returned."""
    said = f"{url} answered {status}"
    stranger = f"{said}, but not as an instance of pokebridge"
    return stranger if detail is None else f"{said}: {detail}"


# --- signals --------------------------------------------------------------------------------


class Disconnect(NamedTuple):
    """The signal that closes a recipient's sessions with 4401.

    One that ``is_repeated`` is for instances that may have missed the first. It leaves the sessions
    open that began after ``at_ms``. With ``until_ms``, tokens of the recipient that were issued
    before ``at_ms`` are refused until then. Both are Unix times in milliseconds.
    """

    recipient: str
    at_ms: int | None = None
    until_ms: int | None = None
    is_repeated: bool = False


class Probe(NamedTuple):
    """The signal by which an instance proves that its own subscription delivers."""

    id: str


MAX_BEACON_TEXT_CHARS = 256
"""The longest text of a setting in a beacon."""
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_BEACON_TEXT_CHARS)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_BEACON_TEXT_CHARS)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=MAX_VERSION)]
# Unix time, in seconds or milliseconds. A larger number has no encoding between processes.
_Time = Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]


class Beacon(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={"sender": "from", "number": "n"},
):
    """The signal by which instances notice each other. Its numbers show when some were lost.

    On the wire it is a probe with more fields, since release 0.1.0 drops probes of other instances
    without counting them as invalid.
    """

    sender: _Name
    """The instance's id."""
    incarnation: _Name
    """Different at each start, also for the same ``sender``."""
    number: _Number
    """From 1, one more with each beacon of the incarnation."""
    up_s: Annotated[float, msgspec.Meta(ge=0)]
    """How long the incarnation has run, in seconds."""
    every_s: Annotated[float, msgspec.Meta(gt=0, le=3600)]
    """About how long it is until the next beacon, in seconds."""
    cluster: _Name
    shard_count: _Number
    carrier: _Name
    assignment: _Name | None = None
    """``None`` if it does not matter, because the instance neither owns nor assigns shards."""
    group_prefixes: _Text | None = None
    """The prefixes in order, separated by commas; ``None`` from an instance that does not tell."""
    mailbox: _Text = ""
    """Names the mailbox that the instance has; empty if it has none."""
    last: bool = False
    """Whether the instance stops, so that no other beacon follows."""


class ListedSession(msgspec.Struct, frozen=True):
    """A session as its instance tells of it.

    - ``device``: the name of its device
    - ``address``: the client's address, as far as it is known
    - ``since``: when it began, in Unix seconds
    - ``told``: the newest version that it was poked for; ``None`` when no poke named one
    """

    device: str
    address: str
    since: _Time
    told: Version | None = None


class Lookup(msgspec.Struct, frozen=True, omit_defaults=True, rename={"sender": "from"}):
    """A question for the sessions of a recipient, or with ``sessions`` an instance's answer.

    On the wire it is a probe with more fields, like a beacon: earlier releases drop it.
    """

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    """The id of the question, which answers repeat."""
    sender: _Name
    """The instance that asks or answers."""
    recipient: _Name
    sessions: Annotated[list[ListedSession], msgspec.Meta(max_length=1000)] | None = None


class _Body(msgspec.Struct, gc=False):
    """The fields of all signal bodies together, so that one C call decodes any of them."""

    type: str = "poke"
    recipient: str | None = None
    version: Version | None = None
    pokes: list[Poke] | None = None
    id: str | None = None
    beacon: Beacon | None = None
    lookup: Lookup | None = None
    at_ms: _Time | None = None
    until_ms: _Time | None = None
    repeated: bool = False


_decode_body = msgspec.json.Decoder(_Body).decode
_encode_json = msgspec.json.Encoder().encode


def decode_signal(body: bytes) -> list[Poke] | Disconnect | Probe | Beacon | Lookup:
    """Decode a signal's ``body``.

    A recipient's form is hardly checked, because in fan-out every instance decodes every poke. A
    malformed recipient has no session, so its poke is dropped as noise and the rest of its batch
    is delivered.

    Raises:
        SignalError: it is no body of protocol.md section 2, no probe and no beacon. No other
            error is raised, whatever the bytes are.
    """
    try:
        fields = _decode_body(body)
    except Exception as error:  # noqa: BLE001 - anyone may publish, and deep nesting raises RecursionError
        raise SignalError(str(error)) from None
    if fields.recipient is not None and not fields.recipient.isascii():
        raise SignalError("a recipient must be visible ASCII characters")
    if fields.type == "poke":
        if fields.recipient is not None and fields.pokes is None:
            return [Poke(fields.recipient, fields.version)]
        if fields.pokes is not None and fields.recipient is None:
            return fields.pokes
        raise SignalError("a poke signal must have either a recipient or pokes")
    if fields.type == "disconnect" and fields.recipient is not None:
        return Disconnect(fields.recipient, fields.at_ms, fields.until_ms, fields.repeated)
    if fields.type == "probe" and fields.id is not None:
        return fields.beacon or fields.lookup or Probe(fields.id)
    raise SignalError(
        f"unknown signal type {fields.type[:32]!r}, or a field of that type is missing"
    )


class _Batch(msgspec.Struct):
    pokes: list[msgspec.Raw]
    type: Literal["poke"] = "poke"
    recipient: None = None


def salvage_pokes(body: bytes) -> list[Poke]:
    """Return the pokes of a batch that :func:`decode_signal` refuses, without its invalid ones."""
    pokes: list[Poke] = []
    with suppress(Exception):  # as there
        for each in msgspec.json.decode(body, type=_Batch).pokes:
            with suppress(Exception):
                pokes.append(msgspec.json.decode(each, type=Poke))
    return pokes


def encode_pokes(pokes: Sequence[Poke]) -> bytes:
    """Return the signal body for ``pokes`` (at least one), in the short form for a single poke."""
    return _encode_json(pokes[0] if len(pokes) == 1 else {"pokes": pokes})


def encode_disconnect(recipient: str, **more: Any) -> bytes:
    """Return the signal body that closes every session of ``recipient``, on every instance.

    ``more`` are the other fields of :class:`Disconnect`.
    """
    wanted = Disconnect(recipient, **more)
    fields = {"at_ms": wanted.at_ms, "until_ms": wanted.until_ms}
    body: dict[str, Any] = {"type": "disconnect", "recipient": recipient}
    body |= {name: value for name, value in fields.items() if value is not None}
    return _encode_json(body | ({"repeated": True} if wanted.is_repeated else {}))


MISSED = "missed:"
"""A probe whose id begins so asks for the recent disconnects. Earlier releases drop it."""

_PROBE_START = b'{"type":"probe",'


def is_probe(body: bytes) -> bool:
    """Whether ``body`` is a probe or a beacon of an instance."""
    return body.startswith(_PROBE_START)


def encode_probe(probe_id: str) -> bytes:
    """Return the signal body of a probe. Instances other than the sender drop it."""
    return _encode_json({"type": "probe", "id": probe_id})


def encode_beacon(beacon: Beacon) -> bytes:
    """Return the signal body of ``beacon``."""
    probe_id = f"{beacon.sender}:{beacon.incarnation}:{beacon.number}"
    return _encode_json({"type": "probe", "id": probe_id, "beacon": beacon})


def encode_lookup(lookup: Lookup) -> bytes:
    """Return the signal body of ``lookup``."""
    return _encode_json({"type": "probe", "id": f"lookup:{lookup.id}", "lookup": lookup})


# --- WebSocket messages, server to client -----------------------------------------------------


def _text_frame(message: dict[str, Any]) -> bytes:
    return encode_frame(Opcode.TEXT, _encode_json(message))


POKE_FRAME = _text_frame({"type": "poke"})
PONG_FRAME = _text_frame({"type": "pong"})
PING_CONTROL_FRAME = encode_frame(Opcode.PING, b"")

_VERSION_POKE = b'{"type":"poke","version":'
# The beginnings of a frame with a version, by the length of the rest. The text is under 126 bytes,
# so the header has two bytes: FIN | TEXT, and the length (RFC 6455, section 5.2).
_VERSION_POKE_HEADS = tuple(
    bytes((0x80 | Opcode.TEXT, len(_VERSION_POKE) + rest)) + _VERSION_POKE
    for rest in range(len(b"%d}" % MAX_VERSION) + 1)
)


def poke_frame(version: int | None, within_ms: int = 0) -> bytes:
    """Return the frame of a poke, with the newest ``version`` if it is known.

    ``within_ms`` asks the client to wait first, for a random time of at most so many milliseconds.
    """
    if within_ms:
        message: dict[str, Any] = {"type": "poke", "within_ms": within_ms}
        if version is not None:
            message["version"] = version
        return _text_frame(message)
    if version is None:
        return POKE_FRAME
    rest = b"%d}" % version
    return _VERSION_POKE_HEADS[len(rest)] + rest


_POKE = b'{"type":"poke"'


def address_poke(frame: bytes, recipient: str) -> bytes:
    """Return the poke ``frame`` with the recipient that it is for."""
    named = b'%s,"recipient":%s' % (_POKE, _encode_json(recipient))
    return encode_frame(Opcode.TEXT, named + frame_text(frame)[len(_POKE) :])


def ready_frame(
    *,
    session: str,
    instance: str,
    expires_in_s: int,
    takes_acks: bool = False,
    listens: int = 0,
) -> bytes:
    """Return the first frame of a session: its subscription delivers, so the client pulls now.

    With ``takes_acks`` the client may ack over its socket. It may listen to so many further
    recipients as ``listens`` says.
    """
    message: dict[str, Any] = {
        "type": "ready",
        "session": session,
        "instance": instance,
        "expires_in": expires_in_s,
    }
    if takes_acks:
        message["acks"] = True
    if listens:
        message["listens"] = listens
    return _text_frame(message)


def listening_frame(recipient: str, expires_in_s: int) -> bytes:
    """Return the frame that says that ``recipient`` is heard, so the client pulls its data now."""
    return _text_frame({"type": "listening", "recipient": recipient, "expires_in": expires_in_s})


def unlistened_frame(recipient: str | None, code: int, reason: str) -> bytes:
    """Return the frame that says why ``recipient`` is not heard. ``None``: an unreadable token's.

    ``code`` is a close code, although only this recipient is concerned.
    """
    message: dict[str, Any] = {"type": "unlistened"}
    if recipient is not None:
        message["recipient"] = recipient
    return _text_frame(message | {"code": code, "reason": reason})


def move_frame(url: str) -> bytes:
    """Return the frame that sends the client to the instance at ``url``. Close 4307 follows it."""
    return _text_frame({"type": "move", "url": url})


def auth_frame(expires_in_s: int) -> bytes:
    """Return the frame that accepts a new token, which expires in ``expires_in_s`` seconds."""
    return _text_frame({"type": "auth", "expires_in": expires_in_s})


def frame_text(frame: bytes) -> bytes:
    """Return the payload of ``frame``, which is one of a server's and under 64 KiB."""
    return frame[2:] if frame[1] < 126 else frame[4:]  # RFC 6455, section 5.2


# --- WebSocket messages, client to server -----------------------------------------------------


MAX_TEXT_BYTES = 4096
"""The largest message of a client. Only one that brings a token may be larger."""


class Ping(msgspec.Struct, tag="ping", tag_field="type"):
    """A request for a pong."""


class Auth(msgspec.Struct, tag="auth", tag_field="type"):
    """A new token for the session."""

    token: str


class Ack(msgspec.Struct, tag="ack", tag_field="type", gc=False):
    """The session's device has everything up to ``version``."""

    version: Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]


class Listen(msgspec.Struct, tag="listen", tag_field="type"):
    """A request to listen to the recipient of ``token``, which ``recipient`` repeats."""

    token: str
    recipient: _Name | None = None


class Unlisten(msgspec.Struct, tag="unlisten", tag_field="type"):
    """``recipient`` need not be heard any more."""

    recipient: _Name


ClientMessage = Ping | Auth | Ack | Listen | Unlisten
_decode_client_message: Callable[[bytes], ClientMessage]
_decode_client_message = msgspec.json.Decoder(ClientMessage).decode


def decode_client_message(text: bytes) -> ClientMessage:
    """Decode a client's text message.

    Raises:
        FrameError: with 1008, because a client may not send this message, or 1009, because it is
            too large and brings no token.
    """
    message: ClientMessage | None
    try:
        message = _decode_client_message(text)
    except (msgspec.DecodeError, RecursionError):  # the latter when it is nested too deeply
        message = None
    if len(text) > MAX_TEXT_BYTES and not isinstance(message, Auth | Listen):
        raise FrameError(1009, f"a message without a token is at most {MAX_TEXT_BYTES} bytes")
    if message is None:
        raise FrameError(1008, "not a client message of pokebridge.v1")
    return message

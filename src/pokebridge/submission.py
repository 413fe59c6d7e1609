"""A message as its sender submits it, by HTTP or through a queue: decoded, checked, made a value.

Both ways in share these types and limits, so that both take the same messages. The structs also
describe the HTTP API in OpenAPI.
"""

from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from pokebridge.errors import InputError, NotJsonError, TooLargeError
from pokebridge.model import MAX_RECIPIENT_LENGTH, NewMessage, check_recipient, is_recipient

MAX_BODY_BYTES = 65_536
MAX_BODY_DEPTH = 100
"""A deeper body could exhaust the stack of the parser that pulls it, at every attempt."""
MAX_ID_LENGTH = 128
MAX_TTL_S = 315_360_000
"""Ten years. A message that is to be kept for longer has no ``ttl_s``."""
EPHEMERAL_TTL_S = 30
"""Enough time for every connected client to receive the poke and pull."""

T = TypeVar("T")


def visible_ascii(max_length: int, example: str, description: str) -> Meta:
    """How OpenAPI describes a string of 1 to ``max_length`` visible ASCII characters.

    msgspec does not check it: the checks of ``pokebridge.model`` have clearer messages.
    """
    return Meta(
        description=description,
        extra_json_schema={
            "minLength": 1,
            "maxLength": max_length,
            "pattern": "^[!-~]+$",
            "example": example,
        },
    )


Recipient = Annotated[
    str, visible_ascii(MAX_RECIPIENT_LENGTH, "urn:user:bob", "Visible ASCII, never looked into.")
]
MessageId = Annotated[str, visible_ascii(MAX_ID_LENGTH, "order-4711", "The message's name.")]


class SendRequest(Struct, forbid_unknown_fields=True):
    """A message. The same `id` from the same sender again commits nothing."""

    recipient: Recipient
    body: Annotated[
        Raw,
        Meta(
            description="Any JSON value, kept as it was written; up to 64 KiB, nested up to 100.",
            extra_json_schema={"example": {"text": "hello"}},
        ),
    ]
    id: MessageId | UnsetType = UNSET
    ttl_s: (
        Annotated[
            float,
            Meta(
                ge=0.001,
                le=MAX_TTL_S,
                description="Seconds after which it may be deleted unread; left out: never.",
                extra_json_schema={"example": 3600},
            ),
        ]
        | UnsetType
    ) = UNSET
    ephemeral: Annotated[
        bool,
        Meta(
            description="Only for who is connected now: gone for everybody after"
            f" {EPHEMERAL_TTL_S} s, acked or not."
        ),
    ] = False


class QueuedMessage(SendRequest, kw_only=True):
    """A message from a queue. Every publisher there is trusted to name the sender."""

    sender: Recipient


_decode_queued = msgspec.json.Decoder(QueuedMessage).decode


def read_queued(body: bytes, delivery_id: str) -> NewMessage:
    """The message in what a queue delivered, as a POST of the same body would make it.

    A message without an ``id`` takes the ``delivery_id``, so that a redelivery is a duplicate.

    Raises:
        InputError: the body is not a message that the contract allows.
    """
    queued = decode_json(_decode_queued, body)
    message = new_message(queued, check_recipient(queued.sender), delivery_id)
    return msgspec.structs.replace(message, has_idempotency_key=True)


def new_message(request: SendRequest, sender: str, default_id: str) -> NewMessage:
    """The message that ``sender`` submits; its id is ``default_id`` unless the request has one.

    Raises:
        TooLargeError: the body is too long.
        InputError: the request breaks the contract otherwise.
    """
    body = bytes(request.body)
    _check_body(body)
    own_id = None if request.id is UNSET else request.id
    if own_id is not None and not (is_recipient(own_id) and len(own_id) <= MAX_ID_LENGTH):
        raise InputError(f"an id is 1 to {MAX_ID_LENGTH} visible ASCII characters")
    return NewMessage(
        recipient=check_recipient(request.recipient),
        sender=sender,
        id=default_id if own_id is None else own_id,
        body=body,
        ttl_s=_ttl_s(request),
        has_idempotency_key=own_id is not None,
        is_ephemeral=request.ephemeral,
    )


def decode_json(decode: Callable[[bytes], T], text: bytes) -> T:
    """Return ``decode(text)``, with its errors as ours.

    Raises:
        NotJsonError: the text is not JSON.
        InputError: the text is JSON, and not what ``decode`` expects.
    """
    try:
        return decode(text)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotJsonError(f"the body is not JSON: {error}") from None


def _ttl_s(request: SendRequest) -> float | None:
    ttl_s = None if request.ttl_s is UNSET else request.ttl_s
    if request.ephemeral:
        return min(ttl_s or EPHEMERAL_TTL_S, EPHEMERAL_TTL_S)
    return ttl_s


def _check_body(body: bytes) -> None:
    """Raise unless every client can parse ``body``: one that can't would pull it forever."""
    if len(body) > MAX_BODY_BYTES:
        raise TooLargeError(f"a message's body may have at most {MAX_BODY_BYTES} bytes")
    value = decode_json(msgspec.json.decode, body)
    # Counting brackets is cheap, and enough for almost every body.
    opened = body.count(b"[") + body.count(b"{")
    if opened > MAX_BODY_DEPTH and _is_deeper(value, MAX_BODY_DEPTH):
        raise InputError(f"a message's body may be nested at most {MAX_BODY_DEPTH} deep")


def _is_deeper(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return depth == 0 or any(_is_deeper(child, depth - 1) for child in value)

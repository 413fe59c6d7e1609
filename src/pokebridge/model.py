"""The nouns of the contract as values: a poke, a message, a page of a mailbox.

A recipient is an opaque string. Only its form is checked here (protocol.md section 1).
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Annotated, Literal, NamedTuple

import msgspec

from pokebridge.errors import InputError

MAX_RECIPIENT_LENGTH = 256
MAX_DEVICE_LENGTH = 128
DEFAULT_DEVICE = "default"
REVOCATIONS = "urn:pokebridge:revocations"
"""The recipient whose messages are the revocations of tokens. Nobody may send to it."""
# The largest integer that JSON carries safely through JavaScript (RFC 8259, section 6).
MAX_VERSION = 2**53 - 1

Version = Annotated[int, msgspec.Meta(ge=1, le=MAX_VERSION)]

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")


class Poke(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A wake-up: ``recipient`` may lack ``version``; ``None`` stands for an unknown version."""

    recipient: str
    version: Version | None = None


Mode = Literal["fanout", "partitioned"]
"""Which signals an instance receives: all (fanout), or those of its shards (partitioned)."""


class Feed(Enum):
    """The two selections that name no shard."""

    ALL = "all"
    UNTAGGED = "untagged"


Selection = Feed | int
"""What a subscription receives: everything, the signals without a shard, or one shard's."""


def is_recipient(value: str) -> bool:
    """Whether ``value`` has the form of a recipient: 1 to 256 visible ASCII characters."""
    return len(value) <= MAX_RECIPIENT_LENGTH and _VISIBLE_ASCII.fullmatch(value) is not None


def check_recipient(value: str) -> str:
    """Return ``value``, or raise :class:`InputError` if it is not a recipient."""
    if not is_recipient(value):
        raise InputError(
            f"a recipient is 1 to {MAX_RECIPIENT_LENGTH} visible ASCII characters (0x21-0x7E)"
        )
    return value


def check_device(value: str) -> str:
    """Return ``value``, or raise :class:`InputError` if it cannot name a device."""
    if not (is_recipient(value) and len(value) <= MAX_DEVICE_LENGTH):
        raise InputError(f"a device is 1 to {MAX_DEVICE_LENGTH} visible ASCII characters")
    return value


class NewMessage(msgspec.Struct, frozen=True, gc=False):
    """A message on its way into a mailbox.

    - ``body``: JSON text, stored unchanged
    - ``id``: chosen by the sender if ``has_idempotency_key``. Then a second message with the same
      id from the same sender is not stored, and gets the answer of the first.
    - ``ttl_s``: seconds after the commit when it may be deleted unread; ``None``: never
    - ``is_ephemeral``: only for clients that are connected now
    """

    recipient: str
    sender: str
    id: str
    body: bytes
    ttl_s: float | None = None
    has_idempotency_key: bool = False
    is_ephemeral: bool = False


class Ack(NamedTuple):
    """A ``device`` of ``recipient`` has everything up to ``version``."""

    recipient: str
    device: str
    version: int


class Receipt(NamedTuple):
    """What an append committed. ``duplicate``: an earlier append had committed the same id."""

    id: str
    version: int
    duplicate: bool = False


SendMessage = Callable[[NewMessage], Awaitable[Receipt]]
"""Commits a message and pokes its recipient."""
PublishPokes = Callable[[Sequence[Poke]], Awaitable[None]]
"""Returns when the transport has accepted the pokes, or raises TransportError."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """A committed message. ``sent_at_ms`` is Unix time in milliseconds; ``body`` is JSON text."""

    version: int
    id: str
    sender: str
    body: bytes
    sent_at_ms: int


class Page(msgspec.Struct, frozen=True, gc=False):
    """Messages with a version above the cursor, in order.

    - ``version``: the next cursor. It is the last version returned, or the head if there is none.
    - ``head``: the newest version that the recipient ever had; 0 if it never had a message
    - ``more``: the page was cut at its limit
    """

    messages: tuple[Message, ...]
    version: int
    head: int
    more: bool

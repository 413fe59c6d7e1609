"""The mailbox port: a recipient's durable log, and what it promises."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from pokebridge.errors import MailboxFullError
from pokebridge.model import MAX_VERSION, Message, NewMessage, Page, Poke, Receipt

DAY_MS: Final = 24 * 3600 * 1000
RECEIPT_KEPT_MS: Final = 7 * DAY_MS
"""How long a receipt outlives its append at least: a week."""
SEEN_EVERY_MS: Final = DAY_MS
"""How often at most it is written down that a device was seen."""
PAGE_BYTES: Final = 1024 * 1024
"""What the bodies of one page have at most, so that 500 large messages are several pages."""
FORGET_BATCH: Final = 10
"""Devices that one purge forgets at most: each may free a whole mailbox of messages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a mailbox keeps for each recipient, and how long it waits for a device.

    ``max_messages`` and ``max_bytes`` (of bodies) count what is stored: an expired message counts
    until it is purged. A device unseen for ``forget_device_s`` seconds is forgotten, so that the
    acks which will never come hold nothing back.
    """

    max_messages: int = 10_000
    max_bytes: int = 64 * 1024 * 1024
    forget_device_s: float = 90 * DAY_MS / 1000

    def refuse(self) -> MailboxFullError:
        """The error for a message that does not fit any more."""
        return MailboxFullError(
            f"the recipient's mailbox is full ({self.max_messages} messages or {self.max_bytes}"
            " bytes): it takes messages again when some are acked or have expired"
        )

    def unseen_since_ms(self, now_ms: int) -> int:
        """When a device must have been seen last to be forgotten at ``now_ms`` (Unix time, ms)."""
        return now_ms - int(self.forget_device_s * 1000)


class MailboxStats(NamedTuple):
    """What a mailbox holds; times are Unix time in milliseconds, ``None`` when there is nothing.

    ``recipients`` counts all that ever had a message, ``outbox`` the pokes that are owed now,
    ``pushes`` the notifications that are owed, ``dead_pushes`` those that were given up.
    """

    recipients: int
    messages: int
    bytes: int
    devices: int
    outbox: int
    oldest_message_ms: int | None
    oldest_outbox_ms: int | None
    pushes: int = 0
    dead_pushes: int = 0


class Mailbox(Protocol):
    """A durable log for each recipient.

    Promises, held by ``pokebridge.testing.MailboxContract`` against every adapter:

    - **Dense**: a recipient's versions are 1, 2, 3, … in commit order, also under concurrent
      senders in several processes. A reader never sees version n before n - 1 is committed.
    - **Idempotent**: a message with an idempotency key, its (sender, id), is committed once. An
      append that repeats the key commits nothing and returns the first receipt, marked
      ``duplicate``. This holds for at least a week, also after the message itself is deleted.
    - **Durable**: when ``append`` returns, the message and the promise of its poke (the outbox)
      are committed in one transaction and survive the death of the process.
    - **Off the loop**: no call blocks the event loop.
    - **Atomic**: a call that is cancelled or fails has happened in whole or not at all.
    - **Bounded**: no call waits for ever, and each recipient's mailbox has its :class:`Limits`.

    Every call raises :class:`~pokebridge.errors.MailboxError` when the store can't do it now, has
    too much to do, or is closed.
    """

    is_shared: bool
    """Whether another process that opens the same URL finds the same messages."""

    async def append(self, message: NewMessage) -> Receipt:
        """Commit ``message`` as its recipient's next version, with an outbox entry for its poke.

        Raises :class:`~pokebridge.errors.MailboxFullError` when the recipient's limits leave no
        room for it; then nothing was committed. A duplicate needs no room.
        """

    async def read(
        self,
        recipient: str,
        *,
        after: int,
        limit: int,
        max_bytes: int = PAGE_BYTES,
        unless_head: int | None = None,
    ) -> Page:
        """The messages of ``recipient`` with a version above ``after``: at most ``limit`` (>= 1).

        Their bodies have ``max_bytes`` together at most, but the first message always fits; what
        is beyond is not read. Expired messages are left out. Nothing to read costs one indexed
        look-up; a cursor above the head reads nothing and is given the head. When the head is
        ``unless_head`` nothing is read either.
        """

    async def head(self, recipient: str) -> int:
        """The newest version ever given to ``recipient``; 0 when there is none."""

    async def see_device(self, recipient: str, device: str) -> None:
        """Make ``device`` known: from now on messages wait for its ack too.

        Of a device that is known and was seen within SEEN_EVERY_MS nothing is written.
        """

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """``device`` has everything up to ``version`` (cut to the head; never moves back).

        Makes the device known. Deletes the messages that every known device has acked.
        """

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """Outbox entries older than ``older_than_s`` seconds: committed, their poke unconfirmed.

        At most one entry a recipient, with the newest version; its age is that of the oldest
        commit that no confirmed poke covers, so a steady sender can't keep it young. An entry from
        the future (the clock was set back) counts as old: better a poke too many than silence.

        The age of what is returned starts anew, so of several sweepers one gets each entry, and
        when that one dies the entry comes up again.
        """

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:
        """The pokes are published: drop the outbox entries up to their versions.

        An entry with a newer version stays, and its age starts anew. A poke without a version
        confirms nothing.
        """

    async def purge(self, *, limit: int) -> int:
        """Delete what has had its time; returns how many, ``limit`` at most, 0 when all is done.

        That is expired messages, receipts older than RECEIPT_KEPT_MS, and devices that the limits
        let forget (FORGET_BATCH at most), together with the messages which only these held back.
        """

    async def clear(self, recipient: str) -> int:
        """Delete all messages of ``recipient`` and forget its devices; returns how many messages.

        The head stays, so versions go on and no cursor gets ahead of them.
        """

    async def stats(self) -> MailboxStats:
        """Count what there is. This reads the whole store: for people, not for a loop."""

    async def check(self) -> None:
        """Return when the store answers, and can be written."""

    async def close(self) -> None:
        """Finish what is under way and close. May be called twice."""


def expiry_ms(message: NewMessage, now_ms: int) -> int | None:
    """When ``message``, committed at ``now_ms``, expires (Unix time in ms); ``None``: never."""
    lifetime_ms = ttl_ms(message)
    return None if lifetime_ms is None else now_ms + lifetime_ms


def ttl_ms(message: NewMessage) -> int | None:
    """The TTL of ``message`` in whole milliseconds that every store can hold."""
    return None if message.ttl_s is None else int(min(MAX_VERSION, message.ttl_s * 1000))


def page_of(found: Iterable[Message], *, head: int, limit: int, max_bytes: int) -> Page:
    """The first of what was ``found`` above a cursor, as much as a page takes.

    Takes one more than that from ``found`` at most, so that a lazy one reads no further.
    """
    messages: list[Message] = []
    size_bytes = 0
    for message in found:
        size_bytes += len(message.body)
        if len(messages) == limit or (messages and size_bytes > max_bytes):
            return Page(tuple(messages), messages[-1].version, head, more=True)
        messages.append(message)
    version = messages[-1].version if messages else head
    return Page(tuple(messages), version, head, more=False)

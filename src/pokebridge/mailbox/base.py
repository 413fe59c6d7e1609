"""The mailbox port: a durable log for each recipient, and its guarantees."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeVar

from pokebridge.errors import MailboxError, MailboxFullError, MailboxRefusedError
from pokebridge.model import MAX_VERSION, REVOCATIONS, Ack, Message, NewMessage, Page, Poke, Receipt
from pokebridge.submission import MAX_BODY_BYTES

T = TypeVar("T")

DAY_MS: Final = 24 * 3600 * 1000
RECEIPT_KEPT_MS: Final = 7 * DAY_MS
"""How long a receipt is kept after its append, at least: a week."""
SEEN_EVERY_MS: Final = DAY_MS
"""The shortest time between two writes of a device's last contact."""
PAGE_BYTES: Final = 1024 * 1024
"""The largest total size of a page's bodies, so that 500 large messages are several pages."""
YOUNG_MS: Final = SEEN_EVERY_MS
"""For this long after a generation began acks delete nothing, until all devices are known again."""
GENERATION_VERSIONS: Final = 1 << 32
"""More than a recipient ever gets in a generation."""
HEADS_BATCH: Final = 1000
"""Recipients whose heads one call may ask for."""
ACKS_BATCH: Final = 256
"""The most acks that one call records. Each may delete many messages."""
FORGET_BATCH: Final = 10
"""The most devices that one purge forgets. Each may free a whole mailbox of messages."""
MAX_DEVICES: Final = 100
"""The most known devices of a recipient. With one more, the least recently seen is forgotten."""
MAX_WAITING: Final = 10_000
"""The most calls that wait for a store. Further calls are refused."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of each recipient's mailbox, and how long a device is remembered.

    ``max_messages`` and ``max_bytes`` (of bodies) count stored messages. An expired message counts
    until it is purged. One sender may use ``max_share`` of both, so that none can fill a mailbox
    for all others. One message of any size is always within the share. A device unseen for
    ``forget_device_s`` seconds is forgotten, so that messages do not wait for its acks forever.

    A recipient that begins with one of ``group_prefixes`` is a group: it has many readers, whose
    acks are ignored. Each of its messages expires, after ``group_ttl_s`` seconds if it names no
    time.
    """

    max_messages: int = 10_000
    max_bytes: int = 64 * 1024 * 1024
    forget_device_s: float = 90 * DAY_MS / 1000
    max_share: float = 1.0
    group_prefixes: tuple[str, ...] = ()
    group_ttl_s: float = 7 * DAY_MS / 1000

    @property
    def share_messages(self) -> int:
        """The most messages of one sender."""
        return max(1, int(self.max_messages * self.max_share))

    @property
    def share_bytes(self) -> int:
        """The most bytes of one sender's bodies."""
        return max(min(self.max_bytes, MAX_BODY_BYTES), int(self.max_bytes * self.max_share))

    def of(self, recipient: str) -> "Limits":
        """The limits of one recipient. Revocations have none, because none may be refused."""
        return UNLIMITED if recipient == REVOCATIONS else self

    def is_group(self, recipient: str) -> bool:
        """Whether ``recipient`` is a group."""
        return recipient.startswith(self.group_prefixes) and recipient != REVOCATIONS

    def without_groups(self, acks: Iterable[Ack]) -> Sequence[Ack]:
        """Those of ``acks`` that count."""
        return [ack for ack in acks if not self.is_group(ack.recipient)]

    def ttl_ms(self, message: NewMessage) -> int | None:
        """When ``message`` expires after its commit, in ms that every store can hold.

        ``None``: never.
        """
        ttl_s = message.ttl_s
        if ttl_s is None and self.is_group(message.recipient):
            ttl_s = self.group_ttl_s
        return None if ttl_s is None else int(min(MAX_VERSION, ttl_s * 1000))

    def expiry_ms(self, message: NewMessage, now_ms: int) -> int | None:
        """When ``message``, committed at ``now_ms``, expires (Unix time in ms). ``None``: never."""
        lifetime_ms = self.ttl_ms(message)
        return None if lifetime_ms is None else now_ms + lifetime_ms

    def refuse(self) -> MailboxFullError:
        """The error for a message that exceeds the limits."""
        return MailboxFullError(
            f"the recipient's mailbox is full ({self.max_messages} messages or {self.max_bytes}"
            " bytes): it takes messages again when some are acked or have expired"
        )

    def refuse_share(self) -> MailboxFullError:
        """The error for a message that exceeds its sender's share.

        Where the share is the whole mailbox, it is the error for a full one.
        """
        if self.max_share >= 1:
            return self.refuse()
        return MailboxFullError(
            f"the sender's share of the recipient's mailbox is used up ({self.share_messages}"
            f" messages or {self.share_bytes} bytes): send again when some of them are acked or"
            " have expired"
        )

    def unseen_since_ms(self, now_ms: int) -> int:
        """A device last seen at or before this time is forgotten at ``now_ms`` (Unix time, ms)."""
        return now_ms - int(self.forget_device_s * 1000)


UNLIMITED: Final = Limits(max_messages=MAX_VERSION, max_bytes=MAX_VERSION)
"""The limits of the revocations' mailbox."""


class MailboxStats(NamedTuple):
    """Counts of a mailbox. Times are Unix time in milliseconds, ``None`` when there is nothing.

    - ``recipients``: those that ever had a message
    - ``bytes``: the size of all stored bodies
    - ``outbox``: recipients whose poke is not confirmed
    - ``pushes``: push notifications that are pending
    - ``dead_pushes``: push notifications that were given up
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


class RecipientStats(NamedTuple):
    """One recipient's mailbox.

    - ``head``: the newest version, 0 if there is none
    - ``messages``, ``bytes``: the messages that are kept, and the size of their bodies
    - ``outbox_since_ms``: since when a poke is owed, as Unix time; ``None`` when none is
    - ``devices``: the version up to which each known device has acked
    """

    head: int
    messages: int
    bytes: int
    outbox_since_ms: int | None
    devices: Mapping[str, int]


class Wanted(NamedTuple):
    """What a page is to hold, as :meth:`Mailbox.read` says."""

    recipient: str
    after: int
    limit: int
    max_bytes: int
    unless_head: int | None


class PageReader(Protocol):
    """Reads a store that another process of this host, the hub, has open and guards."""

    async def read(self, wanted: Wanted) -> tuple[Page | None, object]:
        """The page, unless the hub must be asked; and how the store looks."""

    def trust(self, look: object) -> None:
        """The hub has read the store after this ``look``: trust it as long as it looks so."""

    async def close(self) -> None:
        """Stop reading."""


class Inbox(Protocol):
    """The part of a :class:`Mailbox` that the devices of its recipients use."""

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

        The bodies of a page have at most ``max_bytes`` together, except that the first message
        always fits. Messages beyond that are not read from the store. Expired messages are left
        out. A pull without new messages costs one indexed look-up. For a cursor above the head the
        page is empty and has the head as its version. The page is empty as well when the head
        equals ``unless_head``.
        """

    async def see_device(self, recipient: str, device: str) -> None:
        """Make ``device`` known: from now on messages are kept until it has acked them too.

        For a known device that was seen within SEEN_EVERY_MS nothing is written. Of more than
        MAX_DEVICES devices the least recently seen are forgotten, as :meth:`purge` forgets them.
        """

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """Record that ``device`` has everything up to ``version``.

        A version above the head counts as the head; one below an earlier ack changes nothing.
        Makes the device known, as :meth:`see_device` does. Deletes the messages that every known
        device has acked, unless the generation is younger than YOUNG_MS: the store may have
        forgotten a device.
        """


class Mailbox(Inbox, Protocol):
    """A durable log for each recipient.

    Guarantees, tested by ``pokebridge.testing.mailbox.MailboxContract`` against every adapter:

    - **Dense**: a recipient's versions are 1, 2, 3, … in commit order, also under concurrent
      senders in several processes. A reader never sees version n before n - 1 is committed.
    - **Never twice**: no version is assigned twice. When a store that others share has gone back in
      time, a new generation begins, far above every assigned version. If that can't be noticed,
      call ``begin_generation`` (docs/backup.md).
    - **Idempotent**: a message with an idempotency key, its (sender, id), is committed once. An
      append that repeats the key commits nothing and returns the first receipt, marked
      ``duplicate``. This holds for at least a week, also after the message itself is deleted.
    - **Durable**: when ``append`` returns, the message and its outbox entry are committed in one
      transaction and survive the death of the process.
    - **Off the loop**: no call blocks the event loop.
    - **Atomic**: a call that is cancelled or fails was done completely or not at all.
    - **Apart**: a call whose data the store can't take raises
      :class:`~pokebridge.errors.InputError`, and harms no other call.
    - **Bounded**: every call ends in bounded time, and each recipient's mailbox has its
      :class:`Limits`.
    - **Shared by a group**: a message for a group is there for every reader until it expires.
      :meth:`ack`, :meth:`ack_all` and :meth:`see_device` change nothing for a group.

    Every call raises :class:`~pokebridge.errors.MailboxError` when the store is unavailable,
    overloaded or closed.
    """

    is_shared: bool
    """Whether another process that opens the same URL finds the same messages."""

    async def append(self, message: NewMessage) -> Receipt:
        """Commit ``message`` as its recipient's next version, with an outbox entry for its poke.

        Raises :class:`~pokebridge.errors.MailboxFullError` when the message exceeds the
        recipient's limits, or its sender's share of them. Then nothing was committed. The share
        is checked first, so the error of a message that exceeds both is about the share. A
        duplicate is never refused. Revocations have no limits (see :meth:`Limits.of`).
        """

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:
        """The newest version ever given to each of ``recipients``; 0 for one that has none.

        One round trip for up to HEADS_BATCH recipients, one look-up by key for each.
        """

    async def ack_all(self, acks: Sequence[Ack]) -> None:
        """Record all of ``acks`` as :meth:`ack` does, in one transaction or round trip.

        1 to ACKS_BATCH acks, one for each device of a recipient.
        """

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """Claim outbox entries older than ``older_than_s`` seconds, at most ``limit``.

        The outbox has one entry for each recipient with an unconfirmed poke, with the newest
        version. Its age is that of the oldest commit that no confirmed poke covers, so a steady
        sender can't keep it young. An entry from the future (the clock was set back) counts as old:
        an extra poke is better than silence.

        A claim resets an entry's age. So each entry goes to one of several sweepers. When that
        sweeper dies, the entry can be claimed again.
        """

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:
        """Record that ``pokes`` were published: drop the outbox entries up to their versions.

        An entry with a newer version stays, and its age is reset. A poke without a version
        confirms nothing.
        """

    async def purge(self, *, limit: int) -> int:
        """Delete at most ``limit`` expired items. Returns how many; 0 when none is left.

        These are expired messages, receipts older than RECEIPT_KEPT_MS, and devices that were
        unseen for longer than the limits allow (FORGET_BATCH at most). Forgetting a device deletes
        the messages that only waited for its acks.
        """

    async def clear(self, recipient: str) -> int:
        """Delete the messages, devices and outbox entry of ``recipient``. Returns the messages.

        The head stays, so that later versions are above every cursor.
        """

    async def begin_generation(self) -> int:
        """Begin a new generation of versions, as after a restore. Returns its base.

        The next version of each recipient is above the base. The base is above all versions that
        were ever given out, even those that the store has lost (docs/backup.md).
        """

    async def stats(self) -> MailboxStats:
        """Count everything. This reads the whole store, so it is for people, not for a loop."""

    async def inspect(self, recipient: str) -> RecipientStats:
        """What is kept for ``recipient``, and what its devices have acked. Costs three look-ups."""

    async def check(self) -> None:
        """Return when the store answers and can be written."""

    async def close(self) -> None:
        """Finish the calls under way and close. May be called twice."""


def admit(*, waiting: int, closed: bool) -> None:
    """Raise MailboxError when a store can't take another call: closed, or MAX_WAITING wait."""
    if closed:
        raise MailboxError("the mailbox is closed")
    if waiting >= MAX_WAITING:
        raise MailboxError(f"the mailbox is overloaded: {MAX_WAITING} calls are waiting")


async def in_parts(call: Callable[[Sequence[T]], Awaitable[None]], items: Sequence[T]) -> list[T]:
    """Await ``call`` with ``items``, or with fewer at a time while the mailbox refuses them.

    So one item that it refuses, as for a damaged row, harms no other. Returns those that it refuses
    alone. Raises what ``call`` raises otherwise.
    """
    try:
        await call(items)
    except MailboxRefusedError:
        if len(items) == 1:
            return [items[0]]
        middle = len(items) // 2
        refused = await in_parts(call, items[:middle])
        return refused + await in_parts(call, items[middle:])
    return []


def is_utf8(text: str) -> bool:
    """Whether ``text`` can be stored: a lone surrogate has no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def next_base(old: int, now_s: float) -> int:
    """The base of the generation after the one with the base ``old``, at ``now_s`` (Unix time).

    It follows the clock: 2¹¹ versions a millisecond are more than a recipient ever gets. So it is
    above versions of later generations too, which a restored store does not know. It stays below
    MAX_VERSION until the year 2109. If the clock was set back it is above what was given out since
    ``old``, even what is lost.
    """
    by_clock = int(now_s * 1000) << 11
    return by_clock if by_clock > old else old + GENERATION_VERSIONS


def is_young(base: int, now_ms: int) -> bool:
    """Whether the generation with this base began less than YOUNG_MS ago. The first never is."""
    return now_ms - (base >> 11) < YOUNG_MS


def page_of(found: Iterable[Message], *, head: int, limit: int, max_bytes: int) -> Page:
    """A page of the messages ``found`` above a cursor, as many as fit.

    It takes at most one message more from ``found``, so that a lazy iterable reads no further.
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

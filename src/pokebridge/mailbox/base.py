"""The mailbox port: a recipient's durable log, and what it promises."""

from collections.abc import Sequence
from typing import Protocol

from pokebridge.model import MAX_VERSION, Message, NewMessage, Page, Poke, Receipt

RECEIPT_KEPT_MS = 7 * 24 * 3600 * 1000
"""How long a receipt outlives its append at least, in milliseconds: a week."""


class Mailbox(Protocol):
    """A durable log for each recipient.

    Promises, held by ``pokebridge.testing.MailboxContract`` against every adapter:

    - **Dense**: a recipient's versions are 1, 2, 3, … in commit order, also under concurrent
      senders in several processes. A reader never sees version n before n - 1 is committed.
    - **Idempotent**: an append whose ``id_is_senders`` repeats (sender, id) commits nothing and
      returns the first receipt, marked ``duplicate``, also after the message itself is deleted
      (for at least a week).
    - **Durable**: when ``append`` returns, the message and the promise of its poke (the outbox)
      are committed in one transaction and survive the death of the process.
    - **Off the loop**: no call blocks the event loop.
    - **Atomic**: a call that is cancelled or fails has happened in whole or not at all.

    Every call raises :class:`~pokebridge.errors.MailboxError` when the store can't do it now, has
    too much to do, or is closed.
    """

    async def append(self, message: NewMessage) -> Receipt:
        """Commit ``message`` as its recipient's next version, with an outbox entry for its poke."""

    async def read(self, recipient: str, *, after: int, limit: int) -> Page:
        """The messages of ``recipient`` with a version above ``after``: at most ``limit`` (>= 1).

        Expired messages are left out. Nothing to read costs one indexed look-up; a cursor above
        the head reads nothing and is given the head.
        """

    async def head(self, recipient: str) -> int:
        """The newest version ever given to ``recipient``; 0 when there is none."""

    async def see_device(self, recipient: str, device: str) -> None:
        """Make ``device`` known: from now on messages wait for its ack too."""

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """``device`` has everything up to ``version`` (cut to the head; never moves back).

        Makes the device known. Deletes the messages that every known device has acked.
        """

    async def unpoked(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """Outbox entries older than ``older_than_s`` seconds: committed, their poke unconfirmed.

        At most one entry a recipient, with the newest version; its age is that of the oldest
        commit that no confirmed poke covers, so a steady sender can't keep it young. An entry from
        the future (the clock was set back) counts as old: better a poke too many than silence.
        """

    async def poked(self, pokes: Sequence[Poke]) -> None:
        """The pokes are published: drop the outbox entries up to their versions.

        An entry with a newer version stays, and its age starts anew. A poke without a version
        confirms nothing.
        """

    async def purge(self, *, limit: int) -> int:
        """Delete at most ``limit`` expired messages and forgotten receipts; returns how many."""

    async def check(self) -> None:
        """Return when the store answers."""

    async def close(self) -> None:
        """Finish what is under way and close. May be called twice."""


def expiry_ms(message: NewMessage, now_ms: int) -> int | None:
    """When ``message``, committed at ``now_ms``, expires (Unix time in ms); ``None``: never."""
    if message.ttl_s is None:
        return None
    return now_ms + int(min(MAX_VERSION, message.ttl_s * 1000))


def page_of(found: Sequence[Message], *, head: int, limit: int) -> Page:
    """The page for what was ``found`` above a cursor, looking for one more than ``limit``."""
    messages = tuple(found[:limit])
    version = messages[-1].version if messages else head
    return Page(messages, version, head, more=len(found) > limit)

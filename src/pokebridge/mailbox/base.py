"""The mailbox port: a recipient's durable log, and what it promises."""

from collections.abc import Sequence
from typing import Protocol

from pokebridge.model import NewMessage, Page, Poke, Receipt


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

    Every call raises :class:`~pokebridge.errors.MailboxError` when the store can't do it now.
    """

    async def append(self, message: NewMessage) -> Receipt:
        """Commit ``message`` as its recipient's next version, with an outbox entry for its poke."""

    async def read(self, recipient: str, *, after: int, limit: int) -> Page:
        """The messages of ``recipient`` with a version above ``after``: at most ``limit``.

        Expired messages are left out. Nothing to read costs one indexed look-up.
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

        At most one entry a recipient, with the newest version.
        """

    async def poked(self, pokes: Sequence[Poke]) -> None:
        """The pokes are published: drop the outbox entries up to their versions."""

    async def purge(self, *, limit: int) -> int:
        """Delete at most ``limit`` expired messages and forgotten receipts; returns how many."""

    async def check(self) -> None:
        """Return when the store answers."""

    async def close(self) -> None:
        """Finish what is under way and close. May be called twice."""

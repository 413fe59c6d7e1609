"""The port for pushes: which recipients are owed a notification, since none of them pulled.

It is an optional capability of a mailbox, since what is owed is committed with the message.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, runtime_checkable

from pokebridge.mailbox.base import DAY_MS
from pokebridge.model import NewMessage

DEAD_KEPT_MS: Final = 30 * DAY_MS
"""How long it stays on record that a push was given up."""


@dataclass(frozen=True, slots=True)
class PushTiming:
    """When a push is due: ``grace_s`` after a commit, and ``quiet_s`` after the push before."""

    grace_s: float = 10.0
    quiet_s: float = 300.0

    @property
    def grace_ms(self) -> int:
        """The grace in whole milliseconds."""
        return int(self.grace_s * 1000)

    @property
    def quiet_ms(self) -> int:
        """The quiet period in whole milliseconds."""
        return int(self.quiet_s * 1000)

    @property
    def next_ms(self) -> int:
        """From a push to the next one of the same recipient at least."""
        return max(self.grace_ms, self.quiet_ms)

    def concerns(self, message: NewMessage) -> bool:
        """Whether ``message`` is one to be notified of: not when it is gone before the push is."""
        lasts = message.ttl_s is None or message.ttl_s > self.grace_s
        return lasts and not message.is_ephemeral


class OwedPush(NamedTuple):
    """A notification that ``recipient`` is owed, of the versions ``first`` to ``version``.

    ``since_ms`` (Unix time) is when it began to be owed; ``attempts`` counts the claims so far.
    """

    recipient: str
    first: int
    version: int
    since_ms: int
    attempts: int

    @property
    def id(self) -> str:
        """The notification's name: the same at every attempt, whoever makes it, and no other's."""
        name = f"{self.since_ms} {self.first} {self.recipient}"
        return f"push_{hashlib.sha256(name.encode()).hexdigest()[:32]}"


class PushQueue(Protocol):
    """What a mailbox owes to recipients that do not pull.

    Promises, held by ``pokebridge.testing.PushContract`` against every adapter:

    - **Durable**: a message and the push that it may come to are committed in one transaction.
    - **One a recipient**: several messages owe one push, due a grace after the first; the next one
      is not due before the quiet period is over.
    - **Cancelled by a pull**, of any device; a newer message, committed meanwhile, stays owed, and
      its grace begins anew.
    - **One winner**: of several claims one gets each push, and when its process dies, the push
      comes up again after its lease.

    Every call raises :class:`~pokebridge.errors.MailboxError` when the store can't do it now.
    """

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[OwedPush]:
        """Pushes that are due, at most ``limit``; nobody else gets them for ``lease_s`` seconds."""

    async def pulled(self, versions: Mapping[str, int]) -> None:
        """These recipients have what there is up to these versions, so no push is owed for it."""

    async def sent(self, push: OwedPush) -> None:
        """``push`` has arrived: the quiet period begins. A newer message is owed after it."""

    async def failed(self, push: OwedPush, *, retry_s: float) -> None:
        """``push`` did not arrive, and is due again in ``retry_s`` seconds, unless cancelled."""

    async def bury(self, push: OwedPush, reason: str) -> None:
        """``push`` is given up and put on record, for DEAD_KEPT_MS; else as if it was sent."""

    async def purge(self, *, limit: int) -> int:
        """Delete records that have had their time, ``limit`` at most; how many."""


@runtime_checkable
class OwesPushes(Protocol):
    """A mailbox that can owe pushes; ``pushes`` is ``None`` when it was not asked to."""

    pushes: PushQueue | None


def pushes_of(mailbox: object) -> PushQueue | None:
    """What ``mailbox`` owes, if it can and shall."""
    return mailbox.pushes if isinstance(mailbox, OwesPushes) else None

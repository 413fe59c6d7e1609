"""The port for pushes: notifications for recipients that did not pull their messages.

It is an optional capability of a mailbox, since a push is committed together with its message.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, runtime_checkable

from pokebridge.mailbox.base import DAY_MS, Limits
from pokebridge.model import NewMessage

DEAD_KEPT_MS: Final = 30 * DAY_MS
"""How long the record of an abandoned push is kept."""


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
        """The shortest time between two pushes of a recipient, in milliseconds."""
        return max(self.grace_ms, self.quiet_ms)

    def concerns(self, message: NewMessage, limits: Limits) -> bool:
        """Whether ``message`` leads to a push: not if it may be gone before the push is due.

        Nor if it is for a group: any reader's pull would cancel the push for all of them.
        """
        lasts = message.ttl_s is None or message.ttl_s > self.grace_s
        return lasts and not message.is_ephemeral and not limits.is_group(message.recipient)


class OwedPush(NamedTuple):
    """A pending notification for ``recipient``, about the versions ``first`` to ``version``.

    ``since_ms`` is the Unix time from which it is pending. ``attempts`` counts its claims.
    """

    recipient: str
    first: int
    version: int
    since_ms: int
    attempts: int

    @property
    def id(self) -> str:
        """The notification's unique id: the same at every attempt, in every process."""
        name = f"{self.since_ms} {self.first} {self.recipient}"
        return f"push_{hashlib.sha256(name.encode()).hexdigest()[:32]}"


class PushQueue(Protocol):
    """The pending pushes of a mailbox.

    Guarantees, tested by ``pokebridge.testing.mailbox_pushes.PushContract`` against every adapter:

    - **Durable**: a message and its possible push are committed in one transaction.
    - **One a recipient**: several messages lead to one push, due a grace after the first message.
      The next push is not due before the quiet period has ended.
    - **Cancelled by a pull**, from any device. A newer message, committed meanwhile, stays
      pending, and its grace starts with that pull.
    - **One winner**: concurrent claims never return the same push. When the claiming process dies,
      the push can be claimed again after its lease.

    Every call raises :class:`~pokebridge.errors.MailboxError` when the store is unavailable.
    """

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[OwedPush]:
        """Claim at most ``limit`` due pushes: no other claim gets them for ``lease_s`` seconds."""

    async def pulled(self, versions: Mapping[str, int]) -> None:
        """Record what recipients have pulled, by version. Cancels pushes up to these versions."""

    async def sent(self, push: OwedPush) -> None:
        """Record that ``push`` has arrived, and start the quiet period.

        A newer message leads to another push after it.
        """

    async def failed(self, push: OwedPush, *, retry_s: float) -> None:
        """Record that ``push`` did not arrive: unless cancelled, it is due in ``retry_s`` seconds.

        It keeps its id.
        """

    async def bury(self, push: OwedPush, reason: str) -> None:
        """Give ``push`` up: record it with ``reason`` for DEAD_KEPT_MS, then treat it as sent."""

    async def purge(self, *, limit: int) -> int:
        """Delete at most ``limit`` expired records. Returns how many."""


@runtime_checkable
class OwesPushes(Protocol):
    """A mailbox that supports pushes. ``pushes`` is ``None`` when they are disabled."""

    pushes: PushQueue | None


def pushes_of(mailbox: object) -> PushQueue | None:
    """The push queue of ``mailbox``. ``None``: it supports none, or pushes are disabled."""
    return mailbox.pushes if isinstance(mailbox, OwesPushes) else None

"""The pending pushes of a mailbox in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from pokebridge.mailbox.pushes import DEAD_KEPT_MS, OwedPush, PushTiming


@dataclass(slots=True)
class _Row:
    """A recipient's push. ``due_ms`` is ``None`` while none is pending.

    The other fields are those of :class:`OwedPush`; ``quiet_until_ms`` ends the quiet period.
    """

    first: int = 0
    version: int = 0
    since_ms: int = 0
    due_ms: int | None = None
    attempts: int = 0
    quiet_until_ms: int = 0

    def begin(self, first: int, now_ms: int, due_ms: int) -> None:
        """Start a push for the versions from ``first`` on."""
        self.first, self.since_ms, self.due_ms, self.attempts = first, now_ms, due_ms, 0


class MemoryPushes:
    """The queue. ``now_ms`` raises when the mailbox is closed. No call suspends."""

    def __init__(self, timing: PushTiming, now_ms: Callable[[], int]) -> None:
        self.timing = timing
        self._now_ms = now_ms
        self._rows: dict[str, _Row] = {}
        self._dead: dict[tuple[str, int], int] = {}  # time of giving up, by recipient and first

    def owe(self, recipient: str, version: int) -> None:
        """Make a push pending for a committed message."""
        now_ms = self._now_ms()
        row = self._rows.setdefault(recipient, _Row())
        row.version = version
        if row.due_ms is None:
            row.begin(version, now_ms, max(now_ms + self.timing.grace_ms, row.quiet_until_ms))

    def forget(self, recipient: str) -> None:
        """Drop the push of a recipient whose mailbox was cleared."""
        self._rows.pop(recipient, None)

    def counts(self) -> tuple[int, int]:
        """The number of pending pushes, and of those that were given up."""
        return sum(row.due_ms is not None for row in self._rows.values()), len(self._dead)

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[OwedPush]:
        """See the port."""
        now_ms = self._now_ms()
        due = (
            (recipient, row)
            for recipient, row in self._rows.items()
            if row.due_ms is not None and row.due_ms <= now_ms
        )
        claimed = []
        for recipient, row in islice(due, limit):
            row.due_ms = now_ms + int(lease_s * 1000)
            row.attempts += 1
            claimed.append(OwedPush(recipient, row.first, row.version, row.since_ms, row.attempts))
        return claimed

    async def pulled(self, versions: Mapping[str, int]) -> None:
        """See the port."""
        now_ms = self._now_ms()
        for recipient, version in versions.items():
            row = self._rows.get(recipient)
            if row is None or row.due_ms is None or row.first > version:
                continue
            if row.version > version:
                due_ms = max(now_ms + self.timing.grace_ms, row.quiet_until_ms)
                row.begin(version + 1, now_ms, due_ms)
            else:
                row.due_ms = None

    async def sent(self, push: OwedPush) -> None:
        """See the port."""
        now_ms = self._now_ms()
        row = self._rows.setdefault(push.recipient, _Row())
        row.quiet_until_ms = now_ms + self.timing.quiet_ms
        if row.due_ms is None or row.version <= push.version:
            row.due_ms = None
        elif row.first <= push.version:
            row.begin(push.version + 1, now_ms, now_ms + self.timing.next_ms)
        else:
            row.due_ms = max(row.due_ms, row.quiet_until_ms)

    async def failed(self, push: OwedPush, *, retry_s: float) -> None:
        """See the port."""
        now_ms = self._now_ms()
        row = self._rows.get(push.recipient)
        if row is not None and row.due_ms is not None and row.first == push.first:
            row.due_ms = now_ms + int(retry_s * 1000)

    async def bury(self, push: OwedPush, reason: str) -> None:  # noqa: ARG002 - only logged
        """See the port."""
        self._dead[push.recipient, push.first] = self._now_ms()
        await self.sent(push)

    async def purge(self, *, limit: int) -> int:
        """See the port."""
        now_ms = self._now_ms()
        over = (
            recipient
            for recipient, row in self._rows.items()
            if row.due_ms is None and row.quiet_until_ms <= now_ms
        )
        recipients = list(islice(over, limit))
        for recipient in recipients:
            del self._rows[recipient]
        old = (key for key, at_ms in self._dead.items() if at_ms <= now_ms - DEAD_KEPT_MS)
        keys = list(islice(old, limit - len(recipients)))
        for key in keys:
            del self._dead[key]
        return len(recipients) + len(keys)

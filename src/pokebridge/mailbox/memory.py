"""The mailbox in this process's memory, for development and tests. It ends with the process."""

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from operator import attrgetter

import msgspec

from pokebridge.errors import MailboxError
from pokebridge.mailbox.base import (
    FORGET_BATCH,
    MAX_DEVICES,
    PAGE_BYTES,
    RECEIPT_KEPT_MS,
    SEEN_EVERY_MS,
    Limits,
    MailboxStats,
    RecipientStats,
    is_young,
    next_base,
    page_of,
)
from pokebridge.mailbox.memory_pushes import MemoryPushes
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.model import Ack, Message, NewMessage, Page, Poke, Receipt


class _Kept(msgspec.Struct, frozen=True, gc=False):
    message: Message
    expires_ms: int | None


@dataclass(slots=True)
class _Log:
    """One recipient's messages, ``kept`` in version order, and its devices' acks, ``acked``.

    ``shares`` has the number of messages of each sender, and the bytes of their bodies.
    """

    head: int = 0
    kept: list[_Kept] = field(default_factory=list)
    kept_bytes: int = 0
    acked: dict[str, int] = field(default_factory=dict)
    shares: dict[str, tuple[int, int]] = field(default_factory=dict)

    def index_after(self, version: int) -> int:
        """The index in ``kept`` of the first version above ``version``."""
        return bisect_right(self.kept, version, key=attrgetter("message.version"))

    def check_room(self, message: NewMessage, limits: Limits) -> None:
        """Raise MailboxFullError unless ``message`` fits."""
        size_bytes = len(message.body)
        messages, share_bytes = self.shares.get(message.sender, (0, 0))
        fits = share_bytes + size_bytes <= limits.share_bytes
        if not fits or messages >= limits.share_messages:
            raise limits.refuse_share()
        fits = self.kept_bytes + size_bytes <= limits.max_bytes
        if not fits or len(self.kept) >= limits.max_messages:
            raise limits.refuse()

    def keep(self, kept: _Kept) -> None:
        """Add a message."""
        self.kept.append(kept)
        self._count(kept.message, 1)

    def _count(self, message: Message, sign: int) -> None:
        messages, share_bytes = self.shares.pop(message.sender, (0, 0))
        size_bytes = sign * len(message.body)
        self.kept_bytes += size_bytes
        if messages + sign:
            self.shares[message.sender] = (messages + sign, share_bytes + size_bytes)

    def delete(self, start: int, end: int) -> int:
        """Delete the messages from index ``start`` up to ``end``. Returns how many."""
        for kept in self.kept[start:end]:
            self._count(kept.message, -1)
        before = len(self.kept)
        del self.kept[start:end]
        return before - len(self.kept)

    def delete_acked(self) -> None:
        """Delete the messages that every known device has acked."""
        if self.acked and self.kept:
            floor = min(self.acked.values())
            if self.kept[0].message.version <= floor:
                self.delete(0, self.index_after(floor))


class MemoryMailbox:
    """Gives every guarantee of the port except durability: nothing survives the process.

    No call suspends, so each is atomic. ``clock`` gives Unix time in seconds. With a
    ``push_timing`` appends lead to pushes.

    - ``_logs``: messages and acks by recipient
    - ``_base``: versions of the current generation are above it
    - ``_receipts``: version and time by (sender, id), oldest first
    - ``_outbox``: newest version and age's start by recipient
    - ``_expiries``: a heap of (expires_ms, recipient, version)
    - ``_seen_ms``: last contact by (recipient, device), oldest first
    - ``pushes``: the pending pushes, or ``None``
    """

    is_shared = False

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
        push_timing: PushTiming | None = None,
    ) -> None:
        self._clock = clock
        self._limits = limits or Limits()
        self._logs: defaultdict[str, _Log] = defaultdict(_Log)
        self._base = 0
        self._receipts: dict[tuple[str, str], tuple[int, int]] = {}
        self._outbox: dict[str, tuple[int, int]] = {}
        self._expiries: list[tuple[int, str, int]] = []
        self._seen_ms: dict[tuple[str, str], int] = {}
        self.pushes = None if push_timing is None else MemoryPushes(push_timing, self._now_ms)
        self._closed = False

    async def append(self, message: NewMessage) -> Receipt:
        """See the port."""
        now_ms = self._now_ms()
        key = (message.sender, message.id)
        if message.has_idempotency_key and (first := self._receipts.get(key)):
            return Receipt(message.id, first[0], duplicate=True)
        log = self._logs[message.recipient]
        log.check_room(message, self._limits.of(message.recipient))
        log.head = max(log.head, self._base) + 1
        expires_ms = self._limits.expiry_ms(message, now_ms)
        log.keep(
            _Kept(Message(log.head, message.id, message.sender, message.body, now_ms), expires_ms)
        )
        if expires_ms is not None:
            heappush(self._expiries, (expires_ms, message.recipient, log.head))
        if message.has_idempotency_key:
            self._receipts[key] = (log.head, now_ms)
        _, since_ms = self._outbox.get(message.recipient, (0, now_ms))
        self._outbox[message.recipient] = (log.head, since_ms)
        if self.pushes is not None and self.pushes.timing.concerns(message, self._limits):
            self.pushes.owe(message.recipient, log.head)
        return Receipt(message.id, log.head)

    async def read(
        self,
        recipient: str,
        *,
        after: int,
        limit: int,
        max_bytes: int = PAGE_BYTES,
        unless_head: int | None = None,
    ) -> Page:
        """See the port."""
        self._check_open()
        log = self._logs.get(recipient)
        head = 0 if log is None else log.head
        if log is None or after >= head or head == unless_head:  # as most pulls
            return Page((), head, head, more=False)
        now_ms = self._now_ms()
        fresh = (
            kept.message
            for kept in islice(log.kept, log.index_after(after), None)
            if kept.expires_ms is None or kept.expires_ms > now_ms
        )
        return page_of(fresh, head=head, limit=limit, max_bytes=max_bytes)

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:
        """See the port."""
        self._check_open()
        logs = self._logs
        return {each: logs[each].head if each in logs else 0 for each in recipients}

    async def see_device(self, recipient: str, device: str) -> None:
        """See the port."""
        now_ms = self._now_ms()
        if not self._limits.is_group(recipient):
            self._see(recipient, device, now_ms)

    def _see(self, recipient: str, device: str, now_ms: int) -> None:
        acked = self._logs[recipient].acked
        acked.setdefault(device, 0)
        seen_ms = self._seen_ms.get((recipient, device))
        if seen_ms is None or seen_ms <= now_ms - SEEN_EVERY_MS:
            self._seen_ms.pop((recipient, device), None)
            self._seen_ms[recipient, device] = now_ms
        if len(acked) > MAX_DEVICES:
            others = [other for other in acked if other != device]
            self._forget(recipient, min(others, key=lambda other: self._seen_ms[recipient, other]))

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """See the port."""
        await self.ack_all([Ack(recipient, device, version)])

    async def ack_all(self, acks: Sequence[Ack]) -> None:
        """See the port."""
        now_ms = self._now_ms()
        for recipient, device, version in self._limits.without_groups(acks):
            self._see(recipient, device, now_ms)
            log = self._logs[recipient]
            log.acked[device] = max(log.acked[device], min(version, log.head))
            self._delete_acked(log)

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """See the port."""
        now_ms = self._now_ms()
        latest_ms = now_ms - int(older_than_s * 1000)
        old = (
            Poke(recipient, version)
            for recipient, (version, since_ms) in self._outbox.items()
            if since_ms <= latest_ms or since_ms > now_ms
        )
        claimed = list(islice(old, limit))
        for poke in claimed:
            self._outbox[poke.recipient] = (poke.version or 0, now_ms)
        return claimed

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:
        """See the port."""
        now_ms = self._now_ms()
        for poke in pokes:
            if poke.version is None or poke.recipient not in self._outbox:
                continue
            newest, _ = self._outbox[poke.recipient]
            if newest <= poke.version:
                del self._outbox[poke.recipient]
            else:
                self._outbox[poke.recipient] = (newest, now_ms)

    async def purge(self, *, limit: int) -> int:
        """See the port."""
        now_ms = self._now_ms()
        purged = 0
        while purged < limit and self._expiries and self._expiries[0][0] <= now_ms:
            _, recipient, version = heappop(self._expiries)
            purged += self._delete(recipient, version)
        receipts = ((key, at_ms) for key, (_, at_ms) in self._receipts.items())
        forgotten = _not_after(now_ms - RECEIPT_KEPT_MS, receipts, limit - purged)
        for key in forgotten:
            del self._receipts[key]
        purged += len(forgotten)
        unseen_since_ms = self._limits.unseen_since_ms(now_ms)
        at_most = min(limit - purged, FORGET_BATCH)
        unseen = _not_after(unseen_since_ms, self._seen_ms.items(), at_most)
        for recipient, device in unseen:
            self._forget(recipient, device)
        return purged + len(unseen)

    async def clear(self, recipient: str) -> int:
        """See the port."""
        self._check_open()
        log = self._logs.get(recipient) or _Log()
        for device in log.acked:
            del self._seen_ms[recipient, device]
        log.acked.clear()
        self._outbox.pop(recipient, None)
        if self.pushes is not None:
            self.pushes.forget(recipient)
        return log.delete(0, len(log.kept))

    async def begin_generation(self) -> int:
        """See the port."""
        self._check_open()
        self._base = next_base(self._base, self._clock())
        return self._base

    async def stats(self) -> MailboxStats:
        """See the port."""
        self._check_open()
        logs = self._logs.values()
        pushes, dead_pushes = (0, 0) if self.pushes is None else self.pushes.counts()
        sent_at_ms = (kept.message.sent_at_ms for log in logs for kept in log.kept)
        return MailboxStats(
            recipients=sum(log.head > 0 for log in logs),
            messages=sum(len(log.kept) for log in logs),
            bytes=sum(log.kept_bytes for log in logs),
            devices=len(self._seen_ms),
            outbox=len(self._outbox),
            oldest_message_ms=min(sent_at_ms, default=None),
            oldest_outbox_ms=min((since for _, since in self._outbox.values()), default=None),
            pushes=pushes,
            dead_pushes=dead_pushes,
        )

    async def inspect(self, recipient: str) -> RecipientStats:
        """See the port."""
        self._check_open()
        log = self._logs.get(recipient) or _Log()
        _, since_ms = self._outbox.get(recipient, (0, None))
        return RecipientStats(log.head, len(log.kept), log.kept_bytes, since_ms, dict(log.acked))

    async def check(self) -> None:
        """See the port."""
        self._check_open()

    async def close(self) -> None:
        """Refuse every later call."""
        self._closed = True

    def _forget(self, recipient: str, device: str) -> None:
        del self._seen_ms[recipient, device]
        del self._logs[recipient].acked[device]
        self._delete_acked(self._logs[recipient])

    def _delete_acked(self, log: _Log) -> None:
        if not is_young(self._base, self._now_ms()):
            log.delete_acked()

    def _delete(self, recipient: str, version: int) -> bool:
        """Delete one message. Returns whether it was still there: an ack may have deleted it."""
        log = self._logs[recipient]
        index = log.index_after(version - 1)
        if index == len(log.kept) or log.kept[index].message.version != version:
            return False
        return log.delete(index, index + 1) == 1

    def _now_ms(self) -> int:
        self._check_open()
        return int(self._clock() * 1000)

    def _check_open(self) -> None:
        if self._closed:
            raise MailboxError("the mailbox is closed")


def _not_after(
    latest_ms: int, items: Iterable[tuple[tuple[str, str], int]], limit: int
) -> list[tuple[str, str]]:
    """The keys of those of the first ``limit`` items whose time is at most ``latest_ms``."""
    return [key for key, at_ms in islice(items, limit) if at_ms <= latest_ms]

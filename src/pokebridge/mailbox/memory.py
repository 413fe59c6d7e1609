"""The mailbox in this process's memory: for development and tests. It dies with the process."""

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from pokebridge.errors import MailboxError
from pokebridge.mailbox.base import RECEIPT_KEPT_MS, expiry_ms, page_of
from pokebridge.model import Message, NewMessage, Page, Poke, Receipt


class _Kept(NamedTuple):
    message: Message
    expires_ms: int | None


@dataclass(slots=True)
class _Log:
    """What one recipient has: ``kept`` is in version order, ``acked`` is by device."""

    head: int = 0
    kept: list[_Kept] = field(default_factory=list)
    acked: dict[str, int] = field(default_factory=dict)

    def index_after(self, version: int) -> int:
        """Where in ``kept`` the versions above ``version`` begin."""
        return bisect_right(self.kept, version, key=attrgetter("message.version"))


class MemoryMailbox:
    """Keeps every promise of the port but one: nothing survives the process.

    No call suspends, so each is atomic by nature. ``clock`` gives Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._logs: dict[str, _Log] = {}
        # By (sender, id): version and time, oldest first.
        self._receipts: dict[tuple[str, str], tuple[int, int]] = {}
        self._outbox: dict[str, tuple[int, int]] = {}  # by recipient: version, unconfirmed since
        self._expiries: list[
            tuple[int, str, int]
        ] = []  # a heap of (expires_ms, recipient, version)
        self._closed = False

    async def append(self, message: NewMessage) -> Receipt:
        """See the port."""
        now_ms = self._now_ms()
        key = (message.sender, message.id)
        if message.id_is_senders and (first := self._receipts.get(key)):
            return Receipt(message.id, first[0], duplicate=True)
        log = self._logs.setdefault(message.recipient, _Log())
        log.head += 1
        expires_ms = expiry_ms(message, now_ms)
        log.kept.append(
            _Kept(Message(log.head, message.id, message.sender, message.body, now_ms), expires_ms)
        )
        if expires_ms is not None:
            heappush(self._expiries, (expires_ms, message.recipient, log.head))
        if message.id_is_senders:
            self._receipts[key] = (log.head, now_ms)
        _, since_ms = self._outbox.get(message.recipient, (0, now_ms))
        self._outbox[message.recipient] = (log.head, since_ms)
        return Receipt(message.id, log.head)

    async def read(self, recipient: str, *, after: int, limit: int) -> Page:
        """See the port."""
        now_ms = self._now_ms()
        log = self._logs.get(recipient) or _Log()
        fresh = (
            kept.message
            for kept in islice(log.kept, log.index_after(after), None)
            if kept.expires_ms is None or kept.expires_ms > now_ms
        )
        return page_of(list(islice(fresh, limit + 1)), head=log.head, limit=limit)

    async def head(self, recipient: str) -> int:
        """See the port."""
        self._check_open()
        log = self._logs.get(recipient)
        return log.head if log else 0

    async def see_device(self, recipient: str, device: str) -> None:
        """See the port."""
        self._check_open()
        self._logs.setdefault(recipient, _Log()).acked.setdefault(device, 0)

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """See the port."""
        self._check_open()
        log = self._logs.setdefault(recipient, _Log())
        log.acked[device] = max(log.acked.get(device, 0), min(version, log.head))
        del log.kept[: log.index_after(min(log.acked.values()))]

    async def unpoked(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """See the port."""
        now_ms = self._now_ms()
        latest_ms = now_ms - int(older_than_s * 1000)
        old = (
            Poke(recipient, version)
            for recipient, (version, since_ms) in self._outbox.items()
            if since_ms <= latest_ms or since_ms > now_ms
        )
        return list(islice(old, limit))

    async def poked(self, pokes: Sequence[Poke]) -> None:
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
        forgotten = [
            key
            for key, (_, at_ms) in islice(self._receipts.items(), limit - purged)
            if at_ms <= now_ms - RECEIPT_KEPT_MS
        ]
        for key in forgotten:
            del self._receipts[key]
        return purged + len(forgotten)

    async def check(self) -> None:
        """See the port."""
        self._check_open()

    async def close(self) -> None:
        """Refuse every later call."""
        self._closed = True

    def _delete(self, recipient: str, version: int) -> bool:
        """Delete one message; whether it was still there (an ack may have been first)."""
        log = self._logs[recipient]
        index = log.index_after(version - 1)
        if index == len(log.kept) or log.kept[index].message.version != version:
            return False
        del log.kept[index]
        return True

    def _now_ms(self) -> int:
        self._check_open()
        return int(self._clock() * 1000)

    def _check_open(self) -> None:
        if self._closed:
            raise MailboxError("the in-process mailbox is closed")

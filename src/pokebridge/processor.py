"""Commits messages to the mailbox and sees to it that each is followed by a poke.

A send returns when the mailbox has committed; its poke is on the way by then, and nobody waits for
the transport. The mailbox's outbox makes the poke certain: what was committed and not confirmed,
because the transport was down, this process died or its queue was full, is found by a sweep, here
or in any other process that shares the mailbox.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Final, Protocol, Self

import structlog

from pokebridge.attempts import Attempts, Part
from pokebridge.backoff import spread
from pokebridge.errors import MailboxFullError
from pokebridge.mailbox.base import Mailbox
from pokebridge.model import NewMessage, Poke, Receipt, check_recipient

# Pokes in one publish, one confirmation and one step of a sweep.
BATCH: Final = 1_000
PURGE_BATCH: Final = 1_000
# Recipients whose poke waits in memory; what does not fit is left to the outbox and its sweep.
MAX_PENDING: Final = 10_000
# The pause between confirmations, so that a busy recipient costs few transactions. Far below the
# age at which a sweep takes an entry for forgotten.
CONFIRM_EVERY_S: Final = 0.05
# Longer than the pause after which what is owed is claimed again.
CUT_OFF_S: Final = 5.0

_log = structlog.get_logger("pokebridge.processor")


class Pokes(Protocol):
    """Who publishes pokes."""

    async def publish(self, pokes: Sequence[Poke]) -> None:
        """Return when the transport has accepted ``pokes``.

        Raises :class:`~pokebridge.errors.TransportError` when it has not; some may have gone out.
        """


@dataclass(slots=True)
class ProcessorStats:
    """Counters since the start. A poke that a sweep published is in ``pokes_published`` too."""

    messages_committed: int = 0
    duplicates: int = 0
    messages_refused: int = 0
    pokes_published: int = 0
    poke_failures: int = 0
    swept: int = 0


class Processor:
    """Sends messages; use it as an async context manager, or call ``start`` and ``close``.

    A sweep, every ``sweep_every_s`` seconds, claims outbox entries older than ``sweep_after_s``:
    well above what a publish takes, or pokes are doubled. So what a dead process left is poked
    within ``sweep_after_s + 1.5 * sweep_every_s``, by default 1.6 s. A purge runs every
    ``purge_every_s``. Both pauses are jittered by half, so that processes which share a mailbox
    drift apart. Unless it ``does_upkeep`` neither runs here: others that share the mailbox do it.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        publisher: Pokes,
        *,
        does_upkeep: bool = True,
        sweep_every_s: float = 0.4,
        sweep_after_s: float = 1.0,
        purge_every_s: float = 20.0,
    ) -> None:
        self.stats = ProcessorStats()
        self._mailbox = mailbox
        self._publisher = publisher
        self._does_upkeep = does_upkeep
        self._sweep_every_s = sweep_every_s
        self._sweep_after_s = sweep_after_s
        self._purge_every_s = purge_every_s
        self._unpublished = _Newest()
        self._unconfirmed = _Newest()
        self._transport = Part("transport")
        self._store = Part("mailbox")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_cut_off(self) -> bool:
        """Whether the transport has refused the last pokes, just now.

        For a while only: another processor may have published them, and nothing is owed any more.
        """
        return self._transport.failed_within(CUT_OFF_S)

    async def send(self, message: NewMessage) -> Receipt:
        """Commit ``message``; its poke follows by itself. A duplicate is not poked again.

        Raises:
            InputError: the recipient is none.
            MailboxFullError: the recipient's mailbox has no room for it.
            MailboxError: the mailbox can't commit it now.
        """
        check_recipient(message.recipient)
        try:
            receipt = await self._mailbox.append(message)
        except MailboxFullError:
            self.stats.messages_refused += 1
            raise
        if receipt.duplicate:
            self.stats.duplicates += 1
        else:
            self.stats.messages_committed += 1
            self._unpublished.add([Poke(message.recipient, receipt.version)])
        return receipt

    async def start(self) -> None:
        """Start publishing, and sweep at once what an earlier process left behind."""
        loops = {"publish": self._keep_publishing(), "confirm": self._keep_confirming()}
        if self._does_upkeep:
            loops |= {"sweep": self._keep_sweeping(), "purge": self._keep_purging()}
        self._tasks = [
            asyncio.create_task(loop, name=f"processor-{name}") for name, loop in loops.items()
        ]

    async def close(self, *, deadline_s: float = 5.0) -> None:
        """Publish and confirm what is pending, for at most ``deadline_s`` seconds, and stop.

        What is not done by then stays in the outbox, for the next sweep by anybody. May be called
        twice.
        """
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        publishing, confirming, *sweeps = tasks
        for task in sweeps:
            task.cancel()
        try:
            async with asyncio.timeout(deadline_s):
                self._unpublished.close()
                await publishing
                self._unconfirmed.close()
                await confirming
        except TimeoutError:
            _log.warning("pokes_left_in_the_outbox", deadline_s=deadline_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _keep_publishing(self) -> None:
        """Publish what was sent. A batch that fails is not tried again here: a sweep finds it."""
        attempt = Attempts()
        while batch := await self._unpublished.take(BATCH):
            if await attempt(self._publish(batch)):
                self._unconfirmed.add(batch)

    async def _keep_confirming(self) -> None:
        attempt = Attempts()
        while batch := await self._unconfirmed.take(BATCH):
            if await attempt(self._confirm(batch)) and len(batch) < BATCH:
                await asyncio.sleep(CONFIRM_EVERY_S)

    async def _keep_sweeping(self) -> None:
        attempt = Attempts()
        while True:
            if await attempt(self._sweep()):
                await asyncio.sleep(spread(self._sweep_every_s))

    async def _keep_purging(self) -> None:
        attempt = Attempts()
        while True:
            if await attempt(self._purge()):
                await asyncio.sleep(spread(self._purge_every_s))

    async def _publish(self, pokes: Sequence[Poke]) -> None:
        try:
            with self._transport.watched():
                await self._publisher.publish(pokes)
        except Exception:
            self.stats.poke_failures += len(pokes)
            raise
        self.stats.pokes_published += len(pokes)

    async def _confirm(self, pokes: Sequence[Poke]) -> None:
        with self._store.watched():
            await self._mailbox.confirm_outbox(pokes)

    async def _sweep(self) -> None:
        """Publish and confirm the old entries of the outbox, batch by batch, until none is left."""
        yield_s = 2 * self._sweep_every_s  # no pause between sweeps is longer
        more = True
        while more:
            with self._store.watched():
                pokes = await self._mailbox.claim_outbox(
                    older_than_s=self._sweep_after_s + (yield_s if self._transport.is_down else 0),
                    limit=BATCH,
                )
            if pokes:
                await self._publish(pokes)
                self.stats.swept += len(pokes)
                await self._confirm(pokes)
            more = len(pokes) == BATCH

    async def _purge(self) -> None:
        """Delete, step by step, what has had its time, until nothing is left."""
        purged = 1
        while purged:
            with self._store.watched():
                purged = await self._mailbox.purge(limit=PURGE_BATCH)


class _Newest:
    """Pokes that wait for one consumer: at most one a recipient, the newest, and a bounded lot."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def add(self, pokes: Sequence[Poke]) -> None:
        """Merge ``pokes`` in; those for which there is no room are left out."""
        for poke in pokes:
            waiting = self._versions.get(poke.recipient)
            if waiting is not None or len(self._versions) < MAX_PENDING:
                self._versions[poke.recipient] = max(poke.version or 0, waiting or 0)
        self._changed.set()

    async def take(self, limit: int) -> list[Poke]:
        """Wait for pokes and take at most ``limit``; empty once it is closed and all are taken."""
        while not (self._versions or self._closed):
            self._changed.clear()
            await self._changed.wait()
        batch = [Poke(*item) for item in islice(self._versions.items(), limit)]
        for poke in batch:
            del self._versions[poke.recipient]
        return batch

    def close(self) -> None:
        """Let the consumer end when all are taken."""
        self._closed = True
        self._changed.set()

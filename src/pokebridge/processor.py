"""Commits messages to the mailbox and sees to it that each is followed by a poke.

A send returns when the mailbox has committed; its poke is on the way by then, and nobody waits for
the transport. The mailbox's outbox makes the poke certain: what was committed and not confirmed,
because the transport was down, this process died or its queue was full, is found by a sweep, here
or in any other process that shares the mailbox.
"""

import asyncio
import random
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from types import TracebackType
from typing import Final, Protocol, Self

import structlog

from pokebridge.errors import MailboxFullError, UnavailableError
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
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_CAP_S: Final = 2.0

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
    drift apart.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        publisher: Pokes,
        *,
        sweep_every_s: float = 0.4,
        sweep_after_s: float = 1.0,
        purge_every_s: float = 20.0,
    ) -> None:
        self.stats = ProcessorStats()
        self._mailbox = mailbox
        self._publisher = publisher
        self._sweep_every_s = sweep_every_s
        self._sweep_after_s = sweep_after_s
        self._purge_every_s = purge_every_s
        self._unpublished = _Newest()
        self._unconfirmed = _Newest()
        self._transport = _Part("transport")
        self._store = _Part("mailbox")
        self._tasks: list[asyncio.Task[None]] = []

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
        self._tasks = [
            asyncio.create_task(loop, name=f"processor-{name}")
            for name, loop in (
                ("publish", self._keep_publishing()),
                ("confirm", self._keep_confirming()),
                ("sweep", self._keep_sweeping()),
                ("purge", self._keep_purging()),
            )
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
        attempt = _Attempts()
        while batch := await self._unpublished.take(BATCH):
            if await attempt(self._publish(batch)):
                self._unconfirmed.add(batch)

    async def _keep_confirming(self) -> None:
        attempt = _Attempts()
        while batch := await self._unconfirmed.take(BATCH):
            if await attempt(self._confirm(batch)) and len(batch) < BATCH:
                await asyncio.sleep(CONFIRM_EVERY_S)

    async def _keep_sweeping(self) -> None:
        attempt = _Attempts()
        while True:
            if await attempt(self._sweep()):
                await asyncio.sleep(_jittered(self._sweep_every_s))

    async def _keep_purging(self) -> None:
        attempt = _Attempts()
        while True:
            if await attempt(self._purge()):
                await asyncio.sleep(_jittered(self._purge_every_s))

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
            await self._mailbox.poked(pokes)

    async def _sweep(self) -> None:
        """Publish and confirm the old entries of the outbox, batch by batch, until none is left."""
        yield_s = 2 * self._sweep_every_s  # no pause between sweeps is longer
        more = True
        while more:
            with self._store.watched():
                pokes = await self._mailbox.claim_unpoked(
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


class _Part:
    """Something that we depend on: a line in the log when it fails and when it is back."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._down_since_s: float | None = None

    @property
    def is_down(self) -> bool:
        """Whether the last call to it failed."""
        return self._down_since_s is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note how a call to the part ends."""
        try:
            yield
        except UnavailableError as error:
            if self._down_since_s is None:
                self._down_since_s = monotonic()
                _log.warning("part_unavailable", part=self._name, error=str(error))
            raise
        if self._down_since_s is not None:
            down_s = round(monotonic() - self._down_since_s, 3)
            _log.info("part_is_back", part=self._name, down_s=down_s)
            self._down_since_s = None


class _Attempts:
    """The attempts of one loop: none ends it, and failed ones are followed by a growing pause."""

    def __init__(self) -> None:
        self._failures = 0

    async def __call__(self, step: Awaitable[None]) -> bool:
        """Whether ``step`` succeeded; when not, this returns after a back-off with full jitter."""
        try:
            await step
        except UnavailableError:
            pass  # its part has logged it
        except Exception:  # noqa: BLE001 - a defect must show; ending the loop would be silence
            _log.exception("processor_step_failed")
        else:
            self._failures = 0
            return True
        longest_s = min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2 ** min(self._failures, 16))
        self._failures += 1
        await asyncio.sleep(random.uniform(0, longest_s))  # noqa: S311 - no secret
        return False


def _jittered(pause_s: float) -> float:
    return pause_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret

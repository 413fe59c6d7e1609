"""Commits messages to the mailbox and publishes a poke for each.

A send returns when the mailbox has committed the message; it does not wait for the transport. The
mailbox's outbox makes the poke certain. An entry stays in the outbox until its poke was published.
When that fails, because the transport was down, this process died or its queue was full, a sweep
finds the entry: here or in any other process that shares the mailbox.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from time import monotonic
from types import TracebackType
from typing import Final, Protocol, Self

import structlog

from pokebridge.backoff import backoff_s
from pokebridge.errors import InputError, MailboxFullError, NotPublishedError
from pokebridge.mailbox.base import Mailbox, in_parts
from pokebridge.model import REVOCATIONS, NewMessage, Poke, Receipt, check_recipient
from pokebridge.poke_merger import check_pokes
from pokebridge.supervisor import Attempts, Part, cancel, keep_doing, supervise

# Pokes in one publish, one confirmation and one step of a sweep.
BATCH: Final = 1_000
PURGE_BATCH: Final = 1_000
# Recipients whose poke waits in memory. A poke beyond this is left to the outbox and its sweep.
MAX_PENDING: Final = 10_000
# The pause between confirmations, so that a busy recipient costs few transactions. It is far below
# the age at which a sweep takes an entry.
CONFIRM_EVERY_S: Final = 0.05
# Longer than the pause after which an unconfirmed entry is claimed again.
CUT_OFF_S: Final = 5.0
# How often a poke that the transport refuses is tried, over about 4 minutes. Then it is set aside.
# The gateway's verification still pokes a connected client.
MAX_REFUSALS: Final = 10
REFUSED_FIRST_S: Final = 1.0
REFUSED_CAP_S: Final = 60.0
MAX_REMEMBERED: Final = 100_000
_MAX_NAMED: Final = 10

log = structlog.get_logger(__name__)


class PokePublisher(Protocol):
    """Publishes pokes, as :class:`pokebridge.publisher.Publisher` does."""

    async def publish_now(self, pokes: Sequence[Poke]) -> None:
        """Return when the transport has accepted ``pokes``.

        Raises :class:`~pokebridge.errors.NotPublishedError` when all but those that it names were
        accepted, and another :class:`~pokebridge.errors.TransportError` when perhaps none was.
        """


@dataclass(slots=True)
class ProcessorStats:
    """Counters since the start. ``pokes_published`` includes those that a sweep published.

    ``pokes_unpublishable``: those that were set aside, because the transport refuses them.
    """

    messages_committed: int = 0
    duplicates: int = 0
    messages_refused: int = 0
    pokes_published: int = 0
    poke_failures: int = 0
    pokes_unpublishable: int = 0
    swept: int = 0


class Processor:
    """Sends messages. Use it as an async context manager, or call ``start`` and ``close``.

    One loop publishes the pokes of sent messages, a batch at a time. Pokes that are added during a
    publish are merged and share the next batch. A second loop confirms what was published.

    A sweep, every ``sweep_every_s`` seconds, publishes outbox entries older than ``sweep_after_s``.
    This age must be well above the duration of a publish, or pokes are sent twice. So the pokes of
    a dead process are published within ``sweep_after_s + 1.5 * sweep_every_s`` seconds: 1.6 by
    default. A purge runs every ``purge_every_s`` seconds. Both pauses are jittered by half, so that
    processes which share a mailbox drift apart. Without ``does_upkeep`` this process neither sweeps
    nor purges, and relies on others that share the mailbox.

    - ``stats``: the counters.
    - ``_unpublished``: pokes of committed messages, for the publish loop.
    - ``_unconfirmed``: published pokes, for the confirm loop.
    - ``_refused``: recipients whose poke the transport refused.
    - ``_refused_since``: some of those for whom it refused a poke since it accepted one.
    - ``_refused_s``: when it last did so for several; ``-inf`` once it accepted a poke.
    - ``_transport``, ``_store``: whether the publisher and the mailbox work.
    - ``_tasks``: the loops, publish and confirm first; empty while the processor does not run.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        publisher: PokePublisher,
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
        self._unpublished = _PokeQueue()
        self._unconfirmed = _PokeQueue()
        self._refused = _Refused()
        self._refused_since: set[str] = set()
        self._refused_s = -inf
        self._transport = Part("transport")
        self._store = Part("mailbox")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_cut_off(self) -> bool:
        """Whether the last publish failed, CUT_OFF_S seconds ago at most, or several were refused.

        After CUT_OFF_S it is unknown: another processor may have published the pokes, so that this
        one has nothing to retry.
        """
        return (
            self._transport.failed_within(CUT_OFF_S)
            or monotonic() - self._refused_s < REFUSED_CAP_S
        )

    async def send(self, message: NewMessage) -> Receipt:
        """Commit ``message``. Its poke is published in the background; a duplicate gets none.

        Raises:
            InputError: the recipient is invalid or reserved.
            MailboxFullError: the recipient's mailbox has no room for the message.
            MailboxError: the mailbox can't commit the message now.
        """
        if check_recipient(message.recipient) == REVOCATIONS:
            raise InputError(f"{REVOCATIONS} is reserved")
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
        """Start the loops. The first sweep runs at once."""
        self._tasks = [
            supervise("processor_publish", self._keep_publishing),
            supervise("processor_confirm", self._keep_confirming),
        ]
        if self._does_upkeep:
            self._tasks += [
                keep_doing("processor_sweep", self._sweep, self._sweep_every_s),
                keep_doing("processor_purge", self._purge, self._purge_every_s),
            ]

    async def close(self, *, deadline_s: float = 5.0) -> None:
        """Publish and confirm the pending pokes, for at most ``deadline_s`` seconds, and stop.

        Pokes that are left then stay in the outbox, for the next sweep of any process. May be
        called twice.
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
            log.warning("pokes_left_in_the_outbox", deadline_s=deadline_s)
        finally:
            await cancel(*tasks)

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
        """Publish the pokes of sent messages. A failed batch is left to the sweep."""
        attempt = Attempts("processor_publish")

        async def publish(batch: Sequence[Poke]) -> None:
            self._unconfirmed.add(await self._publish(batch))

        while batch := await self._unpublished.take(BATCH):
            await attempt(publish(batch))

    async def _keep_confirming(self) -> None:
        attempt = Attempts("processor_confirm")
        while batch := await self._unconfirmed.take(BATCH):
            if await attempt(self._confirm(batch)) and len(batch) < BATCH:
                await asyncio.sleep(CONFIRM_EVERY_S)

    async def _publish(self, pokes: Sequence[Poke]) -> Sequence[Poke]:
        """Publish ``pokes``. Returns those that need no retry: published, or set aside."""
        refusal = None
        try:
            with self._transport.watched():
                try:
                    await self._publisher.publish_now(pokes)
                except NotPublishedError as error:
                    refusal = error  # of some: the transport works
        except Exception:
            self.stats.poke_failures += len(pokes)
            raise
        refused = frozenset() if refusal is None else refusal.recipients
        done = [poke for poke in pokes if poke.recipient not in refused]
        self.stats.pokes_published += len(done)
        self.stats.poke_failures += len(pokes) - len(done)
        self._refused.forget(done)
        if done:
            self._refused_since.clear()
            self._refused_s = -inf
        if refusal is not None:
            if not done:
                self._note_refusal(refused - refusal.too_large, str(refusal))
            done += self._set_aside([poke for poke in pokes if poke.recipient in refused], refusal)
        return done

    def _note_refusal(self, recipients: Iterable[str], reason: str) -> None:
        """Note that none was accepted. With several recipients, the reason is not one of them."""
        self._refused_since.update(islice(recipients, 2))
        if len(self._refused_since) > 1:
            if self._refused_s == -inf:
                log.warning("pokes_refused", reason=reason)
            self._refused_s = monotonic()

    def _set_aside(self, refused: Sequence[Poke], refusal: NotPublishedError) -> Sequence[Poke]:
        """Note a refusal. Returns those of ``refused`` that are not tried again."""
        hopeless = [
            poke
            for poke in refused
            if self._refused.again(poke.recipient) or poke.recipient in refusal.too_large
        ]
        if hopeless:
            self.stats.pokes_unpublishable += len(hopeless)
            log.error(
                "pokes_unpublishable",
                pokes=len(hopeless),
                recipients=[poke.recipient for poke in hopeless[:_MAX_NAMED]],
                reason=str(refusal),
            )
            self._refused.forget(hopeless)
        return hopeless

    async def _confirm(self, pokes: Sequence[Poke]) -> None:
        with self._store.watched():
            await in_parts(self._mailbox.confirm_outbox, pokes)  # the sweep finds what is refused

    async def _sweep(self) -> None:
        """Publish and confirm the old entries of the outbox, batch by batch, until none is left.

        A claim resets an entry's age. So a process that can't publish claims later than the others
        do, and leaves the entries to those that can.
        """
        yield_s = 2 * self._sweep_every_s  # longer than any pause between sweeps
        more = True
        while more:
            with self._store.watched():
                pokes = await self._mailbox.claim_outbox(
                    older_than_s=self._sweep_after_s + (yield_s if self._transport.is_down else 0),
                    limit=BATCH,
                )
            more = len(pokes) == BATCH
            if invalid := [poke for poke in pokes if not _is_valid(poke)]:
                # Another program has written them: nobody can publish them.
                names = frozenset(poke.recipient for poke in invalid)
                refusal = NotPublishedError("the recipient or the version is invalid", names, names)
                await self._confirm(self._set_aside(invalid, refusal))
                pokes = [poke for poke in pokes if _is_valid(poke)]
            if due := [poke for poke in pokes if self._refused.is_due(poke.recipient)]:
                done = await self._publish(due)
                self.stats.swept += len(done)
                await self._confirm(done)

    async def _purge(self) -> None:
        """Delete expired data, step by step, until none is left."""
        purged = 1
        while purged:
            with self._store.watched():
                purged = await self._mailbox.purge(limit=PURGE_BATCH)


def _is_valid(poke: Poke) -> bool:
    try:
        check_pokes([poke])
    except (InputError, TypeError):  # SQLite stores values of any type
        return False
    return True


class _Refused:
    """The recipients whose poke was refused: how often, and until when it is not tried again."""

    def __init__(self) -> None:
        self._refusals: dict[str, tuple[int, float]] = {}

    def is_due(self, recipient: str) -> bool:
        """Whether it is time to try again."""
        _, until_s = self._refusals.get(recipient, (0, 0.0))
        return monotonic() >= until_s

    def again(self, recipient: str) -> bool:
        """Note another refusal. Returns whether there were too many."""
        count, _ = self._refusals.pop(recipient, (0, 0.0))
        if len(self._refusals) < MAX_REMEMBERED:
            pause_s = backoff_s(count, first_s=REFUSED_FIRST_S, cap_s=REFUSED_CAP_S, least=0.5)
            self._refusals[recipient] = (count + 1, monotonic() + pause_s)
        return count + 1 >= MAX_REFUSALS

    def forget(self, pokes: Sequence[Poke]) -> None:
        """These are done with."""
        if self._refusals:
            for poke in pokes:
                self._refusals.pop(poke.recipient, None)


class _PokeQueue:
    """A bounded queue of pokes for one consumer. It keeps the newest poke of each recipient."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def add(self, pokes: Sequence[Poke]) -> None:
        """Merge ``pokes`` in. Those that don't fit are dropped: the outbox still has them."""
        for poke in pokes:
            waiting = self._versions.get(poke.recipient)
            if waiting is not None or len(self._versions) < MAX_PENDING:
                self._versions[poke.recipient] = max(poke.version or 0, waiting or 0)
        self._changed.set()

    async def take(self, limit: int) -> list[Poke]:
        """Wait for pokes and take at most ``limit``. Empty when closed and all are taken."""
        while not (self._versions or self._closed):
            self._changed.clear()
            await self._changed.wait()
        if len(self._versions) <= limit:
            taken, self._versions = self._versions, {}
        else:
            taken = dict(islice(self._versions.items(), limit))
            for recipient in taken:
                del self._versions[recipient]
        return [Poke(recipient, version) for recipient, version in taken.items()]

    def close(self) -> None:
        """Let the consumer end after it has taken all pokes."""
        self._closed = True
        self._changed.set()

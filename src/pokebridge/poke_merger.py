"""Merging pokes of many callers into few sends, and the calls of a publisher that does so."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from pokebridge.errors import InputError, NotPublishedError, TransportError
from pokebridge.model import MAX_VERSION, Poke, PublishPokes, check_recipient
from pokebridge.supervisor import cancel

# How long a poke waits for others at most, while an earlier batch is being sent.
LINGER_S = 0.003
# Recipients whose poke is gathered or being sent. At the limit callers wait, which slows them to
# the transport's pace and bounds the memory to about 3 MB.
MAX_PENDING_RECIPIENTS = 10_000
# Several at once, so that a slow answer does not delay the pokes behind it; limited, so that
# requests do not pile up.
MAX_CONCURRENT_SENDS = 8
# How long close() waits for running sends. Then the callers get an error.
CLOSE_TIMEOUT_S = 15.0


class _Batch:
    """Pokes that are sent together.

    ``done`` is resolved for all callers who brought them, with the refusal of some, if any.
    """

    def __init__(self) -> None:
        self.versions: dict[str, int | None] = {}
        self.done: asyncio.Future[NotPublishedError | None] = (
            asyncio.get_running_loop().create_future()
        )

    def fail(self, reason: str) -> None:
        """Raise TransportError to all callers, who may all be gone."""
        self.done.set_exception(TransportError(reason))
        self.done.exception()  # marks it as retrieved


class PokeMerger:
    """Gathers pokes while others are being sent, and sends them as one batch.

    A batch is sent at the end of the loop's turn while nothing else is being sent. Otherwise it is
    sent when a send has ended, or ``linger_s`` after its first poke, so that a slow send does not
    block others. There are at most :data:`MAX_CONCURRENT_SENDS` sends: beyond that the batch keeps
    gathering.

    - ``_gathering``: the batch that takes new pokes, if there is one.
    - ``_start``: the call that will send it; ``None`` once it was due, and had to go on gathering.
    - ``_sends``: the batches that are being sent.
    - ``_pending``: recipients in all these batches; ``_room`` is set when it has fallen.
    """

    def __init__(self, send: PublishPokes, linger_s: float, max_pending: int) -> None:
        self._send = send
        self._linger_s = linger_s
        self._max_pending = max_pending
        self._gathering: _Batch | None = None
        self._start: asyncio.Handle | None = None
        self._sends: set[asyncio.Task[None]] = set()
        self._pending = 0
        self._room = asyncio.Event()
        self._closed = False

    async def publish(self, pokes: Sequence[Poke]) -> None:
        """Return when all of ``pokes`` are sent.

        Raises:
            NotPublishedError: some of them were refused.
            TransportError: the merger is closed.
            Exception: whatever ``send`` raised.
        """
        waiting_for: set[asyncio.Future[NotPublishedError | None]] = set()
        for poke in pokes:
            while not (batch := self._add(poke)):
                self._room.clear()
                await self._room.wait()
            waiting_for.add(batch.done)
        if waiting_for:
            await asyncio.wait(waiting_for)
        refusals = [refusal for done in waiting_for if (refusal := done.result())]
        mine = {poke.recipient for poke in pokes}
        for refusal in refusals:  # of another caller's pokes, perhaps
            if recipients := refusal.recipients & mine:
                raise NotPublishedError(str(refusal), recipients, refusal.too_large & mine)

    async def close(self) -> None:
        """Send what is gathered, and refuse further pokes. Ends within :data:`CLOSE_TIMEOUT_S`."""
        self._closed = True
        self._room.set()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._finish()
        except TimeoutError:
            if self._gathering:
                self._gathering.fail("the publisher is closed")
                self._gathering = None
            await cancel(*self._sends)

    async def _finish(self) -> None:
        while self._gathering or self._sends:
            self._start_send()
            await asyncio.wait(self._sends)

    def _add(self, poke: Poke) -> _Batch | None:
        """Merge ``poke`` into a batch and return the batch; ``None`` when there is no room."""
        if self._closed:
            raise TransportError("the publisher is closed")
        batch = self._gathering
        if batch and poke.recipient in batch.versions:
            batch.versions[poke.recipient] = _newest(batch.versions[poke.recipient], poke.version)
            return batch
        if self._pending >= self._max_pending:
            return None
        if batch is None:
            batch = self._gathering = _Batch()
            loop = asyncio.get_running_loop()
            if self._sends:
                self._start = loop.call_later(self._linger_s, self._start_send)
            else:
                self._start = loop.call_soon(self._start_send)
        batch.versions[poke.recipient] = poke.version
        self._pending += 1
        return batch

    def _start_send(self) -> None:
        if self._start:
            self._start.cancel()
            self._start = None
        if self._gathering and len(self._sends) < MAX_CONCURRENT_SENDS:
            batch, self._gathering = self._gathering, None
            task = asyncio.get_running_loop().create_task(self._send_batch(batch))
            self._sends.add(task)
            task.add_done_callback(self._send_ended)

    async def _send_batch(self, batch: _Batch) -> None:
        try:
            await self._send([Poke(*item) for item in batch.versions.items()])
        except NotPublishedError as refusal:
            batch.done.set_result(refusal)
        except Exception as error:  # noqa: BLE001 - any error belongs to the callers
            batch.done.set_exception(error)
            batch.done.exception()  # marks it as retrieved: every caller may have been cancelled
        else:
            batch.done.set_result(None)
        finally:
            if not batch.done.done():  # this task was cancelled, and perhaps by the driver
                batch.fail("the publish was cancelled")
            self._pending -= len(batch.versions)
            self._room.set()

    def _send_ended(self, task: asyncio.Task[None]) -> None:
        self._sends.discard(task)
        self._start_send()


def _newest(one: int | None, other: int | None) -> int | None:
    """The newer version. ``None`` is unknown and wins, since it may be newer than any other."""
    return None if one is None or other is None else max(one, other)


class PokeCalls:
    """The calls that both publishers have. Each publisher merges on its own."""

    def __init__(self, send: PublishPokes, linger_s: float, max_pending: int) -> None:
        self._merger = PokeMerger(send, linger_s, max_pending)

    async def poke(self, recipient: str, version: int | None = None) -> None:
        """Tell ``recipient`` that it is behind ``version``, or behind some version when ``None``.

        Returns and raises as :meth:`publish` does.
        """
        await self.publish([Poke(recipient, version)])

    async def publish(self, pokes: Sequence[Poke]) -> None:
        """Send ``pokes``, merged with those of other callers. Returns when all are accepted.

        Waits while ``max_pending`` other recipients are pending.

        Raises:
            InputError: a poke has no valid recipient or version. None of the pokes is sent.
            NotPublishedError: some of the pokes were refused, and the others are published.
            TransportError: some or all of the pokes were not accepted. A retry is safe.
        """
        check_pokes(pokes)
        await self._merger.publish(pokes)

    async def close(self) -> None:
        """Send the gathered pokes and wait until they are accepted, 15 s at most.

        Then calls that are still waiting raise TransportError. May be called twice.
        """
        await self._merger.close()

    async def __aenter__(self) -> Self:
        """Return the publisher. The first poke opens what is needed."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()


def check_pokes(pokes: Sequence[Poke]) -> None:
    """Raise InputError for an invalid poke, which would fail the whole batch."""
    for poke in pokes:
        check_recipient(poke.recipient)
        if poke.version is not None and not 1 <= poke.version <= MAX_VERSION:
            raise InputError(f"a version is from 1 to {MAX_VERSION}, not {poke.version}")

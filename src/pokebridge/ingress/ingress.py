"""Commits messages from a queue, and acks each after its commit."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Final, Literal

import structlog

from pokebridge.border import LOG_AGAIN_S, note_unforeseen
from pokebridge.errors import (
    InputError,
    MailboxFullError,
    MailboxRefusedError,
    UnavailableError,
)
from pokebridge.ingress.base import Delivery, Source
from pokebridge.model import NewMessage, SendMessage
from pokebridge.supervisor import Attempts, Part, supervise
from pokebridge.telemetry import LogPace

# Messages that are taken at once. The next are taken after these were settled.
BATCH: Final = 256
RETRY_DELAY_S: Final = 1.0
# How often a message may raise an unexpected error or be refused before it is buried, if others
# were committed meanwhile. If none was, it is an unforeseen outage: all stay in the queue.
MAX_DEFECTS: Final = 5
# After this many dead letters that were not accepted the queue counts as down.
MAX_UNBURIED: Final = 3
_MAX_REMEMBERED = 1_000

Result = Literal["committed", "duplicate", "refused", "retried"]
_NOTHING: Mapping[Result, int] = {"committed": 0, "duplicate": 0, "refused": 0, "retried": 0}

log = structlog.get_logger(__name__)


class _RefusedError(Exception):
    """The message can never be committed."""


class Ingress:
    """Reads ``source`` and sends its messages. Use ``start`` and ``close``.

    ``read`` makes a message from a body and the delivery's id, or raises InputError. ``send``
    commits it. A message is acked after its commit. It is buried with the reason when it is
    invalid or its recipient's mailbox is full, since there is no sender to tell. While the mailbox
    is unavailable all messages stay in the queue.

    - ``results``: messages by what happened to them
    - ``_source``, ``_read``, ``_send``: as above
    - ``_queue``, ``_dead_letters``, ``_mailbox``: whether these work
    - ``_defects``: unexpected errors by delivery id, the latest last, and ``_settled`` at the first
    - ``_settled``: messages that were committed when the batch under way began
    - ``_reading``: the task that takes messages
    - ``_settling``: the task that settles those taken
    - ``_closing``: whether to take no more
    - ``_log_pace``: of the lines about dead letters
    """

    def __init__(
        self,
        source: Source,
        read: Callable[[bytes, str], NewMessage],
        send: SendMessage,
    ) -> None:
        self.results: Counter[Result] = Counter(_NOTHING)
        self._source = source
        self._read = read
        self._send = send
        self._queue = Part("ingress")
        self._dead_letters = Part("dead letters")
        self._mailbox = Part("mailbox")
        self._defects: dict[str, tuple[int, int]] = {}
        self._settled = 0
        self._reading: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._closing = False
        self._log_pace = LogPace(LOG_AGAIN_S)

    @property
    def is_down(self) -> bool:
        """Whether the last call to the queue failed, or the last message was not buried."""
        return self._queue.is_down or self._dead_letters.is_down

    async def start(self) -> None:
        """Start to read. While the queue is unavailable it is retried."""
        self._reading = supervise("ingress", self._keep_reading)

    async def close(self, *, deadline_s: float = 5.0) -> None:
        """Take no more messages, and settle those taken, for at most ``deadline_s`` seconds.

        The rest is delivered again. May be called twice.
        """
        self._closing = True
        tasks = [task for task in (self._reading, self._settling) if task is not None]
        if self._reading is not None:
            self._reading.cancel()
        if self._settling is not None:
            await asyncio.wait({self._settling}, timeout=deadline_s)
            self._settling.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._reading = self._settling = None
        await self._source.close()

    async def _keep_reading(self) -> None:
        attempt = Attempts("ingress")
        while not self._closing:  # a driver may swallow a cancellation
            await attempt(self._step())

    async def _step(self) -> None:
        with self._queue.watched():
            deliveries = await self._source.fetch(BATCH)
        if deliveries:
            self._settling = asyncio.create_task(self._settle(deliveries), name="ingress-settle")
            await asyncio.shield(self._settling)

    async def _settle(self, deliveries: Sequence[Delivery]) -> None:
        """Commit the messages, then ack, bury or retry each."""
        self._settled = self._count_settled()
        commits = (self._commit(delivery) for delivery in deliveries)
        outcomes = await asyncio.gather(*commits, return_exceptions=True)
        done: list[Delivery] = []
        later: list[Delivery] = []
        refused: list[tuple[Delivery, str]] = []
        failure: BaseException | None = None
        for delivery, outcome in zip(deliveries, outcomes, strict=True):
            match outcome:
                case _RefusedError():
                    refused.append((delivery, str(outcome)))
                case BaseException():
                    later.append(delivery)
                    failure = outcome
                case _:
                    done.append(delivery)
        with self._queue.watched():
            await self._source.ack(done)
        unburied = await self._bury(refused)
        with self._queue.watched():
            await self._source.retry(later, delay_s=RETRY_DELAY_S)
        self.results["retried"] += len(later)
        with self._mailbox.watched():
            if failure is not None:
                raise failure
        if unburied is not None:
            raise unburied

    async def _bury(self, refused: list[tuple[Delivery, str]]) -> UnavailableError | None:
        """Bury each, in any order: one that can't be buried must not block the others forever.

        What is left after MAX_UNBURIED failures is delivered again. Returns the last failure.
        """
        random.shuffle(refused)
        failure: UnavailableError | None = None
        failures = 0
        for delivery, reason in refused:
            try:
                with self._dead_letters.watched():
                    await self._source.bury(delivery, reason)
            except UnavailableError as error:
                failure = error
                failures += 1
                if failures == MAX_UNBURIED:
                    break
            else:
                self.results["refused"] += 1
                if self._log_pace.allows("refused", monotonic()):
                    log.warning(
                        "ingress_message_refused",
                        id=delivery.id,
                        reason=reason,
                        refused=self.results["refused"],
                    )
        return failure

    async def _commit(self, delivery: Delivery) -> None:
        message = self._read_guarded(delivery)
        try:
            receipt = await self._send(message)
        except (InputError, MailboxFullError) as error:
            raise _refusal(error) from None
        except Exception as error:
            is_outage = isinstance(error, UnavailableError)
            may_be_its_own = isinstance(error, MailboxRefusedError) or not is_outage
            if may_be_its_own and self._is_hopeless(delivery.id):
                raise _RefusedError(f"unexpected error: {error!r}") from error
            raise
        self.results["duplicate" if receipt.duplicate else "committed"] += 1

    def _read_guarded(self, delivery: Delivery) -> NewMessage:
        try:
            return self._read(delivery.body, delivery.id)
        except InputError as error:
            raise _refusal(error) from None
        except Exception as error:  # noqa: BLE001 - the guard of this border
            note_unforeseen("ingress", error)
            raise _RefusedError(f"unexpected error: {type(error).__name__}") from None

    def _is_hopeless(self, delivery_id: str) -> bool:
        count, settled = self._defects.pop(delivery_id, (0, self._settled))
        self._defects[delivery_id] = (count + 1, settled)
        if len(self._defects) > _MAX_REMEMBERED:
            del self._defects[next(iter(self._defects))]
        return count + 1 >= MAX_DEFECTS and self._count_settled() > settled

    def _count_settled(self) -> int:
        return self.results["committed"] + self.results["duplicate"]


def _refusal(error: Exception) -> _RefusedError:
    """The refusal for the reason that ``error`` gives, in one line."""
    return _RefusedError(" ".join(str(error).split()))

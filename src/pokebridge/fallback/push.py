"""Sends a mailbox's pending pushes, and records in it what was pulled.

No process keeps a record of connected recipients. A push is due when a message was not pulled
within its grace. A recipient that is only slow gets one push too many.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Final, Literal, Protocol

import msgspec
import structlog

from pokebridge.backoff import backoff_s
from pokebridge.errors import UnavailableError
from pokebridge.mailbox.base import in_parts
from pokebridge.mailbox.pushes import OwedPush, PushQueue
from pokebridge.supervisor import Attempts, Part, cancel, keep_doing, run_once, supervise

AT_ONCE: Final = 32
LOOK_EVERY_S: Final = 0.5
PURGE_EVERY_S: Final = 60.0
PURGE_BATCH: Final = 1_000
# Pulls are recorded together. The pause is far shorter than a grace.
TELL_EVERY_S: Final = 0.1
# Recipients whose pull is not recorded yet. Beyond this, a push may be sent needlessly.
MAX_PULLED: Final = 100_000
TELL_BATCH: Final = 1_000
_MAX_REASON = 200

Result = Literal["sent", "failed", "dead"]
"""An attempt's result. ``dead`` counts pushes that were given up after a failed attempt."""
_NOTHING: Mapping[Result, int] = {"sent": 0, "failed": 0, "dead": 0}

log = structlog.get_logger(__name__)
_encode = msgspec.json.Encoder().encode


class Receiver(Protocol):
    """The receiver of pushes. An attempt takes at most ``timeout_s`` seconds."""

    timeout_s: float

    async def post(self, webhook_id: str, body: bytes) -> None:
        """Return when the push was accepted.

        Raises :class:`~pokebridge.errors.UnavailableError` when it was refused, or may not have
        arrived.
        """

    async def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How a push is tried again: pauses double from the first to the longest, half of each random.

    By default 20 attempts, over about a day.
    """

    first_s: float = 5.0
    longest_s: float = 4 * 3600.0
    attempts: int = 20

    def pause_s(self, attempts: int) -> float:
        """The pause after so many ``attempts``."""
        return backoff_s(attempts - 1, first_s=self.first_s, cap_s=self.longest_s, least=0.5)


class Pusher:
    """Claims due pushes and posts each to ``receiver``, at most AT_ONCE at a time.

    A claim lasts longer than an attempt may take. When this process dies in between, the push can
    be claimed again after that, and is posted with the same id. While the receiver fails, it gets
    one push at a time. So an outage uses up the attempts of few pushes, and its end brings no
    burst.

    - ``results``: attempts by their result
    - ``_queue``: the mailbox's pending pushes
    - ``_receiver``: where they are posted
    - ``_retries``: how failed pushes are retried
    - ``_look_every_s``: the pause between claims
    - ``_lease_s``: how long a claim lasts
    - ``_store``, ``_webhook``: whether the mailbox and the receiver work
    - ``_under_way``: the attempts under way
    - ``_loops``: the tasks that push and purge
    """

    def __init__(
        self,
        queue: PushQueue,
        receiver: Receiver,
        *,
        retries: Retries | None = None,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self.results: Counter[Result] = Counter(_NOTHING)
        self._queue = queue
        self._receiver = receiver
        self._retries = retries or Retries()
        self._look_every_s = look_every_s
        self._lease_s = 2 * receiver.timeout_s
        self._store = Part("mailbox")
        self._webhook = Part("push_webhook")
        self._under_way: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start to send due pushes."""
        self._loops = [
            keep_doing("pusher_claim", self._push_due, self._look_every_s),
            keep_doing("pusher_purge", self._purge, PURGE_EVERY_S),
        ]

    async def close(self, *, deadline_s: float = 5.0) -> None:
        """Stop claiming, and wait for the attempts under way for at most ``deadline_s`` seconds.

        A push whose attempt is cut off is claimed and posted again. May be called twice.
        """
        await cancel(*self._loops)
        self._loops.clear()
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=deadline_s)
        await cancel(*self._under_way)
        await self._receiver.close()

    async def _push_due(self) -> None:
        """Start attempts until no push is due; while the receiver fails, at most one."""
        while True:
            is_trial = self._webhook.is_down
            room = AT_ONCE - len(self._under_way)
            with self._store.watched():
                pushes = await self._queue.claim(
                    limit=1 if is_trial else room, lease_s=self._lease_s
                )
            for push in pushes:
                task = run_once("pusher_post", self._push(push))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
            if not pushes:
                return
            if is_trial or len(self._under_way) == AT_ONCE:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            if self._webhook.is_down:
                return

    async def _push(self, push: OwedPush) -> None:
        until_s = monotonic() + self._lease_s
        body = _encode({"recipient": push.recipient, "version": push.version})
        try:
            with self._webhook.watched():
                await self._receiver.post(push.id, body)
        except UnavailableError as error:
            self.results["failed"] += 1
            if push.attempts < self._retries.attempts:
                retry_s = self._retries.pause_s(push.attempts)
                await self._record(lambda: self._queue.failed(push, retry_s=retry_s), until_s)
            else:
                await self._give_up(push, str(error), until_s)
        else:
            self.results["sent"] += 1
            await self._record(lambda: self._queue.sent(push), until_s)

    async def _give_up(self, push: OwedPush, reason: str, until_s: float) -> None:
        self.results["dead"] += 1
        reason = " ".join(reason.split())[:_MAX_REASON]
        log.error("push_given_up", recipient=push.recipient, attempts=push.attempts, reason=reason)
        await self._record(lambda: self._queue.bury(push, reason), until_s)

    async def _record(self, write: Callable[[], Awaitable[None]], until_s: float) -> None:
        """Record a push's result in the mailbox. Retries while the lease lasts."""

        async def watched() -> None:
            with self._store.watched():
                await write()

        attempt = Attempts("pusher_post")
        while not await attempt(watched()) and monotonic() < until_s:
            pass

    async def _purge(self) -> None:
        purged = PURGE_BATCH
        while purged == PURGE_BATCH:
            with self._store.watched():
                purged = await self._queue.purge(limit=PURGE_BATCH)


class Pulls:
    """Records in ``queue`` what was pulled here: together and a little later, so no pull waits.

    When the process is killed, the pulls of the last ``tell_every_s`` seconds may be pushed
    needlessly.

    - ``_versions``: the highest pulled version by recipient, not recorded yet
    - ``_changed``: set while there are any
    - ``_telling``: the task that records them
    """

    def __init__(self, queue: PushQueue, *, tell_every_s: float = TELL_EVERY_S) -> None:
        self._queue = queue
        self._tell_every_s = tell_every_s
        self._versions: dict[str, int] = {}
        self._store = Part("mailbox")
        self._changed = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    def note(self, recipient: str, version: int) -> None:
        """Note that ``recipient`` has pulled up to ``version``."""
        known = self._versions.get(recipient)
        if known is not None or len(self._versions) < MAX_PULLED:
            self._versions[recipient] = max(version, known or 0)
            self._changed.set()

    async def start(self) -> None:
        """Start to record pulls."""
        self._telling = supervise("pulls_tell", self._keep_telling)

    async def close(self) -> None:
        """Record the remaining pulls, if the mailbox is available."""
        if self._telling is not None:
            await cancel(self._telling)
            self._telling = None
            await Attempts("pulls_tell")(self._tell())

    async def _keep_telling(self) -> None:
        attempt = Attempts("pulls_tell")
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._tell_every_s)
            await attempt(self._tell())

    async def _tell(self) -> None:
        while self._versions:
            some = dict(islice(self._versions.items(), TELL_BATCH))
            with self._store.watched():
                await in_parts(self._record_pulls, list(some))
            for recipient, version in some.items():
                if self._versions[recipient] == version:
                    del self._versions[recipient]
        self._changed.clear()

    async def _record_pulls(self, recipients: Sequence[str]) -> None:
        await self._queue.pulled({each: self._versions[each] for each in recipients})

"""Finds and deletes the subscriptions of dead instances, without any coordination.

A subscription is alive if somebody reads it. The sweep tests exactly that, and relies on no
heartbeat, clock or list of members. Every instance acknowledges on receipt. So the sweep publishes
probes, later pulls what each subscription still holds, and gives it back at once. A message that
stays unacknowledged for 45 s, although every reader was offered it repeatedly, proves that there is
no reader.

The service's clock times this: a message's publish time, against the latest publish time seen
anywhere plus the time since. This is a lower bound of the message's age. So an error can only make
the sweep miss an orphan until the next one. It can't make it delete a live subscription.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pokebridge.backoff import spread
from pokebridge.transport.google_pubsub_api import CALL_TIMEOUT_S, PubSubApi, PubSubError

NAME_PREFIX = "poke-sub-"
DEAD_AFTER_S = 45.0
"""An instance that is paused for this long has lost its clients as well: they hang up."""
LOOKS_A_LIFE = 20
# A sweep ends after so many looks, decided or not. A limit of time would end it too soon on a busy
# machine, where each look takes longer.
LOOKS = LOOKS_A_LIFE * 3 // 2
EMPTY_LOOKS = 3
STRIKES = 2
LOOK_LIMIT = 100
LOOK_AGAIN_S = 0.5
GIVE_BACK_ATTEMPTS = 3
PAGE_SIZE = 1000
MAX_CALLS_AT_ONCE = 50  # half of what a connection may carry


class Orphan(NamedTuple):
    """A subscription without a reader. ``problem`` says why it could not be deleted."""

    subscription: str
    instance: str
    unread_s: float
    deleted: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SweepReport:
    """The result of a sweep of the cluster's subscriptions, without the sweeper's own."""

    examined: int
    orphans: tuple[Orphan, ...]
    dry_run: bool


class Target(NamedTuple):
    """Where to publish a probe for a subscription: its topic, and the tag (label ``feed``)."""

    topic: str
    feed: str


@dataclass(slots=True)
class _Suspect:
    """A subscription that is examined."""

    name: str
    instance: str
    target: Target
    due_s: float = 0.0
    """When to look again, by the monotonic clock."""
    empty_looks: int = 0
    """Looks in a row that found nothing old."""
    strikes: int = 0
    """Looks that found a message older than the limit."""
    unread_s: float = 0.0
    """Age of the oldest message in the last look."""

    @property
    def is_alive(self) -> bool:
        return self.empty_looks >= EMPTY_LOOKS

    @property
    def is_dead(self) -> bool:
        return self.strikes >= STRIKES


@dataclass(slots=True)
class Sweep:
    """One sweep.

    Args:
        api: calls the project.
        topic: the shared topic's full name.
        cluster: the cluster whose subscriptions are examined.
        keep: the full names of the subscriptions that the sweeper itself reads.
        publish: publishes a probe for each of the given targets.
        dead_after_s: how long a message must stay unacknowledged. A sweep takes a sixth of it, and
            all of it when there is an orphan.
        dry_run: report orphans, but do not delete them.
        patience_s: how long a look waits for an unread message. 0 suffices when a dead reader's
            messages return and stay. When they are handed to it again, use the ack deadline.
    """

    api: PubSubApi
    topic: str
    cluster: str
    keep: Collection[str]
    publish: Callable[[Iterable[Target]], Awaitable[None]]
    dead_after_s: float = DEAD_AFTER_S
    dry_run: bool = False
    patience_s: float = 0.0
    _server_lead_s: float = float("-inf")
    _calls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CALLS_AT_ONCE))

    @property
    def _look_every_s(self) -> float:
        return self.dead_after_s / LOOKS_A_LIFE

    async def run(self) -> SweepReport:
        """Find the orphans, and delete them unless this is a dry run.

        Raises:
            PubSubError: listing, probing or pulling was refused.
        """
        suspects = [
            _Suspect(
                found.name,
                found.labels.get("instance", ""),
                Target(found.topic, found.labels.get("feed", "")),
            )
            async for found in self._subscriptions()
            if found.name not in self.keep
        ]
        dead = await self._judge(suspects)
        orphans = await asyncio.gather(*(self._delete(suspect) for suspect in dead))
        return SweepReport(len(suspects), tuple(orphans), self.dry_run)

    async def _subscriptions(self) -> AsyncIterator[Any]:
        """The subscriptions of the cluster's instances on the topic and its shards' topics."""
        ours = re.compile(rf"{re.escape(self.topic)}([-.]\d+)?")
        token = ""
        while True:
            page = await self.api.call(
                "ListSubscriptions",
                project=f"projects/{self.api.project}",
                page_size=PAGE_SIZE,
                page_token=token,
            )
            for found in page.subscriptions:
                short_name = found.name.rpartition("/")[2]
                if (
                    short_name.startswith(NAME_PREFIX)
                    and found.labels.get("cluster") == self.cluster
                    and ours.fullmatch(found.topic)
                ):
                    yield found
            token = page.next_page_token
            if not token:
                return

    async def _judge(self, suspects: list[_Suspect]) -> list[_Suspect]:
        """Return the suspects without a reader."""
        undecided = suspects
        for look in range(LOOKS):
            if not undecided:
                break
            if look < EMPTY_LOOKS:  # a dead reader may still be handed the first
                await self.publish({suspect.target for suspect in undecided})
            # At random times, since other sweeps briefly hold the messages that they look at.
            await asyncio.sleep(spread(self._look_every_s, 0.75, 1.25))
            now_s = time.monotonic()
            await asyncio.gather(*(self._look(s) for s in undecided if s.due_s <= now_s))
            undecided = [s for s in undecided if not (s.is_alive or s.is_dead)]
        return [suspect for suspect in suspects if suspect.is_dead]

    async def _look(self, suspect: _Suspect) -> None:
        """Pull what is unread, note its age, and give it back."""
        end_s = time.monotonic() + self.patience_s
        unread_s = 0.0
        try:
            while True:
                for published_s in await self._peek(suspect.name, end_s):
                    unread_s = max(unread_s, self._age_s(published_s))
                if unread_s >= self.dead_after_s or time.monotonic() + LOOK_AGAIN_S > end_s:
                    break
                await asyncio.sleep(LOOK_AGAIN_S)
        except PubSubError as error:
            if error.is_missing:
                suspect.empty_looks = EMPTY_LOOKS  # deleted by its owner or by another sweep
            elif not error.is_transient:
                raise
            return
        suspect.unread_s = unread_s
        suspect.strikes += unread_s >= self.dead_after_s
        if unread_s < self._look_every_s:  # it has a reader, or there was nothing to read
            suspect.empty_looks += 1
        else:
            suspect.empty_looks = 0
            suspect.due_s = time.monotonic() + self.dead_after_s - unread_s

    def _age_s(self, published_s: float) -> float:
        """Lower bound of a message's age, by the service's clock."""
        now_s = time.monotonic()
        self._server_lead_s = max(self._server_lead_s, published_s - now_s)
        return now_s + self._server_lead_s - published_s

    async def _peek(self, subscription: str, end_s: float) -> list[float]:
        """Pull, waiting until ``end_s``, and return the messages' publish times (Unix time)."""
        async with self._calls:
            wait_s = end_s - time.monotonic()
            try:
                pulled = await self.api.call(
                    "Pull",
                    timeout_s=wait_s if wait_s > 0 else CALL_TIMEOUT_S,
                    subscription=subscription,
                    max_messages=LOOK_LIMIT,
                    return_immediately=wait_s <= 0,
                )
            except PubSubError as error:
                if error.is_timeout and wait_s > 0:
                    return []
                raise
            if not pulled.received_messages:
                return []
            await self._give_back(subscription, pulled)
        return [
            received.message.publish_time.ToNanoseconds() / 1e9
            for received in pulled.received_messages
        ]

    async def _give_back(self, subscription: str, pulled: Any) -> None:
        """Make ``pulled`` available again at once, since a live reader may be waiting for it."""
        ack_ids = [received.ack_id for received in pulled.received_messages]
        for attempt in range(1, GIVE_BACK_ATTEMPTS + 1):
            try:
                await self.api.call(
                    "ModifyAckDeadline",
                    subscription=subscription,
                    ack_ids=ack_ids,
                    ack_deadline_seconds=0,
                )
            except PubSubError as error:
                if not error.is_transient or attempt == GIVE_BACK_ATTEMPTS:
                    raise
            else:
                return

    async def _delete(self, suspect: _Suspect) -> Orphan:
        problem = None
        if not self.dry_run:
            try:
                async with self._calls:
                    await self.api.call("DeleteSubscription", subscription=suspect.name)
            except PubSubError as error:
                problem = None if error.is_missing else str(error)
        deleted = not self.dry_run and problem is None
        return Orphan(suspect.name, suspect.instance, suspect.unread_s, deleted, problem)

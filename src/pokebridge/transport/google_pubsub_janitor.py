"""Finds the subscriptions that dead instances left behind, without any coordination.

A subscription is alive when somebody reads it, so that is what is tested, and nothing else is
believed: no heartbeat, no clock, no list of members. Every reader of ours acknowledges on receipt.
So the janitor publishes a probe, and looks after a while what each subscription still has to give;
what it gets by looking it gives back at once. Where a message goes unacknowledged for 45 s,
although it was offered to every reader again and again, there is no reader.

The age of a message is told by the service's own clock: its publish time, against the latest
publish time seen anywhere plus what has passed since. That is a lower bound, so an error makes the
janitor miss an orphan until the next sweep, never take a live one for dead.
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
"""A paused instance is dead by then for its clients as well: they hang up."""
LOOKS_A_LIFE = 20
EMPTY_LOOKS = 3
STRIKES = 2
LOOK_LIMIT = 100
LOOK_AGAIN_S = 0.5
GIVE_BACK_ATTEMPTS = 3
PAGE_SIZE = 1000
MAX_CALLS_AT_ONCE = 50  # half of what a connection may carry


class Orphan(NamedTuple):
    """A subscription that nobody reads. ``problem`` says why it could not be deleted."""

    subscription: str
    instance: str
    unread_s: float
    deleted: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep found among the cluster's subscriptions, the sweeper's own aside."""

    examined: int
    orphans: tuple[Orphan, ...]
    dry_run: bool


async def list_subscriptions(api: PubSubApi, topic: str, cluster: str) -> AsyncIterator[Any]:
    """The subscriptions of ``cluster``'s instances on ``topic`` and its shards' topics.

    One call per 1,000 of the project's.

    Raises:
        PubSubError: they can't be listed.
    """
    ours = re.compile(rf"{re.escape(topic)}(-\d+)?")
    token = ""
    while True:
        page = await api.call(
            "ListSubscriptions",
            project=f"projects/{api.project}",
            page_size=PAGE_SIZE,
            page_token=token,
        )
        for found in page.subscriptions:
            short_name = found.name.rpartition("/")[2]
            if (
                short_name.startswith(NAME_PREFIX)
                and found.labels.get("cluster") == cluster
                and ours.fullmatch(found.topic)
            ):
                yield found
        token = page.next_page_token
        if not token:
            return


class Target(NamedTuple):
    """Where a probe reaches a subscription: its topic, and the tag (its label ``feed``)."""

    topic: str
    feed: str


@dataclass(slots=True)
class _Suspect:
    name: str
    instance: str
    target: Target
    due_s: float = 0.0
    empty_looks: int = 0
    strikes: int = 0
    unread_s: float = 0.0

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
        keep: the full names of the subscriptions that the sweeper itself reads.
        publish: publishes a probe at each of these targets.
        dead_after_s: how long a message must go unacknowledged. A sweep takes a sixth of it, and
            all of it where there is an orphan.
        patience_s: how long a look waits for something unread. 0 is enough where a dead reader's
            messages come back and stay; an ack deadline where they are handed to it again.
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
        """Find the orphans, and delete them unless it is a dry run.

        Raises:
            PubSubError: the subscriptions can't be listed, or looked into.
        """
        suspects = [
            _Suspect(
                found.name,
                found.labels.get("instance", ""),
                Target(found.topic, found.labels.get("feed", "")),
            )
            async for found in list_subscriptions(self.api, self.topic, self.cluster)
            if found.name not in self.keep
        ]
        dead = await self._judge(suspects)
        orphans = await asyncio.gather(*(self._bury(suspect) for suspect in dead))
        return SweepReport(len(suspects), tuple(orphans), self.dry_run)

    async def _judge(self, suspects: list[_Suspect]) -> list[_Suspect]:
        """Those that nobody reads."""
        undecided = suspects
        end_s = time.monotonic() + 1.5 * self.dead_after_s + 4 * self.patience_s
        looks = 0
        while undecided and time.monotonic() < end_s:
            if looks < EMPTY_LOOKS:  # the first may still be handed to a dead reader
                await self.publish({suspect.target for suspect in undecided})
            looks += 1
            # Not in step with other janitors, who have for a moment what they look at.
            await asyncio.sleep(spread(self._look_every_s, 0.75, 1.25))
            now_s = time.monotonic()
            await asyncio.gather(*(self._look(s) for s in undecided if s.due_s <= now_s))
            undecided = [s for s in undecided if not (s.is_alive or s.is_dead)]
        return [suspect for suspect in suspects if suspect.is_dead]

    async def _look(self, suspect: _Suspect) -> None:
        """See what has gone unread, and give it back."""
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
                suspect.empty_looks = EMPTY_LOOKS  # deleted, by its owner or by another janitor
            elif not error.is_transient:
                raise
            return
        suspect.unread_s = unread_s
        suspect.strikes += unread_s >= self.dead_after_s
        if unread_s < self._look_every_s:  # somebody reads it, or nothing was there to read
            suspect.empty_looks += 1
        else:
            suspect.empty_looks = 0
            suspect.due_s = time.monotonic() + self.dead_after_s - unread_s

    def _age_s(self, published_s: float) -> float:
        """At least how long ago that was, by the service's own clock."""
        now_s = time.monotonic()
        self._server_lead_s = max(self._server_lead_s, published_s - now_s)
        return now_s + self._server_lead_s - published_s

    async def _peek(self, subscription: str, end_s: float) -> list[float]:
        """When the messages were published that wait in ``subscription``, in Unix time.

        Waits for one until ``end_s``.
        """
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
        """Have ``pulled`` delivered at once: if it is a living reader's, it must not wait."""
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

    async def _bury(self, suspect: _Suspect) -> Orphan:
        problem = None
        if not self.dry_run:
            try:
                async with self._calls:
                    await self.api.call("DeleteSubscription", subscription=suspect.name)
            except PubSubError as error:
                problem = None if error.is_missing else str(error)
        deleted = not self.dry_run and problem is None
        return Orphan(suspect.name, suspect.instance, suspect.unread_s, deleted, problem)

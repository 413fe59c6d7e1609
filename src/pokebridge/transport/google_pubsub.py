"""Signals over Google Pub/Sub (docs/transports/google-pubsub.md).

Every subscription of an instance is a Pub/Sub subscription of its own on the one shared topic,
ephemeral and labelled, with a filter when it wants a part only. It is deleted when it is closed;
what a killed instance leaves is found by ``sweep``, which runs after the first ``subscribe``, every
hour, and for the command ``pokebridge janitor``.
"""

import asyncio
import itertools
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import structlog

from pokebridge.errors import ConfigError, TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal
from pokebridge.transport.google_pubsub_api import PubSubApi, PubSubError, PubsubMessage
from pokebridge.transport.google_pubsub_janitor import (
    DEAD_AFTER_S,
    NAME_PREFIX,
    Sweep,
    SweepReport,
    list_subscriptions,
)
from pokebridge.transport.google_pubsub_stream import (
    ACK_DEADLINE_S,
    SHARD_ATTRIBUTE,
    PulledSubscription,
)
from pokebridge.wire import encode_probe

DEFAULT_TOPIC = "push-notifications"
# Google's limits are 1,000 messages and 10 MB; what protobuf adds to a message is allowed for.
MAX_BATCH_MESSAGES = 1000
MAX_BATCH_BYTES = 9_000_000
MESSAGE_OVERHEAD_BYTES = 64
PUBLISH_FOR_S = 10.0
PUBLISH_BACKOFF_BASE_S, PUBLISH_BACKOFF_CAP_S = 0.1, 2.0
COUNT_TTL_S = 30.0
SWEEP_EVERY_S = 3600.0
SWEEP_SPREAD_S = 5.0
AWAIT_REFUSAL_S = 0.5

_TOPIC = re.compile(r"(?!goog)[A-Za-z][A-Za-z0-9._~+%-]{2,254}")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9.:-]*")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

log = structlog.get_logger(__name__)


class GooglePubSubTransport:
    """A transport over one topic of one project. ``connect`` makes one.

    Args:
        api: calls the project.
        topic: the topic's short name.
        instance: names this instance's subscriptions; a label, as ``cluster`` is.
        create_topic: whether a missing topic is created.
        sweep_every_s: how often orphans are looked for once this instance subscribes; ``None``:
            only when ``sweep`` is called.
    """

    def __init__(
        self,
        api: PubSubApi,
        topic: str,
        *,
        instance: str,
        cluster: str,
        create_topic: bool,
        sweep_every_s: float | None,
    ) -> None:
        self._api = api
        self._topic = f"projects/{api.project}/topics/{topic}"
        self._instance = instance
        self._cluster = cluster
        self._may_create_topic = create_topic
        self._sweep_every_s = sweep_every_s
        self._subscriptions: dict[str, PulledSubscription] = {}
        self._spare_numbers = itertools.count(2)
        self._topic_lock = asyncio.Lock()
        self._topic_lives = 0
        self._count: int | None = None
        self._count_good_until_s = 0.0
        self._count_lock = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def connect(
        cls,
        project: str,
        topic: str = DEFAULT_TOPIC,
        *,
        instance: str,
        cluster: str = "default",
        create_topic: bool = True,
        sweep_every_s: float | None = SWEEP_EVERY_S,
        keepalive_s: float | None = None,
    ) -> "GooglePubSubTransport":
        """A transport that has reached Pub/Sub and found, or created, its topic.

        With PUBSUB_EMULATOR_HOST in the environment it speaks to that, else to Google's service
        with the application default credentials. ``keepalive_s``: see ``google_pubsub_api``.

        Raises:
            ConfigError: a name is not valid, there are no credentials, the project is not known,
                or the topic is missing and may not be created.
            TransportError: Pub/Sub can't be reached.
        """
        for value, pattern, what in (
            (project, _PROJECT, "project"),
            (topic, _TOPIC, "topic"),
            (instance, _NAME, "instance name"),
            (cluster, _NAME, "cluster name"),
        ):
            if not pattern.fullmatch(value):
                raise ConfigError(f"pubsub://{project}/{topic}: {value!r} can't be a {what}")
        api = await PubSubApi.connect(project, keepalive_s=keepalive_s)
        transport = cls(
            api,
            topic,
            instance=instance,
            cluster=cluster,
            create_topic=create_topic,
            sweep_every_s=sweep_every_s,
        )
        try:
            await transport._check_topic()
        except BaseException:
            await api.close()
            raise
        return transport

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish ``signals`` in requests of up to 1,000; tries for 10 s each."""
        self._check_open()
        for batch in _batches(signals):
            await self._publish(batch)

    async def subscribe(self, selection: Selection, receiver: Receiver) -> PulledSubscription:
        """Create a subscription and read it; it is deleted when closed."""
        self._check_open()
        name = self._free_name(selection)
        shard = None if isinstance(selection, Feed) else selection
        subscription = self._subscriptions[name] = PulledSubscription(
            self._api,
            name,
            self._topic,
            labels={
                "cluster": self._cluster,
                "instance": self._instance,
                "feed": _feed_label(selection),
            },
            selection=selection,
            receiver=receiver,
            publish=lambda body: self.publish([Signal(body, shard)]),
            with_topic=self._with_topic,
            on_closed=lambda: self._forget(name),
        )
        # Half a second once in an instance's life, to tell a missing permission at its start.
        await_refusal_s = AWAIT_REFUSAL_S if self._sweeper is None else 0.0
        try:
            await subscription.open(await_refusal_s=await_refusal_s)
        except BaseException:
            await subscription.close()
            raise
        self._count_good_until_s = 0.0
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep_regularly())
        return subscription

    async def subscriber_count(self) -> int | None:
        """How many subscriptions take everything, at most 30 s old; orphans are among them.

        ``None`` when this account may not list the project's subscriptions.
        """
        self._check_open()
        async with self._count_lock:
            if self._loop_time() >= self._count_good_until_s:
                listed = list_subscriptions(self._api, self._topic, self._cluster)
                try:
                    self._count = len(
                        [
                            found
                            async for found in listed
                            if found.labels.get("feed") == Feed.ALL.value
                        ]
                    )
                except PubSubError as error:
                    log.warning("subscribers not counted", reason=str(error))
                    self._count = None
                self._count_good_until_s = self._loop_time() + COUNT_TTL_S
            return self._count

    async def sweep(
        self, *, dry_run: bool = False, dead_after_s: float = DEAD_AFTER_S
    ) -> SweepReport:
        """Find, and delete, the subscriptions of this cluster that nobody reads.

        Takes about 10 s, a minute when it finds one, and longer on Google's emulator.

        Raises:
            TransportError: they can't be listed, probed or looked into.
        """
        self._check_open()
        sweep = Sweep(
            self._api,
            self._topic,
            self._cluster,
            keep=self._subscriptions.keys(),
            publish=self._publish_probes,
            dead_after_s=dead_after_s,
            dry_run=dry_run,
            patience_s=ACK_DEADLINE_S + 1 if self._api.is_emulator else 0.0,
        )
        report = await sweep.run()
        self._count_good_until_s = 0.0
        for orphan in report.orphans:
            log.warning("orphaned subscription", **orphan._asdict())
        return report

    async def close(self) -> None:
        """Delete this instance's subscriptions and close the connections."""
        if self._closed:
            return
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await asyncio.gather(*(s.close() for s in tuple(self._subscriptions.values())))
        await self._api.close()

    # --- the topic ------------------------------------------------------------------------------

    async def _check_topic(self) -> None:
        try:
            await self._api.call("GetTopic", topic=self._topic)
        except PubSubError as error:
            if error.is_denied:  # a publisher's account may not look; publishing will tell
                log.info("topic not checked", reason=str(error))
            elif not error.is_missing:
                raise
            elif "project not found" in str(error).lower():
                raise ConfigError(f"project {self._api.project} is not known: {error}") from None
            elif not self._may_create_topic:
                raise ConfigError(f"{self._topic} does not exist") from None
            else:
                await self._create_missing_topic()

    async def _create_missing_topic(self) -> None:
        try:
            await self._create_topic()
        except PubSubError as error:
            if not error.is_denied:
                raise
            raise ConfigError(f"{self._topic} does not exist: create it, or {error}") from None

    async def _create_topic(self) -> None:
        try:
            await self._api.call("CreateTopic", name=self._topic)
        except PubSubError as error:
            if not error.is_taken:
                raise
        else:
            log.info("topic created", topic=self._topic)

    async def _with_topic(self, call: Callable[[], Awaitable[None]]) -> None:
        """Do ``call``; where it fails because the topic is missing, restore that and do it again.

        Subscriptions stay attached to a deleted topic when another takes its name, and hear
        nothing: so all of them are made anew.
        """
        lives = self._topic_lives
        try:
            return await call()
        except PubSubError as error:
            if not (error.is_missing and self._may_create_topic):
                raise
        async with self._topic_lock:
            if self._topic_lives == lives:  # nobody else has restored it meanwhile
                await self._create_topic()
                self._topic_lives += 1
                for subscription in self._subscriptions.values():
                    subscription.lose("the topic was deleted")
        return await call()

    # --- publishing -----------------------------------------------------------------------------

    async def _publish(self, batch: list[Any]) -> None:
        end_s = self._loop_time() + PUBLISH_FOR_S
        cap_s = PUBLISH_BACKOFF_BASE_S
        publish = partial(self._api.call, "Publish", topic=self._topic, messages=batch)
        while True:
            try:
                return await self._with_topic(publish)
            except PubSubError as error:
                if not error.is_transient or self._loop_time() + cap_s > end_s:
                    raise
            await asyncio.sleep(random.uniform(0, cap_s))  # noqa: S311 - spreads load
            cap_s = min(2 * cap_s, PUBLISH_BACKOFF_CAP_S)

    async def _publish_probes(self, feeds: Iterable[str]) -> None:
        """A probe that each of ``feeds`` selects; one without a shard does for both others."""
        shards = {int(feed) if feed.isdigit() else None for feed in feeds}
        probe = encode_probe(f"janitor:{self._instance}")
        await self.publish([Signal(probe, shard) for shard in shards])

    # --- subscriptions --------------------------------------------------------------------------

    def _free_name(self, selection: Selection) -> str:
        """``poke-sub-<instance>[.<shard>|.untagged]``; a second one at the same time gets a number.

        Instance names have no dot, so that no two instances can mean the same name.
        """
        base = f"projects/{self._api.project}/subscriptions/{NAME_PREFIX}{self._instance}"
        if selection is not Feed.ALL:
            base += f".{_feed_label(selection)}"
        name = base
        while name in self._subscriptions:
            name = f"{base}~{next(self._spare_numbers)}"
        return name

    def _forget(self, name: str) -> None:
        self._subscriptions.pop(name, None)
        self._count_good_until_s = 0.0

    async def _sweep_regularly(self) -> None:
        every_s = self._sweep_every_s
        if every_s is None:
            return
        pause_s = random.uniform(0, SWEEP_SPREAD_S)  # noqa: S311 - spreads load
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self.sweep()
            except TransportError as error:
                log.warning("sweep failed", reason=str(error))
            pause_s = random.uniform(0.9, 1.1) * every_s  # noqa: S311 - spreads load

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the Pub/Sub transport is closed")

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()


def _feed_label(selection: Selection) -> str:
    return selection.value if isinstance(selection, Feed) else str(selection)


def _batches(signals: Sequence[Signal]) -> Iterator[list[Any]]:
    """``signals`` as messages, in batches that one request may carry."""
    batch: list[Any] = []
    size_bytes = 0
    for body, shard in signals:
        message_bytes = len(body) + MESSAGE_OVERHEAD_BYTES
        if batch and (
            len(batch) == MAX_BATCH_MESSAGES or size_bytes + message_bytes > MAX_BATCH_BYTES
        ):
            yield batch
            batch, size_bytes = [], 0
        attributes = {} if shard is None else {SHARD_ATTRIBUTE: str(shard)}
        batch.append(PubsubMessage(data=body, attributes=attributes))
        size_bytes += message_bytes
    if batch:
        yield batch

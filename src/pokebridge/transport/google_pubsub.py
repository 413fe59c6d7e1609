"""Signals over Google Pub/Sub (docs/transports/google-pubsub.md).

Every subscription of an instance is its own Pub/Sub subscription, ephemeral and labelled. With the
carrier ``filter`` it is attached to the one shared topic, and has a filter unless it takes
everything. With the carrier ``topic`` each shard has a topic. A cluster that is not called
``default`` has topics of its own. The subscription is deleted when it is closed. ``sweep`` deletes
what killed instances leave behind. It runs after the first ``subscribe``, every hour, and in the
command ``pokebridge janitor``.
"""

import asyncio
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import structlog

from pokebridge.backoff import spread
from pokebridge.errors import ConfigError, SignalRefusedError, TransportError
from pokebridge.sharding import DEFAULT_SHARD_COUNT
from pokebridge.supervisor import cancel, supervise
from pokebridge.transport.base import (
    Carrier,
    Feed,
    Receiver,
    Selection,
    Signal,
    Subscription,
)
from pokebridge.transport.google_pubsub_api import PubSubApi, PubSubError
from pokebridge.transport.google_pubsub_subscription import (
    ACK_DEADLINE_S,
    PulledSubscription,
    Source,
)
from pokebridge.transport.google_pubsub_sweep import (
    DEAD_AFTER_S,
    NAME_PREFIX,
    Sweep,
    SweepReport,
    Target,
)
from pokebridge.transport.google_pubsub_topic import MAX_BATCH_BYTES, MESSAGE_OVERHEAD_BYTES, Topic
from pokebridge.transport.names import DEFAULT_CLUSTER, DEFAULT_TOPIC, topic_of
from pokebridge.wire import encode_probe

SWEEP_EVERY_S = 3600.0
SWEEP_SPREAD_S = 5.0
AWAIT_REFUSAL_S = 0.5

_TOPIC = re.compile(r"(?!goog)[A-Za-z][A-Za-z0-9._~+%-]{2,254}")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9.:-]*")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

log = structlog.get_logger(__name__)


class GooglePubSubTransport:
    """A transport over a topic, and optionally one for each shard. Create it with ``connect``.

    Args:
        api: calls the project.
        topic: the shared topic's short name, in the cluster ``default``.
        instance: part of the names of this instance's subscriptions, and their label.
        cluster: the cluster whose signals are sent and received. Its name is part of the
            topics' names, and a label of the subscriptions.
        carrier: with ``topic`` each shard has its own topic.
        shard_count: the number of shards.
        create_topic: whether missing topics are created.
        sweep_every_s: how often this instance sweeps, once it subscribes. ``None``: never.
    """

    is_shared = True
    max_signal_bytes = MAX_BATCH_BYTES - MESSAGE_OVERHEAD_BYTES

    def __init__(
        self,
        api: PubSubApi,
        topic: str,
        *,
        instance: str,
        cluster: str,
        carrier: Carrier,
        shard_count: int,
        create_topic: bool,
        sweep_every_s: float | None,
    ) -> None:
        self._api = api
        self._instance = instance
        self._cluster = cluster
        self._carrier = carrier
        self._shard_count = shard_count
        self._may_create_topic = create_topic
        self._sweep_every_s = sweep_every_s
        # The topics used so far, by full name, and the shared one.
        self._topics: dict[str, Topic] = {}
        self._shared = self._topic_named(
            f"projects/{api.project}/topics/{topic_of(cluster, topic)}"
        )
        # Open subscriptions by the full name that each got first, and numbers for names in use.
        self._subscriptions: dict[str, PulledSubscription] = {}
        self._spare_numbers = itertools.count(2)
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def connect(
        cls,
        project: str,
        topic: str = DEFAULT_TOPIC,
        *,
        instance: str,
        cluster: str = DEFAULT_CLUSTER,
        carrier: Carrier = "filter",
        shard_count: int = DEFAULT_SHARD_COUNT,
        create_topic: bool = True,
        sweep_every_s: float | None = SWEEP_EVERY_S,
        keepalive_s: float | None = None,
    ) -> "GooglePubSubTransport":
        """Connect, and find or create the shared topic.

        The server is the one that PUBSUB_EMULATOR_HOST names, or else Google's service, with the
        application default credentials. ``keepalive_s``: see :meth:`.PubSubApi.connect`.

        Raises:
            ConfigError: a name is invalid, there are no credentials, the project is unknown, or the
                topic is missing and may not be created.
            TransportError: Pub/Sub is unreachable.
        """
        longest = topic_of(cluster, topic)
        if carrier == "topic":
            longest += f"-{shard_count - 1}"
        for value, pattern, what in (
            (project, _PROJECT, "project"),
            (instance, _NAME, "instance name"),
            (cluster, _NAME, "cluster name"),
            (topic, _TOPIC, "topic"),
            (longest, _TOPIC, "topic"),
        ):
            if not pattern.fullmatch(value):
                raise ConfigError(f"pubsub://{project}/{topic}: {value!r} is not a valid {what}")
        api = await PubSubApi.connect(project, keepalive_s=keepalive_s)
        transport = cls(
            api,
            topic,
            instance=instance,
            cluster=cluster,
            carrier=carrier,
            shard_count=shard_count,
            create_topic=create_topic,
            sweep_every_s=sweep_every_s,
        )
        try:
            await transport._shared.check()
        except BaseException:
            await api.close()
            raise
        return transport

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish ``signals``, in requests of up to 1,000, each of which is tried for 10 s."""
        self._check_open()
        by_topic: dict[Topic, list[Signal]] = {}
        for signal in signals:
            by_topic.setdefault(self._topic(signal.shard), []).append(signal)
        publishing = (topic.publish(batch) for topic, batch in by_topic.items())
        for outcome in await asyncio.gather(*publishing, return_exceptions=True):
            if isinstance(outcome, PubSubError) and not outcome.is_transient:
                raise SignalRefusedError(str(outcome)) from outcome
            if outcome is not None:
                raise outcome

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Create a subscription for ``selection`` and read it. Closing it deletes it."""
        self._check_open()
        if self._carrier == "topic" and selection is Feed.ALL:
            return await self._subscribe_to_every_topic(receiver)
        return await self._subscribe(self._source(selection), receiver)

    async def sweep(
        self, *, dry_run: bool = False, dead_after_s: float = DEAD_AFTER_S
    ) -> SweepReport:
        """Find and delete the subscriptions of this cluster that have no reader.

        This takes about 10 s, a minute if there is one, and longer on Google's emulator.

        Raises:
            TransportError: listing, probing or pulling was refused.
        """
        self._check_open()
        sweep = Sweep(
            self._api,
            self._shared.name,
            self._cluster,
            keep={each.name for each in self._subscriptions.values()},
            publish=self._publish_probes,
            dead_after_s=dead_after_s,
            dry_run=dry_run,
            patience_s=ACK_DEADLINE_S + 1 if self._api.is_emulator else 0.0,
        )
        report = await sweep.run()
        for orphan in report.orphans:
            log.warning("pubsub_subscription_orphaned", **orphan._asdict())
        return report

    async def close(self) -> None:
        """Delete this instance's subscriptions and close the connections."""
        if self._closed:
            return
        self._closed = True
        await cancel(self._sweeper)
        await asyncio.gather(*(s.close() for s in tuple(self._subscriptions.values())))
        await self._api.close()

    # --- topics ---------------------------------------------------------------------------------

    def _topic(self, shard: int | None) -> Topic:
        """The topic for signals of ``shard``, or for signals without a shard (``None``)."""
        if shard is None or self._carrier == "filter":
            return self._shared
        # A cluster may be called red-42, so a hyphen would not tell its topic from a shard's.
        separator = "-" if self._cluster == DEFAULT_CLUSTER else "."
        return self._topic_named(f"{self._shared.name}{separator}{shard}")

    def _topic_named(self, name: str) -> Topic:
        if name not in self._topics:
            self._topics[name] = Topic(self._api, name, may_create=self._may_create_topic)
        return self._topics[name]

    async def _publish_probes(self, targets: Iterable[Target]) -> None:
        """Publish one probe for each topic and tag among ``targets``."""
        body = encode_probe(f"janitor:{self._instance}")
        probes = {(at, Signal(body, int(feed) if feed.isdigit() else None)) for at, feed in targets}
        await asyncio.gather(*(self._topic_named(at).publish([probe]) for at, probe in probes))

    # --- subscriptions --------------------------------------------------------------------------

    def _source(self, selection: Selection) -> Source:
        """The topic of ``selection``, and what to take from it.

        With a topic for each shard nothing is filtered. So whatever others publish on the shared
        topic, tagged or not, reaches all subscriptions for signals without a shard.
        """
        shard = None if isinstance(selection, Feed) else selection
        wanted = selection if self._carrier == "filter" else Feed.ALL
        return Source(self._topic(shard), wanted, selection, shard)

    async def _subscribe(self, source: Source, receiver: Receiver) -> PulledSubscription:
        subscription = self._pulled(source, receiver)
        # Half a second at an instance's first subscription, to report a missing permission then.
        await_refusal_s = AWAIT_REFUSAL_S if self._sweeper is None else 0.0
        try:
            await subscription.open(await_refusal_s=await_refusal_s)
        except BaseException:
            await subscription.close()
            raise
        if self._sweeper is None:
            self._sweeper = supervise("pubsub_sweep", self._sweep_regularly)
        return subscription

    async def _subscribe_to_every_topic(self, receiver: Receiver) -> Subscription:
        shards = range(self._shard_count)
        whole = _EveryTopic(receiver, shards)
        shared = await self._subscribe(self._source(Feed.ALL), whole.of_shared_topic)
        whole.parts.append(shared)
        for shard in shards:
            source = Source(self._topic(shard), Feed.ALL, Feed.ALL, shard)
            part = self._pulled(source, whole.of_shard(shard))
            whole.parts.append(part)
            part.open_later()
        return whole

    def _pulled(self, source: Source, receiver: Receiver) -> PulledSubscription:
        feed = _feed_label(source.selection if source.shard is None else source.shard)
        name = self._free_name(feed)
        subscription = self._subscriptions[name] = PulledSubscription(
            self._api,
            name,
            source,
            receiver,
            labels={"cluster": self._cluster, "instance": self._instance, "feed": feed},
            on_closed=partial(self._subscriptions.pop, name),
        )
        return subscription

    def _free_name(self, feed: str) -> str:
        """Return ``poke-sub-<instance>[.<shard>|.untagged]``, with a number if that is in use.

        Instance names contain no dot, so names of different instances differ.
        """
        base = f"projects/{self._api.project}/subscriptions/{NAME_PREFIX}{self._instance}"
        if feed != Feed.ALL.value:
            base += f".{feed}"
        name = base
        while name in self._subscriptions:
            name = f"{base}~{next(self._spare_numbers)}"
        return name

    async def _sweep_regularly(self) -> None:
        every_s = self._sweep_every_s
        if every_s is None:
            return
        pause_s = spread(SWEEP_SPREAD_S, 0.0, 1.0)
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self.sweep()
            except TransportError as error:
                log.warning("pubsub_sweep_failed", reason=str(error))
            pause_s = spread(every_s, 0.9, 1.1)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the Pub/Sub transport is closed")


class _EveryTopic:
    """Subscriptions to the shared topic and to every shard's, as one subscription.

    A probe that asks whether all of it delivers arrives through the shared topic only. So signals
    from the shared topic are held back until each shard's subscription is proven to deliver.
    """

    def __init__(self, receiver: Receiver, shards: Iterable[int]) -> None:
        self.parts: list[PulledSubscription] = []
        self._receiver = receiver
        self._unproven = set(shards)

    @property
    def of_shared_topic(self) -> Receiver:
        """The receiver for the shared topic."""
        return _PartReceiver(self._from_shared_topic, self._receiver.on_gap)

    def of_shard(self, shard: int) -> Receiver:
        """The receiver for the shard's topic."""

        def on_gap(selection: Selection, reason: str) -> None:
            if shard in self._unproven:
                self._unproven.remove(shard)
            else:
                self._receiver.on_gap(selection, reason)

        return _PartReceiver(self._receiver.on_signal, on_gap)

    @property
    def trouble(self) -> str | None:
        """The trouble of the first subscription that has one."""
        return next((part.trouble for part in self.parts if part.trouble), None)

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in self.parts))

    def _from_shared_topic(self, body: bytes, tag: str | None) -> None:
        if not self._unproven:
            self._receiver.on_signal(body, tag)


class _PartReceiver(NamedTuple):
    on_signal: Callable[[bytes, str | None], None]
    on_gap: Callable[[Selection, str], None]


def _feed_label(selection: Selection) -> str:
    return selection.value if isinstance(selection, Feed) else str(selection)

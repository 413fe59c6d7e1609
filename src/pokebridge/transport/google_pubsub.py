"""Signals over Google Pub/Sub (docs/transports/google-pubsub.md).

Every subscription of an instance is a Pub/Sub subscription of its own, ephemeral and labelled, on
the one shared topic, with a filter when it wants a part only (carrier ``filter``), or on a shard's
own topic (carrier ``topic``). It is deleted when it is closed; what a killed instance leaves is
found by ``sweep``, which runs after the first ``subscribe``, every hour, and for the command
``pokebridge janitor``.
"""

import asyncio
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import structlog

from pokebridge.backoff import spread
from pokebridge.errors import ConfigError, TransportError
from pokebridge.sharding import DEFAULT_SHARD_COUNT
from pokebridge.transport.base import (
    Carrier,
    Feed,
    Receiver,
    Selection,
    Signal,
    Subscription,
)
from pokebridge.transport.google_pubsub_api import PubSubApi
from pokebridge.transport.google_pubsub_janitor import (
    DEAD_AFTER_S,
    NAME_PREFIX,
    Sweep,
    SweepReport,
    Target,
)
from pokebridge.transport.google_pubsub_stream import ACK_DEADLINE_S, PulledSubscription, Source
from pokebridge.transport.google_pubsub_topic import Topic
from pokebridge.wire import encode_probe

DEFAULT_TOPIC = "push-notifications"
SWEEP_EVERY_S = 3600.0
SWEEP_SPREAD_S = 5.0
AWAIT_REFUSAL_S = 0.5

_TOPIC = re.compile(r"(?!goog)[A-Za-z][A-Za-z0-9._~+%-]{2,254}")
_PROJECT = re.compile(r"[a-z0-9][a-z0-9.:-]*")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

log = structlog.get_logger(__name__)


class GooglePubSubTransport:
    """A transport over one topic of one project, or over it and one a shard. ``connect`` makes one.

    Args:
        api: calls the project.
        topic: the shared topic's short name.
        instance: names this instance's subscriptions; a label, as ``cluster`` is.
        carrier: ``topic`` gives each shard a topic of its own, ``<topic>-<shard>``.
        shard_count: how many of those everything is.
        create_topic: whether missing topics are created.
        sweep_every_s: how often orphans are looked for once this instance subscribes; ``None``:
            only when ``sweep`` is called.
    """

    is_shared = True

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
        self._topics: dict[str, Topic] = {}
        self._shared = self._topic_named(f"projects/{api.project}/topics/{topic}")
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
        cluster: str = "default",
        carrier: Carrier = "filter",
        shard_count: int = DEFAULT_SHARD_COUNT,
        create_topic: bool = True,
        sweep_every_s: float | None = SWEEP_EVERY_S,
        keepalive_s: float | None = None,
    ) -> "GooglePubSubTransport":
        """A transport that has reached Pub/Sub and found, or created, its shared topic.

        With PUBSUB_EMULATOR_HOST in the environment it speaks to that, else to Google's service
        with the application default credentials. ``keepalive_s``: see ``google_pubsub_api``.

        Raises:
            ConfigError: a name is not valid, there are no credentials, the project is not known,
                or the topic is missing and may not be created.
            TransportError: Pub/Sub can't be reached.
        """
        longest = topic if carrier == "filter" else f"{topic}-{shard_count - 1}"
        for value, pattern, what in (
            (project, _PROJECT, "project"),
            (longest, _TOPIC, "topic"),
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
        """Publish ``signals``, in requests of up to 1,000 for each topic; tries for 10 s each."""
        self._check_open()
        by_topic: dict[Topic, list[Signal]] = {}
        for signal in signals:
            by_topic.setdefault(self._topic(signal.shard), []).append(signal)
        publishing = (topic.publish(batch) for topic, batch in by_topic.items())
        for outcome in await asyncio.gather(*publishing, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Create what ``selection`` takes and read it; it is deleted when closed."""
        self._check_open()
        if self._carrier == "topic" and selection is Feed.ALL:
            return await self._subscribe_to_every_topic(receiver)
        return await self._subscribe(self._source(selection), receiver)

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
            self._shared.name,
            self._cluster,
            keep=self._subscriptions.keys(),
            publish=self._publish_probes,
            dead_after_s=dead_after_s,
            dry_run=dry_run,
            patience_s=ACK_DEADLINE_S + 1 if self._api.is_emulator else 0.0,
        )
        report = await sweep.run()
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

    # --- topics ---------------------------------------------------------------------------------

    def _topic(self, shard: int | None) -> Topic:
        """Where signals of ``shard`` are published; ``None``: those without one."""
        return self._topic_named(
            self._shared.name
            if shard is None or self._carrier == "filter"
            else f"{self._shared.name}-{shard}"
        )

    def _topic_named(self, name: str) -> Topic:
        if name not in self._topics:
            self._topics[name] = Topic(self._api, name, may_create=self._may_create_topic)
        return self._topics[name]

    async def _publish_probes(self, targets: Iterable[Target]) -> None:
        """A probe that each of ``targets`` gets; one without a tag does for all without a shard."""
        body = encode_probe(f"janitor:{self._instance}")
        probes = {(at, Signal(body, int(feed) if feed.isdigit() else None)) for at, feed in targets}
        await asyncio.gather(*(self._topic_named(at).publish([probe]) for at, probe in probes))

    # --- subscriptions --------------------------------------------------------------------------

    def _source(self, selection: Selection) -> Source:
        """Where ``selection`` comes from.

        With topics of their own nothing is filtered: what somebody else publishes on the shared
        topic, with a tag or without, is heard by all who take what has no shard.
        """
        shard = None if isinstance(selection, Feed) else selection
        wanted = selection if self._carrier == "filter" else Feed.ALL
        return Source(self._topic(shard), wanted, selection, shard)

    async def _subscribe(self, source: Source, receiver: Receiver) -> PulledSubscription:
        subscription = self._pulled(source, receiver)
        # Half a second once in an instance's life, to tell a missing permission at its start.
        await_refusal_s = AWAIT_REFUSAL_S if self._sweeper is None else 0.0
        try:
            await subscription.open(await_refusal_s=await_refusal_s)
        except BaseException:
            await subscription.close()
            raise
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep_regularly())
        return subscription

    async def _subscribe_to_every_topic(self, receiver: Receiver) -> Subscription:
        shards = range(self._shard_count)
        whole = _Whole(receiver, shards)
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
        """``poke-sub-<instance>[.<shard>|.untagged]``; a second one at the same time gets a number.

        Instance names have no dot, so that no two instances can mean the same name.
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
                log.warning("sweep failed", reason=str(error))
            pause_s = spread(every_s, 0.9, 1.1)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the Pub/Sub transport is closed")


class _Whole:
    """Everything, where each shard has a topic: the shared topic's subscription and one a shard.

    Whoever asks by a probe whether all this delivers gets it through the shared topic alone. So
    nothing of that is passed on before each of the others has been proven to deliver.
    """

    def __init__(self, receiver: Receiver, shards: Iterable[int]) -> None:
        self.parts: list[PulledSubscription] = []
        self._receiver = receiver
        self._unproven = set(shards)

    @property
    def of_shared_topic(self) -> Receiver:
        """Who hears the shared topic."""
        return _PartReceiver(self._from_shared_topic, self._receiver.on_gap)

    def of_shard(self, shard: int) -> Receiver:
        """Who hears the shard's topic."""

        def on_gap(selection: Selection, reason: str) -> None:
            if shard in self._unproven:
                self._unproven.remove(shard)
            else:
                self._receiver.on_gap(selection, reason)

        return _PartReceiver(self._receiver.on_signal, on_gap)

    @property
    def trouble(self) -> str | None:
        """What goes wrong with one of them."""
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

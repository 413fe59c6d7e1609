"""A queue of each engine, as a test sees it: publish, read, and look at the dead letters."""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import nats
from google.api_core.exceptions import DeadlineExceeded
from google.pubsub_v1.types import PubsubMessage
from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from pokebridge.ingress.base import Source
from pokebridge.ingress.google_pubsub import GooglePubSubSource
from pokebridge.ingress.nats import NatsSource
from tests.transport.pubsub_world import World


class DeadLetter(NamedTuple):
    """A message that was put aside."""

    body: bytes
    reason: str


class Queue(Protocol):
    """What all of them can do."""

    url: str

    async def publish(self, *bodies: bytes) -> None:
        """Put messages in."""

    async def source(self) -> Source:
        """Another process's end."""

    async def dead_letters(self) -> Sequence[DeadLetter]:
        """What was put aside so far; each is shown once."""

    async def delete_dead_letters(self) -> None:
        """Delete what keeps them."""

    async def close(self) -> None:
        """Disconnect all."""


class NatsQueue:
    """A stream of its own on a NATS server with JetStream."""

    def __init__(self, server_url: str, client: Client, stream: str, cluster: str) -> None:
        self._client = client
        self._jetstream = client.jetstream()
        name = secrets.token_hex(4)
        self.cluster = cluster or f"test-{name}"
        self.stream = stream or f"ORDERS-{name}"
        self.subject = f"orders-{name}.paid"
        self.url = f"{server_url}/{self.stream}/{self.subject}"
        self._sources: list[Source] = []
        self._seen = 0

    @classmethod
    async def make(cls, server_url: str, stream: str = "", cluster: str = "") -> "NatsQueue":
        """A new stream, by default of a name of its own. It survives the server's restart."""
        client = await nats.connect(server_url, max_reconnect_attempts=-1, reconnect_time_wait=0.05)
        queue = cls(server_url, client, stream, cluster)
        subjects = [queue.subject.replace("paid", "*")]
        await queue._jetstream.add_stream(name=queue.stream, subjects=subjects)
        return queue

    async def publish(self, *bodies: bytes) -> None:
        """Put messages in."""
        for body in bodies:
            await self._jetstream.publish(self.subject, body)

    async def make_consumer(self, *, ack_wait_s: float) -> None:
        """Make the processors' consumer, as an operator may, with a shorter wait for acks."""
        config = ConsumerConfig(
            durable_name=f"pokebridge-{self.cluster}",
            filter_subject=self.subject,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ack_wait_s,
        )
        await self._jetstream.add_consumer(self.stream, config)

    async def publish_beside(self, body: bytes) -> None:
        """Put a message into the stream under another subject."""
        await self._jetstream.publish(self.subject.replace("paid", "lost"), body)

    async def source(self) -> Source:
        """Another process's end."""
        self._sources.append(NatsSource(self.url, cluster=self.cluster))
        return self._sources[-1]

    async def dead_letters(self) -> Sequence[DeadLetter]:
        """What was put aside so far; each is shown once."""
        stream = f"pokebridge-{self.cluster}-dead-letters"
        found = []
        try:
            last = (await self._jetstream.stream_info(stream)).state.last_seq
        except NotFoundError:
            return []
        while self._seen < last:
            self._seen += 1
            message = await self._jetstream.get_msg(stream, self._seen)
            headers: Mapping[str, str] = message.headers or {}
            found.append(DeadLetter(message.data or b"", headers["Pokebridge-Reason"]))
        return found

    async def delete_dead_letters(self) -> None:
        """Delete what keeps them."""
        await self._jetstream.delete_stream(f"pokebridge-{self.cluster}-dead-letters")
        self._seen = 0

    async def unacked(self) -> int:
        """Messages that the engine would deliver again."""
        info = await self._jetstream.consumer_info(self.stream, f"pokebridge-{self.cluster}")
        return (info.num_ack_pending or 0) + (info.num_pending or 0)

    async def close(self) -> None:
        """Disconnect all."""
        for source in self._sources:
            await source.close()
        await self._client.close()


class PubSubQueue:
    """A subscription in a project of its own, on whatever speaks Pub/Sub's protocol."""

    def __init__(self, address: str) -> None:
        self._world = World(address)
        self._sources: list[Source] = []
        self.url = f"pubsub://{self._world.project}/orders"

    @classmethod
    async def make(cls, address: str) -> "PubSubQueue":
        """A new topic and a subscription to it."""
        queue = cls(address)
        world = queue._world
        await world.publisher.create_topic(name=queue._topic)
        name = f"projects/{world.project}/subscriptions/orders"
        await world.subscriber.create_subscription(
            request={"name": name, "topic": queue._topic, "ack_deadline_seconds": 10}
        )
        return queue

    @property
    def _topic(self) -> str:
        return f"projects/{self._world.project}/topics/orders-topic"

    @property
    def _dead_subscription(self) -> str:
        return f"projects/{self._world.project}/subscriptions/orders-dead-letters"

    async def delete_dead_letters(self) -> None:
        """Delete what keeps them."""
        await self._world.subscriber.delete_subscription(subscription=self._dead_subscription)

    async def delete_dead_topic(self) -> None:
        """Delete the topic of the dead letters, and leave the subscription."""
        topic = f"projects/{self._world.project}/topics/orders-dead-letters"
        await self._world.publisher.delete_topic(topic=topic)

    async def publish(self, *bodies: bytes) -> None:
        """Put messages in."""
        messages = [PubsubMessage(data=body) for body in bodies]
        await self._world.publisher.publish(topic=self._topic, messages=messages)

    async def source(self) -> Source:
        """Another process's end; the caller has set PUBSUB_EMULATOR_HOST."""
        self._sources.append(await GooglePubSubSource.connect(self.url))
        return self._sources[-1]

    async def dead_letters(self) -> Sequence[DeadLetter]:
        """What was put aside so far; each is shown once."""
        name = self._dead_subscription
        if name.rpartition("/")[2] not in await self._world.subscriptions():
            return []
        try:
            answer = await self._world.subscriber.pull(
                subscription=name, max_messages=100, timeout=5, retry=None
            )
        except DeadlineExceeded:
            return []
        ids = [received.ack_id for received in answer.received_messages]
        if ids:
            await self._world.subscriber.acknowledge(subscription=name, ack_ids=ids)
        return [
            DeadLetter(received.message.data, received.message.attributes["pokebridge_reason"])
            for received in answer.received_messages
        ]

    async def close(self) -> None:
        """Disconnect all."""
        await asyncio.gather(*(source.close() for source in self._sources))
        await self._world.channel.close()

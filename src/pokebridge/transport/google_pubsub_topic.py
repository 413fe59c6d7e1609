"""A topic of Google Pub/Sub: publishes to it, and creates it when it is missing."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import structlog

from pokebridge.backoff import backoff_s
from pokebridge.errors import ConfigError
from pokebridge.transport.base import Signal
from pokebridge.transport.google_pubsub_api import PubSubApi, PubSubError, PubsubMessage

SHARD_ATTRIBUTE = "shard"
# Google's limits are 1,000 messages and 10 MB. The overhead covers what protobuf adds.
MAX_BATCH_MESSAGES = 1000
MAX_BATCH_BYTES = 9_000_000
MESSAGE_OVERHEAD_BYTES = 64
PUBLISH_FOR_S = 10.0
PUBLISH_BACKOFF_BASE_S, PUBLISH_BACKOFF_CAP_S = 0.1, 2.0

log = structlog.get_logger(__name__)


class Attached(Protocol):
    """A subscription that is attached to a topic."""

    def lose(self, reason: str) -> None:
        """Create the subscription anew and report a gap."""


class Topic:
    """One topic, by its full resource ``name``. ``may_create``: create it when it is missing."""

    def __init__(self, api: PubSubApi, name: str, *, may_create: bool) -> None:
        self.name = name
        self.attached: set[Attached] = set()
        """The subscriptions to tell when the topic was deleted."""
        self._api = api
        self._may_create = may_create
        self._lock = asyncio.Lock()
        # How often the topic was created again.
        self._lives = 0

    async def check(self) -> None:
        """Make sure that the topic exists.

        Raises:
            ConfigError: the project is unknown, or the topic is missing and may not be created.
            PubSubError: Pub/Sub is unreachable, or refuses.
        """
        try:
            await self._api.call("GetTopic", topic=self.name)
        except PubSubError as error:
            if error.is_denied:  # a publisher's account need not have this permission
                log.info("pubsub_topic_unchecked", reason=str(error))
            elif not error.is_missing:
                raise
            elif "project not found" in str(error).lower():
                raise ConfigError(f"project {self._api.project} is unknown: {error}") from None
            elif not self._may_create:
                raise ConfigError(f"{self.name} does not exist, and may not be created") from None
            else:
                await self._create_missing()

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish in requests of up to 1,000 signals, each of which is tried for 10 s.

        Raises:
            PubSubError: Pub/Sub is unreachable, or refuses.
        """
        for batch in _batches(signals):
            await self._publish(batch)

    async def needed_by(self, call: Callable[[], Awaitable[None]]) -> None:
        """Await ``call``. If the topic is missing, create it and await ``call`` again.

        Existing subscriptions stay attached to the deleted topic, and receive nothing from a new
        one of the same name. So all of them are created anew.
        """
        lives = self._lives
        try:
            return await call()
        except PubSubError as error:
            if not (error.is_missing and self._may_create):
                raise
        async with self._lock:
            if self._lives == lives:  # nobody has created it meanwhile
                await self._create()
                self._lives += 1
                for subscription in tuple(self.attached):
                    subscription.lose("the topic was deleted")
        return await call()

    async def _create_missing(self) -> None:
        try:
            await self._create()
        except PubSubError as error:
            if not error.is_denied:
                raise
            raise ConfigError(f"{self.name} does not exist: create it, or {error}") from None

    async def _create(self) -> None:
        try:
            await self._api.call("CreateTopic", name=self.name)
        except PubSubError as error:
            if not error.is_taken:
                raise
        else:
            log.info("pubsub_topic_created", topic=self.name)

    async def _publish(self, batch: list[Any]) -> None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + PUBLISH_FOR_S
        failures = 0
        publish = partial(self._api.call, "Publish", topic=self.name, messages=batch)
        while True:
            pause_s = backoff_s(
                failures, first_s=PUBLISH_BACKOFF_BASE_S, cap_s=PUBLISH_BACKOFF_CAP_S
            )
            try:
                return await self.needed_by(publish)
            except PubSubError as error:
                if not error.is_transient or loop.time() + pause_s > end_s:
                    raise
            failures += 1
            await asyncio.sleep(pause_s)


def _batches(signals: Sequence[Signal]) -> Iterator[list[Any]]:
    """Convert ``signals`` to messages, in batches within the limits of a request."""
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

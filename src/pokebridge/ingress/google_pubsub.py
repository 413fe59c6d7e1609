"""Ingress from a Google Pub/Sub subscription (docs/ingress.md).

Messages that can't be committed go to the topic SUBSCRIPTION-dead-letters, and are kept by a
subscription of the same name. Both are created when they are missing.
"""

import re
from collections.abc import Sequence
from typing import Any, Final, Self

from pokebridge.errors import ConfigError, TransportError
from pokebridge.ingress.base import DEAD_BODY_BYTES, Delivery
from pokebridge.transport.google_pubsub_api import PubSubApi, PubSubError, PubsubMessage

# The server ends an empty pull long before this. A pull that is given up here may have been given
# messages, which are delivered again after their ack deadline.
FETCH_S: Final = 120.0
DEAD_KEPT_S: Final = 7 * 24 * 3600
_NAME = re.compile(r"[A-Za-z][\w.~+%-]{2,200}")
# An attribute's value may have 1,024 bytes, and a character has at most four.
_MAX_REASON = 250


class GooglePubSubSource:
    """Messages of a subscription that the operator has created. ``connect`` makes a source."""

    def __init__(self, api: PubSubApi, subscription: str) -> None:
        self._api = api
        self._subscription = f"projects/{api.project}/subscriptions/{subscription}"
        self._dead_topic = f"projects/{api.project}/topics/{subscription}-dead-letters"
        self._dead_subscription = f"{self._subscription}-dead-letters"
        self._closed = False

    @classmethod
    async def connect(cls, url: str) -> Self:
        """A source for ``pubsub://PROJECT/SUBSCRIPTION``.

        Raises ConfigError when the URL is invalid or credentials are missing.
        """
        project, _, subscription = url.removeprefix("pubsub://").partition("/")
        if not project or _NAME.fullmatch(subscription) is None:
            raise ConfigError("the ingress URL must be pubsub://PROJECT/SUBSCRIPTION")
        return cls(await PubSubApi.connect(project), subscription)

    async def fetch(self, limit: int) -> Sequence[Delivery]:
        """See the port."""
        if self._closed:
            raise TransportError("ingress: the source is closed")
        try:
            answer = await self._api.call(
                "Pull", subscription=self._subscription, max_messages=limit, timeout_s=FETCH_S
            )
        except PubSubError as error:
            if error.is_timeout:
                return ()
            raise
        return [_delivery(received) for received in answer.received_messages]

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """See the port."""
        if deliveries:
            await self._api.call(
                "Acknowledge", subscription=self._subscription, ack_ids=_ack_ids(deliveries)
            )

    async def retry(self, deliveries: Sequence[Delivery], *, delay_s: float) -> None:
        """See the port."""
        if deliveries:
            await self._api.call(
                "ModifyAckDeadline",
                subscription=self._subscription,
                ack_ids=_ack_ids(deliveries),
                ack_deadline_seconds=round(delay_s),
            )

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """See the port."""
        message = PubsubMessage(
            data=delivery.body[:DEAD_BODY_BYTES],
            attributes={
                "pokebridge_reason": reason[:_MAX_REASON],
                "pokebridge_id": delivery.id,
            },
        )
        await self._check_dead_letters()
        try:
            await self._api.call("Publish", topic=self._dead_topic, messages=[message])
        except PubSubError as error:
            if not error.is_missing:
                raise
            await self._make_dead_letters()
            await self._api.call("Publish", topic=self._dead_topic, messages=[message])
        await self.ack([delivery])

    async def close(self) -> None:
        """See the port."""
        if not self._closed:
            self._closed = True
            await self._api.close()

    async def _check_dead_letters(self) -> None:
        """Check that the subscription exists. Without it the topic would lose a dead letter."""
        try:
            kept = await self._api.call("GetSubscription", subscription=self._dead_subscription)
        except PubSubError as error:
            if error.is_missing:
                await self._make_dead_letters()
            elif not error.is_denied:  # an account that may not look must believe its operator
                raise
        else:
            if kept.detached or kept.topic != self._dead_topic:
                raise TransportError(
                    f"{self._dead_subscription} is not attached to {self._dead_topic}, so dead"
                    " letters would be lost: read what it holds, and delete it"
                )

    async def _make_dead_letters(self) -> None:
        """Create the topic, and a subscription that keeps what is published there."""
        await self._create("CreateTopic", name=self._dead_topic)
        await self._create(
            "CreateSubscription",
            name=self._dead_subscription,
            topic=self._dead_topic,
            message_retention_duration={"seconds": DEAD_KEPT_S},
            expiration_policy={},  # never
        )

    async def _create(self, method: str, **fields: Any) -> None:
        try:
            await self._api.call(method, **fields)
        except PubSubError as error:
            if not error.is_taken:
                raise


def _delivery(received: Any) -> Delivery:
    message = received.message
    # An emulator that was restarted repeats message ids; the time makes them unique.
    published = message.publish_time
    stamp_us = published.seconds * 1_000_000 + published.nanos // 1_000
    return Delivery(f"pubsub:{message.message_id}:{stamp_us}", message.data, received.ack_id)


def _ack_ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.handle for delivery in deliveries]

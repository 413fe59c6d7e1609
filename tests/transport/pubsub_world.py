"""What the tests of the Pub/Sub transport and of its janitor share."""

import asyncio
import secrets
import time
from typing import Any, Self

import grpc
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from pokebridge.transport.google_pubsub import GooglePubSubTransport

TOPIC = "push-notifications"


class Clock:
    """A server's clock, which a test sets forward instead of waiting."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        """Unix time, plus what the test has advanced."""
        return time.time() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self._ahead_s += seconds


class World:
    """Transports and Google's administrative clients on one server, in a project of its own.

    ``is_emulator``: the server is Google's emulator, or like it in all that the adapter knows of.
    """

    def __init__(self, address: str, *, is_emulator: bool = False) -> None:
        self.is_emulator = is_emulator
        self.project = f"test-{secrets.token_hex(4)}"
        self.topic = f"projects/{self.project}/topics/{TOPIC}"
        self.transports: list[GooglePubSubTransport] = []
        channel = self.channel = grpc.aio.insecure_channel(address)
        self.publisher = PublisherAsyncClient(
            transport=PublisherGrpcAsyncIOTransport(channel=channel)
        )
        self.subscriber = SubscriberAsyncClient(
            transport=SubscriberGrpcAsyncIOTransport(channel=channel)
        )

    async def __aenter__(self) -> Self:
        """Ready as it is."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close everything."""
        for transport in self.transports:
            await transport.close()
        await self.channel.close()

    async def connect(self, instance: str | None = None, **more: Any) -> GooglePubSubTransport:
        """A transport of an instance of its own."""
        more = {"sweep_every_s": None, **more}
        instance = instance or secrets.token_hex(4)
        transport = await GooglePubSubTransport.connect(self.project, instance=instance, **more)
        # It treats every address that is not Google's as the emulator.
        transport._api.is_emulator = self.is_emulator
        self.transports.append(transport)
        return transport

    async def subscriptions(self) -> dict[str, Any]:
        """What exists in the project, by short name."""
        pager = await self.subscriber.list_subscriptions(project=f"projects/{self.project}")
        return {found.name.rpartition("/")[2]: found async for found in pager}

    async def delete(self, short_name: str) -> None:
        """Delete a subscription behind its owner's back."""
        name = f"projects/{self.project}/subscriptions/{short_name}"
        await self.subscriber.delete_subscription(subscription=name)


async def crash(transport: GooglePubSubTransport) -> None:
    """End a transport as kill -9 would: nothing is given back."""
    for subscription in transport._subscriptions.values():
        assert subscription._task is not None
        subscription._task.cancel()
        await asyncio.gather(subscription._task, return_exceptions=True)
        subscription._closed = True
    await transport._api.close()
    transport._subscriptions.clear()

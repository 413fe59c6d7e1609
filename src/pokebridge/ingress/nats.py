"""Ingress from a NATS JetStream stream, by a durable pull consumer (docs/ingress.md).

consumer pokebridge-CLUSTER               shared by all processors of the cluster
subject  pokebridge.CLUSTER.dead-letters  where what can't be committed goes, kept by
stream   pokebridge-CLUSTER-dead-letters

The consumer and that stream are made when they are missing.
"""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from nats import errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig
from nats.js.errors import NoStreamResponseError, NotFoundError

from pokebridge.engines.nats import NatsClient, client_options, refusal_of, servers_in
from pokebridge.engines.urls import without_secrets
from pokebridge.errors import ConfigError, TransportError
from pokebridge.ingress.base import Delivery

DIAL_TIMEOUT_S: Final = 3.0
CALL_TIMEOUT_S: Final = 4.0
FETCH_S: Final = 2.0
# Well above what a commit takes at worst; after it the messages of a killed process come again.
ACK_WAIT_S: Final = 10.0
MAX_ACK_PENDING: Final = 10_000
DEAD_KEPT_S: Final = 30 * 24 * 3600.0
# Headers come on top, and a server takes 1 MiB by default. A body that we would take is smaller.
DEAD_BODY_BYTES: Final = 512 * 1024
_MAX_REASON = 500


class _Connection(NamedTuple):
    client: NatsClient
    jetstream: JetStreamContext
    pulls: JetStreamContext.PullSubscription


class NatsSource:
    """Messages of a stream. It connects when it is asked for something, and anew after a failure.

    ``url`` is ``nats://HOST:PORT/STREAM/SUBJECT`` with the options of
    :mod:`pokebridge.engines.nats`; without a SUBJECT it is the whole stream. Raises ConfigError
    when it makes no sense.
    """

    def __init__(self, url: str, *, cluster: str) -> None:
        parts = urlsplit(url)
        self._url = urlunsplit(parts._replace(path=""))
        self._servers = servers_in("ingress", self._url)
        self._stream, _, subject = unquote(parts.path).removeprefix("/").partition("/")
        if not self._stream or set(self._stream) & set(" .*>"):
            raise ConfigError("the ingress URL must be nats:// or tls://, HOST:PORT/STREAM/SUBJECT")
        self._subject = subject or None
        self._name = f"pokebridge-{cluster}"
        self._dead_subject = f"pokebridge.{cluster}.dead-letters"
        client_options("ingress", self._url)  # whether they make sense, now
        self._connection: _Connection | None = None
        self._closed = False

    async def fetch(self, limit: int) -> Sequence[Delivery]:
        """See the port."""
        async with self._connected() as connection:
            try:
                messages = await connection.pulls.fetch(limit, timeout=FETCH_S)
            except TimeoutError:  # nothing new; or nobody there, which a ping tells
                await connection.client.flush(int(CALL_TIMEOUT_S))
                return ()
            return [_delivery(message) for message in messages]

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """See the port."""
        for delivery in deliveries:
            async with self._connected():
                await delivery.handle.ack()

    async def retry(self, deliveries: Sequence[Delivery], *, delay_s: float) -> None:
        """See the port."""
        for delivery in deliveries:
            async with self._connected():
                await delivery.handle.nak(delay=delay_s)

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """See the port."""
        message: Msg = delivery.handle
        headers = {
            **(message.headers or {}),
            "Nats-Msg-Id": delivery.id,  # twice within the server's window is once
            "Pokebridge-Reason": reason[:_MAX_REASON],
            "Pokebridge-Subject": message.subject,
        }
        async with self._connected() as connection:
            body = delivery.body[:DEAD_BODY_BYTES]
            try:
                await connection.jetstream.publish(self._dead_subject, body, headers=headers)
            except NoStreamResponseError:
                await connection.jetstream.add_stream(
                    StreamConfig(
                        name=f"{self._name}-dead-letters",
                        subjects=[self._dead_subject],
                        max_age=DEAD_KEPT_S,
                    )
                )
                await connection.jetstream.publish(self._dead_subject, body, headers=headers)
            await message.ack()

    async def close(self) -> None:
        """See the port."""
        self._closed = True
        await self._give_up()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        """The connection, made anew if need be; what fails on it is translated and ends it."""
        if self._closed:
            raise TransportError("ingress: closed")
        try:
            if self._connection is None:
                self._connection = await self._dial()
            yield self._connection
        except (errors.Error, OSError) as error:
            await self._give_up()
            raise TransportError(f"{without_secrets(self._url)}: {refusal_of(error)}") from error
        except BaseException:
            await self._give_up()
            raise

    async def _dial(self) -> _Connection:
        server = random.choice(self._servers)  # noqa: S311 - no secret
        client = NatsClient()
        try:
            await client.dial(
                server,
                client_options("ingress", self._url),
                name=self._name,
                timeout_s=DIAL_TIMEOUT_S,
            )
            jetstream = client.jetstream(timeout=CALL_TIMEOUT_S)
            await self._find_consumer(jetstream)
            pulls = await jetstream.pull_subscribe_bind(self._name, self._stream)
        except (errors.Error, OSError) as error:
            await client.hang_up()
            raise client.trouble or error from error  # a missing permission is only told beside
        except BaseException:
            await client.hang_up()
            raise
        return _Connection(client, jetstream, pulls)

    async def _find_consumer(self, jetstream: JetStreamContext) -> None:
        """See to it that there is one; an operator's own stays as it is."""
        try:
            await jetstream.consumer_info(self._stream, self._name)
        except NotFoundError:
            config = ConsumerConfig(
                durable_name=self._name,
                filter_subject=self._subject,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT_S,
                max_ack_pending=MAX_ACK_PENDING,
            )
            try:
                await jetstream.add_consumer(self._stream, config)
            except NotFoundError as error:
                raise TransportError(
                    f"ingress: there is no stream {self._stream} at {without_secrets(self._url)}"
                ) from error

    async def _give_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.client.hang_up()


def _delivery(message: Msg) -> Delivery:
    where = message.metadata
    # The time tells a stream that was made anew from the one before, whose numbers were the same.
    stamp_us = int(where.timestamp.timestamp() * 1_000_000)
    return Delivery(f"nats:{where.sequence.stream}:{stamp_us}", message.data, message)

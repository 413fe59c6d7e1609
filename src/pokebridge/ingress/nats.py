"""Ingress from a NATS JetStream stream, by a durable pull consumer (docs/ingress.md).

consumer pokebridge-CLUSTER               shared by all processors of the cluster
subject  pokebridge.CLUSTER.dead-letters  receives messages that can't be committed
stream   pokebridge-CLUSTER-dead-letters  keeps them

The consumer and that stream are created when they are missing.
"""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from nats import errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StreamConfig
from nats.js.errors import NoStreamResponseError, NotFoundError

from pokebridge.engines.addresses import first_of
from pokebridge.engines.nats import (
    NatsClient,
    client_options,
    dial_server,
    refusal_of,
    servers_in,
)
from pokebridge.engines.urls import check_engine_url, unsplit, without_secrets
from pokebridge.errors import ConfigError, TransportError
from pokebridge.ingress.base import DEAD_BODY_BYTES, Delivery

DIAL_TIMEOUT_S: Final = 3.0
CALL_TIMEOUT_S: Final = 4.0
FETCH_S: Final = 2.0
# Well above the longest commit. After this time a killed process's messages are delivered again.
ACK_WAIT_S: Final = 10.0
MAX_ACK_PENDING: Final = 10_000
DEAD_KEPT_S: Final = 30 * 24 * 3600.0
# The dead letters of any cluster.
_DEAD_SUBJECT: Final = re.compile(r"pokebridge\.[^.]+\.dead-letters")
# A server accepts 64 KiB of headers.
DEAD_HEADERS_BYTES: Final = 32 * 1024
# Headers by which a publisher controls the server: for a dead letter they are not meant.
_CONTROL: Final = ("nats-", "pokebridge-")
# The names that the client can send.
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MAX_REASON = 500


class _Connection(NamedTuple):
    client: NatsClient
    jetstream: JetStreamContext
    pulls: JetStreamContext.PullSubscription


class NatsSource:
    """Messages of a stream. It connects at the first call, and again after a failure.

    ``url`` is ``nats://HOST:PORT/STREAM/SUBJECT`` with the options of
    :mod:`pokebridge.engines.nats`. Without a SUBJECT all messages of the stream are read. Raises
    ConfigError when the URL is invalid.

    - ``_url``, ``_servers``: the URL without its path, and the servers that it names
    - ``_stream``, ``_subject``: what is read
    - ``_name``: of the consumer; ``_dead_subject``: of the dead letters
    - ``_connection``: ``None`` before the first call and after a failure
    - ``_closed``: whether calls are refused
    """

    def __init__(self, url: str, *, cluster: str) -> None:
        check_engine_url("ingress", url)
        parts = urlsplit(url)
        self._url = unsplit(parts._replace(path=""))
        self._servers = servers_in("ingress", self._url)
        self._stream, _, subject = unquote(parts.path).removeprefix("/").partition("/")
        if not self._stream or set(self._stream) & set(" .*>"):
            raise ConfigError("the ingress URL must be nats:// or tls://, HOST:PORT/STREAM/SUBJECT")
        self._subject = subject or None
        self._name = f"pokebridge-{cluster}"
        self._dead_subject = f"pokebridge.{cluster}.dead-letters"
        client_options("ingress", self._url)  # raises now when an option is invalid
        self._connection: _Connection | None = None
        self._closed = False

    async def fetch(self, limit: int) -> Sequence[Delivery]:
        """See the port."""
        async with self._connected() as connection:
            try:
                messages = await connection.pulls.fetch(limit, timeout=FETCH_S)
            except TimeoutError:  # no messages, or no server: the ping finds out
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
        """See the port. What is a dead letter already stays in the stream that is read."""
        message: Msg = delivery.handle
        async with self._connected() as connection:
            if _DEAD_SUBJECT.fullmatch(message.subject):
                await self._check_kept(connection.jetstream)
            else:
                await self._publish_dead(connection, delivery, reason)
            await message.ack()

    async def _check_kept(self, jetstream: JetStreamContext) -> None:
        """Look whether the stream keeps what is acked."""
        stream = await jetstream.stream_info(self._stream)
        if stream.config.retention != RetentionPolicy.LIMITS:
            raise TransportError(
                f"the stream {self._stream} takes dead letters, and would lose them: take"
                f" {self._dead_subject} out of its subjects"
            )

    async def _publish_dead(self, connection: _Connection, delivery: Delivery, reason: str) -> None:
        message: Msg = delivery.handle
        headers = {
            **_kept(message.headers or {}),
            "Nats-Msg-Id": delivery.id,  # a repetition within the server's window is dropped
            "Pokebridge-Reason": reason[:_MAX_REASON],
            "Pokebridge-Subject": message.subject,
        }
        body = delivery.body[: min(DEAD_BODY_BYTES, connection.client.max_payload // 2)]
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

    async def close(self) -> None:
        """See the port."""
        self._closed = True
        await self._give_up()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        """The connection, opened if needed. An error on it closes it and is translated."""
        if self._closed:
            raise TransportError("ingress: the source is closed")
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
        """Dial any server."""
        try:
            options = await asyncio.to_thread(client_options, "ingress", self._url)
        except ConfigError as error:  # it was valid at the start, so this may pass
            raise TransportError(str(error)) from error
        dials = [
            partial(dial_server, server, options, self._dial_address, _hang_up)
            for server in self._servers
        ]
        return await first_of(random.sample(dials, len(dials)), _hang_up)

    async def _dial_address(self, address: str, options: dict[str, Any]) -> _Connection:
        client = NatsClient()
        try:
            await client.dial(address, options, name=self._name, timeout_s=DIAL_TIMEOUT_S)
            jetstream = client.jetstream(timeout=CALL_TIMEOUT_S)
            await self._find_consumer(jetstream)
            pulls = await jetstream.pull_subscribe_bind(self._name, self._stream)
        except (errors.Error, OSError) as error:
            await client.hang_up()
            raise client.trouble or error from error  # a missing permission is reported separately
        except BaseException:
            await client.hang_up()
            raise
        return _Connection(client, jetstream, pulls)

    async def _find_consumer(self, jetstream: JetStreamContext) -> None:
        """Create the consumer if it is missing. An operator's own is left as it is."""
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
                    f"ingress: the stream {self._stream} does not exist at"
                    f" {without_secrets(self._url)}: create it"
                ) from error

    async def _give_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await _hang_up(connection)


async def _hang_up(connection: _Connection) -> None:
    await connection.client.hang_up()


def _delivery(message: Msg) -> Delivery:
    where = message.metadata
    # A stream that was created again repeats sequence numbers; the time makes the id unique.
    stamp_us = int(where.timestamp.timestamp() * 1_000_000)
    return Delivery(f"nats:{where.sequence.stream}:{stamp_us}", message.data, message)


def _kept(headers: Mapping[str, str]) -> Mapping[str, str]:
    """The headers that a dead letter keeps; none when they are very large."""
    kept = {
        name: value
        for name, value in headers.items()
        if _NAME.fullmatch(name) and not name.lower().startswith(_CONTROL)
    }
    size_bytes = sum(len(name) + len(value) for name, value in kept.items())
    return kept if size_bytes <= DEAD_HEADERS_BYTES else {}

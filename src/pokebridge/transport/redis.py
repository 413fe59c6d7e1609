"""The Redis transport, for Valkey too: plain pub/sub, at most once (docs/transports/redis.md).

push-notifications            signals without a shard, and whatever people publish by hand
push-notifications.<shard>    signals of one shard
push-notifications-all        nothing is published here: who takes everything subscribes to it,
                              so that they can be counted
"""

import asyncio
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from typing import Any, Self

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from pokebridge.engines import text_of
from pokebridge.engines.redis import connection_pool
from pokebridge.engines.urls import without_secrets
from pokebridge.errors import TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, Subscription
from pokebridge.transport.link import (
    ANSWER_TIMEOUT_S,
    CLOSE_TIMEOUT_S,
    DIAL_TIMEOUT_S,
    CachedCount,
    Deliver,
    Link,
    check_topic,
)

# More than one, so that a slow round trip does not hold up every other publish.
PUBLISH_CONNECTIONS = 4


class RedisTransport:
    """Signals over Redis pub/sub. Made by :meth:`connect`.

    One connection listens, and up to :data:`PUBLISH_CONNECTIONS` publish.
    """

    def __init__(self, name: str, pool: BlockingConnectionPool, channel: str) -> None:
        self._name = name
        self._pool = pool
        self._channel = channel
        self._marker = f"{channel}-all"
        self._redis = Redis(connection_pool=pool)
        self._link = Link(name, [self._dial], channel)
        self._cached_count = CachedCount()
        self._closed = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        channel: str = "push-notifications",
        cluster: str = "default",
        instance: str = "",
    ) -> Self:
        """Connect to the server in ``url``.

        Args:
            url: as :mod:`pokebridge.engines.redis` says.
            channel: where signals are published.
            cluster: with ``instance`` it names the connections in ``CLIENT LIST``.
            instance: see ``cluster``.

        Raises:
            ConfigError: the URL or the channel makes no sense.
            TransportError: the server can't be had, or the credentials are refused.
        """
        check_topic("the Redis channel", channel)
        pool = await asyncio.to_thread(
            connection_pool,
            "transport",
            url,
            client_name=f"pokebridge:{cluster}:{instance}".strip(":"),
            connections=PUBLISH_CONNECTIONS,
            dial_timeout_s=DIAL_TIMEOUT_S,
            answer_timeout_s=ANSWER_TIMEOUT_S,
        )
        transport = cls(without_secrets(url), pool, channel)
        await transport._link.open()
        return transport

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish in one round trip. Nothing is kept back while the server is away.

        Raises:
            TransportError: the server is away or refuses; some signals may have gone out.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for body, shard in signals:
            pipeline.publish(self._channel_of(shard), body)
        await self._execute(pipeline)

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Receive what ``selection`` matches; the server has accepted it when this returns."""
        if selection is Feed.ALL:
            topics = [self._channel, f"{self._channel}.*", self._marker]
        elif selection is Feed.UNTAGGED:
            topics = [self._channel]
        else:
            topics = [self._channel_of(selection)]
        return await self._link.subscribe(topics, receiver, selection)

    async def subscriber_count(self) -> int | None:
        """How many instances take everything, at most 10 s old.

        ``None`` when the server is away, or is a Redis Cluster: its nodes know only their own.
        """
        with suppress(TransportError):
            return await self._cached_count.get(self._count)
        return None

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        self._closed = True
        await self._link.close()
        with suppress(RedisError, OSError):
            await self._pool.disconnect()

    def _channel_of(self, shard: int | None) -> str:
        return self._channel if shard is None else f"{self._channel}.{shard}"

    async def _count(self) -> int | None:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.info("cluster")
        pipeline.pubsub_numsub(self._marker)
        info, counts = await self._execute(pipeline)
        return None if info["cluster_enabled"] else counts[0][1]

    async def _execute(self, pipeline: Any) -> list[Any]:
        """Send everything in ``pipeline`` at once; raises TransportError unless all succeeds."""
        if self._closed:
            raise TransportError(f"{self._name}: closed")
        with _translated(self._name):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                # Its own error would quote the command, and with it what somebody published.
                results: list[Any] = await pipeline.execute(raise_on_error=False)
        for result in results:
            if isinstance(result, ResponseError):
                raise TransportError(f"{self._name}: {result}")
        return results

    async def _dial(self, deliver: Deliver) -> "_RedisConnection":
        pool: Any = self._pool  # redis-py's annotations stop here
        connection = pool.make_connection()
        try:
            with _translated(self._name):
                await connection.connect()
                await connection.send_command("PING")
                await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return _RedisConnection(self._name, connection, deliver)


class _RedisConnection:
    """A connection that listens (:class:`~pokebridge.transport.link.Connection`).

    redis-py's ``PubSub`` is not used: it reconnects behind our back, so that a gap would go
    unnoticed, and costs half as much again a message.
    """

    def __init__(self, name: str, connection: AbstractConnection, deliver: Deliver) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._name = name
        self._connection = connection
        self._deliver = deliver
        self._topics: dict[bytes, str] = {}
        self._pongs: deque[asyncio.Future[None]] = deque()
        self._asking = False
        self._refusal: str | None = None
        self._reader = asyncio.create_task(self._read(), name=f"read {name}")

    @property
    def topics(self) -> AbstractSet[str]:
        return set(self._topics.values())

    async def subscribe(self, topics: Collection[str]) -> None:
        self._topics |= {topic.encode(): topic for topic in topics}
        await self._ask("SUBSCRIBE", topics)

    async def unsubscribe(self, topics: Collection[str]) -> None:
        for topic in topics:
            del self._topics[topic.encode()]
        await self._ask("UNSUBSCRIBE", topics)

    async def round_trip(self) -> None:
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        await self._send("PING")
        await pong

    async def close(self) -> None:
        self._lose("closed")
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        with suppress(RedisError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._connection.disconnect()

    async def _ask(self, command: str, topics: Collection[str]) -> None:
        """``command`` for the channels in ``topics`` and its pattern form for the patterns."""
        self._asking, self._refusal = True, None
        try:
            if patterns := [topic for topic in topics if topic.endswith("*")]:
                await self._send(f"P{command}", *patterns)
            if channels := [topic for topic in topics if not topic.endswith("*")]:
                await self._send(command, *channels)
            await self.round_trip()
        finally:
            self._asking = False
        if self._refusal is not None:
            raise TransportError(f"{self._name}: {self._refusal}")

    async def _send(self, *command: str) -> None:
        if self.lost.done():  # redis-py would connect again, and nobody would read there
            raise TransportError(f"{self._name}: {self.lost.result()}")
        try:
            with _translated(self._name):
                await self._connection.send_command(*command, check_health=False)
        except TransportError as error:
            self._lose(str(error))
            raise

    async def _read(self) -> None:
        while not self.lost.done():
            try:
                response = await self._connection.read_response(
                    timeout=math.inf, disconnect_on_error=False
                )
            except ResponseError as error:
                if self._asking:
                    self._refusal = str(error)
                else:
                    self._lose(str(error))
            except (RedisError, OSError) as error:
                self._lose(text_of(error))
            else:
                self._take(response)

    def _take(self, response: Any) -> None:
        if not isinstance(response, list) or response[0] == b"pong":
            if self._pongs and not (pong := self._pongs.popleft()).done():
                pong.set_result(None)
        elif response[0] in {b"message", b"pmessage"} and response[1] in self._topics:
            self._deliver(self._topics[response[1]], response[-2], response[-1])

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """The driver's errors as TransportError, in one line without secrets."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise TransportError(f"{name}: {text_of(error)}") from error

"""The Redis transport, for Valkey too: pub/sub, at most once (docs/transports/redis.md).

push-notifications            signals without a shard, and whatever people publish by hand
push-notifications.<shard>    signals of one shard; on a Redis Cluster a sharded channel, though
                              what is published on the plain one is heard as well
push-notifications-all        nothing is published here: who takes everything subscribes to it,
                              so that they can be counted
"""

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, RedisError, ResponseError

from pokebridge.engines.redis import connection_pool
from pokebridge.engines.urls import without_secrets
from pokebridge.errors import TransportError
from pokebridge.sharding import DEFAULT_SHARD_COUNT
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, Subscription
from pokebridge.transport.link import (
    ANSWER_TIMEOUT_S,
    DIAL_TIMEOUT_S,
    CachedCount,
    Deliver,
    Link,
    check_topic,
)
from pokebridge.transport.redis_listener import (
    MOVED,
    ClusterListener,
    Listener,
    Slots,
    read_slots,
    sharded,
    translated,
)

# More than one, so that a slow round trip does not hold up every other publish.
PUBLISH_CONNECTIONS = 4


class RedisTransport:
    """Signals over Redis pub/sub. Made by :meth:`connect`.

    One connection listens, and up to :data:`PUBLISH_CONNECTIONS` publish; on a Redis Cluster, to
    each of its nodes.
    """

    def __init__(self, url: str, channel: str, client_name: str, shard_count: int) -> None:
        self._url = url
        self._name = without_secrets(url)
        self._channel = channel
        self._client_name = client_name
        self._shard_count = shard_count
        self._marker = f"{channel}-all"
        self._clients: dict[str, Redis] = {}
        self._slots: Slots | None = None
        self._link: Link[Listener | ClusterListener] = Link(self._name, [self._dial], channel)
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
        shard_count: int = DEFAULT_SHARD_COUNT,
    ) -> Self:
        """Connect to the server in ``url``, or to the Redis Cluster that it belongs to.

        Args:
            url: as :mod:`pokebridge.engines.redis` says.
            channel: where signals are published.
            cluster: with ``instance`` it names the connections in ``CLIENT LIST``.
            instance: see ``cluster``.
            shard_count: how many sharded channels everything is.

        Raises:
            ConfigError: the URL or the channel makes no sense.
            TransportError: the server can't be had, or the credentials are refused.
        """
        check_topic("the Redis channel", channel)
        client_name = f"pokebridge:{cluster}:{instance}".strip(":")
        transport = cls(url, channel, client_name, shard_count)
        await transport._link.open()
        return transport

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish in one round trip. Nothing is kept back while the server is away.

        Raises:
            TransportError: the server is away or refuses; some signals may have gone out.
        """
        by_node: dict[str, Any] = {}
        for body, shard in signals:
            channel = self._channel_of(shard)
            node, command = self._home, "PUBLISH"
            if self._slots is not None and shard is not None:
                node, command = self._slots.node_of(channel), "SPUBLISH"
            if node not in by_node:
                by_node[node] = (await self._client(node)).pipeline(transaction=False)
            by_node[node].execute_command(command, channel, body)
        publishing = (self._execute(pipeline) for pipeline in by_node.values())
        for outcome in await asyncio.gather(*publishing, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Receive what ``selection`` matches; the server has accepted it when this returns."""
        if selection is Feed.ALL:
            topics = [self._channel, f"{self._channel}.*", self._marker]
            shards: Sequence[int] = range(self._shard_count)
        elif selection is Feed.UNTAGGED:
            topics, shards = [self._channel], ()
        else:
            topics, shards = [self._channel_of(selection)], (selection,)
        if self._slots is not None:
            topics += [sharded(self._channel_of(shard)) for shard in shards]
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
            for client in self._clients.values():
                await client.connection_pool.disconnect()

    @property
    def _home(self) -> str:
        """The server that the URL names."""
        return urlsplit(self._url).netloc.rpartition("@")[2]

    def _channel_of(self, shard: int | None) -> str:
        return self._channel if shard is None else f"{self._channel}.{shard}"

    async def _count(self) -> int | None:
        if self._slots is not None:
            return None
        pipeline = (await self._client(self._home)).pipeline(transaction=False)
        pipeline.pubsub_numsub(self._marker)
        ((_, count),) = (await self._execute(pipeline))[0]
        return int(count)

    async def _execute(self, pipeline: Any) -> list[Any]:
        """Send everything in ``pipeline`` at once; raises TransportError unless all succeeds."""
        if self._closed:
            raise TransportError(f"{self._name}: closed")
        with translated(self._name):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                # Its own error would quote the command, and with it what somebody published.
                results: list[Any] = await pipeline.execute(raise_on_error=False)
        for result in results:
            if isinstance(result, AskError):  # or MOVED: the next try has a new map
                self._link.connection.lose(MOVED)
            if isinstance(result, ResponseError):
                raise TransportError(f"{self._name}: {result}")
        return results

    # --- servers --------------------------------------------------------------------------------

    async def _client(self, node: str) -> Redis:
        """A client of ``node`` (``HOST:PORT``), reached as the server that the URL names."""
        if node not in self._clients:
            parts = urlsplit(self._url)
            user, at, _ = parts.netloc.rpartition("@")
            pool = await asyncio.to_thread(
                connection_pool,
                "transport",
                urlunsplit(parts._replace(netloc=f"{user}{at}{node}")),
                client_name=self._client_name,
                connections=PUBLISH_CONNECTIONS,
                dial_timeout_s=DIAL_TIMEOUT_S,
                answer_timeout_s=ANSWER_TIMEOUT_S,
            )
            self._clients.setdefault(node, Redis(connection_pool=pool))
        return self._clients[node]

    async def _dial(self, deliver: Deliver) -> Listener | ClusterListener:
        """Connect to any server that is known, and from there to all there are."""
        known = [self._home, *self._clients] if self._slots else [self._home]
        seed = random.choice(known)  # noqa: S311 - spreads load
        connection = await self._connect(seed)
        try:
            self._slots = await read_slots(self._name, connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        if self._slots is None:
            return Listener(self._name, connection, deliver)
        await connection.disconnect(nowait=True)
        listeners: dict[str, Listener] = {}
        try:
            for node in dict.fromkeys(self._slots.nodes):
                listeners[node] = Listener(node, await self._connect(node), deliver)
        except BaseException:
            await asyncio.gather(*(listener.close() for listener in listeners.values()))
            raise
        return ClusterListener(self._slots, listeners)

    async def _connect(self, node: str) -> AbstractConnection:
        pool: Any = (await self._client(node)).connection_pool  # its annotations stop here
        connection = pool.make_connection()
        try:
            with translated(self._name if node == self._home else f"{self._name} ({node})"):
                await connection.connect()
                await connection.send_command("PING")
                await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        made: AbstractConnection = connection
        return made

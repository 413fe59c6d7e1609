"""The Redis transport, for Valkey too: pub/sub, at most once (docs/transports/redis.md).

push-notifications            signals without a shard, and whatever people publish by hand
push-notifications.<shard>    signals of one shard; on a Redis Cluster a sharded channel, though
                              what is published on the plain one is heard as well
push-notifications-all        nothing is published here: who takes everything subscribes to it,
                              so that they can be counted
"""

import asyncio
import math
import random
from bisect import bisect
from collections import deque
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import AskError, RedisError, ResponseError

from pokebridge.engines import text_of
from pokebridge.engines.redis import connection_pool
from pokebridge.engines.urls import without_secrets
from pokebridge.errors import TransportError
from pokebridge.sharding import DEFAULT_SHARD_COUNT
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, Subscription
from pokebridge.transport.reconnecting_link import (
    ANSWER_TIMEOUT_S,
    CLOSE_TIMEOUT_S,
    DIAL_TIMEOUT_S,
    CachedCount,
    Deliver,
    ReconnectingLink,
    check_topic,
)

# More than one, so that a slow round trip does not hold up every other publish.
PUBLISH_CONNECTIONS = 4
_MOVED = "a slot has moved"
_SHARDED = "sharded "  # no channel of ours has a space
_PLAIN_MESSAGES = frozenset({b"message", b"pmessage"})


class RedisTransport:
    """Signals over Redis pub/sub. Made by :meth:`connect`.

    One connection listens, and up to :data:`PUBLISH_CONNECTIONS` publish; on a Redis Cluster, to
    each of its nodes.
    """

    def __init__(self, url: str, channel: str, client_name: str, shard_count: int) -> None:
        self._url = url
        self._name = without_secrets(url)
        self._home = urlsplit(url).netloc.rpartition("@")[2]
        self._channel = channel
        self._client_name = client_name
        self._shard_count = shard_count
        self._marker = f"{channel}-all"
        self._clients: dict[str, Redis] = {}
        self._slots: _Slots | None = None
        self._link: ReconnectingLink[_Listener | _ClusterListener] = ReconnectingLink(
            self._name, [self._dial], channel
        )
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
            if self._slots is None:
                node, command = self._home, "PUBLISH"
            elif shard is None:
                node, command = self._slots.nodes[0], "PUBLISH"  # any; this one is not dead
            else:
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
            topics += [_sharded(self._channel_of(shard)) for shard in shards]
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
        with _translated(self._name):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                # Its own error would quote the command, and with it what somebody published.
                results: list[Any] = await pipeline.execute(raise_on_error=False)
        for result in results:
            if isinstance(result, AskError):  # or _MOVED: the next try has a new map
                self._link.connection.lose(_MOVED)
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

    async def _dial(self, deliver: Deliver) -> "_Listener | _ClusterListener":
        """Connect to any server that is known, and from there to all there are."""
        known = [self._home, *self._clients] if self._slots else [self._home]
        seed = random.choice(known)  # noqa: S311 - spreads load
        connection = await self._connect(seed)
        try:
            self._slots = await _read_slots(self._name, connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        if self._slots is None:
            return _Listener(self._name, connection, deliver)
        await connection.disconnect(nowait=True)
        listeners: dict[str, _Listener] = {}
        try:
            for node in dict.fromkeys(self._slots.nodes):
                listeners[node] = _Listener(node, await self._connect(node), deliver)
        except BaseException:
            await asyncio.gather(*(listener.close() for listener in listeners.values()))
            raise
        return _ClusterListener(self._slots, listeners)

    async def _connect(self, node: str) -> AbstractConnection:
        pool: Any = (await self._client(node)).connection_pool  # its annotations stop here
        connection = pool.make_connection()
        try:
            with _translated(self._name if node == self._home else f"{self._name} ({node})"):
                await connection.connect()
                await connection.send_command("PING")
                await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        made: AbstractConnection = connection
        return made


def _sharded(channel: str) -> str:
    """The topic of the sharded channel ``channel``."""
    return f"{_SHARDED}{channel}"


class _Listener:
    """A connection that listens (a ``reconnecting_link.EngineConnection``).

    A topic is a channel, a pattern (it ends in ``*``), or a sharded channel, which Redis keeps
    apart from the plain one of that name and which therefore has a name of its own here.

    redis-py's ``PubSub`` is not used: it reconnects behind our back, so that a gap would go
    unnoticed, and costs half as much again a message.
    """

    def __init__(self, name: str, connection: AbstractConnection, deliver: Deliver) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._name = name
        self._connection = connection
        self._deliver = deliver
        self._plain_names: dict[bytes, str] = {}
        self._sharded_names: dict[bytes, str] = {}
        self._pongs: deque[asyncio.Future[None]] = deque()
        self._asking = False
        self._refusal: str | None = None
        self._reader = asyncio.create_task(self._read(), name=f"read {name}")

    @property
    def topics(self) -> AbstractSet[str]:
        return {*self._plain_names.values(), *self._sharded_names.values()}

    async def subscribe(self, topics: Collection[str]) -> None:
        for topic in topics:
            names, name = self._names(topic)
            names[name] = topic
        await self._ask("SUBSCRIBE", topics)

    async def unsubscribe(self, topics: Collection[str]) -> None:
        for topic in topics:
            names, name = self._names(topic)
            del names[name]
        await self._ask("UNSUBSCRIBE", topics)

    async def round_trip(self) -> None:
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        await self._send("PING")
        await pong

    async def close(self) -> None:
        self.lose("closed")
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        with suppress(RedisError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._connection.disconnect()

    def lose(self, reason: str) -> None:
        """It is of no use any more."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def _names(self, topic: str) -> tuple[dict[bytes, str], bytes]:
        """Where ``topic`` is kept, and by what name: a server says the two kinds' names alike."""
        name = topic.removeprefix(_SHARDED)
        return self._plain_names if name == topic else self._sharded_names, name.encode()

    async def _ask(self, command: str, topics: Collection[str]) -> None:
        """``command``, in the form that each kind of topic has."""
        self._asking, self._refusal = True, None
        plain = [topic for topic in topics if not topic.startswith(_SHARDED)]
        try:
            if patterns := [topic for topic in plain if topic.endswith("*")]:
                await self._send(f"P{command}", *patterns)
            if channels := [topic for topic in plain if not topic.endswith("*")]:
                await self._send(command, *channels)
            for topic in set(topics) - set(plain):  # each by itself: their slots differ
                await self._send(f"S{command}", topic.removeprefix(_SHARDED))
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
            self.lose(str(error))
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
                    self.lose(str(error))
            except (RedisError, OSError) as error:
                self.lose(text_of(error))
            else:
                self._take(response)

    def _take(self, response: Any) -> None:
        if not isinstance(response, list) or response[0] == b"pong":
            if self._pongs and not (pong := self._pongs.popleft()).done():
                pong.set_result(None)
            return
        kind, name = response[0], response[1]
        if kind in _PLAIN_MESSAGES and name in self._plain_names:
            self._deliver(self._plain_names[name], response[-2], response[-1])
        elif kind == b"smessage" and name in self._sharded_names:
            self._deliver(self._sharded_names[name], name, response[-1])
        elif kind == b"sunsubscribe" and name in self._sharded_names:  # and nobody asked for it
            self.lose(_MOVED)


class _Slots(NamedTuple):
    """Who serves what in a Redis Cluster: ranges of slots, by their first, and their nodes."""

    starts: Sequence[int]
    nodes: Sequence[str]

    def node_of(self, channel: str) -> str:
        """``HOST:PORT`` of the node that serves the sharded channel ``channel``."""
        slot: int = key_slot(channel.encode())
        return self.nodes[bisect(self.starts, slot) - 1]


class _ClusterListener:
    """A connection to every node of a cluster (a ``reconnecting_link.EngineConnection``).

    When one is lost, or a slot moves, the whole is: then all is dialled again from a new map.
    """

    def __init__(self, slots: _Slots, listeners: Mapping[str, _Listener]) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._slots = slots
        self._listeners = listeners
        for listener in listeners.values():
            listener.lost.add_done_callback(lambda lost: self.lose(lost.result()))

    @property
    def topics(self) -> AbstractSet[str]:
        return {topic for listener in self._listeners.values() for topic in listener.topics}

    async def subscribe(self, topics: Collection[str]) -> None:
        await _all(listener.subscribe(theirs) for listener, theirs in self._by_node(topics))

    async def unsubscribe(self, topics: Collection[str]) -> None:
        await _all(listener.unsubscribe(theirs) for listener, theirs in self._by_node(topics))

    async def round_trip(self) -> None:
        await _all(listener.round_trip() for listener in self._listeners.values())

    async def close(self) -> None:
        await asyncio.gather(*(listener.close() for listener in self._listeners.values()))

    def lose(self, reason: str) -> None:
        """It is of no use any more."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def _by_node(self, topics: Collection[str]) -> Iterator[tuple[_Listener, list[str]]]:
        """What to ask of which; plain channels are heard at any node, so at one for all."""
        plain_at = self._slots.nodes[0]
        by_node: dict[str, list[str]] = {}
        for topic in topics:
            channel = topic.removeprefix(_SHARDED)
            node = plain_at if channel == topic else self._slots.node_of(channel)
            by_node.setdefault(node, []).append(topic)
        for node, theirs in by_node.items():
            yield self._listeners[node], theirs


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """Await ``calls`` to their ends; raises what the first raised that failed."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if outcome is not None:
            raise outcome


async def _read_slots(name: str, connection: AbstractConnection) -> _Slots | None:
    """The map of the cluster that the server at ``connection`` belongs to; ``None`` if it is alone.

    Raises:
        TransportError: the server may not be asked, or the cluster serves nothing.
    """
    host = str(getattr(connection, "host", ""))  # what a node without a name is reached by
    with _translated(name):
        await connection.send_command("HELLO")  # whoever may connect may ask this
        try:
            said = await connection.read_response()
        except ResponseError:  # a proxy, say, that does not know it
            return None
        if b"cluster" not in said:
            return None
        await connection.send_command("CLUSTER", "SLOTS")
        ranges = sorted(await connection.read_response())
    if not ranges:
        raise TransportError(f"{name}: this cluster serves no slots")
    nodes = [_node(primary[0] or host.encode(), primary[1]) for _, _, primary, *_ in ranges]
    return _Slots([first for first, *_ in ranges], nodes)


def _node(host: bytes, port: int) -> str:
    """``HOST:PORT`` as a URL has it."""
    return f"[{host.decode()}]:{port}" if b":" in host else f"{host.decode()}:{port}"


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """The driver's errors as TransportError, in one line without secrets."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise TransportError(f"{name}: {text_of(error)}") from error

"""The Redis transport, also for Valkey: pub/sub (docs/transports/redis.md).

push-notifications            signals without a shard, and whatever people publish by hand
push-notifications.<shard>    signals of one shard. On a Redis Cluster this is a sharded channel;
                              the plain channel of that name is received as well.

In a cluster that is not called ``default`` both begin with ``push-notifications~<cluster>``.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Self

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, NoPermissionError, RedisError, ResponseError

from pokebridge.engines import text_of
from pokebridge.engines.addresses import first_of
from pokebridge.engines.redis import (
    REPLICA,
    RESP2,
    RESP3,
    connection_pool,
    hello_fields,
    is_replica,
    nodes_in,
    url_of,
)
from pokebridge.engines.urls import check_engine_url, without_secrets
from pokebridge.errors import SignalRefusedError, TransportError
from pokebridge.sharding import DEFAULT_SHARD_COUNT
from pokebridge.supervisor import cancel, supervise
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, Subscription
from pokebridge.transport.names import DEFAULT_CLUSTER, DEFAULT_TOPIC, topic_of
from pokebridge.transport.reconnecting_link import (
    ANSWER_TIMEOUT_S,
    CLOSE_TIMEOUT_S,
    DIAL_TIMEOUT_S,
    Deliver,
    EngineConnection,
    ReconnectingLink,
    check_topic,
)
from pokebridge.transport.redis_slots import Slots, read_slots

# More than one, so that a slow round trip does not delay every other publish.
PUBLISH_CONNECTIONS = 4
_MOVED = "a slot has moved"
_SHARDED = "sharded "  # channel names contain no space
_PLAIN_MESSAGES = frozenset({b"message", b"pmessage"})


class RedisTransport:
    """Signals over Redis pub/sub. Create it with :meth:`connect`.

    One connection receives, and up to :data:`PUBLISH_CONNECTIONS` publish. On a Redis Cluster each
    node has these connections.
    """

    is_shared = True

    def __init__(self, url: str, channel: str, client_name: str, shard_count: int) -> None:
        self._url = url
        # The URL without credentials, for messages.
        self._name = without_secrets(url)
        # The nodes that the URL names, as HOST:PORT, and the one that answered last.
        self._named = nodes_in(url)
        self._home = self._named[0]
        self._channel = channel
        self._client_name = client_name
        self._shard_count = shard_count
        # The clients that publish, by node.
        self._clients: dict[str, Redis] = {}
        # The slot map of a Redis Cluster; None on a single server.
        self._slots: Slots | None = None
        self._link: ReconnectingLink[_Listener | _ClusterListener] = ReconnectingLink(
            self._name, [self._dial], channel
        )
        self._closed = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        channel: str = DEFAULT_TOPIC,
        cluster: str = DEFAULT_CLUSTER,
        instance: str = "",
        shard_count: int = DEFAULT_SHARD_COUNT,
    ) -> Self:
        """Connect to the server in ``url``, or to the Redis Cluster that it belongs to.

        Args:
            url: the server, as described in :mod:`pokebridge.engines.redis`.
            channel: the channel of signals without a shard, in the cluster ``default``.
            cluster: the cluster whose signals are sent and received. Its name is part of the
                channels, and of the connections' name in ``CLIENT LIST``.
            instance: part of the connections' name.
            shard_count: the number of sharded channels of a Redis Cluster.

        Raises:
            ConfigError: the URL or the channel is invalid.
            TransportError: the server is unavailable, or the credentials are refused.
        """
        check_engine_url("transport", url)
        channel = topic_of(cluster, check_topic("the Redis channel", channel))
        client_name = f"pokebridge:{cluster}:{instance}".strip(":")
        transport = cls(url, channel, client_name, shard_count)
        await transport._link.open()
        return transport

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish ``signals`` in one round trip to each node. Nothing is queued meanwhile.

        Raises:
            TransportError: a server is unavailable or refuses. Some signals may be published.
        """
        by_node: dict[str, Any] = {}
        for body, shard in signals:
            channel = self._channel_of(shard)
            if self._slots is None:
                node, command = self._home, "PUBLISH"
            elif shard is None:
                node, command = self._slots.nodes[0], "PUBLISH"  # any node that is alive
            else:
                node, command = self._slots.node_of(channel), "SPUBLISH"
            if node not in by_node:
                by_node[node] = (await self._client(node)).pipeline(transaction=False)
            by_node[node].execute_command(command, channel, body)
        await _all(self._execute(pipeline) for pipeline in by_node.values())

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Subscribe to what ``selection`` matches, and return when the server has accepted it."""
        if selection is Feed.ALL:
            topics = [self._channel, f"{self._channel}.*"]
            shards: Sequence[int] = range(self._shard_count)
        elif selection is Feed.UNTAGGED:
            topics, shards = [self._channel], ()
        else:
            topics, shards = [self._channel_of(selection)], (selection,)
        if self._slots is not None:
            topics += [_sharded(self._channel_of(shard)) for shard in shards]
        return await self._link.subscribe(topics, receiver, selection)

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        self._closed = True
        await self._link.close()
        with suppress(RedisError, OSError):
            for client in self._clients.values():
                await client.connection_pool.disconnect()

    def _channel_of(self, shard: int | None) -> str:
        return self._channel if shard is None else f"{self._channel}.{shard}"

    async def _execute(self, pipeline: Any) -> None:
        """Send all of ``pipeline`` at once, and ask the server for its role.

        A replica accepts ``PUBLISH``, but tells neither its primary nor the other replicas.

        Raises:
            TransportError: a command failed, or the server is a replica.
        """
        if self._closed:
            raise TransportError(f"{self._name}: closed")
        pipeline.execute_command("HELLO")
        with _translated(self._name):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                # redis-py's own error would quote the command, and so the published body.
                *results, said = await pipeline.execute(raise_on_error=False)
        for result in results:
            if isinstance(result, AskError):  # includes MovedError; dialling reads the map anew
                self._link.connection.lose(_MOVED)
            if isinstance(result, NoPermissionError):
                raise SignalRefusedError(f"{self._name}: {result}")
            if isinstance(result, ResponseError):
                raise TransportError(f"{self._name}: {result}")
        if is_replica(hello_fields(said)):  # new connections may lead to its primary
            await pipeline.connection_pool.disconnect(inuse_connections=False)
            with suppress(TransportError):
                self._link.connection.lose(REPLICA)
            raise TransportError(f"{self._name}: {REPLICA}")

    # --- servers --------------------------------------------------------------------------------

    async def _client(self, node: str) -> Redis:
        """A client of ``node`` (``HOST:PORT``), with the credentials and TLS of the URL."""
        if node not in self._clients:
            pool = await asyncio.to_thread(
                connection_pool,
                "transport",
                url_of(node, self._url),
                client_name=self._client_name,
                connections=PUBLISH_CONNECTIONS,
                dial_timeout_s=DIAL_TIMEOUT_S,
                answer_timeout_s=ANSWER_TIMEOUT_S,
            )
            self._clients.setdefault(node, Redis(connection_pool=pool))
        return self._clients[node]

    async def _dial(self, deliver: Deliver) -> "_Listener | _ClusterListener":
        """Connect to a known server, and on a Redis Cluster from there to all nodes."""
        if self._slots is None:
            nodes = sorted(self._named, key=lambda node: node != self._home)
        else:
            known = list(dict.fromkeys([*self._named, *self._clients]))
            nodes = random.sample(known, len(known))  # spreads load
        found = await first_of([partial(self._visit, node) for node in nodes], _leave)
        self._home, self._slots = found.node, found.slots
        if found.slots is None:
            return _Listener(self._name, found.connection, deliver)
        await _leave(found)
        listeners: dict[str, _Listener] = {}
        try:
            for node in dict.fromkeys(found.slots.nodes):
                connection, _ = await self._connect(node)
                listeners[node] = _Listener(node, connection, deliver)
        except BaseException:
            await asyncio.gather(*(listener.close() for listener in listeners.values()))
            raise
        return _ClusterListener(found.slots, listeners)

    async def _visit(self, node: str) -> "_Found":
        """Connect to ``node``, and ask what it is.

        Raises:
            TransportError: it does not answer, or is a replica outside a Redis Cluster.
        """
        connection, hello = await self._connect(node)
        try:
            if hello.get(b"mode") == b"cluster":
                with _translated(self._name):
                    return _Found(node, connection, await read_slots(connection))
            if is_replica(hello):
                raise TransportError(f"{self._name}: {REPLICA}")  # noqa: TRY301 - closed below
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return _Found(node, connection, None)

    async def _connect(self, node: str) -> tuple[AbstractConnection, Mapping[bytes, object]]:
        """Connect to ``node`` to listen. Returns what the node says of itself as well.

        With RESP2 a connection that has subscriptions can ask nothing but ``PING``, so RESP3 is
        used if the server knows it.
        """
        pool = (await self._client(node)).connection_pool
        is_only = node == self._name.partition("://")[2]
        with _translated(self._name if is_only else f"{self._name} ({node})"):
            try:
                return await _open(pool, protocol=RESP3)
            except ResponseError:  # for example a proxy that does not know HELLO
                return await _open(pool, protocol=RESP2)


async def _open(pool: Any, *, protocol: int) -> tuple[Any, Mapping[bytes, object]]:
    connection = pool.connection_class(**pool.connection_kwargs | {"protocol": protocol})
    hello: Mapping[bytes, object] = {}
    try:
        await connection.connect()
        await connection.send_command("HELLO")  # needs no permission
        with suppress(ResponseError):  # see _connect
            hello = hello_fields(await connection.read_response())
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    if protocol == RESP3:  # redis-py's own handler formats each message for its log
        connection._parser.set_pubsub_push_handler(_as_it_is)  # noqa: SLF001
    return connection, hello


async def _as_it_is(message: Any) -> Any:
    return message


def _sharded(channel: str) -> str:
    """Return the topic of the sharded channel ``channel``."""
    return f"{_SHARDED}{channel}"


class _Listener(EngineConnection):
    """A connection that receives.

    A topic is a channel, a pattern (it ends in ``*``), or a sharded channel. Redis distinguishes a
    sharded channel from the plain one of the same name, so its topic has the prefix ``_SHARDED``.

    redis-py's ``PubSub`` is not used, since it reconnects by itself, so that a gap would go
    unnoticed. It also takes half as much CPU again for each message.
    """

    spread_s = 0.0

    def __init__(self, name: str, connection: AbstractConnection, deliver: Deliver) -> None:
        super().__init__()
        self._name = name
        self._connection = connection
        self._deliver = deliver
        # The topics subscribed to, by the names that the server uses.
        self._plain_names: dict[bytes, str] = {}
        self._sharded_names: dict[bytes, str] = {}
        # The round trips that wait for an answer, oldest first.
        self._pongs: deque[asyncio.Future[None]] = deque()
        # Whether a subscription is being changed, and the server's error if it refused.
        self._asking = False
        self._refusal: ResponseError | None = None
        self._reader = supervise("redis_reader", self._read)

    @property
    def topics(self) -> AbstractSet[str]:
        return {*self._plain_names.values(), *self._sharded_names.values()}

    async def subscribe(self, topics: Collection[str]) -> None:
        for topic in topics:
            names, name = self._names(topic)
            names[name] = topic
        try:
            await self._ask("SUBSCRIBE", topics)
        except SignalRefusedError:
            await self.unsubscribe(topics)  # the server has accepted some
            raise

    async def unsubscribe(self, topics: Collection[str]) -> None:
        for topic in topics:
            names, name = self._names(topic)
            del names[name]
        await self._ask("UNSUBSCRIBE", topics)

    async def round_trip(self) -> None:
        """Ask the server for its role, and return when it has answered."""
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        await self._send("HELLO" if self._connection.protocol == RESP3 else "PING")
        await pong

    async def close(self) -> None:
        self.lose("closed")
        await cancel(self._reader)
        with suppress(RedisError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._connection.disconnect()

    def _names(self, topic: str) -> tuple[dict[bytes, str], bytes]:
        """The dictionary that ``topic`` belongs in, and the channel's name as its key."""
        name = topic.removeprefix(_SHARDED)
        return self._plain_names if name == topic else self._sharded_names, name.encode()

    async def _ask(self, command: str, topics: Collection[str]) -> None:
        """Send ``command`` in the form for each kind of topic, and raise if it is refused."""
        self._asking, self._refusal = True, None
        plain = [topic for topic in topics if not topic.startswith(_SHARDED)]
        try:
            if patterns := [topic for topic in plain if topic.endswith("*")]:
                await self._send(f"P{command}", *patterns)
            if channels := [topic for topic in plain if not topic.endswith("*")]:
                await self._send(command, *channels)
            for topic in set(topics) - set(plain):  # one each, since their slots differ
                await self._send(f"S{command}", topic.removeprefix(_SHARDED))
            await self.round_trip()
        finally:
            self._asking = False
        if isinstance(self._refusal, NoPermissionError):
            raise SignalRefusedError(f"{self._name}: {self._refusal}")
        if self._refusal is not None:
            raise TransportError(f"{self._name}: {self._refusal}")

    async def _send(self, *command: str) -> None:
        if self.lost.done():  # redis-py would reconnect, and nobody would read from it
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
                    timeout=math.inf, disconnect_on_error=False, push_request=True
                )
                self._take(response)
            except ResponseError as error:
                if self._asking:
                    self._refusal = error
                else:
                    self.lose(str(error))
            except (RedisError, OSError) as error:
                self.lose(text_of(error))
            except Exception:
                self.lose("an unforeseen error, see the log")
                raise

    def _take(self, response: Any) -> None:
        if not isinstance(response, list) or response[0] == b"pong":
            if is_replica(hello_fields(response)):
                self.lose(REPLICA)
            if self._pongs and not (pong := self._pongs.popleft()).done():
                pong.set_result(None)
            return
        kind, name = response[0], response[1]
        if kind in _PLAIN_MESSAGES and name in self._plain_names:
            self._deliver(self._plain_names[name], response[-2], response[-1])
        elif kind == b"smessage" and name in self._sharded_names:
            self._deliver(self._sharded_names[name], name, response[-1])
        elif kind == b"sunsubscribe" and name in self._sharded_names:  # not requested by us
            self.lose(_MOVED)


class _Found(NamedTuple):
    """A node that answered, the connection to it, and the slot map if it has one."""

    node: str
    connection: AbstractConnection
    slots: Slots | None


async def _leave(found: _Found) -> None:
    await found.connection.disconnect(nowait=True)


class _ClusterListener(EngineConnection):
    """A connection to every node of a Redis Cluster.

    When one of them is lost, or a slot moves, all are replaced, with a new slot map.
    """

    spread_s = 0.0  # a node forwards what it is given whether or not anybody has subscribed

    def __init__(self, slots: Slots, listeners: Mapping[str, _Listener]) -> None:
        super().__init__()
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

    def _by_node(self, topics: Collection[str]) -> Iterator[tuple[_Listener, list[str]]]:
        """Which topics to request from which node. Any node delivers the plain channels."""
        plain_at = self._slots.nodes[0]
        by_node: dict[str, list[str]] = {}
        for topic in topics:
            channel = topic.removeprefix(_SHARDED)
            node = plain_at if channel == topic else self._slots.node_of(channel)
            by_node.setdefault(node, []).append(topic)
        for node, theirs in by_node.items():
            yield self._listeners[node], theirs


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """Await all ``calls``, then raise the first error among them."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if outcome is not None:
            raise outcome


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn the driver's errors into TransportError, in one line without secrets."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise TransportError(f"{name}: {text_of(error)}") from error

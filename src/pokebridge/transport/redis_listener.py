"""What listens to Redis: a connection to one server, or one to every node of a Redis Cluster.

A topic is a channel, a pattern (it ends in ``*``), or a *sharded* channel, which has a name of its
own for :func:`sharded`: Redis keeps it apart from the plain channel of that name. On a cluster it
lives on the node that serves its slot, and on no other.
"""

import asyncio
import math
from bisect import bisect
from collections import deque
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import RedisError, ResponseError

from pokebridge.engines import text_of
from pokebridge.errors import TransportError
from pokebridge.transport.link import CLOSE_TIMEOUT_S, Deliver

MOVED = "a slot has moved"
_SHARDED = "sharded "  # no channel of ours has a space
_PLAIN_MESSAGES = frozenset({b"message", b"pmessage"})


def sharded(channel: str) -> str:
    """The topic of the sharded channel ``channel``."""
    return f"{_SHARDED}{channel}"


class Listener:
    """A connection that listens (:class:`~pokebridge.transport.link.Connection`).

    redis-py's ``PubSub`` is not used: it reconnects behind our back, so that a gap would go
    unnoticed, and costs half as much again a message.
    """

    def __init__(self, name: str, connection: AbstractConnection, deliver: Deliver) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._name = name
        self._connection = connection
        self._deliver = deliver
        self._plain: dict[bytes, str] = {}
        self._sharded: dict[bytes, str] = {}
        self._pongs: deque[asyncio.Future[None]] = deque()
        self._asking = False
        self._refusal: str | None = None
        self._reader = asyncio.create_task(self._read(), name=f"read {name}")

    @property
    def topics(self) -> AbstractSet[str]:
        """What the servers were asked for."""
        return {*self._plain.values(), *self._sharded.values()}

    async def subscribe(self, topics: Collection[str]) -> None:
        """See the link's port."""
        for topic in topics:
            names, name = self._names(topic)
            names[name] = topic
        await self._ask("SUBSCRIBE", topics)

    async def unsubscribe(self, topics: Collection[str]) -> None:
        """See the link's port."""
        for topic in topics:
            names, name = self._names(topic)
            del names[name]
        await self._ask("UNSUBSCRIBE", topics)

    async def round_trip(self) -> None:
        """See the link's port."""
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        await self._send("PING")
        await pong

    async def close(self) -> None:
        """See the link's port."""
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
        return self._plain if name == topic else self._sharded, name.encode()

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
            with translated(self._name):
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
        if kind in _PLAIN_MESSAGES and name in self._plain:
            self._deliver(self._plain[name], response[-2], response[-1])
        elif kind == b"smessage" and name in self._sharded:
            self._deliver(self._sharded[name], name, response[-1])
        elif kind == b"sunsubscribe" and name in self._sharded:  # and nobody asked for it
            self.lose(MOVED)


class Slots(NamedTuple):
    """Who serves what in a Redis Cluster: ranges of slots, by their first, and their nodes."""

    starts: Sequence[int]
    nodes: Sequence[str]

    def node_of(self, channel: str) -> str:
        """``HOST:PORT`` of the node that serves the sharded channel ``channel``."""
        slot: int = key_slot(channel.encode())
        return self.nodes[bisect(self.starts, slot) - 1]


class ClusterListener:
    """A connection to every node of a cluster (:class:`~pokebridge.transport.link.Connection`).

    When one is lost, or a slot moves, the whole is: then all is dialled again from a new map.
    """

    def __init__(self, slots: Slots, listeners: Mapping[str, Listener]) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._slots = slots
        self._listeners = listeners
        for listener in listeners.values():
            listener.lost.add_done_callback(lambda lost: self.lose(lost.result()))

    @property
    def topics(self) -> AbstractSet[str]:
        """What the servers were asked for."""
        return {topic for listener in self._listeners.values() for topic in listener.topics}

    async def subscribe(self, topics: Collection[str]) -> None:
        """See the link's port."""
        await _all(listener.subscribe(theirs) for listener, theirs in self._by_node(topics))

    async def unsubscribe(self, topics: Collection[str]) -> None:
        """See the link's port."""
        await _all(listener.unsubscribe(theirs) for listener, theirs in self._by_node(topics))

    async def round_trip(self) -> None:
        """See the link's port."""
        await _all(listener.round_trip() for listener in self._listeners.values())

    async def close(self) -> None:
        """See the link's port."""
        await asyncio.gather(*(listener.close() for listener in self._listeners.values()))

    def lose(self, reason: str) -> None:
        """It is of no use any more."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def _by_node(self, topics: Collection[str]) -> Iterator[tuple[Listener, list[str]]]:
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


async def read_slots(name: str, connection: AbstractConnection) -> Slots | None:
    """The map of the cluster that the server at ``connection`` belongs to; ``None`` if it is alone.

    Raises:
        TransportError: the server may not be asked, or the cluster serves nothing.
    """
    host = str(getattr(connection, "host", ""))  # what a node without a name is reached by
    with translated(name):
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
    primaries = [(text_in(primary[0]) or host, primary[1]) for _, _, primary, *_ in ranges]
    return Slots([first for first, *_ in ranges], [f"{at}:{port}" for at, port in primaries])


def text_in(value: Any) -> str:
    """``value``, which a server may leave out, as text."""
    return value.decode() if isinstance(value, bytes) else ""


@contextmanager
def translated(name: str) -> Iterator[None]:
    """The driver's errors as TransportError, in one line without secrets."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise TransportError(f"{name}: {text_of(error)}") from error

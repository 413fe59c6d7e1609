"""The slot map of a Redis Cluster: which node serves a sharded channel."""

from bisect import bisect
from collections.abc import Sequence
from typing import NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import ClusterDownError

from pokebridge.engines.redis import node_address


class Slots(NamedTuple):
    """The first slot of each range, and the range's node."""

    starts: Sequence[int]
    nodes: Sequence[str]

    def node_of(self, channel: str) -> str:
        """``HOST:PORT`` of the node that serves the sharded channel ``channel``."""
        slot: int = key_slot(channel.encode())
        return self.nodes[bisect(self.starts, slot) - 1]


async def read_slots(connection: AbstractConnection) -> Slots:
    """Ask the server for its cluster's slot map.

    Raises:
        RedisError, OSError: it does not answer, or refuses, or its cluster serves no slots.
    """
    asked = str(getattr(connection, "host", ""))
    await connection.send_command("CLUSTER", "SLOTS")
    ranges = sorted(await connection.read_response())
    if not ranges:
        raise ClusterDownError("this cluster serves no slots")
    nodes = [
        node_address((primary[0] or b"").decode(), primary[1], asked)
        for _, _, primary, *_ in ranges
    ]
    return Slots([first for first, *_ in ranges], nodes)

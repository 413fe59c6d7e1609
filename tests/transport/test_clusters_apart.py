"""Clusters that share an engine: none hears another's signals, in any selection."""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
import valkey

from pokebridge.testing.transport import RecordingReceiver, prove_live, subscribe_live
from pokebridge.transport.base import Feed, Selection, Signal, Transport
from pokebridge.transport.names import topic_of
from pokebridge.transport.nats import NatsTransport
from pokebridge.transport.redis import RedisTransport
from tests.support import Daemon, free_port
from tests.support.engines import run_valkey
from tests.transport.pubsub_world import World

SELECTIONS: tuple[Selection, ...] = (Feed.ALL, Feed.UNTAGGED, 42)
# Names that may be confused: the bare name, a name like a shard's, a prefix of another name.
NAMES = ("default", "42", "red", "red-42")

ConnectCluster = Callable[[str], Awaitable[Transport]]

_databases = itertools.count()


@pytest.fixture(params=["nats", "valkey", "valkey cluster", "filter", "topic"])
async def connect(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ConnectCluster]:
    """Transports of a cluster on one engine, which the other clusters share."""
    engine = request.param
    async with AsyncExitStack() as stack:
        make: Callable[..., Awaitable[Any]]
        if engine == "nats":
            make = partial(NatsTransport.connect, request.getfixturevalue("nats_server").url)
        elif engine == "valkey":
            server: Daemon = request.getfixturevalue("valkey_server")
            make = partial(_connect_to_a_database, server)
        elif engine == "valkey cluster":
            flags = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            server = stack.enter_context(run_valkey(tmp_path_factory.mktemp("cluster"), *flags))
            with valkey.Valkey(port=server.port) as client:
                admin: Any = client
                admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            make = partial(RedisTransport.connect, f"redis://{server.address}")
        else:
            make = partial(world.connect, carrier=engine, shard_count=43)

        async def connect(cluster: str) -> Transport:
            transport: Transport = await make(cluster=cluster)
            stack.push_async_callback(transport.close)
            return transport

        yield connect


async def _connect_to_a_database(server: Daemon, cluster: str) -> RedisTransport:
    """Each connects to another database, which separates keys but no channels."""
    url = f"redis://{server.address}/{next(_databases) % 16}"
    return await RedisTransport.connect(url, cluster=cluster)


async def test_no_cluster_hears_another(connect: ConnectCluster) -> None:
    """Each cluster's signals, with or without a shard, reach only its own subscriptions."""
    clusters = {name: await connect(name) for name in NAMES}
    heard: dict[tuple[str, Selection], RecordingReceiver] = {}
    for name, transport in clusters.items():
        for selection in SELECTIONS:
            _, heard[name, selection] = await subscribe_live(transport, selection)
    for name, transport in clusters.items():
        body = b'{"recipient":"%b"}' % name.encode()
        await transport.publish([Signal(body, 42), Signal(body)])
    for (name, selection), receiver in heard.items():
        await receiver.wait_for(lambda heard: bool(heard.payloads))
        await prove_live(clusters[name], receiver, 42 if selection == 42 else None)
        assert set(receiver.payloads) == {b'{"recipient":"%b"}' % name.encode()}


def test_the_names_of_the_default_cluster_stay() -> None:
    """Instances of release 0.1.0 and people who publish by hand use them."""
    assert topic_of("default") == "push-notifications"
    assert topic_of("red") == "push-notifications~red"

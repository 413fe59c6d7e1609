"""Coordination through NATS: the contract, outages, buckets as they may be, permissions."""

import itertools
from collections.abc import AsyncIterator

import nats
import pytest
from tests.coordination.stores import ConnectTo, LoseData, StoreSuite, connections
from tests.support import Daemon

from pokebridge.coordination.nats import NatsCoordination
from pokebridge.testing.coordination import Connect, CoordinationContract

_clusters = itertools.count()


@pytest.fixture
async def connect_to() -> AsyncIterator[ConnectTo]:
    """``NatsCoordination.connect``, closed afterwards."""
    async for connect in connections(NatsCoordination):
        yield connect


async def drop_buckets(server: Daemon) -> None:
    """Delete all buckets there are."""
    client = await nats.connect(server.url)
    jetstream = client.jetstream()
    for stream in await jetstream.streams_info():
        assert stream.config.name is not None
        await jetstream.delete_stream(stream.config.name)
    await client.close()


class TestContract(CoordinationContract):
    """The shipped suite, each test for a cluster of its own."""

    @pytest.fixture
    def connect(self, nats_server: Daemon, connect_to: ConnectTo) -> Connect:
        """Stores of that cluster."""
        cluster = f"contract-{next(_clusters)}"
        return lambda: connect_to(nats_server.url, cluster)


class TestStore(StoreSuite):
    """The suite of all real servers."""

    @pytest.fixture
    async def url(self, nats_server: Daemon) -> str:
        """The session's server, without any bucket."""
        await drop_buckets(nats_server)
        return nats_server.url

    @pytest.fixture
    def own_server(self, own_nats_server: Daemon) -> Daemon:
        """To kill."""
        return own_nats_server

    @pytest.fixture
    def lose_data(self) -> LoseData:
        """Somebody deletes the bucket."""
        return drop_buckets

"""Coordination through Redis: the contract, outages, a Redis Cluster, permissions."""

import itertools
from collections.abc import AsyncIterator

import pytest
from tests.coordination.stores import ConnectTo, LoseData, StoreSuite, connections
from tests.support import Daemon
from valkey.asyncio import Valkey

from pokebridge.coordination.redis import RedisCoordination
from pokebridge.testing.coordination import Connect, CoordinationContract

_databases = itertools.count()


@pytest.fixture
async def connect_to() -> AsyncIterator[ConnectTo]:
    """``RedisCoordination.connect``, closed afterwards."""
    async for connect in connections(RedisCoordination):
        yield connect


@pytest.fixture
async def url(valkey_server: Daemon) -> str:
    """An empty database of the session's server."""
    database = next(_databases) % 16
    async with Valkey(port=valkey_server.port, db=database) as client:
        await client.flushdb()
    return valkey_server.url.removesuffix("/0") + f"/{database}"


class TestContract(CoordinationContract):
    """The shipped suite, each test in a database of its own."""

    @pytest.fixture
    def connect(self, url: str, connect_to: ConnectTo) -> Connect:
        """Stores in that database."""
        return lambda: connect_to(url)


class TestStore(StoreSuite):
    """The suite of all real servers."""

    @pytest.fixture
    def own_server(self, own_valkey_server: Daemon) -> Daemon:
        """To kill; it keeps nothing on disk, so a kill is a loss as well."""
        return own_valkey_server

    @pytest.fixture
    def lose_data(self) -> LoseData:
        """Somebody flushes it."""

        async def lose_data(server: Daemon) -> None:
            async with Valkey(port=server.port) as client:
                await client.flushall()

        return lose_data

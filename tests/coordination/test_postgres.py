"""Coordination through PostgreSQL: the contract, outages, permissions, TLS."""

from collections.abc import AsyncIterator

import asyncpg
import pytest
from tests.coordination.stores import ConnectTo, LoseData, StoreSuite, connections
from tests.support import Daemon

from pokebridge.coordination.postgres import PostgresCoordination
from pokebridge.testing.coordination import Connect, CoordinationContract


@pytest.fixture
async def connect_to() -> AsyncIterator[ConnectTo]:
    """``PostgresCoordination.connect``, closed afterwards."""
    async for connect in connections(PostgresCoordination):
        yield connect


class TestContract(CoordinationContract):
    """The shipped suite, each test in a database of its own."""

    @pytest.fixture
    def connect(self, postgres_database: str, connect_to: ConnectTo) -> Connect:
        """Stores in that database."""
        return lambda: connect_to(postgres_database)


class TestStore(StoreSuite):
    """The suite of all real servers."""

    @pytest.fixture
    def url(self, postgres_database: str) -> str:
        """A database of the test's own."""
        return postgres_database

    @pytest.fixture
    def own_server(self, own_postgres_server: Daemon) -> Daemon:
        """To kill."""
        return own_postgres_server

    @pytest.fixture
    def lose_data(self) -> LoseData:
        """Somebody drops the tables."""

        async def lose_data(server: Daemon) -> None:
            connection = await asyncpg.connect(server.url)
            await connection.execute(
                "DROP TABLE pokebridge_members, pokebridge_documents, pokebridge_leaders"
            )
            await connection.close()

        return lose_data

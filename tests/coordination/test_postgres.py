"""Coordination through PostgreSQL."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.postgres import PostgresCoordination
from pokebridge.testing.coordination import Connect, CoordinationContract


class TestContract(CoordinationContract):
    """The shipped suite."""

    @pytest.fixture
    async def connect(self, postgres_database: str) -> AsyncIterator[Connect]:
        """Stores on a new database."""
        async with AsyncExitStack() as stack:

            async def connect() -> Coordination:
                store = await PostgresCoordination.connect(postgres_database, cluster="default")
                stack.push_async_callback(store.close)
                return store

            yield connect

"""Coordination through Redis."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from tests.support import Daemon

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.redis import RedisCoordination
from pokebridge.testing.coordination import Connect, CoordinationContract


class TestContract(CoordinationContract):
    """The shipped suite."""

    @pytest.fixture
    async def connect(self, own_valkey_server: Daemon) -> AsyncIterator[Connect]:
        """Stores on a new database."""
        async with AsyncExitStack() as stack:

            async def connect() -> Coordination:
                store = await RedisCoordination.connect(own_valkey_server.url, cluster="default")
                stack.push_async_callback(store.close)
                return store

            yield connect

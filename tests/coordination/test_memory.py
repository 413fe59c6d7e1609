"""The in-process coordination keeps the contract."""

from collections.abc import AsyncIterator

import pytest

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.memory import MemoryCoordination
from pokebridge.testing.coordination import Connect, CoordinationContract


class TestMemoryCoordination(CoordinationContract):
    """The shipped suite, over one store in this process."""

    @pytest.fixture
    async def connect(self) -> AsyncIterator[Connect]:
        """Ends of one store, closed afterwards."""
        store = MemoryCoordination()
        ends: list[MemoryCoordination] = []

        async def connect() -> Coordination:
            ends.append(store.connect())
            return ends[-1]

        yield connect
        for end in ends:
            await end.close()

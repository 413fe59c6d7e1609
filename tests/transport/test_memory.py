"""The in-process transport keeps the contract."""

from collections.abc import AsyncIterator

import pytest

from pokebridge.testing.transport import Connect, TransportContract
from pokebridge.transport.base import Transport
from pokebridge.transport.memory import MemoryTransport


class TestMemoryTransport(TransportContract):
    """The shipped suite, over one bus in this process."""

    @pytest.fixture
    async def connect(self) -> AsyncIterator[Connect]:
        """Ends of one bus, closed afterwards."""
        bus = MemoryTransport()
        ends: list[MemoryTransport] = []

        async def connect() -> Transport:
            ends.append(bus.connect())
            return ends[-1]

        yield connect
        for end in ends:
            await end.close()

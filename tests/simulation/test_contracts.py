"""What a simulation has for engines keeps the same contracts as they do, on virtual time."""

import asyncio
from random import Random

import pytest

from pokebridge.coordination.base import Coordination
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.testing import coordination, transport
from pokebridge.testing.coordination import CoordinationContract
from pokebridge.testing.mailbox import MailboxContract
from pokebridge.testing.mailbox_kit import ManualClock
from pokebridge.testing.transport import TransportContract
from pokebridge.transport.base import Transport
from simulation.broker import Broker
from simulation.loop import VirtualLoop
from simulation.network import Peer
from simulation.stores import Post, RestorableMailbox, Store
from simulation.trace import Trace


def virtual_loop() -> VirtualLoop:
    """The test's own."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


class TestBroker(TransportContract):
    """The shipped suite, over the broker without faults: its subscriptions may start slowly."""

    @pytest.fixture(params=[0.0, 1.5], ids=["at once", "slow starts"])
    async def connect(self, request: pytest.FixtureRequest) -> transport.Connect:
        """Ends of one broker."""
        loop = virtual_loop()
        broker = Broker(loop, Random(1), Trace(loop.scheduler))
        broker.slow_starts_s = request.param

        async def connect() -> Transport:
            return broker.connect(Peer(loop, "peer"))

        return connect


class TestStore(CoordinationContract):
    """The shipped suite, over the store without faults."""

    @pytest.fixture
    async def connect(self) -> coordination.Connect:
        """Ends of one store."""
        loop = virtual_loop()
        store = Store(loop, Random(1), Trace(loop.scheduler))

        async def connect() -> Coordination:
            return store.connect(Peer(loop, "peer"))

        return connect


class TestPost(MailboxContract):
    """The shipped suite, over the mailbox without faults."""

    @pytest.fixture
    async def mailbox(self, clock: ManualClock, limits: Limits) -> Mailbox:
        """An empty mailbox."""
        loop = virtual_loop()
        post = Post(loop, Random(1), Trace(loop.scheduler), RestorableMailbox(clock, limits))
        return post.connect(Peer(loop, "peer"))

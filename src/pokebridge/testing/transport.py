"""The contract of every transport, as a pytest suite to subclass.

    class TestMyTransport(TransportContract):
        @pytest.fixture
        async def connect(self, my_server):
            ...  # yield an async function that returns a new transport to the same engine

Each call of ``connect`` stands for another process and returns a new adapter. The fixture closes
the adapters.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from pokebridge.errors import TransportError
from pokebridge.transport.base import Feed, Selection, Signal, Subscription, Transport
from pokebridge.wire import encode_probe

__all__ = [
    "RecordingReceiver",
    "TransportContract",
    "prove_live",
    "subscribe_live",
]

TIMEOUT_S = 20.0

Connect = Callable[[], Awaitable[Transport]]

_probe_ids = itertools.count(1)


class RecordingReceiver:
    """A receiver that records signals and gaps, and lets a test wait for them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.tags: list[str | None] = []
        self.gaps: list[tuple[Selection, str]] = []
        self._changed = asyncio.Event()

    def on_signal(self, body: bytes, tag: str | None) -> None:
        """Record a signal."""
        self.bodies.append(body)
        self.tags.append(tag)
        self._changed.set()

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Record a gap."""
        self.gaps.append((selection, reason))
        self._changed.set()

    @property
    def payloads(self) -> list[bytes]:
        """The bodies of all signals except probes."""
        return [body for body in self.bodies if b'"probe"' not in body]

    async def wait_for(
        self, condition: Callable[["RecordingReceiver"], bool], timeout_s: float = TIMEOUT_S
    ) -> None:
        """Return when ``condition`` holds; fail after ``timeout_s`` seconds."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()


async def prove_live(
    transport: Transport,
    receiver: RecordingReceiver,
    shard: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Publish probes until one arrives at ``receiver``, whose subscription then delivers."""
    async with asyncio.timeout(timeout_s):
        while True:
            probe = encode_probe(f"contract-{next(_probe_ids)}")
            await transport.publish([Signal(probe, shard)])
            try:
                await receiver.wait_for(lambda heard, p=probe: p in heard.bodies, 1.0)  # type: ignore[misc]
            except TimeoutError:
                continue
            return


async def subscribe_live(
    transport: Transport, selection: Selection
) -> tuple[Subscription, RecordingReceiver]:
    """Subscribe and return once the subscription is proven to deliver."""
    receiver = RecordingReceiver()
    subscription = await transport.subscribe(selection, receiver)
    await prove_live(transport, receiver, selection if isinstance(selection, int) else None)
    return subscription, receiver


class TransportContract:
    """What every transport promises (``pokebridge.transport.base``)."""

    selects = True
    """Whether the engine filters by shard; Google's emulator stores filters and ignores them."""

    async def test_fan_out_reaches_every_instance(self, connect: Connect) -> None:
        """A signal from one instance reaches every instance, itself included, with its tag."""
        one, two, three = [await connect() for _ in range(3)]
        receivers = [(await subscribe_live(t, Feed.ALL))[1] for t in (one, two, three)]
        await one.publish([Signal(b'{"recipient":"a"}', 5), Signal(b'{"recipient":"b"}')])
        for receiver in receivers:
            await receiver.wait_for(lambda heard: len(heard.payloads) >= 2)
            heard = dict(zip(receiver.bodies, receiver.tags, strict=True))
            assert heard[b'{"recipient":"a"}'] == "5"
            assert heard[b'{"recipient":"b"}'] is None

    async def test_bodies_arrive_as_they_were_sent(self, connect: Connect) -> None:
        """A body is carried byte for byte: empty JSON, UTF-8, and one of 100,000 bytes."""
        transport = await connect()
        _, receiver = await subscribe_live(transport, Feed.ALL)
        bodies = {b"{}", '{"recipient":"grüße-☃"}'.encode(), b'{"x":"%b"}' % (b"y" * 100_000)}
        await transport.publish([Signal(body, 1) for body in bodies])
        await receiver.wait_for(lambda heard: len(set(heard.payloads)) == len(bodies))
        assert set(receiver.payloads) == bodies

    async def test_a_large_publish_arrives_whole(self, connect: Connect) -> None:
        """Two thousand signals in one call all arrive."""
        publisher, subscriber = await connect(), await connect()
        _, receiver = await subscribe_live(subscriber, Feed.ALL)
        bodies = {b'{"n":%d}' % n for n in range(2000)}
        await publisher.publish([Signal(body, 7) for body in bodies])
        await receiver.wait_for(lambda heard: len(set(heard.payloads)) == len(bodies))
        assert set(receiver.payloads) == bodies
        assert receiver.gaps == []

    async def test_a_shard_subscription_hears_its_shard_only(self, connect: Connect) -> None:
        """Selecting shard 42 delivers signals tagged 42, no other and no untagged ones."""
        if not self.selects:
            pytest.skip("this engine does not filter")
        transport = await connect()
        _, receiver = await subscribe_live(transport, 42)
        await transport.publish(
            [Signal(b"{}", 4), Signal(b"{}", 2), Signal(b"{}"), Signal(b'{"the":"one"}', 42)]
        )
        await prove_live(transport, receiver, 42)
        assert receiver.payloads == [b'{"the":"one"}']

    async def test_untagged_signals_have_a_subscription_of_their_own(
        self, connect: Connect
    ) -> None:
        """Selecting the untagged delivers signals without a shard and no others."""
        if not self.selects:
            pytest.skip("this engine does not filter")
        transport = await connect()
        _, receiver = await subscribe_live(transport, Feed.UNTAGGED)
        await transport.publish([Signal(b"{}", 0), Signal(b"{}", 42), Signal(b'{"the":"one"}')])
        await prove_live(transport, receiver)
        assert receiver.payloads == [b'{"the":"one"}']

    async def test_several_selections_of_one_instance_are_independent(
        self, connect: Connect
    ) -> None:
        """Closing one subscription leaves the others of the same instance as they were."""
        if not self.selects:
            pytest.skip("this engine does not filter")
        transport = await connect()
        first, heard_first = await subscribe_live(transport, 1)
        _, heard_second = await subscribe_live(transport, 2)
        await first.close()
        await transport.publish([Signal(b'{"n":1}', 1), Signal(b'{"n":2}', 2)])
        await heard_second.wait_for(lambda heard: heard.payloads == [b'{"n":2}'])
        await prove_live(transport, heard_second, 2)
        assert heard_first.payloads == []

    async def test_a_closed_subscription_hears_nothing(self, connect: Connect) -> None:
        """After close() no signal comes, and closing again is harmless."""
        transport = await connect()
        closed, heard_closed = await subscribe_live(transport, Feed.ALL)
        other = await connect()
        _, heard_open = await subscribe_live(other, Feed.ALL)
        await closed.close()
        await closed.close()
        await transport.publish([Signal(b'{"late":1}', 3)])
        await heard_open.wait_for(lambda heard: b'{"late":1}' in heard.payloads)
        assert b'{"late":1}' not in heard_closed.payloads

    async def test_a_closed_transport_refuses(self, connect: Connect) -> None:
        """After close() publishing and subscribing raise TransportError; closing again is fine."""
        transport = await connect()
        await subscribe_live(transport, Feed.ALL)
        await transport.close()
        await transport.close()
        with pytest.raises(TransportError):
            await transport.publish([Signal(b"{}", 1)])
        with pytest.raises(TransportError):
            await transport.subscribe(Feed.ALL, RecordingReceiver())

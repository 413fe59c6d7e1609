"""What a transport over a connection does when that breaks: one suite over real NATS and Valkey.

A subclass has the URL's ``scheme`` and the fixtures ``own_server`` (a server to kill, which gives a
slow consumer 2 MB), ``connect_url`` (an async function that returns a new transport, closed
afterwards) and ``flood`` (publishes on the default topic, and blocks, until the server disconnects
its consumer; returns how many messages it took).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest

from pokebridge.errors import TransportError
from pokebridge.testing.transport import RecordingReceiver, subscribe_live
from pokebridge.transport import reconnecting_link
from pokebridge.transport.base import Feed, Selection, Signal, Transport
from tests.support import CutProxy, Daemon, wait_until

ConnectTo = Callable[[str], Awaitable[Transport]]

Flood = Callable[[Daemon], int]

SELECTIONS: tuple[Selection, ...] = (Feed.ALL, Feed.UNTAGGED, 42)


def is_away(transport: Transport) -> bool:
    """Whether the transport's link has noticed that its connection is gone."""
    try:
        return not transport._link.connection  # type: ignore[attr-defined]  # both have a link
    except TransportError:
        return True


@asynccontextmanager
async def flowing(transport: Transport) -> AsyncIterator[None]:
    """Publish all the time, whatever comes of it."""

    async def publish() -> None:
        while True:
            with suppress(TransportError):
                await transport.publish([Signal(b'{"flow":1}', 42), Signal(b'{"flow":1}')])
            await asyncio.sleep(0.005)

    flow = asyncio.create_task(publish())
    try:
        yield
    finally:
        flow.cancel()
        await asyncio.gather(flow, return_exceptions=True)


async def assert_hears(
    transport: Transport, receiver: RecordingReceiver, shard: int | None
) -> None:
    """One signal, published once, arrives: what a gap's end promises."""
    body = b'{"after":%d}' % time.monotonic_ns()
    await transport.publish([Signal(body, shard)])
    await receiver.wait_for(lambda heard: body in heard.bodies)


class OutageContract:
    """What happens to a transport while its server is away, and after."""

    scheme: str

    @pytest.fixture
    def connect_to(self, connect_url: Callable[[str], Awaitable[Transport]]) -> ConnectTo:
        """Connects to ``HOST:PORT``."""
        return lambda address: connect_url(f"{self.scheme}://{address}")

    async def test_a_killed_server_is_a_gap_and_then_forgotten(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """A kill -9 amid traffic is a gap after the restart, and then all is heard."""
        publisher, transport = [await connect_to(own_server.address) for _ in range(2)]
        receivers = {which: (await subscribe_live(transport, which))[1] for which in SELECTIONS}
        async with flowing(publisher):
            await asyncio.to_thread(own_server.kill)
            await wait_until(partial(is_away, transport))
            assert all(receiver.gaps == [] for receiver in receivers.values())
            await asyncio.to_thread(own_server.start)
            for which, receiver in receivers.items():
                await receiver.wait_for(lambda heard: bool(heard.gaps))
                assert {selection for selection, _ in receiver.gaps} == {which}
        await wait_until(lambda: not is_away(publisher))
        for which, receiver in receivers.items():
            await assert_hears(publisher, receiver, which if isinstance(which, int) else None)

    async def test_nothing_is_kept_back_while_the_server_is_away(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """Publishing and subscribing raise one clear line, at once."""
        transport = await connect_to(own_server.address)
        await asyncio.to_thread(own_server.kill)
        await wait_until(partial(is_away, transport))
        async with asyncio.timeout(1):
            with pytest.raises(TransportError, match=own_server.address) as caught:
                await transport.publish([Signal(b"{}", 1)])
            assert "\n" not in str(caught.value)
            with pytest.raises(TransportError, match=own_server.address):
                await transport.subscribe(Feed.ALL, RecordingReceiver())

    async def test_what_was_closed_meanwhile_stays_closed(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """A subscription that is closed while the server is away is told so, and not restored."""
        transport = await connect_to(own_server.address)
        closed, heard_closed = await subscribe_live(transport, 1)
        _, heard_open = await subscribe_live(transport, 2)
        await asyncio.to_thread(own_server.kill)
        await wait_until(partial(is_away, transport))
        await closed.close()
        await asyncio.to_thread(own_server.start)
        await heard_open.wait_for(lambda heard: bool(heard.gaps))
        await transport.publish([Signal(b'{"n":1}', 1)])
        await assert_hears(transport, heard_open, 2)
        assert heard_closed.payloads == []
        assert [selection for selection, _ in heard_closed.gaps] == [1]

    async def test_a_silent_connection_is_noticed_and_replaced(
        self, own_server: Daemon, connect_to: ConnectTo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cut that closes nothing, amid traffic, is noticed and healed by itself."""
        monkeypatch.setattr(reconnecting_link, "HEARTBEAT_S", 0.5)
        direct = await connect_to(own_server.address)
        async with CutProxy("127.0.0.1", own_server.port) as proxy:
            transport = await connect_to(proxy.address)
            _, receiver = await subscribe_live(transport, Feed.ALL)
            monkeypatch.setattr(reconnecting_link, "DIAL_TIMEOUT_S", 1.0)
            proxy.cut()
            big = [Signal(b"x" * 500_000, 3)]
            published = asyncio.gather(
                *(transport.publish(big) for _ in range(40)), return_exceptions=True
            )
            await wait_until(partial(is_away, transport), 15)
            assert {type(outcome) for outcome in await published} == {TransportError}
            await direct.publish([Signal(b'{"lost":1}', 3)])
            proxy.heal()
            await receiver.wait_for(lambda heard: bool(heard.gaps))
            await assert_hears(direct, receiver, 3)
            await transport.close()

    async def test_a_reset_connection_is_replaced(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """A connection that breaks under a living server is a gap, every time."""
        direct = await connect_to(own_server.address)
        async with CutProxy("127.0.0.1", own_server.port) as proxy:
            transport = await connect_to(proxy.address)
            _, receiver = await subscribe_live(transport, 7)
            for count in (1, 2):
                proxy.reset()
                await receiver.wait_for(lambda heard, n=count: len(heard.gaps) >= n)  # type: ignore[misc]
                await assert_hears(direct, receiver, 7)
            await transport.close()

    async def test_a_receiver_that_fails_is_survived(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """If one receiver fails to handle a gap, the others and later gaps are still handled."""
        async with CutProxy("127.0.0.1", own_server.port) as proxy:
            transport = await connect_to(proxy.address)
            failing, (_, receiver) = RecordingReceiver(), await subscribe_live(transport, 7)
            failing.on_gap = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
            await transport.subscribe(8, failing)
            await transport.subscribe(9, receiver)
            for count in (2, 4):
                proxy.reset()
                await receiver.wait_for(lambda heard, n=count: len(heard.gaps) >= n)  # type: ignore[misc]
            await transport.close()

    async def test_a_stall_of_our_own_is_no_dead_connection(
        self,
        own_server: Daemon,
        connect_to: ConnectTo,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A process that was stopped for longer than the heartbeat allows keeps its connection."""
        monkeypatch.setattr(reconnecting_link, "HEARTBEAT_S", 0.1)
        transport = await connect_to(own_server.address)
        _, receiver = await subscribe_live(transport, Feed.ALL)
        connection = transport._link._connection  # type: ignore[attr-defined]  # both have a link
        ask, stalls = connection.round_trip, 0

        async def ask_and_stall() -> None:
            nonlocal stalls
            asked = asyncio.ensure_future(ask())
            for _ in range(10):  # so that it is sent
                await asyncio.sleep(0)
            time.sleep(3 * reconnecting_link.HEARTBEAT_S)  # noqa: ASYNC251 - stalls the loop on purpose
            stalls += 1
            await asked

        monkeypatch.setattr(connection, "round_trip", ask_and_stall)
        await wait_until(lambda: stalls > 3)
        await assert_hears(transport, receiver, 1)
        assert receiver.gaps == []

    async def test_a_slow_consumer_is_cut_off_and_told(
        self, own_server: Daemon, connect_to: ConnectTo, flood: Flood
    ) -> None:
        """A process that does not read is thrown out by the server: a gap, not silence."""
        transport = await connect_to(own_server.address)
        _, receiver = await subscribe_live(transport, Feed.ALL)
        sent = flood(own_server)  # blocks this loop, so that nobody reads
        await receiver.wait_for(lambda heard: bool(heard.gaps))
        assert len(receiver.payloads) < sent
        await assert_hears(transport, receiver, 1)

    async def test_a_publish_that_is_given_up_harms_nobody(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """Cancelling calls at any moment leaves the connection as it was."""
        transport = await connect_to(own_server.address)
        _, receiver = await subscribe_live(transport, Feed.ALL)
        abandoned = RecordingReceiver()
        for delay_s in (0, 0.0001, 0.0003, 0.001, 0.003):
            publishing = asyncio.create_task(transport.publish([Signal(b"{}", 1)]))
            subscribing = asyncio.create_task(transport.subscribe(5, abandoned))
            await asyncio.sleep(delay_s)
            publishing.cancel()
            if not subscribing.cancel():
                await subscribing.result().close()
            await asyncio.gather(publishing, subscribing, return_exceptions=True)
        await assert_hears(transport, receiver, 1)
        subscription, heard = await subscribe_live(transport, 5)
        await transport.publish([Signal(b'{"once":1}', 5)])
        await assert_hears(transport, heard, 5)
        assert heard.payloads.count(b'{"once":1}') == 1
        assert abandoned.payloads == []
        assert receiver.gaps == []
        await subscription.close()

    async def test_closing_leaves_nothing_behind(
        self, own_server: Daemon, connect_to: ConnectTo
    ) -> None:
        """close() ends every task and connection, connected or not."""
        before = asyncio.all_tasks()
        for away in (False, True):
            transport = await connect_to(own_server.address)
            await subscribe_live(transport, Feed.ALL)
            if away:
                await asyncio.to_thread(own_server.kill)
                await wait_until(partial(is_away, transport))
            await transport.close()
            await transport.close()
            assert asyncio.all_tasks() - before == set()

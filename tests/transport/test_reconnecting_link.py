"""The limits of the link that NATS and Redis share; ``outages.py`` has the outages themselves."""

import asyncio
from collections.abc import Collection
from collections.abc import Set as AbstractSet

import pytest

from pokebridge import supervisor
from pokebridge.supervisor import task_failures
from pokebridge.testing.transport import RecordingReceiver
from pokebridge.transport import reconnecting_link
from pokebridge.transport.base import Feed
from pokebridge.transport.reconnecting_link import Deliver, EngineConnection, ReconnectingLink
from tests.support import wait_until


def test_the_limits_are_those_that_the_docs_state() -> None:
    """A cut is noticed after 4 to 6 s, and a server that is back is used again within 5 s."""
    link = reconnecting_link
    assert link.SILENT_BEATS * link.HEARTBEAT_S == 4
    assert (link.SILENT_BEATS + 1) * link.HEARTBEAT_S == 6
    assert link.BACKOFF_CAP_S + link.DIAL_TIMEOUT_S < 5


class FakeConnection(EngineConnection):
    """A connection without a server. Its driver has defects."""

    spread_s = 0.0
    topics: AbstractSet[str] = frozenset()

    def __init__(self, deliver: Deliver) -> None:
        super().__init__()
        self.deliver = deliver
        self.defect: Exception | None = None
        self.may_close = asyncio.Event()
        self.may_close.set()
        self.state = "open"

    async def subscribe(self, topics: Collection[str]) -> None:
        """Take them."""
        self.topics |= set(topics)

    async def unsubscribe(self, topics: Collection[str]) -> None:
        """Drop them."""
        self.topics -= set(topics)

    async def round_trip(self) -> None:
        """Answer."""

    async def close(self) -> None:
        """Fail, if it has a defect."""
        self.state = "closing"
        await self.may_close.wait()
        if self.defect is not None:
            raise self.defect
        self.state = "closed"


async def test_a_defect_of_the_driver_stops_no_reconnecting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a defect at closing or dialling the link is restored, with one gap."""
    monkeypatch.setattr(supervisor, "BACKOFF_CAP_S", 0.001)
    monkeypatch.setattr(reconnecting_link, "BACKOFF_CAP_S", 0.001)
    defects: list[Exception] = []
    connections: list[FakeConnection] = []

    async def dial(deliver: Deliver) -> FakeConnection:
        if defects:
            raise defects.pop()
        connections.append(FakeConnection(deliver))
        return connections[-1]

    link = ReconnectingLink("fake", [dial], "topic")
    await link.open()
    receiver = RecordingReceiver()
    await link.subscribe(["topic"], receiver, Feed.ALL)
    defects += [TypeError("a defect"), KeyError("another")]
    connections[0].defect = AttributeError("closed twice")
    connections[0].lost.set_result("cut")
    await wait_until(lambda: receiver.gaps)
    connections[-1].deliver("topic", b"topic", b"{}")
    assert receiver.payloads == [b"{}"]
    assert len(receiver.gaps) == 1
    assert task_failures == {"transport_connection": 3}
    await link.close()


async def test_a_connection_that_is_just_being_closed_is_closed_to_the_end() -> None:
    """The link is closed while it closes a lost connection; no socket is left open by that."""
    connections: list[FakeConnection] = []

    async def dial(deliver: Deliver) -> FakeConnection:
        connections.append(FakeConnection(deliver))
        return connections[-1]

    link = ReconnectingLink("fake", [dial], "topic")
    await link.open()
    (connection,) = connections
    connection.may_close.clear()
    connection.lost.set_result("cut")
    await wait_until(lambda: connection.state == "closing")
    closing = asyncio.create_task(link.close())
    done, _ = await asyncio.wait({closing}, timeout=0.05)
    assert not done
    connection.may_close.set()
    await closing
    assert connection.state == "closed"


async def test_a_gap_that_is_not_over_is_told_at_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is restored, but other servers do not know yet: signals were lost before."""
    monkeypatch.setattr(reconnecting_link, "BACKOFF_CAP_S", 0.001)
    connections: list[FakeConnection] = []

    async def dial(deliver: Deliver) -> FakeConnection:
        connections.append(FakeConnection(deliver))
        return connections[-1]

    link = ReconnectingLink("fake", [dial], "topic")
    await link.open()
    receiver = RecordingReceiver()
    subscription = await link.subscribe(["topic"], receiver, Feed.ALL)
    monkeypatch.setattr(FakeConnection, "spread_s", 600.0)
    connections[0].lost.set_result("cut")
    await wait_until(lambda: connections[-1].topics == {"topic"} and len(connections) == 2)
    assert receiver.gaps == []
    await subscription.close()
    assert receiver.gaps == [(Feed.ALL, "cut")]
    await link.close()

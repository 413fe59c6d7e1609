"""The janitor deletes what dead instances left behind, and never what a living one reads."""

import asyncio
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from grpc import StatusCode

from pokebridge.errors import TransportError
from pokebridge.testing.pubsub import PubSubServer
from pokebridge.testing.transport import RecordingReceiver, subscribe_live
from pokebridge.transport import google_pubsub
from pokebridge.transport.base import Feed, Signal
from pokebridge.transport.google_pubsub import GooglePubSubTransport
from pokebridge.transport.google_pubsub_sweep import EMPTY_LOOKS
from tests.support import wait_until
from tests.transport.pubsub_world import World, crash

# Time for a living reader to acknowledge on a busy machine; the dead need none.
DEAD_AFTER_S = 2.0
ALL_DEAD_AFTER_S = 1.0

VICTIM = """
import asyncio, sys
from pokebridge.transport.base import Feed
from pokebridge.transport.google_pubsub import GooglePubSubTransport
from pokebridge.transport.google_pubsub_sweep import EMPTY_LOOKS

class Receiver:
    def on_signal(self, body, tag): print("heard", flush=True)
    def on_gap(self, selection, reason): pass

async def main(project, instance):
    transport = await GooglePubSubTransport.connect(project, instance=instance)
    await transport.subscribe(Feed.ALL, Receiver())
    await transport.subscribe(42, Receiver())
    print("up", flush=True)
    await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


async def killed_instance(world: World, instance: str) -> None:
    """An instance in a process of its own, with two subscriptions, killed as it reads them."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VICTIM, world.project, instance, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"up\n"
        transport = await world.connect()
        await transport.publish([Signal(b"{}", 42)])
        assert await process.stdout.readline() == b"heard\n"
        assert await process.stdout.readline() == b"heard\n"
    process.kill()
    await process.wait()


@asynccontextmanager
async def traffic(publisher: GooglePubSubTransport) -> AsyncIterator[list[bytes]]:
    """Signals published all the time; yields what was."""
    sent: list[bytes] = []

    async def publish() -> None:
        while True:
            bodies = [b'{"n":"%s"}' % secrets.token_hex(4).encode() for _ in range(5)]
            await publisher.publish([Signal(body, 42) for body in bodies])
            sent.extend(bodies)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(publish())
    try:
        yield sent
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    "either", ["own", pytest.param("emulator", marks=pytest.mark.long)], indirect=True
)
async def test_a_killed_instance_leaves_nothing(either: World) -> None:
    """After kill -9 one sweep deletes its subscriptions; the living, busy or quiet, lose nothing.

    On the emulator this takes half a minute, since it delivers to the dead reader again and again,
    each time until the ack deadline has passed.
    """
    living = await either.connect()
    _, busy = await subscribe_live(living, Feed.ALL)
    _, quiet = await subscribe_live(living, 7)
    mine = set(await either.subscriptions())
    await killed_instance(either, "victim")
    janitor = await either.connect()
    async with traffic(living) as sent:
        report = await janitor.sweep(dead_after_s=DEAD_AFTER_S)
    assert sorted(found.subscription.rpartition("/")[2] for found in report.orphans) == [
        "poke-sub-victim",
        "poke-sub-victim.42",
    ]
    assert {(found.instance, found.deleted) for found in report.orphans} == {("victim", True)}
    assert report.examined == 4
    assert set(await either.subscriptions()) == mine
    await busy.wait_for(lambda heard: set(sent) <= set(heard.payloads), 30.0)
    assert busy.gaps == quiet.gaps == []


async def test_the_living_are_left_alone_however_many_sweep(world: World) -> None:
    """Busy and quiet instances, half of which sweep at once: none is deleted, nothing is lost."""
    living = [await world.connect() for _ in range(6)]
    receivers = [(await subscribe_live(transport, Feed.ALL))[1] for transport in living]
    quiet = [(await subscribe_live(transport, 7))[1] for transport in living]
    async with traffic(living[0]) as sent:
        reports = await asyncio.gather(
            *(transport.sweep(dead_after_s=DEAD_AFTER_S) for transport in living[3:])
        )
    assert [report.orphans for report in reports] == [()] * 3
    assert [report.examined for report in reports] == [10] * 3
    assert len(await world.subscriptions()) == 12
    for receiver in receivers:
        await receiver.wait_for(lambda heard: set(sent) <= set(heard.payloads), 5.0)
    assert all(receiver.gaps == [] for receiver in [*receivers, *quiet])


async def test_a_crash_loop_leaves_no_orphan(world: World) -> None:
    """Fifty starts that all end in a crash, amid traffic: one sweep leaves one at the most."""
    living = await world.connect()
    _, receiver = await subscribe_live(living, Feed.ALL)

    async def crash_loop(loop: int) -> None:
        for number in range(10):
            transport = await world.connect(instance=f"crash-{loop}-{number}")
            await transport.subscribe(Feed.ALL, RecordingReceiver())
            await crash(transport)

    async with traffic(living):
        await asyncio.gather(*(crash_loop(loop) for loop in range(5)))
        report = await living.sweep(dead_after_s=2 * DEAD_AFTER_S)
    assert report.examined == 50
    assert all(orphan.deleted for orphan in report.orphans)
    assert len(await world.subscriptions()) <= 1 + 1
    assert f"poke-sub-{living._instance}" in await world.subscriptions()
    assert receiver.gaps == []


async def test_several_janitors_share_the_work(world: World) -> None:
    """Those that find the same orphan delete it once, and none fails because another was first."""
    for number in range(5):
        transport = await world.connect(instance=f"crash-{number}")
        await transport.subscribe(number, RecordingReceiver())
        await crash(transport)
    janitors = [await world.connect() for _ in range(4)]
    reports = await asyncio.gather(*(one.sweep(dead_after_s=ALL_DEAD_AFTER_S) for one in janitors))
    assert await world.subscriptions() == {}
    assert {orphan.problem for report in reports for orphan in report.orphans} == {None}


async def test_a_dry_run_only_looks(world: World, server: PubSubServer) -> None:
    """It names the orphan, deletes nothing, and has given back whatever it took out to look at."""
    transport = await world.connect(instance="crashed")
    await transport.subscribe(Feed.UNTAGGED, RecordingReceiver())
    await crash(transport)
    janitor = await world.connect()
    report = await janitor.sweep(dry_run=True, dead_after_s=ALL_DEAD_AFTER_S)
    (orphan,) = report.orphans
    assert (orphan.instance, orphan.deleted, orphan.problem) == ("crashed", False, None)
    assert orphan.unread_s >= ALL_DEAD_AFTER_S
    assert report.dry_run
    assert server.calls["DeleteSubscription"] == 0
    assert list(await world.subscriptions()) == ["poke-sub-crashed.untagged"]
    pulled = await janitor._api.call(
        "Pull", subscription=orphan.subscription, max_messages=100, return_immediately=True
    )
    assert len(pulled.received_messages) == server.calls["Publish"] == EMPTY_LOOKS


async def test_what_is_not_ours_is_not_touched(world: World, server: PubSubServer) -> None:
    """Other clusters' and other software's subscriptions are not even looked into."""
    janitor = await world.connect()
    elsewhere = await world.connect(cluster="other")
    await elsewhere.subscribe(Feed.ALL, RecordingReceiver())
    await crash(elsewhere)
    for name in ("poke-sub-foreign", "plain"):
        await world.subscriber.create_subscription(
            name=f"projects/{world.project}/subscriptions/{name}", topic=world.topic
        )
    report = await janitor.sweep(dead_after_s=DEAD_AFTER_S)
    assert (report.examined, report.orphans) == (0, ())
    assert server.calls["Pull"] == 0
    assert len(await world.subscriptions()) == 3


async def test_a_paused_reader_is_given_time(world: World, server: PubSubServer) -> None:
    """An instance that reads nothing for less than the limit keeps its subscription."""
    paused = await world.connect(instance="paused")
    subscription, receiver = await subscribe_live(paused, Feed.ALL)
    janitor = await world.connect()
    server.deny("StreamingPull")
    server.break_streams()
    sweep = asyncio.create_task(janitor.sweep(dead_after_s=2 * DEAD_AFTER_S))
    await wait_until(lambda: server.calls["Pull"] >= 1, 20.0, "a look")
    await asyncio.sleep(DEAD_AFTER_S / 4)  # the pause itself
    server.allow("StreamingPull")
    report = await sweep
    assert report.orphans == ()
    assert receiver.gaps == []
    await subscription.close()


@pytest.mark.parametrize(
    ("method", "permission"),
    [
        ("ListSubscriptions", r"pubsub\.subscriptions\.list"),
        ("Publish", r"pubsub\.topics\.publish"),
        ("Pull", r"pubsub\.subscriptions\.consume"),
    ],
)
async def test_a_sweep_names_the_permission_it_lacks(
    world: World, server: PubSubServer, method: str, permission: str
) -> None:
    """One line names the missing permission."""
    other = await world.connect()
    await other.subscribe(Feed.ALL, RecordingReceiver())
    janitor = await world.connect()
    server.deny(method)
    with pytest.raises(TransportError, match=permission):
        await janitor.sweep(dead_after_s=DEAD_AFTER_S)


async def test_an_orphan_that_may_not_be_deleted_is_reported(
    world: World, server: PubSubServer
) -> None:
    """The report has the reason, and the sweep continues."""
    for number in range(2):
        transport = await world.connect(instance=f"crash-{number}")
        await transport.subscribe(Feed.ALL, RecordingReceiver())
        await crash(transport)
    janitor = await world.connect()
    server.deny("DeleteSubscription")
    report = await janitor.sweep(dead_after_s=ALL_DEAD_AFTER_S)
    assert len(report.orphans) == 2
    for orphan in report.orphans:
        assert not orphan.deleted
        assert "pubsub.subscriptions.delete" in str(orphan.problem)


async def test_a_burst_of_trouble_is_survived(world: World, server: PubSubServer) -> None:
    """Calls that fail for a moment neither end the sweep nor count as evidence."""
    dead = await world.connect(instance="dead")
    await dead.subscribe(Feed.ALL, RecordingReceiver())
    await crash(dead)
    janitor = await world.connect()
    server.fail("Pull", StatusCode.UNAVAILABLE, StatusCode.UNAVAILABLE)
    server.fail("ModifyAckDeadline", StatusCode.UNAVAILABLE)
    report = await janitor.sweep(dead_after_s=ALL_DEAD_AFTER_S)
    assert [orphan.instance for orphan in report.orphans] == ["dead"]


async def test_an_instance_sweeps_by_itself(
    world: World, server: PubSubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon after it subscribes and then again and again, also after a sweep that failed."""
    monkeypatch.setattr(google_pubsub, "SWEEP_SPREAD_S", 0.01)
    server.deny("ListSubscriptions")
    transport = await world.connect(sweep_every_s=0.05)
    assert server.calls["ListSubscriptions"] == 0
    await transport.subscribe(Feed.ALL, RecordingReceiver())
    await wait_until(lambda: server.calls["ListSubscriptions"] >= 2)
    server.allow("ListSubscriptions")
    seen = server.calls["ListSubscriptions"]
    await wait_until(lambda: server.calls["ListSubscriptions"] >= seen + 2)

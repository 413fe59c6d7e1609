"""The Pub/Sub transport keeps the contract and restores what breaks.

It runs over Google's emulator and over our own server, which can do what the emulator can't:
filter, break on demand, notice that a client is gone, and outlive a restart as Google's does.
"""

import asyncio
import secrets
from typing import Any

import pytest
from grpc import StatusCode

from pokebridge.errors import ConfigError, TransportError
from pokebridge.testing.pubsub import PubSubServer
from pokebridge.testing.transport import (
    Connect,
    RecordingReceiver,
    TransportContract,
    subscribe_live,
)
from pokebridge.transport import google_pubsub, google_pubsub_subscription
from pokebridge.transport.base import Feed, Selection, Signal
from pokebridge.transport.google_pubsub import GooglePubSubTransport
from tests.support import CutProxy, Daemon, wait_until
from tests.support.silence import Silence
from tests.support.waiting import WAIT_S
from tests.transport.pubsub_world import TOPIC, Clock, World, crash


class TestContractOnOwnServer(TransportContract):
    """The shipped suite, over the server that filters."""

    @pytest.fixture
    def connect(self, world: World) -> Connect:
        """Instances on our server."""
        return world.connect


class TestContractOnEmulator(TransportContract):
    """The shipped suite, over Google's emulator; the adapter does the filtering it leaves out."""

    @pytest.fixture
    def connect(self, emulated: World) -> Connect:
        """Instances on the emulator."""
        return emulated.connect


async def assert_hears(transport: GooglePubSubTransport, receiver: RecordingReceiver) -> None:
    """One signal, published once, arrives: what a gap's end promises."""
    body = b'{"after":"%s"}' % secrets.token_hex(4).encode()
    await transport.publish([Signal(body, 42)])
    await receiver.wait_for(lambda heard: body in heard.bodies)


async def hear_gap(receiver: RecordingReceiver, selection: Selection = Feed.ALL) -> str:
    """The reason of the first gap."""
    await receiver.wait_for(lambda heard: bool(heard.gaps))
    assert receiver.gaps[0][0] == selection
    return receiver.gaps[0][1]


# --- what is made -----------------------------------------------------------------------------


async def test_subscriptions_are_named_labelled_and_short_lived(either: World) -> None:
    """Each selection has its name, filter and labels; they expire early, and go when closed."""
    transport = await either.connect("i-1", cluster="c-1")
    for selection in (Feed.ALL, Feed.UNTAGGED, 42):
        await transport.subscribe(selection, RecordingReceiver())
    made = await either.subscriptions()
    assert {name: found.filter for name, found in made.items()} == {
        "poke-sub-i-1": "",
        "poke-sub-i-1.untagged": "NOT attributes:shard",
        "poke-sub-i-1.42": 'attributes.shard = "42"',
    }
    for found in made.values():
        assert found.labels["cluster"] == "c-1"
        assert found.labels["instance"] == "i-1"
        assert found.topic == f"{either.topic}~c-1"
        assert found.ack_deadline_seconds == 10
        assert found.message_retention_duration.total_seconds() == 600
        assert found.expiration_policy.ttl.total_seconds() == 86400
    await transport.close()
    assert await either.subscriptions() == {}


async def test_two_subscriptions_of_one_selection_are_two(either: World) -> None:
    """Both hear everything, and closing the first leaves the second."""
    transport = await either.connect()
    first, heard_first = await subscribe_live(transport, Feed.ALL)
    _, heard_second = await subscribe_live(transport, Feed.ALL)
    await assert_hears(transport, heard_first)
    await first.close()
    await assert_hears(transport, heard_second)


async def test_received_signals_are_acknowledged(world: World, server: PubSubServer) -> None:
    """Within a second nothing is left that could be delivered again."""
    transport = await world.connect(instance="i-1")
    _, receiver = await subscribe_live(transport, Feed.ALL)
    await transport.publish([Signal(b'{"n":%d}' % n, 1) for n in range(3000)])
    await receiver.wait_for(lambda heard: len(heard.payloads) == 3000)
    queue = server.broker._queues[f"projects/{world.project}/subscriptions/poke-sub-i-1"]
    await wait_until(lambda: not (queue._leases or queue._waiting), 5.0, "all acknowledged")


async def test_signals_are_published_in_batches(world: World, server: PubSubServer) -> None:
    """1,000 a request at most, 9 MB a request at most, each tagged with its shard."""
    transport = await world.connect()
    await transport.publish([])
    assert server.calls["Publish"] == 0
    await transport.publish([Signal(b"{}", n % 7) for n in range(2500)])
    assert server.calls["Publish"] == 3
    await transport.publish([Signal(b"x" * 4_000_000, 1) for _ in range(5)])
    assert server.calls["Publish"] == 6


async def test_more_streams_than_a_connection_carries(world: World) -> None:
    """120 shards on one instance: Google allows 100 streams a connection."""
    transport = await world.connect()
    receivers = [RecordingReceiver() for _ in range(120)]
    await asyncio.gather(
        *(transport.subscribe(shard, receiver) for shard, receiver in enumerate(receivers))
    )
    await transport.publish([Signal(b'{"shard":%d}' % shard, shard) for shard in range(120)])
    for shard, receiver in enumerate(receivers):
        await receiver.wait_for(lambda heard: bool(heard.bodies))
        assert receiver.bodies == [b'{"shard":%d}' % shard]


# --- starts that fail ---------------------------------------------------------------------------


async def test_an_unreachable_server_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the address, within the call's timeout."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:1 is unreachable") as failure:
        await GooglePubSubTransport.connect("project", instance="i")
    assert "\n" not in str(failure.value)


async def test_missing_credentials_fail_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an emulator and credentials, one line says how to get them."""
    monkeypatch.delenv("PUBSUB_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent.json")
    with pytest.raises(ConfigError, match="gcloud auth application-default login") as failure:
        await GooglePubSubTransport.connect("project", instance="i")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"project": "Under_Score"},
        {"project": ""},
        {"topic": "go"},
        {"topic": "goog-topic"},
        {"topic": "a/b"},
        {"instance": "Upper"},
        {"instance": "dot.ted"},
        {"cluster": ""},
    ],
)
async def test_wrong_names_fail_the_start(wrong: dict[str, str]) -> None:
    """A name that Pub/Sub would refuse, or that could be mistaken, is a setting to correct."""
    names: Any = {"project": "p", "topic": TOPIC, "instance": "i", "cluster": "c", **wrong}
    with pytest.raises(ConfigError, match="is not a valid"):
        await GooglePubSubTransport.connect(**names)


async def test_a_missing_topic_is_made_if_that_is_allowed(
    world: World, server: PubSubServer
) -> None:
    """It is created by default. Otherwise, or without permission, the start names it."""
    with pytest.raises(ConfigError, match=f"{TOPIC} does not exist"):
        await world.connect(create_topic=False)
    server.deny("CreateTopic")
    with pytest.raises(ConfigError, match=r"does not exist.*pubsub\.topics\.create"):
        await world.connect()
    server.allow("CreateTopic")
    await world.connect()
    await world.connect(create_topic=False)
    server.deny("GetTopic", "CreateTopic")
    await world.connect()  # a publisher's account may not look, and need not


@pytest.mark.parametrize(
    ("method", "permission"),
    [
        ("CreateSubscription", r"pubsub\.subscriptions\.create"),
        ("StreamingPull", r"pubsub\.subscriptions\.consume"),
    ],
)
async def test_a_missing_permission_is_named(
    world: World,
    server: PubSubServer,
    method: str,
    permission: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Subscribing fails with the permission's name, and leaves nothing behind."""
    monkeypatch.setattr(google_pubsub, "AWAIT_REFUSAL_S", WAIT_S)
    transport = await world.connect()
    server.deny(method)
    with pytest.raises(TransportError, match=permission):
        await transport.subscribe(Feed.ALL, RecordingReceiver())
    assert await world.subscriptions() == {}
    server.deny("Publish")
    with pytest.raises(TransportError, match=r"pubsub\.topics\.publish"):
        await transport.publish([Signal(b"{}")])


# --- what breaks ------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [Feed.ALL, Feed.UNTAGGED, 42])
async def test_a_deleted_subscription_is_made_anew(either: World, selection: Selection) -> None:
    """The gap is reported once it delivers again, and everything after it is heard."""
    transport = await either.connect("i-1")
    _, receiver = await subscribe_live(transport, selection)
    (name,) = await either.subscriptions()
    await either.delete(name)
    await hear_gap(receiver, selection)  # the emulator may break the stream before it says why
    body = b'{"after":1}'
    await transport.publish([Signal(body, None if selection is Feed.UNTAGGED else 42)])
    await receiver.wait_for(lambda heard: body in heard.bodies)
    assert list(await either.subscriptions()) == [name]
    assert len(receiver.gaps) == 1


async def test_a_gap_ends_only_when_the_new_subscription_delivers(
    world: World, server: PubSubServer
) -> None:
    """A new subscription needs a second. Signals published once the gap is reported arrive."""
    transport = await world.connect(instance="i-1")
    _, receiver = await subscribe_live(transport, 42)
    server.broker.liveness_delay_s = 1.0
    await world.delete("poke-sub-i-1.42")
    await hear_gap(receiver, 42)
    await assert_hears(transport, receiver)


async def test_who_may_not_publish_hears_of_gaps_too(
    world: World, server: PubSubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the permission for a probe the gap is reported after a while of grace."""
    monkeypatch.setattr(google_pubsub_subscription, "SETTLE_S", 0.1)
    transport = await world.connect(instance="i-1")
    publisher = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    server.deny("Publish")
    await world.delete("poke-sub-i-1")
    await hear_gap(receiver)
    server.allow("Publish")
    await assert_hears(publisher, receiver)


async def test_broken_streams_lose_nothing(
    world: World, server: PubSubServer, clock: Clock
) -> None:
    """A subscription keeps signals while its stream is away, so there is no loss and no gap."""
    transport = await world.connect()
    publisher = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    sent = {b'{"n":%d}' % n for n in range(300)}
    for number, body in enumerate(sorted(sent)):
        if number % 60 == 0:
            server.break_streams()
        await publisher.publish([Signal(body, 1)])
    # Messages that a broken stream had taken come again after the ack deadline.
    clock.advance(google_pubsub_subscription.ACK_DEADLINE_S)
    await receiver.wait_for(lambda heard: set(heard.payloads) == sent)
    assert receiver.gaps == []


async def test_refused_streams_are_opened_again(world: World, server: PubSubServer) -> None:
    """Whatever a stream is refused with, the next try comes, for as long as it takes."""
    transport = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    server.fail(
        "StreamingPull",
        StatusCode.UNAVAILABLE,
        StatusCode.INTERNAL,
        StatusCode.PERMISSION_DENIED,
        StatusCode.INVALID_ARGUMENT,
        StatusCode.RESOURCE_EXHAUSTED,
    )
    opened = server.calls["StreamingPull"]
    server.break_streams()
    await wait_until(lambda: server.calls["StreamingPull"] >= opened + 6, 20.0, "six tries")
    await assert_hears(transport, receiver)
    assert receiver.gaps == []


async def test_a_quota_that_is_used_up_is_waited_out(world: World, server: PubSubServer) -> None:
    """A publish is repeated. A subscription that cannot be created at once is a gap."""
    transport = await world.connect(instance="i-1")
    publisher = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    exhausted = [StatusCode.RESOURCE_EXHAUSTED] * 3
    server.fail("Publish", *exhausted)
    await assert_hears(publisher, receiver)
    server.fail("CreateSubscription", *exhausted)
    created = server.calls["CreateSubscription"]
    await world.delete("poke-sub-i-1")
    await hear_gap(receiver)
    assert server.calls["CreateSubscription"] == created + 4
    await assert_hears(publisher, receiver)


async def test_an_outage_of_the_service_is_no_gap(world: World, server: PubSubServer) -> None:
    """A server that returns with its data has lost nothing."""
    transport = await world.connect()
    publisher = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    await server.stop()
    publishing = asyncio.create_task(publisher.publish([Signal(b'{"during":1}', 1)]))
    await server.start()
    await publishing
    await receiver.wait_for(lambda heard: b'{"during":1}' in heard.payloads)
    await assert_hears(publisher, receiver)
    assert receiver.gaps == []


async def test_an_outage_longer_than_the_retention_is_a_gap(
    world: World, server: PubSubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away for longer than messages are kept, the subscription may have lost some."""
    transport = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    monkeypatch.setattr(google_pubsub_subscription, "COVERED_S", 0.2)
    server.deny("StreamingPull")
    began = server.calls["StreamingPull"]
    server.break_streams()
    await wait_until(lambda: server.calls["StreamingPull"] >= began + 4)
    server.allow("StreamingPull")
    assert "cut off" in await hear_gap(receiver)
    await assert_hears(transport, receiver)


async def test_a_server_that_forgets_everything_is_a_gap(
    world: World, server: PubSubServer
) -> None:
    """After an empty restart the topic and all instances' subscriptions are created again."""
    transports = [await world.connect() for _ in range(3)]
    receivers = [(await subscribe_live(t, which))[1] for t in transports for which in (Feed.ALL, 3)]
    port = int(server.address.rpartition(":")[2])
    await server.stop()
    reborn = PubSubServer()
    await reborn.start(port)
    for receiver in receivers:
        await receiver.wait_for(lambda heard: bool(heard.gaps))
    await transports[0].publish([Signal(b'{"after":1}', 3)])
    for receiver in receivers:
        await receiver.wait_for(lambda heard: b'{"after":1}' in heard.payloads)
    for transport in transports:
        await transport.close()
    await reborn.stop()


async def test_a_killed_emulator_is_a_gap(
    own_pubsub_emulator: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 of Google's emulator and a restart, with signals flowing: gap, then all is heard."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", own_pubsub_emulator.address)
    async with World(own_pubsub_emulator.address, is_emulator=True) as world:
        transport, publisher = await world.connect(), await world.connect()
        _, receiver = await subscribe_live(transport, Feed.ALL)
        await asyncio.to_thread(own_pubsub_emulator.kill)
        await asyncio.to_thread(own_pubsub_emulator.start)
        await hear_gap(receiver)
        await assert_hears(publisher, receiver)


async def test_a_deleted_topic_is_restored(world: World, silence: Silence) -> None:
    """The next publish creates it again, with all of this instance's subscriptions."""
    transport = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    _, of_shard = await subscribe_live(transport, 42)
    await world.publisher.delete_topic(topic=world.topic)
    heard_again = silence("a Pub/Sub topic is deleted, and the next publish makes it again")
    await transport.publish([Signal(b"{}", 42)])
    await hear_gap(receiver)
    await hear_gap(of_shard, 42)
    await assert_hears(transport, receiver)
    await assert_hears(transport, of_shard)
    heard_again()


@pytest.mark.parametrize(
    ("silent_s", "watch_s"), [(0.2, 0.1), pytest.param(8.0, 5.0, marks=pytest.mark.long)]
)
async def test_a_subscription_on_a_deleted_topic_notices(
    either: World,
    monkeypatch: pytest.MonkeyPatch,
    silent_s: float,
    watch_s: float,
    silence: Silence,
) -> None:
    """Another makes a topic of the same name: no error is seen, only silence, and it is enough.

    No probe is waited for: the service says what the subscription is attached to.
    """
    monkeypatch.setattr(google_pubsub_subscription, "SILENT_S", silent_s)
    monkeypatch.setattr(google_pubsub_subscription, "WATCH_S", watch_s)
    transport = await either.connect()
    publisher = await either.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    _, of_shard = await subscribe_live(transport, 42)
    await either.publisher.delete_topic(topic=either.topic)
    await either.publisher.create_topic(name=either.topic)
    heard_again = silence(
        f"a Pub/Sub topic is deleted and made again, and looked at after {silent_s:g} s of silence"
    )
    await hear_gap(receiver)
    await hear_gap(of_shard, 42)
    await assert_hears(publisher, receiver)
    await assert_hears(publisher, of_shard)
    heard_again()


async def test_a_subscription_that_hears_nothing_is_probed(
    either: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription whose probe gets no answer is created again."""
    monkeypatch.setattr(google_pubsub_subscription, "QUIET_S", 0.2)
    monkeypatch.setattr(google_pubsub_subscription, "WATCH_S", 0.1)
    monkeypatch.setattr(google_pubsub_subscription, "PROOF_TIMEOUT_S", 3.0)
    transport = await either.connect()
    publisher = await either.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    await either.publisher.delete_topic(topic=either.topic)
    await either.publisher.create_topic(name=either.topic)
    await hear_gap(receiver)
    await assert_hears(publisher, receiver)


async def test_silence_is_no_reason_to_reconnect(
    world: World, server: PubSubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quiet subscription is looked at, and answers a probe, and its stream stays."""
    monkeypatch.setattr(google_pubsub_subscription, "SILENT_S", 0.05)
    monkeypatch.setattr(google_pubsub_subscription, "QUIET_S", 0.05)
    monkeypatch.setattr(google_pubsub_subscription, "WATCH_S", 0.05)
    transport = await world.connect()
    _, receiver = await subscribe_live(transport, Feed.ALL)
    streams = server.calls["StreamingPull"]
    heard = len(receiver.bodies)
    await receiver.wait_for(lambda r: len(r.bodies) >= heard + 5)
    assert server.calls["StreamingPull"] == streams
    assert receiver.gaps == []


async def test_a_cut_connection_is_noticed(
    server: PubSubServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets that vanish without an error: the keepalive notices, and a new connection delivers.

    The proxy holds everything back, so nothing can be heard until the transport has given the old
    connections up and opened new ones.
    """
    async with (
        CutProxy("127.0.0.1", int(server.address.rpartition(":")[2])) as proxy,
        World(server.address) as world,
    ):
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", proxy.address)
        transport = await world.connect(keepalive_s=1.0)
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        publisher = await world.connect()
        _, receiver = await subscribe_live(transport, Feed.ALL)
        proxy.cut()
        before = proxy.connection_count
        await publisher.publish([Signal(b'{"during":1}', 1)])
        await wait_until(lambda: proxy.connection_count > before, 15.0, "a new connection")
        proxy.heal()
        clock.advance(google_pubsub_subscription.ACK_DEADLINE_S)  # the old stream had taken it
        await receiver.wait_for(lambda heard: b'{"during":1}' in heard.payloads)
        await assert_hears(publisher, receiver)
        assert receiver.gaps == []


async def test_a_reset_connection_to_the_emulator_is_a_gap(
    pubsub_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator still feeds the broken stream, so the subscription is created again."""
    host, _, port = pubsub_emulator.rpartition(":")
    async with (
        CutProxy(host, int(port)) as proxy,
        World(pubsub_emulator, is_emulator=True) as world,
    ):
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", proxy.address)
        transport = await world.connect()
        _, receiver = await subscribe_live(transport, Feed.ALL)
        proxy.reset()
        await hear_gap(receiver)
        for _ in range(10):
            await assert_hears(transport, receiver)


# --- names ------------------------------------------------------------------------------------


async def test_what_an_earlier_life_left_is_replaced(either: World) -> None:
    """A restarted instance with the same name starts with a new subscription."""
    earlier = await either.connect("i-1")
    await earlier.subscribe(Feed.ALL, RecordingReceiver())
    await crash(earlier)
    again = await either.connect("i-1")
    await again.publish([Signal(b'{"stale":1}')])
    _, receiver = await subscribe_live(again, Feed.ALL)
    assert receiver.payloads == []
    assert list(await either.subscriptions()) == ["poke-sub-i-1"]


async def test_two_instances_of_one_name_do_not_fight(world: World) -> None:
    """The later one takes the name and the other another, with one gap. Both hear everything."""
    one, two = [await world.connect("same") for _ in range(2)]
    _, first = await subscribe_live(one, Feed.ALL)
    _, second = await subscribe_live(two, Feed.ALL)
    await hear_gap(first)
    for _ in range(10):
        await assert_hears(two, first)
        await assert_hears(one, second)
    assert (len(first.gaps), len(second.gaps)) == (1, 0)
    assert len(await world.subscriptions()) == 2
    assert (await one.sweep(dry_run=True, dead_after_s=0.1)).examined == 1  # the other's
    await one.close()
    assert list(await world.subscriptions()) == ["poke-sub-same"]


async def test_somebody_elses_subscription_is_never_replaced(world: World) -> None:
    """A subscription of that name with other labels is left alone, and the start fails."""
    name = f"projects/{world.project}/subscriptions/poke-sub-i-1"
    transport = await world.connect(instance="i-1")
    await world.subscriber.create_subscription(
        request={"name": name, "topic": world.topic, "labels": {"owner": "else"}}
    )
    with pytest.raises(TransportError, match="has another owner"):
        await transport.subscribe(Feed.ALL, RecordingReceiver())
    assert list(await world.subscriptions()) == ["poke-sub-i-1"]

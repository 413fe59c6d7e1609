"""The Pub/Sub transport with a topic a shard: the contract, foreign publishers, and what breaks.

Few shards, since everything is a subscription for each.
"""

import asyncio
from functools import partial
from typing import Any

import pytest
from google.pubsub_v1.types import PubsubMessage

from pokebridge.errors import ConfigError, TransportError
from pokebridge.testing.pubsub import PubSubServer
from pokebridge.testing.transport import (
    Connect,
    RecordingReceiver,
    TransportContract,
    prove_live,
    subscribe_live,
)
from pokebridge.transport.base import Feed, Selection, Signal
from pokebridge.transport.google_pubsub import GooglePubSubTransport
from tests.support.silence import Silence
from tests.transport.pubsub_world import TOPIC, World, crash

SHARD_COUNT = 8


async def connect(world: World, **more: Any) -> GooglePubSubTransport:
    """An instance that uses topics."""
    return await world.connect(carrier="topic", shard_count=SHARD_COUNT, **more)


class TestContractOnOwnServer(TransportContract):
    """The shipped suite, over our own server."""

    @pytest.fixture
    def connect(self, world: World) -> Connect:
        """Instances on our server."""
        return partial(connect, world)


class TestContractOnEmulator(TransportContract):
    """The shipped suite, over Google's emulator, which need not filter here."""

    @pytest.fixture
    def connect(self, emulated: World) -> Connect:
        """Instances on the emulator."""
        return partial(connect, emulated)


async def publish_by_hand(world: World, topic: str, body: bytes, shard: str | None = None) -> None:
    """Publish as somebody else would, with the attribute or without."""
    attributes = {} if shard is None else {"shard": shard}
    message = PubsubMessage(data=body, attributes=attributes)
    name = f"projects/{world.project}/topics/{topic}"
    await world.publisher.publish(topic=name, messages=[message])


async def test_each_shard_has_a_topic(either: World) -> None:
    """They are made when they are needed, and no subscription has a filter."""
    transport = await connect(either, instance="i-1")
    for selection in (Feed.UNTAGGED, 5):
        await transport.subscribe(selection, RecordingReceiver())
    await transport.publish([Signal(b"{}", 6)])
    made = await either.subscriptions()
    assert {name: found.topic.rpartition("/")[2] for name, found in made.items()} == {
        "poke-sub-i-1.untagged": TOPIC,
        "poke-sub-i-1.5": f"{TOPIC}-5",
    }
    assert {found.filter for found in made.values()} == {""}
    topics = await either.publisher.list_topics(project=f"projects/{either.project}")
    names = {topic.name.rpartition("/")[2] async for topic in topics}
    assert names == {TOPIC, f"{TOPIC}-5", f"{TOPIC}-6"}


async def test_a_signal_is_delivered_to_those_alone_who_take_its_shard(
    world: World, server: PubSubServer
) -> None:
    """The service delivers it once, so one delivery is charged."""
    instances = [await connect(world) for _ in range(3)]
    receivers = [(await subscribe_live(one, n))[1] for n, one in enumerate(instances)]
    await instances[0].publish([Signal(b'{"n":%d}' % (n % 3), n % 3) for n in range(9)])
    for shard, receiver in enumerate(receivers):
        await receiver.wait_for(lambda heard: len(heard.payloads) == 3)
        assert set(receiver.payloads) == {b'{"n":%d}' % shard}
        assert set(receiver.tags) == {str(shard)}


async def test_what_others_publish_on_the_shared_topic_is_heard(either: World) -> None:
    """With a tag or without: by who takes everything, and by all who take what has no shard."""
    everything, untagged = await connect(either), await connect(either)
    _, of_all = await subscribe_live(everything, Feed.ALL)
    _, of_untagged = await subscribe_live(untagged, Feed.UNTAGGED)
    await publish_by_hand(either, TOPIC, b'{"tag":0}')
    await publish_by_hand(either, TOPIC, b'{"tag":1}', "5")
    for receiver in (of_all, of_untagged):
        await receiver.wait_for(lambda heard: len(heard.payloads) == 2)
        heard = dict(zip(receiver.bodies, receiver.tags, strict=True))
        assert (heard[b'{"tag":0}'], heard[b'{"tag":1}']) == (None, "5")


async def test_what_others_publish_on_a_shards_topic_is_heard_as_the_shards(world: World) -> None:
    """The topic is tag enough."""
    transport = await connect(world)
    _, receiver = await subscribe_live(transport, 5)
    await publish_by_hand(world, f"{TOPIC}-5", b'{"tag":0}')
    await receiver.wait_for(lambda heard: heard.payloads == [b'{"tag":0}'])
    assert set(receiver.tags) == {"5"}


async def test_everything_is_live_only_with_its_last_topic(
    world: World, server: PubSubServer
) -> None:
    """A probe comes back only when every shard's subscription delivers."""
    publisher = await connect(world)
    await publisher.publish([Signal(b"{}", SHARD_COUNT - 1)])  # makes the topic
    transport = await connect(world)
    server.broker.liveness_delay_s = 1.0
    receiver = RecordingReceiver()
    await transport.subscribe(Feed.ALL, receiver)
    server.broker.liveness_delay_s = 0.0
    await prove_live(transport, receiver)
    await publisher.publish([Signal(b'{"n":%d}' % n, n) for n in range(SHARD_COUNT)])
    await receiver.wait_for(lambda heard: len(heard.payloads) == SHARD_COUNT)
    assert receiver.gaps == []


@pytest.mark.parametrize("selection", [Feed.ALL, 5])
async def test_a_deleted_topic_is_restored(
    world: World, selection: Selection, silence: Silence
) -> None:
    """The next publish creates a deleted shard topic again, and its subscribers get a gap."""
    transport, publisher = await connect(world), await connect(world)
    _, receiver = await subscribe_live(transport, selection)
    await world.publisher.delete_topic(topic=f"{world.topic}-5")
    heard_again = silence("a Pub/Sub topic is deleted, and the next publish makes it again")
    await transport.publish([Signal(b"{}", 5)])
    await receiver.wait_for(lambda heard: bool(heard.gaps))
    assert receiver.gaps[0][0] == selection
    await publisher.publish([Signal(b'{"after":1}', 5)])
    await receiver.wait_for(lambda heard: b'{"after":1}' in heard.payloads)
    heard_again()


async def test_a_deleted_part_of_everything_is_a_gap(either: World) -> None:
    """It is reported once that shard is heard again, and the others are heard all the while."""
    transport = await connect(either, instance="i-1")
    _, receiver = await subscribe_live(transport, Feed.ALL)
    await either.delete("poke-sub-i-1.5")
    await transport.publish([Signal(b'{"other":1}', 4)])
    await receiver.wait_for(lambda heard: bool(heard.gaps))
    assert {selection for selection, _ in receiver.gaps} == {Feed.ALL}
    await transport.publish([Signal(b'{"after":1}', 5)])
    wanted = {b'{"other":1}', b'{"after":1}'}
    await receiver.wait_for(lambda heard: wanted <= set(heard.payloads))


async def test_everything_and_a_shard_at_once(world: World) -> None:
    """As in a migration: each has its own subscriptions, and closing one keeps the other."""
    transport = await connect(world)
    everything, of_all = await subscribe_live(transport, Feed.ALL)
    _, of_shard = await subscribe_live(transport, 5)
    assert len(await world.subscriptions()) == SHARD_COUNT + 2
    await everything.close()
    await transport.publish([Signal(b'{"n":1}', 5)])
    await of_shard.wait_for(lambda heard: heard.payloads == [b'{"n":1}'])
    assert of_all.payloads == []
    assert len(await world.subscriptions()) == 1


async def test_orphans_on_every_topic_are_swept(world: World) -> None:
    """Also by who uses filters, and the other way round: a change of carrier leaves nothing."""
    for name, carrier in (("t", "topic"), ("f", "filter")):
        dead = await world.connect(f"dead-{name}", carrier=carrier, shard_count=SHARD_COUNT)
        for selection in (Feed.ALL, Feed.UNTAGGED, 5):
            await subscribe_live(dead, selection)
        await crash(dead)
    assert len(await world.subscriptions()) == SHARD_COUNT + 3 + 3
    living = await connect(world)
    _, receiver = await subscribe_live(living, Feed.ALL)
    sweeps = [
        (await world.connect(carrier=carrier)).sweep(dead_after_s=2.0)
        for carrier in ("topic", "filter")
    ]
    reports = await asyncio.gather(*sweeps)
    assert {orphan.problem for report in reports for orphan in report.orphans} == {None}
    assert len(await world.subscriptions()) == SHARD_COUNT + 1
    assert receiver.gaps == []


async def test_a_refused_part_keeps_the_whole_from_being_live(
    world: World, server: PubSubServer
) -> None:
    """A probe comes back only once the shards' topics may be created."""
    transport = await connect(world)
    server.deny("CreateTopic")
    receiver = RecordingReceiver()
    await transport.subscribe(Feed.ALL, receiver)
    with pytest.raises(TransportError, match=r"pubsub\.topics\.create"):
        await transport.publish([Signal(b"{}", 5)])
    _, witness = await subscribe_live(transport, Feed.UNTAGGED)
    assert witness.bodies
    assert receiver.bodies == []
    server.allow("CreateTopic")
    await prove_live(transport, receiver)
    await prove_live(transport, receiver, 5)


async def test_a_name_too_long_for_a_shards_topic_fails_the_start(world: World) -> None:
    """It is a setting to correct, and no surprise at the first poke."""
    with pytest.raises(ConfigError, match="is not a valid topic"):
        await GooglePubSubTransport.connect(
            world.project, "t" * 254, instance="i", carrier="topic", shard_count=SHARD_COUNT
        )

"""The test server's behaviour over time, under a clock of the test's own."""

from typing import Any

import pytest
from google.pubsub_v1.types import pubsub as api
from grpc import StatusCode

from pokebridge.testing.pubsub.broker import DELETED_TOPIC, Broker, Stream
from pokebridge.testing.pubsub.checks import ApiError

TOPIC = "projects/p/topics/top"
DAY_S = 24 * 60 * 60


class Clock:
    """Unix time that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        """The time now."""
        return self.now_s


class World:
    """A broker with one topic, and what a test wants to do with it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.broker = Broker(self.clock)
        self.broker.create_topic(api.Topic.pb()(name=TOPIC))

    def subscribe(self, name: str = "sub", **fields: Any) -> str:
        """Create a subscription; returns its full name."""
        full_name = f"projects/p/subscriptions/{name}"
        self.broker.create_subscription(
            api.Subscription.pb()(name=full_name, topic=TOPIC, **fields)
        )
        return full_name

    def publish(self, *bodies: bytes, **attributes: str) -> None:
        """Publish ``bodies``, all with the same attributes."""
        messages = [{"data": body, "attributes": attributes} for body in bodies]
        self.broker.publish(api.PublishRequest.pb()(topic=TOPIC, messages=messages))

    def pull(self, subscription: str, limit: int = 100) -> list[Any]:
        """What can be had now."""
        request = api.PullRequest.pb()(subscription=subscription, max_messages=limit)
        return self.broker.pull(request)

    def pull_bodies(self, subscription: str, limit: int = 100) -> list[bytes]:
        """The bodies of what can be had now."""
        return [received.message.data for received in self.pull(subscription, limit)]

    def stream(self, subscription: str, **limits: int) -> Stream:
        """A stream on ``subscription``."""
        opening = api.StreamingPullRequest.pb()(
            subscription=subscription, stream_ack_deadline_seconds=10, **limits
        )
        return self.broker.open_stream(opening, lambda: None)

    def pass_time(self, seconds: float) -> None:
        """Let time pass and have done what is due."""
        self.clock.now_s += seconds
        self.broker.tick()

    def exists(self, subscription: str) -> bool:
        """Whether the subscription is there."""
        request = api.ListSubscriptionsRequest.pb()(project="projects/p")
        listed = self.broker.list_subscriptions(request).subscriptions
        return subscription in {config.name for config in listed}


@pytest.fixture
def world() -> World:
    """A world of the test's own."""
    return World()


def received(stream: Stream) -> list[Any]:
    """All that ``stream`` has for its client now."""
    messages: list[Any] = []
    while response := stream.take():
        messages.extend(response.received_messages)
    return messages


def acknowledge(stream: Stream, messages: list[Any]) -> None:
    """Acknowledge on the stream."""
    ids = [message.ack_id for message in messages]
    stream.request(api.StreamingPullRequest.pb()(ack_ids=ids))


def test_unacknowledged_messages_come_again_after_the_deadline(world: World) -> None:
    """Not a second before the ack deadline, and then again and again; acknowledged, never."""
    sub = world.subscribe(ack_deadline_seconds=20)
    world.publish(b"1")
    assert world.pull_bodies(sub) == [b"1"]
    world.pass_time(19.9)
    assert world.pull_bodies(sub) == []
    world.pass_time(0.2)
    again = world.pull(sub)
    assert [message.message.data for message in again] == [b"1"]
    request = api.AcknowledgeRequest.pb()(subscription=sub, ack_ids=[again[0].ack_id])
    world.broker.acknowledge(request)
    world.pass_time(DAY_S)
    assert world.pull_bodies(sub) == []


def test_a_deadline_can_be_moved(world: World) -> None:
    """Longer keeps a message away, 0 gives it back at once and in its old order."""
    sub = world.subscribe()
    world.publish(b"1", b"2")
    leased = world.pull(sub)

    def modify(ids: list[str], seconds: int) -> None:
        request = api.ModifyAckDeadlineRequest.pb()(
            subscription=sub, ack_ids=ids, ack_deadline_seconds=seconds
        )
        world.broker.modify_ack_deadline(request)

    modify([leased[0].ack_id], 60)
    world.pass_time(30)
    assert world.pull_bodies(sub) == [b"2"]
    world.pass_time(31)
    leased = world.pull(sub)
    modify([message.ack_id for message in leased], 0)
    assert world.pull_bodies(sub) == [message.message.data for message in leased]


def test_retention_drops_what_nobody_read(world: World) -> None:
    """After the retention a message is deleted, whether it waited or was delivered."""
    sub = world.subscribe(message_retention_duration={"seconds": 600})
    world.publish(b"waiting", b"leased")
    world.pass_time(300)
    world.publish(b"young")
    world.pull(sub, 1)
    world.pass_time(301)
    assert world.pull_bodies(sub) == [b"young"]


def test_a_subscription_that_nobody_uses_expires(world: World) -> None:
    """It is deleted after its time to live. A pull or an open stream keeps it."""
    short = {"message_retention_duration": {"seconds": 600}}
    policy = {"expiration_policy": {"ttl": {"seconds": DAY_S}}}
    idle, pulled, streamed = (
        world.subscribe(name, **short, **policy) for name in ("idle", "pulled", "streamed")
    )
    default = world.subscribe("default")
    immortal = world.subscribe("immortal", expiration_policy={})
    stream = world.stream(streamed)
    world.pass_time(DAY_S - 1)
    assert world.exists(idle)
    world.pull(pulled)
    world.pass_time(1)
    assert not world.exists(idle)
    assert world.exists(pulled)
    assert world.exists(streamed)
    stream.close()
    world.pass_time(DAY_S)
    assert not world.exists(streamed)
    assert world.exists(default)
    world.pass_time(31 * DAY_S)
    assert not world.exists(default)
    assert world.exists(immortal)


def test_streams_of_one_subscription_share_its_messages(world: World) -> None:
    """Each message goes to one of them, and both get about half."""
    sub = world.subscribe()
    one, two = world.stream(sub), world.stream(sub)
    world.publish(*(b"%d" % n for n in range(100)))
    halves = [[message.message.data for message in received(stream)] for stream in (one, two)]
    assert sorted(halves[0] + halves[1]) == sorted(b"%d" % n for n in range(100))
    assert len(halves[0]) == len(halves[1]) == 50


@pytest.mark.parametrize(
    "limits", [{"max_outstanding_messages": 3}, {"max_outstanding_bytes": 3 * 30}]
)
def test_flow_control_holds_messages_back(world: World, limits: dict[str, int]) -> None:
    """The number of outstanding messages is limited. Each ack lets another one through."""
    sub = world.subscribe()
    stream = world.stream(sub, **limits)
    world.publish(*(b"%016d" % n for n in range(10)))
    first = received(stream)
    assert 3 <= len(first) <= 4
    assert received(stream) == []
    acknowledge(stream, first[:2])
    assert len(received(stream)) == 2


def test_what_a_stream_was_sent_stays_leased_when_it_ends(world: World) -> None:
    """Sent messages come again after the deadline, messages that were not sent at once."""
    sub = world.subscribe()
    stream = world.stream(sub, max_outstanding_messages=600)
    world.publish(*(b"%d" % n for n in range(600)))
    sent = stream.take()
    assert sent is not None
    assert len(sent.received_messages) == 500
    stream.close()
    assert len(world.pull(sub, 1000)) == 100
    world.pass_time(10)
    assert len(world.pull(sub, 1000)) == 600


def test_a_response_is_not_too_big_for_a_client(world: World) -> None:
    """A stream's responses stay far below gRPC's default limit of 4 MB."""
    sub = world.subscribe()
    stream = world.stream(sub)
    world.publish(*[b"x" * 900_000] * 5)
    sizes = []
    while response := stream.take():
        sizes.append(response.ByteSize())
    assert len(sizes) == 5
    assert max(sizes) < 2_000_000


def test_deletion_ends_the_streams(world: World) -> None:
    """A stream learns with NOT_FOUND that its subscription was deleted."""
    sub = world.subscribe()
    stream = world.stream(sub)
    world.broker.delete_subscription(api.DeleteSubscriptionRequest.pb()(subscription=sub))
    assert stream.error is not None
    assert stream.error.code is StatusCode.NOT_FOUND
    world.publish(b"nobody hears this")


def test_a_deleted_topic_leaves_its_subscriptions_deaf(world: World) -> None:
    """They stay, name no topic, and do not hear another topic of the same name."""
    sub = world.subscribe()
    world.broker.delete_topic(api.DeleteTopicRequest.pb()(topic=TOPIC))
    world.broker.create_topic(api.Topic.pb()(name=TOPIC))
    world.publish(b"1")
    assert world.pull_bodies(sub) == []
    found = world.broker.get_subscription(api.GetSubscriptionRequest.pb()(subscription=sub))
    assert found.topic == DELETED_TOPIC


def test_filters_decide_what_is_delivered(world: World) -> None:
    """Each subscription gets what its filter matches. Messages without a shard match none."""
    shard = world.subscribe("shard", filter='attributes.shard = "4"')
    untagged = world.subscribe("untagged", filter="NOT attributes:shard")
    everything = world.subscribe("everything")
    world.publish(b"4", shard="4")
    world.publish(b"42", shard="42")
    world.publish(b"none")
    assert world.pull_bodies(shard) == [b"4"]
    assert world.pull_bodies(untagged) == [b"none"]
    assert world.pull_bodies(everything) == [b"4", b"42", b"none"]


def test_a_new_subscription_may_take_time_to_receive(world: World) -> None:
    """With the delay set, messages published in the first second are never delivered."""
    world.broker.liveness_delay_s = 1.0
    sub = world.subscribe()
    world.publish(b"missed")
    world.pass_time(1.0)
    world.publish(b"heard")
    assert world.pull_bodies(sub) == [b"heard"]


@pytest.mark.parametrize(
    "fields",
    [
        {"ack_deadline_seconds": 9},
        {"ack_deadline_seconds": 601},
        {"message_retention_duration": {"seconds": 599}},
        {"message_retention_duration": {"seconds": 31 * DAY_S + 1}},
        {"expiration_policy": {"ttl": {"seconds": DAY_S - 1}}},
        {"expiration_policy": {"ttl": {"seconds": DAY_S}}},  # below the default retention
        {"labels": {"Upper": "case"}},
        {"labels": {"key": "x" * 64}},
        {"labels": {f"l{n}": "" for n in range(65)}},
        {"filter": "bogus"},
        {"filter": "attributes:a" + " " * 250},
    ],
)
def test_what_google_refuses_and_the_emulator_takes(world: World, fields: dict[str, Any]) -> None:
    """Bounds that Google documents and its emulator does not check are checked here."""
    with pytest.raises(ApiError) as refused:
        world.subscribe("refused", **fields)
    assert refused.value.code is StatusCode.INVALID_ARGUMENT
    assert not world.exists("projects/p/subscriptions/refused")


@pytest.mark.parametrize(
    "fields",
    [
        {"push_config": {"push_endpoint": "https://example.com"}},
        {"enable_message_ordering": True},
        {"enable_exactly_once_delivery": True},
        {"dead_letter_policy": {"max_delivery_attempts": 5}},
    ],
)
def test_what_this_server_lacks_it_refuses(world: World, fields: dict[str, Any]) -> None:
    """A feature that is not there fails loudly instead of being ignored."""
    with pytest.raises(ApiError) as refused:
        world.subscribe("refused", **fields)
    assert refused.value.code is StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "attributes", [{"googkey": "x"}, {"": "x"}, {"k" * 257: "x"}, {"k": "x" * 1025}]
)
def test_attributes_have_limits(world: World, attributes: dict[str, str]) -> None:
    """Keys of 1 to 256 bytes, none of Google's own, and values of up to 1,024 bytes."""
    with pytest.raises(ApiError) as refused:
        world.publish(b"x", **attributes)
    assert refused.value.code is StatusCode.INVALID_ARGUMENT


def test_labels_and_durations_can_be_changed_filters_not(world: World) -> None:
    """UpdateSubscription changes only the fields in the mask, and refuses a new filter."""
    sub = world.subscribe(labels={"old": "1"}, filter="attributes:a")

    def update(path: str, **fields: Any) -> Any:
        return world.broker.update_subscription(
            api.UpdateSubscriptionRequest.pb()(
                subscription={"name": sub, **fields}, update_mask={"paths": [path]}
            )
        )

    assert dict(update("labels", labels={"new": "2"}).labels) == {"new": "2"}
    changed = update("message_retention_duration", message_retention_duration={"seconds": 600})
    assert changed.message_retention_duration.seconds == 600
    assert dict(changed.labels) == {"new": "2"}
    assert changed.topic == TOPIC
    for path in ("filter", "topic", "name", "bogus"):
        with pytest.raises(ApiError):
            update(path, filter="attributes:b")
    with pytest.raises(ApiError):
        update("message_retention_duration", message_retention_duration={"seconds": 1})

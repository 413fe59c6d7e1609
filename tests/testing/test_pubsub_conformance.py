"""One suite over our Pub/Sub server and over Google's emulator: they agree where both answer.

It is driven by Google's own clients. Where the two are known to differ, this server does what
Google documents, and the differences are held by tests of their own (``test_pubsub_broker.py``):

- The emulator keeps filters and ignores them, takes malformed ones, and refuses to update labels,
  retention and expiry.
- It checks neither labels and attributes nor ack deadlines below 10 s and expiry below a day, and
  expires nothing.
- It lists a missing topic's subscriptions as none, and knows no retention above 7 days.
- It enforces a stream's flow control by hundreds of messages, and lets a later request change it.
- It never notices that a client is gone, and goes on handing messages to a broken stream.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.cloud import pubsub_v1  # type: ignore[import-untyped] # ships no types
from google.protobuf.field_mask_pb2 import FieldMask  # type: ignore[import-untyped] # ships no types
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from pokebridge.testing.pubsub import PubSubServer
from tests.support import wait_until


class Client:
    """Google's asynchronous clients, on a project and a topic of the test's own."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.publisher = PublisherAsyncClient(
            transport=PublisherGrpcAsyncIOTransport(channel=self.channel)
        )
        self.subscriber = SubscriberAsyncClient(
            transport=SubscriberGrpcAsyncIOTransport(channel=self.channel)
        )
        self.address = address
        self.project = f"projects/conform-{secrets.token_hex(4)}"
        self.topic = f"{self.project}/topics/top"

    def sub(self, name: str = "sub") -> str:
        """A subscription's full name."""
        return f"{self.project}/subscriptions/{name}"

    async def create_topic(self, name: str = "top") -> None:
        """A topic in the project."""
        await self.publisher.create_topic(name=f"{self.project}/topics/{name}")

    async def subscribe(self, name: str = "sub", **fields: Any) -> Any:
        """A subscription to the topic."""
        return await self.subscriber.create_subscription(
            request={"name": self.sub(name), "topic": self.topic, **fields}
        )

    async def publish(self, *bodies: bytes) -> Sequence[str]:
        """Publish ``bodies`` in one request."""
        messages = [{"data": body} for body in bodies]
        request = {"topic": self.topic, "messages": messages}
        response = await self.publisher.publish(request=request)
        return list(response.message_ids)

    async def pull(self, name: str = "sub", limit: int = 100) -> list[Any]:
        """What waits in a subscription, as the service is asked for it."""
        request = {"subscription": self.sub(name), "max_messages": limit}
        response = await self.subscriber.pull(request={**request, "return_immediately": True})
        return list(response.received_messages)

    async def pull_until(self, count: int, timeout_s: float = 10.0) -> list[Any]:
        """Pull until ``count`` messages have come."""
        got: list[Any] = []

        async def enough() -> bool:
            got.extend(await self.pull())
            return len(got) >= count

        await wait_until(enough, timeout_s, f"{count} messages")
        return got


@pytest.fixture(params=["own", "emulator"])
async def address(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """Where each of the two servers listens."""
    if request.param == "emulator":
        yield request.getfixturevalue("pubsub_emulator")
        return
    async with PubSubServer() as server:
        yield server.address


@pytest.fixture
async def client(address: str) -> AsyncIterator[Client]:
    """A client, with the topic created."""
    client = Client(address)
    await client.create_topic()
    yield client
    await client.channel.close()


# pull() warns that return_immediately is discouraged, which does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:The return_immediately flag is deprecated")


class Stream:
    """A StreamingPull by Google's generated client."""

    def __init__(self, client: Client, **opening: Any) -> None:
        self.requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.requests.put_nowait({"stream_ack_deadline_seconds": 10, **opening})
        self._client = client
        self.received: list[Any] = []
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        responses = await self._client.subscriber.streaming_pull(requests=self._requests())
        async for response in responses:
            self.received.extend(response.received_messages)

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            yield pubsub_v1.types.StreamingPullRequest(await self.requests.get())

    async def bodies(self, count: int) -> list[bytes]:
        """The bodies received, once there are ``count``."""
        await wait_until(lambda: len(self.received) >= count, 10.0, f"{count} messages")
        return [received.message.data for received in self.received]

    async def error(self) -> BaseException:
        """How the stream ends."""
        async with asyncio.timeout(10):
            try:
                await self.task
            except exceptions.GoogleAPICallError as error:
                return error
        raise AssertionError("the stream ended without an error")

    async def close(self) -> None:
        """Hang up."""
        self.task.cancel()
        with suppress(asyncio.CancelledError, exceptions.GoogleAPICallError):
            await self.task


# --- topics -----------------------------------------------------------------------------------


async def test_topics_are_created_listed_and_deleted(client: Client) -> None:
    """The pages of a list hold every topic once, without deleted ones."""
    for name in ("one", "two", "three"):
        await client.create_topic(name)
    pager = await client.publisher.list_topics(request={"project": client.project, "page_size": 2})
    names = [topic.name.rpartition("/")[2] async for topic in pager]
    assert sorted(names) == ["one", "three", "top", "two"]
    await client.publisher.delete_topic(topic=f"{client.project}/topics/one")
    with pytest.raises(exceptions.NotFound):
        await client.publisher.get_topic(topic=f"{client.project}/topics/one")


async def test_a_topic_is_created_once(client: Client) -> None:
    """Again is ALREADY_EXISTS; a missing one is NOT_FOUND for every use."""
    with pytest.raises(exceptions.AlreadyExists):
        await client.create_topic()
    missing = f"{client.project}/topics/missing"
    for use in (
        client.publisher.get_topic(topic=missing),
        client.publisher.delete_topic(topic=missing),
        client.publisher.publish(request={"topic": missing, "messages": [{"data": b"x"}]}),
        client.subscriber.create_subscription(name=client.sub(), topic=missing),
    ):
        with pytest.raises(exceptions.NotFound):
            await use


@pytest.mark.parametrize("name", ["ab", "goog-x", "1abc", "a b c", "x" * 256, ""])
async def test_names_have_a_form(client: Client, name: str) -> None:
    """Topics and subscriptions have 3 to 255 characters, a letter first, and not goog."""
    with pytest.raises(exceptions.InvalidArgument):
        await client.create_topic(name)
    with pytest.raises(exceptions.InvalidArgument):
        await client.subscribe(name)


# --- subscriptions ----------------------------------------------------------------------------


async def test_a_subscription_keeps_what_it_was_created_with(client: Client) -> None:
    """Labels, filter, deadline, retention and expiry are returned as they were set."""
    await client.subscribe(
        labels={"cluster": "c1", "instance": "1a-b_c"},
        filter='attributes.shard = "42"',
        ack_deadline_seconds=77,
        message_retention_duration={"seconds": 600},
        expiration_policy={"ttl": {"seconds": 86400}},
    )
    found = await client.subscriber.get_subscription(subscription=client.sub())
    assert found.topic == client.topic
    assert dict(found.labels) == {"cluster": "c1", "instance": "1a-b_c"}
    assert found.filter == 'attributes.shard = "42"'
    assert found.ack_deadline_seconds == 77
    assert found.message_retention_duration.total_seconds() == 600
    assert found.expiration_policy.ttl.total_seconds() == 86400


async def test_defaults_are_googles(client: Client) -> None:
    """Ten seconds to acknowledge, seven days of retention."""
    created = await client.subscribe()
    assert created.ack_deadline_seconds == 10
    assert created.message_retention_duration.total_seconds() == 7 * 86400


@pytest.mark.parametrize(
    "fields",
    [
        {"ack_deadline_seconds": -1},
        {"ack_deadline_seconds": 601},
        {"message_retention_duration": {"seconds": 599}},
        {"message_retention_duration": {"seconds": 32 * 86400}},
        {"topic": "nonsense"},
    ],
)
async def test_durations_have_bounds(client: Client, fields: dict[str, Any]) -> None:
    """Deadlines above ten minutes and retention below them are refused."""
    with pytest.raises(exceptions.InvalidArgument):
        await client.subscribe(**fields)


async def test_subscriptions_are_listed_by_topic_and_by_project(client: Client) -> None:
    """Pages hold every subscription once; after deletion it is in neither list."""
    await client.create_topic("other")
    for name in ("one", "two", "three"):
        await client.subscribe(name)
    await client.subscriber.create_subscription(
        name=client.sub("elsewhere"), topic=f"{client.project}/topics/other"
    )

    async def listed() -> tuple[list[str], list[str]]:
        by_topic = await client.publisher.list_topic_subscriptions(
            request={"topic": client.topic, "page_size": 2}
        )
        by_project = await client.subscriber.list_subscriptions(
            request={"project": client.project, "page_size": 2}
        )
        return sorted([name async for name in by_topic]), sorted(
            [found.name async for found in by_project]
        )

    ours = sorted(map(client.sub, ("one", "two", "three")))
    assert await listed() == (ours, sorted([*ours, client.sub("elsewhere")]))
    await client.subscriber.delete_subscription(subscription=client.sub("one"))
    ours.remove(client.sub("one"))
    assert await listed() == (ours, sorted([*ours, client.sub("elsewhere")]))


async def test_a_subscription_is_created_once(client: Client) -> None:
    """Again is ALREADY_EXISTS; a missing one is NOT_FOUND for every use."""
    await client.subscribe()
    with pytest.raises(exceptions.AlreadyExists):
        await client.subscribe()
    missing = client.sub("missing")
    for use in (
        client.subscriber.get_subscription(subscription=missing),
        client.subscriber.delete_subscription(subscription=missing),
        client.subscriber.acknowledge(subscription=missing, ack_ids=["x"]),
        client.subscriber.modify_ack_deadline(
            subscription=missing, ack_ids=["x"], ack_deadline_seconds=10
        ),
        client.pull("missing"),
        client.subscriber.update_subscription(
            request={
                "subscription": {"name": missing, "ack_deadline_seconds": 20},
                "update_mask": FieldMask(paths=["ack_deadline_seconds"]),
            }
        ),
    ):
        with pytest.raises(exceptions.NotFound):
            await use


async def test_what_is_mutable_can_be_updated(client: Client) -> None:
    """The ack deadline changes; the topic, the filter and unknown fields do not."""
    await client.subscribe(labels={"a": "b"})

    async def update(path: str, **fields: Any) -> Any:
        subscription = {"name": client.sub(), **fields}
        return await client.subscriber.update_subscription(
            request={"subscription": subscription, "update_mask": FieldMask(paths=[path])}
        )

    changed = await update("ack_deadline_seconds", ack_deadline_seconds=30)
    assert changed.ack_deadline_seconds == 30
    assert dict(changed.labels) == {"a": "b"}
    for path, value in (("topic", client.topic), ("filter", "attributes:a")):
        with pytest.raises(exceptions.InvalidArgument):
            await update(path, **{path: value})
    with pytest.raises(exceptions.InvalidArgument):
        await update("nonsense")


async def test_a_subscription_outlives_its_topic(client: Client) -> None:
    """It hangs on no topic then, and another of the same name does not reach it."""
    await client.subscribe()
    await client.publisher.delete_topic(topic=client.topic)
    await client.create_topic()
    await client.publish(b"unheard")
    found = await client.subscriber.get_subscription(subscription=client.sub())
    assert found.topic == "_deleted-topic_"
    assert await client.pull() == []


# --- messages ---------------------------------------------------------------------------------


async def test_every_subscription_gets_every_message(client: Client) -> None:
    """Bodies, attributes and ids arrive as published, in each subscription of the time."""
    await client.subscribe("one")
    await client.subscribe("two")
    message = {"data": b"\x00\xff body", "attributes": {"shard": "42", "other": ""}}
    messages = [message, {"attributes": {"only": "this"}}]
    response = await client.publisher.publish(request={"topic": client.topic, "messages": messages})
    await client.subscribe("late")
    for name in ("one", "two"):
        first, second = [received.message for received in await client.pull(name)]
        assert (first.data, dict(first.attributes)) == (message["data"], message["attributes"])
        assert (second.data, dict(second.attributes)) == (b"", {"only": "this"})
        assert [first.message_id, second.message_id] == list(response.message_ids)
        assert first.publish_time is not None
    assert await client.pull("late") == []


async def test_a_publish_has_limits(client: Client) -> None:
    """1 to 1,000 messages, none of them empty."""
    assert len(set(await client.publish(*[b"x"] * 1000))) == 1000
    for bodies in ([], [b"x"] * 1001, [b""]):
        with pytest.raises(exceptions.InvalidArgument):
            await client.publish(*bodies)


async def test_a_pull_takes_what_it_asks_for(client: Client) -> None:
    """At most so many, in order when nothing disturbs, and none for less than one."""
    await client.subscribe()
    await client.publish(*(b"%d" % n for n in range(5)))
    assert [received.message.data for received in await client.pull(limit=2)] == [b"0", b"1"]
    assert [received.message.data for received in await client.pull()] == [b"2", b"3", b"4"]
    assert await client.pull() == []
    with pytest.raises(exceptions.InvalidArgument):
        await client.pull(limit=0)


async def test_what_is_acknowledged_does_not_come_again(client: Client) -> None:
    """Acked messages do not come again. Returned ones come at once, others at the deadline."""
    await client.subscribe()
    await client.publish(b"done", b"back", b"late")
    done, back, late = await client.pull()
    await client.subscriber.acknowledge(subscription=client.sub(), ack_ids=[done.ack_id])
    await client.subscriber.acknowledge(subscription=client.sub(), ack_ids=[done.ack_id])
    for received, seconds in ((back, 0), (late, 1)):
        await client.subscriber.modify_ack_deadline(
            subscription=client.sub(), ack_ids=[received.ack_id], ack_deadline_seconds=seconds
        )
    assert [received.message.data for received in await client.pull()] == [b"back"]
    assert [received.message.data for received in await client.pull_until(1)] == [b"late"]


async def test_nonsense_is_refused(client: Client) -> None:
    """Invalid ack ids, empty lists and negative deadlines are errors."""
    await client.subscribe()
    sub = client.sub()
    for use in (
        client.subscriber.acknowledge(subscription=sub, ack_ids=["nonsense"]),
        client.subscriber.acknowledge(subscription=sub, ack_ids=[]),
        client.subscriber.modify_ack_deadline(
            subscription=sub, ack_ids=["nonsense"], ack_deadline_seconds=10
        ),
        client.subscriber.modify_ack_deadline(
            subscription=sub, ack_ids=[], ack_deadline_seconds=10
        ),
        client.subscriber.modify_ack_deadline(
            subscription=sub, ack_ids=["nonsense"], ack_deadline_seconds=-1
        ),
    ):
        with pytest.raises(exceptions.InvalidArgument):
            await use


# --- streams ----------------------------------------------------------------------------------


async def test_a_stream_brings_what_waits_and_what_comes(client: Client) -> None:
    """The backlog first, then messages as they are published."""
    await client.subscribe()
    await client.publish(b"before")
    stream = Stream(client, subscription=client.sub())
    assert await stream.bodies(1) == [b"before"]
    await client.publish(b"after")
    assert await stream.bodies(2) == [b"before", b"after"]
    await stream.close()


async def test_acks_and_deadlines_travel_on_the_stream(client: Client) -> None:
    """Acknowledged there, a message is done; given back there, it comes again."""
    await client.subscribe()
    stream = Stream(client, subscription=client.sub())
    await client.publish(b"done", b"back")
    assert sorted(await stream.bodies(2)) == [b"back", b"done"]
    ids = {received.message.data: received.ack_id for received in stream.received}
    stream.requests.put_nowait(
        {
            "ack_ids": [ids[b"done"]],
            "modify_deadline_ack_ids": [ids[b"back"]],
            "modify_deadline_seconds": [0],
        }
    )
    assert (await stream.bodies(3))[2] == b"back"
    await stream.close()
    assert b"done" not in [received.message.data for received in await client.pull()]


async def test_streams_of_one_subscription_split_its_messages(client: Client) -> None:
    """Each message goes to one stream, and a busy subscription keeps both busy."""
    await client.subscribe()
    streams = [Stream(client, subscription=client.sub()) for _ in range(2)]
    sent = [b"%d" % n for n in range(600)]

    def got() -> list[bytes]:
        return [received.message.data for stream in streams for received in stream.received]

    for start in range(0, len(sent), 60):
        await client.publish(*sent[start : start + 60])
        await wait_until(lambda end=start + 60: len(got()) >= end)  # type: ignore[misc] # a default
    assert sorted(got()) == sorted(sent)
    for stream in streams:
        await stream.close()


async def test_a_stream_ends_when_its_subscription_is_deleted(client: Client) -> None:
    """It says NOT_FOUND, as it does for a subscription that never was."""
    await client.subscribe()
    stream = Stream(client, subscription=client.sub())
    await client.publish(b"up")
    await stream.bodies(1)
    await client.subscriber.delete_subscription(subscription=client.sub())
    assert isinstance(await stream.error(), exceptions.NotFound)
    assert isinstance(await Stream(client, subscription=client.sub()).error(), exceptions.NotFound)


@pytest.mark.parametrize(
    "requests",
    [
        [{}],
        [{"subscription": "SUB", "stream_ack_deadline_seconds": 9}],
        [{"subscription": "SUB", "stream_ack_deadline_seconds": 601}],
        [{"subscription": "SUB"}, {"subscription": "SUB"}],
        [{"subscription": "SUB"}, {"ack_ids": ["nonsense"]}],
        [{"subscription": "SUB"}, {"modify_deadline_ack_ids": ["x"]}],
    ],
)
async def test_a_stream_refuses_nonsense(client: Client, requests: list[dict[str, Any]]) -> None:
    """Requests that break the protocol end the stream with INVALID_ARGUMENT."""
    await client.subscribe()
    opening, *more = [
        {key: client.sub() if value == "SUB" else value for key, value in request.items()}
        for request in requests
    ]
    stream = Stream(client, **opening)
    for request in more:
        stream.requests.put_nowait(request)
    assert isinstance(await stream.error(), exceptions.InvalidArgument)


async def test_googles_own_subscriber_works(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The high-level client, with its threads and leases, receives and acknowledges."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", client.address)
    await client.subscribe()
    got: list[bytes] = []

    def take(message: Any) -> None:
        got.append(message.data)
        message.ack()

    subscriber = await asyncio.to_thread(pubsub_v1.SubscriberClient)
    future = await asyncio.to_thread(subscriber.subscribe, client.sub(), callback=take)
    await client.publish(b"1", b"2", b"3")
    await wait_until(lambda: len(got) == 3)
    future.cancel()
    await asyncio.to_thread(lambda: future.result(timeout=10))
    await asyncio.to_thread(subscriber.close)
    assert sorted(got) == [b"1", b"2", b"3"]
    assert await client.pull() == []

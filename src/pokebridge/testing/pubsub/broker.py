"""The behaviour of Pub/Sub without a network: topics, subscriptions, leases, streams.

Everything is synchronous and takes the time from one injected clock; ``tick`` does what is due.
Methods are called as the API's are, take its request messages, return its response messages, and
raise :class:`~pokebridge.testing.pubsub.checks.ApiError`.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped] # ships no types
from google.pubsub_v1.types import pubsub as api
from grpc import StatusCode

from pokebridge.testing.pubsub import checks
from pokebridge.testing.pubsub.checks import ApiError, invalid, not_found
from pokebridge.testing.pubsub.filters import Filter, FilterError, matches, parse_filter

Topic, Subscription = api.Topic.pb(), api.Subscription.pb()
ReceivedMessage = api.ReceivedMessage.pb()
StreamingPullResponse = api.StreamingPullResponse.pb()

DELETED_TOPIC = "_deleted-topic_"
_DEFAULT_PAGE_SIZE = 100
_MUTABLE = {
    "ack_deadline_seconds",
    "expiration_policy",
    "labels",
    "message_retention_duration",
    "push_config",
    "retry_policy",
}
# The most messages that wait for a client, when the client sets no limit.
_MAX_UNSENT = 1000
_MAX_RESPONSE_MESSAGES = 500
_MAX_RESPONSE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class _Message:
    content: Any
    published_s: float
    size_bytes: int


@dataclass(slots=True)
class _Lease:
    message: _Message
    stream: "Stream | None"
    deadline_s: float


class Stream:
    """One open StreamingPull. ``wake`` is called when ``take`` or ``error`` has something new."""

    def __init__(self, queue: "_Queue", opening: Any, wake: Callable[[], None]) -> None:
        self._queue = queue
        self._max_messages = opening.max_outstanding_messages
        self._max_bytes = opening.max_outstanding_bytes
        self._unsent: deque[tuple[str, _Message]] = deque()
        self.wake = wake
        self.ack_deadline_s = opening.stream_ack_deadline_seconds
        self.outstanding = 0
        self.outstanding_bytes = 0
        self.error: ApiError | None = None

    @property
    def has_room(self) -> bool:
        """Whether its flow control allows one more message."""
        return (
            (self._max_messages <= 0 or self.outstanding < self._max_messages)
            and (self._max_bytes <= 0 or self.outstanding_bytes < self._max_bytes)
            and len(self._unsent) < _MAX_UNSENT
        )

    def take(self) -> Any | None:
        """The next response, ``None`` when nothing waits."""
        if not self._unsent:
            return None
        response = StreamingPullResponse()
        size_bytes = 0
        while self._unsent and len(response.received_messages) < _MAX_RESPONSE_MESSAGES:
            ack_id, message = self._unsent[0]
            size_bytes += message.size_bytes
            if response.received_messages and size_bytes > _MAX_RESPONSE_BYTES:
                break
            self._unsent.popleft()
            response.received_messages.add(ack_id=ack_id, message=message.content)
        self._queue.dispatch()
        return response

    def request(self, request: Any) -> None:
        """Apply a request that follows the first one."""
        if request.subscription:
            raise invalid("subscription may only be set in first message")
        if request.max_outstanding_messages or request.max_outstanding_bytes:
            raise invalid("flow control may only be set in first message")
        if len(request.modify_deadline_ack_ids) != len(request.modify_deadline_seconds):
            raise invalid("ack IDs and deadlines must have the same size")
        checks.check_ack_ids([*request.ack_ids, *request.modify_deadline_ack_ids])
        if request.stream_ack_deadline_seconds:
            checks.check_stream_deadline(request.stream_ack_deadline_seconds)
            self.ack_deadline_s = request.stream_ack_deadline_seconds
        self._queue.acknowledge(request.ack_ids)
        for ack_id, seconds in zip(
            request.modify_deadline_ack_ids, request.modify_deadline_seconds, strict=True
        ):
            self._queue.modify([ack_id], seconds)

    def close(self) -> None:
        """The client has left. Sent messages stay leased to it until the ack deadline."""
        self._queue.remove(self, [ack_id for ack_id, _ in self._unsent])
        self._unsent.clear()

    def put(self, ack_id: str, message: _Message) -> None:
        """Queue ``message`` for sending."""
        self._unsent.append((ack_id, message))
        self.wake()

    def end(self, error: ApiError) -> None:
        """End the stream with ``error``."""
        self.error = error
        self.wake()


class _Queue:
    """A subscription: its waiting messages, and the leases of those that were delivered."""

    def __init__(self, config: Any, passes: Filter | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._passes = passes
        self._waiting: deque[_Message] = deque()
        self._leases: dict[str, _Lease] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._ack_numbers = itertools.count(1)
        self._active_s = clock()
        self.config = config
        self.streams: deque[Stream] = deque()
        self.receives_from_s = 0.0

    @property
    def has_expired(self) -> bool:
        """Whether it has been unused for longer than its expiration policy allows."""
        policy = self.config.expiration_policy
        if self.streams or not policy.HasField("ttl"):
            return False
        idle_s: float = self._clock() - self._active_s
        return idle_s >= float(policy.ttl.seconds)

    def touch(self) -> None:
        """Record that the subscription is in use."""
        self._active_s = self._clock()

    def offer(self, message: _Message, attributes: dict[str, str]) -> None:
        """Queue ``message`` if it passes the filter and the subscription already receives."""
        if message.published_s < self.receives_from_s:
            return
        if self._passes is None or matches(self._passes, attributes):
            self._waiting.append(message)

    def dispatch(self) -> None:
        """Hand the waiting messages to the streams, in turn."""
        while self._waiting and (stream := self._next_stream()):
            for message in self._pop(1):
                stream.put(self._lease(message, stream.ack_deadline_s, stream), message)

    def pull(self, max_messages: int) -> list[Any]:
        """Return up to ``max_messages`` without waiting."""
        self.touch()
        return [
            ReceivedMessage(
                ack_id=self._lease(message, self.config.ack_deadline_seconds, None),
                message=message.content,
            )
            for message in self._pop(max_messages)
        ]

    def acknowledge(self, ack_ids: Iterable[str]) -> None:
        """Acknowledge messages; an unknown or expired id is no error."""
        self.touch()
        for ack_id in ack_ids:
            self._release(ack_id)
        self.dispatch()

    def modify(self, ack_ids: Sequence[str], seconds: int) -> None:
        """Move the ack deadlines. 0 returns the messages to the queue."""
        self.touch()
        for ack_id in reversed(ack_ids):  # so that returned messages keep their order
            lease = self._leases.get(ack_id)
            if lease is None:
                continue
            if seconds:
                self._set_deadline(ack_id, lease, seconds)
            else:
                self._give_back(ack_id)
        self.dispatch()

    def remove(self, stream: Stream, unsent: Sequence[str]) -> None:
        """Remove ``stream``. Its unsent messages go to the other streams."""
        self.touch()
        if stream in self.streams:
            self.streams.remove(stream)
        for ack_id in reversed(unsent):
            self._give_back(ack_id)
        self.dispatch()

    def tick(self) -> None:
        """Return to the queue each message that was not acknowledged in time."""
        now_s = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, ack_id = heapq.heappop(self._deadlines)
            lease = self._leases.get(ack_id)
            if lease is not None and lease.deadline_s == deadline_s:
                self._give_back(ack_id)
        self.dispatch()

    def _next_stream(self) -> Stream | None:
        for _ in range(len(self.streams)):
            self.streams.rotate(-1)
            if self.streams[-1].has_room:
                return self.streams[-1]
        return None

    def _pop(self, limit: int) -> list[_Message]:
        """Take up to ``limit`` messages. Those past their retention are dropped."""
        oldest_s = self._clock() - self.config.message_retention_duration.seconds
        popped: list[_Message] = []
        while self._waiting and len(popped) < limit:
            message = self._waiting.popleft()
            if message.published_s > oldest_s:
                popped.append(message)
        return popped

    def _lease(self, message: _Message, seconds: int, stream: Stream | None) -> str:
        ack_id = f"{self.config.name}:{next(self._ack_numbers)}"
        lease = self._leases[ack_id] = _Lease(message, stream, 0.0)
        self._set_deadline(ack_id, lease, seconds)
        if stream is not None:
            stream.outstanding += 1
            stream.outstanding_bytes += message.size_bytes
        return ack_id

    def _set_deadline(self, ack_id: str, lease: _Lease, seconds: int) -> None:
        lease.deadline_s = self._clock() + seconds
        heapq.heappush(self._deadlines, (lease.deadline_s, ack_id))

    def _release(self, ack_id: str) -> _Message | None:
        lease = self._leases.pop(ack_id, None)
        if lease is None:
            return None
        if lease.stream is not None:
            lease.stream.outstanding -= 1
            lease.stream.outstanding_bytes -= lease.message.size_bytes
        return lease.message

    def _give_back(self, ack_id: str) -> None:
        message = self._release(ack_id)
        if message is not None:
            self._waiting.appendleft(message)


@dataclass(slots=True)
class _Topic:
    config: Any
    queues: dict[str, _Queue] = field(default_factory=dict)


class Broker:
    """The state of the service, under ``clock`` (Unix time in seconds).

    Only ``projects`` exist; with ``None``, every project does.
    ``liveness_delay_s``: how long a new subscription receives nothing. Google's service was
    measured to have such a delay.
    """

    def __init__(self, clock: Callable[[], float], projects: Container[str] | None = None) -> None:
        self._clock = clock
        self._projects = projects
        self._topics: dict[str, _Topic] = {}
        self._queues: dict[str, _Queue] = {}
        self._message_ids = itertools.count(1)
        self.liveness_delay_s = 0.0

    # --- topics ---------------------------------------------------------------------------------

    def create_topic(self, config: Any) -> Any:
        """CreateTopic."""
        checks.check_name("topics", config.name)
        checks.check_labels(config.labels)
        self._check_project(config.name)
        if config.name in self._topics:
            raise ApiError(StatusCode.ALREADY_EXISTS, "Topic already exists")
        self._topics[config.name] = _Topic(config)
        return config

    def get_topic(self, request: Any) -> Any:
        """GetTopic."""
        return self._topic(request.topic).config

    def list_topics(self, request: Any) -> Any:
        """ListTopics."""
        names = [name for name in self._topics if name.startswith(f"{request.project}/")]
        page, token = _page(names, request)
        topics = [self._topics[name].config for name in page]
        return api.ListTopicsResponse.pb()(topics=topics, next_page_token=token)

    def list_topic_subscriptions(self, request: Any) -> Any:
        """ListTopicSubscriptions."""
        page, token = _page(self._topic(request.topic).queues, request)
        return api.ListTopicSubscriptionsResponse.pb()(subscriptions=page, next_page_token=token)

    def delete_topic(self, request: Any) -> Any:
        """DeleteTopic. Its subscriptions remain, without a topic."""
        topic = self._topic(request.topic)
        del self._topics[request.topic]
        for queue in topic.queues.values():
            queue.config.topic = DELETED_TOPIC
        return Empty()

    def publish(self, request: Any) -> Any:
        """Publish."""
        topic = self._topic(request.topic)
        checks.check_messages(request.messages)
        now_s = self._clock()
        ids = []
        for content in request.messages:
            content.message_id = str(next(self._message_ids))
            content.publish_time.FromNanoseconds(int(now_s * 1e9))
            ids.append(content.message_id)
            message = _Message(content, now_s, content.ByteSize())
            attributes = dict(content.attributes)
            for queue in topic.queues.values():
                queue.offer(message, attributes)
        for queue in topic.queues.values():
            queue.dispatch()
        return api.PublishResponse.pb()(message_ids=ids)

    # --- subscriptions --------------------------------------------------------------------------

    def create_subscription(self, config: Any) -> Any:
        """CreateSubscription."""
        checks.check_name("subscriptions", config.name)
        checks.check_name("topics", config.topic)
        if config.name in self._queues:
            raise ApiError(StatusCode.ALREADY_EXISTS, "Subscription already exists")
        if config.topic not in self._topics:
            raise not_found("Subscription topic does not exist")
        if not config.ack_deadline_seconds:
            config.ack_deadline_seconds = checks.DEFAULT_ACK_DEADLINE_S
        if not config.HasField("message_retention_duration"):
            config.message_retention_duration.seconds = checks.DEFAULT_RETENTION_S
        if not config.HasField("expiration_policy"):
            config.expiration_policy.ttl.seconds = checks.DEFAULT_EXPIRY_S
        checks.check_subscription(config)
        try:
            passes = parse_filter(config.filter) if config.filter else None
        except FilterError as error:
            raise invalid(f"Invalid filter: {error}") from None
        queue = _Queue(config, passes, self._clock)
        if self.liveness_delay_s:
            queue.receives_from_s = self._clock() + self.liveness_delay_s
        self._queues[config.name] = self._topics[config.topic].queues[config.name] = queue
        return config

    def get_subscription(self, request: Any) -> Any:
        """GetSubscription."""
        return self._queue(request.subscription).config

    def list_subscriptions(self, request: Any) -> Any:
        """ListSubscriptions."""
        names = [name for name in self._queues if name.startswith(f"{request.project}/")]
        page, token = _page(names, request)
        found = [self._queues[name].config for name in page]
        return api.ListSubscriptionsResponse.pb()(subscriptions=found, next_page_token=token)

    def update_subscription(self, request: Any) -> Any:
        """UpdateSubscription; name, topic and filter can't be changed."""
        queue = self._queue(request.subscription.name)
        if not request.update_mask.paths:
            raise invalid("The update_mask must be set, and must contain a non-empty paths list.")
        for path in request.update_mask.paths:
            if path not in _MUTABLE:
                raise invalid(f"Invalid update_mask: the {path} field is not mutable.")
        config = Subscription()
        config.CopyFrom(queue.config)
        request.update_mask.MergeMessage(
            request.subscription, config, replace_message_field=True, replace_repeated_field=True
        )
        checks.check_subscription(config)
        queue.config = config
        queue.touch()
        return config

    def delete_subscription(self, request: Any) -> Any:
        """DeleteSubscription; its streams end with NOT_FOUND."""
        queue = self._queue(request.subscription)
        del self._queues[request.subscription]
        if queue.config.topic in self._topics:
            del self._topics[queue.config.topic].queues[request.subscription]
        short_name = request.subscription.rpartition("/")[2]
        for stream in queue.streams:
            stream.end(not_found(f"Subscription does not exist (resource={short_name})"))
        return Empty()

    # --- messages -------------------------------------------------------------------------------

    def pull(self, request: Any) -> list[Any]:
        """Pull, without waiting: the messages that are available now."""
        queue = self._queue(request.subscription)
        if request.max_messages <= 0:
            raise invalid("No max_messages specified")
        return queue.pull(request.max_messages)

    def acknowledge(self, request: Any) -> Any:
        """Acknowledge."""
        queue = self._queue(request.subscription)
        if not request.ack_ids:
            raise invalid("No ack ids specified.")
        checks.check_ack_ids(request.ack_ids)
        queue.acknowledge(request.ack_ids)
        return Empty()

    def modify_ack_deadline(self, request: Any) -> Any:
        """ModifyAckDeadline."""
        queue = self._queue(request.subscription)
        if not request.ack_ids:
            raise invalid("No ack ids specified")
        if request.ack_deadline_seconds < 0:
            raise invalid("Ack deadline cannot be negative")
        if request.ack_deadline_seconds > checks.MAX_ACK_DEADLINE_S:
            raise invalid("Ack deadline out of bounds")
        checks.check_ack_ids(request.ack_ids)
        queue.modify(request.ack_ids, request.ack_deadline_seconds)
        return Empty()

    def open_stream(self, opening: Any, wake: Callable[[], None]) -> Stream:
        """StreamingPull, from its first request."""
        if not opening.subscription:
            raise invalid("first message must set subscription")
        checks.check_stream_deadline(opening.stream_ack_deadline_seconds)
        queue = self._queue(opening.subscription)
        stream = Stream(queue, opening, wake)
        queue.touch()
        queue.streams.append(stream)
        queue.dispatch()
        return stream

    def end_streams(self, error: ApiError) -> None:
        """End every open stream with ``error``, as the service does now and then."""
        for queue in self._queues.values():
            for stream in queue.streams:
                stream.end(error)

    def tick(self) -> None:
        """Do what is due: redelivery, and the expiry of subscriptions that nobody uses."""
        for name, queue in list(self._queues.items()):
            queue.tick()
            if queue.has_expired:
                self.delete_subscription(api.DeleteSubscriptionRequest.pb()(subscription=name))

    def _check_project(self, name: str) -> None:
        project = name.split("/")[1]
        if self._projects is not None and project not in self._projects:
            raise not_found(
                f"Requested project not found or user does not have access to it"
                f" (project={project}). Make sure to specify the unique project identifier and not"
                f" the Google Cloud Console display name."
            )

    def _topic(self, name: str) -> _Topic:
        self._check_project(name)
        if name not in self._topics:
            raise not_found("Topic not found")
        return self._topics[name]

    def _queue(self, name: str) -> _Queue:
        if name not in self._queues:
            short_name = name.rpartition("/")[2]
            raise not_found(f"Subscription does not exist (resource={short_name})")
        return self._queues[name]


def _page(names: Iterable[str], request: Any) -> tuple[list[str], str]:
    """The names from ``request.page_token`` on, and the token of the page after."""
    ordered = sorted(name for name in names if name >= request.page_token)
    size = request.page_size if request.page_size > 0 else _DEFAULT_PAGE_SIZE
    return ordered[:size], ordered[size] if len(ordered) > size else ""

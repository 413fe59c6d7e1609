"""The part of Pub/Sub's v1 API that the adapter needs: raw protobuf over ``grpc.aio``.

Google's clients take more than twice the CPU for each message: wrappers, a thread switch, and an
extra call for each response. They also hide that a stream ended, and why. Only this module imports
grpc and google, and it translates their errors.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

# Else grpc writes lines of its own among our log lines. It reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import google.auth
import google.auth.exceptions
import grpc
from google.api_core.gapic_v1.routing_header import to_grpc_metadata
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from google.pubsub_v1.types import pubsub as types
from grpc import StatusCode

from pokebridge.errors import ConfigError, TransportError

EMULATOR_VARIABLE = "PUBSUB_EMULATOR_HOST"
GOOGLE_HOST = "pubsub.googleapis.com:443"
CALL_TIMEOUT_S = 10.0
# How often a connection is pinged, and how long an answer may take. Google's own clients ping every
# 30 s. The emulator, like every grpc-java server, disconnects clients that ping more often than
# every 5 minutes.
KEEPALIVE_S, EMULATOR_KEEPALIVE_S = 30.0, 310.0
PING_TIMEOUT_S = 10.0
# Google's front ends allow 100 streams for each connection, calls included. The 101st is refused,
# or waits without an error.
MAX_STREAMS_A_CHANNEL = 90
_MAX_DETAILS = 300

# What a retry may cure: the codes that Google's publisher retries.
_TRANSIENT = {
    StatusCode.ABORTED,
    StatusCode.CANCELLED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.INTERNAL,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.UNAVAILABLE,
    StatusCode.UNKNOWN,
}
# FAILED_PRECONDITION: an administrator detached the subscription from its topic permanently.
_MISSING = {StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION}


class _Method(NamedTuple):
    """A method. ``routed_by`` is the field of the request for the header x-goog-request-params."""

    service: str
    routed_by: str
    permission: str
    request: str
    response: str | None = None


_CONSUME = "pubsub.subscriptions.consume"
_CREATE = "pubsub.subscriptions.create (project) and pubsub.topics.attachSubscription (topic)"
_LIST = "pubsub.subscriptions.list (project)"
_METHODS = {
    "GetTopic": _Method("Publisher", "topic", "pubsub.topics.get", "GetTopicRequest", "Topic"),
    "CreateTopic": _Method("Publisher", "name", "pubsub.topics.create", "Topic", "Topic"),
    "Publish": _Method(
        "Publisher", "topic", "pubsub.topics.publish", "PublishRequest", "PublishResponse"
    ),
    "CreateSubscription": _Method("Subscriber", "name", _CREATE, "Subscription", "Subscription"),
    "GetSubscription": _Method(
        "Subscriber",
        "subscription",
        "pubsub.subscriptions.get",
        "GetSubscriptionRequest",
        "Subscription",
    ),
    "ListSubscriptions": _Method(
        "Subscriber", "project", _LIST, "ListSubscriptionsRequest", "ListSubscriptionsResponse"
    ),
    "DeleteSubscription": _Method(
        "Subscriber", "subscription", "pubsub.subscriptions.delete", "DeleteSubscriptionRequest"
    ),
    "Pull": _Method("Subscriber", "subscription", _CONSUME, "PullRequest", "PullResponse"),
    "Acknowledge": _Method("Subscriber", "subscription", _CONSUME, "AcknowledgeRequest"),
    "ModifyAckDeadline": _Method(
        "Subscriber", "subscription", _CONSUME, "ModifyAckDeadlineRequest"
    ),
    "StreamingPull": _Method(
        "Subscriber", "subscription", _CONSUME, "StreamingPullRequest", "StreamingPullResponse"
    ),
}


def _protobuf(name: str) -> Any:
    """Return the raw protobuf class under Google's wrapper."""
    return getattr(types, name).pb()


PubsubMessage = _protobuf("PubsubMessage")
StreamingPullRequest = _protobuf("StreamingPullRequest")
StreamingCall = grpc.aio.StreamStreamCall[Any, Any]


class PubSubError(TransportError):
    """A call that Pub/Sub refused, or that did not reach it."""

    def __init__(self, message: str, code: StatusCode) -> None:
        super().__init__(message)
        self.is_missing = code in _MISSING
        """The resource does not exist, or is unusable."""
        self.is_deleted = code is StatusCode.NOT_FOUND
        self.is_taken = code is StatusCode.ALREADY_EXISTS
        self.is_denied = code is StatusCode.PERMISSION_DENIED
        self.is_timeout = code is StatusCode.DEADLINE_EXCEEDED
        self.is_transient = code in _TRANSIENT
        """The same call may succeed later."""


@dataclass(slots=True)
class _StreamChannel:
    """A connection for streams."""

    channel: grpc.aio.Channel
    streams: int = 0


class PubSubApi:
    """Calls Pub/Sub for one project. Create it with ``connect``.

    ``is_emulator``: the server is Google's emulator, which never notices that a client has gone. It
    keeps delivering messages to a broken stream. When their ack deadline has passed it delivers
    them again, possibly to the same stream.
    """

    def __init__(
        self,
        project: str,
        host: str,
        open_channel: Callable[[], grpc.aio.Channel],
        *,
        is_emulator: bool = False,
    ) -> None:
        self.project = project
        self.is_emulator = is_emulator
        self._host = host
        self._open_channel = open_channel
        # For calls, which must not wait for streams, and the number of calls it can still take.
        self._channel = open_channel()
        self._free_calls = asyncio.Semaphore(MAX_STREAMS_A_CHANNEL)
        self._stream_channels: list[_StreamChannel] = []
        self._calls = {
            name: self._channel.unary_unary(**_stub(name))
            for name in _METHODS
            if name != "StreamingPull"
        }

    @classmethod
    async def connect(cls, project: str, *, keepalive_s: float | None = None) -> "PubSubApi":
        """Connect to the emulator that PUBSUB_EMULATOR_HOST names, or else to Google's service.

        Google's service gets the application default credentials. ``keepalive_s`` is the interval
        of pings; the default depends on the server.

        Raises:
            ConfigError: there are no credentials.
        """
        if emulator := os.environ.get(EMULATOR_VARIABLE):
            options = channel_options(keepalive_s or EMULATOR_KEEPALIVE_S)
            return cls(
                project,
                emulator,
                lambda: grpc.aio.insecure_channel(emulator, options),
                is_emulator=True,
            )
        options = channel_options(keepalive_s or KEEPALIVE_S)
        try:
            # Reads files and asks the metadata server.
            credentials, _ = await asyncio.to_thread(
                google.auth.default, scopes=SubscriberGrpcAsyncIOTransport.AUTH_SCOPES
            )
        except google.auth.exceptions.GoogleAuthError as error:
            raise ConfigError(
                f"no Google credentials: run 'gcloud auth application-default login', or set "
                f"GOOGLE_APPLICATION_CREDENTIALS, or {EMULATOR_VARIABLE} for an emulator ({error})"
            ) from None
        return cls(
            project,
            GOOGLE_HOST,
            lambda: SubscriberGrpcAsyncIOTransport.create_channel(
                GOOGLE_HOST, credentials, options=options
            ),
        )

    async def call(
        self, method: str, /, *, timeout_s: float = CALL_TIMEOUT_S, **fields: Any
    ) -> Any:
        """Call ``method`` with a request of ``fields``.

        Raises:
            PubSubError: the call failed.
        """
        spec = _METHODS[method]
        request = _protobuf(spec.request)(**fields)
        metadata = _routing(spec, fields[spec.routed_by])
        try:
            async with self._free_calls:
                return await self._calls[method](request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self._translate(method, error) from None
        except grpc.aio.UsageError:
            raise PubSubError("the connection is closed", StatusCode.CANCELLED) from None

    @asynccontextmanager
    async def stream(self, subscription: str) -> AsyncIterator[StreamingCall]:
        """A StreamingPull on ``subscription``, connected, with nothing written yet.

        Failures of the stream inside the ``with`` block are raised as PubSubError.
        """
        metadata = _routing(_METHODS["StreamingPull"], subscription)
        stream_channel = self._free_stream_channel()
        stream_channel.streams += 1
        call: StreamingCall | None = None
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await stream_channel.channel.channel_ready()
            open_stream = stream_channel.channel.stream_stream(**_stub("StreamingPull"))
            call = open_stream(timeout=None, metadata=metadata)  # Google's default is 30 minutes
            yield call
        except grpc.aio.AioRpcError as error:
            raise self._translate("StreamingPull", error) from None
        except TimeoutError:
            raise PubSubError(
                f"Pub/Sub at {self._host} is unreachable", StatusCode.UNAVAILABLE
            ) from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise PubSubError(f"the stream is closed: {error}", StatusCode.CANCELLED) from None
        finally:
            if call is not None:
                call.cancel()
            stream_channel.streams -= 1

    async def close(self) -> None:
        """Close every connection."""
        for channel in (self._channel, *(used.channel for used in self._stream_channels)):
            await channel.close()

    def _free_stream_channel(self) -> _StreamChannel:
        for stream_channel in self._stream_channels:
            if stream_channel.streams < MAX_STREAMS_A_CHANNEL:
                return stream_channel
        self._stream_channels.append(_StreamChannel(self._open_channel()))
        return self._stream_channels[-1]

    def _translate(self, name: str, error: grpc.aio.AioRpcError) -> PubSubError:
        code = error.code()
        details = " ".join((error.details() or "no details").split())[:_MAX_DETAILS]
        if code is StatusCode.PERMISSION_DENIED:
            permission = _METHODS[name].permission
            message = f"Pub/Sub refused {name}: the account needs {permission}: {details}"
        elif code is StatusCode.UNAUTHENTICATED:
            message = f"Pub/Sub refused the credentials: {details}"
        elif code in {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}:
            message = f"Pub/Sub at {self._host} is unreachable: {details}"
        else:
            message = f"Pub/Sub refused {name}: {code.name}: {details}"
        return PubSubError(message, code)


def _stub(name: str) -> dict[str, Any]:
    method = _METHODS[name]
    return {
        "method": f"/google.pubsub.v1.{method.service}/{name}",
        "request_serializer": _protobuf(method.request).SerializeToString,
        "response_deserializer": _protobuf(method.response).FromString if method.response else None,
    }


def _routing(method: _Method, value: str) -> grpc.aio.Metadata:
    """The header by which Google routes a call to the region of the resource."""
    header = to_grpc_metadata([(method.routed_by, value)])  # type: ignore[no-untyped-call]  # theirs
    return grpc.aio.Metadata(header)


def channel_options(keepalive_s: float) -> list[tuple[str, int]]:
    """Options of a channel: notice a dead connection, and leave back-offs to the adapter."""
    timeout_ms = int(min(keepalive_s, PING_TIMEOUT_S) * 1000)
    return [
        ("grpc.use_local_subchannel_pool", 1),  # else all channels share one connection
        ("grpc.max_receive_message_length", -1),
        ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
        # gRPC uses the longer of these two, and the second is a minute by default.
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
        # The adapter has its own back-off. The channel's would only add to it.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 3000),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]

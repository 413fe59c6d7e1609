"""The broker behind Pub/Sub's real gRPC API on a loopback port, with faults on demand."""

import asyncio
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Container
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc
from google.pubsub_v1.types import pubsub as api
from grpc import StatusCode

from pokebridge.testing.pubsub.broker import Broker, Stream
from pokebridge.testing.pubsub.checks import MAX_PUBLISH_SIZE_BYTES, ApiError

TICK_S = 0.02
PULL_WAIT_S = 5.0
PULL_POLL_S = 0.01
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server on it
    ("grpc.max_receive_message_length", 2 * MAX_PUBLISH_SIZE_BYTES),
    ("grpc.max_concurrent_streams", 100),  # as Google's front ends allow a connection
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
]
_UNARY_METHODS = {
    "Publisher": (
        "CreateTopic",
        "GetTopic",
        "ListTopics",
        "ListTopicSubscriptions",
        "DeleteTopic",
        "Publish",
    ),
    "Subscriber": (
        "CreateSubscription",
        "GetSubscription",
        "ListSubscriptions",
        "UpdateSubscription",
        "DeleteSubscription",
        "Acknowledge",
        "ModifyAckDeadline",
        "Pull",
    ),
}
_REQUESTS = {"CreateTopic": "Topic", "CreateSubscription": "Subscription"}

Context = grpc.aio.ServicerContext[Any, Any]


class PubSubServer:
    """A small Pub/Sub server for tests and laptops; the package says what it can do.

    A stopped server can be started again on the same port and keeps its state, as Google's service
    does in an outage. A new server on that port has no state, as the emulator after a restart.

    Args:
        clock: returns Unix time in seconds. A test passes its own to test expiry and retention.
        projects: the projects that exist. By default every project exists.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        projects: Container[str] | None = None,
    ) -> None:
        self.broker = Broker(clock, projects)
        self.calls: Counter[str] = Counter()
        """Number of calls of each method, including refused calls."""
        self._denied: set[str] = set()
        self._failures: dict[str, deque[StatusCode]] = {}
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """``HOST:PORT``, the value for PUBSUB_EMULATOR_HOST."""
        return f"127.0.0.1:{self._port}"

    async def start(self, port: int = 0) -> None:
        """Listen on loopback ``port``. 0 means a free port, or the port of an earlier start.

        Raises:
            OSError: the port is taken.
        """
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    f"google.pubsub.v1.{service}", self._handlers(service)
                )
                for service in _UNARY_METHODS
            ]
        )
        try:
            self._port = server.add_insecure_port(f"127.0.0.1:{port or self._port}")
        except RuntimeError as error:
            raise OSError(f"port {port or self._port} is taken") from error
        await server.start()
        self._server = server
        self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        """Drop every connection and stop listening. May be called twice."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            await self._server.stop(None)
        self._server = self._ticker = None

    async def __aenter__(self) -> Self:
        """Start on a free port."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop."""
        await self.stop()

    async def wait(self) -> None:
        """Return when the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    # --- faults ---------------------------------------------------------------------------------

    def deny(self, *methods: str) -> None:
        """Refuse these methods (``CreateTopic``, …) with PERMISSION_DENIED until allowed."""
        self._denied.update(methods)

    def allow(self, *methods: str) -> None:
        """Stop refusing these methods."""
        self._denied.difference_update(methods)

    def fail(self, method: str, *codes: StatusCode) -> None:
        """Fail the next calls of ``method`` with ``codes``, one each."""
        self._failures.setdefault(method, deque()).extend(codes)

    def break_streams(self, code: StatusCode = StatusCode.UNAVAILABLE) -> None:
        """End every open stream, as Google's service does now and then."""
        self.broker.end_streams(ApiError(code, "The service was unable to fulfill your request."))

    # --- the API --------------------------------------------------------------------------------

    def _handlers(self, service: str) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                self._unary(method),
                request_deserializer=_message(method).FromString,
                response_serializer=_serialize,
            )
            for method in _UNARY_METHODS[service]
        }
        if service == "Subscriber":
            handlers["StreamingPull"] = grpc.stream_stream_rpc_method_handler(
                self._streaming_pull,
                request_deserializer=_message("StreamingPull").FromString,
                response_serializer=_serialize,
            )
        return handlers

    def _unary(self, method: str) -> Callable[[Any, Context], Awaitable[Any]]:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method).lower()
        answer = self._pull if method == "Pull" else getattr(self.broker, name)

        async def handle(request: Any, context: Context) -> Any:
            try:
                self._admit(method)
                response = answer(request)
                return await response if method == "Pull" else response
            except ApiError as error:
                await context.abort(error.code, error.details)

        return handle

    def _admit(self, method: str) -> None:
        self.calls[method] += 1
        if method in self._denied:
            raise ApiError(
                StatusCode.PERMISSION_DENIED, "User not authorized to perform this action."
            )
        if failures := self._failures.get(method):
            raise ApiError(failures.popleft(), "The service was unable to fulfill your request.")

    async def _pull(self, request: Any) -> Any:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (0 if request.return_immediately else PULL_WAIT_S)
        while not (received := self.broker.pull(request)):
            if loop.time() >= deadline_s:
                break
            await asyncio.sleep(PULL_POLL_S)
        return api.PullResponse.pb()(received_messages=received)

    async def _streaming_pull(self, _requests: Any, context: Context) -> None:
        woken = asyncio.Event()
        try:
            self._admit("StreamingPull")
            opening = await context.read()
            if opening is grpc.aio.EOF:
                return
            stream = self.broker.open_stream(opening, woken.set)
        except ApiError as error:
            await context.abort(error.code, error.details)
        reader = asyncio.create_task(_read_requests(stream, context))
        reader.add_done_callback(lambda _: woken.set())
        try:
            while not (reader.done() or stream.error):
                woken.clear()
                while response := stream.take():
                    await context.write(response)
                await woken.wait()
        finally:
            reader.cancel()
            stream.close()
        if stream.error:
            await context.abort(stream.error.code, stream.error.details)

    async def _tick(self) -> None:
        while True:
            self.broker.tick()
            await asyncio.sleep(TICK_S)


async def _read_requests(stream: Stream, context: Context) -> None:
    """Serve what the client says on ``stream``, until it says no more."""
    with suppress(grpc.aio.AbortError, grpc.aio.UsageError):
        while (request := await context.read()) is not grpc.aio.EOF:
            try:
                stream.request(request)
            except ApiError as error:
                stream.end(error)
                return


def _message(method: str) -> Any:
    """The class of ``method``'s request."""
    return getattr(api, _REQUESTS.get(method, f"{method}Request")).pb()


def _serialize(message: Any) -> bytes:
    serialized: bytes = message.SerializeToString()
    return serialized

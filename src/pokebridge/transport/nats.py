"""The NATS transport: core NATS, one subject for each shard (docs/transports/nats.md).

push-notifications            signals without a shard, and whatever people publish by hand
push-notifications.<shard>    signals of one shard

In a cluster that is not called ``default`` both begin with ``push-notifications~<cluster>``.
"""

import asyncio
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Self

from nats import errors
from nats.aio.subscription import Subscription as NatsSubscription

from pokebridge.engines.nats import (
    URL_OPTIONS,
    NatsClient,
    client_options,
    dial_server,
    refusal_of,
    servers_in,
)
from pokebridge.engines.urls import url_options
from pokebridge.errors import ConfigError, SignalRefusedError, TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, Subscription
from pokebridge.transport.names import DEFAULT_CLUSTER, DEFAULT_TOPIC, topic_of
from pokebridge.transport.reconnecting_link import (
    DIAL_TIMEOUT_S,
    Deliver,
    EngineConnection,
    ReconnectingLink,
    check_topic,
)

INTEREST_SPREAD_S = 1.0
"""How long the servers of a cluster may take to hear of a new subscription: routes across regions
have a delay of some 100 ms, and the servers are busy at times."""

_OPTION = "interest_spread_s"
_FULL = "maximum subscriptions exceeded"
_REFUSAL = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')


class NatsTransport:
    """Signals over core NATS, on one connection. Create it with :meth:`connect`."""

    is_shared = True

    def __init__(self, link: "ReconnectingLink[_NatsConnection]", subject: str) -> None:
        self._link = link
        self._subject = subject
        self._max_signal_bytes = link.connection.max_payload

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        subject: str = DEFAULT_TOPIC,
        cluster: str = DEFAULT_CLUSTER,
        instance: str = "",
    ) -> Self:
        """Connect to the servers in ``url``.

        Args:
            url: the servers, as described in :mod:`pokebridge.engines.nats`. The option
                ``interest_spread_s`` replaces :data:`INTEREST_SPREAD_S`.
            subject: the subject of signals without a shard, in the cluster ``default``.
            cluster: the cluster whose signals are sent and received. Its name is part of the
                subjects, and of the connection's name in NATS's monitoring.
            instance: part of the connection's name.

        Raises:
            ConfigError: the URL or the subject is invalid, or a file is unreadable.
            TransportError: no server is available, or the credentials are refused.
        """
        subject = topic_of(cluster, check_topic("the NATS subject", subject))
        servers = servers_in("transport", url)
        name = f"pokebridge {cluster} {instance}".strip()
        spread_s = _spread_in(url)
        dials = [partial(_NatsConnection.dial, server, url, name, spread_s) for server in servers]
        link = ReconnectingLink(",".join(servers), dials, subject)
        await link.open()
        return cls(link, subject)

    @property
    def max_signal_bytes(self) -> int:
        """The server's ``max_payload``; while there is no connection, that of the last one."""
        with suppress(TransportError):
            self._max_signal_bytes = self._link.connection.max_payload
        return self._max_signal_bytes

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish ``signals`` and wait for the server's answer. Nothing is queued meanwhile.

        Raises:
            SignalRefusedError: a signal is too large, or its subject is not permitted.
            TransportError: the server is unavailable. Some signals may be published.
        """
        connection = self._link.connection
        messages = [(self._subject_of(shard), body) for body, shard in signals]
        await self._link.call(connection, connection.publish(messages))

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Subscribe to what ``selection`` matches, and return when the server has accepted it."""
        if selection is Feed.ALL:
            subjects = [self._subject, f"{self._subject}.*"]
        elif selection is Feed.UNTAGGED:
            subjects = [self._subject]
        else:
            subjects = [self._subject_of(selection)]
        return await self._link.subscribe(subjects, receiver, selection)

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._link.close()

    def _subject_of(self, shard: int | None) -> str:
        return self._subject if shard is None else f"{self._subject}.{shard}"


def _spread_in(url: str) -> float | None:
    given = url_options("transport", url, URL_OPTIONS | {_OPTION}).get(_OPTION)
    if given is None or re.fullmatch(r"\d{1,3}(\.\d+)?", given):
        return None if given is None else float(given)
    raise ConfigError(f"the transport URL's {_OPTION} {given!r} is invalid: give it in seconds")


class _Client(NatsClient):
    """A client that hands over each message as soon as it is read."""

    def __init__(self, *, on_lost: Callable[[], None]) -> None:
        super().__init__(on_lost=on_lost)
        self._inlets: dict[NatsSubscription, Callable[[bytes, bytes], None]] = {}

    async def listen(self, subject: str, inlet: Callable[[bytes, bytes], None]) -> NatsSubscription:
        """Call ``inlet`` with the subject and body of every message that ``subject`` matches."""
        subscription = await self.subscribe(subject)
        self._inlets[subscription] = inlet
        return subscription

    async def unlisten(self, subscription: NatsSubscription) -> None:
        """Undo :meth:`listen`."""
        del self._inlets[subscription]
        await subscription.unsubscribe()

    async def round_trip(self) -> None:
        """Return when the server has processed everything that was sent before.

        nats-py's ``flush()`` does not guarantee this: its PING may overtake data that waits to be
        written, and it returns without a PONG when the reading task has ended.
        """
        await self._flush_pending(force_flush=True)
        pong: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._send_ping(pong)
        await pong

    async def _process_err(self, err_msg: str) -> None:
        """Go on when the server takes no more subscriptions: it does, and nats-py would close."""
        if _FULL in err_msg:
            await self._error_cb(errors.Error(_FULL))
        else:
            await super()._process_err(err_msg)

    async def _process_msg(
        self,
        sid: int,
        subject: bytes,
        reply: bytes,  # noqa: ARG002 - the signature is nats-py's
        data: bytes,
        headers: bytes,  # noqa: ARG002
    ) -> None:
        """Hand over the body without a queue or a task, and without decoding subject and headers.

        nats-py's own method ends the reading task when a subject is not UTF-8 or a header is
        invalid. Anybody may publish those, and nothing would be received any more.
        """
        subscription = self._subs.get(sid)
        if subscription is not None and (inlet := self._inlets.get(subscription)):
            inlet(subject, data)


class _NatsConnection(EngineConnection):
    """One connection to one server."""

    def __init__(self, server: str, deliver: Deliver, spread_s: float | None) -> None:
        super().__init__()
        self._server = server
        self._deliver = deliver
        # As the URL has it; None: as the server's greeting has it.
        self._spread_s = spread_s
        self._client = _Client(on_lost=self._on_lost)
        # The subscriptions by topic.
        self._subscriptions: dict[str, NatsSubscription] = {}
        # The subjects being subscribed to, in lower case.
        self._asking: set[str] = set()
        # What the server has refused: "publish" or "subscription", and the subject in lower case.
        self._refused: set[tuple[str, str]] = set()
        # Whether it has just refused a subscription because there are too many.
        self._is_full = False

    @classmethod
    async def dial(
        cls, server: str, url: str, name: str, spread_s: float | None, deliver: Deliver
    ) -> Self:
        """Connect to ``server`` with the credentials of ``url``, whose files are read anew."""
        allowed = URL_OPTIONS | {_OPTION}
        options = await asyncio.to_thread(client_options, "transport", url, allowed)

        async def dial(address: str, options: dict[str, Any]) -> Self:
            return await cls(server, deliver, spread_s).open(address, options, name)

        try:
            return await dial_server(server, options, dial, cls.close)
        except OSError as error:
            raise TransportError(f"{server}: {refusal_of(error)}") from error

    async def open(self, address: str, options: dict[str, Any], name: str) -> Self:
        """Connect to one address of the server, a URL. It closes itself when that fails."""
        try:
            with self._translated():
                await self._client.dial(
                    address,
                    options,
                    name=name,
                    timeout_s=DIAL_TIMEOUT_S,
                    on_error=self._on_error,
                )
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def topics(self) -> AbstractSet[str]:
        return self._subscriptions.keys()

    @property
    def spread_s(self) -> float:
        """In a cluster each server must learn of a subscription before it forwards to it."""
        if self._spread_s is not None:
            return self._spread_s
        return INTEREST_SPREAD_S if self._client.is_clustered else 0.0

    @property
    def max_payload(self) -> int:
        """The longest body that the server accepts."""
        return self._client.max_payload

    async def subscribe(self, topics: Collection[str]) -> None:
        subjects = {topic.lower() for topic in topics}  # nats-py reports refusals in lower case
        self._asking |= subjects
        try:
            with self._translated():
                for topic in topics:
                    inlet = partial(self._deliver, topic)
                    self._subscriptions[topic] = await self._client.listen(topic, inlet)
            await self._accepted("subscription", topics)
        except SignalRefusedError:
            await self.unsubscribe(topics)
            raise
        finally:
            self._asking -= subjects

    async def unsubscribe(self, topics: Collection[str]) -> None:
        with self._translated():
            for topic in tuple(topics):
                await self._client.unlisten(self._subscriptions.pop(topic))

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Publish (subject, body) pairs, and return when the server has accepted all of them."""
        with self._translated():
            for subject, body in messages:
                await self._client.publish(subject, body)
        await self._accepted("publish", (subject for subject, _ in messages))

    async def round_trip(self) -> None:
        await self._client.round_trip()

    async def close(self) -> None:
        await self._client.hang_up()

    async def _accepted(self, what: str, subjects: Iterable[str]) -> None:
        """Make a round trip: the server reports what it refuses before it answers."""
        await self._client.round_trip()
        if self._is_full and what == "subscription":
            self._is_full = False
            raise SignalRefusedError(f"{self._server}: {_FULL}")
        if self._refused and (
            refused := self._refused & {(what, subject.lower()) for subject in subjects}
        ):
            self._refused -= refused
            raise SignalRefusedError(f"{self._server}: no {what} permission for {min(refused)[1]}")

    async def _on_error(self, error: Exception) -> None:
        if str(error) == _FULL:
            self._is_full = True
        elif refusal := _REFUSAL.search(str(error)):
            what, subject = refusal.groups()
            if what == "subscription" and subject not in self._asking:
                self.lose(f"the server withdrew the permission for {subject}")
            else:
                self._refused.add((what, subject))

    def _on_lost(self) -> None:
        self.lose(refusal_of(self._client.last_error or self._client.trouble))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the driver's errors into TransportError, in one line without secrets."""
        try:
            yield
        except errors.MaxPayloadError:
            raise SignalRefusedError(
                f"{self._server}: a signal exceeds max_payload ({self.max_payload} bytes)",
                is_too_large=True,
            ) from None
        except (errors.Error, OSError) as error:
            raise TransportError(f"{self._server}: {refusal_of(error)}") from error

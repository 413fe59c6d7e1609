"""The NATS transport: core NATS, a subject a shard, at most once (docs/transports/nats.md).

push-notifications            signals without a shard, and whatever people publish by hand
push-notifications.<shard>    signals of one shard
push-notifications-census     "who takes everything?", asked now and then, and the count
push-notifications-census.*   the answers
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from functools import partial
from typing import Self

from nats import errors
from nats.aio.subscription import Subscription as NatsSubscription

from pokebridge.engines.nats import NatsClient, client_options, refusal_of, servers_in
from pokebridge.errors import TransportError
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, Subscription
from pokebridge.transport.reconnecting_link import (
    DIAL_TIMEOUT_S,
    CachedCount,
    Deliver,
    ReconnectingLink,
    check_topic,
)

# How long the instances have to answer a census: they answer at once, so this is round trips.
CENSUS_WINDOW_S = 0.25

_REFUSAL = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')
_TOKEN = re.compile(rb"[0-9a-f]{1,32}")


class NatsTransport:
    """Signals over core NATS. Made by :meth:`connect`; one connection carries everything."""

    def __init__(self, link: "ReconnectingLink[_NatsConnection]", subject: str) -> None:
        self._link = link
        self._subject = subject
        self._census = _Census(link, f"{subject}-census", self._takes_everything)

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        subject: str = "push-notifications",
        cluster: str = "default",
        instance: str = "",
    ) -> Self:
        """Connect to the servers in ``url``.

        Args:
            url: as :mod:`pokebridge.engines.nats` says.
            subject: where signals are published.
            cluster: with ``instance`` it names the connection in NATS's monitoring.
            instance: see ``cluster``.

        Raises:
            ConfigError: the URL or the subject makes no sense, or a file can't be read.
            TransportError: no server can be had, or the credentials are refused.
        """
        check_topic("the NATS subject", subject)
        servers = servers_in("transport", url)
        name = f"pokebridge {cluster} {instance}".strip()
        dials = [partial(_NatsConnection.dial, server, url, name) for server in servers]
        link = ReconnectingLink(",".join(servers), dials, subject)
        await link.open()
        return cls(link, subject)

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Publish and wait for the server's answer. Nothing is kept back while it is away.

        Raises:
            TransportError: the server is away or refuses; some signals may have gone out.
        """
        connection = self._link.connection
        messages = [(self._subject_of(shard), body) for body, shard in signals]
        await self._link.call(connection, connection.publish(messages))

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        """Receive what ``selection`` matches; the server has accepted it when this returns."""
        if selection is Feed.ALL:
            subjects = [self._subject, f"{self._subject}.*"]
        elif selection is Feed.UNTAGGED:
            subjects = [self._subject]
        else:
            subjects = [self._subject_of(selection)]
        subscription = await self._link.subscribe(subjects, receiver, selection)
        await self._census.join()
        return subscription

    async def subscriber_count(self) -> int | None:
        """How many instances take everything, at most some 10 s old; ``None`` while cut off."""
        return await self._census.count()

    async def close(self) -> None:
        """Close the connection. May be called twice."""
        await self._link.close()

    def _subject_of(self, shard: int | None) -> str:
        return self._subject if shard is None else f"{self._subject}.{shard}"

    def _takes_everything(self) -> bool:
        return self._link.wants(f"{self._subject}.*")


class _Client(NatsClient):
    """A client that hands each message over as it is read; it hears only what it listens to."""

    def __init__(self, *, on_lost: Callable[[], None]) -> None:
        super().__init__(on_lost=on_lost)
        self._inlets: dict[NatsSubscription, Callable[[bytes, bytes], None]] = {}

    async def listen(self, subject: str, inlet: Callable[[bytes, bytes], None]) -> NatsSubscription:
        """Call ``inlet`` with the subject and body of every message that ``subject`` matches."""
        subscription = await self.subscribe(subject)
        self._inlets[subscription] = inlet
        return subscription

    async def unlisten(self, subscription: NatsSubscription) -> None:
        """End what :meth:`listen` began."""
        del self._inlets[subscription]
        await subscription.unsubscribe()

    async def round_trip(self) -> None:
        """Return when the server has dealt with all that was sent before.

        ``flush()`` is not it: its PING overtakes what waits to be written, and it returns without
        a PONG when the reading task has died.
        """
        await self._flush_pending(force_flush=True)
        pong: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._send_ping(pong)
        await pong

    async def _process_msg(
        self,
        sid: int,
        subject: bytes,
        reply: bytes,  # noqa: ARG002 - the signature is nats-py's
        data: bytes,
        headers: bytes,  # noqa: ARG002
    ) -> None:
        """Hand over the body at once: no queue, no task, nothing decoded that we do not need.

        The original ends the reading task, and so makes us deaf, over a subject that is not UTF-8
        or a header that is none; anybody may publish those.
        """
        subscription = self._subs.get(sid)
        if subscription is not None and (inlet := self._inlets.get(subscription)):
            inlet(subject, data)


class _NatsConnection:
    """One connection to one server (a ``reconnecting_link.EngineConnection``)."""

    def __init__(self, server: str, deliver: Deliver) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._server = server
        self._deliver = deliver
        self._client = _Client(on_lost=self._on_lost)
        self._subscriptions: dict[str, NatsSubscription] = {}
        self._asking: set[str] = set()
        self._refused: set[tuple[str, str]] = set()

    @classmethod
    async def dial(cls, server: str, url: str, name: str, deliver: Deliver) -> Self:
        """Connect to ``server`` with the credentials of ``url``, whose files may have changed."""
        options = await asyncio.to_thread(client_options, "transport", url)
        connection = cls(server, deliver)
        try:
            with connection._translated():
                await connection._client.dial(
                    server,
                    options,
                    name=name,
                    timeout_s=DIAL_TIMEOUT_S,
                    on_error=connection._on_error,
                )
        except BaseException:
            await connection.close()
            raise
        return connection

    @property
    def topics(self) -> AbstractSet[str]:
        return self._subscriptions.keys()

    async def subscribe(self, topics: Collection[str]) -> None:
        subjects = {topic.lower() for topic in topics}  # nats-py hands refusals over in lower case
        self._asking |= subjects
        try:
            with self._translated():
                for topic in topics:
                    inlet = partial(self._deliver, topic)
                    self._subscriptions[topic] = await self._client.listen(topic, inlet)
            await self._accepted("subscription", topics)
        finally:
            self._asking -= subjects

    async def unsubscribe(self, topics: Collection[str]) -> None:
        with self._translated():
            for topic in tuple(topics):
                await self._client.unlisten(self._subscriptions.pop(topic))

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Publish bodies on subjects; returns when the server has accepted them all."""
        with self._translated():
            for subject, body in messages:
                await self._client.publish(subject, body)
        await self._accepted("publish", (subject for subject, _ in messages))

    async def round_trip(self) -> None:
        await self._client.round_trip()

    async def close(self) -> None:
        await self._client.hang_up()

    async def _accepted(self, what: str, subjects: Iterable[str]) -> None:
        """Return after a round trip; the server reports what it refuses before it answers."""
        await self._client.round_trip()
        if self._refused and (
            refused := self._refused & {(what, subject.lower()) for subject in subjects}
        ):
            self._refused -= refused
            raise TransportError(f"{self._server}: no permission for {what} to {min(refused)[1]}")

    async def _on_error(self, error: Exception) -> None:
        if refusal := _REFUSAL.search(str(error)):
            what, subject = refusal.groups()
            if what == "subscription" and subject not in self._asking:
                self._lose(f"the server took the permission for {subject} away")
            else:
                self._refused.add((what, subject))

    def _on_lost(self) -> None:
        self._lose(refusal_of(self._client.last_error or self._client.trouble))

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The driver's errors as TransportError, in one line without secrets."""
        try:
            yield
        except (errors.Error, OSError) as error:
            raise TransportError(f"{self._server}: {refusal_of(error)}") from error


class _Census:
    """Counts the instances that take everything: one asks, they answer, all hear the result.

    So N instances that want to know cost about 3 N small messages every 10 s, not N².
    """

    def __init__(
        self,
        link: ReconnectingLink[_NatsConnection],
        subject: str,
        takes_everything: Callable[[], bool],
    ) -> None:
        self._link = link
        self._subject = subject
        self._takes_everything = takes_everything
        self._id = secrets.token_hex(8).encode()
        self._joined = False
        self._cached = CachedCount()
        self._result_due_s = float("-inf")
        self._result: asyncio.Future[int] | None = None

    async def join(self) -> None:
        """Hear questions and results from now on."""
        if not self._joined:
            self._joined = True
            try:
                await self._link.subscribe([self._subject], self, None)
            except TransportError:  # not allowed, say: then we are not counted, and all else works
                self._joined = False

    async def count(self) -> int | None:
        """The count, at most some 10 s old; ``None`` while there is no connection."""
        try:
            return await self._cached.get(self._count)
        except TransportError:
            return None

    def on_signal(self, body: bytes, tag: str | None) -> None:  # noqa: ARG002 - a Receiver's
        """Take a question or a result; whatever else comes on this subject is dropped."""
        what, _, value = body.partition(b" ")
        if what == b"who" and _TOKEN.fullmatch(value):
            self._result_due_s = asyncio.get_running_loop().time() + 2 * CENSUS_WINDOW_S
            if self._takes_everything():
                self._link.spawn(self._say(f"{self._subject}.{value.decode()}", self._id))
        elif what == b"count" and value.isdigit() and len(value) < 10:
            self._cached.set(int(value))
            if self._result is not None and not self._result.done():
                self._result.set_result(int(value))

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Nothing was missed that would not be asked again."""

    async def _count(self) -> int:
        """Another's result when one is due, else our own."""
        self._result = asyncio.get_running_loop().create_future()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._result_due_s):
                return await self._result
        answers = _Answers()
        token = secrets.token_hex(8)
        hearing = await self._link.subscribe([f"{self._subject}.{token}"], answers, None)
        try:
            await self._say(self._subject, b"who " + token.encode())
            await asyncio.sleep(CENSUS_WINDOW_S)
        finally:
            await hearing.close()
        await self._say(self._subject, b"count %d" % len(answers.ids))
        return len(answers.ids)

    async def _say(self, subject: str, body: bytes) -> None:
        connection = self._link.connection
        await self._link.call(connection, connection.publish([(subject, body)]))


class _Answers:
    def __init__(self) -> None:
        self.ids: set[bytes] = set()

    def on_signal(self, body: bytes, tag: str | None) -> None:  # noqa: ARG002 - a Receiver's
        self.ids.add(body)

    def on_gap(self, selection: Selection, reason: str) -> None: ...

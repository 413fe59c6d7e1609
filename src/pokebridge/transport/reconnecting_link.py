"""One connection to an engine that is replaced when it breaks, and the subscriptions it carries.

NATS and Redis work alike: a connection pushes what it subscribed to, and whatever is published
while it is broken is lost. So both recover alike, and this module does it: notice the failure, dial
again with full jitter until it works, subscribe to everything again, prove it with a round trip,
and then report the gap. A broken connection is replaced, never repaired. So one path covers a
killed server, a cut cable, a slow consumer that the server disconnected, and expired credentials.
"""

import asyncio
import random
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import structlog

from pokebridge.backoff import backoff_s
from pokebridge.engines.addresses import first_of
from pokebridge.errors import ConfigError, PokebridgeError, SignalRefusedError, TransportError
from pokebridge.supervisor import cancel, supervise
from pokebridge.transport.base import Receiver, Selection, deliver, report_gap

# A connection counts as lost after two heartbeats without an answer, so 4 to 6 s after it was cut.
# One is not enough: after a long stall of this process the answer is there, but not yet read.
HEARTBEAT_S = 2.0
SILENT_BEATS = 2
# Together with the longest back-off this limits how long recovery takes once a server is back: 5 s.
DIAL_TIMEOUT_S = 3.0
BACKOFF_BASE_S = 0.1
BACKOFF_CAP_S = 1.0
ANSWER_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
CANCEL_AGAIN_S = 0.05

_TOPIC = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

T = TypeVar("T")
Deliver = Callable[[str, bytes, bytes], None]
"""Called for each message: the topic subscribed to, the name it was published under, its body."""

log = structlog.get_logger(__name__)


class EngineConnection(Protocol):
    """A connection from the moment it is dialled until it breaks.

    Calls raise TransportError when the engine refuses. On a broken connection they may hang:
    :class:`ReconnectingLink` limits how long.
    """

    lost: asyncio.Future[str]
    """Done when the connection is broken, with the reason."""

    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()

    def lose(self, reason: str) -> None:
        """Take the connection for broken."""
        if not self.lost.done():
            self.lost.set_result(reason)

    @property
    def topics(self) -> AbstractSet[str]:
        """The topics that the engine was asked to deliver on this connection."""

    @property
    def spread_s(self) -> float:
        """How long an accepted subscription may miss what is published at other servers."""

    async def subscribe(self, topics: Collection[str]) -> None:
        """Ask for ``topics``, and return when the engine has accepted all of them.

        Raises SignalRefusedError when it refuses some, and then has subscribed to none of them.
        """

    async def unsubscribe(self, topics: Collection[str]) -> None:
        """Stop receiving ``topics``."""

    async def round_trip(self) -> None:
        """Return when the engine has answered something that was sent after this call began."""

    async def close(self) -> None:
        """Close the connection, broken or not, within :data:`CLOSE_TIMEOUT_S`. Never raises."""


C = TypeVar("C", bound=EngineConnection)


class ReconnectingLink(Generic[C]):
    """Keeps one connection to an engine and restores its subscriptions.

    Args:
        name: the engine's name in messages. Must not contain secrets.
        dials: one function for each server of the engine, which are interchangeable. Each returns
            a connection or raises TransportError.
        base: the topic of signals without a shard. A shard's topic is ``base``, a dot, the shard.
    """

    def __init__(
        self, name: str, dials: Sequence[Callable[[Deliver], Coroutine[Any, Any, C]]], base: str
    ) -> None:
        self._name = name
        self._tag_at = len(base) + 1
        self._dials = [partial(dial, self._deliver) for dial in dials]
        # The current connection, or None and the reason in _trouble.
        self._connection: C | None = None
        self._trouble = "not connected yet"
        # Why signals may have been lost, until the receivers have been told.
        self._gap: str | None = None
        # All subscriptions, in the order in which they were made, and those of each topic.
        self._subscriptions: dict[_RoutedSubscription, None] = {}
        self._routes: dict[str, tuple[_RoutedSubscription, ...]] = {}
        # The topics that the engine refuses on this connection, and why.
        self.refused: dict[str, str] = {}
        # Held while the set of topics that the engine delivers is changed.
        self._lock = asyncio.Lock()
        # Background tasks, cancelled when the connection is lost.
        self._work: set[asyncio.Task[Any]] = set()
        # Connections that are being closed. A caller that waits may be cancelled; the closing may
        # not.
        self._closing: set[asyncio.Task[None]] = set()
        # The task that watches the connection and replaces it.
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Dial for the first time.

        Raises:
            TransportError: no server is available. A start fails; it does not wait.
        """
        self._connection = await self._open_connection()
        self._keeper = supervise("transport_connection", self._keep)

    @property
    def connection(self) -> C:
        """The current connection. Raises TransportError when there is none."""
        if self._connection is None:
            raise TransportError(f"{self._name}: {self._trouble}")
        if self._connection.lost.done():
            raise TransportError(f"{self._name}: {self._connection.lost.result()}")
        return self._connection

    async def subscribe(
        self, topics: Collection[str], receiver: Receiver, selection: Selection
    ) -> "_RoutedSubscription":
        """Deliver ``topics`` to ``receiver``, and report gaps as gaps of ``selection``.

        It returns when all servers of the engine have heard of the subscription. A topic that
        several subscriptions share is requested from the engine once.
        """
        subscription = _RoutedSubscription(self, topics, receiver, selection)
        joining = self.spawn(self._join(subscription))
        try:
            await asyncio.wait({joining})
        except asyncio.CancelledError:
            joining.add_done_callback(lambda _: self.spawn(self.unsubscribe(subscription)))
            raise
        if joining.cancelled():
            raise TransportError(f"{self._name}: {self._trouble}")
        joining.result()
        return subscription

    async def unsubscribe(self, subscription: "_RoutedSubscription") -> None:
        """Stop delivering to ``subscription``. Idempotent.

        A gap that is not over yet is reported to it now, since nobody will report it later.
        """
        gap = self._gap or subscription.trouble
        if subscription in self._subscriptions and gap is not None:
            report_gap(subscription.receiver, subscription.selection, gap)
        self._remove(subscription)
        await self._unsubscribe_unused()

    async def call(self, connection: C, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` on ``connection``, which counts as lost after 5 s without a result.

        When the caller is cancelled the work continues: a driver that is interrupted halfway would
        take the answer to one call for the answer to another.
        """
        task = self.spawn(work)
        either: set[asyncio.Future[Any]] = {task, connection.lost}
        await asyncio.wait(either, timeout=ANSWER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled():
            return task.result()
        if task.cancelled():
            raise TransportError(f"{self._name}: {self._trouble}")
        connection.lose(f"no answer for {ANSWER_TIMEOUT_S:.0f} s")
        raise TransportError(f"{self._name}: {connection.lost.result()}")

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``work`` in the background until the connection is lost. Its failure is ignored."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Close the connection and drop every subscription. Idempotent."""
        await cancel(self._keeper)
        self._routes.clear()
        self._subscriptions.clear()
        connection, self._connection, self._trouble = self._connection, None, "closed"
        if connection is not None:
            await self._discard(connection)
        if self._closing:
            await asyncio.wait(self._closing)
        await self._drop_work()

    # --- subscriptions --------------------------------------------------------------------------

    def _deliver(self, topic: str, name: bytes, body: bytes) -> None:
        tag = name[self._tag_at :].decode("latin-1") or None
        for subscription in self._routes.get(topic, ()):
            deliver(subscription.receiver, body, tag)

    def _add(self, subscription: "_RoutedSubscription") -> None:
        self._subscriptions[subscription] = None
        for topic in subscription.topics:
            self._routes[topic] = (*self._routes.get(topic, ()), subscription)

    def _remove(self, subscription: "_RoutedSubscription") -> None:
        if subscription not in self._subscriptions:
            return
        del self._subscriptions[subscription]
        for topic in subscription.topics:
            others = tuple(s for s in self._routes[topic] if s is not subscription)
            if others:
                self._routes[topic] = others
            else:
                del self._routes[topic]

    async def _join(self, subscription: "_RoutedSubscription") -> None:
        """Add ``subscription``, and ask the engine for those of its topics that are new."""
        try:
            async with self._lock:
                connection = self.connection
                missing = set(subscription.topics) - connection.topics
                self._add(subscription)
                if missing:
                    await self.call(connection, connection.subscribe(missing))
            await asyncio.sleep(connection.spread_s)
        except BaseException:
            self._remove(subscription)
            self.spawn(self._unsubscribe_unused())
            raise

    async def _unsubscribe_unused(self) -> None:
        """Unsubscribe from the topics that no subscription has any more."""
        if self._connection is None:  # the next connection does not subscribe to them
            return
        async with self._lock:
            connection = self._connection
            if connection and (unused := connection.topics - self._routes.keys()):
                with suppress(TransportError):  # the connection is lost, and its topics with it
                    await self.call(connection, connection.unsubscribe(unused))

    # --- reconnecting ---------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Watch the connection and replace it. Begun again, it goes on where it was."""
        while True:
            connection = self._connection or await self._restore()
            if self._gap is not None:
                await self._report_gap(connection, self._gap)
            reason = self._gap = await self._until_lost(connection)
            log.warning("transport_connection_lost", engine=self._name, reason=reason)
            self._connection, self._trouble = None, reason
            await self._discard(connection)
            await self._drop_work()

    async def _report_gap(self, restored: C, reason: str) -> None:
        """Report the gap, unless the connection is lost before others know what it wants."""
        await asyncio.wait({restored.lost}, timeout=restored.spread_s)
        if restored.lost.done():
            return
        for subscription in tuple(self._subscriptions):
            if subscription.trouble is None:
                report_gap(subscription.receiver, subscription.selection, reason)
        self._gap = None
        self.spawn(self._unsubscribe_unused())  # closed while the connection was restored

    async def _until_lost(self, connection: C) -> str:
        """Wait until ``connection`` is lost or does not answer, and return the reason."""
        beat: asyncio.Task[None] | None = None
        silent_beats = 0
        while not connection.lost.done():
            beat = beat or self.spawn(connection.round_trip())
            await asyncio.wait({connection.lost}, timeout=HEARTBEAT_S)
            if beat.done() and not beat.exception():
                beat, silent_beats = None, 0
                if self.refused:
                    self.spawn(self._ask_again(connection))
                continue
            silent_beats += 1
            if silent_beats == SILENT_BEATS:
                connection.lose(f"no answer for {SILENT_BEATS * HEARTBEAT_S:.0f} s")
        return connection.lost.result()

    async def _restore(self) -> C:
        failures = 0
        while self._connection is None:
            await asyncio.sleep(backoff_s(failures, first_s=BACKOFF_BASE_S, cap_s=BACKOFF_CAP_S))
            failures += 1
            try:
                async with self._lock:
                    self._connection = await self._open_connection()
            except PokebridgeError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning(
                        "transport_reconnect_failed", engine=self._name, reason=self._trouble
                    )
        log.info("transport_connection_restored", engine=self._name)
        return self._connection

    async def _open_connection(self) -> C:
        """Dial any server and subscribe to all topics."""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                dials = random.sample(self._dials, len(self._dials))
                connection = await first_of(dials, self._discard)
        except TimeoutError:
            raise TransportError(f"{self._name}: no answer") from None
        try:
            self.refused = await self._ask_for(connection, list(self._routes))
        except BaseException:
            await self._discard(connection)
            raise
        if self.refused:
            reason = next(iter(self.refused.values()))
            log.error("transport_topics_refused", topics=len(self.refused), reason=reason)
        return connection

    async def _ask_for(self, connection: C, topics: Sequence[str]) -> dict[str, str]:
        """Ask for ``topics``. Returns those that the engine refuses, as for a permission, and why.

        They must cost neither the other subscriptions nor what this instance publishes.
        """
        try:
            if topics:
                await self.call(connection, connection.subscribe(topics))
        except SignalRefusedError as error:
            if len(topics) == 1:
                return {topics[0]: str(error)}
            middle = len(topics) // 2
            refused = await self._ask_for(connection, topics[:middle])
            return refused | await self._ask_for(connection, topics[middle:])
        return {}

    async def _ask_again(self, connection: C) -> None:
        """Ask for what was refused, and report the gaps that this ends."""
        async with self._lock:
            waiting = [each for each in self._subscriptions if each.trouble is not None]
            topics = self.refused.keys() & self._routes.keys() - connection.topics
            self.refused = await self._ask_for(connection, sorted(topics))
        await asyncio.sleep(connection.spread_s)
        for subscription in waiting:
            if subscription.trouble is None and subscription in self._subscriptions:
                reason = "the engine had refused it"
                report_gap(subscription.receiver, subscription.selection, reason)

    async def _discard(self, connection: C) -> None:
        """Close ``connection``, and go on with it even when the caller is cancelled meanwhile."""
        task = asyncio.create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)

    async def _drop_work(self) -> None:
        """Cancel what runs on a lost connection, repeatedly: nats-py swallows a cancellation."""
        while self._work:
            for task in self._work:
                task.cancel()
            await asyncio.wait(self._work, timeout=CANCEL_AGAIN_S)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # else asyncio would log it as never retrieved


@dataclass(eq=False, slots=True)
class _RoutedSubscription:
    link: "ReconnectingLink[Any]"
    topics: Collection[str]
    receiver: Receiver
    selection: Selection

    @property
    def trouble(self) -> str | None:
        """Why the engine refuses a part of it."""
        refused = self.link.refused
        return next((refused[topic] for topic in self.topics if topic in refused), None)

    async def close(self) -> None:
        """Stop receiving."""
        await self.link.unsubscribe(self)


def check_topic(setting: str, value: str) -> str:
    """Return ``value`` if topic names may start with it, and raise ConfigError otherwise.

    The characters allowed have no special meaning in the patterns of any engine.
    """
    if not _TOPIC.fullmatch(value):
        raise ConfigError(
            f"{setting} {value!r} is invalid: use letters, digits, - and _, separated by dots"
        )
    return value

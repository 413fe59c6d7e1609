"""One connection to an engine, kept alive, and the subscriptions that ride on it.

NATS and Redis give the same: a connection that pushes what it subscribed to, and loses whatever is
published while it is broken. So the way back is the same too, and is here: notice, dial again with
full jitter for as long as it takes, subscribe to everything again, prove it with a round trip, and
only then report the gap. A broken connection is never repaired, always replaced: one path for a
killed server, a cut cable, a slow consumer that was thrown out and credentials that ran out.
"""

import asyncio
import itertools
import random
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import structlog

from pokebridge.backoff import backoff_s
from pokebridge.errors import ConfigError, TransportError
from pokebridge.transport.base import Receiver, Selection

# A connection is given up after two beats without an answer, so 4 to 6 s after it was cut. Two,
# because after one long stall of this process the answer waits unread when the first beat ends.
HEARTBEAT_S = 2.0
SILENT_BEATS = 2
# Together with the last delay these bound the silence after a server is back: under 5 s.
DIAL_TIMEOUT_S = 3.0
BACKOFF_BASE_S = 0.1
BACKOFF_CAP_S = 1.0
ANSWER_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
CANCEL_AGAIN_S = 0.05
# How long a count of subscribers is good for: it moves when instances come and go.
COUNT_TTL_S = 10.0

_TOPIC = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

T = TypeVar("T")
Deliver = Callable[[str, bytes, bytes], None]
"""Takes a topic that was subscribed to, the name that the message came under, and its body."""
"""What a connection calls with a topic, as it was subscribed to, and the body that came on it."""

log = structlog.get_logger(__name__)


class EngineConnection(Protocol):
    """A connection from its dial until it breaks.

    Its calls raise TransportError when the engine refuses. They may hang when the connection is
    broken: the link bounds them.
    """

    @property
    def lost(self) -> asyncio.Future[str]:
        """Done when the connection is broken; the result says why. The link may resolve it too."""

    @property
    def topics(self) -> AbstractSet[str]:
        """What the engine was asked to deliver here and was not asked to stop delivering."""

    async def subscribe(self, topics: Collection[str]) -> None:
        """Receive ``topics``; returns when the engine has accepted them all."""

    async def unsubscribe(self, topics: Collection[str]) -> None:
        """Receive them no longer."""

    async def round_trip(self) -> None:
        """Return when the engine has answered something that was sent after this call began."""

    async def close(self) -> None:
        """Give up the connection, broken or not, within :data:`CLOSE_TIMEOUT_S`. Never raises."""


C = TypeVar("C", bound=EngineConnection)


class ReconnectingLink(Generic[C]):
    """Keeps one connection to the engine ``name`` and restores its subscriptions.

    Args:
        name: how messages name the engine: no secrets in it.
        dials: one for each server of the engine; any will do. Each makes a connection, or raises
            TransportError.
        base: the topic of signals without a shard; a shard's is that, a dot, and the shard.
    """

    def __init__(
        self, name: str, dials: Sequence[Callable[[Deliver], Awaitable[C]]], base: str
    ) -> None:
        self._name = name
        self._tag_at = len(base) + 1
        self._dials = itertools.cycle(random.sample(dials, len(dials)))
        self._server_count = len(dials)
        self._connection: C | None = None
        self._trouble = "not connected yet"
        self._routes: dict[str, tuple[_RoutedSubscription, ...]] = {}
        self._subscriptions: dict[_RoutedSubscription, None] = {}
        self._lock = asyncio.Lock()  # one change of what the engine delivers at a time
        self._work: set[asyncio.Task[Any]] = set()
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Dial for the first time.

        Raises:
            TransportError: the engine can't be had: a start should say so, not wait.
        """
        for servers_left in reversed(range(self._server_count)):
            try:
                self._connection = await self._open_connection()
                break
            except TransportError:
                if not servers_left:
                    raise
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self._name}")

    @property
    def connection(self) -> C:
        """The connection that stands now; raises TransportError when there is none."""
        if self._connection is None:
            raise TransportError(f"{self._name}: {self._trouble}")
        if self._connection.lost.done():
            raise TransportError(f"{self._name}: {self._connection.lost.result()}")
        return self._connection

    def wants(self, topic: str) -> bool:
        """Whether somebody here subscribes to ``topic``."""
        return topic in self._routes

    async def subscribe(
        self, topics: Collection[str], receiver: Receiver, selection: Selection | None
    ) -> "_RoutedSubscription":
        """Deliver ``topics`` to ``receiver``; a topic that several want is asked for once.

        Gaps are reported as gaps of ``selection``; with ``None`` they are not.
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
        """Stop delivering to ``subscription``. May be called twice."""
        self._remove(subscription)
        await self._give_back()

    async def call(self, connection: C, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` on ``connection``; a connection that lets it wait for 5 s is lost.

        The work goes on when the caller is cancelled, since a driver that is interrupted half way
        takes one call's answer for another's.
        """
        task = self.spawn(work)
        either: set[asyncio.Future[Any]] = {task, connection.lost}
        await asyncio.wait(either, timeout=ANSWER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled():
            return task.result()
        if task.cancelled():
            raise TransportError(f"{self._name}: {self._trouble}")
        if not connection.lost.done():
            connection.lost.set_result(f"no answer for {ANSWER_TIMEOUT_S:.0f} s")
        raise TransportError(f"{self._name}: {connection.lost.result()}")

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start ``work`` in the background; it ends with the link, and its failure is dropped."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Close the connection and forget every subscription. May be called twice."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._routes.clear()
        self._subscriptions.clear()
        connection, self._connection, self._trouble = self._connection, None, "closed"
        if connection is not None:
            await connection.close()
        await self._drop_work()

    # --- what is delivered to whom --------------------------------------------------------------

    def _deliver(self, topic: str, name: bytes, body: bytes) -> None:
        tag = name[self._tag_at :].decode("latin-1") or None
        for subscription in self._routes.get(topic, ()):
            subscription.receiver.on_signal(body, tag)

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
        """Have the engine deliver what ``subscription`` wants, and what nobody wanted before."""
        async with self._lock:
            connection = self.connection
            missing = set(subscription.topics) - connection.topics
            self._add(subscription)
            try:
                if missing:
                    await self.call(connection, connection.subscribe(missing))
            except BaseException:
                self._remove(subscription)
                self.spawn(self._give_back())
                raise

    async def _give_back(self) -> None:
        """Have the engine stop delivering what nobody here wants any more."""
        if self._connection is None:  # the next one is not asked for it
            return
        async with self._lock:
            connection = self._connection
            if connection and (unwanted := connection.topics - self._routes.keys()):
                with suppress(TransportError):  # lost: then everything is given back anyway
                    await self.call(connection, connection.unsubscribe(unwanted))

    # --- keeping it alive -----------------------------------------------------------------------

    async def _keep(self) -> None:
        while self._connection is not None:
            reason = await self._until_lost(self._connection)
            log.warning("transport connection lost", engine=self._name, reason=reason)
            broken, self._connection, self._trouble = self._connection, None, reason
            await broken.close()
            await self._drop_work()
            await self._restore()
            log.info("transport connection restored", engine=self._name)
            for subscription in tuple(self._subscriptions):
                subscription.report_gap(reason)
            self.spawn(self._give_back())  # what was closed while it was being restored

    async def _until_lost(self, connection: C) -> str:
        """Return why ``connection`` is lost, and give it up when it does not answer."""
        beat: asyncio.Task[None] | None = None
        silent_beats = 0
        while not connection.lost.done():
            beat = beat or self.spawn(connection.round_trip())
            await asyncio.wait({connection.lost}, timeout=HEARTBEAT_S)
            if beat.done() and not beat.exception():
                beat, silent_beats = None, 0
                continue
            silent_beats += 1
            if silent_beats == SILENT_BEATS and not connection.lost.done():
                connection.lost.set_result(f"no answer for {SILENT_BEATS * HEARTBEAT_S:.0f} s")
        return connection.lost.result()

    async def _restore(self) -> None:
        failures = 0
        while self._connection is None:
            await asyncio.sleep(backoff_s(failures, first_s=BACKOFF_BASE_S, cap_s=BACKOFF_CAP_S))
            failures += 1
            try:
                async with self._lock:
                    self._connection = await self._open_connection()
            except Exception as error:  # noqa: BLE001 - whatever it was, to give up is to go silent
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning("transport still away", engine=self._name, reason=self._trouble)

    async def _open_connection(self) -> C:
        """A new connection that delivers everything that is wanted."""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                connection = await next(self._dials)(self._deliver)
        except TimeoutError:
            raise TransportError(f"{self._name}: no answer") from None
        try:
            if wanted := set(self._routes):
                await self.call(connection, connection.subscribe(wanted))
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _drop_work(self) -> None:
        """End what was under way on a connection that is gone.

        One cancellation may not be enough: nats-py swallows one that comes while it flushes.
        """
        while self._work:
            for task in self._work:
                task.cancel()
            await asyncio.wait(self._work, timeout=CANCEL_AGAIN_S)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody else is to be told of it


@dataclass(eq=False, slots=True)
class _RoutedSubscription:
    link: "ReconnectingLink[Any]"
    topics: Collection[str]
    receiver: Receiver
    selection: Selection | None

    def report_gap(self, reason: str) -> None:
        """Tell the receiver, and survive it: the link must go on for the others."""
        if self.selection is not None:
            try:
                self.receiver.on_gap(self.selection, reason)
            except Exception as error:  # noqa: BLE001 - no error of one's may deafen the others
                log.warning("receiver failed on a gap", error=repr(error))

    async def close(self) -> None:
        """Stop receiving; what nobody else here wants is given back to the engine."""
        await self.link.unsubscribe(self)


class CachedCount:
    """A count that costs the engine something, asked for at most every :data:`COUNT_TTL_S`."""

    def __init__(self) -> None:
        self._value: int | None = None
        self._good_until = float("-inf")
        self._lock = asyncio.Lock()

    def set(self, value: int) -> None:
        """``value`` is the count now."""
        self._value = value
        self._good_until = asyncio.get_running_loop().time() + COUNT_TTL_S

    async def get(self, count: Callable[[], Awaitable[int | None]]) -> int | None:
        """The count, from ``count`` when the last one is too old; ``None`` is not kept."""
        async with self._lock:
            if asyncio.get_running_loop().time() >= self._good_until:
                value = await count()
                if value is None:
                    return None
                self.set(value)
            return self._value


def check_topic(setting: str, value: str) -> str:
    """Return ``value``, or raise ConfigError when it can't be the base of our topics' names.

    Letters, digits, ``-`` and ``_``, in parts with dots between: nothing that an engine would take
    for a pattern.
    """
    if not _TOPIC.fullmatch(value):
        raise ConfigError(
            f"{setting} is letters, digits, - and _, with dots between: not {value!r}"
        )
    return value

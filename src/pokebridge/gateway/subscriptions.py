"""This instance's subscriptions on the transport, and the proof that they deliver.

In fan-out mode an instance has one subscription for everything. In partitioned mode it has one for
each shard that it owns or has sessions of. A session gets ``ready`` only once its recipient's shard
is *proven live*. After a gap the sessions that may have missed a poke are poked. Both are decided
here, in the same way for every transport, by probes: an instance publishes a signal and waits until
its own subscription delivers it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import structlog

from pokebridge.backoff import spread
from pokebridge.errors import SignalError, TransportError
from pokebridge.gateway.meter import SAMPLE_EVERY
from pokebridge.placement import Steps, next_steps
from pokebridge.sharding import shard_of
from pokebridge.supervisor import run_once, supervise
from pokebridge.transport.base import (
    Explains,
    Feed,
    Selection,
    Signal,
    Subscription,
    Transport,
)
from pokebridge.wire import (
    Beacon,
    Disconnect,
    Lookup,
    Probe,
    decode_signal,
    encode_probe,
    is_probe,
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SubscriptionTiming:
    """When subscriptions are probed, and when they are closed."""

    silence_s: float = 5.0
    """A subscription that has delivered nothing for this long is probed."""
    subscribe_timeout_s: float = 10.0
    """A subscription that is not accepted within this time has failed."""
    probe_timeout_s: float = 2.0
    """A probe that is not delivered within this time has failed."""
    retry_s: float = 0.5
    """The average pause between two probes of a subscription that does not deliver."""
    probes_per_s: float = 4.0
    """The limit for all subscriptions together. With many of them each is probed less often."""
    wake_together_s: float = 0.1
    """The sessions of subscriptions that are proven again within this time are woken together, so
    that all of their pulls are spread as one."""
    retire_delay_s: float = 2.0
    """A subscription that is no longer needed stays open for this long, because signals may still
    be on their way through it."""


class SubscriptionManager:
    """Keeps the wanted subscriptions, make-before-break."""

    def __init__(
        self,
        transport: Transport,
        on_signal: Callable[[bytes], None],
        *,
        instance: str,
        shard_count: int,
        timing: SubscriptionTiming,
        on_live: Callable[[], None],
        on_missed: Callable[[Callable[[str], bool]], None],
    ) -> None:
        """Signals go to ``on_signal``.

        ``on_live`` is called whenever a subscription becomes live. ``on_missed`` is called when a
        subscription may have missed signals, once it is live again or replaced. Its argument is a
        test for the recipients that are affected.
        """
        self.transport = transport
        self.on_signal = on_signal
        self.instance = instance
        self.timing = timing
        self.gaps = 0
        """How many gaps the transport has reported, or beacons have shown."""
        self.probes = 0
        """How many probes were sent."""
        self.owned = 0
        """How many signals came for shards that this instance owns. Those of other shards came for
        sessions here."""
        self.untagged = 0
        """How many signals a subscription to their recipient's shard would not deliver, because
        their tag is missing or wrong. Wrong tags are an estimate: one signal in ``SAMPLE_EVERY`` is
        checked, and stands for all of them."""
        self.tags: dict[str | None, bool] = {}
        """Every valid tag, and whether this instance owns its shard."""
        self._shard_count = shard_count
        self._on_live = on_live
        self._on_missed = on_missed
        self._wanted: frozenset[Selection] = frozenset()
        self._managed: dict[Selection, _ManagedSubscription] = {}
        self._closing: set[asyncio.Task[None]] = set()
        # Whether all wanted subscriptions have been live at some time.
        self._were_live = False
        # What may have missed signals and is live again or replaced, until the timer runs out.
        self._missed: set[Selection] = set()
        self._waker: asyncio.TimerHandle | None = None
        self.own(frozenset())

    @property
    def trouble(self) -> str | None:
        """Why this instance can't receive everything that it should. ``None`` when it can.

        Until all subscriptions have been live once, any that is not proven yet is reported.
        Afterwards one is reported only when its proof has failed: a rebalance must not take every
        instance that gains a shard out of service. Meanwhile sessions of that shard wait for
        ``ready``.
        """
        if not self._wanted:
            return "nothing is subscribed"
        for selection, managed in self._managed.items():
            is_needed = selection in self._wanted or self._is_unheard(managed)
            is_expected = self._were_live and managed.is_new
            if is_needed and managed.trouble is not None and not is_expected:
                return managed.trouble
        return None

    @property
    def all_live(self) -> bool:
        """Whether all that is wanted is proven live."""
        return all(map(self._is_live, self._wanted))

    @property
    def settled(self) -> bool:
        """Whether the wanted subscriptions are proven live, and no others are left."""
        return self._managed.keys() == self._wanted and self.all_live

    @property
    def is_in_doubt(self) -> bool:
        """Whether this instance can't receive everything that it should.

        Either a subscription that was live may have missed signals and is not proven again, or one
        that is new can't be proven, and nothing else covers it.
        """
        return any(each.missed or self._is_unheard(each) for each in self._managed.values())

    @property
    def selections(self) -> frozenset[Selection]:
        """What this instance is subscribed to, live or not."""
        return frozenset(self._managed)

    @property
    def probe_interval_s(self) -> float:
        """How long a subscription may be silent before it is probed, in seconds."""
        return max(self.timing.silence_s, len(self._managed) / self.timing.probes_per_s)

    def covers(self, recipient: str) -> bool:
        """Whether a poke for ``recipient`` arrives here if it is published from now on."""
        if self._is_live(Feed.ALL):
            return True
        shard = shard_of(recipient, self._shard_count)
        return self._is_live(shard) and self._is_live(Feed.UNTAGGED)

    async def start(self, selections: Iterable[Selection]) -> None:
        """Open the first subscriptions.

        Raises:
            TransportError: the transport is unavailable. A start reports that and does not retry.
        """
        self._wanted = frozenset(selections)
        for selection in self._wanted:
            managed = self._managed[selection] = _ManagedSubscription(self, selection)
            await managed.subscribe()
            managed.start()

    def own(self, shards: Collection[int]) -> None:
        """Count the signals of ``shards`` as owned from now on."""
        self.tags = {str(shard): shard in shards for shard in range(self._shard_count)}

    def want(self, selections: Iterable[Selection]) -> None:
        """Change to ``selections``. Old subscriptions are closed once the new ones are live."""
        self._wanted = frozenset(selections)
        self._step()

    def report_gap(self, reason: str) -> None:
        """Treat all subscriptions as after a gap: signals of other instances were lost."""
        self.gaps += 1
        for managed in self._managed.values():
            managed.doubt(reason)

    async def close(self) -> None:
        """Close every subscription."""
        self._wanted = frozenset()
        if self._waker is not None:
            self._waker.cancel()
        open_ones, self._managed = list(self._managed.values()), {}
        await asyncio.gather(*(each.close() for each in open_ones), *self._closing)

    def is_mistagged(self, body: bytes, tag: str | None) -> bool:
        """Whether ``tag`` is not the recipient's shard: the publisher has another shard count."""
        try:
            content = decode_signal(body)
        except SignalError:
            return False
        if isinstance(content, Probe | Beacon | Lookup) or not content:
            return False
        first = content if isinstance(content, Disconnect) else content[0]
        return tag != str(shard_of(first.recipient, self._shard_count))

    # --- called by a subscription -------------------------------------------------------------

    def became_live(self, managed: "_ManagedSubscription", *, missed: bool) -> None:
        """A probe came back. ``missed``: the subscription was live before, and failed since."""
        self._were_live = self._were_live or self.all_live
        self._step()
        self._on_live()
        if missed:
            self._wake_soon(managed.selection)

    def _wake_soon(self, selection: Selection) -> None:
        self._missed.add(selection)
        if self._waker is None:
            loop = asyncio.get_running_loop()
            self._waker = loop.call_later(self.timing.wake_together_s, self._wake)

    def _wake(self) -> None:
        missed, self._missed, self._waker = self._missed, set(), None
        if any(isinstance(selection, Feed) for selection in missed):
            self._on_missed(lambda _: True)  # a signal without a tag may be for any recipient
        else:
            self._on_missed(lambda recipient: shard_of(recipient, self._shard_count) in missed)

    def _is_live(self, selection: Selection) -> bool:
        managed = self._managed.get(selection)
        return managed is not None and managed.trouble is None

    def release(self, managed: "_ManagedSubscription") -> bool:
        """Close a retired subscription. Returns False, and keeps it, when it is needed again."""
        if managed.selection not in self._next_steps().drop:
            return False
        del self._managed[managed.selection]
        task = run_once("subscription_close", self._close_retired(managed))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return True

    async def _close_retired(self, managed: "_ManagedSubscription") -> None:
        await managed.close()  # the transport may know of a gap that it has not reported yet
        if managed.missed:
            self._wake_soon(managed.selection)

    def _next_steps(self) -> Steps:
        """What to open, and what to close.

        A refused subscription is kept until it is proven, wanted or not. Otherwise the instance
        would soon seem healthy, be given that shard again, and lose it again.
        """
        return next_steps(
            self._wanted,
            {
                selection: managed.trouble is None
                for selection, managed in self._managed.items()
                if selection in self._wanted or not self._is_unheard(managed)
            },
        )

    def _is_unheard(self, managed: "_ManagedSubscription") -> bool:
        """Whether ``managed`` was refused, and nothing else covers it."""
        return managed.is_refused and not self._is_live(Feed.ALL)

    def _step(self) -> None:
        steps = self._next_steps()
        for selection in steps.subscribe:
            self._managed[selection] = _ManagedSubscription(self, selection)
            self._managed[selection].start()
        for selection, managed in self._managed.items():
            if selection in steps.drop:
                managed.retire()
            else:
                managed.keep()


class _ManagedSubscription:
    """One subscription, and the task that keeps proving it. The transport's receiver."""

    def __init__(self, manager: SubscriptionManager, selection: Selection) -> None:
        self.selection = selection
        self.trouble: str | None = "the subscription is not proven live yet"
        """Why it is not live. ``None`` when it is."""
        self.missed = False
        """Whether it was live, and may have missed signals since."""
        # Whether it could not be opened, or its last probe was not delivered.
        self._failed = False
        self._manager = manager
        self._subscription: Subscription | None = None
        # Proves the subscription, again and again.
        self._watcher: asyncio.Task[None] | None = None
        # Closes it, from ``retire`` on.
        self._retiring: asyncio.Task[None] | None = None
        # Set by a gap: prove now.
        self._doubt = asyncio.Event()
        # How many signals it has delivered.
        self._heard = 0
        # The probe under way, and whether it was delivered.
        self._probe = b""
        self._probe_back = asyncio.Event()

    @property
    def is_new(self) -> bool:
        """Whether its first proof is under way."""
        return self.trouble is not None and not self._failed

    @property
    def is_refused(self) -> bool:
        """Whether it was never live, and an attempt to prove it has failed."""
        return self._failed and not self.missed

    async def subscribe(self) -> None:
        self._subscription = await self._manager.transport.subscribe(self.selection, self)

    def start(self) -> None:
        self._stop_watching()
        self._watcher = supervise("subscription", self._watch)

    def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    async def close(self) -> None:
        for task in (self._retiring, self._watcher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._subscription is not None:
            await self._subscription.close()

    def retire(self) -> None:
        """Close this subscription as soon as it is known to have missed nothing."""
        if self._retiring is None:
            self._retiring = supervise("subscription_retire", self._retire)

    def keep(self) -> None:
        """Cancel ``retire``, unless the subscription is already released."""
        if self._retiring is not None:
            self._retiring.cancel()
            self._retiring = None
            self.start()

    async def _retire(self) -> None:
        """Let the signals that are on their way arrive, then prove once more that all of them did.

        The transport may not have reported a gap yet. Without this last probe the sessions that the
        gap affects would not be poked.
        """
        was_live = self.trouble is None or self.missed
        if was_live:
            await asyncio.sleep(self._manager.timing.retire_delay_s)
        self._stop_watching()
        if was_live and not self.missed:
            await self._prove()  # sets ``missed`` when it fails
        self._retiring = None
        if not self._manager.release(self):
            self.start()

    # --- called by the transport ----------------------------------------------------------------

    def on_signal(self, body: bytes, tag: str | None) -> None:
        self._heard += 1
        manager = self._manager
        owned = manager.tags.get(tag)
        if owned is None:
            manager.untagged += not is_probe(body)
        else:
            manager.owned += owned
            if not self._heard % SAMPLE_EVERY and manager.is_mistagged(body, tag):
                manager.untagged += SAMPLE_EVERY
        if body == self._probe:
            self._probe_back.set()
        manager.on_signal(body)

    def on_gap(self, selection: Selection, reason: str) -> None:
        self._manager.gaps += 1
        self.doubt(f"a gap in the transport ({selection}): {reason}")

    def doubt(self, reason: str) -> None:
        """Signals may have been lost: prove the subscription again."""
        self._lose(reason)
        self._doubt.set()

    # --- the watcher ------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            self._doubt.clear()
            while not await self._prove():  # noqa: ASYNC110 - it is the probe that waits
                await asyncio.sleep(spread(self._manager.timing.retry_s))
            missed, self.missed, self._failed, self.trouble = self.missed, False, False, None
            if missed:
                log.warning("subscription_restored", selection=str(self.selection))
            self._manager.became_live(self, missed=missed)
            await self._until_doubt()

    async def _prove(self) -> bool:
        """Publish a probe. Returns whether this subscription delivers it in time."""
        manager = self._manager
        manager.probes += 1
        shard = self.selection if isinstance(self.selection, int) else None
        self._probe = encode_probe(f"{manager.instance}:{manager.probes}")
        self._probe_back.clear()
        try:
            if self._subscription is None:
                async with asyncio.timeout(manager.timing.subscribe_timeout_s):
                    await self.subscribe()
            async with asyncio.timeout(manager.timing.probe_timeout_s):
                await manager.transport.publish([Signal(self._probe, shard)])
                await self._probe_back.wait()
        except TimeoutError:
            self._lose(self._explanation() or "the subscription did not deliver a probe in time")
            return False
        except TransportError as error:
            self._lose(str(error))
            return False
        except Exception:  # nothing is proven
            self._lose("an unforeseen error, see the log")
            raise
        return True

    def _explanation(self) -> str | None:
        subscription: object = self._subscription
        return subscription.trouble if isinstance(subscription, Explains) else None

    def _lose(self, trouble: str) -> None:
        """Mark the subscription as not live. It may have missed signals if it was live before."""
        if self.trouble is None:
            log.warning("subscription_in_doubt", selection=str(self.selection), reason=trouble)
            self.missed = True
        self._failed, self.trouble = True, trouble

    async def _until_doubt(self) -> None:
        """Return after a gap, or when no signal has arrived for a while.

        Any signal proves that the subscription delivers, even another instance's probe. So a quiet
        cluster of N instances in fan-out mode sends about one probe in an interval, not N.
        """
        while True:
            heard = self._heard
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(spread(self._manager.probe_interval_s, 0.8, 1.2)):
                    await self._doubt.wait()
                return
            if self._heard == heard:
                return

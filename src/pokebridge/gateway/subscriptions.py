"""What this instance has the transport deliver, and the proof that it does.

It is a set of subscriptions: everything in fan-out, the owned and interesting shards when
partitioned. A session may be told ``ready`` only when its recipient's shard is *proven live*, and
whoever a gap may have left asleep must be woken. Both are judged here, the same for every
transport, by probes: signals that an instance publishes and then waits for.
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
from pokebridge.transport.base import (
    Explains,
    Feed,
    Selection,
    Signal,
    Subscription,
    Transport,
)
from pokebridge.wire import Disconnect, Probe, decode_signal, encode_probe, is_probe

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SubscriptionTiming:
    """How subscriptions are watched; in seconds."""

    silence_s: float = 5.0
    """After so long without any signal, a probe asks whether a subscription still delivers."""
    probe_timeout_s: float = 2.0
    retry_s: float = 0.5
    """Between two probes of a subscription that does not deliver, on average."""
    probes_per_s: float = 4.0
    """At most, however many subscriptions there are: then each is asked more rarely."""
    retire_delay_s: float = 2.0
    """What is needed no more stays so long: signals may still be on their way through it."""


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

        ``on_live`` is called when a subscription becomes live, and ``on_missed`` when it is again,
        with a test for the recipients to whom pokes may have been lost meanwhile.
        """
        self.transport = transport
        self.on_signal = on_signal
        self.instance = instance
        self.timing = timing
        self.gaps = 0
        self.probes = 0
        self.owned = 0
        """Signals for shards that this instance owns. What others own comes for sessions here."""
        self.untagged = 0
        """Signals that no subscription of their recipient's shard would bring: they are tagged with
        none, or with a wrong one, which is looked for in one of ``SAMPLE_EVERY`` alone."""
        self._shard_count = shard_count
        self._on_live = on_live
        self._on_missed = on_missed
        self.tags: dict[str | None, bool] = {}
        """The tags there are, and whether this instance owns their shard."""
        self.own(frozenset())
        self._wanted: frozenset[Selection] = frozenset()
        self._managed: dict[Selection, _ManagedSubscription] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def trouble(self) -> str | None:
        """Why something wanted is not known to be delivered; ``None`` when all is."""
        if not self._wanted:
            return "nothing is subscribed"
        for selection in self._wanted:
            trouble = self._managed[selection].trouble
            if trouble is not None:
                return trouble
        return None

    @property
    def settled(self) -> bool:
        """Whether all that is wanted is proven live, and nothing else is held any more."""
        return self._managed.keys() == self._wanted and self.trouble is None

    @property
    def is_in_doubt(self) -> bool:
        """Whether what was live is not known to be any more: a poke may have been lost."""
        return any(held.missed for held in self._managed.values())

    @property
    def selections(self) -> frozenset[Selection]:
        """What is held now, live or not."""
        return frozenset(self._managed)

    @property
    def probe_interval_s(self) -> float:
        """How long one subscription may be silent before it is probed."""
        return max(self.timing.silence_s, len(self._managed) / self.timing.probes_per_s)

    def covers(self, recipient: str) -> bool:
        """Whether a poke for ``recipient`` that is published from now on arrives here."""
        if self._is_live(Feed.ALL):
            return True
        shard = shard_of(recipient, self._shard_count)
        return self._is_live(shard) and self._is_live(Feed.UNTAGGED)

    async def start(self, selections: Iterable[Selection]) -> None:
        """Subscribe to what is wanted first.

        Raises:
            TransportError: the transport can't be had; a start should say so, not wait.
        """
        self._wanted = frozenset(selections)
        for selection in self._wanted:
            held = self._managed[selection] = _ManagedSubscription(self, selection)
            await held.subscribe()
            held.start()

    def own(self, shards: Collection[int]) -> None:
        """Count the signals for ``shards`` as owned from now on."""
        self.tags = {str(shard): shard in shards for shard in range(self._shard_count)}

    def want(self, selections: Iterable[Selection]) -> None:
        """Move to other subscriptions: the old go once all the new are proven live."""
        self._wanted = frozenset(selections)
        self._step()

    async def close(self) -> None:
        """Give every subscription back."""
        self._wanted = frozenset()
        held, self._managed = list(self._managed.values()), {}
        await asyncio.gather(*(each.close() for each in held), *self._closing)

    def is_mistagged(self, body: bytes, tag: str | None) -> bool:
        """Whether ``tag`` is not the recipient's shard: its publisher counts other shards."""
        try:
            content = decode_signal(body)
        except SignalError:
            return False
        if isinstance(content, Probe) or not content:
            return False
        first = content if isinstance(content, Disconnect) else content[0]
        return tag != str(shard_of(first.recipient, self._shard_count))

    # --- what the subscriptions report --------------------------------------------------------

    def became_live(self, held: "_ManagedSubscription", *, missed: bool) -> None:
        """``held`` is proven; ``missed`` when it had been before, and failed in between."""
        self._step()
        self._on_live()
        if missed:
            self._on_missed(self._concerned_by(held.selection))

    def _concerned_by(self, selection: Selection) -> Callable[[str], bool]:
        if isinstance(selection, Feed):  # an untagged signal may have been for anyone
            return lambda _: True
        return lambda recipient: shard_of(recipient, self._shard_count) == selection

    def _is_live(self, selection: Selection) -> bool:
        held = self._managed.get(selection)
        return held is not None and held.trouble is None

    def release(self, held: "_ManagedSubscription") -> bool:
        """Drop ``held``, which has parted, unless it is needed again; whether it is dropped."""
        if held.selection not in self._next_steps().drop:
            return False
        del self._managed[held.selection]
        if held.missed:
            self._on_missed(self._concerned_by(held.selection))
        task = asyncio.create_task(held.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return True

    def _next_steps(self) -> Steps:
        return next_steps(self._wanted, {s: self._is_live(s) for s in self._managed})

    def _step(self) -> None:
        steps = self._next_steps()
        for selection in steps.subscribe:
            self._managed[selection] = _ManagedSubscription(self, selection)
            self._managed[selection].start()
        for selection, held in self._managed.items():
            if selection in steps.drop:
                held.retire()
            else:
                held.keep()


class _ManagedSubscription:
    """One subscription under watch. It receives from the transport."""

    def __init__(self, manager: SubscriptionManager, selection: Selection) -> None:
        self._manager = manager
        self.selection = selection
        self.trouble: str | None = "the subscription is not proven live yet"
        self._subscription: Subscription | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()
        self.missed = False
        self._heard = 0
        self._probe = b""
        self._probe_back = asyncio.Event()

    async def subscribe(self) -> None:
        self._subscription = await self._manager.transport.subscribe(self.selection, self)

    def start(self) -> None:
        self._stop_watching()
        self._watcher = asyncio.create_task(self._watch())

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
        """Go, as soon as it is known that nothing was lost to this subscription."""
        if self._retiring is None:
            self._retiring = asyncio.create_task(self._retire())

    def keep(self) -> None:
        """Do not go, if it is not too late."""
        if self._retiring is not None:
            self._retiring.cancel()
            self._retiring = None
            self.start()

    async def _retire(self) -> None:
        """Let what is on its way arrive, and ask once more whether all of it did.

        Who goes without asking may take a gap along that the transport had not reported yet, and
        nobody would ever poke those who missed something.
        """
        was_live = self.trouble is None or self.missed
        if was_live:
            await asyncio.sleep(self._manager.timing.retire_delay_s)
        self._stop_watching()
        if was_live and not self.missed:
            await self._prove()  # if it can't, it has missed something, for all we know
        self._retiring = None
        if not self._manager.release(self):
            self.start()

    # --- the transport's calls ------------------------------------------------------------------

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
        self._lose(f"a gap in the transport ({selection}): {reason}")
        self._doubt.set()

    # --- the watch --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            self._doubt.clear()
            while not await self._prove():  # noqa: ASYNC110 - it is the probe that waits
                await asyncio.sleep(spread(self._manager.timing.retry_s))
            missed, self.missed, self.trouble = self.missed, False, None
            if missed:
                log.warning("subscription restored", selection=str(self.selection))
            self._manager.became_live(self, missed=missed)
            await self._until_doubt()

    async def _prove(self) -> bool:
        """Whether a probe comes back in time, through this subscription."""
        manager = self._manager
        manager.probes += 1
        shard = self.selection if isinstance(self.selection, int) else None
        self._probe = encode_probe(f"{manager.instance}:{manager.probes}")
        self._probe_back.clear()
        try:
            async with asyncio.timeout(manager.timing.probe_timeout_s):
                if self._subscription is None:
                    await self.subscribe()
                await manager.transport.publish([Signal(self._probe, shard)])
                await self._probe_back.wait()
        except TimeoutError:
            self._lose(self._explanation() or "no probe came back")
            return False
        except TransportError as error:
            self._lose(str(error))
            return False
        return True

    def _explanation(self) -> str | None:
        subscription: object = self._subscription
        return subscription.trouble if isinstance(subscription, Explains) else None

    def _lose(self, trouble: str) -> None:
        """This is not known to deliver any more, and may have missed something."""
        if self.trouble is None:
            log.warning("subscription in doubt", selection=str(self.selection), reason=trouble)
            self.missed = True
        self.trouble = trouble

    async def _until_doubt(self) -> None:
        """Return on a gap, or when nothing at all was heard for a while.

        Any signal proves that the subscription delivers, another instance's probe too: so a quiet
        cluster of N in fan-out spends about one probe an interval, not N.
        """
        while True:
            heard = self._heard
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(spread(self._manager.probe_interval_s, 0.8, 1.2)):
                    await self._doubt.wait()
                return
            if self._heard == heard:
                return

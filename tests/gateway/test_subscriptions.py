"""The subscription manager: proven before live, made before broken, and no gap is forgotten."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import pytest

from pokebridge.errors import TransportError
from pokebridge.gateway.meter import SAMPLE_EVERY
from pokebridge.gateway.subscriptions import SubscriptionManager, SubscriptionTiming
from pokebridge.model import Poke
from pokebridge.sharding import shard_of
from pokebridge.transport.base import Feed, Receiver, Selection, Signal, Subscription
from pokebridge.transport.memory import MemoryTransport
from pokebridge.wire import encode_pokes, encode_probe
from tests.support.waiting import wait_until

SHARDS = 8
BOB, ALICE = "urn:user:bob", "urn:user:alice"
BOBS, ALICES = shard_of(BOB, SHARDS), shard_of(ALICE, SHARDS)
assert BOBS != ALICES
EVERYTHING: frozenset[Selection] = frozenset({Feed.ALL})
FOR_BOB: frozenset[Selection] = frozenset({BOBS, Feed.UNTAGGED})
POKE_BOB = encode_pokes([Poke(BOB)])

# Probes are due only after a fault, and faults are found and retried at once.
CALM = SubscriptionTiming(silence_s=600, probe_timeout_s=0.02, retry_s=0.01, retire_delay_s=0)


class Bus(MemoryTransport):
    """An in-process transport that can be deaf to selections, fail, and explain itself."""

    def __init__(self) -> None:
        super().__init__()
        self.deaf: set[Selection] = set()
        self.subscribe_error: TransportError | None = None
        self.publish_error: TransportError | None = None
        self.explanation: str | None = None
        self.unreported: dict[Selection, str] = {}
        self.receivers: dict[Selection, Receiver] = {}
        self.opened: list[Selection] = []
        self.open: list[Selection] = []

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Deliver to the selections that are not deaf."""
        if self.publish_error is not None:
            raise self.publish_error
        await super().publish(signals)

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:  # type: ignore[override]
        """Subscribe, and note it."""
        if self.subscribe_error is not None:
            raise self.subscribe_error
        self.receivers[selection] = receiver
        self.opened.append(selection)
        self.open.append(selection)
        inner = await super().subscribe(selection, Ear(self, selection, receiver))
        return Explained(self, selection, inner)


@dataclass
class Ear:
    """Passes on what the bus delivers, unless its selection is deaf."""

    bus: Bus
    selection: Selection
    receiver: Receiver

    def on_signal(self, body: bytes, tag: str | None) -> None:
        """Pass the signal on."""
        if self.selection not in self.bus.deaf:
            self.receiver.on_signal(body, tag)

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Pass the gap on."""
        self.receiver.on_gap(selection, reason)


@dataclass
class Explained:
    """A subscription that says why it does not deliver."""

    bus: Bus
    selection: Selection
    inner: Subscription

    @property
    def trouble(self) -> str | None:
        """What the bus gives as the reason."""
        return self.bus.explanation

    async def close(self) -> None:
        """Close, and note it. Report a gap that was not reported yet."""
        self.bus.open.remove(self.selection)
        if gap := self.bus.unreported.pop(self.selection, None):
            self.bus.receivers[self.selection].on_gap(self.selection, gap)
        await self.inner.close()


class World:
    """A manager on a bus, and all that it has reported."""

    def __init__(self, timing: SubscriptionTiming = CALM) -> None:
        self.bus = Bus()
        self.signals: list[bytes] = []
        self.lives = 0
        self.missed: list[Callable[[str], bool]] = []
        self.then: Callable[[], None] = lambda: None
        self.manager = SubscriptionManager(
            self.bus,
            self.signals.append,
            instance="i-1",
            shard_count=SHARDS,
            timing=timing,
            on_live=self._on_live,
            on_missed=self.missed.append,
        )

    def _on_live(self) -> None:
        self.lives += 1
        self.then()

    def heard_pokes(self) -> int:
        """How many times the poke for Bob arrived."""
        return self.signals.count(POKE_BOB)

    async def failed_probes(self, count: int = 2) -> None:
        """Return once so many more probes were sent."""
        enough = self.manager.probes + count
        await wait_until(lambda: self.manager.probes >= enough, what="more probes")


@contextlib.asynccontextmanager
async def managing(
    *selections: Selection, timing: SubscriptionTiming = CALM, live: bool = True
) -> AsyncIterator[World]:
    """A manager that has started with ``selections``, once they are ``live``."""
    world = World(timing)
    if not live:
        world.bus.deaf.update(selections)
    await world.manager.start(selections)
    try:
        if live:
            await wait_until(lambda: world.manager.settled, what="live subscriptions")
        yield world
    finally:
        await world.manager.close()
        assert world.bus.open == []


async def test_a_shard_that_is_gained_is_no_trouble_until_its_proof_fails() -> None:
    """An instance stays ready through a rebalance, although it is not settled yet."""
    async with managing(Feed.UNTAGGED) as world:
        world.bus.deaf.add(BOBS)
        world.manager.want({Feed.UNTAGGED, BOBS})
        assert world.manager.trouble is None
        assert not world.manager.settled
        assert not world.manager.covers(BOB)
        await wait_until(lambda: world.manager.trouble is not None, what="the failed proof")
        world.bus.deaf.clear()
        await wait_until(lambda: world.manager.settled)
        assert world.manager.trouble is None


async def test_at_the_start_all_must_be_proven() -> None:
    """Until all subscriptions were live once, an unproven one is a trouble."""
    async with managing(Feed.ALL, live=False) as world:
        assert world.manager.trouble == "the subscription is not proven live yet"
        world.bus.deaf.clear()
        await wait_until(lambda: world.manager.settled)


async def test_a_subscription_is_live_only_once_its_probe_came_back() -> None:
    """Coverage begins with the first probe that arrives."""
    async with managing(Feed.ALL, live=False) as world:
        await world.failed_probes()
        assert not world.manager.covers(BOB)
        assert not world.manager.settled
        assert world.manager.trouble == "the subscription did not deliver a probe in time"
        assert world.manager.is_in_doubt
        world.bus.deaf.clear()
        await wait_until(lambda: world.manager.covers(BOB))
        assert world.manager.settled
        assert world.lives == 1
        # It was never live before, so no session relied on it.
        assert not world.missed
        assert not world.manager.is_in_doubt


async def test_a_shard_is_covered_together_with_the_untagged_signals() -> None:
    """A poke without a tag may be for Bob, so his shard's subscription alone is not enough."""
    async with managing(BOBS, Feed.UNTAGGED, live=False) as world:
        world.bus.deaf.discard(BOBS)
        await wait_until(lambda: world.lives == 1)
        assert not world.manager.covers(BOB)
        world.bus.deaf.clear()
        await wait_until(lambda: world.manager.covers(BOB))
        assert not world.manager.covers(ALICE)


async def test_the_old_subscription_stays_until_the_new_ones_are_live() -> None:
    """Bob is covered, and hears his pokes, at every moment of a change of subscriptions."""
    async with managing(Feed.ALL) as world:
        world.bus.deaf.add(BOBS)
        world.manager.want(FOR_BOB)
        await world.failed_probes()
        assert world.manager.selections == EVERYTHING | FOR_BOB
        assert world.manager.covers(BOB)
        await world.bus.publish([Signal(POKE_BOB, BOBS)])
        assert world.heard_pokes() == 1
        world.bus.deaf.clear()
        uncovered = []
        world.then = lambda: uncovered.append(not world.manager.covers(BOB))
        await wait_until(lambda: world.manager.settled)
        assert world.manager.selections == FOR_BOB
        assert world.manager.covers(BOB)
        assert not any(uncovered)
        await wait_until(lambda: set(world.bus.open) == FOR_BOB, what="the old one closed")
        await world.bus.publish([Signal(POKE_BOB, BOBS)])
        assert world.heard_pokes() == 2
        assert not world.missed


async def test_a_subscription_that_is_needed_again_is_kept() -> None:
    """A retiring subscription that is needed again is neither closed nor opened again."""
    async with managing(Feed.ALL) as world:

        def change_back() -> None:
            if world.manager.trouble is None:  # the new ones are live: now the old one retires
                world.then = lambda: None
                world.manager.want(EVERYTHING)

        world.then = change_back
        world.manager.want(FOR_BOB)
        await wait_until(lambda: len(world.bus.opened) == 3, what="the new ones opened")
        await wait_until(lambda: world.manager.settled)
        assert world.manager.selections == EVERYTHING
        assert world.bus.opened.count(Feed.ALL) == 1
        assert world.manager.covers(BOB)


async def test_a_gap_is_not_forgotten_when_its_subscription_retires() -> None:
    """A last probe is asked for; when it fails, all that the subscription covered are woken."""
    async with managing(Feed.ALL) as world:
        world.bus.deaf.add(Feed.ALL)  # and the transport has not reported it yet
        world.manager.want(FOR_BOB)
        await wait_until(lambda: world.missed)
        assert world.manager.settled
        (affected,) = world.missed
        assert affected(BOB)
        assert affected(ALICE)


async def test_a_gap_that_is_known_at_closing_is_not_forgotten() -> None:
    """The last probe came back, but the transport knows of a gap that has not ended yet."""
    async with managing(Feed.ALL) as world:
        world.bus.unreported[Feed.ALL] = "restored, but not heard of everywhere"
        world.manager.want(FOR_BOB)
        await wait_until(lambda: world.missed)
        (affected,) = world.missed
        assert affected(BOB)
        assert affected(ALICE)


async def test_a_new_subscription_that_fails_raises_doubt() -> None:
    """Pokes for its shard are lost, although the others deliver."""
    async with managing(ALICES, Feed.UNTAGGED) as world:
        world.bus.deaf.add(BOBS)
        world.manager.want(FOR_BOB | {ALICES})
        await wait_until(lambda: world.manager.is_in_doubt)
        assert world.manager.covers(ALICE)
        world.bus.deaf.clear()
        await wait_until(lambda: world.manager.covers(BOB))
        assert not world.manager.is_in_doubt
        assert not world.missed


async def test_what_cannot_be_heard_is_remembered() -> None:
    """Such a shard goes to another instance; this one stays in doubt until it could hear it."""
    async with managing(ALICES, Feed.UNTAGGED) as world:
        world.bus.deaf.add(BOBS)
        world.manager.want(FOR_BOB | {ALICES})
        await wait_until(lambda: world.manager.is_in_doubt)
        world.manager.want({ALICES, Feed.UNTAGGED})
        await world.failed_probes()
        assert world.manager.is_in_doubt
        assert world.manager.trouble is not None
        assert world.manager.covers(ALICE)
        world.bus.deaf.clear()
        await wait_until(lambda: world.manager.settled)
        assert not world.manager.is_in_doubt
        assert BOBS not in world.manager.selections


async def test_what_everything_covers_is_not_remembered() -> None:
    """Back in fan-out, no shard that was refused is missed."""
    async with managing(ALICES, Feed.UNTAGGED) as world:
        world.bus.deaf.add(BOBS)
        world.manager.want(FOR_BOB | {ALICES})
        await wait_until(lambda: world.manager.is_in_doubt)
        world.manager.want(EVERYTHING)
        await wait_until(lambda: world.manager.settled)
        assert world.manager.selections == EVERYTHING
        assert not world.manager.is_in_doubt


async def test_what_is_covered_still_is_not_in_doubt() -> None:
    """While the change to single shards can't be finished, the one for everything delivers."""
    async with managing(Feed.ALL) as world:
        world.bus.deaf.add(BOBS)
        world.manager.want(FOR_BOB)
        await world.failed_probes(4)
        assert world.manager.trouble is not None
        assert not world.manager.is_in_doubt
        assert world.manager.covers(BOB)
        world.manager.want(EVERYTHING)


async def test_silence_raises_doubt() -> None:
    """A subscription that delivers nothing for a while is probed; deafness is found, and healed."""
    quick = SubscriptionTiming(silence_s=0.02, probe_timeout_s=0.02, retry_s=0.01)
    async with managing(Feed.ALL, timing=quick) as world:
        world.bus.deaf.add(Feed.ALL)
        await wait_until(lambda: world.manager.is_in_doubt)
        assert not world.manager.covers(BOB)
        assert not world.missed  # they are woken when they can be reached again
        world.bus.deaf.clear()
        await wait_until(lambda: world.missed)
        assert not world.manager.is_in_doubt
        assert world.manager.covers(BOB)
        assert world.missed[0](BOB)


async def test_a_gap_is_answered_by_a_probe_and_a_wake_up() -> None:
    """Coverage ends with the gap's report; once proven again, that shard's sessions are woken."""
    async with managing(BOBS, ALICES, Feed.UNTAGGED) as world:
        probes = world.manager.probes
        world.bus.receivers[BOBS].on_gap(BOBS, "slow consumer")
        assert not world.manager.covers(BOB)
        assert world.manager.covers(ALICE)
        assert world.manager.is_in_doubt
        assert "slow consumer" in (world.manager.trouble or "")
        await wait_until(lambda: world.missed)
        (affected,) = world.missed
        assert affected(BOB)
        assert not affected(ALICE)
        assert world.manager.covers(BOB)
        assert not world.manager.is_in_doubt
        assert world.manager.gaps == 1
        assert world.manager.probes == probes + 1


async def test_a_gap_of_untagged_signals_affects_everyone() -> None:
    """A lost signal without a tag may have been for anyone."""
    async with managing(BOBS, Feed.UNTAGGED) as world:
        world.bus.receivers[Feed.UNTAGGED].on_gap(Feed.UNTAGGED, "cut")
        await wait_until(lambda: world.missed)
        assert world.missed[0](BOB)
        assert world.missed[0](ALICE)


async def test_a_gap_of_everything_wakes_everyone_at_one_pace() -> None:
    """Each subscription is proven anew, and all sessions are woken together: once, not by shards.

    To wake each shard's sessions by themselves would let all of them pull in the time of a few.
    """
    async with managing(BOBS, ALICES, Feed.UNTAGGED) as world:
        probes = world.manager.probes
        world.manager.report_gap("beacons of other instances did not arrive")
        assert not world.manager.covers(BOB)
        assert not world.manager.covers(ALICE)
        await wait_until(lambda: world.missed)
        (affected,) = world.missed
        assert affected(BOB)
        assert affected(ALICE)
        assert world.manager.settled
        assert (world.manager.gaps, world.manager.probes) == (1, probes + 3)


async def test_a_failed_subscribe_is_tried_again() -> None:
    """After the start, an engine that refuses is a trouble that is named, and retried."""
    async with managing(Feed.ALL) as world:
        world.bus.subscribe_error = TransportError("the engine is full")
        world.manager.want(FOR_BOB)
        await wait_until(lambda: world.manager.trouble == "the engine is full")
        assert world.manager.covers(BOB)  # by the old one
        world.bus.subscribe_error = None
        await wait_until(lambda: world.manager.settled)
        assert world.manager.selections == FOR_BOB


async def test_a_failed_publish_is_tried_again() -> None:
    """A probe that the transport does not take proves nothing, and is sent again."""
    async with managing(Feed.ALL) as world:
        world.bus.publish_error = TransportError("the engine is away")
        world.bus.receivers[Feed.ALL].on_gap(Feed.ALL, "cut")
        await wait_until(lambda: world.manager.trouble == "the engine is away")
        assert not world.missed
        world.bus.publish_error = None
        await wait_until(lambda: world.missed)
        assert world.manager.settled


async def test_a_start_without_a_transport_fails() -> None:
    """A first subscription that is refused is the start's error, which names it."""
    world = World()
    assert world.manager.trouble == "nothing is subscribed"
    world.bus.subscribe_error = TransportError("the engine is away")
    with pytest.raises(TransportError, match="the engine is away"):
        await world.manager.start([Feed.ALL])
    await world.manager.close()


async def test_a_subscription_explains_itself() -> None:
    """The trouble has the adapter's reason instead of a mere time-out."""
    async with managing(Feed.ALL, live=False) as world:
        world.bus.explanation = "permission denied"
        await wait_until(lambda: world.manager.trouble == "permission denied")


async def test_signals_are_counted_by_their_tag() -> None:
    """Own, foreign and untagged signals are each counted once. Probes are not counted."""
    async with managing(Feed.ALL) as world:
        manager, hear = world.manager, world.bus.receivers[Feed.ALL].on_signal
        manager.own({BOBS})
        for tag in (str(BOBS), str(BOBS), str(ALICES), None, str(SHARDS), "eight"):
            hear(POKE_BOB, tag)
        hear(encode_probe("another:1"), None)
        assert manager.owned == 2
        assert manager.untagged == 3
        assert world.heard_pokes() == 6
        manager.own({ALICES})
        hear(POKE_BOB, str(ALICES))
        assert manager.owned == 3


@pytest.mark.parametrize(
    ("body", "tag", "counted"),
    [
        (POKE_BOB, str(ALICES), SAMPLE_EVERY),
        (POKE_BOB, str(BOBS), 0),
        (b"no signal", str(ALICES), 0),
        (encode_probe("another:1"), str(ALICES), 0),
    ],
    ids=["wrong", "right", "malformed", "probe"],
)
async def test_wrong_tags_are_sampled(body: bytes, tag: str, counted: int) -> None:
    """One signal in ``SAMPLE_EVERY`` is compared with its tag, and stands for all of them."""
    async with managing(Feed.ALL) as world:
        for _ in range(SAMPLE_EVERY):
            world.bus.receivers[Feed.ALL].on_signal(body, tag)
        assert world.manager.untagged == counted


async def test_many_subscriptions_share_the_probes() -> None:
    """The interval grows with their number, so that the rate of probes has a limit."""
    timing = SubscriptionTiming(silence_s=1, probes_per_s=2)
    async with managing(Feed.UNTAGGED, timing=timing) as world:
        assert world.manager.probe_interval_s == 1
        world.manager.want({Feed.UNTAGGED, *range(SHARDS)})
        assert world.manager.probe_interval_s == (SHARDS + 1) / 2

"""The processor: every commit is followed by a poke, whatever fails in between."""

import asyncio
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from pokebridge import processor, supervisor
from pokebridge.errors import (
    InputError,
    MailboxError,
    MailboxFullError,
    NotPublishedError,
    TransportError,
)
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import NewMessage, Poke, Receipt
from pokebridge.processor import PokePublisher, Processor
from pokebridge.publisher import Publisher
from pokebridge.server.adapters import open_mailbox
from pokebridge.testing.mailbox_kit import BOB, EVE, ManualClock, fill, message, unpoked, versions
from pokebridge.transport.base import Feed, Selection, Signal
from pokebridge.transport.memory import MemoryTransport
from pokebridge.wire import decode_signal
from tests.support.waiting import wait_until

FOREVER_S = 3600.0
DYING = Path(__file__).parent / "mailbox" / "dying_processor.py"


class Recorder:
    """A publisher that keeps what it is given, and can be held up or made to fail."""

    def __init__(self) -> None:
        self.batches: list[list[Poke]] = []
        self.error: Exception | None = None
        self.attempts = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.published = asyncio.Event()

    async def publish_now(self, pokes: Sequence[Poke]) -> None:
        """Keep ``pokes``, when the gate is open and no error is set."""
        self.attempts += 1
        await self.gate.wait()
        if self.error:
            raise self.error
        self.batches.append(list(pokes))
        self.published.set()

    @property
    def pokes(self) -> list[Poke]:
        """All pokes so far."""
        return [poke for batch in self.batches for poke in batch]


class Subscriber:
    """Keeps the pokes that a subscription brings."""

    def __init__(self) -> None:
        self.pokes: list[Poke] = []

    def on_signal(self, body: bytes, tag: str | None) -> None:
        """Decode and keep them."""
        decoded = decode_signal(body)
        assert isinstance(decoded, list)
        self.pokes += decoded

    def on_gap(self, selection: Selection, reason: str) -> None:
        """The in-process transport has none."""
        raise AssertionError((selection, reason))


class SlowAtFirst(MemoryTransport):
    """The in-process transport, whose first publish waits for a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.gate = asyncio.Event()

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Count, and wait if it is the first."""
        self.calls += 1
        if self.calls == 1:
            await self.gate.wait()
        await super().publish(signals)


class WatchedMailbox(MemoryMailbox):
    """A mailbox that counts its calls and can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.error: Exception | None = None

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.error:
            raise self.error

    async def append(self, message: NewMessage) -> Receipt:
        """Count, then do or fail."""
        self._called("append")
        return await super().append(message)

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """Count, then do or fail."""
        self._called("claim_outbox")
        return await super().claim_outbox(older_than_s=older_than_s, limit=limit)

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:
        """Count, then do or fail; suspend first, as a real store does."""
        self._called("confirm_outbox")
        for _ in range(5):
            await asyncio.sleep(0)
        await super().confirm_outbox(pokes)


@pytest.fixture(autouse=True)
def quick_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits long for a second try."""
    monkeypatch.setattr(supervisor, "BACKOFF_CAP_S", 0.02)


@pytest.fixture
def mailbox() -> WatchedMailbox:
    """An empty mailbox."""
    return WatchedMailbox()


@pytest.fixture
async def publisher() -> Recorder:
    """A publisher that works."""
    return Recorder()


def without_sweep(mailbox: Mailbox, publisher: Recorder) -> Processor:
    """A processor that sweeps nothing within a test's life."""
    return Processor(mailbox, publisher, sweep_after_s=FOREVER_S)


def sweeping(mailbox: Mailbox, publisher: PokePublisher) -> Processor:
    """A processor that takes anything for forgotten, soon."""
    return Processor(mailbox, publisher, sweep_every_s=0.01, sweep_after_s=0.02)


async def confirmed(mailbox: Mailbox) -> None:
    """Wait until every commit's poke is confirmed."""

    async def nothing_owed() -> bool:
        return (await mailbox.stats()).outbox == 0

    await wait_until(nothing_owed, what="the outbox is empty")


class TestSending:
    """The way of a message when all is well."""

    async def test_a_send_is_committed_and_poked(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """The receipt is the mailbox's; the poke with its version follows and is confirmed."""
        async with without_sweep(mailbox, publisher) as sender:
            assert await sender.send(message(id="a")) == ("a", 1, False)
            await confirmed(mailbox)
        assert publisher.pokes == [Poke(BOB, 1)]
        assert await versions(mailbox) == [1]
        assert sender.stats.messages_committed == sender.stats.pokes_published == 1
        assert sender.stats.duplicates == sender.stats.poke_failures == sender.stats.swept == 0

    async def test_nobody_waits_for_the_transport(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A send returns while the transport still hangs."""
        publisher.gate.clear()
        async with without_sweep(mailbox, publisher) as sender:
            for version in (1, 2, 3):
                assert (await sender.send(message())).version == version
            assert publisher.batches == []
            publisher.gate.set()

    async def test_pokes_are_merged_and_batched(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """Three hundred sends at once: few publishes, one poke a recipient in each, the newest."""
        async with without_sweep(mailbox, publisher) as sender:
            await asyncio.gather(*(sender.send(message(f"r{n % 3}")) for n in range(300)))
            await confirmed(mailbox)
        assert len(publisher.batches) <= 3
        for batch in publisher.batches:
            assert len({poke.recipient for poke in batch}) == len(batch)
        assert set(publisher.batches[-1]) == {Poke(f"r{n}", 100) for n in range(3)}

    async def test_pokes_are_merged_once(self, mailbox: WatchedMailbox) -> None:
        """The publisher's own merging, here for an hour, does not delay the processor's pokes."""
        transport, heard = SlowAtFirst(), Subscriber()
        await transport.subscribe(Feed.ALL, heard)
        publisher = Publisher(transport, linger_s=FOREVER_S)
        first = asyncio.create_task(publisher.poke(EVE))  # others would wait for its end
        await wait_until(lambda: transport.calls)
        async with Processor(mailbox, publisher, sweep_after_s=FOREVER_S) as sender:
            await sender.send(message())
            await confirmed(mailbox)
        assert heard.pokes == [Poke(BOB, 1)]
        assert publisher.published == 1
        transport.gate.set()
        await first

    async def test_an_entry_stays_until_its_poke_is_published(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """Pokes sent during a publish share the next one, in order, and stay in the outbox."""
        publisher.gate.clear()
        async with without_sweep(mailbox, publisher) as sender:
            await sender.send(message())
            await wait_until(lambda: publisher.attempts)
            for recipient in (EVE, BOB, EVE):
                await sender.send(message(recipient))
            assert await unpoked(mailbox) == {BOB: 2, EVE: 2}
            publisher.gate.set()
            await confirmed(mailbox)
        assert publisher.batches == [[Poke(BOB, 1)], [Poke(EVE, 2), Poke(BOB, 2)]]

    async def test_a_batch_is_bounded(
        self, mailbox: WatchedMailbox, publisher: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """More recipients than a batch holds take several publishes, each within the bound."""
        monkeypatch.setattr(processor, "BATCH", 10)
        async with without_sweep(mailbox, publisher) as sender:
            await asyncio.gather(*(sender.send(message(f"r{n}")) for n in range(35)))
            await confirmed(mailbox)
        assert [len(batch) for batch in publisher.batches] == [10, 10, 10, 5]

    async def test_a_busy_recipient_costs_few_confirmations(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A hundred messages one after the other: the outbox is written a few times."""
        async with without_sweep(mailbox, publisher) as sender:
            for _ in range(100):
                publisher.published.clear()
                await sender.send(message())
                async with asyncio.timeout(10):
                    await publisher.published.wait()
            await confirmed(mailbox)
        assert len(publisher.batches) == 100
        assert mailbox.calls["confirm_outbox"] <= 20

    async def test_a_duplicate_is_not_poked_again(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A retry gets the first answer and costs the recipient nothing."""
        retry = message(id="a", has_idempotency_key=True)
        async with without_sweep(mailbox, publisher) as sender:
            await sender.send(retry)
            await confirmed(mailbox)
            assert await sender.send(retry) == ("a", 1, True)
        assert publisher.pokes == [Poke(BOB, 1)]
        assert (sender.stats.messages_committed, sender.stats.duplicates) == (1, 1)

    async def test_what_is_no_recipient_is_refused(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A name that no transport could carry is refused before it is committed."""
        async with without_sweep(mailbox, publisher) as sender:
            with pytest.raises(InputError):
                await sender.send(message("Jürgen Müller"))
        assert mailbox.calls["append"] == 0

    async def test_a_mailbox_that_fails_is_the_callers_to_know(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A message that is not committed raises MailboxError, and causes no poke."""
        async with without_sweep(mailbox, publisher) as sender:
            mailbox.error = MailboxError("gone")
            with pytest.raises(MailboxError):
                await sender.send(message())
            mailbox.error = None
        assert publisher.pokes == []
        assert sender.stats.messages_committed == 0

    async def test_a_full_mailbox_is_the_senders_to_know(self, publisher: Recorder) -> None:
        """A refused message raises MailboxFullError, is counted, and causes no poke."""
        mailbox = MemoryMailbox(limits=Limits(max_messages=1))
        async with without_sweep(mailbox, publisher) as sender:
            await sender.send(message())
            with pytest.raises(MailboxFullError):
                await sender.send(message())
            await confirmed(mailbox)
        assert publisher.pokes == [Poke(BOB, 1)]
        assert (sender.stats.messages_committed, sender.stats.messages_refused) == (1, 1)


class TestSweeping:
    """No commit stays without a poke."""

    async def test_what_a_dead_process_left_is_poked(
        self, tmp_path: Path, publisher: Recorder
    ) -> None:
        """A message that another process committed and never poked is poked by this one."""
        dead = await SqliteMailbox.open(tmp_path / "mailbox.db")
        await fill(dead, 2)
        await dead.close()
        mailbox = await SqliteMailbox.open(tmp_path / "mailbox.db")
        async with sweeping(mailbox, publisher) as sweeper:
            await confirmed(mailbox)
        await mailbox.close()
        assert publisher.pokes == [Poke(BOB, 2)]
        assert sweeper.stats.swept == sweeper.stats.pokes_published == 1

    @pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
    async def test_the_poke_of_a_killed_process_comes_from_another(
        self, kind: str, tmp_path: Path, publisher: Recorder, request: pytest.FixtureRequest
    ) -> None:
        """A process is killed for certain after its commit and before its poke; another pokes."""
        url = f"sqlite:///{tmp_path}/mailbox.db"
        if kind == "postgresql":
            url = request.getfixturevalue("postgres_database")
        mailbox = await open_mailbox(url)
        async with Processor(mailbox, publisher) as survivor:
            killed = await asyncio.create_subprocess_exec(sys.executable, DYING, url)
            assert await killed.wait() == -signal.SIGKILL
            await publisher.published.wait()
            await confirmed(mailbox)
        await mailbox.close()
        assert publisher.pokes == [Poke(BOB, 1)]
        assert survivor.stats.swept == 1

    async def test_a_sweep_comes_at_once_on_start(self, publisher: Recorder) -> None:
        """Entries that are old enough at the start do not wait for the sweep's interval."""
        clock = ManualClock()
        mailbox = MemoryMailbox(clock)
        await fill(mailbox, 1)
        clock.now_s += 10
        async with Processor(mailbox, publisher, sweep_every_s=FOREVER_S):
            await confirmed(mailbox)

    async def test_a_backlog_is_swept_in_bounded_steps(
        self, mailbox: WatchedMailbox, publisher: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Many entries are swept within one sweep, batch by batch."""
        monkeypatch.setattr(processor, "BATCH", 10)
        for n in range(35):
            await fill(mailbox, 1, f"r{n}")
        async with Processor(mailbox, publisher, sweep_every_s=FOREVER_S, sweep_after_s=0):
            await confirmed(mailbox)
        assert [len(batch) for batch in publisher.batches] == [10, 10, 10, 5]

    async def test_young_entries_are_left_to_their_sender(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """An entry that its own process is just publishing is not doubled."""
        await fill(mailbox, 1)
        async with Processor(mailbox, publisher, sweep_every_s=0.01, sweep_after_s=FOREVER_S):
            await wait_until(lambda: mailbox.calls["claim_outbox"] >= 3)
        assert publisher.pokes == []

    async def test_what_did_not_fit_is_swept(
        self, mailbox: WatchedMailbox, publisher: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While the transport hangs, waiting pokes are bounded; the rest is in the outbox."""
        monkeypatch.setattr(processor, "MAX_PENDING", 5)
        publisher.gate.clear()
        async with sweeping(mailbox, publisher) as sender:
            await sender.send(message())
            await wait_until(lambda: publisher.attempts)
            for n in range(20):
                await sender.send(message(f"r{n}"))
            assert len(sender._unpublished._versions) == 5
            publisher.gate.set()
            await confirmed(mailbox)
        assert {poke.recipient for poke in publisher.pokes} == {BOB, *(f"r{n}" for n in range(20))}

    async def test_expired_messages_are_purged(
        self, publisher: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The purge takes all that has expired, in bounded steps, without being asked."""
        monkeypatch.setattr(processor, "PURGE_BATCH", 10)
        clock = ManualClock()
        mailbox = MemoryMailbox(clock)
        for _ in range(35):
            await mailbox.append(message(ttl_s=1))
        clock.now_s += 2
        async with Processor(mailbox, publisher, purge_every_s=FOREVER_S):
            await wait_until(lambda: not mailbox._logs[BOB].kept)


class TestOutages:
    """What fails comes back by itself."""

    async def test_a_transport_outage_delays_and_loses_nothing(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """Sends go on while the transport is down; when it is back, each recipient is poked."""
        publisher.error = TransportError("no route")
        with capture_logs() as logs:
            async with sweeping(mailbox, publisher) as sender:
                for n in range(10):
                    await sender.send(message(f"r{n}"))
                await wait_until(lambda: publisher.attempts >= 5)
                assert sender.stats.poke_failures >= 10
                publisher.error = None
                await confirmed(mailbox)
        assert {poke.recipient for poke in publisher.pokes} == {f"r{n}" for n in range(10)}
        assert sender.stats.swept >= 10
        assert [(line["event"], line["part"]) for line in logs] == [
            ("part_unavailable", "transport"),
            ("part_is_back", "transport"),
        ]
        assert logs[0]["error"] == "no route"

    async def test_a_mailbox_outage_delays_and_loses_nothing(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A sweep survives a mailbox that does not answer, and says so once."""
        await fill(mailbox, 1)
        mailbox.error = MailboxError("disk full")
        with capture_logs() as logs:
            async with sweeping(mailbox, publisher):
                await wait_until(lambda: mailbox.calls["claim_outbox"] >= 5)
                mailbox.error = None
                await confirmed(mailbox)
        assert publisher.pokes == [Poke(BOB, 1)]
        assert ("part_unavailable", "mailbox") in {(line["event"], line["part"]) for line in logs}
        assert logs[-1]["event"] == "part_is_back"

    async def test_a_confirmation_that_fails_doubles_a_poke_at_most(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A poke that could not be confirmed is swept: doubled, never forgotten."""
        publisher.gate.clear()
        async with sweeping(mailbox, publisher) as sender:
            await sender.send(message())
            await wait_until(lambda: publisher.attempts)
            mailbox.error = MailboxError("disk full")
            publisher.gate.set()
            await wait_until(lambda: mailbox.calls["confirm_outbox"])
            mailbox.error = None
            await confirmed(mailbox)
        assert set(publisher.pokes) == {Poke(BOB, 1)}
        assert sender.stats.swept >= 1

    async def test_a_refused_poke_is_tried_ever_more_slowly_and_set_aside(
        self, mailbox: WatchedMailbox, publisher: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is tried a limited number of times, holds up no other, and is named in one line."""
        monkeypatch.setattr(processor, "REFUSED_FIRST_S", 0.001)
        monkeypatch.setattr(processor, "MAX_REFUSALS", 4)
        publisher.error = NotPublishedError("not permitted", frozenset({BOB}))
        with capture_logs() as logs:
            async with sweeping(mailbox, publisher) as sender:
                await sender.send(message())
                await sender.send(message(EVE))
                await wait_until(lambda: sender.stats.pokes_unpublishable)
                await confirmed(mailbox)
        (line,) = logs
        assert (line["event"], line["recipients"]) == ("pokes_unpublishable", [BOB])
        assert sender.stats.poke_failures == 4
        assert sender.stats.pokes_published >= 1

    async def test_an_entry_that_nobody_can_publish_holds_up_no_other(
        self, mailbox: WatchedMailbox
    ) -> None:
        """Another program has written it: it is named and set aside, and the others go out."""
        transport, heard = MemoryTransport(), Subscriber()
        await transport.subscribe(Feed.ALL, heard)
        for recipient in ("urn:user:josé", EVE):
            await mailbox.append(message(recipient))
        with capture_logs() as logs:
            async with Publisher(transport) as publisher, sweeping(mailbox, publisher) as sender:
                await confirmed(mailbox)
        assert heard.pokes == [Poke(EVE, 1)]
        assert [line["recipients"] for line in logs] == [["urn:user:josé"]]
        assert sender.stats.pokes_unpublishable == 1

    async def test_a_transport_that_refuses_all_is_told_once(
        self, mailbox: WatchedMailbox, publisher: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As for lack of a permission: one line, and readiness, until a poke is accepted."""
        monkeypatch.setattr(processor, "REFUSED_FIRST_S", 0.001)
        publisher.error = NotPublishedError("not permitted", frozenset({BOB, EVE}))
        with capture_logs() as logs:
            async with sweeping(mailbox, publisher) as sender:
                await sender.send(message())
                await sender.send(message(EVE))
                await wait_until(lambda: sender.stats.poke_failures >= 5)
                assert sender.is_cut_off
                publisher.error = None
                await confirmed(mailbox)
                assert not sender.is_cut_off
        assert [line["event"] for line in logs] == ["pokes_refused"]

    async def test_a_defect_ends_no_loop(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """An unforeseen error is logged with its traceback, and the loop continues."""
        publisher.error = RuntimeError("bug")
        with capture_logs() as logs:
            async with sweeping(mailbox, publisher) as sender:
                await sender.send(message())
                await wait_until(lambda: publisher.attempts >= 3)
                publisher.error = None
                await sender.send(message(EVE))
                await confirmed(mailbox)
        assert set(publisher.pokes) == {Poke(BOB, 1), Poke(EVE, 1)}
        assert {(line["event"], line["log_level"]) for line in logs} == {("task_failed", "error")}
        assert all(line["exc_info"] for line in logs)

    async def test_pauses_grow_with_full_jitter_to_a_cap(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each pause is random between zero and twice the last bound. A success resets it."""
        bounds: list[float] = []

        def uniform(low: float, high: float) -> float:
            assert low == 0
            bounds.append(high)
            return 0.0

        async def fail() -> None:
            raise TransportError("down")

        async def succeed() -> None:
            pass

        monkeypatch.setattr(random, "uniform", uniform)
        monkeypatch.setattr(supervisor, "BACKOFF_CAP_S", 2.0)
        attempt = supervisor.Attempts("test")
        for _ in range(100):
            assert not await attempt(fail())
        assert await attempt(succeed())
        assert not await attempt(fail())
        assert bounds == [0.1, 0.2, 0.4, 0.8, 1.6] + [2.0] * 95 + [0.1]


class TestClosing:
    """An orderly end."""

    async def test_closing_publishes_and_confirms_what_is_pending(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """Pokes in flight and behind it go out before close returns; no task is left."""
        publisher.gate.clear()
        sender = without_sweep(mailbox, publisher)
        await sender.start()
        await sender.send(message(BOB))
        await wait_until(lambda: publisher.attempts)
        await sender.send(message(EVE))
        closing = asyncio.create_task(sender.close())
        await asyncio.sleep(0)
        publisher.gate.set()
        await closing
        assert publisher.pokes == [Poke(BOB, 1), Poke(EVE, 1)]
        assert await unpoked(mailbox) == {}
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await sender.close()

    async def test_closing_does_not_wait_longer_than_told(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A transport that hangs holds up no shutdown; the poke stays in the outbox."""
        publisher.gate.clear()
        sender = without_sweep(mailbox, publisher)
        await sender.start()
        await sender.send(message())
        with capture_logs() as logs:
            async with asyncio.timeout(5):
                await sender.close(deadline_s=0.05)
        assert await unpoked(mailbox) == {BOB: 1}
        assert [line["event"] for line in logs] == ["pokes_left_in_the_outbox"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_the_outbox_keeps_what_is_sent_outside_its_life(
        self, mailbox: WatchedMailbox, publisher: Recorder
    ) -> None:
        """A message sent before the start is poked after it; one after the end stays owed."""
        sender = without_sweep(mailbox, publisher)
        await sender.send(message(BOB))
        async with sender:
            await confirmed(mailbox)
        await sender.send(message(EVE))
        assert publisher.pokes == [Poke(BOB, 1)]
        assert await unpoked(mailbox) == {EVE: 1}


async def test_who_cannot_publish_leaves_the_outbox_to_others(
    mailbox: WatchedMailbox, publisher: Recorder
) -> None:
    """Cut off from the transport alone, a process does not keep entries from those who can publish.

    Each of its claims would make an entry young again.
    """
    clock = mailbox._clock = ManualClock()
    publisher.error = TransportError("down")
    async with Processor(mailbox, publisher, sweep_after_s=10, sweep_every_s=0.01) as cut_off:
        await cut_off.send(message())
        await wait_until(lambda: publisher.attempts == 1)
        clock.now_s += 10.01
        sweeps = mailbox.calls["claim_outbox"]
        await wait_until(lambda: mailbox.calls["claim_outbox"] > sweeps + 2)
        assert publisher.attempts == 1
        clock.now_s += 0.02
        await wait_until(lambda: publisher.attempts == 2)

"""The contract of every mailbox that can owe pushes, as a pytest suite to subclass.

class TestMyPushes(PushContract):
    @pytest.fixture
    async def mailbox(self, clock, my_server):
        ...  # yield a mailbox that is opened with ``TIMING`` and takes its time from ``clock``
"""

import asyncio
from typing import Protocol

import pytest

from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.pushes import DEAD_KEPT_MS, OwedPush, PushQueue, PushTiming
from pokebridge.testing.mailbox_kit import BOB, EVE, ManualClock, fill, message

__all__ = ["PushContract"]

TIMING = PushTiming(grace_s=10, quiet_s=300)
LEASE_S = 20.0


class PushingMailbox(Mailbox, Protocol):
    """A mailbox that owes pushes."""

    pushes: PushQueue


async def due(mailbox: PushingMailbox, limit: int = 100) -> list[OwedPush]:
    """Claim the pushes that are due now."""
    return list(await mailbox.pushes.claim(limit=limit, lease_s=LEASE_S))


async def owed(mailbox: PushingMailbox) -> tuple[int, int]:
    """How many pushes are owed, and how many are dead."""
    stats = await mailbox.stats()
    return stats.pushes, stats.dead_pushes


@pytest.mark.asyncio
class PushContract:
    """What a mailbox promises about its pushes (``pokebridge.mailbox.pushes``)."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        """The mailbox's time."""
        return ManualClock()

    async def test_a_push_is_due_after_the_grace(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """Several messages owe one push, due a grace after the first, with the newest version."""
        since_ms = int(clock.now_s * 1000)
        await fill(mailbox, 2)
        clock.now_s += 9
        await fill(mailbox, 1)
        assert await due(mailbox) == []
        clock.now_s += 1
        assert await due(mailbox) == [OwedPush(BOB, 1, 3, since_ms, 1)]

    async def test_batches_owe_one_push_a_recipient(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """Appends that are committed together owe the same pushes as single ones."""
        await asyncio.gather(*(mailbox.append(message(f"r{n % 7}", id=f"{n}")) for n in range(35)))
        clock.now_s += 10
        claimed = await due(mailbox)
        assert sorted(push.recipient for push in claimed) == [f"r{n}" for n in range(7)]
        assert {(push.first, push.version) for push in claimed} == {(1, 5)}

    @pytest.mark.parametrize(
        "passing",
        [message(is_ephemeral=True, ttl_s=30), message(ttl_s=10)],
        ids=["ephemeral", "short-lived"],
    )
    async def test_what_passes_owes_no_push(
        self, mailbox: PushingMailbox, clock: ManualClock, passing: object
    ) -> None:
        """Ephemeral messages, and those that expire before the push is due, owe no push."""
        await mailbox.append(passing)  # type: ignore[arg-type] # pytest's parameters are objects
        clock.now_s += 60
        assert await due(mailbox) == []
        await mailbox.append(message(ttl_s=11))
        clock.now_s += 10
        assert [push.version for push in await due(mailbox)] == [2]

    async def test_a_duplicate_owes_no_push(self, mailbox: PushingMailbox) -> None:
        """A duplicate owes no push."""
        await mailbox.append(message(id="a", has_idempotency_key=True))
        await mailbox.pushes.pulled({BOB: 1})
        await mailbox.append(message(id="a", has_idempotency_key=True))
        assert await owed(mailbox) == (0, 0)

    async def test_a_pull_cancels(self, mailbox: PushingMailbox, clock: ManualClock) -> None:
        """A pull up to the newest version or beyond cancels the push."""
        await fill(mailbox, 3, BOB)
        await fill(mailbox, 1, EVE)
        await mailbox.pushes.pulled({BOB: 3, EVE: 99, "urn:user:nobody": 7})
        clock.now_s += 60
        assert await due(mailbox) == []
        assert await owed(mailbox) == (0, 0)
        await mailbox.pushes.pulled({})

    async def test_an_old_cursor_cancels_nothing(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """A pull of older messages does not delay the push."""
        await fill(mailbox, 2)
        await mailbox.pushes.pulled({BOB: 2})
        await fill(mailbox, 1)
        clock.now_s += 9
        await mailbox.pushes.pulled({BOB: 2})
        clock.now_s += 1
        assert [(push.first, push.version) for push in await due(mailbox)] == [(3, 3)]

    async def test_a_pull_leaves_the_newer_message(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """Messages committed after the pull owe a push, with a new grace period."""
        await fill(mailbox, 3)
        clock.now_s += 9
        await mailbox.pushes.pulled({BOB: 2})
        clock.now_s += 9
        assert await due(mailbox) == []
        clock.now_s += 1
        assert [(push.first, push.version) for push in await due(mailbox)] == [(3, 3)]

    async def test_one_of_several_gets_each_push(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """A claim is a lease: no other process gets the push until it expires."""
        for n in range(10):
            await mailbox.append(message(f"urn:user:{n}"))
        clock.now_s += 10
        claims = await asyncio.gather(*(due(mailbox, limit=4) for _ in range(4)))
        first = [push for pushes in claims for push in pushes]
        assert len({push.recipient for push in first}) == len(first) == 10
        assert all(len(pushes) <= 4 for pushes in claims)
        clock.now_s += LEASE_S - 1
        assert await due(mailbox) == []
        clock.now_s += 1
        again = await due(mailbox)
        assert sorted(push.id for push in again) == sorted(push.id for push in first)
        assert {push.attempts for push in again} == {2}

    async def test_after_a_push_it_is_quiet(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """Messages of the quiet period owe one push, at its end."""
        await fill(mailbox, 1)
        clock.now_s += 10
        [push] = await due(mailbox)
        await mailbox.pushes.sent(push)
        assert await owed(mailbox) == (0, 0)
        for _ in range(5):
            clock.now_s += 50
            await fill(mailbox, 1)
            assert await due(mailbox) == []
        clock.now_s += 49
        assert await due(mailbox) == []
        clock.now_s += 1
        [second] = await due(mailbox)
        assert (second.first, second.version) == (2, 6)
        assert second.id != push.id

    async def test_a_pull_does_not_end_the_quiet(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """One push in a quiet period, also when its messages were pulled in between."""
        await fill(mailbox, 1)
        clock.now_s += 10
        await mailbox.pushes.sent((await due(mailbox))[0])
        await mailbox.pushes.pulled({BOB: 1})
        await fill(mailbox, 1)
        await mailbox.pushes.pulled({BOB: 2})
        await fill(mailbox, 1)
        clock.now_s += 299
        assert await due(mailbox) == []
        clock.now_s += 1
        assert [push.first for push in await due(mailbox)] == [3]

    async def test_a_message_during_the_push_is_owed_after_the_quiet(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """What came between claim and answer is not taken for sent."""
        await fill(mailbox, 1)
        clock.now_s += 10
        [push] = await due(mailbox)
        await fill(mailbox, 1)
        await mailbox.pushes.sent(push)
        assert await owed(mailbox) == (1, 0)
        clock.now_s += 299
        assert await due(mailbox) == []
        clock.now_s += 1
        [second] = await due(mailbox)
        assert (second.first, second.version, second.attempts) == (2, 2, 1)

    async def test_a_pull_during_the_push(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """It cancels; what is sent after it all the same begins the quiet, for newer ones too."""
        for recipient in (BOB, EVE):
            await fill(mailbox, 1, recipient)
        clock.now_s += 10
        pushes = await due(mailbox)
        await mailbox.pushes.pulled({BOB: 1, EVE: 1})
        await fill(mailbox, 1, EVE)
        for push in pushes:
            await mailbox.pushes.sent(push)
        await fill(mailbox, 1, BOB)
        assert await owed(mailbox) == (2, 0)
        clock.now_s += 299
        assert await due(mailbox) == []
        clock.now_s += 1
        assert {(push.recipient, push.first) for push in await due(mailbox)} == {(BOB, 2), (EVE, 2)}

    async def test_a_failed_push_is_due_again(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """As the same notification, with what has come meanwhile; a pull still cancels it."""
        await fill(mailbox, 1)
        clock.now_s += 10
        [push] = await due(mailbox)
        await mailbox.pushes.failed(push, retry_s=60)
        await fill(mailbox, 1)
        clock.now_s += 59
        assert await due(mailbox) == []
        clock.now_s += 1
        [again] = await due(mailbox)
        assert (again.id, again.version, again.attempts) == (push.id, 2, 2)
        await mailbox.pushes.pulled({BOB: 2})
        await mailbox.pushes.failed(again, retry_s=1)
        clock.now_s += 600
        assert await due(mailbox) == []

    async def test_a_buried_push_is_on_record(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """It is owed no more, and counted; later messages are owed as ever. The record ages."""
        await fill(mailbox, 1)
        clock.now_s += 10
        [push] = await due(mailbox)
        await mailbox.pushes.bury(push, "410 Gone")
        assert await owed(mailbox) == (0, 1)
        await fill(mailbox, 1)
        clock.now_s += 300
        assert [push.first for push in await due(mailbox)] == [2]
        assert await mailbox.pushes.purge(limit=10) == 0
        clock.now_s += DEAD_KEPT_MS / 1000
        assert await mailbox.pushes.purge(limit=10) == 1
        assert await owed(mailbox) == (1, 0)

    async def test_the_end_of_a_quiet_period_leaves_nothing(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """Purges delete, step by step, what only remembered that it was quiet."""
        for n in range(5):
            await mailbox.append(message(f"urn:user:{n}"))
        clock.now_s += 10
        for push in await due(mailbox):
            await mailbox.pushes.sent(push)
        assert await mailbox.pushes.purge(limit=10) == 0
        clock.now_s += 300
        assert [await mailbox.pushes.purge(limit=3) for _ in range(3)] == [3, 2, 0]

    async def test_a_cleared_mailbox_owes_nothing(
        self, mailbox: PushingMailbox, clock: ManualClock
    ) -> None:
        """Clearing a mailbox cancels its push."""
        await fill(mailbox, 1)
        await mailbox.clear(BOB)
        clock.now_s += 10
        assert await due(mailbox) == []
        assert await owed(mailbox) == (0, 0)

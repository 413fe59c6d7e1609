"""The outbox in the contract of every mailbox, which makes pokes certain."""

import asyncio

import pytest

from pokebridge.mailbox.base import Mailbox
from pokebridge.model import Poke
from pokebridge.testing.mailbox_kit import BOB, EVE, ManualClock, fill, message, unpoked


@pytest.mark.asyncio
class OutboxContract:
    """What a mailbox promises about its outbox; a part of ``MailboxContract``."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        """The mailbox's time."""
        return ManualClock()

    async def test_a_commit_owes_a_poke_until_it_is_confirmed(self, mailbox: Mailbox) -> None:
        """Appends leave one entry a recipient, with the newest version, until it is confirmed."""
        await fill(mailbox, 3, BOB)
        await fill(mailbox, 1, EVE)
        assert await unpoked(mailbox) == {BOB: 3, EVE: 1}
        await mailbox.confirm_outbox([Poke(BOB, 3), Poke("urn:user:nobody", 9)])
        assert await unpoked(mailbox) == {EVE: 1}
        await mailbox.confirm_outbox([Poke(EVE, 7)])
        assert await unpoked(mailbox) == {}
        await mailbox.confirm_outbox([])

    async def test_a_duplicate_owes_no_poke(self, mailbox: Mailbox) -> None:
        """A duplicate puts nothing in the outbox."""
        await mailbox.append(message(id="a", has_idempotency_key=True))
        await mailbox.confirm_outbox([Poke(BOB, 1)])
        await mailbox.append(message(id="a", has_idempotency_key=True))
        assert await unpoked(mailbox) == {}

    async def test_only_old_entries_are_asked_for(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """Entries younger than ``older_than_s`` are left to the process that publishes them."""
        await fill(mailbox, 1, BOB)
        clock.now_s += 2
        await fill(mailbox, 1, EVE)
        assert await unpoked(mailbox, older_than_s=1) == {BOB: 1}
        assert await unpoked(mailbox, older_than_s=3) == {}
        clock.now_s += 2
        assert await unpoked(mailbox, older_than_s=1) == {BOB: 1, EVE: 1}

    async def test_the_outbox_is_given_in_bounded_steps(self, mailbox: Mailbox) -> None:
        """Claiming in steps, and confirming each, returns every entry once."""
        for n in range(25):
            await mailbox.append(message(f"urn:user:{n}"))
        seen: list[Poke] = []
        while pokes := await mailbox.claim_outbox(older_than_s=0, limit=10):
            assert len(pokes) <= 10
            seen += pokes
            await mailbox.confirm_outbox(pokes)
        assert sorted(poke.recipient for poke in seen) == sorted(f"urn:user:{n}" for n in range(25))

    async def test_one_sweeper_gets_each_entry(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """A claimed entry is young again: no one else gets it until it is old once more."""
        for n in range(10):
            await mailbox.append(message(f"urn:user:{n}"))
        clock.now_s += 2
        sweeps = [mailbox.claim_outbox(older_than_s=1, limit=4) for _ in range(4)]
        claimed = [poke for pokes in await asyncio.gather(*sweeps) for poke in pokes]
        assert len(claimed) == len(set(claimed)) == 10
        assert await unpoked(mailbox, older_than_s=1) == {}
        clock.now_s += 1
        assert len(await unpoked(mailbox, older_than_s=1)) == 10

    async def test_a_steady_sender_keeps_no_entry_young(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """While nothing is confirmed, an entry's age counts from its oldest commit."""
        for _ in range(4):
            await fill(mailbox, 1)
            clock.now_s += 0.5
        assert await unpoked(mailbox, older_than_s=1.5) == {BOB: 4}

    async def test_a_late_confirmation_leaves_the_newer_message(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """Confirming an older version keeps the entry of a newer one, and restarts its age."""
        await fill(mailbox, 2)
        clock.now_s += 5
        await mailbox.confirm_outbox([Poke(BOB, 1)])
        assert await unpoked(mailbox) == {BOB: 2}
        assert await unpoked(mailbox, older_than_s=1) == {}
        clock.now_s += 1
        assert await unpoked(mailbox, older_than_s=1) == {BOB: 2}

    async def test_a_poke_without_a_version_confirms_nothing(self, mailbox: Mailbox) -> None:
        """Confirming a poke without a version confirms nothing."""
        await fill(mailbox, 1)
        await mailbox.confirm_outbox([Poke(BOB)])
        assert await unpoked(mailbox) == {BOB: 1}

    async def test_a_clock_set_back_silences_nothing(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """An entry from the future counts as old, not as one that is young for an hour."""
        await fill(mailbox, 1)
        clock.now_s -= 3600
        assert await unpoked(mailbox, older_than_s=1) == {BOB: 1}

    async def test_deleting_a_message_keeps_its_poke_owed(self, mailbox: Mailbox) -> None:
        """An ack confirms no entry: other devices may still need the poke."""
        await fill(mailbox, 1)
        await mailbox.ack(BOB, "phone", 1)
        assert await unpoked(mailbox) == {BOB: 1}

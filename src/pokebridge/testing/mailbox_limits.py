"""The limits in the contract of every mailbox: quotas, pages, devices, purges."""

import asyncio

import pytest

from pokebridge.errors import InputError, MailboxFullError
from pokebridge.mailbox.base import (
    DAY_MS,
    FORGET_BATCH,
    MAX_DEVICES,
    PAGE_BYTES,
    Limits,
    Mailbox,
    MailboxStats,
)
from pokebridge.model import REVOCATIONS, Receipt
from pokebridge.testing.mailbox_kit import (
    ALICE,
    BOB,
    EVE,
    ManualClock,
    fill,
    kept,
    message,
    versions,
)

LIMITS = Limits(max_messages=1500, max_bytes=2 * 1024 * 1024)
SHARED = Limits(max_messages=600, max_bytes=2 * 1024 * 1024, max_share=0.5)
DAY_S = DAY_MS / 1000
BIG = b'"' + b"x" * 65_534 + b'"'


@pytest.mark.asyncio
class LimitsContract:
    """The limits of every mailbox; a part of ``MailboxContract``."""

    @pytest.fixture
    def limits(self) -> Limits:
        """The mailbox's limits."""
        return LIMITS

    # -- quotas ------------------------------------------------------------------------------------

    async def test_a_message_too_many_is_refused(self, mailbox: Mailbox) -> None:
        """A full mailbox refuses messages without a gap in its versions, until an ack makes room.

        Other mailboxes are not affected.
        """
        calls = [mailbox.append(message()) for _ in range(LIMITS.max_messages + 10)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        given = [answer.version for answer in answers if isinstance(answer, Receipt)]
        refused = [answer for answer in answers if not isinstance(answer, Receipt)]
        assert sorted(given) == list(range(1, LIMITS.max_messages + 1))
        assert len(refused) == 10
        assert all(isinstance(error, MailboxFullError) for error in refused)
        await fill(mailbox, 1, EVE)
        await mailbox.ack(BOB, "phone", 2)
        await fill(mailbox, 2)
        with pytest.raises(MailboxFullError, match="1500 messages"):
            await mailbox.append(message())
        assert await versions(mailbox) == list(range(3, LIMITS.max_messages + 3))

    async def test_bytes_are_counted_too(self, mailbox: Mailbox) -> None:
        """Large bodies fill a mailbox by size; a small message may still fit."""
        fit = LIMITS.max_bytes // len(BIG)
        for _ in range(fit - 1):
            await mailbox.append(message(body=BIG))
        await mailbox.append(message(body=BIG[:-10] + b'"'))
        with pytest.raises(MailboxFullError):
            await mailbox.append(message(body=BIG))
        assert (await mailbox.append(message(body=b"123456789"))).version == fit + 1
        with pytest.raises(MailboxFullError):
            await mailbox.append(message(body=b"1"))
        assert await kept(mailbox) == (fit + 1, LIMITS.max_bytes)

    async def test_a_full_mailbox_owes_and_remembers_nothing(self, mailbox: Mailbox) -> None:
        """A refused message has no receipt and can be sent again; a duplicate needs no room.

        Only committed messages are in the outbox.
        """
        first = message(id="first", has_idempotency_key=True)
        await mailbox.append(first)
        await asyncio.gather(*(mailbox.append(message()) for _ in range(LIMITS.max_messages - 1)))
        late = message(id="late", has_idempotency_key=True)
        with pytest.raises(MailboxFullError):
            await mailbox.append(late)
        assert await mailbox.append(first) == ("first", 1, True)
        pokes = await mailbox.claim_outbox(older_than_s=0, limit=10)
        assert [poke.version for poke in pokes] == [LIMITS.max_messages]
        await mailbox.ack(BOB, "phone", 1)
        assert await mailbox.append(late) == ("late", LIMITS.max_messages + 1, False)

    @pytest.mark.parametrize("limits", [SHARED])
    async def test_one_sender_fills_no_mailbox(self, mailbox: Mailbox) -> None:
        """Above its share a sender is refused, one message at a time or many; others are not.

        An ack makes room again, and a duplicate needs none.
        """
        most = SHARED.share_messages
        first = message(sender=EVE, id="first", has_idempotency_key=True)
        await mailbox.append(first)
        calls = [mailbox.append(message(sender=EVE)) for _ in range(most + 9)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [answer for answer in answers if not isinstance(answer, Receipt)]
        assert len(refused) == 10
        assert all(isinstance(error, MailboxFullError) for error in refused)
        with pytest.raises(MailboxFullError, match=f"sender's share .*{most} messages"):
            await mailbox.append(message(sender=EVE))
        assert await mailbox.append(first) == ("first", 1, True)
        mixed = [mailbox.append(message(sender=sender)) for sender in (EVE, BOB, EVE, BOB)]
        outcomes = await asyncio.gather(*mixed, return_exceptions=True)
        assert [isinstance(outcome, Receipt) for outcome in outcomes] == [False, True] * 2
        assert await versions(mailbox) == list(range(1, most + 3))
        await mailbox.ack(BOB, "phone", 3)
        await mailbox.append(message(sender=EVE))
        for _ in range(2):
            await mailbox.append(message(sender=EVE))
        with pytest.raises(MailboxFullError, match="sender's share"):
            await mailbox.append(message(sender=EVE))
        await mailbox.clear(BOB)
        await mailbox.append(message(sender=EVE))

    @pytest.mark.parametrize("limits", [SHARED])
    async def test_shares_are_counted_in_bytes_too(self, mailbox: Mailbox) -> None:
        """A few large messages use a share up. One that would fit the mailbox is refused."""
        for _ in range(SHARED.share_bytes // len(BIG)):
            await mailbox.append(message(sender=EVE, body=BIG))
        with pytest.raises(MailboxFullError, match=f"sender's share .*{SHARED.share_bytes} bytes"):
            await mailbox.append(message(sender=EVE, body=BIG))
        await mailbox.append(message(sender=BOB, body=BIG))

    @pytest.mark.parametrize("limits", [SHARED])
    async def test_what_expires_is_given_back(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """Purged messages count against no share."""
        most = SHARED.share_messages
        await asyncio.gather(*(mailbox.append(message(sender=EVE, ttl_s=1)) for _ in range(most)))
        clock.now_s += 2
        with pytest.raises(MailboxFullError, match="sender's share"):
            await mailbox.append(message(sender=EVE))
        assert await mailbox.purge(limit=10 * most) == most
        await mailbox.append(message(sender=EVE))

    @pytest.mark.parametrize("limits", [Limits(max_messages=4, max_share=0.5)])
    async def test_the_share_is_checked_first(self, mailbox: Mailbox) -> None:
        """Where both are used up, a sender hears of its share, and others of the mailbox."""
        for sender in (EVE, EVE, BOB, BOB):
            await mailbox.append(message(sender=sender))
        with pytest.raises(MailboxFullError, match="sender's share"):
            await mailbox.append(message(sender=EVE))
        with pytest.raises(MailboxFullError, match="mailbox is full"):
            await mailbox.append(message(sender=ALICE))

    @pytest.mark.parametrize("limits", [Limits(max_messages=2, max_share=0.5)])
    async def test_revocations_have_no_limits(self, mailbox: Mailbox) -> None:
        """More revocations are kept than another mailbox would take messages."""
        revocation = message(REVOCATIONS, sender=REVOCATIONS)
        await asyncio.gather(*(mailbox.append(revocation) for _ in range(9)))
        assert await versions(mailbox, REVOCATIONS) == list(range(1, 10))

    async def test_what_is_purged_makes_room(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """An expired message counts until it is purged."""
        await mailbox.append(message(ttl_s=1, body=b"1234"))
        await fill(mailbox, 1, EVE)
        clock.now_s += 2
        assert await kept(mailbox) == (2, 6)
        assert await mailbox.purge(limit=10) == 1
        assert await kept(mailbox) == (1, 2)

    # -- pages -------------------------------------------------------------------------------------

    async def test_a_page_has_a_size(self, mailbox: Mailbox) -> None:
        """A page ends before the size limit, but always has at least one message."""
        for size_bytes in (4, 4, 4, 20, 4):
            await mailbox.append(message(body=b"1" * size_bytes))
        after, pages, more = 0, [], True
        while more:
            page = await mailbox.read(BOB, after=after, limit=50, max_bytes=8)
            pages.append([kept.version for kept in page.messages])
            after, more = page.version, page.more
        assert pages == [[1, 2], [3], [4], [5]]

    async def test_a_page_is_a_mebibyte_by_default(self, mailbox: Mailbox) -> None:
        """The default size limit holds: a page does not have thirty bodies of 64 KiB."""
        for _ in range(20):
            await mailbox.append(message(body=BIG))
        page = await mailbox.read(BOB, after=0, limit=500)
        assert (len(page.messages), page.more) == (PAGE_BYTES // len(BIG), True)
        page = await mailbox.read(BOB, after=page.version, limit=500)
        assert (len(page.messages), page.more) == (20 - PAGE_BYTES // len(BIG), False)

    async def test_a_known_head_reads_nothing(self, mailbox: Mailbox) -> None:
        """``unless_head`` returns an empty page when the head is unchanged, whatever the cursor."""
        await fill(mailbox, 3)
        page = await mailbox.read(BOB, after=0, limit=50, unless_head=3)
        assert (page.messages, page.head, page.more) == ((), 3, False)
        assert len((await mailbox.read(BOB, after=0, limit=50, unless_head=2)).messages) == 3
        assert (await mailbox.read(EVE, after=0, limit=50, unless_head=0)).head == 0

    # -- devices -----------------------------------------------------------------------------------

    async def test_a_device_long_unseen_is_forgotten(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """A device unseen for ninety days is forgotten; when it returns, it is a new one."""
        await mailbox.see_device(BOB, "old")
        clock.now_s += 2 * DAY_S
        await fill(mailbox, 3)
        await mailbox.ack(BOB, "phone", 2)
        await mailbox.see_device(EVE, "only")
        await fill(mailbox, 1, EVE)
        clock.now_s += 87 * DAY_S
        assert await mailbox.purge(limit=10) == 0
        assert await versions(mailbox) == [1, 2, 3]
        clock.now_s += 1.5 * DAY_S
        assert await mailbox.purge(limit=10) == 1
        assert await versions(mailbox) == [3]
        clock.now_s += 2 * DAY_S
        assert await mailbox.purge(limit=10) == 2
        assert await versions(mailbox) == [3], "nobody is known, so nothing was acked by all"
        assert await versions(mailbox, EVE) == [1]
        await mailbox.see_device(BOB, "old")
        await mailbox.ack(BOB, "phone", 3)
        assert await versions(mailbox) == [3]

    @pytest.mark.parametrize("by", ["ack", "see_device"])
    async def test_a_device_that_is_seen_is_kept(
        self, mailbox: Mailbox, clock: ManualClock, by: str
    ) -> None:
        """An ack, or being seen, at least a day later restarts those ninety days."""
        await fill(mailbox, 1)
        await mailbox.see_device(BOB, "tablet")
        for _ in range(3):
            clock.now_s += 40 * DAY_S
            if by == "ack":
                await mailbox.ack(BOB, "tablet", 0)
            else:
                await mailbox.see_device(BOB, "tablet")
        assert await mailbox.purge(limit=10) == 0
        await mailbox.ack(BOB, "phone", 1)
        assert await versions(mailbox) == [1]

    async def test_a_recipient_has_a_limited_number_of_devices(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """With one more the least recently seen is forgotten, and nothing waits for it any more."""
        await fill(mailbox, 2)
        await mailbox.see_device(EVE, "phone")
        await mailbox.ack(BOB, "oldest", 1)
        for number in range(1, MAX_DEVICES):
            clock.now_s += 1
            await mailbox.ack(BOB, f"{number}", 2)
        assert await versions(mailbox) == [2]
        assert (await mailbox.stats()).devices == 1 + MAX_DEVICES
        clock.now_s += 1
        await mailbox.ack(BOB, "newest", 2)
        assert await versions(mailbox) == []
        for number in range(MAX_DEVICES):
            clock.now_s += 1
            await mailbox.see_device(BOB, f"made up {number}")
        assert (await mailbox.stats()).devices == 1 + MAX_DEVICES
        await fill(mailbox, 1)
        await mailbox.ack(BOB, "newest", 3)
        assert await versions(mailbox) == [3]

    async def test_devices_are_forgotten_in_steps(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """Each purge forgets a limited number of devices, until all are forgotten."""
        for number in range(FORGET_BATCH + 5):
            await mailbox.see_device(f"urn:user:{number}", "phone")
        clock.now_s += 91 * DAY_S
        assert [await mailbox.purge(limit=1000) for _ in range(3)] == [FORGET_BATCH, 5, 0]

    # -- by hand -----------------------------------------------------------------------------------

    async def test_a_mailbox_can_be_cleared(self, mailbox: Mailbox) -> None:
        """Clearing a mailbox deletes messages, devices and outbox entry, and keeps the head."""
        await fill(mailbox, 3)
        await fill(mailbox, 1, EVE)
        await mailbox.see_device(BOB, "tablet")
        assert await mailbox.clear(BOB) == 3
        assert await mailbox.clear(BOB) == await mailbox.clear("urn:user:nobody") == 0
        assert await versions(mailbox) == []
        assert await versions(mailbox, EVE) == [1]
        assert (await mailbox.append(message())).version == 4
        await mailbox.ack(BOB, "phone", 4)
        assert await kept(mailbox) == (1, 2)

    @pytest.mark.parametrize("odd", ["a\0b", "\ud800"])
    async def test_what_can_not_be_stored_harms_nobody(self, mailbox: Mailbox, odd: str) -> None:
        """A call with such a name works or raises InputError; calls beside it work."""
        await mailbox.append(message())
        odd_calls = (
            mailbox.append(message(odd)),
            mailbox.append(message(id=odd)),
            mailbox.append(message(sender=odd)),
            mailbox.read(odd, after=0, limit=1),
            mailbox.see_device(odd, "d"),
            mailbox.see_device(EVE, odd),
            mailbox.ack(EVE, odd, 1),
        )
        good_calls = [
            call
            for _ in range(20)
            for call in (
                mailbox.append(message()),
                mailbox.read(BOB, after=0, limit=1),
                mailbox.see_device(BOB, "d"),
            )
        ]
        outcomes = await asyncio.gather(*odd_calls, *good_calls, return_exceptions=True)
        failures = [each for each in outcomes if isinstance(each, BaseException)]
        assert {type(failure) for failure in failures} <= {InputError}
        assert len(failures) <= len(odd_calls)

    async def test_stats_count_what_there_is(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """Statistics count recipients, messages, bytes, devices and outbox entries, with ages."""
        assert await mailbox.stats() == MailboxStats(0, 0, 0, 0, 0, None, None)
        start_ms = int(clock.now_s * 1000)
        await fill(mailbox, 2, BOB)
        clock.now_s += 1
        await mailbox.append(message(EVE, body=b"12345"))
        await mailbox.see_device("urn:user:mute", "phone")
        await mailbox.ack(BOB, "phone", 2)
        stats = MailboxStats(
            recipients=2,
            messages=1,
            bytes=5,
            devices=2,
            outbox=2,
            oldest_message_ms=start_ms + 1000,
            oldest_outbox_ms=start_ms,
        )
        assert await mailbox.stats() == stats

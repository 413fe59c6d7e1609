"""The contract of every mailbox, as pytest suites to subclass.

    class TestMyMailbox(DurableMailboxContract):
        @pytest.fixture
        async def connect(self, clock, limits, my_server):
            ...  # yield an async function that returns a new mailbox on the same store

Each call of ``connect`` stands for another process. The mailbox that it returns takes its time from
``clock`` and keeps to ``limits``; the fixture closes it. For a mailbox that lives in one process
subclass :class:`MailboxContract`, and define the fixture ``mailbox``. A test needs an empty store.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest

from pokebridge.errors import MailboxError
from pokebridge.mailbox.base import Mailbox
from pokebridge.model import MAX_VERSION, Ack, Message, Poke
from pokebridge.testing.mailbox_devices import DevicesContract
from pokebridge.testing.mailbox_generations import GenerationsContract
from pokebridge.testing.mailbox_groups import GroupsContract
from pokebridge.testing.mailbox_kit import (
    ALICE,
    BOB,
    EVE,
    ManualClock,
    fill,
    head,
    message,
    unpoked,
    versions,
)
from pokebridge.testing.mailbox_limits import LimitsContract
from pokebridge.testing.mailbox_outbox import OutboxContract

__all__ = ["DurableMailboxContract", "MailboxContract"]

DAY_S = 24 * 3600.0

Connect = Callable[[], Awaitable[Mailbox]]


class MailboxContract(
    OutboxContract, LimitsContract, GenerationsContract, DevicesContract, GroupsContract
):
    """What every mailbox promises (``pokebridge.mailbox.base``), except to survive its process."""

    # -- append and read ---------------------------------------------------------------------------

    async def test_an_unknown_recipient_has_an_empty_mailbox(self, mailbox: Mailbox) -> None:
        """A recipient without messages has head 0, an empty page and cursor 0."""
        page = await mailbox.read(BOB, after=0, limit=50)
        assert (page.messages, page.version, page.head, page.more) == ((), 0, 0, False)
        assert await head(mailbox, BOB) == 0

    async def test_what_was_appended_is_read_back(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """A message comes back with its id, sender, body, version and the time of its commit."""
        receipt = await mailbox.append(message(id="a", sender=EVE, body=b'{"n": 1}'))
        assert receipt == ("a", 1, False)
        page = await mailbox.read(BOB, after=0, limit=50)
        assert page.messages == (Message(1, "a", EVE, b'{"n": 1}', int(clock.now_s * 1000)),)
        assert (page.version, page.head, page.more) == (1, 1, False)

    async def test_one_recipient_is_looked_up(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """An operator sees what is kept, since when a poke is owed, and what each device acked."""
        assert await mailbox.inspect(EVE) == (0, 0, 0, None, {})
        await fill(mailbox, 3)
        await mailbox.see_device(BOB, "phone")
        await mailbox.ack(BOB, "desk", 2)
        owed = await mailbox.inspect(BOB)
        since_ms = int(clock.now_s * 1000)
        assert owed == (3, 3, 6, since_ms, {"desk": 2, "phone": 0})
        await mailbox.confirm_outbox([Poke(BOB, 3)])
        await mailbox.ack(BOB, "phone", 3)
        assert await mailbox.inspect(BOB) == (3, 1, 2, None, {"desk": 2, "phone": 3})

    async def test_versions_are_dense_per_recipient(self, mailbox: Mailbox) -> None:
        """The versions of each recipient are 1, 2, 3, …, whatever others receive in between."""
        for expected in (1, 2, 3):
            assert (await mailbox.append(message(BOB))).version == expected
            assert (await mailbox.append(message(EVE))).version == expected
        assert await versions(mailbox, BOB) == await versions(mailbox, EVE) == [1, 2, 3]

    @pytest.mark.parametrize(
        "body",
        [
            b"null",
            '{"text":"grüße ☃ 🦆 \\u0000"}'.encode(),
            b' { "spaces" : [ ] } ',
            b'"' + b"x" * 65_534 + b'"',
        ],
        ids=["null", "unicode", "spaces", "64 KiB"],
    )
    async def test_a_body_is_kept_as_it_came(self, mailbox: Mailbox, body: bytes) -> None:
        """A body is kept byte for byte: JSON is not parsed and written again."""
        await mailbox.append(message(body=body))
        page = await mailbox.read(BOB, after=0, limit=1)
        assert [kept.body for kept in page.messages] == [body]

    async def test_recipients_are_opaque(self, mailbox: Mailbox) -> None:
        """Case, wildcards, quotes and the 256th character tell recipients apart."""
        every_character = "".join(map(chr, range(0x21, 0x7F)))
        longest = "r" * 255
        recipients = [
            "bob",
            "BOB",
            "b%b",
            "b_b",
            "bo",
            every_character,
            longest + "a",
            longest + "b",
        ]
        for count, recipient in enumerate(recipients, 1):
            await fill(mailbox, count, recipient)
        assert [await head(mailbox, recipient) for recipient in recipients] == [
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            8,
        ]
        for count, recipient in enumerate(recipients, 1):
            await mailbox.ack(recipient, "d" * 128, count)
            await mailbox.confirm_outbox([Poke(recipient, count)])
            assert await versions(mailbox, recipient) == []
            assert set(await unpoked(mailbox)) == set(recipients[count:])

    async def test_pages_join_without_gap_or_overlap(self, mailbox: Mailbox) -> None:
        """A page has at most ``limit`` messages, and says whether more follow."""
        await asyncio.gather(*(mailbox.append(message()) for _ in range(1203)))
        seen, after, sizes = [], 0, []
        more = True
        while more:
            page = await mailbox.read(BOB, after=after, limit=500)
            assert page.head == 1203
            seen += [kept.version for kept in page.messages]
            sizes.append(len(page.messages))
            after, more = page.version, page.more
        assert (seen, sizes, after) == (list(range(1, 1204)), [500, 500, 203], 1203)

    async def test_more_is_said_only_when_there_is_more(self, mailbox: Mailbox) -> None:
        """A page that ends exactly at the limit says that no more follow."""
        await fill(mailbox, 3)
        assert (await mailbox.read(BOB, after=0, limit=2)).more
        assert not (await mailbox.read(BOB, after=0, limit=3)).more
        assert not (await mailbox.read(BOB, after=1, limit=2)).more

    async def test_any_cursor_can_be_read_from(self, mailbox: Mailbox) -> None:
        """A cursor at or above the head reads nothing and gets the head; one below 0 reads all."""
        await fill(mailbox, 2)
        for after in (2, 3, MAX_VERSION, 10**30):
            page = await mailbox.read(BOB, after=after, limit=50)
            assert (page.messages, page.version, page.head, page.more) == ((), 2, 2, False)
        for after in (0, -1, -(10**30)):
            assert len((await mailbox.read(BOB, after=after, limit=50)).messages) == 2

    # -- concurrency -------------------------------------------------------------------------------

    async def test_concurrent_senders_get_dense_versions(self, mailbox: Mailbox) -> None:
        """Fifty senders at once to one recipient: every version once, none missing."""

        async def send(sender: str) -> list[int]:
            """The versions that one sender's messages got."""
            return [(await mailbox.append(message(sender=sender))).version for _ in range(20)]

        given = await asyncio.gather(*(send(f"urn:user:{n}") for n in range(50)))
        assert all(one < other for own in given for one, other in pairwise(own))
        assert sorted(version for own in given for version in own) == list(range(1, 1001))
        assert await versions(mailbox) == list(range(1, 1001))

    async def test_a_reader_sees_no_hole(self, mailbox: Mailbox) -> None:
        """While messages are committed, each page goes on right after its cursor."""
        sending = asyncio.gather(*(mailbox.append(message()) for _ in range(300)))
        after = 0
        while after < 300:
            page = await mailbox.read(BOB, after=after, limit=7)
            read = [kept.version for kept in page.messages]
            assert read == list(range(after + 1, after + 1 + len(read)))
            assert page.version == after + len(read) <= page.head
            after = page.version
            await asyncio.sleep(0)
        await sending

    async def test_a_cancelled_append_is_whole_or_nothing(self, mailbox: Mailbox) -> None:
        """Cancelled calls leave no gap in the versions, no partial write, and a working mailbox."""
        calls = [asyncio.create_task(mailbox.append(message(id=f"{n}"))) for n in range(100)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert not any(isinstance(answer, Exception) for answer in answers)
        last = await mailbox.append(message(id="last"))
        page = await mailbox.read(BOB, after=0, limit=500)
        assert [kept.version for kept in page.messages] == list(range(1, last.version + 1))
        assert {f"{n}" for n in range(1, 100, 2)} <= {kept.id for kept in page.messages}
        assert await unpoked(mailbox) == {BOB: last.version}

    # -- idempotency -------------------------------------------------------------------------------

    async def test_a_repeated_id_commits_nothing(self, mailbox: Mailbox) -> None:
        """The same id from the same sender gets the first receipt; the first message stays."""
        first = await mailbox.append(message(id="a", body=b"1", has_idempotency_key=True))
        await mailbox.append(message(id="b", has_idempotency_key=True))
        again = await mailbox.append(message(id="a", body=b"2", has_idempotency_key=True))
        assert (first, again) == (("a", 1, False), ("a", 1, True))
        page = await mailbox.read(BOB, after=0, limit=50)
        assert [(kept.id, kept.body) for kept in page.messages] == [("a", b"1"), ("b", b"{}")]

    async def test_a_repeated_id_is_the_same_message_for_any_recipient(
        self, mailbox: Mailbox
    ) -> None:
        """The id of a sender names one message, even when it is repeated to another recipient."""
        await fill(mailbox, 4, BOB)
        await mailbox.append(message(BOB, id="a", has_idempotency_key=True))
        assert await mailbox.append(message(EVE, id="a", has_idempotency_key=True)) == (
            "a",
            5,
            True,
        )
        assert await head(mailbox, EVE) == 0

    async def test_an_id_is_its_senders_own(self, mailbox: Mailbox) -> None:
        """The same id of another sender, or without an idempotency key, is another message."""
        await mailbox.append(message(id="a", sender=ALICE, has_idempotency_key=True))
        await mailbox.append(message(id="a", sender=EVE, has_idempotency_key=True))
        await mailbox.append(message(id="a", sender=ALICE))
        await mailbox.append(message(id="a", sender=ALICE))
        assert await versions(mailbox) == [1, 2, 3, 4]

    async def test_racing_repeats_commit_once(self, mailbox: Mailbox) -> None:
        """Of twenty concurrent retries one is committed, and all get its receipt."""
        retry = message(id="a", has_idempotency_key=True)
        receipts = await asyncio.gather(*(mailbox.append(retry) for _ in range(20)))
        assert sorted(receipts) == [("a", 1, False)] + [("a", 1, True)] * 19
        assert await versions(mailbox) == [1]

    async def test_a_receipt_outlives_its_message_by_a_week(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """Acked or expired, and purged, a message's id is still known six days later."""
        acked = message(id="acked", has_idempotency_key=True)
        expired = message(id="expired", ttl_s=1, has_idempotency_key=True)
        await mailbox.append(acked)
        await mailbox.ack(BOB, "phone", 1)
        await mailbox.append(expired)
        clock.now_s += 6 * DAY_S
        assert await mailbox.purge(limit=100) == 1
        assert await versions(mailbox) == []
        assert await mailbox.append(acked) == ("acked", 1, True)
        assert await mailbox.append(expired) == ("expired", 2, True)

    async def test_an_old_receipt_is_forgotten(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """A receipt is purged after eight days, and not earlier."""
        await mailbox.append(message(id="old", has_idempotency_key=True))
        clock.now_s += 4 * DAY_S
        await mailbox.append(message(id="young", has_idempotency_key=True))
        clock.now_s += 4 * DAY_S
        assert await mailbox.purge(limit=100) == 1
        assert (await mailbox.append(message(id="young", has_idempotency_key=True))).duplicate
        assert await mailbox.append(message(id="old", has_idempotency_key=True)) == (
            "old",
            3,
            False,
        )

    # -- expiry ------------------------------------------------------------------------------------

    async def test_an_expired_message_is_not_read(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """After its TTL a message is gone at once, purged or not; others and the head stay."""
        for ttl_s in (10, None, 10, 30, 10):
            await mailbox.append(message(ttl_s=ttl_s))
        clock.now_s += 9.5
        assert await versions(mailbox) == [1, 2, 3, 4, 5]
        clock.now_s += 0.5
        assert await versions(mailbox) == [2, 4]
        assert await mailbox.purge(limit=100) == 3
        assert await versions(mailbox) == [2, 4]
        clock.now_s += 30
        page = await mailbox.read(BOB, after=2, limit=50)
        assert (page.messages, page.version, page.head, page.more) == ((), 5, 5, False)

    async def test_expired_messages_do_not_fill_a_page(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """``limit`` and ``more`` count what can be read, not what has expired."""
        for ttl_s in (10, None, 10, None, 10):
            await mailbox.append(message(ttl_s=ttl_s))
        clock.now_s += 11
        page = await mailbox.read(BOB, after=0, limit=1)
        assert ([kept.version for kept in page.messages], page.version, page.more) == ([2], 2, True)
        page = await mailbox.read(BOB, after=0, limit=2)
        assert (page.version, page.more) == (4, False)

    async def test_a_purge_is_bounded(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """A purge deletes at most ``limit`` and says how many, until there is nothing left."""
        for n in range(7):
            await mailbox.append(message(f"urn:user:{n % 2}", ttl_s=1))
        for n in range(3):
            await mailbox.append(message(id=f"{n}", has_idempotency_key=True))
        assert await mailbox.purge(limit=4) == 0
        clock.now_s += 8 * DAY_S
        assert [await mailbox.purge(limit=4) for _ in range(4)] == [4, 4, 2, 0]
        assert await versions(mailbox) == [1, 2, 3]

    async def test_any_ttl_can_be_given(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """A message with an endless TTL never expires; one with a TTL of 0 has expired already."""
        for ttl_s in (1e300, float("inf"), 0, -5):
            await mailbox.append(message(ttl_s=ttl_s))
        clock.now_s += 100 * 365 * DAY_S
        assert await versions(mailbox) == [1, 2]

    # -- life --------------------------------------------------------------------------------------

    async def test_check_returns_while_it_answers(self, mailbox: Mailbox) -> None:
        """An open store passes the check, and the check leaves nothing behind."""
        await mailbox.check()
        assert await unpoked(mailbox) == {}

    async def test_closing_finishes_what_is_under_way(self, mailbox: Mailbox) -> None:
        """Calls made before close() get their answer."""
        calls = [asyncio.create_task(mailbox.append(message())) for _ in range(50)]
        await asyncio.sleep(0)
        await mailbox.close()
        assert sorted(receipt.version for receipt in await asyncio.gather(*calls)) == [
            *range(1, 51)
        ]

    async def test_a_closed_mailbox_refuses(self, mailbox: Mailbox) -> None:
        """After close() every call raises MailboxError; closing again is fine."""
        await mailbox.close()
        await mailbox.close()
        for call in (
            mailbox.append(message()),
            mailbox.read(BOB, after=0, limit=1),
            mailbox.heads([BOB]),
            mailbox.see_device(BOB, "phone"),
            mailbox.ack(BOB, "phone", 1),
            mailbox.ack_all([Ack(BOB, "phone", 1)]),
            mailbox.claim_outbox(older_than_s=0, limit=1),
            mailbox.confirm_outbox([Poke(BOB, 1)]),
            mailbox.purge(limit=1),
            mailbox.clear(BOB),
            mailbox.begin_generation(),
            mailbox.stats(),
            mailbox.check(),
        ):
            with pytest.raises(MailboxError):
                await call


class DurableMailboxContract(MailboxContract):
    """What a mailbox promises when other processes share it and it survives them."""

    @pytest.fixture
    async def mailbox(self, connect: Connect) -> Mailbox:
        """One process's mailbox."""
        return await connect()

    async def test_everything_survives_a_restart(self, connect: Connect) -> None:
        """Messages, the head, receipts, devices and the outbox are there after close and open."""
        before = await connect()
        await before.append(message(id="a", body=b"1", has_idempotency_key=True))
        await before.append(message(id="b", body=b"2"))
        await before.see_device(BOB, "tablet")
        await before.ack(BOB, "phone", 2)
        await before.close()
        after = await connect()
        page = await after.read(BOB, after=0, limit=50)
        assert [(kept.id, kept.body) for kept in page.messages] == [("a", b"1"), ("b", b"2")]
        assert await unpoked(after) == {BOB: 2}
        assert await after.append(message(id="a", has_idempotency_key=True)) == ("a", 1, True)
        await after.ack(BOB, "tablet", 1)
        assert await versions(after) == [2]
        assert (await after.append(message())).version == 3

    async def test_processes_share_a_generation(self, connect: Connect) -> None:
        """A generation that one process begins counts for those that have long been open."""
        one, other = await connect(), await connect()
        await fill(one, 1)
        await fill(other, 1)
        base = await one.begin_generation()
        assert (await other.append(message())).version == base + 1
        assert (await (await connect()).append(message())).version == base + 2

    async def test_processes_share_one_count(self, connect: Connect) -> None:
        """Senders in several processes to one recipient: every version once, none missing."""
        mailboxes = [await connect() for _ in range(3)]
        receipts = await asyncio.gather(
            *(mailbox.append(message()) for _ in range(100) for mailbox in mailboxes)
        )
        assert sorted(receipt.version for receipt in receipts) == list(range(1, 301))
        for mailbox in mailboxes:
            assert await versions(mailbox) == list(range(1, 301))

    async def test_racing_repeats_in_several_processes_commit_once(self, connect: Connect) -> None:
        """A retry that lands on another process is still the same message."""
        mailboxes = [await connect() for _ in range(3)]
        retry = message(id="a", has_idempotency_key=True)
        receipts = await asyncio.gather(
            *(mailbox.append(retry) for _ in range(5) for mailbox in mailboxes)
        )
        assert sorted(receipts) == [("a", 1, False)] + [("a", 1, True)] * 14

    async def test_sweepers_in_several_processes_share_the_outbox(
        self, connect: Connect, clock: ManualClock
    ) -> None:
        """Two processes never claim the same entry, and together they claim all."""
        mailboxes = [await connect() for _ in range(3)]
        await asyncio.gather(*(mailboxes[0].append(message(f"r{n}")) for n in range(60)))
        clock.now_s += 2
        claims = await asyncio.gather(
            *(
                mailbox.claim_outbox(older_than_s=1, limit=7)
                for _ in range(4)
                for mailbox in mailboxes
            )
        )
        claimed = [poke.recipient for pokes in claims for poke in pokes]
        assert len(claimed) == len(set(claimed))
        for mailbox in mailboxes:  # a claim may skip entries that another one has locked
            claimed += [poke.recipient for poke in await _claim_all(mailbox)]
        assert sorted(claimed) == sorted(f"r{n}" for n in range(60))

    async def test_a_commit_is_seen_by_other_processes_at_once(self, connect: Connect) -> None:
        """When append has returned, another process reads the message, and can confirm its poke."""
        one, other = await connect(), await connect()
        for version in range(1, 21):
            await one.append(message())
            page = await other.read(BOB, after=version - 1, limit=50)
            assert [kept.version for kept in page.messages] == [version]
        assert await unpoked(other) == {BOB: 20}
        await other.confirm_outbox([Poke(BOB, 20)])
        assert await unpoked(one) == {}


async def _claim_all(mailbox: Mailbox) -> list[Poke]:
    claimed: list[Poke] = []
    while pokes := await mailbox.claim_outbox(older_than_s=1, limit=7):
        claimed += pokes
    return claimed

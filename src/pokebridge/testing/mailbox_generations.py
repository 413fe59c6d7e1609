"""The part of the mailbox's contract that is about generations of versions."""

import pytest

from pokebridge.mailbox.base import Mailbox
from pokebridge.model import MAX_VERSION
from pokebridge.testing.mailbox_kit import BOB, EVE, fill, head, message, unpoked, versions


@pytest.mark.asyncio
class GenerationsContract:
    """Generations of versions; a part of ``MailboxContract``."""

    async def test_a_generation_is_above_everything(self, mailbox: Mailbox) -> None:
        """The next versions are above the base, dense, and no ack or cursor of before hides one."""
        await fill(mailbox, 3)
        base = await mailbox.begin_generation()
        assert 1 << 32 < base < MAX_VERSION
        assert (await head(mailbox, BOB), await head(mailbox, EVE)) == (3, 0)
        for recipient in (BOB, EVE):
            assert (await mailbox.append(message(recipient))).version == base + 1
            assert (await mailbox.append(message(recipient))).version == base + 2
        await mailbox.ack(BOB, "phone", base)
        page = await mailbox.read(BOB, after=3, limit=50, unless_head=3)
        assert [kept.version for kept in page.messages] == [base + 1, base + 2]
        assert (page.version, page.head, page.more) == (base + 2, base + 2, False)
        assert await unpoked(mailbox) == {BOB: base + 2, EVE: base + 2}

    async def test_a_young_generation_keeps_what_was_acked(self, mailbox: Mailbox) -> None:
        """A device that the store has forgotten still gets what the others have acked."""
        await mailbox.ack(BOB, "phone", 0)
        base = await mailbox.begin_generation()
        await fill(mailbox, 2)
        await mailbox.ack(BOB, "phone", base + 2)
        assert await versions(mailbox) == [base + 1, base + 2]

    async def test_each_generation_is_above_the_one_before(self, mailbox: Mailbox) -> None:
        """Generations may follow each other at once."""
        bases = [await mailbox.begin_generation() for _ in range(3)]
        assert bases == sorted(set(bases))
        assert (await mailbox.append(message())).version == bases[-1] + 1

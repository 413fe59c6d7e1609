"""The part of the mailbox contract that is about devices and their acks."""

import asyncio

from pokebridge.mailbox.base import Mailbox
from pokebridge.model import Ack
from pokebridge.testing.mailbox_kit import BOB, EVE, fill, head, message, versions


class DevicesContract:
    """Devices and acks of every mailbox; a part of ``MailboxContract``."""

    async def test_an_ack_of_the_only_device_deletes(self, mailbox: Mailbox) -> None:
        """Messages acked by the only device are deleted; the head and the next version stay."""
        await fill(mailbox, 3)
        await mailbox.ack(BOB, "phone", 2)
        assert await versions(mailbox) == [3]
        await mailbox.ack(BOB, "phone", 3)
        page = await mailbox.read(BOB, after=0, limit=50)
        assert (page.messages, page.version, page.head, page.more) == ((), 3, 3, False)
        assert await head(mailbox, BOB) == 3
        assert (await mailbox.append(message())).version == 4

    async def test_messages_wait_for_every_known_device(self, mailbox: Mailbox) -> None:
        """A device that was seen or has acked holds what it has not acked yet."""
        await fill(mailbox, 4)
        await mailbox.see_device(BOB, "tablet")
        await mailbox.ack(BOB, "phone", 4)
        assert await versions(mailbox) == [1, 2, 3, 4]
        await mailbox.ack(BOB, "tablet", 1)
        assert await versions(mailbox) == [2, 3, 4]
        await mailbox.ack(BOB, "laptop", 3)
        await mailbox.ack(BOB, "tablet", 4)
        assert await versions(mailbox) == [4]
        await mailbox.ack(BOB, "laptop", 4)
        assert await versions(mailbox) == []

    async def test_devices_are_their_recipients_own(self, mailbox: Mailbox) -> None:
        """One recipient's device of the same name acks nothing for another, and holds nothing."""
        await fill(mailbox, 1, BOB)
        await fill(mailbox, 1, EVE)
        await mailbox.see_device(EVE, "tablet")
        await mailbox.ack(BOB, "phone", 1)
        assert await versions(mailbox, BOB) == []
        assert await versions(mailbox, EVE) == [1]

    async def test_an_ack_is_cut_to_the_head(self, mailbox: Mailbox) -> None:
        """An ack above the head covers the messages that exist, and no later ones."""
        await mailbox.ack(BOB, "phone", 5)
        await fill(mailbox, 2)
        await mailbox.ack(BOB, "phone", 1)
        assert await versions(mailbox) == [2]
        await mailbox.ack(BOB, "phone", 10**30)
        await fill(mailbox, 1)
        await mailbox.ack(BOB, "phone", 2)
        assert await versions(mailbox) == [3]

    async def test_an_ack_never_moves_back(self, mailbox: Mailbox) -> None:
        """A late or repeated ack, also one at connect, undoes nothing."""
        await fill(mailbox, 3)
        await mailbox.see_device(BOB, "tablet")
        await mailbox.ack(BOB, "phone", 3)
        await mailbox.ack(BOB, "phone", 1)
        await mailbox.ack(BOB, "phone", -7)
        await mailbox.see_device(BOB, "phone")
        await mailbox.ack(BOB, "tablet", 3)
        assert await versions(mailbox) == []

    async def test_acks_of_many_are_recorded_together(self, mailbox: Mailbox) -> None:
        """Acks of several devices and recipients in one call count as each by itself would."""
        await fill(mailbox, 3, BOB)
        await fill(mailbox, 3, EVE)
        await mailbox.see_device(EVE, "tablet")
        await mailbox.ack(BOB, "phone", 3)
        await fill(mailbox, 1, BOB)
        acks = [
            Ack(EVE, "phone", 10**30),
            Ack(BOB, "tablet", 2),
            Ack(BOB, "phone", 1),
            Ack("urn:user:nobody", "phone", 7),
            Ack(EVE, "tablet", 2),
        ]
        await mailbox.ack_all(acks)
        assert await versions(mailbox, BOB) == [4]
        assert await versions(mailbox, EVE) == [3]
        await mailbox.ack_all([Ack(BOB, "tablet", 4), Ack(EVE, "tablet", 3)])
        assert await versions(mailbox, BOB) == [4]
        assert await versions(mailbox, EVE) == []

    async def test_acks_of_many_count_in_turn(self, mailbox: Mailbox) -> None:
        """A device that a call makes known has no part in what was acked before it in that call."""
        await fill(mailbox, 2)
        await mailbox.ack_all([Ack(BOB, "phone", 1), Ack(BOB, "tablet", 0)])
        assert await versions(mailbox) == [2]

    async def test_acks_of_many_meet_in_several_calls(self, mailbox: Mailbox) -> None:
        """Calls that name the same recipients in different orders wait for each other, and end."""
        names = [f"urn:user:{number}" for number in range(20)]
        for name in names:
            await fill(mailbox, 2, name)
        acks = [Ack(name, device, 2) for name in names for device in ("phone", "tablet")]
        await asyncio.gather(
            *(mailbox.ack_all(acks[turn:] + acks[:turn]) for turn in range(0, len(acks), 5))
        )
        assert [await versions(mailbox, name) for name in names] == [[]] * len(names)

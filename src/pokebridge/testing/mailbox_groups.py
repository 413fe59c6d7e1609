"""The part of the mailbox contract that is about groups: recipients that many read."""

import pytest

from pokebridge.errors import MailboxFullError
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.model import REVOCATIONS, Ack
from pokebridge.testing.mailbox_kit import BOB, ManualClock, fill, message, versions

ROOM = "urn:room:7"
GROUPS = Limits(max_messages=3, group_prefixes=("urn:room:", "urn:doc:"), group_ttl_s=60)
EVERYTHING = Limits(group_prefixes=("urn:",), group_ttl_s=60)


class GroupsContract:
    """The mailbox of a group; a part of ``MailboxContract``."""

    @pytest.mark.parametrize("limits", [GROUPS])
    async def test_no_ack_takes_a_message_from_other_readers(self, mailbox: Mailbox) -> None:
        """Whoever acks, and over whatever way, all of a group's messages stay.

        The acks of users in the same call count.
        """
        await fill(mailbox, 2, ROOM)
        await fill(mailbox, 2, BOB)
        await mailbox.see_device(ROOM, "tablet")
        await mailbox.ack(ROOM, "phone", 2)
        await mailbox.ack_all([Ack(ROOM, "phone", 2), Ack(BOB, "phone", 1), Ack(ROOM, "desk", 1)])
        await mailbox.ack_all([Ack(ROOM, "phone", 2)])
        assert await versions(mailbox, ROOM) == [1, 2]
        assert await versions(mailbox, BOB) == [2]
        assert (await mailbox.inspect(ROOM)).devices == {}

    @pytest.mark.parametrize("limits", [GROUPS])
    async def test_a_groups_messages_go_by_their_ttl(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """Each goes after its own, or after that of all groups; a user's without one stays."""
        for recipient in (ROOM, "urn:doc:1", BOB):
            await fill(mailbox, 1, recipient)
            await mailbox.append(message(recipient, ttl_s=5))
            await mailbox.append(message(recipient, ttl_s=600))
        clock.now_s += 59
        assert await versions(mailbox, ROOM) == await versions(mailbox, BOB) == [1, 3]
        clock.now_s += 2
        assert await versions(mailbox, ROOM) == await versions(mailbox, "urn:doc:1") == [3]
        assert await versions(mailbox, BOB) == [1, 3]
        assert await mailbox.purge(limit=10) == 5
        assert (await mailbox.inspect(ROOM)).messages == 1

    @pytest.mark.parametrize("limits", [GROUPS])
    async def test_only_time_makes_room_in_a_group(
        self, mailbox: Mailbox, clock: ManualClock
    ) -> None:
        """A full mailbox of a group refuses messages, acked or not, until some have expired."""
        await fill(mailbox, 3, ROOM)
        await mailbox.ack(ROOM, "phone", 3)
        with pytest.raises(MailboxFullError):
            await mailbox.append(message(ROOM))
        clock.now_s += 61
        await mailbox.purge(limit=10)
        assert (await mailbox.append(message(ROOM))).version == 4

    @pytest.mark.parametrize("limits", [EVERYTHING])
    async def test_revocations_are_no_group(self, mailbox: Mailbox, clock: ManualClock) -> None:
        """They do not expire, however the recipients of groups begin."""
        await mailbox.append(message(REVOCATIONS, sender=REVOCATIONS))
        await fill(mailbox, 1, BOB)
        clock.now_s += 61
        assert await versions(mailbox, REVOCATIONS) == [1]
        assert await versions(mailbox, BOB) == []

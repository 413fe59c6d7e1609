"""The in-process mailbox keeps the contract."""

import pytest

from pokebridge.mailbox.base import Limits
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.testing.mailbox import MailboxContract
from pokebridge.testing.mailbox_kit import ManualClock


class TestMemoryMailbox(MailboxContract):
    """The shipped suite."""

    @pytest.fixture
    async def mailbox(self, clock: ManualClock, limits: Limits) -> MemoryMailbox:
        """An empty mailbox."""
        return MemoryMailbox(clock, limits)

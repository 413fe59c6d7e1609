"""A worker's mailbox keeps the contract, over a real channel to its hub."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pokebridge.errors import InputError, MailboxError
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.testing.mailbox import MailboxContract
from pokebridge.testing.mailbox_kit import ManualClock, message
from pokebridge.workers.calls import MAX_WAITING
from pokebridge.workers.mailbox import HubMailbox, offer_mailbox
from tests.workers.ends import Ends, connected


@asynccontextmanager
async def in_a_worker(mailbox: Mailbox) -> AsyncIterator[HubMailbox]:
    """The worker's end of ``mailbox``."""
    async with connected() as ends:
        offer_mailbox(ends.answers, mailbox)
        yield HubMailbox(ends.calls)


class TestMemoryMailbox(MailboxContract):
    """The shipped suite, over the hub's memory."""

    @pytest.fixture
    async def mailbox(self, clock: ManualClock, limits: Limits) -> AsyncIterator[HubMailbox]:
        """An empty mailbox."""
        async with in_a_worker(MemoryMailbox(clock, limits)) as mailbox:
            yield mailbox


class TestSqliteMailbox(MailboxContract):
    """The shipped suite, over the hub's file."""

    @pytest.fixture
    async def mailbox(
        self, clock: ManualClock, limits: Limits, tmp_path: Path
    ) -> AsyncIterator[HubMailbox]:
        """An empty mailbox."""
        store = await SqliteMailbox.open(tmp_path / "m.db", clock=clock, limits=limits)
        async with in_a_worker(store) as mailbox:
            yield mailbox
        await store.close()


async def test_a_lone_surrogate_harms_no_other_call(ends: Ends) -> None:
    """Text that has no encoding is refused, and the calls beside it are answered."""
    offer_mailbox(ends.answers, MemoryMailbox())
    mailbox = HubMailbox(ends.calls)
    with pytest.raises(InputError, match="no encoding"):
        await mailbox.append(message(id="\ud800"))
    assert (await mailbox.append(message())).version == 1


async def test_calls_that_nobody_answers_are_limited(ends: Ends) -> None:
    """A worker whose hub is stuck refuses calls as an overloaded store does."""
    ends.calls._waiting.update(dict.fromkeys(range(-MAX_WAITING, 0)))  # type: ignore[arg-type]
    with pytest.raises(MailboxError, match="overloaded"):
        await HubMailbox(ends.calls).check()

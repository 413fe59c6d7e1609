"""Every mailbox keeps the contract of pushes; without a timing it owes none."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support import Daemon

from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.testing.mailbox_kit import BOB, ManualClock, fill
from pokebridge.testing.mailbox_pushes import TIMING, PushContract


class TestMemoryPushes(PushContract):
    """The shipped suite, in memory."""

    @pytest.fixture
    async def mailbox(self, clock: ManualClock) -> MemoryMailbox:
        """An empty mailbox."""
        return MemoryMailbox(clock, push_timing=TIMING)


class TestSqlitePushes(PushContract):
    """The shipped suite, on a file."""

    @pytest.fixture
    async def mailbox(self, clock: ManualClock, tmp_path: Path) -> AsyncIterator[SqliteMailbox]:
        """An empty mailbox."""
        mailbox = await SqliteMailbox.open(tmp_path / "mailbox.db", clock, push_timing=TIMING)
        yield mailbox
        await mailbox.close()


class TestPostgresPushes(PushContract):
    """The shipped suite, in a schema of its own for each test."""

    @pytest.fixture
    async def mailbox(
        self, clock: ManualClock, postgres_server: Daemon
    ) -> AsyncIterator[PostgresMailbox]:
        """An empty mailbox."""
        url = f"{postgres_server.url}?schema=test_{uuid.uuid4().hex}"
        mailbox = await PostgresMailbox.open(url, clock, push_timing=TIMING)
        yield mailbox
        await mailbox.close()


async def test_a_mailbox_owes_no_push_unless_it_is_told_to(
    tmp_path: Path, postgres_server: Daemon
) -> None:
    """Without a timing an append writes nothing about pushes, and there is no queue."""
    url = f"{postgres_server.url}?schema=test_{uuid.uuid4().hex}"
    for mailbox in (
        MemoryMailbox(),
        await SqliteMailbox.open(tmp_path / "mailbox.db"),
        await PostgresMailbox.open(url),
    ):
        await fill(mailbox, 1, BOB)
        assert mailbox.pushes is None
        assert (await mailbox.stats()).pushes == 0
        await mailbox.close()

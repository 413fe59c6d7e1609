"""The PostgreSQL mailbox keeps the contract."""

import uuid
from collections.abc import AsyncIterator

import pytest
from tests.support import Daemon

from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.testing.mailbox import Connect, DurableMailboxContract
from pokebridge.testing.mailbox_kit import ManualClock


@pytest.fixture
def url(postgres_server: Daemon) -> str:
    """Where a mailbox can be made: a schema that is not there yet."""
    return f"{postgres_server.url}?schema=test_{uuid.uuid4().hex}"


class TestPostgresMailbox(DurableMailboxContract):
    """The shipped suite, in a schema of its own for each test."""

    @pytest.fixture
    async def connect(self, clock: ManualClock, limits: Limits, url: str) -> AsyncIterator[Connect]:
        """Mailboxes in one schema, closed afterwards."""
        opened: list[PostgresMailbox] = []

        async def connect() -> Mailbox:
            opened.append(await PostgresMailbox.open(url, clock, limits))
            return opened[-1]

        yield connect
        for mailbox in opened:
            await mailbox.close()

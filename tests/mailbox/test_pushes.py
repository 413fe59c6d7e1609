"""Every mailbox keeps the contract of pushes; without a timing it owes none."""

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest

from pokebridge.mailbox import postgres_migration, postgres_schema, sqlite_file
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.testing.mailbox_kit import BOB, EVE, ManualClock, fill, message, versions
from pokebridge.testing.mailbox_pushes import TIMING, PushContract
from tests.support import Daemon, wait_until


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

    @pytest.mark.parametrize("damage", ["recipient = CAST(x'ff' AS TEXT)", "version = 'abc'"])
    async def test_a_damaged_push_is_set_aside(
        self, mailbox: SqliteMailbox, clock: ManualClock, tmp_path: Path, damage: str
    ) -> None:
        """It is buried at its first claim, instead of being posted again and again."""
        assert mailbox.pushes is not None
        await fill(mailbox, 1, BOB)
        await fill(mailbox, 1, EVE)
        with closing(sqlite3.connect(tmp_path / "mailbox.db")) as by_hand:
            by_hand.execute(f"UPDATE pushes SET {damage} WHERE recipient = ?", (EVE,))
            by_hand.commit()
        clock.now_s += TIMING.grace_s + 1
        claimed = await mailbox.pushes.claim(limit=10, lease_s=5)
        assert [push.recipient for push in claimed] == [BOB]
        await mailbox.pushes.sent(claimed[0])
        clock.now_s += 10
        assert await mailbox.pushes.claim(limit=10, lease_s=5) == []
        stats = await mailbox.stats()
        assert (stats.pushes, stats.dead_pushes) == (0, 1)


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


async def test_a_mailbox_from_before_there_were_pushes(
    tmp_path: Path, postgres_server: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is brought up to date, keeps what it has, and owes pushes from then on."""
    url = f"{postgres_server.url}?schema=test_{uuid.uuid4().hex}"
    path = tmp_path / "mailbox.db"
    with monkeypatch.context() as before:
        before.setattr(postgres_migration, "MIGRATIONS", postgres_schema.MIGRATIONS[:1])
        before.setattr(sqlite_file, "MIGRATIONS", sqlite_file.MIGRATIONS[:2])
        for old in (await PostgresMailbox.open(url), await SqliteMailbox.open(path)):
            await old.append(message())
            await old.close()
    timing = PushTiming(grace_s=0)
    for mailbox in (
        await PostgresMailbox.open(url, push_timing=timing),
        await SqliteMailbox.open(path, push_timing=timing),
    ):
        await mailbox.append(message())
        assert await versions(mailbox) == [1, 2]
        assert mailbox.pushes is not None
        [push] = await mailbox.pushes.claim(limit=10, lease_s=1)
        assert (push.first, push.version) == (2, 2)
        await mailbox.close()


async def test_no_statement_reads_the_queue_through(postgres_server: Daemon) -> None:
    """Whatever is asked of it, no table of pushes is scanned as a whole, however small it is."""
    schema = f"test_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(postgres_server.url, server_settings={"search_path": schema})
    mailbox = await PostgresMailbox.open(
        f"{postgres_server.url}?schema={schema}", push_timing=PushTiming(grace_s=0, quiet_s=0.001)
    )
    pushes = mailbox.pushes
    assert pushes is not None
    await asyncio.gather(*(mailbox.append(message(f"r{n}")) for n in range(20)))
    one, two, three, *_ = await pushes.claim(limit=20, lease_s=0)
    await pushes.sent(one)
    await pushes.failed(two, retry_s=1)
    await pushes.bury(three, "no answer")
    await pushes.pulled({f"r{n}": 1 for n in range(10)})
    await pushes.purge(limit=5)
    await mailbox.clear("r1")
    await mailbox.close()

    async def scans() -> list[int]:
        """By table, once the mailbox's sessions have ended and reported."""
        rows = await connection.fetch(
            "SELECT seq_scan, idx_scan FROM pg_stat_user_tables"
            " WHERE schemaname = $1 AND relname IN ('pushes', 'dead_pushes')",
            schema,
        )
        return [row["seq_scan"] for row in rows] if all(row["idx_scan"] for row in rows) else []

    # The creation of each index has read the empty table once.
    assert sorted(await wait_until(scans)) == [2, 3]
    await connection.close()

"""A generation that is a day old: acks delete again, what was kept in its first day included."""

from pathlib import Path

import asyncpg

from pokebridge.mailbox.base import YOUNG_MS, Mailbox
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.testing.mailbox_kit import BOB, ManualClock, fill, versions


async def keep_two(mailbox: Mailbox) -> int:
    """Have two acked messages in a young generation; returns the newest version."""
    newest = await mailbox.begin_generation() + 2
    await fill(mailbox, 2)
    await mailbox.ack(BOB, "phone", newest)
    assert await versions(mailbox) == [newest - 1, newest]
    return newest


async def test_in_memory() -> None:
    """The clock moves on by a day."""
    clock = ManualClock()
    mailbox = MemoryMailbox(clock)
    newest = await keep_two(mailbox)
    clock.now_s += YOUNG_MS / 1000
    await mailbox.ack(BOB, "phone", newest)
    assert await versions(mailbox) == []


async def test_in_sqlite(tmp_path: Path) -> None:
    """The same in a file."""
    clock = ManualClock()
    mailbox = await SqliteMailbox.open(str(tmp_path / "m.db"), clock=clock)
    newest = await keep_two(mailbox)
    clock.now_s += YOUNG_MS / 1000
    await mailbox.ack(BOB, "phone", newest)
    assert await versions(mailbox) == []
    await mailbox.close()


async def test_in_postgres(postgres_database: str) -> None:
    """The generation is made a day older, since the database's own clock counts."""
    mailbox = await PostgresMailbox.open(postgres_database)
    newest = await keep_two(mailbox)
    by_hand = await asyncpg.connect(postgres_database)
    await by_hand.execute(
        "UPDATE pokebridge.generation SET base = base - ($1::bigint << 11)", YOUNG_MS
    )
    await by_hand.close()
    await mailbox.ack(BOB, "phone", newest)
    assert await versions(mailbox) == []
    await mailbox.close()

"""What a store refuses of one recipient, as for a damaged page, harms no other."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from pokebridge.errors import MailboxError, MailboxRefusedError
from pokebridge.fallback.push import Pulls
from pokebridge.gateway.acks import Acks
from pokebridge.gateway.verification import Verification
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import Poke
from pokebridge.processor import Processor
from pokebridge.testing.mailbox_kit import BOB, EVE, message, unpoked, versions
from tests.gateway.test_verification import EVERY_S, Session, run
from tests.support import Daemon, wait_until

TIMING = PushTiming(grace_s=600)


@dataclass
class Store:
    """A mailbox with a message for Bob and one for Eve.

    ``refuse(event, table)`` has it refuse an INSERT, an UPDATE or a DELETE of Eve's rows.
    """

    mailbox: SqliteMailbox | PostgresMailbox
    refuse: Callable[[str, str], Awaitable[None]]


@asynccontextmanager
async def sqlite_store(tmp_path: Path) -> AsyncIterator[Store]:
    """In SQLite."""
    path = tmp_path / "mailbox.db"
    mailbox = await SqliteMailbox.open(path, push_timing=TIMING)

    async def refuse(event: str, table: str) -> None:
        row = "new" if event == "INSERT" else "old"
        await asyncio.to_thread(
            change,
            path,
            f"CREATE TRIGGER refuse BEFORE {event} ON {table} WHEN {row}.recipient = '{EVE}'"
            " BEGIN SELECT RAISE(ABORT, 'not hers'); END",
        )

    yield Store(mailbox, refuse)
    await mailbox.close()


def change(path: Path, statement: str) -> None:
    """Do ``statement`` as another program."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(statement)


@asynccontextmanager
async def postgres_store(postgres_database: str) -> AsyncIterator[Store]:
    """In PostgreSQL."""
    mailbox = await PostgresMailbox.open(postgres_database, push_timing=TIMING)
    by_hand = await asyncpg.connect(postgres_database)

    async def refuse(event: str, table: str) -> None:
        row = "new" if event == "INSERT" else "old"
        await by_hand.execute(f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN RAISE EXCEPTION ''not hers''; END';
            CREATE TRIGGER refuse BEFORE {event} ON pokebridge.{table} FOR EACH ROW
                WHEN ({row}.recipient = '{EVE}') EXECUTE FUNCTION refuse()""")

    yield Store(mailbox, refuse)
    await by_hand.close()
    await mailbox.close()


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Either."""
    if request.param == "sqlite":
        opening = sqlite_store(tmp_path)
    else:
        opening = postgres_store(request.getfixturevalue("postgres_database"))
    async with opening as store:
        for recipient in (BOB, EVE):
            await store.mailbox.append(message(recipient))
        yield store


class Publisher:
    """Accepts all pokes."""

    async def publish_now(self, pokes: Sequence[Poke]) -> None:
        """Accept them."""


async def test_one_ack(store: Store) -> None:
    """The others are recorded, and the one is dropped: it would be in the way for ever."""
    await store.refuse("INSERT", "devices")
    acks = Acks(store.mailbox.ack_all)
    for recipient in (EVE, BOB):
        acks.add(recipient, "phone", 1)
    await acks.record()
    assert await versions(store.mailbox, BOB) == []
    assert await versions(store.mailbox, EVE) == [1]
    assert acks.recorded == 1


async def test_one_entry_of_the_outbox(store: Store) -> None:
    """The others' entries are confirmed, and not published again and again with that one."""
    await store.refuse("DELETE", "outbox")
    async with Processor(store.mailbox, Publisher(), sweep_after_s=0.0, sweep_every_s=0.05):

        async def is_confirmed() -> bool:
            return await unpoked(store.mailbox) == {EVE: 1}

        await wait_until(is_confirmed)


async def test_one_pull_that_cancels_a_push(store: Store) -> None:
    """The others' pushes are cancelled."""
    await store.refuse("DELETE", "pushes")
    assert store.mailbox.pushes is not None
    pulls = Pulls(store.mailbox.pushes, tell_every_s=0.0)
    for recipient in (EVE, BOB):
        pulls.note(recipient, 1)
    await pulls.start()

    async def is_cancelled() -> bool:
        return (await store.mailbox.stats()).pushes == 1

    await wait_until(is_cancelled)
    await pulls.close()


async def verify(mailbox: SqliteMailbox | PostgresMailbox, recipients: Sequence[str]) -> set[str]:
    """Verify sessions that were poked for nothing. Returns whose were poked."""
    sessions = [Session(recipient) for recipient in recipients]
    verification = Verification(mailbox.heads, EVERY_S)
    for session in sessions:
        verification.add(session)
    await run(verification, EVERY_S + 5)
    return {session.recipient for session in sessions if session.pokes}


async def test_a_head_that_is_no_number(tmp_path: Path) -> None:
    """What another program has written there keeps nobody else from being verified."""
    mailbox = await SqliteMailbox.open(tmp_path / "mailbox.db")
    for recipient in (BOB, EVE):
        await mailbox.append(message(recipient))
    damage = f"UPDATE heads SET head = 'x' WHERE recipient = '{EVE}'"
    await asyncio.to_thread(change, tmp_path / "mailbox.db", damage)
    assert await verify(mailbox, [EVE, BOB]) == {BOB}
    await mailbox.close()


async def can_be_sent_to(mailbox: PostgresMailbox, recipient: str) -> bool:
    """Whether it can, and is read then; tried again when a busy machine takes too long."""
    while True:
        try:
            await mailbox.append(message(recipient))
            return bool((await mailbox.read(recipient, after=0, limit=1)).messages)
        except MailboxRefusedError:
            return False
        except MailboxError:
            continue


async def test_a_damaged_page(own_postgres_server: Daemon) -> None:
    """Recipients whose heads are on another page are sent to, read and verified."""
    mailbox = await PostgresMailbox.open(own_postgres_server.url)
    recipients = [f"urn:user:{number}" for number in range(120)]
    for each in recipients:
        assert await can_be_sent_to(mailbox, each)
    by_hand = await asyncpg.connect(own_postgres_server.url)
    await by_hand.execute("VACUUM pokebridge.heads")
    rows = await by_hand.fetch("SELECT recipient, ctid::text FROM pokebridge.heads")
    pages: dict[str, str] = {row["recipient"]: row["ctid"] for row in rows}
    file = await by_hand.fetchval("SELECT pg_relation_filepath('pokebridge.heads')")
    await by_hand.close()
    await asyncio.to_thread(own_postgres_server.terminate)
    await asyncio.to_thread(overwrite, own_postgres_server._directory / "data" / file)
    await asyncio.to_thread(own_postgres_server.start)
    whole = {each for each in recipients if not pages[each].startswith("(0,")}
    assert 0 < len(whole) < len(recipients)

    tried = await asyncio.gather(*(can_be_sent_to(mailbox, each) for each in recipients))
    assert {each for each, it_can in zip(recipients, tried, strict=True) if it_can} == whole
    assert await verify(mailbox, recipients) == whole
    await mailbox.close()


def overwrite(file: Path) -> None:
    """Damage the first page of a table."""
    with file.open("r+b") as table:
        table.write(b"\xa5" * 8192)

"""PostgreSQL fails over to a standby: the mailbox goes on there, and nothing is lost or doubled."""

import asyncio
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.model import MAX_VERSION
from pokebridge.testing.mailbox_kit import BOB, fill, head, message, unpoked, versions
from tests.support import Daemon, wait_until
from tests.support.engines import promote, run_standby

# Above the versions of the first generation, below those of a later one.
GENERATION = 1 << 32


async def cut_off(on_standby: Any, primary: Daemon) -> None:
    """Let the standby catch up, then have it follow no more."""
    by_hand = await asyncpg.connect(primary.url)
    written = await by_hand.fetchval("SELECT pg_current_wal_lsn()::text")
    await by_hand.close()

    async def has_caught_up() -> bool:
        caught_up = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
        return bool(await on_standby.fetchval(caught_up, written))

    async def is_cut_off() -> bool:
        return not await on_standby.fetch("SELECT FROM pg_stat_wal_receiver")

    await wait_until(has_caught_up)
    await on_standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    await on_standby.execute("SELECT pg_reload_conf()")
    await wait_until(is_cut_off)


async def test_a_failover_loses_and_doubles_nothing(own_postgres_server: Daemon) -> None:
    """The primary is killed amid appends and its standby promoted: each call is only slow.

    Commits wait for the standby, as they must where a failover may lose none.
    """
    with run_standby(own_postgres_server) as standby:
        by_hand = await asyncpg.connect(own_postgres_server.url)
        await by_hand.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await by_hand.execute("SELECT pg_reload_conf()")

        async def is_followed() -> bool:
            state = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            return bool(await by_hand.fetchval(state))

        await wait_until(is_followed)
        await by_hand.close()
        hosts = f"{own_postgres_server.address},{standby.address}"
        mailbox = await PostgresMailbox.open(f"postgresql://postgres@{hosts}/postgres")
        given: list[int] = []
        enough = [sys.maxsize]  # known once the standby is promoted

        async def send(sender: str) -> None:
            while len(given) < enough[0]:
                new = message(sender=sender)
                given.append((await mailbox.append(new)).version)

        senders = asyncio.gather(*(send(f"urn:user:{n}") for n in range(4)))
        await wait_until(lambda: len(given) > 50)
        await asyncio.to_thread(own_postgres_server.kill)
        promoter = await asyncpg.connect(standby.url)
        await promote(promoter)
        await promoter.close()
        enough[0] = len(given) + 200
        await senders
        before = [version for version in sorted(given) if version < GENERATION]
        after = [version for version in sorted(given) if version > GENERATION]
        assert before == list(range(1, len(before) + 1))
        assert after == list(range(after[0], after[0] + len(after)))
        assert before + after == await versions(mailbox)
        assert await unpoked(mailbox) == {BOB: after[-1]}
        await mailbox.close()


async def test_a_primary_that_stops_answering_is_left(own_postgres_server: Daemon) -> None:
    """Stopped, not dead: it accepts connections and says nothing. The promoted standby is used.

    When it answers again it still takes writes, and the mailbox stays where it is.
    """
    with run_standby(own_postgres_server) as standby:
        hosts = f"{own_postgres_server.address},{standby.address}"
        mailbox = await PostgresMailbox.open(f"postgresql://postgres@{hosts}/postgres")
        await fill(mailbox, 3)
        on_standby = await asyncpg.connect(standby.url)
        await cut_off(on_standby, own_postgres_server)
        stop_all(own_postgres_server, signal.SIGSTOP)
        try:
            await promote(on_standby)
            first = (await mailbox.append(message())).version
            assert first > GENERATION
        finally:
            stop_all(own_postgres_server, signal.SIGCONT)
        await asyncio.gather(*(mailbox.append(message()) for _ in range(20)))
        assert await on_standby.fetchval("SELECT head FROM pokebridge.heads") == first + 20
        await on_standby.close()
        await mailbox.close()


def stop_all(server: Daemon, number: signal.Signals) -> None:
    """Signal the server's processes."""
    process = psutil.Process(server.pid)
    for each in (process, *process.children(recursive=True)):
        each.send_signal(number)


async def test_a_failover_that_loses_commits_gives_no_version_twice(
    own_postgres_server: Daemon,
) -> None:
    """The standby lacks five messages. Later messages are above every client's cursor."""
    with run_standby(own_postgres_server) as standby:
        hosts = f"{own_postgres_server.address},{standby.address}"
        mailbox = await PostgresMailbox.open(f"postgresql://postgres@{hosts}/postgres")
        on_standby = await asyncpg.connect(standby.url)
        await fill(mailbox, 3)
        await cut_off(on_standby, own_postgres_server)
        await fill(mailbox, 5)
        cursor = await head(mailbox, BOB)
        assert cursor == 8
        await asyncio.to_thread(own_postgres_server.kill)
        await promote(on_standby)
        await on_standby.close()
        await fill(mailbox, 4)
        await mailbox.ack(BOB, "phone", cursor)
        page = await mailbox.read(BOB, after=cursor, limit=10)
        assert len(page.messages) == 4
        assert GENERATION < page.messages[0].version < page.version <= MAX_VERSION
        await mailbox.close()


async def test_a_failover_to_a_clock_that_is_behind(postgres_database: str) -> None:
    """Whatever is lost of the generation of a server whose clock was ahead is not given again."""
    mailbox = await PostgresMailbox.open(postgres_database)
    by_hand = await asyncpg.connect(postgres_database)
    await mailbox.begin_generation()
    await by_hand.execute("UPDATE pokebridge.generation SET base = base + (3 * 3600000 << 11)")
    await fill(mailbox, 5)
    newest = await head(mailbox, BOB)
    await by_hand.execute("UPDATE pokebridge.heads SET head = head - 4")
    await mailbox.begin_generation()
    await fill(mailbox, 1)
    assert newest < await head(mailbox, BOB) < MAX_VERSION
    await by_hand.close()
    await mailbox.close()


async def test_a_restored_dump_gives_no_version_twice(postgres_database: str) -> None:
    """Tables that went back in time under a running instance: new messages are above the cursor."""
    mailbox = await PostgresMailbox.open(postgres_database)
    by_hand = await asyncpg.connect(postgres_database)
    tables = ("heads", "messages", "outbox", "receipts", "batches", "generation")
    await fill(mailbox, 3)
    for table in tables:
        await by_hand.execute(f"CREATE TABLE saved_{table} AS TABLE pokebridge.{table}")
    await fill(mailbox, 5)
    async with by_hand.transaction():
        for table in tables:
            await by_hand.execute(f"TRUNCATE pokebridge.{table}")
            await by_hand.execute(f"INSERT INTO pokebridge.{table} TABLE saved_{table}")
    assert await head(mailbox, BOB) == 3
    await fill(mailbox, 7)
    page = await mailbox.read(BOB, after=8, limit=10)
    assert len(page.messages) == 7
    assert page.messages[0].version > GENERATION
    await fill(mailbox, 1)
    assert await head(mailbox, BOB) == page.version + 1
    await by_hand.close()
    await mailbox.close()


@pytest.mark.parametrize("disables_triggers", [False, True])
async def test_rows_restored_in_place(postgres_database: str, *, disables_triggers: bool) -> None:
    """Rows that are replaced in the same tables, generation included, give no version twice."""
    mailbox = await PostgresMailbox.open(postgres_database)
    by_hand = await asyncpg.connect(postgres_database)
    await fill(mailbox, 3)
    names = ("heads", "messages", "outbox", "receipts", "batches", "generation")
    for name in names:
        await by_hand.execute(f"CREATE TABLE saved_{name} AS TABLE pokebridge.{name}")
    await fill(mailbox, 5)
    await by_hand.execute("SET search_path = ''")
    await by_hand.execute("SET session_replication_role = replica")
    async with by_hand.transaction():
        for name in names:
            table = f"pokebridge.{name}"
            if disables_triggers:  # as pg_restore --disable-triggers does
                await by_hand.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL")
            await by_hand.execute(f"DELETE FROM {table}")
            await by_hand.execute(f"INSERT INTO {table} TABLE public.saved_{name}")
            if disables_triggers:
                await by_hand.execute(f"ALTER TABLE {table} ENABLE TRIGGER ALL")
    await fill(mailbox, 7)
    page = await mailbox.read(BOB, after=8, limit=10)
    assert len(page.messages) == 7
    await fill(mailbox, 1)
    await fill(mailbox, 1)
    assert await head(mailbox, BOB) == page.version + 2
    await by_hand.close()
    await mailbox.close()


async def test_a_database_put_back_by_a_rename(postgres_server: Daemon) -> None:
    """A copy of the database (CREATE DATABASE … TEMPLATE) takes its place under the mailbox."""
    name = f"test_{uuid.uuid4().hex}"
    url = postgres_server.url.removesuffix("postgres") + name
    by_hand = await asyncpg.connect(postgres_server.url)
    await by_hand.execute(f"CREATE DATABASE {name}")
    mailbox = await PostgresMailbox.open(url)
    await fill(mailbox, 3)
    end_sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"
    await by_hand.fetch(end_sessions, name)
    await by_hand.execute(f"CREATE DATABASE {name}_copy TEMPLATE {name}")
    await fill(mailbox, 5)
    await by_hand.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await by_hand.execute(f"ALTER DATABASE {name}_copy RENAME TO {name}")
    await fill(mailbox, 7)
    page = await mailbox.read(BOB, after=8, limit=10)
    assert len(page.messages) == 7
    await mailbox.close()
    await by_hand.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await by_hand.close()


async def test_the_servers_files_put_back(own_postgres_server: Daemon, tmp_path: Path) -> None:
    """A copy of the data directory has the same system, timeline and files, and lacks messages."""
    data = own_postgres_server._directory / "data"
    mailbox = await PostgresMailbox.open(own_postgres_server.url)
    await fill(mailbox, 3)
    await asyncio.to_thread(own_postgres_server.terminate)
    await asyncio.to_thread(copy_owned, data, tmp_path / "copy")
    await asyncio.to_thread(own_postgres_server.start)
    await fill(mailbox, 5)
    await asyncio.to_thread(own_postgres_server.terminate)
    await asyncio.to_thread(shutil.rmtree, data)
    await asyncio.to_thread(copy_owned, tmp_path / "copy", data)
    await asyncio.to_thread(own_postgres_server.start)
    assert await head(mailbox, BOB) == 3
    await fill(mailbox, 7)
    page = await mailbox.read(BOB, after=8, limit=10)
    assert len(page.messages) == 7
    await asyncio.to_thread(own_postgres_server.restart)
    await fill(mailbox, 1)
    assert await head(mailbox, BOB) == page.version + 1
    await mailbox.close()


def copy_owned(source: Path, target: Path) -> None:
    """Copy a directory with the owners of its files."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


async def test_a_server_that_turns_read_only_is_left(own_postgres_server: Daemon) -> None:
    """Connections to a server that became a standby are dropped. Appends wait for a primary."""
    mailbox = await PostgresMailbox.open(own_postgres_server.url)
    by_hand = await asyncpg.connect(own_postgres_server.url)

    async def turn_read_only(state: str) -> None:
        await by_hand.execute(f"ALTER SYSTEM SET default_transaction_read_only = {state}")
        await by_hand.execute("SELECT pg_reload_conf()")

    async def is_held_up() -> bool:
        """Whether an append has met the change, which reaches each session in its own time."""
        waiting.append(asyncio.create_task(mailbox.append(message())))

        async def is_done_or_disconnected() -> bool:
            sessions = "SELECT FROM pg_stat_activity WHERE application_name = 'pokebridge'"
            return waiting[-1].done() or not await by_hand.fetch(sessions)

        await wait_until(is_done_or_disconnected)
        return not waiting[-1].done()

    waiting: list[asyncio.Task[Any]] = []
    await mailbox.append(message())
    await turn_read_only("on")
    await wait_until(is_held_up)
    await turn_read_only("off")
    given = [(await call).version for call in waiting]
    assert given == list(range(2, len(given) + 2))
    await by_hand.close()
    await mailbox.close()

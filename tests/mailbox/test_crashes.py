"""PostgreSQL is killed with changes that have not reached its disk: versions go on, none is lost.

Its log is in memory until somebody flushes it, so each test keeps the walwriter from doing that.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.testing.mailbox_kit import BOB, fill, head, message, versions
from tests.support import CutProxy, Daemon, wait_until

UNFLUSHED_ROWS = "CREATE TABLE unflushed AS SELECT generate_series(1, 20000)"


@asynccontextmanager
async def connected(server: Daemon, *settings: str) -> AsyncIterator[Any]:
    """A connection to the server, which flushes its log by itself only every ten seconds."""
    connection = await asyncpg.connect(server.url)
    for setting in ("wal_writer_delay = '10s'", *settings):
        await connection.execute(f"ALTER SYSTEM SET {setting}")
    await connection.execute("SELECT pg_reload_conf()")
    try:
        yield connection
    finally:
        connection.terminate()


async def test_a_repeated_batch_remembers_nothing_that_a_crash_takes(
    own_postgres_server: Daemon,
) -> None:
    """A batch whose answer was lost is found by its second attempt, which flushes nothing.

    The end of the server's log is then another session's, and the crash takes it. That is no step
    back in time: the next version follows the last.
    """
    server = own_postgres_server
    proxy = CutProxy("127.0.0.1", server.port)
    async with proxy, connected(server) as holder, connected(server) as other:
        mailbox = await PostgresMailbox.open(f"postgresql://postgres@{proxy.address}/postgres")
        await fill(mailbox, 1)
        holding = holder.transaction()
        await holding.start()
        await holder.execute("SELECT FROM pokebridge.heads FOR UPDATE")
        append = asyncio.create_task(mailbox.append(message()))

        async def waits() -> bool:
            waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            return bool(await other.fetch(waiting))

        async def is_committed() -> bool:
            return bool(await other.fetch("SELECT FROM pokebridge.heads WHERE head = 2"))

        await wait_until(waits)
        proxy.cut()  # the answer will not arrive
        await holding.commit()
        await wait_until(is_committed)
        await other.execute("BEGIN")
        await other.execute(UNFLUSHED_ROWS)
        proxy.reset()
        proxy.heal()
        assert (await append).version == 2
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await fill(mailbox, 1)
        assert await versions(mailbox) == [1, 2, 3]
        await mailbox.close()


async def test_an_append_is_flushed_where_the_server_would_not(own_postgres_server: Daemon) -> None:
    """With ``synchronous_commit = off`` a crash takes no version that was given out either."""
    server = own_postgres_server
    async with connected(server, "synchronous_commit = off"):
        mailbox = await PostgresMailbox.open(server.url)
        await fill(mailbox, 3)
        await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    assert await head(mailbox, BOB) == 3
    await fill(mailbox, 1)
    assert await versions(mailbox) == [1, 2, 3, 4]
    await mailbox.close()

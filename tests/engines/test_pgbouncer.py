"""PostgreSQL behind Debian's PgBouncer: the mailbox and the coordination store."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import asyncpg
import pytest

from pokebridge.coordination.base import Member
from pokebridge.coordination.postgres import PostgresCoordination
from pokebridge.mailbox.base import Limits
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.model import Receipt
from pokebridge.testing.mailbox_kit import BOB, EVE, fill, message, versions
from tests.support import Daemon, Serve
from tests.support.engines import run_pgbouncer

IGNORED = (
    "ignore_startup_parameters = search_path,statement_timeout,plan_cache_mode,jit,"
    "enable_seqscan,enable_bitmapscan,extra_float_digits"
)
# Fewer connections to the server than the pool has, so transactions of one pool connection
# use several server connections in turn.
SHARED = ("default_pool_size = 3", "max_client_conn = 200")
POOLERS = {
    "session": ("session",),
    "session that ignores": ("session", IGNORED),
    "transaction": ("transaction", *SHARED),
    "transaction that ignores": ("transaction", *SHARED, IGNORED),
}


@pytest.fixture(scope="module")
def poolers(postgres_server: Daemon) -> Iterator[dict[str, Daemon]]:
    """PgBouncers, by their kind."""
    with ExitStack() as running:
        yield {
            kind: running.enter_context(run_pgbouncer(postgres_server, *settings))
            for kind, settings in POOLERS.items()
        }


@pytest.fixture(params=POOLERS)
def pooled(
    request: pytest.FixtureRequest, poolers: dict[str, Daemon], postgres_database: str
) -> str:
    """A database of the test's own, through a PgBouncer."""
    database = postgres_database.rpartition("/")[2]
    return poolers[request.param].url.removesuffix("postgres") + database


@pytest.fixture
async def by_hand(postgres_database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to the same database, past the pooler."""
    connection = await asyncpg.connect(postgres_database)
    yield connection
    await connection.close()


async def test_the_mailbox_works(
    pooled: str, by_hand: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    """Two instances send, read, ack, purge and sweep at once; all tables are in the schema."""
    limits = Limits(max_messages=300, max_share=0.5)
    timing = PushTiming(grace_s=0.001)
    one = await PostgresMailbox.open(pooled, limits=limits, push_timing=timing)
    other = await PostgresMailbox.open(pooled, limits=limits, push_timing=timing)
    try:
        for box in (one, other):
            await box.check()
        calls = [box.append(message(sender=EVE)) for _ in range(75) for box in (one, other)]
        calls += [
            box.append(message(EVE, body=b"1" * 9000)) for _ in range(9) for box in (one, other)
        ]
        sent = await asyncio.gather(*calls)
        assert all(isinstance(receipt, Receipt) for receipt in sent)
        assert await versions(other) == list(range(1, 151))
        assert len(await one.claim_outbox(older_than_s=0, limit=10)) == 2
        await asyncio.gather(*(one.see_device(BOB, f"d{n}") for n in range(20)))
        await asyncio.gather(*(other.ack(BOB, f"d{n}", 100) for n in range(20)))
        assert await versions(one) == list(range(101, 151))
        assert (await other.stats()).messages == 50 + 18
        assert await one.purge(limit=100) == 0
        assert await one.begin_generation() > 2**50
        await fill(other, 1)
        assert (await one.heads([BOB]))[BOB] > 2**50
    finally:
        await one.close()
        await other.close()
    tables = await by_hand.fetch(
        "SELECT DISTINCT schemaname FROM pg_tables"
        " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    )
    assert [row[0] for row in tables] == ["pokebridge"]


async def test_another_isolation_by_default_is_not_ours(
    pooled: str, postgres_database: str, by_hand: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    """A database whose transactions are serializable, with and without the pooler."""
    name = postgres_database.rpartition("/")[2]
    await by_hand.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = serializable")
    for url in (pooled, postgres_database):
        mailbox = await PostgresMailbox.open(url)
        level = await mailbox._pool.run(lambda it: it.fetchval("SHOW transaction_isolation"))
        await mailbox.close()
        assert level == "read committed"


async def test_each_statement_has_the_settings(pooled: str) -> None:
    """What bounds a call and keeps its plan holds on every connection, and stays ours."""
    mailbox = await PostgresMailbox.open(f"{pooled}?schema=own")
    shown = "SELECT current_setting('search_path') || ' ' || current_setting('statement_timeout')"
    shown += " || ' ' || current_setting('plan_cache_mode')"
    try:
        answers = await asyncio.gather(
            *(mailbox._pool.run(lambda it: it.fetchval(shown)) for _ in range(30))
        )
    finally:
        await mailbox.close()
    assert set(answers) == {"own 2500ms force_generic_plan"}
    stranger = await asyncpg.connect(pooled, statement_cache_size=0)
    for _ in range(5):
        assert "own" not in await stranger.fetchval(shown)
    await stranger.close()


async def test_coordination_works(pooled: str) -> None:
    """Members, the document and the lead, of two instances."""
    cluster = uuid.uuid4().hex
    one, other = await asyncio.gather(
        *(PostgresCoordination.connect(pooled, cluster=cluster) for _ in range(2))
    )
    try:
        for store, name in ((one, "a"), (other, "b")):
            member = Member(name, "", name, 1.0, 1)
            await store.renew(member, 30)
        assert [member.id for member in await other.members()] == ["a", "b"]
        assert await one.lead("a", 30)
        assert not await other.lead("b", 30)
        assert await one.write(b"first", None)
        document = await other.read()
        assert document is not None
        assert document.body == b"first"
        assert await other.write(b"second", document.revision)
        await one.leave("a", "a")
        await asyncio.wait_for(other.wait_for_change(5), 30)
    finally:
        await one.close()
        await other.close()


def test_an_instance_serves(pooled: str, serve: Serve, nats_server: Daemon) -> None:
    """With everything behind the pooler a message is sent and pulled."""
    cluster = f"c{uuid.uuid4().hex}"
    instance = serve(
        transport=nats_server.url, mailbox=pooled, coordination=pooled, cluster=cluster
    )
    with instance.http(BOB, "send") as http:
        sent = http.post("/v1/messages", json={"recipient": BOB, "body": "hello"})
        assert sent.status_code == 202
        assert [each["body"] for each in http.get("/v1/messages").json()["messages"]] == ["hello"]

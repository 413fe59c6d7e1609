"""Coordination through PostgreSQL: the contract, outages, permissions, TLS."""

import asyncio
import re
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import certifi
import pytest

from pokebridge.coordination.postgres import _TABLES, PostgresCoordination
from pokebridge.errors import CoordinationError
from pokebridge.testing.coordination import Connect, CoordinationContract, member
from tests.coordination.stores import ConnectTo, LoseData, StoreSuite, connections
from tests.support import Daemon, wait_until
from tests.support.stream_server import relay, stream_server
from tests.transport.certificates import Certificates, make_certificates


@pytest.fixture
async def connect_to() -> AsyncIterator[ConnectTo]:
    """``PostgresCoordination.connect``, closed afterwards."""
    async for connect in connections(PostgresCoordination):
        yield connect


class TestContract(CoordinationContract):
    """The shipped suite, each test for a cluster of its own, in one database: that is quicker."""

    @pytest.fixture
    def connect(self, postgres_server: Daemon, connect_to: ConnectTo) -> Connect:
        """Stores of that cluster."""
        cluster = f"contract-{uuid.uuid4().hex}"
        return lambda: connect_to(postgres_server.url, cluster)


class TestStore(StoreSuite):
    """The suite of all real servers."""

    @pytest.fixture
    def url(self, postgres_database: str) -> str:
        """A database of the test's own."""
        return postgres_database

    @pytest.fixture
    def own_server(self, own_postgres_server: Daemon) -> Daemon:
        """To kill."""
        return own_postgres_server

    @pytest.fixture
    def lose_data(self) -> LoseData:
        """Somebody drops the tables."""

        async def lose_data(server: Daemon) -> None:
            connection = await asyncpg.connect(server.url)
            await connection.execute(
                "DROP TABLE pokebridge_members, pokebridge_documents, pokebridge_leaders"
            )
            await connection.close()

        return lose_data


async def run(url: str, statements: str) -> None:
    """Have the database do ``statements``."""
    connection = await asyncpg.connect(url)
    await connection.execute(statements)
    await connection.close()


async def test_members_that_start_together_make_the_tables_once(
    connect_to: ConnectTo, postgres_database: str
) -> None:
    """A new database and ten first users at once: all of them get their tables."""
    ends = await asyncio.gather(*(connect_to(postgres_database) for _ in range(10)))
    await asyncio.gather(*(end.renew(member(f"m-{number}"), 60) for number, end in enumerate(ends)))
    assert len(await ends[0].members()) == 10


async def test_leases_from_before_the_clock_was_set_back(
    connect_to: ConnectTo, postgres_database: str
) -> None:
    """A dead member is gone, and a dead leader is followed, as if their leases had ended."""
    store = await connect_to(postgres_database)
    await store.renew(member("dead"), 60)
    assert await store.lead("dead", 60)
    for table in ("members", "leaders"):
        later = f"UPDATE pokebridge_{table} SET expires_at = expires_at + interval '3 hours'"
        await run(postgres_database, later)
    await store.renew(member("a"), 60)
    assert await store.members() == [member("a")]
    assert await store.lead("a", 60)


async def test_members_that_a_policy_would_hide_are_told(
    connect_to: ConnectTo, postgres_database: str
) -> None:
    """Under row-level security a call fails with the reason, and no member seems to have left."""
    role = f"bridge_{uuid.uuid4().hex}"
    await run(
        postgres_database,
        f"CREATE ROLE {role} LOGIN; GRANT CREATE, USAGE ON SCHEMA public TO {role}",
    )
    store = await connect_to(postgres_database.replace("//postgres@", f"//{role}@"))
    try:
        await store.renew(member("a"), 60)
        policy = "ALTER TABLE pokebridge_members {} ROW LEVEL SECURITY"
        await run(postgres_database, policy.format("ENABLE ROW LEVEL SECURITY, FORCE"))
        with pytest.raises(CoordinationError, match="row-level security"):
            await store.members()
        await run(postgres_database, policy.format("DISABLE"))
        assert await store.members() == [member("a")]
    finally:
        await store.close()
        await run(postgres_database, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_the_documented_permissions_are_enough(
    connect_to: ConnectTo, postgres_database: str
) -> None:
    """Where the tables of docs/coordination.md are, a role needs to read and write rows only."""
    page = (Path(__file__).parents[2] / "docs/coordination.md").read_text()
    tables = re.search(r"( {4}CREATE TABLE .*?;\n)\n", page, re.DOTALL)
    assert tables is not None
    assert tables[1].split() == _TABLES.replace("IF NOT EXISTS ", "").split()
    await run(postgres_database, tables[1])
    role = f"bridge_{uuid.uuid4().hex}"
    await run(
        postgres_database,
        f"""
        CREATE ROLE {role} LOGIN;
        REVOKE ALL ON SCHEMA public FROM PUBLIC;
        GRANT USAGE ON SCHEMA public TO {role};
        GRANT SELECT, INSERT, UPDATE, DELETE
            ON pokebridge_members, pokebridge_documents, pokebridge_leaders TO {role};
        """,
    )
    try:
        store = await connect_to(postgres_database.replace("//postgres@", f"//{role}@"))
        await store.renew(member("a"), 60)
        assert await store.members() == [member("a")]
        assert await store.write(b"x", None)
        document = await store.read()
        assert document is not None
        assert await store.write(b"y", document.revision)
        assert await store.lead("a", 60)
        await store.resign("a")
        await store.leave("a", "1")
        await run(postgres_database, f"REVOKE INSERT ON pokebridge_members FROM {role}")
        with pytest.raises(CoordinationError, match="permission denied for table pokebridge_mem"):
            await store.renew(member("a"), 60)
        await store.close()
    finally:
        await run(postgres_database, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_mute_first_host_gives_way_to_the_second(
    connect_to: ConnectTo, postgres_database: str
) -> None:
    """A first host that accepts connections and never answers causes no outage."""
    address = urlsplit(postgres_database).netloc.rpartition("@")[2]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        hosts = f"127.0.0.1:{mute.getsockname()[1]},{address}"
        store = await connect_to(postgres_database.replace(address, hosts))
        await store.renew(member("a"), 60)
        assert await store.members() == [member("a")]


async def test_rows_of_the_dead_are_swept_when_somebody_starts(
    connect_to: ConnectTo, postgres_database: str
) -> None:
    """Rows of dead instances with random names are deleted."""
    store = await connect_to(postgres_database)
    await store.renew(member("dead"), 0.01)
    await store.renew(member("a"), 60)

    async def is_swept() -> bool:
        await (await connect_to(postgres_database)).close()
        connection = await asyncpg.connect(postgres_database)
        rows = await connection.fetch("SELECT id FROM pokebridge_members")
        await connection.close()
        return [row["id"] for row in rows] == ["a"]

    await wait_until(is_swept)


async def test_a_lease_is_not_longer_in_the_database_than_its_holder_believes(
    connect_to: ConnectTo, postgres_database: str
) -> None:
    """A candidate that had to wait for the row judges the lease by the time when it got it."""
    one, two = await connect_to(postgres_database), await connect_to(postgres_database)
    assert await one.lead("a", 0.3)
    holding = await asyncpg.connect(postgres_database)
    transaction = holding.transaction()
    await transaction.start()
    await holding.execute("SELECT * FROM pokebridge_leaders FOR UPDATE")
    candidate = asyncio.create_task(two.lead("b", 60))
    expired = "SELECT expires_at < clock_timestamp() FROM pokebridge_leaders"
    await wait_until(lambda: holding.fetchval(expired))
    assert not candidate.done()
    await transaction.rollback()
    assert await candidate
    await holding.close()


@asynccontextmanager
async def tls_in_front(database: str, made: Certificates) -> AsyncIterator[str]:
    """A server that speaks PostgreSQL's TLS before ``database``: its URL, without options.

    The server that the tests start was built without TLS.
    """
    context = made.server_tls()
    target = urlsplit(database)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(8) == b"\0\0\0\x08\x04\xd2\x16\x2f", "SSLRequest"
        writer.write(b"S")
        await writer.start_tls(context)  # an OSError if the client does not trust the certificate
        assert target.hostname is not None
        assert target.port is not None
        await relay(reader, writer, target.port, host=target.hostname)

    async with stream_server(accept) as port:
        yield database.replace(f":{target.port}/", f":{port}/")


async def test_tls_is_by_the_url(
    connect_to: ConnectTo, postgres_database: str, tmp_path: Path
) -> None:
    """``sslmode`` insists on TLS, and on a server that the authority in the URL vouches for."""
    made = make_certificates(tmp_path)
    async with tls_in_front(postgres_database, made) as url:
        store = await connect_to(f"{url}?sslmode=verify-full&sslrootcert={made.ca_file}")
        await store.renew(member("a"), 60)
        await store.close()
        with pytest.raises(CoordinationError, match="certificate verify failed"):
            await connect_to(f"{url}?sslmode=verify-full&sslrootcert={certifi.where()}")
    with pytest.raises(CoordinationError, match="SSL"):
        await connect_to(f"{postgres_database}?sslmode=require")

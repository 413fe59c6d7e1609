"""Coordination through PostgreSQL: three small tables, timed by the database's clock.

pokebridge_members      one row for each member, with the end of its lease
pokebridge_documents    one row for each cluster: the shared document and its revision
pokebridge_leaders      one row for each cluster: the leader and the end of its lease

Every row names its cluster, so that several clusters can share a database. Each statement is its
own transaction. ``clock_timestamp()`` times the leases: unlike ``now()`` it advances while a
statement waits for a row, so no lease is longer in the database than its holder believes.

Changes are polled for. ``NOTIFY`` would report them sooner, but it needs a connection that only
listens, which poolers such as PgBouncer do not support.
"""

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import asyncpg
import msgspec

from pokebridge.coordination.base import Document, Member
from pokebridge.coordination.store_connection import (
    DIAL_TIMEOUT_S,
    StoreConnection,
    decode_all,
    encode,
)
from pokebridge.engines import text_of
from pokebridge.engines.postgres import Connection, PostgresDialler
from pokebridge.engines.urls import check_engine_url, without_secrets
from pokebridge.errors import ConfigError

T = TypeVar("T")

# How late a change is noticed.
POLL_S = 0.5
_CLOSE_TIMEOUT_S = 1.0

_TABLES = """
CREATE TABLE IF NOT EXISTS pokebridge_members (
    cluster text, id text, incarnation text NOT NULL, standing text NOT NULL, record json NOT NULL,
    expires_at timestamptz NOT NULL, PRIMARY KEY (cluster, id));
CREATE TABLE IF NOT EXISTS pokebridge_documents (
    cluster text PRIMARY KEY, revision bigint NOT NULL, body bytea NOT NULL);
CREATE TABLE IF NOT EXISTS pokebridge_leaders (
    cluster text PRIMARY KEY, holder text NOT NULL, expires_at timestamptz NOT NULL);
"""
_MISSING = """
SELECT to_regclass('pokebridge_members') IS NULL OR to_regclass('pokebridge_documents') IS NULL
    OR to_regclass('pokebridge_leaders') IS NULL
"""
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('pokebridge coordination', 0))"

# A lease that would last for more than an hour has ended: the server's clock was set back, or is
# behind that of the server before.
_LASTS = "expires_at BETWEEN clock_timestamp() AND clock_timestamp() + interval '1 hour'"
# Deletes expired rows, skipping those that another instance is deleting.
_SWEEP = f"""
DELETE FROM pokebridge_members WHERE (cluster, id) IN (
    SELECT cluster, id FROM pokebridge_members
    WHERE cluster = $1 AND NOT {_LASTS} FOR UPDATE SKIP LOCKED)
"""  # noqa: S608 - ours
_RENEW = """
INSERT INTO pokebridge_members VALUES ($1, $2, $3, $4, $5, clock_timestamp() + $6::interval)
ON CONFLICT (cluster, id) DO UPDATE SET
    incarnation = excluded.incarnation, standing = excluded.standing, record = excluded.record,
    expires_at = clock_timestamp() + $6::interval
"""
_LEAVE = "DELETE FROM pokebridge_members WHERE cluster = $1 AND id = $2 AND incarnation = $3"
_MEMBERS = f"""
SELECT record FROM pokebridge_members WHERE cluster = $1 AND {_LASTS} ORDER BY id COLLATE "C"
"""  # noqa: S608 - ours
_READ = "SELECT body, revision FROM pokebridge_documents WHERE cluster = $1"
# The first revision is the time in µs. So when a document was lost and is created again, no
# revision is used a second time.
_CREATE = """
INSERT INTO pokebridge_documents
VALUES ($1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, $2)
ON CONFLICT DO NOTHING RETURNING true
"""
_REPLACE = """
UPDATE pokebridge_documents SET revision = revision + 1, body = $2
WHERE cluster = $1 AND revision = $3 RETURNING true
"""
_LEAD = f"""
INSERT INTO pokebridge_leaders AS held VALUES ($1, $2, clock_timestamp() + $3::interval)
ON CONFLICT (cluster) DO UPDATE
    SET holder = excluded.holder, expires_at = clock_timestamp() + $3::interval
    WHERE held.holder = excluded.holder OR NOT held.{_LASTS}
RETURNING true
"""  # noqa: S608 - ours
_RESIGN = "DELETE FROM pokebridge_leaders WHERE cluster = $1 AND holder = $2"
_STATE = f"""
SELECT (SELECT revision FROM pokebridge_documents WHERE cluster = $1),
    (SELECT md5(string_agg(standing, ' ' ORDER BY id)) FROM pokebridge_members
     WHERE cluster = $1 AND {_LASTS})
"""  # noqa: S608 - ours

_members = msgspec.json.Decoder(Member)


class PostgresCoordination:
    """Coordination in tables, over one connection. Create it with :meth:`connect`."""

    is_shared = True
    is_static = False

    def __init__(
        self, dialler: PostgresDialler, connection: StoreConnection[Connection], cluster: str
    ) -> None:
        self._dialler = dialler
        self._connection = connection
        self._cluster = cluster
        self._seen: asyncpg.Record | None = None

    @classmethod
    async def connect(cls, url: str, *, cluster: str) -> Self:
        """Connect to the database, and create missing tables.

        Args:
            url: a libpq URL, ``postgresql://user:password@host:port/database``, with options such
                as ``sslmode=verify-full`` and ``sslrootcert=FILE`` after a ``?``. Several hosts,
                ``host:port,host:port``, are in order of preference.
            cluster: the cluster's name.

        Raises:
            ConfigError: the URL is invalid.
            CoordinationError: the database is unavailable, or refuses.
        """
        check_engine_url("coordination", url)
        if urlsplit(url).scheme not in {"postgresql", "postgres"}:
            raise ConfigError("the coordination URL must be postgresql://USER@HOST:PORT/DATABASE")
        dialler = PostgresDialler(
            "coordination",
            url,
            timeout_s=DIAL_TIMEOUT_S,
            settings={"row_security": "off"},  # an error, not members that a policy hides
            server_settings={"application_name": f"pokebridge {cluster}"},
        )
        connection = StoreConnection(
            without_secrets(url),
            dial=partial(_dial, dialler, cluster),
            is_up=lambda connection: not connection.is_closed(),
            hang_up=_hang_up,
            failures=(
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ),
            text_of=text_of,
        )
        store = cls(dialler, connection, cluster)
        try:
            store._seen = await store._row(_STATE)
        except BaseException:
            await store.close()
            raise
        return store

    async def renew(self, member: Member, lease_s: float) -> None:
        """Store ``member``'s record, with a lease of ``lease_s`` seconds from now."""
        standing = encode(member.standing).decode()
        record = encode(member).decode()
        await self._row(
            _RENEW, member.id, member.incarnation, standing, record, dt.timedelta(seconds=lease_s)
        )

    async def leave(self, member_id: str, incarnation: str) -> None:
        """End the lease, unless another incarnation has taken over."""
        await self._row(_LEAVE, member_id, incarnation)

    async def members(self) -> list[Member]:
        """Return the members whose lease lasts, ordered by id."""
        rows = await self._call(lambda connection: connection.fetch(_MEMBERS, self._cluster))
        return decode_all(_members, (row["record"] for row in rows))

    async def read(self) -> Document | None:
        """Return the shared document."""
        row = await self._row(_READ)
        return None if row is None else Document(row["body"], row["revision"])

    async def write(self, body: bytes, revision: int | None) -> bool:
        """Replace the document if its revision is ``revision``."""
        if revision is None:
            return await self._row(_CREATE, body) is not None
        return await self._row(_REPLACE, body, revision) is not None

    async def lead(self, holder: str, lease_s: float) -> bool:
        """Lead, or go on leading, unless another holder leads."""
        return await self._row(_LEAD, holder, dt.timedelta(seconds=lease_s)) is not None

    async def resign(self, holder: str) -> None:
        """Stop leading, if ``holder`` leads."""
        await self._row(_RESIGN, holder)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Poll every :data:`POLL_S` for a change, for at most ``timeout_s`` seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while (left_s := until - loop.time()) > 0:
            seen = await self._row(_STATE)
            if seen != self._seen:
                self._seen = seen
                return
            await asyncio.sleep(min(POLL_S, left_s))

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._connection.close()

    async def _row(self, statement: str, *values: Any) -> asyncpg.Record | None:
        """Return the first row of ``statement``, whose first parameter is the cluster."""
        return await self._call(
            lambda connection: connection.fetchrow(statement, self._cluster, *values)
        )

    async def _call(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        return await self._connection.call(lambda connection: self._dialler.run(connection, work))


async def _dial(dialler: PostgresDialler, cluster: str) -> Connection:
    connection = await dialler.connect()
    try:
        await dialler.run(connection, partial(_prepare, cluster))
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _prepare(cluster: str, connection: Connection) -> None:
    if await connection.fetchval(_MISSING):
        async with connection.transaction():
            await connection.execute(_LOCK)  # CREATE IF NOT EXISTS fails when two run at once
            await connection.execute(_TABLES)
    await connection.execute(_SWEEP, cluster)


async def _hang_up(connection: Connection) -> None:
    try:
        await connection.close(timeout=_CLOSE_TIMEOUT_S)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        connection.terminate()

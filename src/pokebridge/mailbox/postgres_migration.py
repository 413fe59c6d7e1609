"""Brings the schema of a PostgreSQL mailbox up to date, and checks that it is whole.

The migrations are counted in two tables: ``migrations`` those that earlier releases can't work
with, ``additions`` those that they can work with.
"""

from typing import Final

from pokebridge.engines.postgres import Connection
from pokebridge.errors import ConfigError, MailboxError
from pokebridge.mailbox.postgres_additions import ADDITIONS
from pokebridge.mailbox.postgres_schema import CHECK, MIGRATION_LOCK, MIGRATIONS, TOUCH

MIGRATION_TIMEOUT_S: Final = 600.0
# From the catalogues, since to_regclass() may not see yet what another session has just created.
SCHEMA_EXISTS: Final = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)"
TABLE_EXISTS: Final = """
SELECT EXISTS (
    SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = $1 AND relname = $2
)
"""


async def migrate(connection: Connection, schema: str) -> None:
    """Apply the missing migrations in one transaction, under an advisory lock.

    Raises:
        ConfigError: a newer release has written the schema.
    """

    async def execute(statement: str, *parameters: object) -> None:
        await connection.execute(statement, *parameters, timeout=MIGRATION_TIMEOUT_S)

    async with connection.transaction():
        await execute(f"SET LOCAL statement_timeout = '{MIGRATION_TIMEOUT_S:.0f}s'")
        await execute("SET LOCAL lock_timeout = 0")
        await execute(f"SET LOCAL search_path = {schema}")
        await execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        done = await _count_done(connection, schema, "migrations")
        if done > len(MIGRATIONS):
            raise ConfigError(
                f"mailbox: the schema {schema} was written by a newer release of pokebridge:"
                " upgrade this one"
            )
        if done == 0 and not await connection.fetchval(SCHEMA_EXISTS, schema):
            await execute(f"CREATE SCHEMA {schema}")
        for table, all_statements in (("migrations", MIGRATIONS), ("additions", ADDITIONS)):
            done = await _count_done(connection, schema, table)
            if done == 0:
                await execute(
                    f"CREATE TABLE {table}"
                    " (version integer PRIMARY KEY, done_at timestamptz NOT NULL)"
                )
            for version, statements in enumerate(all_statements[done:], done + 1):
                await execute(statements)
                await execute(f"INSERT INTO {table} VALUES ($1, now())", version)  # noqa: S608 - ours


async def is_up_to_date(connection: Connection, schema: str) -> bool:
    """Whether ``schema`` needs no migration."""
    if await _count_done(connection, schema, "migrations") != len(MIGRATIONS):
        return False
    return await _count_done(connection, schema, "additions") >= len(ADDITIONS)


async def _count_done(connection: Connection, schema: str, table: str) -> int:
    if not await connection.fetchval(TABLE_EXISTS, schema, table):
        return 0
    newest = f"SELECT coalesce(max(version), 0) FROM {schema}.{table}"  # noqa: S608 - ours
    done: int = await connection.fetchval(newest)
    return done


async def check(connection: Connection) -> None:
    """Return when the schema is whole, and everything in it can be seen and written.

    Raises:
        MailboxError: it is not.
    """
    (row,) = await connection.fetch(CHECK)
    is_read_only, has_policies, has_tables, has_functions = row
    if is_read_only:
        raise MailboxError("PostgreSQL: it is read-only, as a standby is")
    if has_policies:
        raise MailboxError("PostgreSQL: row-level security applies to this role")
    if not has_tables:
        raise MailboxError("PostgreSQL: tables, or privileges on them, are missing")
    if not has_functions:
        raise MailboxError("PostgreSQL: functions, or privileges on them, are missing")
    await connection.execute(TOUCH)

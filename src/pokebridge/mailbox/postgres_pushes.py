"""The pending pushes of a PostgreSQL mailbox. A row with a NULL ``due_ms`` has none pending."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pokebridge.mailbox.postgres_pool import PostgresPool
from pokebridge.mailbox.pushes import DEAD_KEPT_MS, OwedPush, PushTiming

# Concurrent claims never return the same push, since each skips the rows that another has locked.
CLAIM: Final = """
WITH due AS MATERIALIZED (
    SELECT recipient FROM pushes WHERE due_ms <= now_ms($3)
    ORDER BY due_ms LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE pushes SET due_ms = now_ms($3) + $2, attempts = attempts + 1
FROM due WHERE pushes.recipient = due.recipient
RETURNING pushes.recipient, first, version, since_ms, attempts
"""
PULLED: Final = """
WITH pulled AS MATERIALIZED (
    SELECT pushes.recipient, given.version,
        pushes.version <= given.version AND quiet_until_ms <= now_ms($4) AS is_over
    FROM unnest($1::text[], $2::bigint[]) AS given (recipient, version)
    JOIN pushes USING (recipient)
    WHERE due_ms IS NOT NULL AND first <= given.version
    ORDER BY pushes.recipient FOR NO KEY UPDATE OF pushes
), dropped AS (
    DELETE FROM pushes USING pulled WHERE pushes.recipient = pulled.recipient AND is_over
)
UPDATE pushes SET first = pulled.version + 1, since_ms = now_ms($4), attempts = 0,
    due_ms = CASE WHEN pushes.version > pulled.version
        THEN greatest(now_ms($4) + $3, quiet_until_ms) END
FROM pulled WHERE pushes.recipient = pulled.recipient AND NOT is_over
"""
SETTLE: Final = "SELECT settle_push($1, $2, $3, $4, $5)"
FAILED: Final = """
UPDATE pushes SET due_ms = now_ms($4) + $3
WHERE recipient = $1 AND first = $2 AND due_ms IS NOT NULL
"""
BURY: Final = """
WITH buried AS (
    INSERT INTO dead_pushes VALUES ($1, $6, $2, $7, $8, $9, now_ms($5)) ON CONFLICT DO NOTHING
)
SELECT settle_push($1, $2, $3, $4, $5)
"""
PURGE: Final = "SELECT purge_pushes($1, $2, $3)"


class PostgresPushes:
    """The queue, on the connections of its mailbox."""

    def __init__(
        self, pool: PostgresPool, timing: PushTiming, now_ms: Callable[[], int | None]
    ) -> None:
        self.timing = timing
        self._pool = pool
        self._now_ms = now_ms

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[OwedPush]:
        """See the port."""
        parameters = (limit, int(lease_s * 1000), self._now_ms())
        rows = await self._pool.run(lambda connection: connection.fetch(CLAIM, *parameters))
        return [OwedPush(*row) for row in rows]

    async def pulled(self, versions: Mapping[str, int]) -> None:
        """See the port."""
        await self._do(PULLED, list(versions), list(versions.values()), self.timing.grace_ms)

    async def sent(self, push: OwedPush) -> None:
        """See the port."""
        await self._do(SETTLE, *self._settled(push))

    async def failed(self, push: OwedPush, *, retry_s: float) -> None:
        """See the port."""
        await self._do(FAILED, push.recipient, push.first, int(retry_s * 1000))

    async def bury(self, push: OwedPush, reason: str) -> None:
        """See the port."""
        record = (push.first, push.since_ms, push.attempts, reason)
        parameters = (*self._settled(push), self._now_ms(), *record)
        await self._pool.run(lambda connection: connection.execute(BURY, *parameters))

    async def purge(self, *, limit: int) -> int:
        """See the port."""
        parameters = (limit, DEAD_KEPT_MS, self._now_ms())
        purged: int = await self._pool.run(
            lambda connection: connection.fetchval(PURGE, *parameters)
        )
        return purged

    def _settled(self, push: OwedPush) -> tuple[str, int, int, int]:
        return push.recipient, push.version, self.timing.quiet_ms, self.timing.next_ms

    async def _do(self, statement: str, *parameters: object) -> None:
        given = (*parameters, self._now_ms())
        await self._pool.run(lambda connection: connection.execute(statement, *given))

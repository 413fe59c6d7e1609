"""The pending pushes of a SQLite mailbox. A row with a NULL ``due_ms`` has no push pending."""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pokebridge.mailbox.pushes import DEAD_KEPT_MS, OwedPush, PushTiming
from pokebridge.mailbox.sqlite_workers import WorkerPool, is_intact

TABLES: Final = (
    """CREATE TABLE pushes (
        recipient TEXT PRIMARY KEY,
        first INTEGER NOT NULL,
        version INTEGER NOT NULL,
        since_ms INTEGER NOT NULL,
        due_ms INTEGER,
        attempts INTEGER NOT NULL,
        quiet_until_ms INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX pushes_by_due ON pushes (due_ms) WHERE due_ms IS NOT NULL",
    "CREATE INDEX pushes_by_quiet ON pushes (quiet_until_ms) WHERE due_ms IS NULL",
    """CREATE TABLE dead_pushes (
        recipient TEXT NOT NULL,
        first INTEGER NOT NULL,
        version INTEGER NOT NULL,
        since_ms INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        reason TEXT NOT NULL,
        at_ms INTEGER NOT NULL,
        PRIMARY KEY (recipient, first)
    ) WITHOUT ROWID""",
    "CREATE INDEX dead_pushes_by_age ON dead_pushes (at_ms)",
)

_COLUMNS: Final = "recipient, first, version, since_ms, attempts"
_DUE: Final = "SELECT recipient FROM pushes WHERE due_ms <= ? ORDER BY due_ms LIMIT ?"


def owe(
    db: sqlite3.Connection, recipient: str, version: int, timing: PushTiming, now_ms: int
) -> None:
    """Make a push pending for a message that is committed in this transaction."""
    db.execute(
        "INSERT INTO pushes VALUES (?1, ?2, ?2, ?3, ?3 + ?4, 0, 0)"
        " ON CONFLICT (recipient) DO UPDATE SET version = ?2,"
        " first = iif(due_ms IS NULL, ?2, first), since_ms = iif(due_ms IS NULL, ?3, since_ms),"
        " attempts = iif(due_ms IS NULL, 0, attempts),"
        " due_ms = coalesce(due_ms, max(?3 + ?4, quiet_until_ms))",
        (recipient, version, now_ms, timing.grace_ms),
    )


class SqlitePushes:
    """The queue, on the worker pools of its mailbox."""

    def __init__(
        self, writes: WorkerPool, reads: WorkerPool, timing: PushTiming, now_ms: Callable[[], int]
    ) -> None:
        self.timing = timing
        self._writes = writes
        self._reads = reads
        self._now_ms = now_ms

    async def claim(self, *, limit: int, lease_s: float) -> Sequence[OwedPush]:
        """See the port."""
        # Usually nothing is due, and a read does not wait for the writer.
        if not await self._reads.do(lambda db: _are_due(db, self._now_ms())):
            return []
        lease_ms = int(lease_s * 1000)
        return await self._writes.do(lambda db: _claim(db, limit, lease_ms, self._now_ms()))

    async def pulled(self, versions: Mapping[str, int]) -> None:
        """See the port."""
        owed = await self._reads.do(lambda db: [one for one in versions if _is_owed(db, one)])
        if owed:
            pulls = [(recipient, versions[recipient]) for recipient in owed]
            await self._writes.do(lambda db: _pulled(db, pulls, self.timing, self._now_ms()))

    async def sent(self, push: OwedPush) -> None:
        """See the port."""
        await self._writes.do(lambda db: _settle(db, push, self.timing, self._now_ms()))

    async def failed(self, push: OwedPush, *, retry_s: float) -> None:
        """See the port."""
        due_ms = self._now_ms() + int(retry_s * 1000)
        await self._writes.do(
            lambda db: db.execute(
                "UPDATE pushes SET due_ms = ?"
                " WHERE recipient = ? AND first = ? AND due_ms IS NOT NULL",
                (due_ms, push.recipient, push.first),
            )
        )

    async def bury(self, push: OwedPush, reason: str) -> None:
        """See the port."""

        def bury(db: sqlite3.Connection) -> None:
            now_ms = self._now_ms()
            db.execute(
                "INSERT OR IGNORE INTO dead_pushes VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*push, reason, now_ms),
            )
            _settle(db, push, self.timing, now_ms)

        await self._writes.do(bury)

    async def purge(self, *, limit: int) -> int:
        """See the port."""
        return await self._writes.do(lambda db: _purge(db, limit, self._now_ms()))


def _are_due(db: sqlite3.Connection, now_ms: int) -> bool:
    return db.execute(_DUE, (now_ms, 1)).fetchone() is not None


def _claim(db: sqlite3.Connection, limit: int, lease_ms: int, now_ms: int) -> list[OwedPush]:
    rows = db.execute(
        f"UPDATE pushes SET due_ms = ? + ?, attempts = attempts + 1 WHERE recipient IN ({_DUE})"  # noqa: S608 - ours
        f" RETURNING {_COLUMNS}, CAST(recipient AS BLOB)",
        (now_ms, lease_ms, now_ms, limit),
    )
    pushes: list[OwedPush] = []
    for *columns, raw in rows.fetchall():
        push = OwedPush(*columns)
        if is_intact(push.recipient, raw) and isinstance(push.version, int):
            pushes.append(push)
        else:
            _set_aside(db, raw, now_ms)
    return pushes


def _set_aside(db: sqlite3.Connection, raw: bytes, now_ms: int) -> None:
    """Bury what another program has damaged. Its row could not be found by what was read of it."""
    where = "FROM pushes WHERE CAST(recipient AS BLOB) = ?"
    reason = "the recipient is no UTF-8, or the version no number"
    db.execute(
        f"INSERT OR IGNORE INTO dead_pushes SELECT {_COLUMNS}, ?, ? {where}",
        (reason, now_ms, raw),
    )
    db.execute(f"DELETE {where}", (raw,))


def _is_owed(db: sqlite3.Connection, recipient: str) -> bool:
    row = db.execute(
        "SELECT 1 FROM pushes WHERE recipient = ? AND due_ms IS NOT NULL", (recipient,)
    ).fetchone()
    return row is not None


def _pulled(
    db: sqlite3.Connection, pulls: Sequence[tuple[str, int]], timing: PushTiming, now_ms: int
) -> None:
    """Cancel pushes for what was pulled. For newer messages the grace starts now."""
    owed = "recipient = ?1 AND due_ms IS NOT NULL AND first <= ?2"
    for pull in pulls:
        db.execute(
            f"DELETE FROM pushes WHERE {owed} AND version <= ?2 AND quiet_until_ms <= ?3",  # noqa: S608 - ours
            (*pull, now_ms),
        )
        db.execute(
            "UPDATE pushes SET first = ?2 + 1, since_ms = ?3, attempts = 0,"  # noqa: S608 - ours
            " due_ms = iif(version <= ?2, NULL, max(?3 + ?4, quiet_until_ms))"
            f" WHERE {owed}",
            (*pull, now_ms, timing.grace_ms),
        )


def _settle(db: sqlite3.Connection, push: OwedPush, timing: PushTiming, now_ms: int) -> None:
    """Start the quiet period. Newer messages lead to another push after it.

    The row may be gone or be about newer messages, when a pull came before the receiver's answer.
    """
    db.execute(
        "INSERT INTO pushes VALUES (?1, ?2, ?2, ?3, NULL, 0, ?3 + ?4)"
        " ON CONFLICT (recipient) DO UPDATE SET quiet_until_ms = excluded.quiet_until_ms,"
        " due_ms = CASE WHEN due_ms IS NULL OR version <= ?2 THEN NULL"
        " WHEN first <= ?2 THEN ?3 + ?5 ELSE max(due_ms, ?3 + ?4) END,"
        " since_ms = iif(first <= ?2, ?3, since_ms), attempts = iif(first <= ?2, 0, attempts),"
        " first = max(first, ?2 + 1)",
        (push.recipient, push.version, now_ms, timing.quiet_ms, timing.next_ms),
    )


def _purge(db: sqlite3.Connection, limit: int, now_ms: int) -> int:
    over = db.execute(
        "DELETE FROM pushes WHERE recipient IN (SELECT recipient FROM pushes"
        " WHERE due_ms IS NULL AND quiet_until_ms <= ? LIMIT ?)",
        (now_ms, limit),
    ).rowcount
    old = db.execute(
        "DELETE FROM dead_pushes WHERE (recipient, first) IN"
        " (SELECT recipient, first FROM dead_pushes WHERE at_ms <= ? LIMIT ?)",
        (now_ms - DEAD_KEPT_MS, limit - over),
    ).rowcount
    return over + old

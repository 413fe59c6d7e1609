"""The mailbox in one SQLite file, for one machine. Several processes may share the file.

All writes of a process go through one thread. Calls that arrive during a commit share the next
transaction (group commit), so a flush of the disk serves many calls under load. Reads have a few
threads of their own. In WAL mode they never wait for the writer. Another thread copies the
write-ahead log into the file.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from pokebridge.errors import MailboxError
from pokebridge.mailbox import sqlite_generation as generation
from pokebridge.mailbox.base import (
    FORGET_BATCH,
    MAX_DEVICES,
    PAGE_BYTES,
    RECEIPT_KEPT_MS,
    SEEN_EVERY_MS,
    Limits,
    MailboxStats,
    RecipientStats,
    Wanted,
    is_young,
)
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.mailbox.sqlite_checkpoints import Checkpointer
from pokebridge.mailbox.sqlite_file import objects, open_file, pragma
from pokebridge.mailbox.sqlite_guard import FileGuard
from pokebridge.mailbox.sqlite_pages import READ_BATCH, head_of, read_page
from pokebridge.mailbox.sqlite_pushes import SqlitePushes, owe
from pokebridge.mailbox.sqlite_workers import (
    Job,
    Outcome,
    WorkerPool,
    commit_together,
    do_each,
    is_intact,
)
from pokebridge.model import MAX_VERSION, Ack, NewMessage, Page, Poke, Receipt

# Jobs that the writer takes at once, as one transaction.
WRITE_BATCH: Final = 512
# Pages that a purge gives back to the disk when more than a quarter of the file is free.
VACUUM_PAGES: Final = 1024
_ACKED = "max(0, min(?3, ifnull((SELECT head FROM heads WHERE recipient = ?1), 0)))"
SEE_KNOWN: Final = (
    f"UPDATE devices SET acked = max(acked, {_ACKED}),"  # noqa: S608 - ours
    " seen_ms = iif(seen_ms <= ?5, ?4, seen_ms) WHERE recipient = ?1 AND device = ?2"
)
SEE_NEW: Final = f"INSERT INTO devices VALUES (?1, ?2, {_ACKED}, ?4)"  # noqa: S608 - ours
# Every device but ?2 and the ?3 others that were seen last.
FORGET_OLDEST: Final = """
DELETE FROM devices WHERE recipient = ?1 AND device IN (
    SELECT device FROM devices WHERE recipient = ?1 AND device <> ?2
    ORDER BY seen_ms DESC LIMIT -1 OFFSET ?3
)
"""
# The messages that every known device has acked. Without a device: none.
DELETE_ACKED: Final = (
    "DELETE FROM messages WHERE recipient = ?1"
    " AND version <= (SELECT min(acked) FROM devices WHERE recipient = ?1)"
)
# Writes more than the largest message and its row.
PROBE: Final = "INSERT OR REPLACE INTO probe VALUES (1, zeroblob(?))"
PROBE_BYTES: Final = 72 * 1024


class SqliteMailbox:
    """The mailbox in one SQLite file. Create it with :meth:`open`, on the loop that will use it.

    - ``pushes``: the pending pushes, or ``None``
    - ``identity``: the same for all that have this file
    - ``_writes``, ``_reads``: the threads
    - ``_checkpointer``: copies the write-ahead log into the file
    - ``_guard``: watches the file
    - ``_clock``: gives Unix time in seconds
    - ``_limits``: the limits of each recipient
    - ``_push_timing``: when pushes are due; ``None`` when there are none
    """

    is_shared = True

    def __init__(
        self,
        writer: sqlite3.Connection,
        checkpointer: sqlite3.Connection,
        readers: Sequence[sqlite3.Connection],
        guard: FileGuard,
        clock: Callable[[], float],
        limits: Limits,
        push_timing: PushTiming | None,
    ) -> None:
        self._guard = guard
        self.identity = guard.identity
        self._clock = clock
        self._limits = limits
        self._push_timing = push_timing
        self._checkpointer = Checkpointer(checkpointer, guard)
        restores = generation.RestoreWatch(guard.path, guard.side_file, clock)
        commit = self._checkpointer.watching(guard.writing(partial(_commit, restores.look)))
        self._writes = WorkerPool("mailbox-writer", [writer], commit, WRITE_BATCH)
        self._reads = WorkerPool("mailbox-reader", readers, guard.reading(do_each), READ_BATCH)
        self.pushes = (
            None
            if push_timing is None
            else SqlitePushes(self._writes, self._reads, push_timing, self._now_ms)
        )

    @classmethod
    async def open(
        cls,
        path: str | Path,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
        push_timing: PushTiming | None = None,
    ) -> "SqliteMailbox":
        """Open the mailbox at ``path``. The file is created when it is missing.

        ``clock`` gives Unix time in seconds and is called from other threads. With a
        ``push_timing`` appends lead to pushes.

        Raises:
            ConfigError: the path can't be used, or the file is no mailbox.
            MailboxError: another process keeps the file locked.
        """
        connections, guard = await asyncio.to_thread(open_file, Path(path), clock())
        writer, checkpointer, *readers = connections
        return cls(writer, checkpointer, readers, guard, clock, limits or Limits(), push_timing)

    async def append(self, message: NewMessage) -> Receipt:
        """See the port."""
        timing = self._push_timing

        def append(db: sqlite3.Connection) -> Receipt:
            now_ms = self._now_ms()
            receipt = _append(db, message, self._limits, now_ms)
            is_new = not receipt.duplicate
            if timing is not None and is_new and timing.concerns(message, self._limits):
                owe(db, message.recipient, receipt.version, timing, now_ms)
            return receipt

        return await self._writes.do(append)

    async def read(
        self,
        recipient: str,
        *,
        after: int,
        limit: int,
        max_bytes: int = PAGE_BYTES,
        unless_head: int | None = None,
    ) -> Page:
        """See the port."""
        wanted = Wanted(recipient, after, limit, max_bytes, unless_head)
        return await self._reads.do(lambda db: read_page(db, wanted, self._now_ms()))

    async def heads(self, recipients: Sequence[str]) -> Mapping[str, int]:
        """See the port."""
        return await self._reads.do(lambda db: {each: head_of(db, each) for each in recipients})

    async def see_device(self, recipient: str, device: str) -> None:
        """See the port."""
        if self._limits.is_group(recipient):
            return
        since_ms = self._now_ms() - SEEN_EVERY_MS
        if not await self._reads.do(lambda db: _was_seen(db, recipient, device, since_ms)):
            await self._writes.do(lambda db: _see_device(db, recipient, device, 0, self._now_ms()))

    async def ack(self, recipient: str, device: str, version: int) -> None:
        """See the port."""
        await self.ack_all([Ack(recipient, device, version)])

    async def ack_all(self, acks: Sequence[Ack]) -> None:
        """See the port."""
        own = self._limits.without_groups(acks)

        def ack_all(db: sqlite3.Connection) -> None:
            now_ms = self._now_ms()
            young = is_young(generation.base_of(db), now_ms)
            for recipient, device, version in own:
                _see_device(db, recipient, device, min(version, MAX_VERSION), now_ms)
                if not young:  # in turn: a device that comes later has no part in it
                    db.execute(DELETE_ACKED, (recipient,))

        if own:
            await self._writes.do(ack_all)

    async def claim_outbox(self, *, older_than_s: float, limit: int) -> Sequence[Poke]:
        """See the port."""
        # Usually there is nothing, and a read does not wait for the writer.
        old = _Old(older_than_s, limit)
        if not await self._reads.do(lambda db: old.find(db, self._now_ms())):
            return []
        return await self._writes.do(lambda db: old.claim(db, self._now_ms()))

    async def confirm_outbox(self, pokes: Sequence[Poke]) -> None:
        """See the port."""
        await self._writes.do(lambda db: _confirm_outbox(db, pokes, self._now_ms()))

    async def purge(self, *, limit: int) -> int:
        """See the port."""
        return await self._writes.do(lambda db: _purge(db, limit, self._limits, self._now_ms()))

    async def clear(self, recipient: str) -> int:
        """See the port."""
        return await self._writes.do(lambda db: _clear(db, recipient))

    async def stats(self) -> MailboxStats:
        """See the port."""
        return await self._reads.do(_stats)

    async def inspect(self, recipient: str) -> RecipientStats:
        """See the port."""
        return await self._reads.do(lambda db: _inspect(db, recipient))

    async def begin_generation(self) -> int:
        """See the port."""
        return await self._writes.do(lambda db: generation.begin(db, self._clock()))

    async def check(self) -> None:
        """Return when a transaction was committed and a reader found the whole schema.

        After a write that failed, for lack of room for example, it writes much and deletes it.
        """
        if self._guard.trouble is None:
            await self._writes.do(lambda db: head_of(db, ""))
        else:
            await self._writes.do(lambda db: db.execute(PROBE, (PROBE_BYTES,)))
            await self._writes.do(lambda db: db.execute("DELETE FROM probe"))
            self._guard.recovered()
        if missing := self._guard.objects - await self._reads.do(objects):
            raise MailboxError(f"the mailbox's SQLite file has lost {', '.join(sorted(missing))}")

    async def close(self) -> None:
        """See the port."""
        await asyncio.to_thread(self._checkpointer.close)
        await self._reads.close()
        await self._writes.close()

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


# -- the operations, each within a transaction when it writes -------------------------------------


def _append(db: sqlite3.Connection, message: NewMessage, limits: Limits, now_ms: int) -> Receipt:
    expires_ms, limits = limits.expiry_ms(message, now_ms), limits.of(message.recipient)
    if message.has_idempotency_key:
        first = db.execute(
            "SELECT version FROM receipts WHERE sender = ? AND id = ?", (message.sender, message.id)
        ).fetchone()
        if first:
            return Receipt(message.id, first[0], duplicate=True)
    row = db.execute(
        "INSERT INTO heads SELECT ?1, base + 1, 1, ?2 FROM generation WHERE true"
        " ON CONFLICT (recipient) DO UPDATE SET head = max(head + 1, excluded.head),"
        " kept_messages = kept_messages + 1, kept_bytes = kept_bytes + ?2"
        " RETURNING head, kept_messages, kept_bytes",
        (message.recipient, len(message.body)),
    ).fetchone()
    version, kept_messages, kept_bytes = row
    if kept_messages > limits.share_messages or kept_bytes > limits.share_bytes:
        _check_share(db, message, limits)
    if kept_messages > limits.max_messages or kept_bytes > limits.max_bytes:
        raise limits.refuse()  # which undoes the job
    db.execute(
        "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            message.recipient,
            version,
            message.id,
            message.sender,
            message.body,
            now_ms,
            expires_ms,
        ),
    )
    db.execute(
        "INSERT INTO outbox VALUES (?, ?, ?)"
        " ON CONFLICT (recipient) DO UPDATE SET version = excluded.version",
        (message.recipient, version, now_ms),
    )
    if message.has_idempotency_key:
        db.execute(
            "INSERT INTO receipts VALUES (?, ?, ?, ?)",
            (message.sender, message.id, version, now_ms),
        )
    return Receipt(message.id, version)


def _commit(
    look: Callable[[sqlite3.Connection], None], db: sqlite3.Connection, jobs: Sequence[Job]
) -> list[Outcome]:
    """Do ``jobs`` in one transaction, after a ``look``, and count the messages that it appends."""
    return commit_together(db, jobs, _count_appended, look)


def _count_appended(db: sqlite3.Connection, outcomes: Sequence[Outcome]) -> None:
    receipts = (outcome.result for outcome in outcomes if isinstance(outcome.result, Receipt))
    if appended := sum(not receipt.duplicate for receipt in receipts):
        generation.count_appended(db, appended)


def _check_share(db: sqlite3.Connection, message: NewMessage, limits: Limits) -> None:
    row = db.execute(
        "SELECT messages, bytes FROM shares WHERE recipient = ? AND sender = ?",
        (message.recipient, message.sender),
    ).fetchone()
    messages, size_bytes = row or (0, 0)
    fits = size_bytes + len(message.body) <= limits.share_bytes
    if not fits or messages >= limits.share_messages:
        raise limits.refuse_share()


def _was_seen(db: sqlite3.Connection, recipient: str, device: str, since_ms: int) -> bool:
    row = db.execute(
        "SELECT seen_ms > ? FROM devices WHERE recipient = ? AND device = ?",
        (since_ms, recipient, device),
    ).fetchone()
    return bool(row and row[0])


def _see_device(
    db: sqlite3.Connection, recipient: str, device: str, version: int, now_ms: int
) -> None:
    """Make the device known and raise its ack to ``version``, at most to the head.

    ``seen_ms`` is written rarely. Nearly every device is known already.
    """
    seen = (recipient, device, version, now_ms)
    if db.execute(SEE_KNOWN, (*seen, now_ms - SEEN_EVERY_MS)).rowcount:
        return
    db.execute(SEE_NEW, seen)
    if db.execute(FORGET_OLDEST, (recipient, device, MAX_DEVICES - 1)).rowcount:
        _delete_acked(db, [recipient], now_ms)


def _delete_acked(db: sqlite3.Connection, recipients: Iterable[str], now_ms: int) -> None:
    if not is_young(generation.base_of(db), now_ms):
        db.executemany(DELETE_ACKED, ((recipient,) for recipient in recipients))


class _Old(NamedTuple):
    """The outbox entries that a sweep looks for."""

    older_than_s: float
    limit: int

    def find(self, db: sqlite3.Connection, now_ms: int) -> list[Poke]:
        rows = db.execute(
            "SELECT recipient, version, CAST(recipient AS BLOB) FROM outbox"
            " WHERE since_ms <= ? OR since_ms > ? LIMIT ?",
            (now_ms - int(self.older_than_s * 1000), now_ms, self.limit),
        )
        return [Poke(_name(recipient, raw), version) for recipient, version, raw in rows]

    def claim(self, db: sqlite3.Connection, now_ms: int) -> list[Poke]:
        pokes = self.find(db, now_ms)
        db.executemany(
            "UPDATE outbox SET since_ms = ? WHERE recipient = ?",
            [(now_ms, poke.recipient) for poke in pokes],
        )
        return pokes


def _name(recipient: Any, raw: bytes) -> Any:
    """The recipient of an outbox entry. One that another program has damaged stays bytes."""
    return recipient if is_intact(recipient, raw) else raw


def _confirm_outbox(db: sqlite3.Connection, pokes: Sequence[Poke], now_ms: int) -> None:
    confirmed = [(poke.recipient, poke.version) for poke in pokes if poke.version is not None]
    for recipient, _ in confirmed:
        if isinstance(recipient, bytes):
            db.execute("DELETE FROM outbox WHERE CAST(recipient AS BLOB) = ?", (recipient,))
    statement = "DELETE FROM outbox WHERE recipient = ? AND version <= ?"
    if db.executemany(statement, confirmed).rowcount < len(confirmed):  # some have a newer version
        db.executemany(
            "UPDATE outbox SET since_ms = ? WHERE recipient = ?",
            [(now_ms, recipient) for recipient, _ in confirmed],
        )


def _purge(db: sqlite3.Connection, limit: int, limits: Limits, now_ms: int) -> int:
    messages = db.execute(
        "DELETE FROM messages WHERE (recipient, version) IN"
        " (SELECT recipient, version FROM messages WHERE expires_ms <= ? LIMIT ?)",
        (now_ms, limit),
    ).rowcount
    receipts = db.execute(
        "DELETE FROM receipts WHERE (sender, id) IN"
        " (SELECT sender, id FROM receipts WHERE at_ms <= ? LIMIT ?)",
        (now_ms - RECEIPT_KEPT_MS, limit - messages),
    ).rowcount
    at_most = min(limit - messages - receipts, FORGET_BATCH)
    forgotten = db.execute(
        "DELETE FROM devices WHERE (recipient, device) IN"
        " (SELECT recipient, device FROM devices WHERE seen_ms <= ? LIMIT ?) RETURNING recipient",
        (limits.unseen_since_ms(now_ms), at_most),
    ).fetchall()
    _delete_acked(db, (recipient for (recipient,) in forgotten), now_ms)
    free = pragma(db, "freelist_count")
    if free > VACUUM_PAGES and free > pragma(db, "page_count") // 4:
        for _ in range(VACUUM_PAGES):  # one a statement, since Python takes one step of each
            db.execute("PRAGMA incremental_vacuum(1)")
    return messages + receipts + len(forgotten)


def _clear(db: sqlite3.Connection, recipient: str) -> int:
    db.execute("DELETE FROM devices WHERE recipient = ?", (recipient,))
    db.execute("DELETE FROM outbox WHERE recipient = ?", (recipient,))
    db.execute("DELETE FROM pushes WHERE recipient = ?", (recipient,))
    return db.execute("DELETE FROM messages WHERE recipient = ?", (recipient,)).rowcount


def _stats(db: sqlite3.Connection) -> MailboxStats:
    row = db.execute(
        "SELECT count(*), total(kept_messages), total(kept_bytes),"
        " (SELECT count(*) FROM devices), (SELECT count(*) FROM outbox),"
        " (SELECT min(sent_at_ms) FROM messages), (SELECT min(since_ms) FROM outbox),"
        " (SELECT count(*) FROM pushes WHERE due_ms IS NOT NULL),"
        " (SELECT count(*) FROM dead_pushes) FROM heads"
    ).fetchone()
    recipients, messages, size_bytes, *rest = row
    return MailboxStats(recipients, int(messages), int(size_bytes), *rest)


def _inspect(db: sqlite3.Connection, recipient: str) -> RecipientStats:
    devices = db.execute("SELECT device, acked FROM devices WHERE recipient = ?", (recipient,))
    kept = db.execute(
        "SELECT head, kept_messages, kept_bytes FROM heads WHERE recipient = ?", (recipient,)
    ).fetchone()
    owed = db.execute("SELECT since_ms FROM outbox WHERE recipient = ?", (recipient,)).fetchone()
    since_ms = owed[0] if owed else None
    head, messages, size_bytes = kept or (0, 0, 0)
    return RecipientStats(head, messages, size_bytes, since_ms, dict(devices.fetchall()))

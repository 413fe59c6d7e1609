"""Reads pages from the SQLite mailbox, also in a process that does not write it."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from pokebridge.errors import MailboxError
from pokebridge.mailbox.base import Wanted, page_of
from pokebridge.mailbox.sqlite_file import connect
from pokebridge.mailbox.sqlite_guard import files_of, look_at
from pokebridge.mailbox.sqlite_workers import WorkerPool, do_each
from pokebridge.model import Message, Page

# Reads that a thread does at once, which saves wake-ups.
READ_BATCH: Final = 16


def head_of(db: sqlite3.Connection, recipient: str) -> int:
    """The version of the newest message of ``recipient``; 0 if there never was one.

    A number even if another program has written something else there.
    """
    row = db.execute(
        "SELECT CAST(head AS INTEGER) FROM heads WHERE recipient = ?", (recipient,)
    ).fetchone()
    return row[0] if row else 0


def fresh(
    db: sqlite3.Connection, recipient: str, after: int, head: int, limit: int, now_ms: int
) -> sqlite3.Cursor:
    """The unexpired messages, one more than ``limit``. A body is read when its row is taken."""
    # Cut to the head just read: a message committed since then belongs to the next page.
    return db.execute(
        "SELECT version, id, sender, body, sent_at_ms FROM messages"
        " WHERE recipient = ? AND version > ? AND version <= ?"
        " AND (expires_ms IS NULL OR expires_ms > ?) ORDER BY version LIMIT ?",
        (recipient, max(after, 0), head, now_ms, limit + 1),
    )


def read_page(db: sqlite3.Connection, wanted: Wanted, now_ms: int) -> Page:
    """The page that is ``wanted``. ``now_ms`` is the Unix time, in milliseconds."""
    recipient, after, limit, max_bytes, unless_head = wanted
    head = head_of(db, recipient)
    if after >= head or head == unless_head:
        return page_of((), head=head, limit=limit, max_bytes=max_bytes)
    with closing(fresh(db, recipient, after, head, limit, now_ms)) as rows:
        messages = (Message(*row) for row in rows)
        return page_of(messages, head=head, limit=limit, max_bytes=max_bytes)


class SqliteReader:
    """A :class:`~pokebridge.mailbox.base.PageReader` of a file.

    It trusts the file only while the file looks as it did when the other process last read it.
    Every copy of the write-ahead log into the file changes that. So when :meth:`read` has no page,
    its caller asks the other process, and calls :meth:`trust` once that has answered.

    - ``_files``: the file, and SQLite's own beside it
    - ``_trusted``: how they looked before the other process answered last
    - ``_reads``: the thread
    - ``_clock``: gives Unix time in seconds
    """

    def __init__(
        self, files: Sequence[str], db: sqlite3.Connection, clock: Callable[[], float]
    ) -> None:
        self._files = files
        self._trusted: object = None
        self._reads = WorkerPool("mailbox-reader", [db], do_each, READ_BATCH)
        self._clock = clock

    @classmethod
    async def open(cls, path: str | Path, clock: Callable[[], float] = time.time) -> "SqliteReader":
        """Open the mailbox at ``path``, which must exist. ``clock`` is called from a thread.

        Raises:
            MailboxError: it can't be opened.
        """
        files, db = await asyncio.to_thread(_open, Path(path))
        return cls(files, db, clock)

    async def read(self, wanted: Wanted) -> tuple[Page | None, object]:
        """The page that is ``wanted``, if the file can be trusted; and how the file looks."""

        def read(db: sqlite3.Connection) -> tuple[Page | None, object]:
            page = None
            with suppress(sqlite3.Error):
                page = read_page(db, wanted, int(self._clock() * 1000))
            look = self._look()
            return page if look == self._trusted else None, look

        return await self._reads.do(read)

    def trust(self, look: object) -> None:
        """Trust the file as long as it has this ``look``."""
        self._trusted = look

    async def close(self) -> None:
        """End the thread."""
        await self._reads.close()

    def _look(self) -> object:
        file, *beside = [look_at(path) for path in self._files]
        return (file, *(found and found.identity for found in beside))


def _open(path: Path) -> tuple[Sequence[str], sqlite3.Connection]:
    path = path.absolute()
    try:
        db = connect(path, must_exist=True)
        db.execute("PRAGMA query_only = 1")
        db.execute("SELECT 1 FROM heads").fetchone()  # opens SQLite's log as well
    except sqlite3.Error as error:
        raise MailboxError(f"the mailbox {path} can't be read: {error}") from error
    return files_of(path), db

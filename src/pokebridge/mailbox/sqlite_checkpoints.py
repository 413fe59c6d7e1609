"""Copies SQLite's write-ahead log into the file while commits go on.

SQLite does that itself, in the commit that finds the log longer than ``wal_autocheckpoint``. That
commit copies and flushes the whole log, and every call that waits for the writer waits for this as
well. A thread that has copied most of the log in advance leaves the commit little to do. Only the
copying moves: what a commit flushes, and when the log restarts, do not change.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from threading import Event, Thread
from typing import Final

from pokebridge.mailbox.sqlite_generation import Held, held_by
from pokebridge.mailbox.sqlite_guard import DoBatch, FileGuard
from pokebridge.mailbox.sqlite_workers import Job, Outcome

# A checkpoint starts when the write-ahead log has so many pages (32 MiB). Messages of many
# recipients touch many pages: with SQLite's default of 1,000 every second batch would start one.
CHECKPOINT_PAGES: Final = 8192
# The thread copies when the log has so many pages, and after so many more. How many it has is known
# after a copy. Until then the rows that were changed count, of which each changes a page or less.
COPY_PAGES: Final = CHECKPOINT_PAGES // 2
COPY_AGAIN_PAGES: Final = CHECKPOINT_PAGES // 4


class Checkpointer:
    """The thread, on a connection of its own.

    - ``_guard``: is told of each copy
    - ``_changed``: rows that the writer has changed so far
    - ``_copied``: how many they were when the last copy began
    - ``_wait_rows``: how many more begin the next copy
    - ``_pages``, ``_committed``: the log's length, and what was committed, at the last copy
    - ``_is_due``: wakes the thread
    - ``_closed``: whether it has to end
    """

    def __init__(self, db: sqlite3.Connection, guard: FileGuard) -> None:
        self._guard = guard
        self._changed = 0
        self._copied = 0
        self._wait_rows = COPY_PAGES
        self._pages = 0
        self._committed = Held()
        self._is_due = Event()
        self._closed = False
        self._thread = Thread(
            target=self._run, args=(db,), name="mailbox-checkpointer", daemon=True
        )
        self._thread.start()

    def watching(self, do_batch: DoBatch) -> DoBatch:
        """``do_batch`` of the writer, whose changes are counted."""

        def do(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome]:
            outcomes = do_batch(db, jobs)
            self._changed = db.total_changes
            if self._changed - self._copied >= self._wait_rows:
                self._is_due.set()
            return outcomes

        return do

    def close(self) -> None:
        """End the thread, after the copy that is under way. May be called twice. Blocks."""
        self._closed = True
        self._is_due.set()
        self._thread.join()

    def _run(self, db: sqlite3.Connection) -> None:
        with closing(db):
            while self._is_due.wait() and not self._closed:
                self._is_due.clear()
                self._copied = self._changed
                held = None
                # What fails here, the writer's own checkpoint meets as well.
                with suppress(sqlite3.Error):
                    held = self._copy(db)
                self._guard.copied(held)

    def _copy(self, db: sqlite3.Connection) -> Held | None:
        """Copy what is committed and no reader needs; nobody waits.

        Returns what the file holds, flushed, if that is known: when the log has begun anew, which
        SQLite lets it do once all is copied and flushed, what was committed at the last call.
        """
        before, self._committed = self._committed, held_by(db)
        _, pages, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        self._wait_rows = max(COPY_AGAIN_PAGES, COPY_PAGES - pages)
        has_begun_anew, self._pages = pages < self._pages, pages
        return before if has_begun_anew else None

"""Watches the open SQLite file: whether it is still the one at its path, and can be written."""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from pokebridge.errors import MailboxError
from pokebridge.mailbox.sqlite_generation import Held, SideFile, held_in, state_of
from pokebridge.mailbox.sqlite_workers import Job, Outcome, result_code

SUFFIXES: Final = ("", "-wal", "-shm")
"""The files that SQLite keeps while a mailbox is open, beside the file that a link leads to."""
# What only another file can mend.
_DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
# What is now at the path is another file.
_OTHER_FILE: Final = {"deleted", "replaced"}
# A file that has not changed for this long is not being written.
SETTLED_NS: Final = 1_000_000_000
_UNWRITABLE: Final = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}

log = structlog.get_logger(__name__)

DoBatch = Callable[[sqlite3.Connection, Sequence[Job]], list[Outcome]]


class Look(NamedTuple):
    """A file at one moment: its device and inode, its size, and the time of its last change."""

    identity: tuple[int, int]
    size_bytes: int
    changed_ns: int


class FileGuard:
    """Guards the threads' access to the file. Created once the file is open, with its side file.

    When the file, or SQLite's log of it, was deleted or replaced, a commit would be lost with the
    old one. So every call fails from then on, and only a new start opens the new file. The same
    holds for a file that was cut or damaged, or that an older copy was written over.

    - ``trouble``: why the last write failed, until one is proven to work; ``None`` when well
    - ``objects``: the names of the tables, indices and triggers, as they were opened
    - ``path``, ``side_file``: of the file, and what lies beside it
    - ``_identities``: device and inode by path, as they were opened
    - ``_real``: the file that a link leads to
    - ``_seen``: how that was at the last look
    - ``_held``: what it held then, without SQLite's log
    - ``_gone``: what happened to the file; ``None`` while it is in its place
    - ``_is_recorded``: whether the side file could be written
    """

    def __init__(self, path: Path, side_file: SideFile, objects: frozenset[str]) -> None:
        self.trouble: str | None = None
        self.objects = objects
        self.path = path
        self.side_file = side_file
        looks = {it: found for it in files_of(path) if (found := look_at(it)) is not None}
        self._identities = {it: found.identity for it, found in looks.items()}
        self._real = path.resolve()
        self._seen = looks[str(path)]
        self._held = side_file.held = held_in(self._real) or Held()
        self._gone: str | None = None
        self._is_recorded = True
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """What no other file on this machine has."""
        device, inode = self._identities[str(self.path)]
        return f"sqlite {device}:{inode}"

    def reading(self, do_batch: DoBatch) -> DoBatch:
        """``do_batch``, whose outcomes are refused once the file is gone."""

        def do(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome]:
            outcomes = do_batch(db, jobs)
            self._note_damage(outcomes)
            return self._refusals(jobs) or outcomes

        return do

    def writing(self, do_batch: DoBatch) -> DoBatch:
        """``do_batch``, not even begun once the file is gone.

        Also notes failures, and records the state after each commit.
        """

        def do(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome]:
            if refusals := self._refusals(jobs):
                return refusals
            outcomes = do_batch(db, jobs)
            self._note_damage(outcomes)
            for outcome in outcomes:
                if isinstance(outcome.error, sqlite3.Error):
                    self._note(outcome.error)
            self._record(db)
            # The file may have gone during the commit, which was lost with it then.
            return self._refusals(jobs) or outcomes

        return do

    def copied(self, held: Held | None) -> None:
        """Look at the file after a checkpoint, which may have made it shorter.

        The next one may make it longer. While that checkpoint runs, the file's header states a
        length that the file does not have yet, and the file would look cut if its shorter length
        were not known. ``held`` is what it holds, flushed, if that is known.
        """
        self._find_gone()
        if held is not None:
            self.side_file.held = held

    def recovered(self) -> None:
        """Note that a large write was committed after ``trouble``."""
        self.trouble = None
        log.info("mailbox_writable_again", path=str(self.path))

    def _refusals(self, jobs: Sequence[Job]) -> list[Outcome]:
        if (gone := self._gone or self._find_gone()) is None:
            return []
        return [Outcome(job, None, MailboxError(gone)) for job in jobs]

    def _find_gone(self) -> str | None:
        looks = {path: look_at(path) for path in self._identities}
        for path, found in looks.items():
            if found is None or found.identity != self._identities[path]:
                return self._give_up(path, "deleted" if found is None else "replaced")
        if looks[str(self.path)] != self._seen and (what := self._what_changed()) is not None:
            return self._give_up(self.path, what)
        return None

    def _give_up(self, path: str | Path, what: str) -> str:
        with self._lock:
            if self._gone is None:
                self._gone = (
                    f"the mailbox's file {path} is damaged: restore a backup and restart this"
                    " instance"
                    if what == "damaged"
                    else f"the mailbox's file {path} was {what} while it was in use:"
                    " restart this instance with the file that it shall use"
                )
                log.error("mailbox_file_gone", path=str(path), reason=what)
                if what not in _OTHER_FILE:  # SQLite may yet copy its log into it
                    with suppress(OSError):
                        self.side_file.delete()
            return self._gone

    def _what_changed(self) -> str | None:
        """What was done to the file since the last look that SQLite does not do."""
        with self._lock:
            found = look_at(self._real)  # within the lock, so that looks come in their order
            if found is None or found == self._seen:  # None: it is just being deleted
                return None
            seen, self._seen = self._seen, found
            if found.size_bytes < seen.size_bytes and not _is_whole(self._real, found.size_bytes):
                return "cut"
            if (held := held_in(self._real)) is None:
                return None
            known = self.side_file.state
            is_rewritten = known is not None and held.is_rewritten(known)
            if is_rewritten and time.time_ns() - found.changed_ns < SETTLED_NS:
                # SQLite may be copying its log into it: look again.
                self._seen = found._replace(changed_ns=0)
                return None
            if is_rewritten or held.is_older(self._held):
                return "replaced by an older copy"
            self._held = held
            return None

    def _note_damage(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome.error, sqlite3.Error) and result_code(outcome.error) in _DAMAGED:
                self._give_up(self.path, "damaged")

    def _note(self, error: sqlite3.Error) -> None:
        if result_code(error) in _UNWRITABLE and self.trouble is None:
            self.trouble = str(error)
            log.error("mailbox_unwritable", path=str(self.path), reason=str(error))

    def _record(self, db: sqlite3.Connection) -> None:
        if self._gone is not None:
            return
        try:
            self.side_file.write(state_of(db))
            self._is_recorded = True
        except (OSError, sqlite3.Error) as error:
            if self._is_recorded:
                log.warning("mailbox_state_unrecorded", path=str(self.path), reason=str(error))
            self._is_recorded = False


def files_of(path: Path) -> list[str]:
    """``path`` first, then the file that it leads to if it is a link, and SQLite's own files."""
    real = path.resolve()
    files = [path, *(real.with_name(real.name + suffix) for suffix in SUFFIXES)]
    return list(dict.fromkeys(map(str, files)))


def look_at(path: str | Path) -> Look | None:
    """How the file is now; ``None`` when there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path takes longer, for every call
    except OSError:
        return None
    return Look((found.st_dev, found.st_ino), found.st_size, found.st_ctime_ns)


def _is_whole(path: Path, size_bytes: int) -> bool:
    """Whether the file has as many pages as it says. Its log is not looked at."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            pages = int(db.execute("PRAGMA page_count").fetchone()[0])
            page_bytes = int(db.execute("PRAGMA page_size").fetchone()[0])
    except sqlite3.Error:
        return False
    return 0 < pages * page_bytes <= size_bytes

"""Notices when the SQLite file went back in time, and begins a new generation of versions then.

The table ``generation`` counts the messages ever appended, and has a random name, the lineage, that
changes with each generation. Beside the mailbox FILE lies FILE.generation, which repeats both after
each commit. A restored copy of FILE lacks messages that FILE.generation has counted, or is of
another lineage. When FILE.generation is missing, or was itself copied or restored, nothing is known
about FILE, and a generation too many does no harm.
"""

import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from pokebridge.mailbox.base import next_base

# Not counted by ``user_version``, since earlier releases can work with a file that has them.
# Versions of the generation are above ``base``. ``probe`` is for a test whether the disk has room.
TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS generation (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        base INTEGER NOT NULL,
        appended INTEGER NOT NULL,
        lineage TEXT NOT NULL
    )""",
    "CREATE TABLE IF NOT EXISTS probe (one INTEGER PRIMARY KEY, body BLOB NOT NULL)",
)
# By how much the file system's time of a record may be later than the time that it names. A copied
# or restored file has a later one, which no program can set back. An earlier one is right: the file
# system's clock may be some ticks behind.
TOLERANCE_NS: Final = 5_000_000
WRITE_ATTEMPTS: Final = 20


class State(NamedTuple):
    """The mailbox's ``lineage``, and how many messages were ``appended``."""

    lineage: str
    appended: int


def state_of(db: sqlite3.Connection) -> State:
    """What the mailbox says of itself."""
    return State(*db.execute("SELECT lineage, appended FROM generation").fetchone())


def base_of(db: sqlite3.Connection) -> int:
    """The base of the current generation."""
    return int(db.execute("SELECT base FROM generation").fetchone()[0])


def count_appended(db: sqlite3.Connection, messages: int) -> None:
    """Note, within their transaction, that ``messages`` were appended."""
    db.execute("UPDATE generation SET appended = appended + ?", (messages,))


def begin(db: sqlite3.Connection, now_s: float) -> int:
    """Begin a new generation, within a transaction. Returns its base."""
    base = next_base(base_of(db), now_s)
    db.execute("UPDATE generation SET base = ?, lineage = ?", (base, uuid.uuid4().hex))
    return base


def why_new(db: sqlite3.Connection, known: State | None, *, exists: bool) -> str | None:
    """Prepare the tables, within a transaction, and compare them with what is ``known``.

    ``exists`` says whether FILE.generation is there; it is not ``known`` when it can't be trusted.
    Returns why a new generation has to begin, or ``None``.
    """
    for statement in TABLES:
        db.execute(statement)
    row = db.execute("SELECT 1 FROM generation").fetchone()
    if row is None:
        db.execute("INSERT INTO generation VALUES (1, 0, 0, ?)", (uuid.uuid4().hex,))
        return "another file was here before" if exists else None
    if not exists:
        return "the file was copied here, or its .generation file was deleted"
    if known is None:
        return "the .generation file was copied or restored"
    state = state_of(db)
    if state.lineage != known.lineage:
        return "another file was here before"
    if state.appended < known.appended:
        return f"the file lacks the last {known.appended - state.appended} messages"
    return None


class SideFile:
    """FILE.generation: what the mailbox FILE held after its last commit. Processes share it."""

    def __init__(self, mailbox: Path) -> None:
        self._mailbox = mailbox
        self._path = mailbox.with_name(f"{mailbox.name}.generation")
        self._written: State | None = None

    def read(self) -> tuple[State | None, bool]:
        """The state, ``None`` when it can't be trusted; and whether the file exists."""
        try:
            with _locked(os.open(self._path, os.O_RDONLY), fcntl.LOCK_SH) as file:
                return _read(file, check_time=True), True
        except FileNotFoundError:
            return None, False

    def write(self, state: State) -> None:
        """Record ``state``, unless another process has recorded a later one of its lineage."""
        if state == self._written:
            return
        with _locked(self._open(), fcntl.LOCK_EX) as file:
            known = _read(file, check_time=False)
            if known is None or known.lineage != state.lineage or known.appended < state.appended:
                _write(file, state)
        self._written = state

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            mailbox = self._mailbox.stat()  # whose owner and mode it shall have, as SQLite's files
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, mailbox.st_mode & 0o660)
            if os.geteuid() == 0:
                os.fchown(file, mailbox.st_uid, mailbox.st_gid)
            return file


@contextmanager
def _locked(file: int, kind: int) -> Iterator[int]:
    try:
        fcntl.flock(file, kind)
        yield file
    finally:
        os.close(file)


def _read(file: int, *, check_time: bool) -> State | None:
    try:
        lineage, appended, at_ns = os.pread(file, 200, 0).decode().split()
        state, recorded_ns = State(lineage, int(appended)), int(at_ns)
    except ValueError:
        return None
    return None if check_time and not _is_from(file, recorded_ns) else state


def _write(file: int, state: State) -> None:
    for _ in range(WRITE_ATTEMPTS):  # a busy machine may pause between the clock and the write
        now_ns = time.time_ns()
        os.pwrite(file, f"{state.lineage} {state.appended:020} {now_ns:020}\n".encode(), 0)
        if _is_from(file, now_ns):
            return


def _is_from(file: int, at_ns: int) -> bool:
    """Whether the file was last changed then. Copies and restores change it later."""
    return os.fstat(file).st_ctime_ns - at_ns < TOLERANCE_NS

"""Notices when the SQLite file went back in time, and begins a new generation of versions then.

The table ``generation`` counts the messages ever appended, and has a random name, the lineage, that
changes with each generation. FILE.generation, beside the mailbox FILE, records both after each
commit. A restored copy of FILE lacks messages that FILE.generation has counted, or is of another
lineage. When FILE.generation is missing, or was itself copied or restored, nothing is known about
FILE. A new generation then begins, since an unnecessary one does no harm.

FILE itself lags behind, since commits go to FILE-wal first. Its content without FILE-wal only
grows, so an older copy that was written over it is noticed as well. A copy made by ``VACUUM INTO``
may hold more than FILE does, on other pages. It has a schema version that FILE never had.

SQLite itself may write the content of a backup into FILE while FILE is in use, by ``.restore`` of
its shell or by statements. These are transactions, so the next transaction checks what they
changed.
"""

import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import structlog

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
    # A restore into the same tables: rows of heads, which we never delete, are replaced.
    """CREATE TRIGGER IF NOT EXISTS mark_restored AFTER DELETE ON heads BEGIN
        UPDATE generation SET lineage = 'restored';
    END""",
)
RESTORED: Final = "restored"
# By how much the change time of a record in the file system may exceed the time that the record
# names. A copied or restored file has a later change time, which no program can set back, or a much
# earlier one if the clock was set back. The file system's clock may be some ticks behind.
TOLERANCE_NS: Final = 5_000_000
BEHIND_NS: Final = 1_000_000_000
WRITE_ATTEMPTS: Final = 20

log = structlog.get_logger(__name__)


class State(NamedTuple):
    """What the mailbox says of itself.

    - ``lineage``: differs in each generation
    - ``appended``: how many messages were ever appended
    - ``schema``: SQLite's schema version
    - ``base``: of the generation
    """

    lineage: str
    appended: int
    schema: int
    base: int


class Held(NamedTuple):
    """What FILE holds without FILE-wal: the generation's ``base``, and messages ``appended``."""

    base: int = 0
    appended: int = 0
    schema: int = 0

    def is_older(self, known: "Held") -> bool:
        """Whether an older copy was written over a file that held what is ``known``."""
        return self[:2] < known[:2]

    def is_rewritten(self, known: State) -> bool:
        """Whether it lacks messages, and yet has a schema that is newer than the ``known`` one."""
        return self.schema > known.schema and self.appended < known.appended


class _Record(NamedTuple):
    state: State
    held: Held


class DamagedError(sqlite3.DatabaseError):
    """Another program has deleted or spoilt the row of ``generation``."""


def _row(db: sqlite3.Connection) -> tuple[int, int, str]:
    row = db.execute("SELECT base, appended, lineage FROM generation").fetchone()
    try:
        base, appended, lineage = row
        return int(base), int(appended), str(lineage)
    except (TypeError, ValueError):
        raise DamagedError("the table generation has no valid row") from None


def held_by(db: sqlite3.Connection) -> Held:
    """What FILE holds once all that ``db`` sees is copied into it."""
    base, appended, _ = _row(db)
    return Held(base, appended, _schema_of(db))


def held_in(path: Path) -> Held | None:
    """What the file at ``path`` holds, without its log. ``None`` when that can't be read now."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            return held_by(db)
    except sqlite3.Error:  # no such table yet, or it is being written
        return None


def state_of(db: sqlite3.Connection) -> State:
    """What the mailbox says of itself."""
    base, appended, lineage = _row(db)
    return State(lineage, appended, _schema_of(db), base)


def _schema_of(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA schema_version").fetchone()[0])


def base_of(db: sqlite3.Connection) -> int:
    """The base of the current generation."""
    return _row(db)[0]


def count_appended(db: sqlite3.Connection, messages: int) -> None:
    """Note, within their transaction, that ``messages`` were appended."""
    db.execute("UPDATE generation SET appended = appended + ?", (messages,))


def begin(db: sqlite3.Connection, now_s: float, known: State | None = None) -> int:
    """Begin a new generation, within a transaction, after what is ``known``. Returns its base."""
    base = next_base(max(base_of(db), known.base if known else 0), now_s)
    db.execute("UPDATE generation SET base = ?, lineage = ?", (base, uuid.uuid4().hex))
    return base


def _make_row(db: sqlite3.Connection) -> None:
    db.execute("INSERT OR REPLACE INTO generation VALUES (1, 0, 0, ?)", (uuid.uuid4().hex,))


def why_new(db: sqlite3.Connection, known: State | None, *, exists: bool) -> str | None:
    """Prepare the tables, within a transaction, and compare them with what is ``known``.

    ``exists`` says whether FILE.generation is there; it is not ``known`` when it can't be trusted.
    Returns why a new generation has to begin, or ``None``.
    """
    for statement in TABLES:
        db.execute(statement)
    try:
        state = state_of(db)
    except DamagedError:
        _make_row(db)
        return "another file was here before" if exists else None
    if not exists:
        return "the file was copied here, or its .generation file was deleted"
    if known is None:
        return "the .generation file was copied or restored"
    if state.lineage != known.lineage:
        return "another file was here before"
    if state.appended < known.appended:
        return f"the file lacks the last {known.appended - state.appended} messages"
    return None


class SideFile:
    """FILE.generation: what the mailbox FILE held after its last commit. Processes share it."""

    def __init__(self, mailbox: Path) -> None:
        self.held = Held()
        """What FILE is known to hold without its log, flushed. Recorded with the next state."""
        self._mailbox = mailbox
        self._path = mailbox.with_name(f"{mailbox.name}.generation")
        self._written: _Record | None = None

    @property
    def state(self) -> State | None:
        """The last state that this process has recorded."""
        return self._written and self._written.state

    def read(self) -> tuple[State | None, bool]:
        """The state, ``None`` when it can't be trusted; and whether the file exists."""
        try:
            with _locked(os.open(self._path, os.O_RDONLY), fcntl.LOCK_SH) as file:
                known = _read(file, check_time=True)
        except FileNotFoundError:
            return None, False
        if known is None:
            return None, True
        self.held = known.held
        return known.state, True

    def recorded(self) -> State | None:
        """The last state that a process has recorded. ``None`` when that can't be read."""
        with suppress(OSError), _locked(os.open(self._path, os.O_RDONLY), fcntl.LOCK_SH) as file:
            record = _read(file, check_time=False)
            return record and record.state
        return None

    def write(self, state: State) -> None:
        """Record ``state``, unless another process has recorded a later one of its lineage."""
        record = _Record(state, self.held)
        if record == self._written:
            return
        with _locked(self._open(), fcntl.LOCK_EX) as file:
            known = _read(file, check_time=False)
            if known is not None and known.state.lineage == state.lineage:
                record = _Record(max(known.state, state), max(known.held, self.held))
            if record != known:
                _write(file, record)
        self._written = _Record(state, self.held)

    def delete(self) -> None:
        """Make the next start begin a generation, since FILE is not what it was."""
        self._path.unlink(missing_ok=True)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            mailbox = self._mailbox.stat()  # whose owner and mode it shall have, as SQLite's files
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, mailbox.st_mode & 0o660)
            if os.geteuid() == 0:
                os.fchown(file, mailbox.st_uid, mailbox.st_gid)
            return file


class RestoreWatch:
    """Begins a generation in the transaction that finds FILE restored while it was in use.

    - ``_version``: SQLite's ``data_version``, which another connection's commit changes, at the
      last look
    - ``_base``: the generation's base then
    """

    def __init__(self, mailbox: Path, side_file: SideFile, clock: Callable[[], float]) -> None:
        """``clock`` gives Unix time in seconds."""
        self._mailbox = mailbox
        self._side_file = side_file
        self._clock = clock
        self._version = self._base = -1

    def look(self, db: sqlite3.Connection) -> None:
        """Look whether FILE has gone back, if another connection than ``db`` has committed.

        To be called at the beginning of each transaction of ``db``.
        """
        version = int(db.execute("PRAGMA data_version").fetchone()[0])
        if version == self._version:
            return
        known, reason = self._side_file.recorded(), "the file was restored while it was in use"
        try:
            state, base = state_of(db), base_of(db)
        except DamagedError as error:
            reason = str(error)
            _make_row(db)
        else:
            if known is None or not self._is_back(state, base, known):
                self._version, self._base = version, base
                return
        # The version is not noted, since this transaction may be undone.
        begin(db, self._clock(), known)
        log.warning("mailbox_generation_begun", path=str(self._mailbox), reason=reason)

    def _is_back(self, state: State, base: int, known: State) -> bool:
        if state.lineage == known.lineage:
            return state.appended < known.appended
        if state.lineage == RESTORED:
            return True
        return base <= self._base  # else another process has begun a generation


@contextmanager
def _locked(file: int, kind: int) -> Iterator[int]:
    try:
        fcntl.flock(file, kind)
        yield file
    finally:
        os.close(file)


def _read(file: int, *, check_time: bool) -> _Record | None:
    try:
        lineage, *numbers = os.pread(file, 200, 0).decode().split()
        appended, recorded_ns, schema, base, *held = map(int, numbers)
        record = _Record(State(lineage, appended, schema, base), Held(*held))
    except (ValueError, TypeError):
        return None
    return None if check_time and not _is_from(file, recorded_ns) else record


def _write(file: int, record: _Record) -> None:
    (lineage, appended, *more), held = record
    rest = " ".join(f"{number:020}" for number in (*more, *held))
    for _ in range(WRITE_ATTEMPTS):  # a busy machine may pause between the clock and the write
        now_ns = time.time_ns()
        line = f"{lineage} {appended:020} {now_ns:020} {rest}\n"
        os.pwrite(file, line.encode(), 0)
        if _is_from(file, now_ns):
            return


def _is_from(file: int, at_ns: int) -> bool:
    """Whether the file was last changed then. Copies and restores change it at another time."""
    return -BEHIND_NS < os.fstat(file).st_ctime_ns - at_ns < TOLERANCE_NS

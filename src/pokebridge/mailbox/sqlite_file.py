"""The SQLite mailbox's file: its schema, how it is opened, and how it is brought up to date."""

import fcntl
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from pokebridge.backoff import spread
from pokebridge.errors import ConfigError, MailboxError
from pokebridge.mailbox import sqlite_generation as generation
from pokebridge.mailbox.sqlite_checkpoints import CHECKPOINT_PAGES
from pokebridge.mailbox.sqlite_generation import SideFile
from pokebridge.mailbox.sqlite_guard import SUFFIXES, FileGuard
from pokebridge.mailbox.sqlite_pushes import TABLES
from pokebridge.mailbox.sqlite_workers import LOCK_TIMEOUT_S, result_code

READERS: Final = 2
# After a checkpoint the write-ahead log is cut back to this.
WAL_SIZE_BYTES: Final = 64 * 1024 * 1024
# For each connection. The look-up tables of a million recipients fit.
CACHE_SIZE_BYTES: Final = 32 * 1024 * 1024

APPLICATION_ID: Final = int.from_bytes(b"poke", "big")
MIGRATIONS: Final = (
    (
        """CREATE TABLE heads (
            recipient TEXT PRIMARY KEY,
            head INTEGER NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE messages (
            recipient TEXT NOT NULL,
            version INTEGER NOT NULL,
            id TEXT NOT NULL,
            sender TEXT NOT NULL,
            body BLOB NOT NULL,
            sent_at_ms INTEGER NOT NULL,
            expires_ms INTEGER,
            PRIMARY KEY (recipient, version)
        ) WITHOUT ROWID""",
        "CREATE INDEX messages_by_expiry ON messages (expires_ms) WHERE expires_ms IS NOT NULL",
        """CREATE TABLE receipts (
            sender TEXT NOT NULL,
            id TEXT NOT NULL,
            version INTEGER NOT NULL,
            at_ms INTEGER NOT NULL,
            PRIMARY KEY (sender, id)
        ) WITHOUT ROWID""",
        "CREATE INDEX receipts_by_age ON receipts (at_ms)",
        # No index by age: in good times the table is next to empty, in bad ones all of it is old.
        """CREATE TABLE outbox (
            recipient TEXT PRIMARY KEY,
            version INTEGER NOT NULL,
            since_ms INTEGER NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE devices (
            recipient TEXT NOT NULL,
            device TEXT NOT NULL,
            acked INTEGER NOT NULL,
            PRIMARY KEY (recipient, device)
        ) WITHOUT ROWID""",
    ),
    (
        # What a recipient's limits are checked against, without counting anew.
        "ALTER TABLE heads ADD COLUMN kept_messages INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE heads ADD COLUMN kept_bytes INTEGER NOT NULL DEFAULT 0",
        """UPDATE heads SET (kept_messages, kept_bytes) = (
            SELECT count(*), coalesce(sum(length(body)), 0) FROM messages
            WHERE messages.recipient = heads.recipient
        )""",
        "ALTER TABLE devices ADD COLUMN seen_ms INTEGER NOT NULL DEFAULT 0",
        "UPDATE devices SET seen_ms = strftime('%s', 'now') * 1000",
        "CREATE INDEX devices_by_seen ON devices (seen_ms)",
    ),
    TABLES,
)
"""The statements of each schema version; the file's ``user_version`` counts those done."""

SHARES: Final = (
    """CREATE TABLE shares (
        recipient TEXT NOT NULL,
        sender TEXT NOT NULL,
        messages INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (recipient, sender)
    ) WITHOUT ROWID""",
    """CREATE TRIGGER share_grows AFTER INSERT ON messages BEGIN
        INSERT INTO shares VALUES (new.recipient, new.sender, 1, length(new.body))
        ON CONFLICT (recipient, sender) DO UPDATE
            SET messages = messages + 1, bytes = bytes + excluded.bytes;
    END""",
    """CREATE TRIGGER share_shrinks AFTER DELETE ON messages BEGIN
        UPDATE shares SET messages = messages - 1, bytes = bytes - length(old.body)
            WHERE recipient = old.recipient AND sender = old.sender;
        DELETE FROM shares
            WHERE recipient = old.recipient AND sender = old.sender AND messages <= 0;
    END""",
    """INSERT INTO shares
        SELECT recipient, sender, count(*), sum(length(body)) FROM messages
        GROUP BY recipient, sender""",
)
"""How many messages of each sender are kept. By triggers, so that it is true of what processes of
release 0.1.0 do to the file, for which ``user_version`` stays."""

COUNT_KEPT: Final = """CREATE TEMP TRIGGER kept_shrinks AFTER DELETE ON main.messages BEGIN
    UPDATE heads SET kept_messages = kept_messages - 1, kept_bytes = kept_bytes - length(old.body)
        WHERE recipient = old.recipient;
END"""
"""What a recipient's limits are checked against. A trigger of the writer's connection, and not of
the file, because processes of release 0.1.0 count what they delete themselves."""

_UNUSABLE: Final = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}

log = structlog.get_logger(__name__)

_creating = threading.Lock()


def open_file(path: Path, now_s: float) -> tuple[list[sqlite3.Connection], FileGuard]:
    """Open the file and migrate its schema. ``now_s`` is the Unix time.

    Returns the connections of the writer, the checkpointer and the readers, and the file's guard.
    """
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            path = path.absolute()  # so that ":memory:" is a file like any other
            return _open(path, now_s)
        except sqlite3.Error as error:
            code = result_code(error)
            if code in _UNUSABLE:
                raise ConfigError(f"mailbox: {path} can't be used: {error}") from error
            if code != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise MailboxError(f"the mailbox {path} can't be opened now: {error}") from error
        except OSError as error:
            raise ConfigError(f"mailbox: {path} can't be used: {error.strerror}") from error
        # SQLite waits for no lock where two that wait could wait for each other: another process
        # opens the file just now.
        time.sleep(spread(0.02, 0.25, 1.5))


def _open(path: Path, now_s: float) -> tuple[list[sqlite3.Connection], FileGuard]:
    if not path.parent.is_dir():
        raise ConfigError(f"mailbox: the directory {path.parent} does not exist: create it")
    _create(path)
    side_file = SideFile(path.resolve())
    _refuse_older(path, side_file)
    with ExitStack() as on_error:
        connections = [on_error.enter_context(closing(connect(path))) for _ in range(2 + READERS)]
        _bring_up_to_date(connections[0], path, side_file, now_s)
        connections[0].execute(COUNT_KEPT)
        connections[0].execute("PRAGMA busy_timeout = 0")  # the worker pool waits by itself
        for connection in connections:
            connection.execute("SELECT 1 FROM heads").fetchone()  # opens SQLite's log as well
        _close_to_others(path.resolve())
        guard = FileGuard(path, side_file, objects(connections[0]))
        on_error.pop_all()
        return connections, guard


def _refuse_older(path: Path, side_file: SideFile) -> None:
    """Refuse a file that is older than SQLite's log of it, which would make it a mixture of both.

    Raises:
        ConfigError: it is.
    """
    real = path.resolve()
    with suppress(FileNotFoundError):
        if not real.with_name(f"{real.name}-wal").stat().st_size:
            return
        known, _ = side_file.read()
        held = generation.held_in(real)
        if known is None or held is None:
            return
        if held.is_older(side_file.held) or held.is_rewritten(known):
            raise ConfigError(
                f"mailbox: {path} is older than {path}-wal: if a backup was put in its place,"
                f" delete {path}-wal and {path}-shm, else {path}.generation, and start again"
            )


def _create(path: Path) -> None:
    """Create the file, readable for its user only. SQLite gives its other files the same mode."""
    # Closing a file ends the locks that this process has on it: nobody may have it open meanwhile.
    with _creating, suppress(OSError):  # it exists, or SQLite says what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _close_to_others(path: Path) -> None:
    """Take the permissions of strangers away from files that earlier releases have created."""
    for suffix in SUFFIXES:
        file = path.with_name(path.name + suffix)
        with suppress(FileNotFoundError, PermissionError):
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & stat.S_IRWXO:
                file.chmod(mode & ~stat.S_IRWXO)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claim the file at ``path`` for this instance; yield whether no other instance has claimed it.

    The claim is a lock on ``FILE.instance``, which ends with this process at the latest. SQLite
    does not know it. It is not a lock on ``FILE``, because closing that would end SQLite's locks.
    """
    lock = os.open(path.with_name(f"{path.name}.instance"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def connect(path: Path, *, must_exist: bool = False) -> sqlite3.Connection:
    """A connection to the file, as all of a mailbox's are."""
    db = sqlite3.connect(
        f"{path.as_uri()}?mode={'rw' if must_exist else 'rwc'}",
        timeout=LOCK_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        uri=True,
    )
    db.text_factory = _decode
    db.execute("PRAGMA synchronous = FULL")  # a commit is flushed to the disk
    db.execute(f"PRAGMA cache_size = -{CACHE_SIZE_BYTES // 1024}")
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    db.execute(f"PRAGMA journal_size_limit = {WAL_SIZE_BYTES}")
    return db


def _decode(text: bytes) -> str:
    """Replace what is no UTF-8, so that one damaged row does not fail the read of the others."""
    return text.decode(errors="replace")


def _bring_up_to_date(
    db: sqlite3.Connection, path: Path, side_file: SideFile, now_s: float
) -> None:
    """Check that the file is a mailbox or new, and apply the missing migrations.

    Begins a new generation when the file has gone back in time.
    """
    # Has an effect on an empty file only. Purges can then give free pages back.
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    try:
        db.execute("BEGIN IMMEDIATE")
        done = pragma(db, "user_version")
        if pragma(db, "application_id") != APPLICATION_ID:
            if db.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise ConfigError(f"mailbox: {path} is the database of another program")
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        if done > len(MIGRATIONS):
            raise ConfigError(
                f"mailbox: {path} was written by a newer release of pokebridge: upgrade this one"
            )
        _migrate(db, done)
        known, exists = side_file.read()
        if (reason := generation.why_new(db, known, exists=exists)) is not None:
            generation.begin(db, now_s, side_file.recorded())
            side_file.held = generation.Held()
        side_file.write(generation.state_of(db))  # under the lock: another opens the file next
        db.execute("COMMIT")
        if reason is not None:
            log.warning("mailbox_generation_begun", path=str(path), reason=reason)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise ConfigError(f"mailbox: {path} is on a file system without shared memory for SQLite")


def _migrate(db: sqlite3.Connection, done: int) -> None:
    """Do what is missing after the first ``done`` migrations."""
    missing: list[tuple[str, ...]] = list(MIGRATIONS[done:])
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'shares'").fetchone():
        missing.append(SHARES)
    for statements in missing:
        for statement in statements:
            db.execute(statement)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def objects(db: sqlite3.Connection) -> frozenset[str]:
    """The names of the tables, indices and triggers."""
    return frozenset(name for (name,) in db.execute("SELECT name FROM sqlite_master"))


def pragma(db: sqlite3.Connection, name: str) -> int:
    """The value of a PRAGMA that is a number."""
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])

"""The SQLite mailbox keeps the contract, through crashes, locks and full disks too."""
# ruff: noqa: ASYNC240 - what a test does to a file may block

import asyncio
import sqlite3
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pokebridge.errors import (
    ConfigError,
    InputError,
    MailboxError,
    MailboxFullError,
    MailboxRefusedError,
)
from pokebridge.mailbox import base, sqlite, sqlite_checkpoints, sqlite_file, sqlite_workers
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.mailbox.sqlite_checkpoints import Checkpointer
from pokebridge.mailbox.sqlite_generation import SideFile, state_of
from pokebridge.mailbox.sqlite_guard import FileGuard
from pokebridge.mailbox.sqlite_workers import (
    Job,
    Outcome,
    WorkerPool,
    commit_together,
    do_each,
)
from pokebridge.model import Receipt
from pokebridge.processor import Processor
from pokebridge.publisher import Publisher
from pokebridge.testing.mailbox import Connect, DurableMailboxContract
from pokebridge.testing.mailbox_kit import BOB, ManualClock, fill, kept, message, unpoked, versions
from pokebridge.transport.memory import MemoryTransport
from tests.support.waiting import block_until, wait_until

APPENDER = Path(__file__).with_name("appender.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a mailbox can be made."""
    return tmp_path / "mailbox.db"


@pytest.fixture
async def mailbox(path: Path) -> AsyncIterator[SqliteMailbox]:
    """An open mailbox at ``path``."""
    mailbox = await SqliteMailbox.open(path)
    yield mailbox
    await mailbox.close()


async def start_appender(path: Path, sender: str, count: int) -> Process:
    """Another process that appends to the mailbox at ``path``."""
    return await asyncio.create_subprocess_exec(
        sys.executable, APPENDER, path, sender, f"{count}", stdout=PIPE, stderr=PIPE
    )


class TestSqliteMailbox(DurableMailboxContract):
    """The shipped suite, on a file of its own for each test."""

    @pytest.fixture
    async def connect(
        self, clock: ManualClock, limits: Limits, path: Path
    ) -> AsyncIterator[Connect]:
        """Mailboxes on one file, closed afterwards."""
        opened: list[SqliteMailbox] = []

        async def connect() -> Mailbox:
            opened.append(await SqliteMailbox.open(path, clock, limits))
            return opened[-1]

        yield connect
        for mailbox in opened:
            await mailbox.close()


class TestSeveralProcesses:
    """What only real processes can show."""

    async def test_processes_share_one_count(self, path: Path) -> None:
        """Two processes that append to one recipient as fast as they can: dense, none refused.

        They also make the file at the same time, and end without closing it, silently.
        """
        processes = [await start_appender(path, f"urn:user:{n}", 300) for n in range(2)]
        outputs = [await process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        assert [errors for _, errors in outputs] == [b"", b""]
        printed = [int(line) for output, _ in outputs for line in output.split()]
        assert sorted(printed) == list(range(1, 601))
        mailbox = await SqliteMailbox.open(path)
        assert await versions(mailbox) == list(range(1, 601))
        await mailbox.close()

    async def test_what_was_acknowledged_survives_a_kill(self, path: Path) -> None:
        """A SIGKILL amid appends loses no printed receipt, tears no hole and forgets no poke."""
        process = await start_appender(path, "urn:user:killed", 0)
        assert process.stdout is not None
        printed = [int(await process.stdout.readline()) for _ in range(500)]
        process.kill()
        rest, _ = await process.communicate()
        printed += [int(line) for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]

        mailbox = await SqliteMailbox.open(path)
        kept = await versions(mailbox)
        assert kept == list(range(1, len(kept) + 1))
        assert set(printed) <= set(kept)
        assert await unpoked(mailbox) == {BOB: kept[-1]}
        retry = message(sender="urn:user:killed", id="0", has_idempotency_key=True)
        assert (await mailbox.append(retry)).duplicate
        await mailbox.close()


async def appended(mailbox: SqliteMailbox) -> int:
    """How many messages the file says that it ever got."""
    return (await mailbox._reads.do(state_of)).appended


class TestTheWriter:
    """One thread, one transaction for what waits."""

    async def test_waiting_appends_share_a_transaction(self, mailbox: SqliteMailbox) -> None:
        """Two hundred appends at once cost a few commits, so the disk is flushed a few times."""
        statements: list[str] = []
        await mailbox._writes.do(lambda db: db.set_trace_callback(statements.append))
        await asyncio.gather(*(mailbox.append(message()) for _ in range(200)))
        commits = statements.count("COMMIT")
        assert commits < 20
        assert sum("SET appended" in statement for statement in statements) <= commits
        assert not any("SAVEPOINT" in statement for statement in statements)
        assert await appended(mailbox) == 200

    async def test_a_failing_append_fails_alone(self, mailbox: SqliteMailbox) -> None:
        """An append that breaks half-way is undone; its neighbours in the transaction commit."""
        calls = [mailbox.append(message(id="\ud800" if n == 7 else f"{n}")) for n in range(20)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers.pop(7), InputError)
        assert sorted(answer.version for answer in answers if isinstance(answer, Receipt)) == list(
            range(1, 20)
        )
        assert await versions(mailbox) == list(range(1, 20))
        assert await appended(mailbox) == 19

    async def test_a_full_disk_is_no_end(self, mailbox: SqliteMailbox) -> None:
        """While the disk is full, appends raise MailboxError and reads work.

        Then appends work again.
        """
        await mailbox.append(message())
        await mailbox._writes.do(lambda db: db.execute("PRAGMA max_page_count = 20"))
        big = message(body=b'"' + b"x" * 60_000 + b'"')
        answers = await asyncio.gather(
            *(mailbox.append(big) for _ in range(10)), return_exceptions=True
        )
        failures = [answer for answer in answers if not isinstance(answer, Receipt)]
        assert failures
        assert all(isinstance(failure, MailboxError) for failure in failures)
        assert "full" in str(failures[0])
        committed = 1 + len(answers) - len(failures)
        assert await versions(mailbox) == list(range(1, committed + 1))
        await mailbox._writes.do(lambda db: db.execute("PRAGMA max_page_count = 10000"))
        assert (await mailbox.append(big)).version == committed + 1

    async def test_a_commit_that_fails_fails_for_all(self) -> None:
        """If the commit fails, all of its callers get the error, and the next one starts clean."""
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        db.execute("CREATE TABLE child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
        pool = WorkerPool("test", [db], commit_together, batch_size=10)

        def add(table: str, number: int) -> Coroutine[Any, Any, object]:
            return pool.do(lambda db: db.execute(f"INSERT INTO {table} VALUES ({number})"))

        def keep_busy(_: sqlite3.Connection) -> bool:
            started.set()
            return released.wait(10)

        # The first keeps the thread busy, so that the next two share a transaction.
        started, released = threading.Event(), threading.Event()
        first = asyncio.create_task(pool.do(keep_busy))
        await wait_until(started.is_set)
        both = asyncio.gather(add("parent", 1), add("child", 2), return_exceptions=True)
        await asyncio.sleep(0)
        released.set()
        assert [type(answer) for answer in await both] == [MailboxRefusedError] * 2
        assert await first
        await add("parent", 1)
        await pool.close()

    async def test_a_defect_ends_no_thread(self) -> None:
        """An error outside the jobs reaches all waiting calls, and the next call succeeds."""
        errors = [RuntimeError("a defect")]

        def do(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome]:
            if errors:
                raise errors.pop()
            return do_each(db, jobs)

        db = sqlite3.connect(":memory:", check_same_thread=False)
        pool = WorkerPool("test", [db], do, batch_size=10)
        with pytest.raises(MailboxError, match="see the log"):
            await pool.do(lambda _: 1)
        assert await pool.do(lambda _: 2) == 2
        await pool.close()

    async def test_a_commit_is_flushed(self, mailbox: SqliteMailbox) -> None:
        """Power loss can't be tested here, its remedy can: WAL mode, and a flush each commit."""

        def settings(db: sqlite3.Connection) -> list[tuple[str | int]]:
            return [
                db.execute(f"PRAGMA {name}").fetchone() for name in ("journal_mode", "synchronous")
            ]

        full = 2
        assert await mailbox._writes.do(settings) == [("wal",), (full,)]

    async def test_a_lock_held_too_long_is_an_error(
        self, path: Path, mailbox: SqliteMailbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While another process keeps the write lock, writes fail in time, and reads go on."""
        monkeypatch.setattr(sqlite_workers, "LOCK_TIMEOUT_S", 0.1)
        await mailbox.append(message())
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(MailboxError, match="locked"):
                await mailbox.append(message())
            with pytest.raises(MailboxError, match="locked"):
                await mailbox.check()
            assert await versions(mailbox) == [1]
        assert (await mailbox.append(message())).version == 2

    async def test_waiting_calls_are_bounded(
        self, path: Path, mailbox: SqliteMailbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A call too many is refused at once; those that wait are done when the lock is free."""
        monkeypatch.setattr(base, "MAX_WAITING", 3)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            calls = [asyncio.create_task(mailbox.append(message())) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(MailboxError, match="overloaded"):
                await mailbox.append(message())
        assert sorted(receipt.version for receipt in await asyncio.gather(*calls)) == [1, 2, 3]
        assert (await mailbox.append(message())).version == 4

    async def test_a_cancelled_caller_gives_its_place_back(
        self, path: Path, mailbox: SqliteMailbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cancelled callers leave the queue."""
        monkeypatch.setattr(base, "MAX_WAITING", 3)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            calls = [asyncio.create_task(mailbox.append(message())) for _ in range(3)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await wait_until(lambda: mailbox._writes._waiting == 0)
        assert (await mailbox.append(message())).version == 4


class TestCheckpoints:
    """The write-ahead log is copied into the file without the writer."""

    async def test_the_log_is_copied_before_a_commit_has_to(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was committed is in the file itself, though no commit ever found the log too long.

        The log keeps it as well: a restart reads everything, whatever was copied.
        """
        monkeypatch.setattr(sqlite_file, "CHECKPOINT_PAGES", 1_000_000)
        monkeypatch.setattr(sqlite_checkpoints, "COPY_PAGES", 20)
        monkeypatch.setattr(sqlite_checkpoints, "COPY_AGAIN_PAGES", 20)
        mailbox = await SqliteMailbox.open(path)
        big = b"1" * 20_000
        for copied_bytes in (100_000, 300_000):  # again and again
            await asyncio.gather(*(mailbox.append(message(body=big)) for _ in range(20)))
            await wait_until(lambda: path.stat().st_size > copied_bytes)  # noqa: B023
        assert len(await versions(mailbox)) == 40
        await mailbox.close()
        assert not [it for it in threading.enumerate() if it.name == "mailbox-checkpointer"]

    def test_a_copy_that_fails_is_not_the_last(self, path: Path) -> None:
        """The thread continues, because the next copy or the writer's checkpoint may succeed."""
        path.write_text("no database" * 100)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        guard = FileGuard(path, SideFile(path), frozenset())
        checkpointer = Checkpointer(db, guard)
        for _ in range(2):
            checkpointer._is_due.set()
            block_until(lambda: not checkpointer._is_due.is_set())
        checkpointer.close()

    async def test_the_guard_knows_the_length_after_a_copy(
        self, path: Path, mailbox: SqliteMailbox
    ) -> None:
        """A copy that makes the file shorter is noticed before the next may make it longer."""
        await asyncio.gather(*(mailbox.append(message(body=b"1" * 60_000)) for _ in range(20)))

        def shrink(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM messages")
            for _ in range(1000):
                db.execute("PRAGMA incremental_vacuum(1)")

        mailbox._checkpointer._is_due.set()
        await wait_until(lambda: path.stat().st_size > 1_000_000)
        long_bytes = path.stat().st_size
        await mailbox._writes.do(shrink)
        mailbox._checkpointer._is_due.set()
        await wait_until(lambda: mailbox._guard._seen.size_bytes < long_bytes)
        assert path.stat().st_size < long_bytes
        assert (await mailbox.append(message())).version == 21


class TestReading:
    """What a pull costs."""

    async def test_nothing_to_read_is_one_look_up(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An idle client's pull is one search by primary key; one with news is two."""
        monkeypatch.setattr(sqlite_file, "READERS", 1)
        mailbox = await SqliteMailbox.open(path)
        await fill(mailbox, 3)
        statements: list[str] = []
        await mailbox._reads.do(lambda db: db.set_trace_callback(statements.append))
        await mailbox.read(BOB, after=3, limit=50)
        assert len(statements) == 1
        await mailbox.read(BOB, after=2, limit=50)
        assert len(statements) == 3
        await mailbox.close()
        with closing(sqlite3.connect(path)) as db:
            for statement in statements:
                plan = db.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
                assert all("USING PRIMARY KEY" in step[3] for step in plan), plan

    async def test_an_error_keeps_no_later_read_at_its_moment(
        self, path: Path, mailbox: SqliteMailbox
    ) -> None:
        """An error ends a read amid its rows, and the next ones see commits."""
        await fill(mailbox, 2)

        def fail_amid(db: sqlite3.Connection) -> None:
            next(rows := db.execute("SELECT version FROM messages"))
            raise MailboxError(f"amid {rows}")

        errors = []
        for _ in range(4):  # each reader has its turn
            with pytest.raises(MailboxError) as raised:
                await mailbox._reads.do(fail_amid)
            errors.append(raised.value)
        await fill(mailbox, 1)
        for _ in range(4):
            assert await versions(mailbox) == [1, 2, 3]

    async def test_a_damaged_text_harms_only_itself(
        self, path: Path, mailbox: SqliteMailbox
    ) -> None:
        """A message whose sender is not UTF-8 is delivered, and so are those after it."""
        await fill(mailbox, 3)
        with closing(sqlite3.connect(path)) as by_hand:
            by_hand.execute("UPDATE messages SET sender = CAST(x'ff' AS TEXT) WHERE version = 2")
            by_hand.commit()
        page = await mailbox.read(BOB, after=0, limit=10)
        assert [kept.version for kept in page.messages] == [1, 2, 3]
        assert page.messages[1].sender == "\N{REPLACEMENT CHARACTER}"

    @pytest.mark.parametrize("name", ["heads", "outbox", "messages_by_expiry", "share_grows"])
    async def test_a_schema_with_a_hole_is_told(
        self, path: Path, mailbox: SqliteMailbox, name: str
    ) -> None:
        """While a table, an index or a trigger is missing, the check fails and names it."""
        await mailbox.check()
        with closing(sqlite3.connect(path)) as by_hand:
            kind, definition = by_hand.execute(
                "SELECT type, sql FROM sqlite_master WHERE name = ?", (name,)
            ).fetchone()
            taken_away, put_back = f"DROP {kind} {name}", definition
            if kind == "table":
                taken_away = f"ALTER TABLE {name} RENAME TO elsewhere"
                put_back = f"ALTER TABLE elsewhere RENAME TO {name}"
            by_hand.execute(taken_away)
            with pytest.raises(MailboxError, match=name):
                await mailbox.check()
            by_hand.execute(put_back)
        await mailbox.check()

    async def test_a_row_of_any_type_holds_up_no_sweep(
        self, path: Path, mailbox: SqliteMailbox
    ) -> None:
        """An entry is set aside whose recipient or version is of another type, or no UTF-8."""
        by_hand = sqlite3.connect(path)
        by_hand.execute(
            "INSERT INTO outbox VALUES (x'ff00', 1, 0), ('z', 'abc', 0), (x'7a', 1, 0),"
            " (CAST(x'ff00' AS TEXT), 1, 0), (CAST(x'ff' AS TEXT), 1, 0)"
        )
        by_hand.commit()
        by_hand.close()
        transport = MemoryTransport()
        async with Publisher(transport) as publisher, Processor(mailbox, publisher) as sender:
            await wait_until(lambda: sender.stats.pokes_unpublishable == 5)
            await wait_until(lambda: _owes_nothing(mailbox))


async def _owes_nothing(mailbox: SqliteMailbox) -> bool:
    return (await mailbox.stats()).outbox == 0


class TestVacuuming:
    """The file does not stay as large as it once was."""

    async def test_purges_shrink_the_file(
        self, path: Path, mailbox: SqliteMailbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The space of a backlog is given back to the disk in steps, except for a small reserve."""
        monkeypatch.setattr(sqlite, "VACUUM_PAGES", 64)
        big = b"1" * 60_000
        await asyncio.gather(*(mailbox.append(message(body=big)) for _ in range(100)))
        await mailbox.ack(BOB, "phone", 100)

        async def pages() -> int:
            return await mailbox._writes.do(lambda db: sqlite_file.pragma(db, "page_count"))

        sizes = [await pages()]
        for _ in range(40):
            await mailbox.purge(limit=100)
            sizes.append(await pages())
        assert sizes[0] > 1400
        assert all(0 <= one - other <= 70 for one, other in pairwise(sizes))
        assert sizes[-1] < 150
        assert (await mailbox.append(message())).version == 101


class TestOpening:
    """What is no mailbox is refused with one clear line, and left as it was."""

    async def test_a_missing_directory(self, tmp_path: Path) -> None:
        """The line names the directory; nothing is made."""
        with pytest.raises(ConfigError, match=f"the directory {tmp_path / 'no'} does not exist"):
            await SqliteMailbox.open(tmp_path / "no" / "mailbox.db")
        assert not list(tmp_path.iterdir())

    async def test_a_directory_where_nothing_can_be_made(self) -> None:
        """A directory that can't be written (here one where even root can't) is a wrong setting."""
        with pytest.raises(ConfigError, match=r"^mailbox: /proc/mailbox\.db can't be used: unable"):
            await SqliteMailbox.open("/proc/mailbox.db")

    async def test_a_directory_for_a_file(self, tmp_path: Path) -> None:
        """A path that is a directory is a wrong setting."""
        with pytest.raises(ConfigError, match="can't be used"):
            await SqliteMailbox.open(tmp_path)

    async def test_a_text_file(self, path: Path) -> None:
        """A file that is not a database is refused as a wrong setting."""
        path.write_text("Dear diary, " * 100)
        with pytest.raises(ConfigError, match="not a database"):
            await SqliteMailbox.open(path)
        assert path.read_text() == "Dear diary, " * 100

    async def test_another_programs_database(self, path: Path) -> None:
        """Another program's database is a wrong setting, and is not touched."""
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE photos (name)")
        before = path.read_bytes()
        with pytest.raises(ConfigError, match="another program"):
            await SqliteMailbox.open(path)
        assert path.read_bytes() == before

    async def test_an_older_schema_is_brought_up_to_date(self, path: Path) -> None:
        """Messages and devices of the first schema are kept and count against the limits."""
        with closing(sqlite3.connect(path)) as db, db:
            for statement in sqlite_file.MIGRATIONS[0]:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {sqlite_file.APPLICATION_ID}")
            db.execute("PRAGMA user_version = 1")
            db.execute("INSERT INTO heads VALUES (?, 3)", (BOB,))
            for version in (2, 3):
                row = (BOB, version, "m", "urn:user:alice", b"1234", 0, None)
                db.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            db.execute("INSERT INTO devices VALUES (?, 'phone', 1)", (BOB,))
        mailbox = await SqliteMailbox.open(path, limits=Limits(max_messages=3))
        assert await kept(mailbox) == (2, 8)
        assert await mailbox.purge(limit=10) == 0
        assert (await mailbox.append(message())).version == 4
        with pytest.raises(MailboxFullError):
            await mailbox.append(message())
        await mailbox.ack(BOB, "phone", 3)
        assert await versions(mailbox) == [4]
        await mailbox.close()

    async def test_a_newer_schema(self, path: Path) -> None:
        """A file that a newer version wrote is not read by guess."""
        await (await SqliteMailbox.open(path)).close()
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")
        with pytest.raises(ConfigError, match="newer release"):
            await SqliteMailbox.open(path)

    async def test_an_empty_file_becomes_a_mailbox(self, path: Path) -> None:
        """An empty file, as mktemp makes it, is taken as a new one."""
        path.touch()
        mailbox = await SqliteMailbox.open(path)
        assert (await mailbox.append(message())).version == 1
        await mailbox.close()

    async def test_memory_is_a_file_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """``:memory:`` would give each connection its own database, so it names a file here."""
        monkeypatch.chdir(tmp_path)
        mailbox = await SqliteMailbox.open(":memory:")
        await fill(mailbox, 1)
        assert await versions(mailbox) == [1]
        await mailbox.close()
        assert (tmp_path / ":memory:").exists()

    async def test_many_can_open_a_new_file_at_once(self, path: Path) -> None:
        """The first one creates the tables, and the others wait."""
        mailboxes = await asyncio.gather(*(SqliteMailbox.open(path) for _ in range(8)))
        await asyncio.gather(*(mailbox.append(message()) for mailbox in mailboxes))
        assert await versions(mailboxes[0]) == list(range(1, 9))
        for mailbox in mailboxes:
            await mailbox.close()

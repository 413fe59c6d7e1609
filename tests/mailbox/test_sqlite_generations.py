"""A SQLite mailbox whose file goes back in time, is deleted, or is full: no silent loss."""
# ruff: noqa: ASYNC240 - what a test does to a file may block

import asyncio
import os
import shutil
import sqlite3
import stat
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from pokebridge.errors import ConfigError, MailboxError
from pokebridge.mailbox import sqlite_generation
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import MAX_VERSION
from pokebridge.testing.mailbox_kit import BOB, fill, head, message, versions
from tests.support import wait_until

APPENDER = Path(__file__).with_name("appender.py")
OPENER = Path(__file__).with_name("opener.py")
# Runs a script with a log that begins anew every few dozen commits.
SHORT_LOG = """
import runpy, sys
from pokebridge.mailbox import sqlite_checkpoints, sqlite_file
sqlite_checkpoints.COPY_PAGES = sqlite_checkpoints.COPY_AGAIN_PAGES = 20
sqlite_file.CHECKPOINT_PAGES = 40
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Above the versions of the first generation, below those of a later one.
GENERATION = 1 << 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a mailbox can be made, in a directory of its own."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "mailbox.db"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory for copies."""
    (tmp_path / "saved").mkdir()
    return tmp_path / "saved"


async def send(path: Path, count: int, clock: Callable[[], float] = time.time) -> int:
    """Open the mailbox, append ``count`` messages and close it. Returns the head."""
    mailbox = await SqliteMailbox.open(path, clock)
    await fill(mailbox, count)
    newest = await head(mailbox, BOB)
    await mailbox.close()
    return newest


def change(path: Path, *statements: str) -> None:
    """Do ``statements`` as another program."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def copy_all(source: Path, target: Path) -> None:
    """Copy every file of a directory over what is there, as ``cp -p SOURCE/* TARGET`` does."""
    for file in source.iterdir():
        shutil.copy2(file, target)


def copy_the_file(source: Path, target: Path) -> None:
    """Copy the database alone."""
    shutil.copy2(source / "mailbox.db", target)


def move_the_file(source: Path, target: Path) -> None:
    """Put the copy in place of the database by a rename."""
    (source / "mailbox.db").rename(target / "mailbox.db")


def replace_all(source: Path, target: Path) -> None:
    """Delete everything, then copy everything."""
    for file in target.iterdir():
        file.unlink()
    copy_all(source, target)


def replace_all_by_the_file(source: Path, target: Path) -> None:
    """Delete everything, then copy the database alone, as on a new machine."""
    for file in target.iterdir():
        file.unlink()
    copy_the_file(source, target)


def delete_the_file(_source: Path, target: Path) -> None:
    """Begin with an empty mailbox."""
    (target / "mailbox.db").unlink()


@pytest.mark.parametrize(
    "restore",
    [
        copy_all,
        copy_the_file,
        move_the_file,
        replace_all,
        replace_all_by_the_file,
        delete_the_file,
    ],
    ids=lambda it: it.__name__,
)
async def test_no_version_is_used_twice(
    path: Path, saved: Path, restore: Callable[[Path, Path], None]
) -> None:
    """However an older file comes into its place, new messages are above the cursors of before.

    They are dense from there on, an ack of before deletes none, and a restart changes nothing.
    """
    await send(path, 3)
    copy_all(path.parent, saved)
    backed_up_ns = time.time_ns()
    cursor = await send(path, 5)
    await wait_until(lambda: time.time_ns() > backed_up_ns + sqlite_generation.TOLERANCE_NS)
    assert cursor == 8
    restore(saved, path.parent)
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 7)
    await mailbox.ack(BOB, "phone", cursor)
    page = await mailbox.read(BOB, after=cursor, limit=10, unless_head=cursor)
    assert len(page.messages) == 7
    first = page.messages[0].version
    assert GENERATION < first < page.version == first + 6 <= MAX_VERSION
    await mailbox.close()
    assert await send(path, 1) == first + 7


async def vacuumed_in_use(path: Path, saved: Path, *, commits_after: int) -> bytes:
    """Copy the file into ``saved`` while a process appends, which is killed some commits later.

    Returns the versions that were not read from it before, one a line.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, APPENDER, path, "urn:user:alice", "0", stdout=PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    await asyncio.to_thread(change, path, f"VACUUM INTO '{saved / 'mailbox.db'}'")
    for _ in range(commits_after):
        await process.stdout.readline()
    process.kill()
    rest, _ = await process.communicate()
    return rest


async def test_a_copy_of_a_file_in_use(path: Path, saved: Path) -> None:
    """A backup made while messages arrive, and put back after the process was killed."""
    rest = await vacuumed_in_use(path, saved, commits_after=100)
    cursor = max(map(int, rest.split()), default=100)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    copy_the_file(saved, path.parent)
    mailbox = await SqliteMailbox.open(path)
    assert await head(mailbox, BOB) < cursor
    await fill(mailbox, 1)
    assert await head(mailbox, BOB) > GENERATION
    await mailbox.close()


async def test_two_restores_of_one_copy(path: Path, saved: Path) -> None:
    """Versions given out after the first restore are not given out after the second."""
    await send(path, 3)
    copy_the_file(path.parent, saved)
    seen = 0
    for _ in range(3):
        copy_the_file(saved, path.parent)
        newest = await send(path, 5)
        assert newest - 5 > seen
        seen = newest


async def test_a_restore_after_the_clock_was_set_back(path: Path, saved: Path) -> None:
    """Generations that begin in hours that were there before give no version twice."""
    await send(path, 3)
    copy_the_file(path.parent, saved)
    seen = 0
    for hours in range(3):
        copy_the_file(saved, path.parent)
        newest = await send(path, 5, lambda: time.time() - hours * 3600)  # noqa: B023 - used now
        assert newest - 5 >= seen
        seen = newest
    assert seen < MAX_VERSION


async def test_everything_is_put_back_after_the_clock_was(
    path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored ``.generation`` is not trusted because it seems to be from the future."""
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 3600 * 10**9)
    await send(path, 3)
    monkeypatch.undo()
    copy_all(path.parent, saved)
    cursor = await send(path, 5)
    copy_all(saved, path.parent)
    assert await send(path, 5) - 5 >= cursor


async def test_a_generation_goes_on(path: Path) -> None:
    """Neither restarts, nor VACUUM, nor a second process, nor a kill begins a generation."""
    assert await send(path, 2) == 2
    assert await send(path, 2) == 4
    await asyncio.to_thread(change, path, "VACUUM")
    one = await SqliteMailbox.open(path)
    await fill(one, 1)
    assert await send(path, 1) == 6
    await fill(one, 1)
    await one.close()
    process = await asyncio.create_subprocess_exec(
        sys.executable, APPENDER, path, "urn:user:alice", "0", stdout=PIPE
    )
    assert process.stdout is not None
    for _ in range(50):
        await process.stdout.readline()
    process.kill()
    await process.communicate()
    mailbox = await SqliteMailbox.open(path)
    newest = await head(mailbox, BOB)
    await fill(mailbox, 1)
    assert await versions(mailbox) == list(range(1, newest + 2))
    await mailbox.close()


async def test_a_file_of_an_earlier_release_goes_on(path: Path) -> None:
    """A file without a generation, as 0.1.0 made it, continues; 0.1.0's statements still work."""
    await send(path, 2)
    await asyncio.to_thread(change, path, "DROP TABLE generation", "DROP TABLE probe")
    path.with_name("mailbox.db.generation").unlink()
    assert await send(path, 1) == 3
    await asyncio.to_thread(change, path, "UPDATE heads SET head = head + 1")
    assert await send(path, 1) == 5


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_file_that_is_gone(path: Path, suffix: str, is_replaced: bool) -> None:  # noqa: FBT001
    """Every call is refused once the file is deleted or replaced, for good, with one log line."""
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 1)
    file = path.with_name(path.name + suffix)
    kept = file.rename(file.with_name("kept"))
    if is_replaced:
        shutil.copy2(kept, file)
    with capture_logs() as logs:
        for call in (
            mailbox.append(message()),
            mailbox.read(BOB, after=0, limit=1),
            mailbox.ack(BOB, "phone", 1),
            mailbox.check(),
        ):
            with pytest.raises(MailboxError, match="restart this instance"):
                await call
        kept.rename(file)
        with pytest.raises(MailboxError):
            await mailbox.append(message())
    (line,) = logs
    assert line["event"] == "mailbox_file_gone"
    assert line["reason"] == ("replaced" if is_replaced else "deleted")
    await mailbox.close()


def cut_to_nothing(path: Path) -> None:
    """As ``> FILE`` does."""
    os.truncate(path, 0)


def cut_in_half(path: Path) -> None:
    """As a copy onto it that broke off."""
    os.truncate(path, path.stat().st_size // 2)


def move_the_directory(path: Path) -> None:
    """Away, with all that is in it."""
    path.parent.rename(path.parent.with_name("elsewhere"))


@pytest.mark.parametrize(
    "spoil", [cut_to_nothing, cut_in_half, move_the_directory], ids=lambda it: it.__name__
)
async def test_a_file_that_is_spoilt_in_use(path: Path, spoil: Callable[[Path], None]) -> None:
    """Every call is refused from then on, with one log line, and no version is given twice."""
    await send(path, 50)
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 50)
    spoil(path)
    with capture_logs() as logs:
        for _ in range(2):
            for call in (mailbox.append(message()), mailbox.read(BOB, after=0, limit=1)):
                with pytest.raises(MailboxError, match="restart this instance"):
                    await call
    assert [line["event"] for line in logs] == ["mailbox_file_gone"]
    await mailbox.close()
    path.parent.mkdir(exist_ok=True)
    assert await send(path, 1) > (0 if spoil is move_the_directory else 100)


async def test_a_damaged_file_is_told_once(path: Path) -> None:
    """What SQLite finds malformed is refused for good, with one log line."""
    mailbox = await SqliteMailbox.open(path)
    for _ in range(50):
        await mailbox.append(message(body=b'"' + b"x" * 4000 + b'"'))
    await mailbox.close()
    with path.open("r+b") as file:
        file.seek(50 * 4096)
        file.write(b"garbage" * 20_000)
    mailbox = await SqliteMailbox.open(path)
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(MailboxError, match="damaged"):
                await mailbox.read(BOB, after=0, limit=500)
        with pytest.raises(MailboxError, match="damaged"):
            await mailbox.check()
    assert [(line["event"], line["reason"]) for line in logs] == [("mailbox_file_gone", "damaged")]
    await mailbox.close()


async def test_a_restore_by_sqlite_while_in_use(path: Path, saved: Path) -> None:
    """As of its shell: the next transaction, even one in which a job fails, gives new versions.

    One generation begins, whichever of the processes that share the file has noticed first.
    """
    mailbox, other = await SqliteMailbox.open(path), await SqliteMailbox.open(path)
    await fill(mailbox, 10)
    with closing(sqlite3.connect(path)) as db, closing(sqlite3.connect(saved / "copy.db")) as copy:
        db.backup(copy)
        await fill(other, 10)
        copy.backup(db)
    await asyncio.gather(
        mailbox.append(message()), mailbox.append(message(id="\ud800")), return_exceptions=True
    )
    first = await head(mailbox, BOB)
    assert first > GENERATION
    with capture_logs() as logs:
        await fill(other, 1)
        await fill(mailbox, 1)
        await mailbox.check()
    assert await head(other, BOB) == first + 2
    assert not logs
    await mailbox.close()
    await other.close()
    assert await send(path, 1) == first + 3


@pytest.mark.parametrize(
    "damage",
    [
        ["DELETE FROM heads", "DELETE FROM messages"],
        ["DELETE FROM generation"],
        ["UPDATE generation SET appended = 'x'"],
    ],
    ids=["heads", "generation", "row"],
)
@pytest.mark.parametrize("in_use", [True, False], ids=["in_use", "stopped"])
async def test_rows_that_another_program_deletes(
    path: Path, damage: list[str], *, in_use: bool
) -> None:
    """As a restore of the data does, or an operator: no call hangs, and no version comes again."""
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 10)
    if not in_use:
        await mailbox.close()
    await asyncio.to_thread(change, path, *damage)
    if not in_use:
        mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 2)
    await mailbox.check()
    first = (await mailbox.read(BOB, after=10, limit=1)).messages[0].version
    assert GENERATION < first == await head(mailbox, BOB) - 1
    await mailbox.close()
    assert await send(path, 1) == first + 2


async def test_an_older_copy_over_the_file_in_use(path: Path, saved: Path) -> None:
    """Its content is replaced, and the file stays: no version is given twice, then or later."""
    await send(path, 10)
    copy_the_file(path.parent, saved)
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 10)
    copy_the_file(saved, path.parent)
    await fill(mailbox, 1)
    assert await head(mailbox, BOB) > 20
    await mailbox.close()
    assert await send(path, 1) > 21


async def test_an_older_copy_over_the_file_after_a_checkpoint(path: Path, saved: Path) -> None:
    """It lacks what SQLite's log no longer has: every call is refused, with one log line.

    A client above the restored versions pulls what is sent after the next start.
    """
    await send(path, 10)
    copy_the_file(path.parent, saved)
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 10)
    await asyncio.to_thread(change, path, "PRAGMA wal_checkpoint(RESTART)")
    await fill(mailbox, 1)
    with path.open("r+b") as file:
        file.write((saved / "mailbox.db").read_bytes())
    with capture_logs() as logs:
        for call in (mailbox.append(message()), mailbox.read(BOB, after=0, limit=1)):
            with pytest.raises(MailboxError, match="restart this instance"):
                await call
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("mailbox_file_gone", "replaced by an older copy")
    ]
    await mailbox.close()
    copy_the_file(saved, path.parent)
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 1)
    page = await mailbox.read(BOB, after=21, limit=10)
    assert len(page.messages) == 1
    await mailbox.close()


async def test_a_vacuumed_copy_over_the_file_in_use(path: Path, saved: Path) -> None:
    """It has the same content in other places, which would spoil the file: it is refused."""
    await send(path, 50)
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 10)
    await asyncio.to_thread(change, path, f"VACUUM INTO '{saved / 'mailbox.db'}'")
    await fill(mailbox, 10)
    with path.open("r+b") as file:
        file.write((saved / "mailbox.db").read_bytes())

    async def is_refused() -> bool:
        try:
            await mailbox.append(message())
        except MailboxError as error:
            return "replaced by an older copy" in str(error)
        return False

    await wait_until(is_refused)
    await mailbox.close()
    copy_the_file(saved, path.parent)
    assert await send(path, 1) > GENERATION


async def test_an_older_copy_under_the_log_of_a_killed_process(path: Path, saved: Path) -> None:
    """It and the log do not fit: a start says what to delete, and then a generation begins."""
    await send(path, 10)
    copy_the_file(path.parent, saved)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SHORT_LOG, APPENDER, path, "urn:user:alice", "0", stdout=PIPE
    )
    assert process.stdout is not None
    lines = process.stdout
    side_file = path.with_name("mailbox.db.generation")

    async def is_copied() -> bool:
        """Whether the log has been copied and begun anew, and that was recorded."""
        await lines.readline()
        return int(side_file.read_text().split()[-2]) > 10

    await wait_until(is_copied, 60)
    process.kill()
    await process.communicate()
    copy_the_file(saved, path.parent)
    with pytest.raises(ConfigError, match=r"delete .*mailbox\.db-wal"):
        await SqliteMailbox.open(path)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 1)
    assert await head(mailbox, BOB) > GENERATION
    await mailbox.close()


async def test_a_vacuumed_copy_under_the_log_of_a_killed_process(path: Path, saved: Path) -> None:
    """It holds more than the file did without the log, and does not fit to it either."""
    await send(path, 50)
    await vacuumed_in_use(path, saved, commits_after=50)
    copy_the_file(saved, path.parent)
    with pytest.raises(ConfigError, match=r"delete .*mailbox\.db-wal"):
        await SqliteMailbox.open(path)


async def test_a_link_that_leads_elsewhere(path: Path) -> None:
    """A link is followed. If it is changed to another file, the mailbox counts as gone."""
    link = path.with_name("link.db")
    await send(path, 2)
    link.symlink_to(path)
    assert await send(link, 1) == 3
    mailbox = await SqliteMailbox.open(link)
    link.unlink()
    shutil.copy2(path, path.with_name("other.db"))
    link.symlink_to(path.with_name("other.db"))
    with pytest.raises(MailboxError, match="replaced"):
        await mailbox.append(message())
    await mailbox.close()
    assert await send(path, 1) == 4


async def test_many_open_a_new_file_at_once(path: Path) -> None:
    """The first generation begins at 1, however many processes begin it."""
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, APPENDER, path, f"urn:user:{number}", "5", stdout=PIPE
        )
        for number in range(4)
    ]
    outputs = [await process.communicate() for process in processes]
    given = sorted(int(line) for output, _ in outputs for line in output.split())
    assert given == list(range(1, 21))


async def test_processes_open_a_new_file_at_the_same_time(path: Path) -> None:
    """None is told that it is locked, as SQLite says where two could wait for each other."""
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, OPENER, stdin=PIPE, stdout=PIPE)
        for _ in range(6)
    ]

    async def open_one(process: Process, number: int) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path.with_name(str(number))}\n".encode())
        return await process.stdout.readline()

    for number in range(10):
        answers = await asyncio.gather(*(open_one(process, number) for process in processes))
        assert set(answers) == {b"opened\n"}
    for process in processes:
        await process.communicate(b"")


async def test_a_file_that_goes_during_a_commit(path: Path) -> None:
    """A commit into a file that was deleted meanwhile is not acknowledged."""
    mailbox = await SqliteMailbox.open(path)
    deleting = mailbox._writes.do(lambda _db: path.unlink())
    appending = mailbox.append(message())
    answers = await asyncio.gather(deleting, appending, return_exceptions=True)
    assert [type(answer) for answer in answers] == [MailboxError, MailboxError]
    await mailbox.close()


async def test_a_full_disk_is_told(path: Path) -> None:
    """While the disk is full the check fails, which is logged once; then both are well again."""
    mailbox = await SqliteMailbox.open(path)
    await mailbox.append(message())
    await mailbox._writes.do(lambda db: db.execute("PRAGMA max_page_count = 30"))
    big = message(body=b'"' + b"x" * 60_000 + b'"')
    with capture_logs() as logs:
        for _ in range(3):
            calls = [mailbox.append(big) for _ in range(5)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(answers[-1], MailboxError)
            with pytest.raises(MailboxError, match="full"):
                await mailbox.check()
        await mailbox._writes.do(lambda db: db.execute("PRAGMA max_page_count = 10000"))
        await mailbox.check()
        await mailbox.check()
    assert [line["event"] for line in logs] == ["mailbox_unwritable", "mailbox_writable_again"]
    await mailbox.append(big)
    await mailbox.close()


async def test_the_files_are_private(path: Path) -> None:
    """Only the owner can read the files, also those that an earlier release created."""

    def modes() -> set[int]:
        return {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 1)
    assert len(list(path.parent.iterdir())) == 4
    assert modes() == {0o600}
    await mailbox.close()
    path.chmod(0o644)
    mailbox = await SqliteMailbox.open(path)
    await fill(mailbox, 1)
    assert modes() <= {0o600, 0o640}
    await mailbox.close()

"""A worker's inbox keeps the contract of a mailbox, over a real channel to its hub."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import pytest

from pokebridge.errors import InputError, MailboxError
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.mailbox.sqlite_pages import SqliteReader
from pokebridge.model import Page
from pokebridge.testing.mailbox import MailboxContract
from pokebridge.testing.mailbox_kit import BOB, ManualClock, message
from pokebridge.workers.calls import MAX_WAITING
from pokebridge.workers.inbox import HubInbox, offer_inbox
from tests.workers.ends import Ends, connected


@asynccontextmanager
async def in_a_worker(
    mailbox: Mailbox, reader: SqliteReader | None = None
) -> AsyncIterator[HubInbox]:
    """The worker's end of ``mailbox``."""
    async with connected() as ends:
        offer_inbox(ends.answers, mailbox)
        yield HubInbox(ends.calls, reader)


class _Both:
    """``mailbox``, whose recipients are served by a worker's ``inbox``."""

    def __init__(self, mailbox: Mailbox, inbox: HubInbox) -> None:
        self._mailbox, self._inbox = mailbox, inbox
        self.read, self.see_device, self.ack = inbox.read, inbox.see_device, inbox.ack

    def __getattr__(self, name: str) -> Any:
        """The calls that a worker does not make."""
        return getattr(self._mailbox, name)

    async def close(self) -> None:
        """Close both."""
        await self._inbox.close()
        await self._mailbox.close()


class TestMemoryMailbox(MailboxContract):
    """The shipped suite, over the hub's memory."""

    @pytest.fixture
    async def mailbox(self, clock: ManualClock, limits: Limits) -> AsyncIterator[Mailbox]:
        """An empty mailbox."""
        store = MemoryMailbox(clock, limits)
        async with in_a_worker(store) as inbox:
            yield cast("Mailbox", _Both(store, inbox))


class TestSqliteMailbox(MailboxContract):
    """The shipped suite, over the hub's file."""

    @pytest.fixture
    async def mailbox(
        self, clock: ManualClock, limits: Limits, tmp_path: Path
    ) -> AsyncIterator[Mailbox]:
        """An empty mailbox."""
        path = tmp_path / "m.db"
        store = await SqliteMailbox.open(path, clock=clock, limits=limits)
        async with in_a_worker(store, await SqliteReader.open(path, clock=clock)) as inbox:
            mailbox = _Both(store, inbox)
            yield cast("Mailbox", mailbox)
            await mailbox.close()


class TestReadingTheFile:
    """A worker reads the hub's file itself, and not for longer than the hub would."""

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[SqliteMailbox]:
        """The hub's mailbox, which counts the pages that it reads."""
        store = await SqliteMailbox.open(tmp_path / "m.db")
        yield store
        await store.close()

    @pytest.fixture
    async def inbox(
        self, store: SqliteMailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[HubInbox]:
        """The worker's."""
        self.asked = 0
        read = store.read

        async def count(recipient: str, **wanted: Any) -> Page:
            self.asked += 1
            return await read(recipient, **wanted)

        monkeypatch.setattr(store, "read", count)
        async with in_a_worker(store, await SqliteReader.open(tmp_path / "m.db")) as inbox:
            yield inbox
            await inbox.close()

    async def test_it_asks_the_hub_once_while_the_file_stays_as_it_is(
        self, inbox: HubInbox, store: SqliteMailbox
    ) -> None:
        """A committed message is in the next page, whether the worker or the hub reads it."""
        for version in range(1, 4):
            await store.append(message(id=str(version)))
            page = await inbox.read(BOB, after=0, limit=9)
            assert [each.version for each in page.messages] == list(range(1, version + 1))
        assert self.asked == 1

    async def test_a_copy_of_the_log_into_the_file_is_no_trouble(
        self, inbox: HubInbox, store: SqliteMailbox
    ) -> None:
        """The file has changed, so the hub is asked once more."""
        await store.append(message())
        await inbox.read(BOB, after=0, limit=9)
        with closing(sqlite3.connect(store._guard._real)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        for _ in range(2):
            assert len((await inbox.read(BOB, after=0, limit=9)).messages) == 1
        assert self.asked == 2

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
    @pytest.mark.parametrize("becomes", ["deleted", "replaced"])
    async def test_a_file_that_the_hub_gives_up_is_read_no_more(
        self, inbox: HubInbox, store: SqliteMailbox, tmp_path: Path, suffix: str, becomes: str
    ) -> None:
        """The worker refuses as the hub does, although it could still read what it has open."""
        await store.append(message())
        await inbox.read(BOB, after=0, limit=9)
        file = tmp_path / f"m.db{suffix}"
        content = file.read_bytes()
        file.unlink()
        if becomes == "replaced":
            file.write_bytes(content)
        for _ in range(2):
            with pytest.raises(MailboxError, match=becomes):
                await inbox.read(BOB, after=0, limit=9)

    async def test_an_older_copy_written_over_the_file_is_not_read(
        self, inbox: HubInbox, store: SqliteMailbox, tmp_path: Path
    ) -> None:
        """The hub notices it, and the worker asks the hub."""
        older = (tmp_path / "m.db").read_bytes()
        await store.append(message())
        await inbox.read(BOB, after=0, limit=9)
        with closing(sqlite3.connect(store._guard._real)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        await inbox.read(BOB, after=0, limit=9)
        (tmp_path / "m.db").write_bytes(older)
        with pytest.raises(MailboxError, match="older copy"):
            await inbox.read(BOB, after=0, limit=9)


async def test_a_lone_surrogate_harms_no_other_call(ends: Ends) -> None:
    """Text that cannot be encoded is refused, and the other calls are answered."""
    offer_inbox(ends.answers, MemoryMailbox())
    inbox = HubInbox(ends.calls)
    with pytest.raises(InputError, match="cannot be encoded"):
        await inbox.see_device(BOB, "\ud800")
    assert (await inbox.read(BOB, after=0, limit=1)).head == 0


async def test_calls_that_nobody_answers_are_limited(ends: Ends) -> None:
    """A worker whose hub is stuck refuses calls as an overloaded store does."""
    ends.calls._waiting.update(dict.fromkeys(range(-MAX_WAITING, 0)))  # type: ignore[arg-type]
    with pytest.raises(MailboxError, match="overloaded"):
        await HubInbox(ends.calls).see_device(BOB, "phone")

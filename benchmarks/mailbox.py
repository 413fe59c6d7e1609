"""The mailbox's appends and pulls, on SQLite and PostgreSQL, compared with the bare driver.

A million messages are appended to a hundred thousand recipients, among nine times as many others.
At that size the mailbox is compared with a bare driver, in rounds that alternate: asyncpg on ten
connections, sqlite3 in a thread, as an event loop must use it. Both get the mailbox's own
statements, and appends in transactions as large as those that the mailbox makes of its callers.
Empty pulls alternate between that store and one of few recipients, where they must cost about the
same.
"""

# ruff: noqa: A005, SLF001 - never imported but as benchmarks.mailbox; the statements are private

import asyncio
import contextlib
import random
import sqlite3
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import asyncpg

from benchmarks.harness import BenchmarkError, Figure, compare, progress, recipient
from pokebridge.mailbox import postgres, sqlite, sqlite_pages
from pokebridge.mailbox.base import PAGE_BYTES, Limits, Mailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.postgres_pool import CONNECTIONS, SERVER_SETTINGS
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.mailbox.sqlite_checkpoints import CHECKPOINT_PAGES
from pokebridge.model import MAX_VERSION, NewMessage
from tests.support.engines import run_postgres

# 60% of the driver's rate: a call may cost so many times the driver's.
AT_MOST_DRIVER = 1.67
AT_MOST_GROWTH = 1.5
GROWTH_ROUNDS = 12
CALLERS = 256
FILL_STEPS = 10
SENDER = "urn:user:sender"
BODY = b'{"text": "a message of the usual size, which is not much", "n": 1234567}'

Call = Callable[[int], Awaitable[object]]


class Driver(Protocol):
    """The bare driver, with the mailbox's statements."""

    async def append(self, messages: Sequence[NewMessage]) -> None:
        """Commit ``messages`` in one transaction."""

    async def read(self, name: str, after: int) -> None:
        """Pull what ``name`` has above ``after``."""


@dataclass(frozen=True, slots=True)
class Store:
    """One kind of store: with few recipients, and with many."""

    kind: str
    few: Mailbox
    many: Mailbox
    driver: Driver
    transaction: int  # messages that a transaction of the mailbox has when CALLERS append
    appenders: int  # transactions that the mailbox has under way at once
    readers: int  # pulls that the bare driver has under way at once


@dataclass(slots=True)
class Times:
    """Microseconds a call, round by round, and each call's own latency."""

    rounds_us: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    async def take(self, call: Call, count: int, callers: int) -> None:
        """Have ``callers`` make ``count`` calls in all, each the next when the last is answered."""
        numbers = iter(range(count))

        async def make_some() -> None:
            for number in numbers:
                called_s = time.perf_counter()
                await call(number)
                self.latencies_s.append(time.perf_counter() - called_s)

        started_s = time.perf_counter()
        await asyncio.gather(*(make_some() for _ in range(callers)))
        self.rounds_us.append((time.perf_counter() - started_s) / count * 1e6)

    def figure(self, name: str) -> Figure:
        """Calls per second, with the latency that 99 of 100 keep within."""
        p99_s = sorted(self.latencies_s)[int(len(self.latencies_s) * 0.99)]
        detail = f"p99 {p99_s * 1e3:.1f} ms, {CALLERS} callers at once"
        return Figure("mailbox", name, 1e6 / median(self.rounds_us), "/s", None, detail)


@dataclass(frozen=True, slots=True)
class Size:
    """How many messages, of how many ``active`` recipients among ``many``; and the ``few``."""

    messages: int
    active: int
    many: int
    few: int

    @property
    def head(self) -> int:
        """How many messages each of those that are active gets."""
        return self.messages // self.active


async def measure(
    *,
    size: Size = Size(messages=1_000_000, active=100_000, many=1_000_000, few=10_000),
    calls: int = 5_000,
    rounds: int = 4,
) -> list[Figure]:
    """Append all messages; then measure ``calls`` of each kind in every round."""
    figures = []
    for open_store in (_sqlite_store, _postgres_store):
        async with open_store(size) as store:
            figures.append(await _fill(store, size))
            figures += await _compare_with_driver(store, size, calls, rounds)
            figures.append(await _compare_growth(store, size, 4 * calls))
    return figures


async def _fill(store: Store, size: Size) -> Figure:
    """Append all messages, one a call, in a random order of their recipients."""
    order = [number % size.active for number in range(size.messages)]
    random.Random(1).shuffle(order)
    names = (recipient(number) for number in order)
    times, share = Times(), size.messages // FILL_STEPS
    for step in range(1, FILL_STEPS + 1):
        await times.take(lambda _: store.many.append(_message(next(names))), share, CALLERS)
        progress(f"mailbox: {store.kind}, {step * share:,} messages appended")
    kept = (await store.many.stats()).messages
    if kept != size.messages:
        raise BenchmarkError(f"{size.messages} messages were appended, and {kept} are there")
    return times.figure(f"append of {size.messages:,} messages, {store.kind}")


def _message(name: str) -> NewMessage:
    return NewMessage(name, SENDER, uuid.uuid4().hex, BODY)


async def _compare_with_driver(store: Store, size: Size, calls: int, rounds: int) -> list[Figure]:
    names = ("append", "pull", "empty pull")
    ours, bare = ({name: Times() for name in names} for _ in range(2))
    pick = random.Random(2).randrange
    for number in range(rounds + 1):
        for times in (*ours.values(), *bare.values()) if number == 1 else ():
            times.rounds_us.clear()  # the first round has warmed up
            times.latencies_s.clear()
        for name, call, driver_call in _calls(store, size, pick):
            await ours[name].take(call, calls, CALLERS)
            if name == "append":
                await bare[name].take(driver_call, calls // store.transaction, store.appenders)
                bare[name].rounds_us[-1] /= store.transaction
            else:
                await bare[name].take(driver_call, calls, store.readers)
        progress(f"mailbox: {store.kind}, round {number} of {rounds}")
    figures = [ours[name].figure(f"{name}, {store.kind}") for name in names]
    return figures + [
        compare(
            "mailbox",
            f"{name}, {store.kind}, to the bare driver",
            ours[name].rounds_us,
            bare[name].rounds_us,
            "us",
            AT_MOST_DRIVER,
        )
        for name in names
    ]


async def _compare_growth(store: Store, size: Size, calls: int) -> Figure:
    few, many = Times(), Times()
    pick = random.Random(3).randrange
    for _ in range(1 + GROWTH_ROUNDS):  # the first warms up
        await few.take(_pull_in_vain(store.few, size.few, pick), calls, CALLERS)
        await many.take(_pull_in_vain(store.many, size.many, pick), calls, CALLERS)
    name = f"empty pull, {store.kind}, of {size.many:,} recipients to {size.few:,}"
    return compare("mailbox", name, many.rounds_us[1:], few.rounds_us[1:], "us", AT_MOST_GROWTH)


def _calls(
    store: Store, size: Size, pick: Callable[[int], int]
) -> Iterator[tuple[str, Call, Call]]:
    """What is measured, of the mailbox and of the driver."""
    mailbox, driver = store.many, store.driver

    def message() -> NewMessage:
        return _message(recipient(pick(size.active)))

    async def append_many(_: int) -> None:
        await driver.append([message() for _ in range(store.transaction)])

    yield "append", lambda _: mailbox.append(message()), append_many
    after = size.head - 1  # so that there is one, and what this run has appended
    yield (
        "pull",
        lambda _: mailbox.read(recipient(pick(size.active)), after=after, limit=50),
        lambda _: driver.read(recipient(pick(size.active)), after),
    )
    yield (
        "empty pull",
        _pull_in_vain(mailbox, size.active, pick),
        lambda _: driver.read(recipient(pick(size.active)), MAX_VERSION),
    )


def _strangers(recipients: int, size: Size) -> range:
    """Recipients whose messages are all read and deleted; the active ones get theirs later."""
    return range(size.active if recipients == size.many else 0, recipients)


def _pull_in_vain(mailbox: Mailbox, recipients: int, pick: Callable[[int], int]) -> Call:
    return lambda _: mailbox.read(recipient(pick(recipients)), after=MAX_VERSION, limit=50)


# --- SQLite -----------------------------------------------------------------------------------


class SqliteDriver:
    """sqlite3 in one thread."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        self._loop = asyncio.get_running_loop()

    async def append(self, messages: Sequence[NewMessage]) -> None:
        """See the protocol."""

        def commit() -> None:
            self._db.execute("BEGIN IMMEDIATE")
            for message in messages:
                sqlite._append(self._db, message, Limits(), 0)
            self._db.execute("COMMIT")

        await self._loop.run_in_executor(self._thread, commit)

    async def read(self, name: str, after: int) -> None:
        """See the protocol."""

        def read() -> None:
            head = sqlite_pages.head_of(self._db, name)
            if after < head:
                sqlite_pages.fresh(self._db, name, after, head, 50, 0).fetchall()

        await self._loop.run_in_executor(self._thread, read)

    def close(self) -> None:
        """End the thread and the connection."""
        self._thread.shutdown()
        self._db.close()


@contextlib.asynccontextmanager
async def _sqlite_store(size: Size) -> AsyncIterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        mailboxes = []
        for recipients in (size.few, size.many):
            path = Path(folder) / f"{recipients}.db"
            mailboxes.append(await SqliteMailbox.open(path))
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                heads = ((recipient(n), 10, 0, 0) for n in _strangers(recipients, size))
                db.executemany("INSERT INTO heads VALUES (?, ?, ?, ?)", heads)
        driver = SqliteDriver(path)
        try:
            yield Store(
                "SQLite",
                few=mailboxes[0],
                many=mailboxes[1],
                driver=driver,
                transaction=CALLERS,
                appenders=1,
                readers=CALLERS,
            )
        finally:
            driver.close()
            for mailbox in mailboxes:
                await mailbox.close()


# --- PostgreSQL -------------------------------------------------------------------------------


class PostgresDriver:
    """asyncpg on as many connections as the mailbox has, each for the one that takes it next."""

    def __init__(self, connections: Sequence["asyncpg.Connection[asyncpg.Record]"]) -> None:
        self._connections = list(connections)

    @contextlib.contextmanager
    def _connection(self) -> Iterator["asyncpg.Connection[asyncpg.Record]"]:
        connection = self._connections.pop()
        try:
            yield connection
        finally:
            self._connections.append(connection)

    async def append(self, messages: Sequence[NewMessage]) -> None:
        """See the protocol."""
        count, limits = len(messages), Limits()
        with self._connection() as connection:
            await connection.fetchval(
                postgres.APPEND,
                uuid.uuid4(),
                [message.recipient for message in messages],
                [message.sender for message in messages],
                [message.id for message in messages],
                [False] * count,
                [message.body for message in messages],
                [None] * count,
                limits.max_messages,
                limits.max_bytes,
                None,
                None,
                None,
                limits.share_messages,
                limits.share_bytes,
            )

    async def read(self, name: str, after: int) -> None:
        """See the protocol."""
        with self._connection() as connection:
            await connection.fetch(postgres.READ, [name], [after], [PAGE_BYTES], 51, None)


@contextlib.asynccontextmanager
async def _postgres_store(size: Size) -> AsyncIterator[Store]:
    with run_postgres() as server:
        async with contextlib.AsyncExitStack() as opened:
            mailboxes, connections = [], []
            for recipients in (size.few, size.many):
                schema = f"of_{recipients}"
                mailboxes.append(await PostgresMailbox.open(f"{server.url}?schema={schema}"))
                opened.push_async_callback(mailboxes[-1].close)
                settings = SERVER_SETTINGS | {"search_path": schema, "statement_timeout": "0"}
                connections = [
                    await asyncpg.connect(server.url, server_settings=settings)
                    for _ in range(CONNECTIONS if recipients == size.many else 1)
                ]
                for connection in connections:
                    opened.push_async_callback(connection.close)
                await connections[0].execute(
                    "INSERT INTO heads SELECT unnest($1::text[]), 10, 0, 0",
                    [recipient(n) for n in _strangers(recipients, size)],
                )
                await connections[0].execute("VACUUM (ANALYZE) heads")
            yield Store(
                "PostgreSQL",
                few=mailboxes[0],
                many=mailboxes[1],
                driver=PostgresDriver(connections),
                transaction=CALLERS // 4,  # two with the server, two waiting or being made up
                appenders=postgres.APPENDERS,
                readers=CONNECTIONS,
            )

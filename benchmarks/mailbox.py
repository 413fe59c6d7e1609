"""The mailbox's appends and pulls, SQLite and PostgreSQL, to the bare driver doing the same.

    python -m benchmarks.mailbox --messages 1000000 --recipients 100000    (some minutes)

The yardstick for PostgreSQL is asyncpg on ten connections, for SQLite sqlite3 in a thread, as an
event loop must use it. Both get the mailbox's own statements, and appends in transactions as large
as those that the mailbox makes of its callers. Rounds of both alternate, as they do between a store
of few recipients and one of a hundred times as many, whose empty pulls must cost about the same.
"""

# ruff: noqa: A005, SLF001 - never imported but as benchmarks.mailbox; the statements are private

import argparse
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
import uvloop
from tests.support.engines import run_postgres

from benchmarks.harness import Figure, compare, progress, recipient
from pokebridge.mailbox import postgres, sqlite
from pokebridge.mailbox.base import PAGE_BYTES, Limits, Mailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.mailbox.postgres_pool import CONNECTIONS, SERVER_SETTINGS
from pokebridge.mailbox.sqlite import SqliteMailbox
from pokebridge.model import MAX_VERSION, NewMessage

# 60% of the driver's rate: a call may cost so many times the driver's.
AT_MOST_DRIVER = 1.67
AT_MOST_GROWTH = 1.5
CALLERS = 256
MAX_PULLS = 25_000
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


async def measure(
    *,
    messages: int = 20_000,
    recipients: int = 100_000,
    few: int = 10_000,
    many: int = 1_000_000,
    rounds: int = 4,
) -> list[Figure]:
    """Append ``messages`` to ``recipients``, pull them, and pull in vain from few and many."""
    figures = []
    for open_store in (_sqlite_store, _postgres_store):
        async with open_store(few, many) as store:
            figures += await _measure(store, messages // rounds, recipients, few, many, rounds)
    return figures


async def _measure(
    store: Store, count: int, recipients: int, few: int, many: int, rounds: int
) -> list[Figure]:
    names = ("append", "pull", "empty pull")
    ours, bare = ({name: Times() for name in names} for _ in range(2))
    growth = {few: Times(), many: Times()}
    pick = random.Random(1).randrange
    pulls = min(count, MAX_PULLS)
    for number in range(rounds + 1):
        for times in (*ours.values(), *bare.values(), *growth.values()) if number == 1 else ():
            times.rounds_us.clear()  # the first round has warmed up
            times.latencies_s.clear()
        for name, call, driver_call in _calls(store, recipients, pick):
            if name == "append":
                await ours[name].take(call, count, CALLERS)
                transactions = count // store.transaction
                await bare[name].take(driver_call, transactions, store.appenders)
                bare[name].rounds_us[-1] /= store.transaction
            else:
                await ours[name].take(call, pulls, CALLERS)
                await bare[name].take(driver_call, pulls, store.readers)
        for size, mailbox in ((few, store.few), (many, store.many)):
            pull = _pull_in_vain(mailbox, size, pick)
            await growth[size].take(pull, pulls, CALLERS)
        progress(f"mailbox: {store.kind}, round {number} of {rounds}")
    figures = [ours[name].figure(f"{name}, {store.kind}") for name in names]
    figures += [
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
    grown = f"empty pull, {store.kind}, of {many:,} recipients to {few:,}"
    few_us, many_us = growth[few].rounds_us, growth[many].rounds_us
    return [*figures, compare("mailbox", grown, many_us, few_us, "us", AT_MOST_GROWTH)]


def _calls(
    store: Store, recipients: int, pick: Callable[[int], int]
) -> Iterator[tuple[str, Call, Call]]:
    """What is measured, of the mailbox and of the driver."""
    mailbox, driver = store.many, store.driver

    sent_to = []

    def message() -> NewMessage:
        sent_to.append(recipient(pick(recipients)))
        return NewMessage(sent_to[-1], "urn:user:sender", uuid.uuid4().hex, BODY)

    async def append_many(_: int) -> None:
        await driver.append([message() for _ in range(store.transaction)])

    yield "append", lambda _: mailbox.append(message()), append_many
    yield (
        "pull",
        lambda _: mailbox.read(sent_to[pick(len(sent_to))], after=1, limit=50),
        lambda _: driver.read(sent_to[pick(len(sent_to))], 1),
    )
    yield (
        "empty pull",
        _pull_in_vain(mailbox, recipients, pick),
        lambda _: driver.read(recipient(pick(recipients)), MAX_VERSION),
    )


def _pull_in_vain(mailbox: Mailbox, recipients: int, pick: Callable[[int], int]) -> Call:
    return lambda _: mailbox.read(recipient(pick(recipients)), after=MAX_VERSION, limit=50)


# --- SQLite -----------------------------------------------------------------------------------


class SqliteDriver:
    """sqlite3 in one thread."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous = FULL")
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
            head = sqlite._head(self._db, name)
            if after < head:
                sqlite._fresh(self._db, name, after, head, 50, 0).fetchall()

        await self._loop.run_in_executor(self._thread, read)

    def close(self) -> None:
        """End the thread and the connection."""
        self._thread.shutdown()
        self._db.close()


@contextlib.asynccontextmanager
async def _sqlite_store(few: int, many: int) -> AsyncIterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        mailboxes = []
        for size in (few, many):
            path = Path(folder) / f"{size}.db"
            mailboxes.append(await SqliteMailbox.open(path))
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                names = ((recipient(number),) for number in range(size))
                db.executemany("INSERT INTO heads VALUES (?, 1, 0, 0)", names)
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
            )

    async def read(self, name: str, after: int) -> None:
        """See the protocol."""
        with self._connection() as connection:
            await connection.fetch(postgres.READ, [name], [after], [PAGE_BYTES], 51, None)


@contextlib.asynccontextmanager
async def _postgres_store(few: int, many: int) -> AsyncIterator[Store]:
    with run_postgres() as server:
        async with contextlib.AsyncExitStack() as opened:
            mailboxes, connections = [], []
            for size in (few, many):
                schema = f"of_{size}"
                mailboxes.append(await PostgresMailbox.open(f"{server.url}?schema={schema}"))
                opened.push_async_callback(mailboxes[-1].close)
                settings = SERVER_SETTINGS | {"search_path": schema, "statement_timeout": "0"}
                connections = [
                    await asyncpg.connect(server.url, server_settings=settings)
                    for _ in range(CONNECTIONS if size == many else 1)
                ]
                for connection in connections:
                    opened.push_async_callback(connection.close)
                for start in range(0, size, 100_000):
                    names = [recipient(n) for n in range(start, min(size, start + 100_000))]
                    await connections[0].execute(
                        "INSERT INTO heads SELECT unnest($1::text[]), 1, 0, 0", names
                    )
                await connections[0].execute("ANALYZE")
            driver = PostgresDriver(connections)
            yield Store(
                "PostgreSQL",
                few=mailboxes[0],
                many=mailboxes[1],
                driver=driver,
                transaction=CALLERS // 4,  # two with the server, two waiting or being made up
                appenders=postgres.APPENDERS,
                readers=CONNECTIONS,
            )


def main() -> None:
    """Take the measure alone, at the size that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mailbox", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--recipients", type=int, default=100_000)
    given = parser.parse_args()
    from benchmarks.__main__ import table  # noqa: PLC0415 - which imports this module

    measured = measure(messages=given.messages, recipients=given.recipients)
    print(table(uvloop.run(measured)))


if __name__ == "__main__":
    main()

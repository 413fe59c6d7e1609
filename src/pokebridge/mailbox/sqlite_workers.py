"""Threads that work on SQLite connections for an event loop.

A :class:`WorkerPool` takes jobs from the loop and does them in batches: each batch of writes is one
transaction (group commit), and each batch of any kind wakes the loop once.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final, NamedTuple, TypeVar

from pokebridge.backoff import spread
from pokebridge.errors import MailboxError

T = TypeVar("T")

MAX_WAITING: Final = 10_000
LOCK_TIMEOUT_S: Final = 5.0


class Job(NamedTuple):
    """What a thread shall do with its connection, and where the loop waits for the outcome."""

    work: Callable[[sqlite3.Connection], Any]
    done: asyncio.Future[Any]


class Outcome(NamedTuple):
    """What came of a job: ``result`` when there is no ``error``."""

    job: Job
    result: Any
    error: Exception | None = None


class WorkerPool:
    """A bounded queue of jobs and the threads that do them, each on a connection of its own."""

    def __init__(
        self,
        name: str,
        connections: Sequence[sqlite3.Connection],
        do_batch: Callable[[sqlite3.Connection, Sequence[Job]], list[Outcome]],
        batch_size: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._do_batch = do_batch
        self._batch_size = batch_size
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()  # None ends one thread
        self._waiting = 0
        self._closed = False
        # Daemons: a process that ends without close() must not hang. What is committed is safe.
        self._threads = [
            Thread(target=self._run, args=(db,), name=name, daemon=True) for db in connections
        ]
        for thread in self._threads:
            thread.start()

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do ``work`` in a thread. Cancelled, it is still done or left undone in whole."""
        if self._closed:
            raise MailboxError("the mailbox is closed")
        if self._waiting >= MAX_WAITING:
            raise MailboxError(f"the mailbox has too much to do: {MAX_WAITING} calls are waiting")
        job = Job(work, self._loop.create_future())
        self._waiting += 1
        self._jobs.put(job)
        try:
            result: T = await job.done
        except sqlite3.Error as error:
            raise MailboxError(f"the mailbox can't do it now: {error}") from error
        return result

    async def close(self) -> None:
        """Refuse new jobs, do those that wait, end the threads. May be called twice."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _run(self, db: sqlite3.Connection) -> None:
        with closing(db):
            while batch := self._next_batch():
                outcomes = self._do_batch(db, batch)
                # One wake-up of the loop for the batch. A loop that is gone waits for nothing.
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._settle, outcomes)

    def _next_batch(self) -> list[Job]:
        """Wait for a job, then take along what else is there; empty when the thread shall end."""
        batch: list[Job] = []
        job = self._jobs.get()
        with suppress(Empty):
            while job is not None:
                batch.append(job)
                if len(batch) == self._batch_size:
                    return batch
                job = self._jobs.get_nowait()
        if job is None and batch:
            self._jobs.put(None)  # meant for when this batch is done
        return batch

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        self._waiting -= len(outcomes)
        for job, result, error in outcomes:
            if job.done.done():  # the caller was cancelled
                continue
            if error is None:
                job.done.set_result(result)
            else:
                job.done.set_exception(error)


def do_each(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome]:
    """Do ``jobs`` one by one, each for itself."""
    return [_do(db, job) for job in jobs]


def _do(db: sqlite3.Connection, job: Job) -> Outcome:
    try:
        return Outcome(job, job.work(db))
    except Exception as error:  # noqa: BLE001 - whatever it is belongs to the caller, not the thread
        return Outcome(job, None, error)


def commit_together(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome]:
    """Do ``jobs`` in one transaction; one that fails is undone alone, unless all of it fails."""
    try:
        _begin(db)
        outcomes = [_do_undoably(db, job) for job in jobs]
        db.execute("COMMIT")
    except sqlite3.Error as error:
        with suppress(sqlite3.Error):
            db.rollback()
        return [Outcome(job, None, error) for job in jobs]
    return outcomes


def _do_undoably(db: sqlite3.Connection, job: Job) -> Outcome:
    db.execute("SAVEPOINT job")
    outcome = _do(db, job)
    if outcome.error is not None:
        if not db.in_transaction:  # SQLite gave all of it up by itself, as on a full disk
            raise outcome.error
        db.execute("ROLLBACK TO job")
    db.execute("RELEASE job")
    return outcome


def _begin(db: sqlite3.Connection) -> None:
    """Begin a transaction with the write lock, waiting LOCK_TIMEOUT_S for other processes at most.

    SQLite's own busy handler backs off to 100 ms, and a process that commits without pause then
    starves the others for seconds; short random waits share the lock fairly. So the connection has
    no busy timeout of its own.
    """
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if result_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
        else:
            return
        time.sleep(spread(0.002, 0.25, 1.5))


def result_code(error: sqlite3.Error) -> int:
    """The primary result code; errors that Python's module raises by itself have none: 0."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF

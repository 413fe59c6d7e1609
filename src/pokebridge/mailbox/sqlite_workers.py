"""Threads that work on SQLite connections for an event loop.

A :class:`WorkerPool` takes jobs from the loop and does them in batches. A batch of writes is one
transaction (group commit). Every batch wakes the loop once.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from queue import Empty, SimpleQueue
from threading import Thread
from traceback import clear_frames
from typing import Any, Final, NamedTuple, TypeVar

from pokebridge.backoff import spread
from pokebridge.errors import InputError, MailboxError, MailboxRefusedError
from pokebridge.mailbox.base import admit
from pokebridge.supervisor import note_failure

T = TypeVar("T")

LOCK_TIMEOUT_S: Final = 5.0


class Job(NamedTuple):
    """Work for a thread to do on its connection, and the future for its outcome.

    ``work`` has effects only on the connection, because a batch in which a job fails is repeated.
    """

    work: Callable[[sqlite3.Connection], Any]
    done: asyncio.Future[Any]


class Outcome(NamedTuple):
    """A job's ``result``, valid when there is no ``error``."""

    job: Job
    result: Any
    error: Exception | None = None


class WorkerPool:
    """A bounded queue of jobs, and the threads that do them, each on a connection of its own.

    - ``_loop``: the event loop that is told the outcomes
    - ``_do_batch``: does a batch of jobs on a connection; a batch has at most ``_batch_size``
    - ``_jobs``: the queue; ``None`` ends one thread
    - ``_waiting``: jobs without an outcome yet
    - ``_threads``: one for each connection
    - ``_closed``: whether new jobs are refused
    """

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
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting = 0
        self._closed = False
        # Daemon threads, so that a process which ends without close() does not hang.
        self._threads = [
            Thread(target=self._run, args=(db,), name=name, daemon=True) for db in connections
        ]
        for thread in self._threads:
            thread.start()

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do ``work`` in a thread. A cancelled call is still done completely or not at all."""
        admit(waiting=self._waiting, closed=self._closed)
        job = Job(work, self._loop.create_future())
        self._waiting += 1
        self._jobs.put(job)
        try:
            result: T = await job.done
        except sqlite3.IntegrityError as error:  # a constraint or a trigger of another program
            raise MailboxRefusedError(f"the mailbox's SQLite file refuses this: {error}") from error
        except sqlite3.Error as error:
            raise MailboxError(f"the mailbox's SQLite file is unavailable: {error}") from error
        except (UnicodeEncodeError, OverflowError) as error:
            raise InputError("the mailbox's SQLite file can't store this") from error
        return result

    async def close(self) -> None:
        """Refuse new jobs, finish the waiting ones, and end the threads. May be called twice."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _run(self, db: sqlite3.Connection) -> None:
        with closing(db):
            while batch := self._next_batch():
                try:
                    outcomes = self._do_batch(db, batch)
                except Exception as error:  # noqa: BLE001 - a thread that ends leaves all waiting
                    note_failure("mailbox_thread", error)
                    failure = MailboxError("the mailbox has met a defect, see the log")
                    outcomes = [Outcome(job, None, failure) for job in batch]
                # One wake-up of the loop for the batch. The loop may be closed already.
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._settle, outcomes)

    def _next_batch(self) -> list[Job]:
        """Wait for a job, and take it with the others that wait. Empty: the thread must end."""
        batch: list[Job] = []
        job = self._jobs.get()
        with suppress(Empty):
            while job is not None:
                batch.append(job)
                if len(batch) == self._batch_size:
                    return batch
                job = self._jobs.get_nowait()
        if job is None and batch:
            self._jobs.put(None)  # ends a thread after this batch
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
    """Do ``jobs`` one by one, independently."""
    return [_do(db, job) for job in jobs]


def _do(db: sqlite3.Connection, job: Job) -> Outcome:
    try:
        return Outcome(job, job.work(db))
    except Exception as error:  # noqa: BLE001 - any error belongs to the caller, not the thread
        # A cursor among the variables of its frames would keep all later reads at this moment.
        clear_frames(error.__traceback__)
        return Outcome(job, None, error)


def commit_together(
    db: sqlite3.Connection,
    jobs: Sequence[Job],
    before_commit: Callable[[sqlite3.Connection, Sequence[Outcome]], None] = lambda *_: None,
    after_begin: Callable[[sqlite3.Connection], None] = lambda _: None,
) -> list[Outcome]:
    """Do ``jobs`` in one transaction. A failed job is undone alone, unless the commit fails.

    Jobs rarely fail, and a savepoint for each costs an eighth of an append. So there are none at
    first. When a job fails the transaction is undone, and done again with savepoints. What
    ``after_begin`` and ``before_commit`` do is a part of it.
    """
    try:
        _begin(db)
        after_begin(db)
        outcomes = _do_all(db, jobs)
        if outcomes is None:
            db.rollback()
            _begin(db)
            after_begin(db)
            outcomes = [_do_undoably(db, job) for job in jobs]
        before_commit(db, outcomes)
        db.execute("COMMIT")
    except Exception as error:  # noqa: BLE001 - any error belongs to the callers, not the thread
        with suppress(sqlite3.Error):
            db.rollback()
        return [Outcome(job, None, error) for job in jobs]
    return outcomes


def _do_all(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Outcome] | None:
    """The outcomes, or ``None`` once a job has failed. It may have ended the transaction."""
    outcomes = []
    for job in jobs:
        outcome = _do(db, job)
        if outcome.error is not None:
            return None
        outcomes.append(outcome)
    return outcomes


def _do_undoably(db: sqlite3.Connection, job: Job) -> Outcome:
    db.execute("SAVEPOINT job")
    outcome = _do(db, job)
    if outcome.error is not None:
        if not db.in_transaction:  # SQLite rolled everything back by itself, as on a full disk
            raise outcome.error
        db.execute("ROLLBACK TO job")
    db.execute("RELEASE job")
    return outcome


def _begin(db: sqlite3.Connection) -> None:
    """Begin a transaction with the write lock. Waits at most LOCK_TIMEOUT_S for other processes.

    The connection has no busy timeout of its own. SQLite's busy handler backs off to 100 ms, so a
    process that commits without pause would starve the others for seconds. Short random waits
    share the lock fairly.
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


def is_intact(text: object, raw: bytes) -> bool:
    """Whether ``text`` is a string, and its bytes are those in the file (``raw``)."""
    return isinstance(text, str) and text.encode() == raw


def result_code(error: sqlite3.Error) -> int:
    """The primary result code. 0: the error comes from Python's module, not from SQLite."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF

"""Connections to PostgreSQL that survive its restarts and failovers, since calls are retried.

Work for :meth:`PostgresPool.run` must be safe to repeat: when the connection breaks, nobody knows
whether the attempt was committed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias, TypeVar

import asyncpg
import structlog

from pokebridge.backoff import backoff_s
from pokebridge.engines.postgres import Connection, PostgresDialler
from pokebridge.errors import ConfigError, MailboxError, MailboxRefusedError
from pokebridge.mailbox.base import admit
from pokebridge.mailbox.batcher import LockedError

T = TypeVar("T")
Record: TypeAlias = asyncpg.Record

CONNECTIONS: Final = 10
# A call ends within CALL_TIMEOUT_S. An attempt without an answer is given up sooner, so that there
# is time for another on a new connection. The server cancels the statement even before that.
CALL_TIMEOUT_S: Final = 6.0
ATTEMPT_TIMEOUT_S: Final = 3.0
STATEMENT_TIMEOUT_S: Final = 2.5
LOCK_TIMEOUT_S: Final = 0.5
IDLE_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 2.0
LOG_EVERY_S: Final = 60.0
_BACKOFF_FIRST_S: Final = 0.02
_BACKOFF_CAP_S: Final = 0.5

SERVER_SETTINGS: Final = {
    "application_name": "pokebridge",
    "statement_timeout": f"{STATEMENT_TIMEOUT_S * 1000:.0f}",
    "lock_timeout": f"{LOCK_TIMEOUT_S * 1000:.0f}",
    # A client that was cut off or stopped within a transaction would keep its locks for hours.
    "idle_in_transaction_session_timeout": f"{IDLE_TIMEOUT_S * 1000:.0f}",
    # If row-level security hid rows, their messages would never be pulled. So it raises an error.
    "row_security": "off",
    # All our statements are a few look-ups in an index. With these settings they are planned once,
    # by index, even while the tables are tiny, so the plans stay right when the tables grow.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
}
# SQLSTATEs after which another attempt may succeed; classes by their first characters.
_TRANSIENT: Final = (
    "08",  # the connection
    "57P",  # the server stops, starts or has crashed
    "57014",  # statement_timeout
    "55P03",  # lock_timeout
    "53300",  # too many connections
    "25006",  # read-only: it is a standby now
    "40",  # serialisation, deadlock
    "23505",  # a racing append of the same message has committed: the next attempt finds it
)
_REFUSED: Final = (
    "28",  # no such user, wrong password
    "3D000",  # no such database
    "42501",  # no permission
    "3F000",  # no such schema
)
# What may be wrong with the data of one call.
_OF_DATA: Final = (
    "22",  # no such character, out of range
    "23",  # a constraint
    "44",  # WITH CHECK OPTION of a view
    "54",  # too long for an index
    "P0",  # an error that a trigger raised
    "XX001",  # a damaged page
    "XX002",  # a damaged index
)


log = structlog.get_logger(__name__)


class PostgresPool:
    """Up to CONNECTIONS connections to ``dsn``, opened when they are needed.

    Names are looked up in ``schema``. ``dsn`` may name several hosts. This replaces the driver's
    own pool for two reasons. That one starts a task whenever a connection is returned, which
    halves the look-ups per second. And it can't drop all idle connections when the network dies.

    - ``_dialler``: opens connections
    - ``_free``: counts the connections that may still be used or opened
    - ``_idle``: open connections, the most recently used last
    - ``_under_way``: calls under way; ``_nothing_under_way`` is set while there are none
    - ``_closed``: whether new calls are refused
    - ``is_open``: whether the mailbox is in use. A refusal is then an outage, not a wrong setting
    - ``_log_again_s``: before this time no further refusal is logged
    - ``on_connect``: awaited with each new connection before its first use
    """

    def __init__(self, dsn: str, *, schema: str) -> None:
        self._dialler = PostgresDialler(
            "mailbox",
            dsn,
            timeout_s=ATTEMPT_TIMEOUT_S,
            command_timeout=ATTEMPT_TIMEOUT_S,
            settings=SERVER_SETTINGS | {"search_path": schema},
        )
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._idle: list[Connection] = []
        self._under_way = 0
        self._nothing_under_way = asyncio.Event()
        self._nothing_under_way.set()
        self._closed = False
        self.is_open = False
        self._log_again_s = 0.0
        self.on_connect: Callable[[Connection], Awaitable[None]] | None = None

    async def run(
        self,
        work: Callable[[Connection], Awaitable[T]],
        *,
        timeout_s: float | None = None,
        waits_for_locks: bool = True,
    ) -> T:
        """Do ``work`` on a connection, and retry it when it fails for a transient reason.

        A statement has ATTEMPT_TIMEOUT_S unless ``work`` gives it another timeout. All attempts
        together have ``timeout_s``, by default CALL_TIMEOUT_S. Unless the call ``waits_for_locks``,
        a lock that another transaction keeps for LOCK_TIMEOUT_S is an error.

        Raises:
            ConfigError: the URL or the credentials are wrong, or a privilege is missing, before the
                mailbox is open.
            LockedError: another transaction keeps a lock.
            MailboxRefusedError: PostgreSQL refuses, perhaps for the data of this call.
            MailboxError: no attempt succeeded in that time, or PostgreSQL refuses.
        """
        admit(waiting=self._under_way, closed=self._closed)
        self._under_way += 1
        self._nothing_under_way.clear()
        try:
            return await self._keep_trying(work, timeout_s or CALL_TIMEOUT_S, waits_for_locks)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._nothing_under_way.set()

    async def close(self) -> None:
        """Refuse new calls, wait for those under way, which are bounded, and disconnect."""
        self._closed = True
        await self._nothing_under_way.wait()
        closing = (connection.close(timeout=CLOSE_TIMEOUT_S) for connection in self._idle)
        await asyncio.gather(*closing, return_exceptions=True)
        self._idle.clear()

    async def _keep_trying(
        self,
        work: Callable[[Connection], Awaitable[T]],
        timeout_s: float,
        waits_for_locks: bool,  # noqa: FBT001 - handed on
    ) -> T:
        failure: Exception | None = None
        failures = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await self._attempt(work)
                    except _FAILURES as error:
                        is_locked = isinstance(error, asyncpg.LockNotAvailableError)
                        if is_locked and not waits_for_locks:
                            raise LockedError("the mailbox is locked: try again") from error
                        self._raise_unless_transient(error)
                        failure = error
                    pause_s = backoff_s(failures, first_s=_BACKOFF_FIRST_S, cap_s=_BACKOFF_CAP_S)
                    failures += 1
                    await asyncio.sleep(pause_s)
        except TimeoutError:
            reason = _harmless_reason(failure) if failure else "it did not answer"
            raise MailboxError(
                f"the mailbox's PostgreSQL did not succeed within {timeout_s:g} s: {reason}"
            ) from failure

    async def _attempt(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._free:
            connection = self._pop_idle() or await self._connect()
            try:
                return await self._dialler.run(connection, partial(self._do, work))
            except BaseException as error:
                if not isinstance(error, asyncpg.PostgresError):
                    connection.terminate()  # its state is unknown
                if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                    connection.terminate()  # after a failover this is the wrong server
                    self._drop_idle()
                if isinstance(error, TimeoutError):  # the network may have died for all
                    self._drop_idle()
                raise
            finally:
                if not connection.is_closed():
                    self._idle.append(connection)

    async def _do(self, work: Callable[[Connection], Awaitable[T]], connection: Connection) -> T:
        if self._dialler.is_pooled(connection) and self.on_connect is not None:
            await self.on_connect(connection)  # it may be a new connection to the server
        return await work(connection)

    def _raise_unless_transient(self, error: Exception) -> None:
        """Raise the caller's error unless a retry may help. Only the log names roles and tables."""
        state = ""
        if isinstance(error, asyncpg.PostgresError):
            state = error.sqlstate or ""
            if state.startswith(_TRANSIENT):
                return
            if state.startswith(_REFUSED) and not self.is_open:
                raise ConfigError(f"mailbox: PostgreSQL refuses: {_reason(error)}") from error
        elif isinstance(error, ValueError):  # the driver's error about an invalid parameter
            state = "22"
        else:
            return
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._log_again_s:
            self._log_again_s = now_s + LOG_EVERY_S
            log.error("mailbox_refused", sqlstate=state, reason=_reason(error))
        kind = MailboxRefusedError if state.startswith(_OF_DATA) else MailboxError
        raise kind("the mailbox's PostgreSQL refuses: see this instance's log") from error

    def _pop_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return None

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().terminate()

    async def _connect(self) -> Connection:
        connection = await self._dialler.connect()
        if self.on_connect is not None and not self._dialler.is_pooled(connection):
            try:
                await self.on_connect(connection)
            except BaseException:
                connection.terminate()
                raise
        return connection


_FAILURES: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # TimeoutError is one
)


def _reason(error: BaseException) -> str:
    """The error's first line. The details, in which PostgreSQL repeats values, are left out."""
    text = str(error.args[0] if isinstance(error, asyncpg.PostgresError) else error)
    return text.splitlines()[0] if text else type(error).__name__


def _harmless_reason(error: Exception) -> str:
    """The same for callers. PostgreSQL's own texts name roles, databases and tables."""
    return type(error).__name__ if isinstance(error, asyncpg.PostgresError) else _reason(error)

"""Connections to PostgreSQL that survive its restarts and failovers: every call is tried again.

What is done through :meth:`PostgresPool.run` must be right when it is done more than once, since
nobody knows whether an attempt whose connection broke was committed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import asyncpg
import structlog

from pokebridge.backoff import backoff_s
from pokebridge.errors import ConfigError, MailboxError

T = TypeVar("T")
Record: TypeAlias = asyncpg.Record
if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # takes no parameter outside its stubs

CONNECTIONS: Final = 10
MAX_WAITING: Final = 10_000
# A call ends within CALL_TIMEOUT_S. An attempt that hears nothing is given up sooner, so that there
# is time for another on a new connection; the server itself cancels one before that.
CALL_TIMEOUT_S: Final = 6.0
ATTEMPT_TIMEOUT_S: Final = 3.0
STATEMENT_TIMEOUT_S: Final = 2.5
CLOSE_TIMEOUT_S: Final = 2.0
_BACKOFF_FIRST_S: Final = 0.02
_BACKOFF_CAP_S: Final = 0.5

SERVER_SETTINGS: Final = {
    "application_name": "pokebridge",
    "statement_timeout": f"{STATEMENT_TIMEOUT_S * 1000:.0f}",
    # Every statement of ours is a few look-ups by an index, in its order. Said so, it is planned
    # once, and a plan from a day on which a table was tiny does no harm when it is not.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
}
# SQLSTATEs after which another attempt may do better; whole classes by their first characters.
_TRANSIENT: Final = (
    "08",  # the connection
    "57P",  # the server stops, starts or has crashed
    "57014",  # statement_timeout
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

_log = structlog.get_logger("pokebridge.mailbox")


class PostgresPool:
    """Up to CONNECTIONS connections to ``dsn``, made when they are needed.

    Names are looked up in ``schema``. The driver's own pool would do, but it starts a task whenever
    a connection comes back, which halves the look-ups per second, and it can't drop all that is
    idle when the network turns out to have died. ``dsn`` may name several hosts.
    """

    def __init__(self, dsn: str, *, schema: str) -> None:
        self._dsn = dsn
        self._settings = SERVER_SETTINGS | {"search_path": schema}
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._idle: list[Connection] = []  # the one used last at the end
        self._under_way = 0
        self._nothing_under_way = asyncio.Event()
        self._nothing_under_way.set()
        self._closed = False

    async def run(
        self,
        work: Callable[[Connection], Awaitable[T]],
        *,
        timeout_s: float | None = None,
    ) -> T:
        """Do ``work`` on a connection, again when that fails for a reason that may pass.

        A statement has ATTEMPT_TIMEOUT_S unless ``work`` gives it another timeout, all attempts
        together have ``timeout_s``, by default CALL_TIMEOUT_S.

        Raises:
            ConfigError: what we are given to connect with is wrong, or allows too little.
            MailboxError: it could not be done in that time, or can't be done at all.
        """
        if self._closed:
            raise MailboxError("the mailbox is closed")
        if self._under_way >= MAX_WAITING:
            raise MailboxError(f"the mailbox has too much to do: {MAX_WAITING} calls are waiting")
        self._under_way += 1
        self._nothing_under_way.clear()
        try:
            return await self._keep_trying(work, timeout_s or CALL_TIMEOUT_S)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._nothing_under_way.set()

    async def close(self) -> None:
        """Refuse new work, let what is under way finish, which is bounded, and disconnect."""
        self._closed = True
        await self._nothing_under_way.wait()
        closing = (connection.close(timeout=CLOSE_TIMEOUT_S) for connection in self._idle)
        await asyncio.gather(*closing, return_exceptions=True)
        self._idle.clear()

    async def _keep_trying(self, work: Callable[[Connection], Awaitable[T]], timeout_s: float) -> T:
        failure: Exception | None = None
        failures = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await self._attempt(work)
                    except _FAILURES as error:
                        _raise_unless_it_may_pass(error)
                        failure = error
                    pause_s = backoff_s(failures, first_s=_BACKOFF_FIRST_S, cap_s=_BACKOFF_CAP_S)
                    failures += 1
                    await asyncio.sleep(pause_s)
        except TimeoutError:
            reason = _reason(failure) if failure else "it did not answer"
            raise MailboxError(
                f"the mailbox's PostgreSQL could not do it within {timeout_s:g} s: {reason}"
            ) from failure

    async def _attempt(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._free:
            connection = self._pop_idle() or await self._connect()
            try:
                return await work(connection)
            except BaseException as error:
                if not isinstance(error, asyncpg.PostgresError):
                    connection.terminate()  # nobody knows what it is about to say
                if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                    connection.terminate()  # after a failover this is the wrong server
                    self._drop_idle()
                if isinstance(
                    error, TimeoutError
                ):  # the network died silently, for all most likely
                    self._drop_idle()
                raise
            finally:
                if not connection.is_closed():
                    self._idle.append(connection)

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
        try:
            return await asyncpg.connect(
                self._dsn,
                timeout=ATTEMPT_TIMEOUT_S,
                command_timeout=ATTEMPT_TIMEOUT_S,
                server_settings=self._settings,
            )
        except ValueError:  # its text is left out, since it may quote a password
            raise ConfigError(
                "mailbox: the URL is none that PostgreSQL's driver can use:"
                " postgresql://USER:PASSWORD@HOST:PORT/DATABASE, each part percent-encoded"
            ) from None


_FAILURES: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # TimeoutError is one
)


def _raise_unless_it_may_pass(error: Exception) -> None:
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        if state.startswith(_REFUSED):
            raise ConfigError(f"mailbox: PostgreSQL refuses: {_reason(error)}") from error
        if state.startswith(_TRANSIENT):
            return
    elif not isinstance(error, ValueError):  # of the driver's own errors, one about a parameter
        return
    raise MailboxError(f"the mailbox's PostgreSQL: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """In a line, without the details in which PostgreSQL repeats values."""
    text = str(error.args[0] if isinstance(error, asyncpg.PostgresError) else error)
    return text.splitlines()[0] if text else type(error).__name__

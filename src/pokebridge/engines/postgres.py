"""Dialling PostgreSQL: the URL, its hosts, their addresses, the password, and poolers.

The URL is ``postgresql://USER:PASSWORD@HOST:PORT,HOST:PORT/DATABASE``. The hosts may also be given
as ``?host=HOST,HOST&port=PORT,PORT``, or by the variables PGHOST and PGPORT. Its options are
libpq's, such as ``sslmode``, ``sslrootcert`` and ``passfile``, and ``password_file``. Both files
are read at each connection, since they may have changed.

A pooler such as PgBouncer may be in front of the server. It refuses or ignores settings among the
startup parameters. In its transaction mode each transaction may be on another server connection,
where neither settings nor prepared statements of the last one exist. So behind a pooler each piece
of work is a transaction of its own, which begins with the settings. That works in its session mode
as well.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import asyncpg

from pokebridge.engines.addresses import addresses_of, first_of
from pokebridge.engines.urls import check_engine_url, read_secret, unsplit
from pokebridge.errors import ConfigError

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # takes no parameter outside its stubs

DEFAULT_PORT = 5432
# All statements are made for it. With another, which a database or role may have as its default,
# they fail when two of them meet.
_ISOLATION = {"default_transaction_isolation": "read committed"}

T = TypeVar("T")


class _Pooled(Connection):
    """A connection to a pooler."""


class PostgresDialler:
    """Dials the hosts of a URL. A host or address that does not answer costs half a second.

    The one that answered last is dialled first. Where there is a choice, only a server that takes
    writes is used: a standby that answers sooner than the primary must not be taken for it.

    Args:
        part: the setting that holds the URL, for errors: "mailbox", "coordination".
        url: see this module.
        timeout_s: how long dialling one address may take.
        settings: the session's settings.
        options: further arguments of :func:`asyncpg.connect`.

    Raises:
        ConfigError: the URL is invalid.
    """

    def __init__(
        self,
        part: str,
        url: str,
        *,
        timeout_s: float,
        settings: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        check_engine_url(part, url)
        self._settings = _ISOLATION | dict(settings or {})
        # The hosts where the last connection was to a pooler.
        self._poolers: set[str] = set()
        self._part = part
        self._options = {"timeout": timeout_s, **options}
        parts = urlsplit(url)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        if path := given.pop("password_file", None):
            self._options["password"] = partial(
                asyncio.to_thread, read_secret, part, "password_file", path
            )
            parts = parts._replace(query=urlencode(given))
        self._is_choice_given = (
            "target_session_attrs" in given or "PGTARGETSESSIONATTRS" in os.environ
        )
        self._urls = [
            unsplit(parts._replace(netloc=netloc, query=query))
            for netloc, query in self._places(parts, given)
        ]
        self._last: _Target | None = None

    def _places(self, parts: SplitResult, given: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Each host of the URL, as a network location with its port, and the URL's query."""
        credentials, at, hosts = parts.netloc.rpartition("@")
        if hosts or "service" in given or "PGSERVICE" in os.environ:
            for host in hosts.split(","):
                yield f"{credentials}{at}{host}", parts.query
            return
        names = (given.get("host") or os.environ.get("PGHOST", "")).split(",")
        ports = (given.get("port") or os.environ.get("PGPORT", "")).split(",")
        if len(ports) == 1:
            ports *= len(names)
        if len(ports) != len(names):
            raise self._invalid()
        for name, port in zip(names, ports, strict=True):
            if not name or name.startswith("/"):  # the default, or the directory of a socket
                place = {"host": name, "port": port}
                query = urlencode(given | {key: value for key, value in place.items() if value})
                yield parts.netloc, query
                continue
            rest = {key: value for key, value in given.items() if key not in {"host", "port"}}
            host = f"[{name}]" if name.count(":") > 1 else name
            yield f"{credentials}{at}{host}{port and f':{port}'}", urlencode(rest)

    async def connect(self) -> Connection:
        """Connect to the first host that answers.

        Raises:
            ConfigError: the URL is invalid, or at the first connection a file is unreadable.
            asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError:
                no host can be reached, or it refuses.
        """
        urls = sorted(self._urls, key=lambda url: self._last is None or url != self._last.url)
        try:
            made = await first_of([partial(self._dial_host, url) for url in urls], _discard)
        except ConfigError as error:
            if self._last is None:
                raise
            raise OSError(str(error)) from None  # it was valid before, so this may pass
        self._last = made.target
        return made.connection

    async def run(self, connection: Connection, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do ``work`` on ``connection``, with the settings. Raises what it raises."""
        if not self.is_pooled(connection):
            return await work(connection)
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(_assignments("SET LOCAL", self._settings))
            return await work(connection)

    @staticmethod
    def is_pooled(connection: Connection) -> bool:
        """Whether each :meth:`run` may be on another connection of a pooler to its server."""
        return type(connection) is _Pooled  # to isinstance() all connections of asyncpg are alike

    async def _dial_host(self, url: str) -> "_Made":
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or DEFAULT_PORT
        except ValueError:
            raise self._invalid() from None
        whole = _Target(url, "")
        if host is None or "%" in host:  # libpq's defaults, or the path of a socket
            return await self._dial(whole)
        try:
            addresses = await addresses_of(host, port)
        except OSError:  # asyncpg checks the rest of the URL, and then fails in the same way
            addresses = []
        targets = [_Target(url, address) for address in addresses] if addresses[1:] else [whole]
        targets.sort(key=lambda target: target != self._last)
        return await first_of([partial(self._dial, target) for target in targets], _discard)

    async def _dial(self, target: "_Target") -> "_Made":
        options = dict(self._options)
        if (target.address or len(self._urls) > 1) and not self._is_choice_given:
            options["target_session_attrs"] = "read-write"
        if target.address:
            options["loop"] = _LoopTo(target.address)
        if port := urlsplit(target.url).port:  # else PGPORT must fit as well
            options["port"] = port
        try:
            return _Made(target, await self._connect(target.url, options))
        except OSError:  # an invalid certificate is both an OSError and a ValueError
            raise
        except ValueError:  # its text is left out, since it may quote a password
            raise self._invalid() from None

    async def _connect(self, url: str, options: dict[str, Any]) -> Connection:
        """Connect, and connect once more if what answers is a pooler, or no longer is one."""
        while True:
            expects_pooler = url in self._poolers
            if expects_pooler:
                options |= {"connection_class": _Pooled, "statement_cache_size": 0}
            connection: Connection = await asyncpg.connect(url, **options)
            try:
                is_pooler = await _is_pooler(connection)
                if is_pooler == expects_pooler:
                    if not is_pooler:
                        await connection.execute(_assignments("SET", self._settings))
                    return connection
            except BaseException:
                connection.terminate()
                raise
            connection.terminate()
            self._poolers ^= {url}
            options.pop("connection_class", None)
            options.pop("statement_cache_size", None)

    def _invalid(self) -> ConfigError:
        return ConfigError(
            f"{self._part}: the URL is invalid: expected"
            " postgresql://USER:PASSWORD@HOST:PORT/DATABASE, each part percent-encoded, and then"
            " options of libpq, like ?sslmode=verify-full"
        )


class _Target(NamedTuple):
    """A host, as a URL with no other, and one of its addresses.

    The address is empty where there is no choice.
    """

    url: str
    address: str


class _Made(NamedTuple):
    target: _Target
    connection: Connection


class _LoopTo:
    """The running event loop, but its connections go to ``address``, whatever the host's name.

    asyncpg has no argument for this. It must know the name, for TLS and for the password file.
    """

    def __init__(self, address: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = address

    def __getattr__(self, name: str) -> Any:
        """Whatever else asyncpg asks of the loop."""
        return getattr(self._loop, name)

    def create_connection(
        self, protocol: Callable[[], asyncio.Protocol], host: str, port: int, **options: Any
    ) -> Coroutine[Any, Any, tuple[asyncio.Transport, asyncio.Protocol]]:
        """Connect to the address."""
        if options.get("ssl"):
            options.setdefault("server_hostname", host)
        return cast(
            "Coroutine[Any, Any, tuple[asyncio.Transport, asyncio.Protocol]]",
            self._loop.create_connection(protocol, self._address, port, **options),
        )


async def _is_pooler(connection: Connection) -> bool:
    """Whether a pooler in between has made up the process id in the server's greeting.

    The simple protocol is used, because it prepares no statement.
    """
    answer = await connection.execute(
        f"SELECT WHERE pg_backend_pid() = {connection.get_server_pid()}"
    )
    return answer == "SELECT 0"


def _assignments(command: str, settings: Mapping[str, str]) -> str:
    return "; ".join(f"{command} {name} = '{value}'" for name, value in settings.items())


async def _discard(made: _Made) -> None:
    made.connection.terminate()

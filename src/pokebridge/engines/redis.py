"""Connections to Redis or Valkey.

The URL is ``redis://USER:PASSWORD@HOST:PORT,HOST:PORT/DB``, or ``rediss://`` for TLS. Credentials,
ports and database are optional. Several hosts are a primary and its replicas, of which the primary
is used, or nodes of one Redis Cluster. Options: ``ca_file``, ``cert_file`` and ``key_file`` (PEM),
and ``password_file``, which is read at each connection, so that a password may be changed.
"""

import asyncio
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool, Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from pokebridge.engines.addresses import addresses_of, first_of
from pokebridge.engines.urls import TLS_OPTIONS, read_secret, tls_context, url_options
from pokebridge.errors import ConfigError

RESP2, RESP3 = 2, 3
REPLICA = "the server is a replica, and a primary is needed"

_Stream: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _PasswordFile(CredentialProvider):
    """Reads the password from a file whenever a connection is dialled."""

    def __init__(self, part: str, user: str, path: str) -> None:
        self._part = part
        self._user = user
        self._path = path
        self._read()  # so that a wrong path is reported at the start

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """The user, unless it is the default one, and the password."""
        return (self._user, self._read()) if self._user else (self._read(),)

    async def get_credentials_async(self) -> tuple[str, str]:
        """The same without blocking the event loop."""
        try:
            return cast("tuple[str, str]", await asyncio.to_thread(self.get_credentials))
        except ConfigError as error:  # it was readable at the start, so this may pass
            raise OSError(str(error)) from None

    def _read(self) -> str:
        return read_secret(self._part, "password_file", self._path)


def hello_fields(said: object) -> Mapping[bytes, object]:
    """Return the fields of an answer to ``HELLO``, or nothing if ``said`` is no such answer.

    RESP2 has them as a list of names and values, RESP3 as a map.
    """
    if isinstance(said, list):
        return dict(zip(said[::2], said[1::2], strict=False))
    return said if isinstance(said, dict) else {}


def is_replica(hello: Mapping[bytes, object]) -> bool:
    """Whether the server that said ``hello`` is a replica. A server need not say."""
    return hello.get(b"role") in {b"replica", b"slave"}


class _FirstToAnswer(Connection):
    """A connection to the first address of its host's name that answers."""

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):
            addresses = await addresses_of(self.host, self.port)
            if len(addresses) > 1:
                options = dict(self._connection_arguments())
                name = options.pop("host")
                if "ssl" in options:
                    options["server_hostname"] = name
                dials = [partial(_open_stream, address, options) for address in addresses]
                stream = await first_of(dials, _close_stream)
                self._reader, self._writer = stream
                return
        await super()._connect()  # type: ignore[no-untyped-call]  # theirs


class _FirstToAnswerTLS(_FirstToAnswer, SSLConnection):
    """The same over TLS."""


async def _open_stream(address: str, options: Mapping[str, Any]) -> _Stream:
    reader, writer = await asyncio.open_connection(address, **options)
    try:
        writer.write(b"PING\r\n")  # answered before the credentials are given, if by a refusal
        await reader.readuntil(b"\n")
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


async def _close_stream(stream: _Stream) -> None:
    stream[1].transport.abort()


def nodes_in(url: str) -> list[str]:
    """Return the hosts in ``url``, each as it is written: ``HOST:PORT`` or ``HOST``."""
    return urlsplit(url).netloc.rpartition("@")[2].split(",")


def url_of(node: str, url: str) -> str:
    """Return ``url`` with ``node`` as its only host."""
    parts = urlsplit(url)
    credentials, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{credentials}{at}{node}"))


def node_address(announced: str, port: int, asked: str) -> str:
    """Return ``HOST:PORT`` of a node of a Redis Cluster, as a URL has it.

    A node that announces no endpoint, or ``?``, has the host of the node that was ``asked``.
    """
    host = asked if announced in {"", "?"} else announced
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connection_pool(
    part: str,
    url: str,
    *,
    client_name: str,
    connections: int,
    dial_timeout_s: float,
    answer_timeout_s: float,
) -> BlockingConnectionPool:
    """Create a pool for ``url``, without connecting yet. Reads files.

    The pool retries nothing, and has time limits only for dialling and for waiting for a free
    connection. Callers limit each call as a whole, which is stricter and cheaper.

    Args:
        part: the setting that holds the URL, for errors: "transport", "coordination".
        url: see this module. It has one host.
        client_name: the connections' name in ``CLIENT LIST``.
        connections: the largest number of connections.
        dial_timeout_s: how long dialling may take.
        answer_timeout_s: how long a caller waits for a free connection.

    Raises:
        ConfigError: the URL is invalid, or a file is unreadable.
    """
    given = url_options(part, url, TLS_OPTIONS | {"password_file"})
    if TLS_OPTIONS & given.keys():  # redis-py would report a wrong file at the first dial only
        tls_context(part, given)
    parts = urlsplit(url)
    database = parts.path.strip("/")
    if parts.scheme not in {"redis", "rediss"} or not (database.isdecimal() or not database):
        raise ConfigError(f"the {part} URL must be redis://HOST:PORT/DB or rediss://HOST:PORT/DB")
    credentials = None
    if path := given.get("password_file"):
        credentials = _PasswordFile(part, unquote(parts.username or ""), path)
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    tls = {
        "ssl_ca_certs": given.get("ca_file"),
        "ssl_certfile": given.get("cert_file"),
        "ssl_keyfile": given.get("key_file"),
    }
    try:
        return BlockingConnectionPool.from_url(
            urlunsplit(parts._replace(query="")),
            max_connections=connections,
            timeout=answer_timeout_s,
            socket_timeout=None,
            socket_connect_timeout=dial_timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=RESP2,  # every server supports it
            driver_info=None,  # else each connection reads its version from the disk
            client_name=re.sub(r"[^!-~]", "-", client_name),
            credential_provider=credentials,
            connection_class=_FirstToAnswerTLS if parts.scheme == "rediss" else _FirstToAnswer,
            **(tls if parts.scheme == "rediss" else {}),
        )
    except ValueError:  # its text is left out, since it may quote a password
        raise ConfigError(f"the {part} URL is invalid: expected redis://HOST:PORT/DB") from None

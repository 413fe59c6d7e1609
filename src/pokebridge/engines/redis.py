"""Connections to Redis or Valkey.

The URL is ``redis://USER:PASSWORD@HOST:PORT/DB``, or ``rediss://`` for TLS. Credentials, port and
database are optional. Options: ``ca_file``, ``cert_file`` and ``key_file`` (PEM).
"""

import re
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pokebridge.engines.urls import TLS_OPTIONS, tls_context, url_options
from pokebridge.errors import ConfigError


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
        url: see this module.
        client_name: the connections' name in ``CLIENT LIST``.
        connections: the largest number of connections.
        dial_timeout_s: how long dialling may take.
        answer_timeout_s: how long a caller waits for a free connection.

    Raises:
        ConfigError: the URL is invalid, or a file is unreadable.
    """
    given = url_options(part, url, TLS_OPTIONS)
    if TLS_OPTIONS & given.keys():  # redis-py would report a wrong file at the first dial only
        tls_context(part, given)
    parts = urlsplit(url)
    database = parts.path.strip("/")
    if parts.scheme not in {"redis", "rediss"} or not (database.isdecimal() or not database):
        raise ConfigError(f"the {part} URL must be redis://HOST:PORT/DB or rediss://HOST:PORT/DB")
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
            protocol=2,  # every server supports it, and the transport's reader expects it
            driver_info=None,  # else each connection reads its version from the disk
            client_name=re.sub(r"[^!-~]", "-", client_name),
            **(tls if parts.scheme == "rediss" else {}),
        )
    except ValueError as error:
        raise ConfigError(f"the {part} URL is invalid: {error}") from None

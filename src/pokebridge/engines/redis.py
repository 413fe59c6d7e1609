"""Connections to Redis or Valkey: address, credentials and TLS from a URL.

The URL is ``redis://`` or ``rediss://`` (TLS), then ``user:password@`` if need be, and
``host:port/db``. Options: ``ca_file``, ``cert_file`` and ``key_file`` (PEM).
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
    """The connections that ``url`` describes; none is made yet. Reads files.

    Nothing is tried twice, and only dialling and waiting for a free connection are bounded in
    time: callers bound their calls as a whole, which is stricter and cheaper.
    """
    given = url_options(part, url, TLS_OPTIONS)
    if TLS_OPTIONS & given.keys():  # redis-py would tell of a wrong file at the first dial only
        tls_context(part, given)
    parts = urlsplit(url)
    database = parts.path.strip("/")
    if parts.scheme not in {"redis", "rediss"} or not (database.isdecimal() or not database):
        raise ConfigError(f"the {part}'s URL is redis:// or rediss://, then HOST:PORT/DB")
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
            protocol=2,  # every server speaks it, and the transport's reader expects it
            driver_info=None,  # else each connection looks its version up on the disk
            client_name=re.sub(r"[^!-~]", "-", client_name),
            **(tls if parts.scheme == "rediss" else {}),
        )
    except ValueError as error:
        raise ConfigError(f"the {part}'s URL: {error}") from None

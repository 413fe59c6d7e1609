"""A connection to NATS: the URL, and nats-py's client with some defects corrected.

The URL is ``nats://USER:PASSWORD@HOST:PORT,HOST:PORT``, or ``TOKEN@`` instead of a user, or without
credentials. The servers are interchangeable. ``tls://`` refuses a server without TLS. Options:
``creds_file`` or ``nkey_file`` (NATS credentials), ``password_file`` (of the URL's user, or the
token if there is none), ``ca_file``, ``cert_file`` and ``key_file`` (PEM). Files are read at each
connection, since they may have changed.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine
from collections.abc import Set as AbstractSet
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from nats import errors
from nats.aio.client import Client, RawCredentials
from nats.protocol import parser

from pokebridge.engines import text_of
from pokebridge.engines.addresses import addresses_of, first_of
from pokebridge.engines.urls import (
    TLS_OPTIONS,
    check_engine_url,
    read_secret,
    tls_context,
    url_options,
)
from pokebridge.errors import ConfigError, MissingExtraError

URL_OPTIONS = TLS_OPTIONS | {"creds_file", "nkey_file", "password_file"}
DEFAULT_PORT = 4222
CLOSE_TIMEOUT_S = 1.0

_HEADERS_BEGIN = b"NATS/1.0"
_STATUS = ("Status", "Description")
# The subject that acks a message of a stream.
_ACK = b"$JS.ACK."

# nats-py treats a vertical tab or a form feed as white space, and would end the connection at a
# subject that has one. The server accepts such subjects.
_ARGUMENTS = rb"[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?"
parser.MSG_RE = re.compile(rb"\AMSG" + _ARGUMENTS + rb"(\d+)[ \t]*\r\n")
parser.HMSG_RE = re.compile(rb"\AHMSG" + _ARGUMENTS + rb"(\d+)[ \t]+(\d+)[ \t]*\r\n")

C = TypeVar("C")


class NatsClient(Client):
    """nats-py's client for one connection, which is replaced when it breaks, never repaired.

    nats-py's own reconnecting is off: it gives up for good when it is refused once, and it waits
    until a dead peer has taken what is still unsent.

    Args:
        on_lost: called when the connection has ended, possibly more than once.
    """

    def __init__(self, *, on_lost: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._tls_only = False
        self._on_lost = on_lost
        self.trouble: Exception | None = None
        """The last error that was not the answer to a call."""

    async def dial(
        self,
        server: str,
        options: dict[str, Any],
        *,
        name: str,
        timeout_s: float,
        on_error: Callable[[Exception], Awaitable[None]] | None = None,
    ) -> None:
        """Connect to ``server`` with what :func:`client_options` made.

        Raises:
            nats.errors.Error, OSError: the cause; never NoServersError, which hides it.
        """
        self._tls_only = server.startswith("tls://")

        async def note(error: Exception) -> None:
            self.trouble = error
            if on_error is not None:
                await on_error(error)

        try:
            await self.connect(
                [server],
                name=name,
                error_cb=note,
                allow_reconnect=False,
                max_reconnect_attempts=1,  # 0 means unlimited
                reconnect_time_wait=0,
                connect_timeout=int(timeout_s),
                ping_interval=3600,  # callers have stricter heartbeats of their own
                **options,
            )
        except errors.NoServersError as error:  # note() has the cause
            raise self.trouble or error from None
        if not self.is_connected:  # possible when the next line was not a PONG
            raise errors.ConnectionClosedError

    @property
    def is_clustered(self) -> bool:
        """Whether the server is one of several. It does not tell of leaf nodes."""
        return bool(self._server_info.get("cluster") or self._server_info.get("connect_urls"))

    async def hang_up(self) -> None:
        """Close the connection, broken or not, within :data:`CLOSE_TIMEOUT_S`. Never raises."""
        closing = asyncio.ensure_future(self.close())
        try:
            await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_S)
        finally:
            closing.cancel()  # a dead peer reads nothing; the kernel drops the socket later
            await asyncio.gather(closing, return_exceptions=True)

    async def _close(self, status: int, do_cbs: bool = True) -> None:  # noqa: FBT001, FBT002
        """Report the end first, and drop unsent data: writing it to a dead peer would hang or fail.

        Publishers wait for the server's answer, so they learn that the data was not sent.
        """
        self._on_lost()
        self._pending.clear()
        self._pending_data_size = 0
        await super()._close(status, do_cbs)

    async def _read_loop(self) -> None:
        """Report the end, whatever it was: nats-py goes on without reading after some errors."""
        await super()._read_loop()
        self._on_lost()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        """Accept names that are not UTF-8, and take no message of a stream for a status.

        Anybody may publish such names and messages. nats-py would stop reading at such a name. It
        would never deliver such a message, which would be redelivered forever.
        """
        if headers and reply.startswith(_ACK):
            headers = _HEADERS_BEGIN + b"\r\n" + headers.partition(b"\r\n")[2]
        await super()._process_msg(sid, _as_utf8(subject), _as_utf8(reply), data, headers)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """Without headers that are invalid. Only the first line tells a status."""
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
        except (ValueError, IndexError):
            return None
        if found and not headers.startswith(_HEADERS_BEGIN + b" "):
            for name in _STATUS:
                found.pop(name, None)
        return found

    async def _process_info(
        self,
        info: dict[str, Any],
        initial_connection: bool = False,  # noqa: FBT001, FBT002 - the signature is nats-py's
    ) -> None:
        """With ``tls://``, refuse a server without TLS before credentials are sent."""
        if self._tls_only and initial_connection:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


def _as_utf8(name: bytes) -> bytes:
    return name.decode(errors="backslashreplace").encode()


def servers_in(part: str, url: str) -> list[str]:
    """Return the servers in ``url``, each as a URL without credentials."""
    check_engine_url(part, url)
    parts = urlsplit(url)
    hosts = [host for host in parts.netloc.rpartition("@")[2].split(",") if host]
    if parts.scheme not in {"nats", "tls"} or not hosts or parts.path.strip("/"):
        raise ConfigError(f"the {part} URL must be nats://HOST:PORT,HOST:PORT… or tls://…")
    return [f"{parts.scheme}://{host}" for host in hosts]


async def dial_server(
    server: str,
    options: dict[str, Any],
    dial: Callable[[str, dict[str, Any]], Coroutine[Any, Any, C]],
    discard: Callable[[C], Awaitable[None]],
) -> C:
    """Return the first connection that ``dial`` makes to one of the addresses of ``server``.

    Args:
        server: a URL that :func:`servers_in` returned.
        options: what :func:`client_options` made.
        dial: is given a URL and its options.
        discard: closes a connection that came too late.

    Raises:
        OSError: the server's name has no address.
        Exception: what the first dial that failed raised, when all have failed.
    """
    parts = urlsplit(server)
    host, port = parts.hostname or "", parts.port or DEFAULT_PORT
    addresses = await addresses_of(host, port)
    if len(addresses) == 1:
        return await dial(server, options)
    options = options | {"tls_hostname": host}
    hosts = [f"[{address}]" if ":" in address else address for address in addresses]
    dials = [partial(dial, f"{parts.scheme}://{host}:{port}", options) for host in hosts]
    return await first_of(dials, discard)


def client_options(part: str, url: str, allowed: AbstractSet[str] = URL_OPTIONS) -> dict[str, Any]:
    """Return nats-py's arguments for the credentials and TLS in ``url``. Reads files."""
    options: dict[str, Any] = {}
    given = url_options(part, url, allowed)
    user, colon, password = urlsplit(url).netloc.rpartition("@")[0].partition(":")
    if path := given.get("password_file"):
        secret = read_secret(part, "password_file", path)
        options |= {"user": unquote(user), "password": secret} if user else {"token": secret}
    elif colon:
        options |= {"user": unquote(user), "password": unquote(password)}
    elif user:
        options["token"] = unquote(user)
    if path := given.get("creds_file"):
        options["user_credentials"] = RawCredentials(_read(part, "creds_file", path))
    if path := given.get("nkey_file"):
        options["nkeys_seed_str"] = _read(part, "nkey_file", path)
    if urlsplit(url).scheme == "tls" or TLS_OPTIONS & given.keys():
        options["tls"] = tls_context(part, given)
    return options


def _read(part: str, option: str, path: str) -> str:
    if find_spec("nkeys") is None:
        raise MissingExtraError("nats://", "nats")
    return read_secret(part, option, path)


def refusal_of(error: Exception | None) -> str:
    """Return the text of ``error`` as one line, as the server wrote it if it did."""
    return text_of(error).removeprefix("nats: ").strip("'")

"""A connection to NATS: servers, credentials and TLS from a URL, and nats-py's client put right.

The URL is ``nats://`` or ``tls://``, then ``user:password@`` or ``token@`` if need be, and
``host:port,host:port…``; any of the servers will do. ``tls://`` refuses a server without TLS.
Options: ``creds_file`` or ``nkey_file`` (NATS credentials), ``ca_file``, ``cert_file`` and
``key_file`` (PEM). Files are read at each connection, since they may have changed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from nats import errors
from nats.aio.client import Client, RawCredentials

from pokebridge.engines import text_of
from pokebridge.engines.urls import TLS_OPTIONS, tls_context, url_options
from pokebridge.errors import ConfigError, MissingExtraError

URL_OPTIONS = TLS_OPTIONS | {"creds_file", "nkey_file"}
CLOSE_TIMEOUT_S = 1.0


class NatsClient(Client):
    """nats-py's client for one connection that is replaced when it breaks, never repaired.

    nats-py could reconnect by itself, but it gives up for good when it is refused once, and it
    waits for a dead peer to take what is still unsent; so it is not asked to.
    ``on_lost`` is called when the connection is over, perhaps more than once.
    """

    def __init__(self, *, on_lost: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._tls_only = False
        self._on_lost = on_lost
        self.trouble: Exception | None = None
        """The last error that came without being an answer to a call."""

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
            nats.errors.Error, OSError: why it can't be had; never NoServersError, which hides it.
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
                max_reconnect_attempts=1,  # with 0 it would dial for ever
                reconnect_time_wait=0,
                connect_timeout=int(timeout_s),
                ping_interval=3600,  # whoever uses the connection has a stricter way to judge it
                **options,
            )
        except errors.NoServersError as error:  # after note() was told why
            raise self.trouble or error from None
        if not self.is_connected:  # possible, when a PONG was not the next line
            raise errors.ConnectionClosedError

    async def hang_up(self) -> None:
        """Give up the connection, broken or not, within :data:`CLOSE_TIMEOUT_S`. Never raises."""
        closing = asyncio.ensure_future(self.close())
        try:
            await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_S)
        finally:
            closing.cancel()  # a dead peer takes nothing; the kernel drops the socket in time
            await asyncio.gather(closing, return_exceptions=True)

    async def _close(self, status: int, do_cbs: bool = True) -> None:  # noqa: FBT001, FBT002
        """Tell of the end first, and write nothing more: a dead peer would make that hang or fail.

        Whoever published something waits for an answer, so nothing of value is dropped here.
        """
        self._on_lost()
        self._pending.clear()
        self._pending_data_size = 0
        await super()._close(status, do_cbs)

    async def _process_info(
        self,
        info: dict[str, Any],
        initial_connection: bool = False,  # noqa: FBT001, FBT002 - the signature is nats-py's
    ) -> None:
        """Refuse a server without TLS before the credentials are sent, when TLS was asked for."""
        if self._tls_only and initial_connection:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


def servers_in(part: str, url: str) -> list[str]:
    """The servers that ``url`` names, as URLs without credentials."""
    parts = urlsplit(url)
    hosts = [host for host in parts.netloc.rpartition("@")[2].split(",") if host]
    if parts.scheme not in {"nats", "tls"} or not hosts or parts.path.strip("/"):
        raise ConfigError(f"the {part}'s URL is nats:// or tls://, then HOST:PORT,HOST:PORT…")
    return [f"{parts.scheme}://{host}" for host in hosts]


def client_options(part: str, url: str, allowed: AbstractSet[str] = URL_OPTIONS) -> dict[str, Any]:
    """What ``url`` says about credentials and TLS, as nats-py takes it. Reads files."""
    options: dict[str, Any] = {}
    given = url_options(part, url, allowed)
    user, colon, password = urlsplit(url).netloc.rpartition("@")[0].partition(":")
    if colon:
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
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the {part}'s {option} can't be read: {error}") from None


def refusal_of(error: Exception | None) -> str:
    """What ``error`` says, in the server's own words where they are the server's."""
    return text_of(error).removeprefix("nats: ").strip("'")

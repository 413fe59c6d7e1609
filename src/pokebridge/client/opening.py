"""Opening the client's WebSocket, by whichever address of the server's name answers."""

import asyncio
import socket
from functools import partial
from ssl import SSLContext
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_and_follow
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from pokebridge.engines.addresses import addresses_of, first_of
from pokebridge.outgoing import proxy_for

SUBPROTOCOL = Subprotocol("pokebridge.v1")
CLOSE_TIMEOUT_S = 1.0
# Far above the size of any frame that docs/protocol.md defines.
MAX_MESSAGE_BYTES = 16 * 1024
# How long an address that has accepted the connection may take for the handshake before another is
# tried as well. Long, so that clients that all return at once do not each connect twice.
UNANSWERED_S = 3.0


class connect(connect_and_follow):  # noqa: N801 - as websockets names it
    """websockets' ``connect``, which follows no redirect. Only a login page would send one."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Return the refusal that the redirect is."""
        return exc


class Opener:
    """Opens WebSockets. It remembers which address of a name to begin with.

    An address that does not accept costs half a second, as in
    :func:`~pokebridge.engines.addresses.first_of`, and one that accepts but never answers costs
    :data:`UNANSWERED_S`. The certificate must be valid for the name.
    """

    def __init__(self, tls: SSLContext | None) -> None:
        self._tls = tls
        # By host, the address to begin with: the one that answered, or the next after a failure.
        self._begin_with: dict[str, str] = {}

    async def open(
        self, url: str, query: dict[str, str], token: str, *, in_query: bool
    ) -> ClientConnection:
        """Open ``url``, without a time limit of its own.

        ``in_query``: the token goes into the query, because something between refuses the header.

        Raises:
            InvalidStatus: the server refuses.
            ConfigError: the proxy in the environment can't be used.
            OSError, WebSocketException, ValueError: it can't be reached, or speaks no WebSocket.
        """
        where = parse_uri(url)  # without the token, which would be in the error
        url = _with_query(url, query | ({"access_token": token} if in_query else {}))
        options: dict[str, Any] = {
            "subprotocols": [SUBPROTOCOL],
            "additional_headers": {} if in_query else {"Authorization": f"Bearer {token}"},
            "compression": None,
            "ssl": (self._tls or True) if url.startswith("wss:") else None,
            "open_timeout": None,  # the core has its own deadline,
            "ping_interval": None,  # and its own pings
            "close_timeout": CLOSE_TIMEOUT_S,
            "max_size": MAX_MESSAGE_BYTES,
            "proxy": None,
        }
        if proxy := proxy_for(url):  # which resolves the name
            return await connect(url, **(options | {"proxy": proxy}))
        addresses = await addresses_of(where.host, where.port)
        if len(addresses) == 1:
            return await connect(url, **options)
        first = self._begin_with.get(where.host)
        addresses.sort(key=lambda address: address != first)
        self._begin_with[where.host] = addresses[1]
        rotations = (addresses[n:] + addresses[:n] for n in range(len(addresses)))
        dials = [partial(_open, url, where.port, each, options) for each in rotations]
        opened = await first_of(dials, _discard, stagger_s=UNANSWERED_S)
        if isinstance(opened, InvalidStatus):
            raise opened
        self._begin_with[where.host] = str(opened.remote_address[0])
        return opened


def _with_query(url: str, query: dict[str, str]) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query=urlencode(dict(parse_qsl(parts.query)) | query)))


async def _open(
    url: str, port: int, addresses: list[str], options: dict[str, Any]
) -> ClientConnection | InvalidStatus:
    """Open ``url`` at the first of ``addresses`` that accepts. A refusal is an answer."""
    dials = [partial(_connect, address, port) for address in addresses]
    accepted = await first_of(dials, _close)
    try:
        return await connect(url, sock=accepted, **options)
    except InvalidStatus as refusal:
        return refusal


async def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)  # noqa: FBT003 - its name says it
        await asyncio.get_running_loop().sock_connect(connecting, (address, port))
    except BaseException:
        connecting.close()
        raise
    return connecting


async def _close(late: socket.socket) -> None:
    late.close()


async def _discard(late: ClientConnection | InvalidStatus) -> None:
    if isinstance(late, ClientConnection):
        late.transport.abort()

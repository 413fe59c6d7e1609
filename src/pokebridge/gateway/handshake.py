"""The opening handshake: RFC 6455, section 4.2, and protocol.md, section 3."""

import ipaddress
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake, InvalidUpgrade
from websockets.http11 import Request
from websockets.server import ServerProtocol

from pokebridge.errors import AuthError, InputError, RefusedError
from pokebridge.model import DEFAULT_DEVICE, check_device
from pokebridge.origins import is_allowed, is_own
from pokebridge.wire import CONNECT_PATH

SUBPROTOCOL = "pokebridge.v1"
_BEARER_SUBPROTOCOL = "bearer."

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# [2001:db8::1], [2001:db8::1]:443 or 203.0.113.7:51001
_WITH_PORT = re.compile(r"\[([^]]*)\](?::\d*)?|([\d.]+):\d*")

# Only its checks are used. They keep no state between requests.
_rfc6455 = ServerProtocol()


@dataclass(frozen=True, slots=True)
class UpgradeRequest:
    """The head of an upgrade request. Header names are in lower case, as httptools returns them."""

    method: str
    target: str
    headers: Sequence[tuple[bytes, bytes]]
    peer: str


@dataclass(frozen=True, slots=True)
class Handshake:
    """The contents of a valid request. ``response`` is the 101 that accepts it."""

    token: str = field(repr=False)
    device: str
    address: str
    moved: bool
    response: bytes


def read_handshake(
    request: UpgradeRequest,
    *,
    allowed_origins: frozenset[str] | None,
    trusted_proxies: Sequence[Network],
) -> Handshake:
    """Check everything in ``request`` except the token. ``allowed_origins`` ``None`` allows any.

    Raises:
        RefusedError: with the status that protocol.md section 3 names.
        AuthError: there is no token.
    """
    headers = Headers(
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers
    )
    try:
        url = urlsplit(request.target)
        query = parse_qs(url.query)
    except ValueError:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the target is not a valid URL") from None
    if url.path != CONNECT_PATH:
        raise RefusedError(HTTPStatus.NOT_FOUND, f"WebSockets are served at {CONNECT_PATH} only")
    try:
        # httptools has already refused every HTTP version except 1.x.
        accept, _, _ = _rfc6455.process_request(
            Request(request.target, headers, method=request.method)
        )
    except InvalidUpgrade as error:
        raise RefusedError(
            HTTPStatus.UPGRADE_REQUIRED, str(error), {"Upgrade": "websocket"}
        ) from None
    except InvalidHandshake as error:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, str(error), {"Sec-WebSocket-Version": "13"}
        ) from None
    if allowed_origins is not None and not _may_connect(headers, allowed_origins):
        raise RefusedError(HTTPStatus.FORBIDDEN, "the Origin is not in allowed_origins")
    try:
        device = check_device(query.get("device", [DEFAULT_DEVICE])[-1])
    except InputError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from None
    offered = [
        name.strip()
        for value in headers.get_all("Sec-WebSocket-Protocol")
        for name in value.split(",")
    ]
    return Handshake(
        token=_find_token(headers, offered, query.get("access_token", ())),
        device=device,
        address=client_address(request.peer, headers.get_all("X-Forwarded-For"), trusted_proxies),
        moved=query.get("moved", [""])[-1] == "1",
        response=_accept_response(accept, _chosen(offered)),
    )


def _may_connect(headers: Headers, allowed_origins: frozenset[str]) -> bool:
    """Whether the page that connects is allowed to. The server's own pages always are."""
    origin = headers.get("Origin")
    if origin is None:  # no browser
        return True
    own = any(is_own(origin, host) for host in headers.get_all("Host")[:1])
    return own or is_allowed(origin, allowed_origins)


def _chosen(offered: Sequence[str]) -> str | None:
    """Return the sub-protocol to answer with.

    A browser wants one of those that it has offered. Some proxies keep only the first of them, and
    then that is the one that carries the token.
    """
    if SUBPROTOCOL in offered:
        return SUBPROTOCOL
    bearers = (name for name in offered if name.startswith(_BEARER_SUBPROTOCOL) and name.isascii())
    return next(bearers, None)


def _find_token(headers: Headers, offered: Sequence[str], in_query: Sequence[str]) -> str:
    """Return the token from the first of the three places that has one."""
    for value in headers.get_all("Authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
    for name in offered:
        if name.startswith(_BEARER_SUBPROTOCOL):
            return name.removeprefix(_BEARER_SUBPROTOCOL)
    if in_query:
        return in_query[-1]
    raise AuthError(
        "a token is required: send it as Authorization: Bearer, as a subprotocol bearer.TOKEN, or"
        " as access_token in the query"
    )


def client_address(
    peer: str, forwarded_for: Iterable[str], trusted_proxies: Sequence[Network]
) -> str:
    """Return the address whose limit a connection counts against, for IPv6 its /64 network.

    ``X-Forwarded-For`` is read from the right, for as long as each hop is a trusted proxy. A hop
    that is no address, like ``unknown``, ends the reading.
    """
    hops = [hop for value in forwarded_for for hop in value.split(",")] if trusted_proxies else []
    address = _parse_address(peer)
    if address is None:
        return peer
    while hops and _is_in(address, trusted_proxies):
        hop = _parse_address(hops.pop())
        if hop is None:
            break
        address = hop
    if address.version == 6:  # providers give each customer a whole /64
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def is_trusted(address: str, trusted_proxies: Sequence[Network]) -> bool:
    """Whether ``address`` is a proxy whose forwarding headers are believed."""
    ip = _parse_address(address)
    return ip is not None and _is_in(ip, trusted_proxies)


def _is_in(address: _Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _parse_address(text: str) -> _Address | None:
    """The address in ``text``, which proxies write bare, with a port, in brackets or quoted.

    An IPv4 address that is mapped into IPv6, as a socket for both shows it, is the IPv4 address.
    """
    bare = _WITH_PORT.fullmatch(text.strip(' "'))
    try:
        address = ipaddress.ip_address((bare[1] or bare[2]) if bare else text.strip(' "'))
    except ValueError:
        return None
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address


def _accept_response(accept: str, subprotocol: str | None) -> bytes:
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept}",
    ]
    if subprotocol is not None:
        lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def refusal_response(status: int, detail: str, headers: dict[str, str] | None = None) -> bytes:
    """Return a complete HTTP response with RFC 9457 problem details that closes the connection."""
    phrase = HTTPStatus(status).phrase
    body = json.dumps(
        {"type": "about:blank", "title": phrase, "status": status, "detail": detail}
    ).encode()
    lines = [
        f"HTTP/1.1 {status} {phrase}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Cache-Control: private, no-store",
        "Connection: close",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

"""The opening handshake: RFC 6455, section 4.2, and protocol.md, section 3."""

import binascii
import ipaddress
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import parse_qs

from websockets.utils import accept_key

from pokebridge.errors import AuthError, InputError, RefusedError
from pokebridge.forwarded import requested_host
from pokebridge.model import DEFAULT_DEVICE, check_device
from pokebridge.origins import is_allowed, is_own
from pokebridge.wire import CONNECT_PATH

SUBPROTOCOL = "pokebridge.v1"
_BEARER_SUBPROTOCOL = "bearer."

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# [2001:db8::1], [2001:db8::1]:443 or 203.0.113.7:51001
_WITH_PORT = re.compile(r"\[([^]]*)\](?::\d*)?|([\d.]+):\d*")

# The fields that are read. The others, most of a browser's, are not even decoded.
_READ = frozenset(
    (
        *(b"authorization", b"connection", b"host", b"origin", b"upgrade"),
        *(b"sec-websocket-key", b"sec-websocket-protocol", b"sec-websocket-version"),
        *(b"forwarded", b"x-forwarded-host", b"x-forwarded-port"),
    )
)
_TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9a-zA-Z]+")

_Fields = Mapping[bytes, Sequence[str]]


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
    address: str,
    allowed_origins: frozenset[str] | None,
    is_proxied: bool = False,
) -> Handshake:
    """Check everything in ``request`` except the token. ``allowed_origins`` ``None`` allows any.

    ``address`` is the one whose limits the session counts against. ``is_proxied``: the requested
    host is taken from the proxy's headers.

    Raises:
        RefusedError: with the status that protocol.md section 3 names.
        AuthError: there is no token.
    """
    path, _, query_string = request.target.partition("?")
    if path != CONNECT_PATH:
        raise RefusedError(HTTPStatus.NOT_FOUND, f"WebSockets are served at {CONNECT_PATH} only")
    query = parse_qs(query_string) if query_string else {}
    fields = _read_fields(request.headers)
    accept = _check_upgrade(request.method, fields)
    if allowed_origins is not None and not _may_connect(
        fields, allowed_origins, is_proxied=is_proxied
    ):
        raise RefusedError(HTTPStatus.FORBIDDEN, "the Origin is not in allowed_origins")
    try:
        device = check_device(query.get("device", [DEFAULT_DEVICE])[-1])
    except InputError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from None
    offered = _list_of(fields, b"sec-websocket-protocol")
    return Handshake(
        token=_find_token(fields, offered, query.get("access_token", ())),
        device=device,
        address=address,
        moved=query.get("moved", [""])[-1] == "1",
        response=_accept_response(accept, _chosen(offered)),
    )


def _read_fields(headers: Sequence[tuple[bytes, bytes]]) -> _Fields:
    fields: dict[bytes, list[str]] = {}
    for name, value in headers:
        if name in _READ:
            fields.setdefault(name, []).append(value.decode("latin-1"))
    return fields


def _list_of(fields: _Fields, name: bytes) -> list[str]:
    """The members of a field that is a list of tokens (RFC 9110, section 5.6.1)."""
    members = [each.strip(" \t") for value in fields.get(name, ()) for each in value.split(",")]
    members = [member for member in members if member]
    if not all(map(_TOKEN.fullmatch, members)):
        raise _bad_request(f"{name.decode()} must be a list of tokens, separated by commas")
    return members


def _check_upgrade(method: str, fields: _Fields) -> str:
    """Check what RFC 6455 demands, in section 4.2.1. Returns ``Sec-WebSocket-Accept``.

    httptools has already refused every HTTP version except 1.x.
    """
    if method != "GET":
        raise _bad_request("a WebSocket handshake must be a GET request")
    upgrades = [each.lower() for each in _list_of(fields, b"upgrade")]
    connection = [each.lower() for each in _list_of(fields, b"connection")]
    if upgrades != ["websocket"] or "upgrade" not in connection:
        raise RefusedError(
            HTTPStatus.UPGRADE_REQUIRED,
            "a WebSocket handshake must have Upgrade: websocket and Connection: Upgrade",
            {"Upgrade": "websocket"},
        )
    key = _only(fields, b"sec-websocket-key")
    if not _is_key(key):
        raise _bad_request("Sec-WebSocket-Key must be given once, and be 16 bytes in Base64")
    if _only(fields, b"sec-websocket-version") != "13":
        raise _bad_request("Sec-WebSocket-Version must be given once, and be 13")
    if len(fields.get(b"origin", ())) > 1:
        raise _bad_request("Origin must be given once at most")
    return accept_key(key)


def _only(fields: _Fields, name: bytes) -> str:
    """The value of a field that is given exactly once; otherwise nothing."""
    values = fields.get(name, ())
    return values[0] if len(values) == 1 else ""


def _is_key(text: str) -> bool:
    try:
        return len(binascii.a2b_base64(text, strict_mode=True)) == 16
    except ValueError:
        return False


def _bad_request(detail: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, detail, {"Sec-WebSocket-Version": "13"})


def _may_connect(fields: _Fields, allowed_origins: frozenset[str], *, is_proxied: bool) -> bool:
    """Whether the page that connects is allowed to. The server's own pages always are."""
    origins = fields.get(b"origin")
    if not origins:  # no browser
        return True

    def get(name: bytes) -> str:
        return fields.get(name, ("",))[0]

    hosts = [get(b"host"), requested_host(get) if is_proxied else ""]
    own = any(is_own(origins[0], host) for host in hosts if host)
    return own or is_allowed(origins[0], allowed_origins)


def _chosen(offered: Sequence[str]) -> str | None:
    """Return the sub-protocol to answer with.

    A browser wants one of those that it has offered. Some proxies keep only the first of them, and
    then that is the one that carries the token.
    """
    if SUBPROTOCOL in offered:
        return SUBPROTOCOL
    bearers = (name for name in offered if name.startswith(_BEARER_SUBPROTOCOL))
    return next(bearers, None)


def _find_token(fields: _Fields, offered: Sequence[str], in_query: Sequence[str]) -> str:
    """Return the token from the first of the three places that has one."""
    for value in fields.get(b"authorization", ()):
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


def client_address(peer: str, forwarded: Iterable[str], trusted_proxies: Sequence[Network]) -> str:
    """Return the address whose limit a connection counts against, for IPv6 its /64 network.

    ``forwarded``, lists of hops, is read from the right, for as long as each hop is a trusted
    proxy. A hop that is no address, like ``unknown``, ends the reading.
    """
    if not trusted_proxies and ":" not in peer:
        return peer  # an IPv4 address already
    hops = [hop for value in forwarded for hop in value.split(",")] if trusted_proxies else []
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
    text = text.strip(' \t"')
    bare = _WITH_PORT.fullmatch(text)
    try:
        address = ipaddress.ip_address((bare[1] or bare[2]) if bare else text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address


def _accept_response(accept: str, subprotocol: str | None) -> bytes:
    chosen = "" if subprotocol is None else f"Sec-WebSocket-Protocol: {subprotocol}\r\n"
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n{chosen}\r\n"
    ).encode("ascii")


def refusal_response(status: int, detail: str, headers: dict[str, str] | None = None) -> bytes:
    """Return a complete HTTP response with RFC 9457 problem details that closes the connection."""
    # A response with a status of 4xx must have a Date (RFC 9110, section 6.6.1).
    phrase = HTTPStatus(status).phrase
    body = json.dumps(
        {"type": "about:blank", "title": phrase, "status": status, "detail": detail}
    ).encode()
    lines = [
        f"HTTP/1.1 {status} {phrase}",
        f"Date: {_date(int(time.time()))}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Cache-Control: private, no-store",
        "Connection: close",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@lru_cache(maxsize=1)
def _date(unix_s: int) -> str:
    return formatdate(unix_s, usegmt=True)

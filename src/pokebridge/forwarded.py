"""What a proxy says about the request that it forwards. Only trusted proxies are believed.

``X-Forwarded-For``, ``-Host``, ``-Port``, ``-Proto`` and ``-Prefix`` are read, and where there is
none of them the parameter of ``Forwarded`` (RFC 7239). Each of several proxies adds to the end of a
field. So the first value is the one that the client saw, and the last was added by the proxy that
is nearest.
"""

import re
from collections.abc import Callable, Iterable

GetField = Callable[[bytes], str]
"""Returns the first value of a field, whose name is in lower case; empty if it is missing."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%-]+)(:\d{1,5})?")
# Without . and .., which browsers resolve before they send a path.
PREFIX = re.compile(r"(/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")


def forwarded_for(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """Return the lists of hops in ``headers``, whose names are in lower case, the client first.

    Commas separate the hops of a list. One that ``Forwarded`` does not name is ``unknown``.
    """
    usual, standard = [], []
    for name, value in headers:
        if name == b"x-forwarded-for":
            usual.append(value.decode("latin-1"))
        elif name == b"forwarded":
            standard += value.decode("latin-1").split(",")
    return usual or [_parameter(hop, "for") or "unknown" for hop in standard]


def requested_host(get: GetField) -> str:
    """Return the host that the client asked for, with its port if it is named; or an empty text."""
    host = _first(get(b"x-forwarded-host")) or _parameter(_first(get(b"forwarded")), "host")
    port = _first(get(b"x-forwarded-port"))
    host = host or (get(b"host") if port else "")
    found = _HOST.fullmatch(host)
    if found is None:
        return ""
    return f"{host}:{port}" if port.isdecimal() and not found[2] else host


def requested_scheme(get: GetField) -> str:
    """Return ``http`` or ``https``, whichever the client used; or an empty text."""
    scheme = _first(get(b"x-forwarded-proto")) or _parameter(_first(get(b"forwarded")), "proto")
    return {"http": "http", "ws": "http", "https": "https", "wss": "https"}.get(scheme.lower(), "")


def removed_prefix(get: GetField) -> str:
    """Return what the proxy has removed from the path, like ``/bridge``; or an empty text."""
    prefix = _first(get(b"x-forwarded-prefix")).rstrip("/")
    return prefix if PREFIX.fullmatch(prefix) else ""


def _first(value: str) -> str:
    return value.partition(",")[0].strip()


def _parameter(hop: str, name: str) -> str:
    """The parameter of a hop in ``Forwarded``; empty if it has none of that ``name``."""
    for pair in hop.split(";"):
        key, _, value = pair.partition("=")
        if key.strip().lower() == name:
            return value.strip().strip('"')
    return ""

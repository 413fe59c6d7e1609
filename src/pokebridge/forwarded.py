"""What a proxy says about the request that it forwards. Only trusted proxies are believed.

``X-Forwarded-Host``, ``-Port``, ``-Proto`` and ``-Prefix`` are read, and ``Forwarded`` (RFC 7239).
Where several proxies have added to a field, the first value is the one that the client saw.
"""

import re
from collections.abc import Callable

GetField = Callable[[bytes], str]
"""Returns the first value of a field, whose name is in lower case; empty if it is missing."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%-]+)(:\d{1,5})?")
# Without . and .., which browsers resolve before they send a path.
PREFIX = re.compile(r"(/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")


def requested_host(get: GetField) -> str:
    """Return the host that the client asked for, with its port if it is named; or an empty text."""
    host = _first(get(b"x-forwarded-host")) or _parameter(get(b"forwarded"), "host")
    port = _first(get(b"x-forwarded-port"))
    host = host or (get(b"host") if port else "")
    found = _HOST.fullmatch(host)
    if found is None:
        return ""
    return f"{host}:{port}" if port.isdecimal() and not found[2] else host


def requested_scheme(get: GetField) -> str:
    """Return ``http`` or ``https``, whichever the client used; or an empty text."""
    scheme = _first(get(b"x-forwarded-proto")) or _parameter(get(b"forwarded"), "proto")
    return {"http": "http", "ws": "http", "https": "https", "wss": "https"}.get(scheme.lower(), "")


def removed_prefix(get: GetField) -> str:
    """Return what the proxy has removed from the path, like ``/bridge``; or an empty text."""
    prefix = _first(get(b"x-forwarded-prefix")).rstrip("/")
    return prefix if PREFIX.fullmatch(prefix) else ""


def _first(value: str) -> str:
    return value.partition(",")[0].strip()


def _parameter(forwarded: str, name: str) -> str:
    for pair in _first(forwarded).split(";"):
        key, _, value = pair.partition("=")
        if key.strip().lower() == name:
            return value.strip().strip('"')
    return ""

"""Origins of web pages: their normal form (RFC 6454), and which of them are allowed.

An allowed origin may be a pattern, ``https://*.example.com``. It matches every host below
``example.com``, but not ``example.com`` itself.
"""

import re
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address, IPv6Address

_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://"
    r"((?:\*\.)?[^/?#@*:\[\]\\\s%<>^|]+|\[[0-9a-f:.]+\])"
    r"(?::(\d{1,5}))?"
)
# What browsers take for an IPv4 address, as in the URL standard: 127.1 is 127.0.0.1.
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:\d+|0x[0-9a-f]*)\.?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Longer ones are of no host that exists, and would take long to compare.
_MAX_LENGTH = 300


def normal_origin(text: str) -> str:
    """Return ``text``, an origin or a pattern, as browsers write it.

    That is in lower case, with the ASCII form of the host and without the scheme's default port.

    Raises:
        ValueError: it is neither, or browsers write its host in a way that is not known here.
    """
    found = _ORIGIN.fullmatch(text.lower())
    if found is None or len(text) > _MAX_LENGTH:
        raise ValueError("not an origin")
    scheme, host, port = found.groups()
    host = _normal_host(host)
    if port is None or int(port) == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    if int(port) > 65535:
        raise ValueError("not a port")
    return f"{scheme}://{host}:{int(port)}"


def _normal_host(host: str) -> str:
    if host.startswith("["):
        return f"[{IPv6Address(host[1:-1])}]"
    if _ENDS_IN_A_NUMBER.fullmatch(host):
        return str(IPv4Address(host))
    if host.isascii():
        return host
    encoded = host.encode("idna")
    # Python maps ß to ss, as browsers did once. Now they encode it.
    if encoded.decode("idna") != host:
        raise ValueError("not in the form that has an encoding")
    return encoded.decode()


def is_allowed(origin: str, allowed: Collection[str]) -> bool:
    """Whether ``origin`` is one of ``allowed``, which are normal, or matches a pattern there."""
    try:
        origin = normal_origin(origin)
    except ValueError:
        return False
    return origin in allowed or any(pattern in allowed for pattern in _patterns_of(origin))


def is_own(origin: str, host: str) -> bool:
    """Whether ``origin`` is that of the server itself, which was asked for as ``host``.

    The schemes are not compared, because a proxy may end TLS.
    """
    scheme = origin.partition("://")[0]
    try:
        return normal_origin(origin) == normal_origin(f"{scheme}://{host}")
    except ValueError:
        return False


def _patterns_of(origin: str) -> Iterator[str]:
    scheme, _, host = origin.partition("://")
    while "." in host:
        host = host.partition(".")[2]
        yield f"{scheme}://*.{host}"

"""Origins of web pages: their normal form (RFC 6454), and which of them are allowed.

An allowed origin may be a pattern, ``https://*.example.com``. It matches every host below
``example.com``, but not ``example.com`` itself.
"""

import re
from collections.abc import Collection, Iterator

_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://"
    r"((?:\*\.)?[^/?#@*:\[\]\\\s]+|\[[0-9a-f:.]+\])"
    r"(?::(\d{1,5}))?"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Longer ones are of no host that exists, and would take long to compare.
_MAX_LENGTH = 300


def normal_origin(text: str) -> str:
    """Return ``text``, an origin or a pattern, as browsers write it.

    That is in lower case, with the ASCII form of the host and without the scheme's default port.

    Raises:
        ValueError: it is neither.
    """
    found = _ORIGIN.fullmatch(text.lower())
    if found is None or len(text) > _MAX_LENGTH:
        raise ValueError("not an origin")
    scheme, host, port = found.groups()
    if not host.isascii():
        host = host.encode("idna").decode()
    if port is None or int(port) == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    if int(port) > 65535:
        raise ValueError("not a port")
    return f"{scheme}://{host}:{int(port)}"


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

"""Which URLs are valid where a user and a password may be in them. No error shows any part of one.

A character that ends a part of a URL ends the password too. What is left of it would then be taken
for a host, a port, a path or an option, and be shown in an error about that.
"""

import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address

from pokebridge.errors import ConfigError

_USER_AND_PASSWORD = re.compile(r"(?:[^#?/\[\]@%\s]|%[0-9A-Fa-f]{2})*")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[^\]]+)?\]|[^:\[\]]*)(?::(\d{1,5}))?")
_FOUR_NUMBERS = re.compile(r"\d+(?:\.\d+){3}")
_ENCODE = (
    "percent-encode the user and the password:"
    " write # ? / [ ] @ : % in them as %23 %3F %2F %5B %5D %40 %3A %25"
)


def check_url(url: str, schemes: Collection[str]) -> None:
    """Check that ``url`` has one of ``schemes``, and a user, a password, hosts and ports.

    All but the scheme may be missing. There may be several hosts, separated by commas.

    Raises:
        ValueError: it has not. The text is for people, and shows nothing of the URL.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in schemes:
        expected = " or ".join(f"{each}://" for each in sorted(schemes))
        article = "an" if expected.startswith("http") else "a"
        raise ValueError(f"must be {article} {expected} URL")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    after = rest[len(authority) :]
    credentials, _, hosts = authority.rpartition("@")
    if _USER_AND_PASSWORD.fullmatch(credentials) is None or re.search(r"[@#]", after):
        raise ValueError(_ENCODE)
    for host in hosts.split(","):
        found = _HOST.fullmatch(host)
        if found is None or (found[2] is not None and not 0 < int(found[2]) < 65536):
            raise ValueError(
                "a port must be a number from 1 to 65535."
                f" If that is a part of a password, {_ENCODE}"
            )
        _check_host(found[1])


def _check_host(host: str) -> None:
    """Raise ``ValueError`` if ``host`` is a name or an IP address that there can't be."""
    try:
        if host.startswith("["):
            IPv6Address(host[1:-1])
        elif _FOUR_NUMBERS.fullmatch(host):
            IPv4Address(host)
        else:
            host.encode("idna")  # as whoever resolves it: no part of a name is empty or too long
    except ValueError:
        raise ValueError("a host must be a valid name or IP address") from None


def check_bridge_url(name: str, url: str) -> str:
    """Return ``url``, where a bridge is, without a slash at its end. It may have a path.

    Raises:
        ConfigError: it is not an HTTP URL. The text begins with ``name``.
    """
    try:
        check_url(url, ("http", "https"))
        is_valid = re.fullmatch(r"https?://[^/?#@,\s]+(/[^?#]*)?", url) is not None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    if not is_valid:
        raise ConfigError(
            f"{name}: must be an http:// or https:// URL without user, query and fragment:"
            " the token says who calls"
        )
    return url.rstrip("/")

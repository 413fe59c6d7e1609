"""Upgrades of HTTP connections (RFC 9110, section 7.8): what is asked for, and ignoring it."""

from collections.abc import Sequence

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case, and values."""


def wanted_upgrade(headers: Headers) -> bytes | None:
    """Return the protocols that a request wants to upgrade to, in lower case; ``None``: none."""
    values = {b"connection": b"", b"upgrade": b""}
    for name, value in headers:
        if name in values:
            values[name] += b"," + value.lower()
    if b"upgrade" not in _tokens(values[b"connection"]):
        return None
    return b",".join(_tokens(values[b"upgrade"]))


def head_without_upgrade(request_line: bytes, headers: Headers) -> bytes:
    """Return the head of a request as if it did not ask for an upgrade."""
    lines = [request_line]
    for name, value in headers:
        if name == b"connection":
            kept = b", ".join(each for each in _tokens(value) if each.lower() != b"upgrade")
            lines.append(b"connection: " + kept)
        elif name != b"upgrade":
            lines.append(b"%s: %s" % (name, value))
    return b"\r\n".join([*lines, b"", b""])


def _tokens(value: bytes) -> list[bytes]:
    """Return the members of a field that is a list (RFC 9110, section 5.6.1)."""
    return [token.strip() for token in value.split(b",") if token.strip()]

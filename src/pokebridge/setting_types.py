"""What values a setting may have, as types of pydantic.

Every check raises ``ValueError`` with what the value must be. The text never shows the value, which
may have a secret in it.
"""

import base64
import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from pokebridge.forwarded import PREFIX
from pokebridge.model import MAX_VERSION
from pokebridge.origins import normal_origin
from pokebridge.urls import check_url
from pokebridge.wire import CONNECT_PATH

WEBHOOK_SECRET = "whsec_"  # noqa: S105 - a prefix
CENTURY_S = 100 * 365 * 24 * 3600

# The schemes whose URLs may have a user and a password.
_WITH_CREDENTIALS = frozenset(
    {"http", "https", "nats", "postgres", "postgresql", "redis", "rediss", "tls"}
)
_HOST_NAME = r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?"
_ADVERTISED = re.compile(
    rf"wss?://(?P<host>{_HOST_NAME}|\[[0-9a-f:.]+\])(?::(?P<port>\d{{1,5}}))?(?:{PREFIX.pattern})?/*",
    re.IGNORECASE,
)
# The first parts of our own paths that have several. With such a prefix nobody could tell whether a
# proxy has removed it.
_OWN_PARTS = (["v1"], ["docs"], ["assets"])
# The widest networks that are not taken for a mistake.
_WIDEST_PROXIES = {4: 8, 6: 16}


def split_list(value: Any) -> Any:
    """Split a list that came in a flag or a variable, where it is separated by commas."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def check_secret(secret: SecretStr) -> SecretStr:
    """Check a secret for HS256."""
    if len(secret.get_secret_value().strip().encode()) < 32:  # RFC 7518, section 3.2
        raise ValueError("must have at least 32 bytes")
    return secret


def check_webhook_secret(secret: SecretStr) -> SecretStr:
    """Check a secret of Standard Webhooks."""
    prefix, encoded = secret.get_secret_value()[:6], secret.get_secret_value()[6:]
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        key = b""
    if (
        prefix != WEBHOOK_SECRET or not 24 <= len(key) <= 64
    ):  # as the Standard Webhooks specification has it
        raise ValueError(f"must be {WEBHOOK_SECRET} and then 24 to 64 random bytes in base64")
    return secret


def check_origin(origin: str) -> str:
    """Return an allowed origin in its normal form."""
    if origin == "*":
        return origin
    try:
        normal = normal_origin(origin)
    except ValueError:
        raise ValueError(
            "must be origins like https://app.example.com or https://*.example.com, without a path,"
            " or * for any"
            + ("" if origin.isascii() else "; write this host in ASCII, like xn--bcher-kva.example")
        ) from None
    if normal.startswith(("ws://", "wss://")):
        raise ValueError(
            "must be origins of pages, which begin with https:// or http://, not wss://"
        )
    return normal


def check_advertise_url(text: str) -> str:
    """Return the URL without the path of the WebSocket."""
    found = _ADVERTISED.fullmatch(text)
    if found is None or not 0 < int(found["port"] or 1) < 65536:
        raise ValueError(
            "must be a ws:// or wss:// URL like wss://b1.example.com,"
            " without user, query or fragment"
        )
    try:
        host = normal_origin(f"wss://{found['host']}").removeprefix("wss://")
    except ValueError:
        raise ValueError("must have a host that is a name, or a valid IP address") from None
    if host in {"0.0.0.0", "[::]"}:  # noqa: S104 - refused
        raise ValueError("must name this instance: 0.0.0.0 and :: are no address to connect to")
    return text.rstrip("/").removesuffix(CONNECT_PATH).rstrip("/")


def unless_dev(limit: int) -> Any:
    """A limit that is ``limit`` by default, and off with ``dev``."""
    default = lambda given: None if given.get("dev") else limit  # noqa: E731
    return Field(default_factory=default, ge=0, le=MAX_VERSION)


def matching(pattern: str, meaning: str) -> AfterValidator:
    """Refuse what ``pattern`` does not match; ``meaning`` says what is expected."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value) is None:
            raise ValueError(f"must be {meaning}")
        return value

    return AfterValidator(check)


def network(value: Any) -> IPv4Network | IPv6Network:
    """Return ``value`` as a network. One of mapped IPv4 addresses is that of the IPv4 addresses."""
    try:
        found = ip_network(str(value))  # a number would be taken for an address
    except ValueError:
        raise ValueError("must be networks like 10.0.0.0/8, separated by commas") from None
    if found.version == 6 and found.prefixlen >= 96:
        mapped = found.network_address.ipv4_mapped
        return found if mapped is None else ip_network((mapped, found.prefixlen - 96))
    return found


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine, for this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def zero_is_none(limit: int | None) -> int | None:
    """Return ``limit``; 0 is how a flag or a variable says that there is none."""
    return limit or None


def is_too_wide(proxies: IPv4Network | IPv6Network) -> bool:
    """Whether a network of proxies is so wide that it has clients in it."""
    return proxies.prefixlen < _WIDEST_PROXIES[proxies.version]


def _check_host(host: str) -> str:
    host = host.strip("[]")
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        if re.fullmatch(_HOST_NAME, host.lower()) is None or len(host) > 253:
            raise ValueError(
                "must be an address or a name without a port, like 127.0.0.1, 0.0.0.0 or ::"
            ) from None
    return host


def _check_path_prefix(prefix: str) -> str:
    prefix = prefix.rstrip("/")
    if prefix and PREFIX.fullmatch(prefix) is None:
        raise ValueError("must be a path like /bridge: letters, digits, and . _ ~ -")
    if prefix.split("/")[1:2] in _OWN_PARTS:
        raise ValueError("must not begin like the instance's own paths: /v1, /docs or /assets")
    return prefix


def _with_credentials(*schemes: str) -> AfterValidator:
    """Check a URL that may have a password. By default, any whose scheme may have one."""

    def check(url: str) -> str:
        scheme = url.partition("://")[0]
        if schemes or scheme in _WITH_CREDENTIALS:
            check_url(url, schemes or (scheme,))
        return url

    return AfterValidator(check)


Seconds = Annotated[float, Field(gt=0, le=CENTURY_S, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(network)]
Limit = Annotated[int | None, AfterValidator(zero_is_none)]
Secret = Annotated[SecretStr, AfterValidator(check_secret)]
WebhookSecret = Annotated[SecretStr, AfterValidator(check_webhook_secret)]
Host = Annotated[str, AfterValidator(_check_host)]
Origin = Annotated[str, AfterValidator(check_origin)]
AdvertiseUrl = Annotated[str, AfterValidator(check_advertise_url)]
PathPrefix = Annotated[str, AfterValidator(_check_path_prefix)]
GroupPrefix = Annotated[
    str, matching(r"[\x21-\x7e]{1,256}", "the beginning of a recipient, like urn:room:")
]
Claim = Annotated[
    str, matching(r"(?s)\S(.*\S)?", "a text that is not empty, without white space around it")
]
PartUrl = Annotated[
    str,
    matching(r"[a-z]+://\S*", "a URL, like memory://, sqlite:///FILE or nats://HOST:PORT"),
    _with_credentials(),
]
HttpUrl = Annotated[
    str,
    _with_credentials("http", "https"),
    matching(
        r"https?://(?:[^/?]*@)?(?:[^\s/?@:,\[\]\\]+|\[[^\]]+\])(?::\d+)?(?:[/?][^\s\\]*)?",
        "an http:// or https:// URL",
    ),
]
IngressUrl = Annotated[
    str,
    matching(
        r"(nats|tls|pubsub)://\S+",
        "nats://HOST:PORT/STREAM/SUBJECT or pubsub://PROJECT/SUBSCRIPTION",
    ),
    _with_credentials(),
]
# Such a name is a label, a part of a subscription's name and of a subject on every engine.
Name = Annotated[
    str, matching(r"[a-z0-9][a-z0-9-]{0,62}", "1 to 63 lower-case letters, digits and hyphens")
]

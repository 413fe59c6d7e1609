"""HTTP and WebSocket calls to other servers, and the proxies that the environment names for them.

``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``, also in lower case, are read as
curl reads them. One that can't be used is a :class:`~pokebridge.errors.ConfigError` that names it.
A server on this machine is always reached directly.
"""

import os
import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from ssl import SSLContext
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from pokebridge.engines.addresses import addresses_of
from pokebridge.errors import AnswerTooLongError, AuthError, ConfigError
from pokebridge.wire import problem_detail, refusal_text

_DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_VARIABLES = {
    "http": ("http_proxy", "all_proxy"),
    "ws": ("http_proxy", "all_proxy"),
    "https": ("https_proxy", "all_proxy"),
    "wss": ("https_proxy", "all_proxy"),
}
_EXEMPTION = re.compile(r"(?:\[([^\]]*)\]|([^:]*))(?::(\d+))?")


def http_client(
    url: str,
    *,
    tls: SSLContext | None = None,
    limits: httpx.Limits | None = None,
    **options: Any,
) -> httpx.AsyncClient:
    """Return a client for calls to the server of ``url`` and no other.

    After a call that nobody answered, the next goes to the next address of the server's name.
    Redirects are not followed. ``tls`` is for https; by default httpx's certificate authorities, or
    those that ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` name, are trusted. ``options`` are httpx's.

    Raises:
        ConfigError: the host of ``url`` can't be, or the proxy in the environment can't be used.
    """
    if not has_valid_host(url):
        raise ConfigError(f"no server can have the host {urlsplit(url).hostname}: correct the URL")
    proxy = proxy_for(url)
    if tls is None and urlsplit(url).scheme == "https":
        tls = httpx.create_ssl_context()
    # Without TLS there is nothing to verify, and the default would load a hundred roots.
    verify = tls or False
    limits = limits or httpx.Limits(max_connections=100, max_keepalive_connections=20)
    if proxy is not None:  # it resolves the name
        transport = httpx.AsyncHTTPTransport(verify=verify, proxy=proxy, limits=limits)
    else:
        transport = _NextAddress(verify=verify, limits=limits)
    hooks = {"response": [_forget_location]}
    return httpx.AsyncClient(transport=transport, trust_env=False, event_hooks=hooks, **options)


async def _forget_location(response: httpx.Response) -> None:
    """Keep httpx from looking where a redirect leads.

    It looks even if it does not follow, and raises what is no HTTPError if that is no URL.
    """
    response.headers.pop("Location", None)


async def read_body(
    response: httpx.Response, max_bytes: int, on_size: Callable[[int], None] | None = None
) -> bytes:
    """Return the whole body of a streamed ``response``.

    ``on_size`` is called with the bytes that are there, whenever there are more.

    Raises:
        AnswerTooLongError: it has more than ``max_bytes``.
        httpx.HTTPError: it broke off.
    """
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > max_bytes:
            url = response.url.copy_with(query=None)
            raise AnswerTooLongError(f"{url} answered more than {max_bytes} bytes")
        if on_size is not None:
            on_size(len(body))
    return bytes(body)


class Answer(NamedTuple):
    """What a bridge answered, or what stands between: a proxy or a login page answers anything."""

    url: str
    status: int
    media_type: str | None
    retry_after: str | None
    body: bytes

    @property
    def detail(self) -> str | None:
        """Why the bridge refused; ``None`` when it did not, or somebody else answered."""
        return problem_detail(self.status, self.media_type, self.body)

    @property
    def text(self) -> str:
        """What happened, for people."""
        return refusal_text(self.url, self.status, self.detail)

    @property
    def retry_after_s(self) -> float | None:
        """The seconds that the header ``Retry-After`` names, if it does."""
        return retry_after_s(self.retry_after)


async def read_answer(
    url: str,
    response: httpx.Response,
    max_bytes: int,
    on_size: Callable[[int], None] | None = None,
) -> Answer:
    """Return the whole answer of ``url``. The rest is as for :func:`read_body`."""
    body = await read_body(response, max_bytes, on_size)
    media_type, retry_after = map(response.headers.get, ("Content-Type", "Retry-After"))
    return Answer(url, response.status_code, media_type, retry_after, body)


def retry_after_s(header: str | None) -> float | None:
    """The header's seconds, or ``None``. Its other form, a date, is ignored."""
    return float(header) if header and header.isdecimal() else None


def check_token(token: str) -> str:
    """Return ``token``, which goes into a header.

    Raises:
        AuthError: no header can bring it. The text shows nothing of it, as httpx's would.
    """
    if not token or not (token.isascii() and token.isprintable()) or " " in token:
        raise AuthError("a token must be visible ASCII without spaces and line ends")
    return token


class _NextAddress(httpx.AsyncHTTPTransport):
    """Moves on from an address that accepts connections but does not answer.

    httpx connects to the first address that accepts.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # How many requests got no answer.
        self._unanswered = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request`` to the address whose turn it is."""
        sent = await self._redirected(request) if self._unanswered else request
        is_answered = False
        try:
            response = await super().handle_async_request(sent)
            is_answered = True
        except httpx.ConnectError:  # none of them accepts, or the one that was chosen does not
            self._unanswered = -1
            raise
        finally:
            self._unanswered += not is_answered
        return response

    async def _redirected(self, request: httpx.Request) -> httpx.Request:
        name, port = request.url.host, request.url.port or _DEFAULT_PORTS[request.url.scheme]
        try:
            addresses = await addresses_of(name, port)
        except OSError:  # the request will fail in the same way
            return request
        return httpx.Request(
            request.method,
            request.url.copy_with(host=addresses[self._unanswered % len(addresses)]),
            headers=request.headers,  # the Host among them stays the name
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": name},
        )


def proxy_for(url: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the proxy for ``url`` (http, https, ws or wss) as a URL; ``None``: there is none.

    Raises:
        ConfigError: the variable that names the proxy has a value that can't be used.
    """
    environ = os.environ if environ is None else environ
    parts = urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port or _DEFAULT_PORTS[parts.scheme]
    if _is_here(host) or _is_exempt(host, port, _value("no_proxy", environ)[1]):
        return None
    for variable in _VARIABLES[parts.scheme]:
        name, value = _value(variable, environ)
        if name:
            return _checked_proxy(name, value, host) if value else None
    return None


def has_valid_host(url: str) -> bool:
    """Whether httpx accepts the URL's host. Otherwise a call would raise what is no HTTPError."""
    try:
        return bool(httpx.URL(url).host)
    except (httpx.InvalidURL, ValueError):  # of an address, or of a name that has no IDNA encoding
        return False


def _value(variable: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the name, in lower or upper case, that is set, and its value."""
    upper = variable.upper()
    if variable in environ:
        return variable, environ[variable].strip()
    # In a CGI script it is a header of the request (CVE-2016-5385).
    if upper in environ and not (upper == "HTTP_PROXY" and "REQUEST_METHOD" in environ):
        return upper, environ[upper].strip()
    return "", ""


def _is_here(host: str) -> bool:
    address = _address(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Whether ``no_proxy`` has ``host``: a name with all below it, an address, or a network.

    Each may have a port. ``*`` has every host.
    """
    address = _address(host)
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        if entry == "*":
            return True
        if "/" in entry:
            if address is not None and _is_in(address, entry):
                return True
            continue
        # An IPv6 address may be without brackets, and then has no port.
        found = _EXEMPTION.fullmatch(entry if _address(entry) is None else f"[{entry}]")
        if found is None or (found[3] is not None and int(found[3]) != port):
            continue
        name = (found[1] or found[2] or "").removeprefix("*").strip(".")
        if address is not None:
            if address == _address(name):
                return True
        elif name and (host == name or host.endswith(f".{name}")):
            return True
    return False


def _is_in(address: IPv4Address | IPv6Address, network: str) -> bool:
    try:
        return address in ip_network(network.replace("[", "").replace("]", ""), strict=False)
    except ValueError:
        return False


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _checked_proxy(variable: str, value: str, host: str) -> str:
    """Return ``value`` as a URL with every part. No error shows it: it may have a password."""
    way_out = f"or add {host} to NO_PROXY"
    if value.lower().startswith("socks"):
        raise ConfigError(
            f"{variable}: SOCKS proxies are not supported: set it to http://HOST:PORT, {way_out}"
        )
    try:
        url = value if "://" in value else f"http://{value}"
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        is_valid = parts.scheme in {"http", "https"} and has_valid_host(url)
    except (ValueError, KeyError):
        is_valid = False
    if not is_valid or parts.path.strip("/") or re.search(r"[?#\s]", value):
        raise ConfigError(
            f"{variable}: must be a proxy like http://HOST:PORT, with user and password"
            f" percent-encoded if it needs them, {way_out}"
        )
    user, at, server = parts.netloc.rpartition("@")
    if at and ":" not in user:  # websockets would refuse it
        user += ":"
    if parts.port is None:
        server = f"{server.removesuffix(':')}:{port}"
    return f"{parts.scheme}://{user}{at}{server}"

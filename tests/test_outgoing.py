"""Which proxy a call goes through: by the environment, as curl reads it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from pokebridge import http_publisher
from pokebridge.api_client import ApiClient
from pokebridge.client import PokeClient
from pokebridge.errors import ConfigError, TransportError
from pokebridge.fallback.webhook import Webhook, WebhookError
from pokebridge.outgoing import http_client, proxy_for
from pokebridge.publisher import HttpPublisher
from tests.client.faulty_bridge import FaultyBridge
from tests.support import wait_until
from tests.support.mute import LIVE, MUTE, Names, mute_listener
from tests.support.stream_server import relay, stream_server

ALL = {"ALL_PROXY": "http://proxy.example:3128"}
PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this machine's variables."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("https://a.example", {}, None),
        ("https://a.example", ALL, PROXY),
        ("http://a.example", ALL, PROXY),
        ("ws://a.example", ALL, PROXY),
        ("wss://a.example", ALL, PROXY),
        ("wss://a.example", {"https_proxy": "p:1"}, "http://p:1"),
        ("ws://a.example", {"https_proxy": "p:1"}, None),
        ("ws://a.example", {"http_proxy": "p:1"}, "http://p:1"),
        ("https://a.example", {"https_proxy": "https://p"}, "https://p:443"),
        ("https://a.example", {"https_proxy": "http://u@p/"}, "http://u:@p:80"),
        ("https://a.example", {"https_proxy": "http://u:a%40b@[::2]"}, "http://u:a%40b@[::2]:80"),
        ("https://a.example", {"https_proxy": "low:1", "HTTPS_PROXY": "up:1"}, "http://low:1"),
        ("https://a.example", {"https_proxy": "", **ALL}, None),
        ("https://a.example", {"HTTPS_PROXY": "up:1", **ALL}, "http://up:1"),
        ("http://a.example", {"HTTP_PROXY": "up:1"}, "http://up:1"),
        ("http://a.example", {"HTTP_PROXY": "up:1", "REQUEST_METHOD": "GET"}, None),
    ],
)
def test_the_variable_that_counts(url: str, environ: Mapping[str, str], expected: str) -> None:
    """The scheme's own comes first, lower case comes first, and an empty one means none."""
    assert proxy_for(url, environ) == expected


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "a.localhost", "127.0.0.1", "127.9.8.7", "[::1]"],
)
def test_this_machine_is_reached_directly(host: str) -> None:
    """Whatever the variables say, and even if they can't be used."""
    for scheme in ("http", "https", "ws", "wss"):
        assert proxy_for(f"{scheme}://{host}:8080/x", {"ALL_PROXY": "socks5://p"}) is None


@pytest.mark.parametrize(
    ("host", "no_proxy", "is_exempt"),
    [
        ("a.example", "*", True),
        ("a.example", "a.example", True),
        ("a.example", "A.EXAMPLE", True),
        ("a.example", "b.example, a.example", True),
        ("a.example", "b.example  a.example", True),
        ("b.a.example", "a.example", True),
        ("b.a.example", ".a.example", True),
        ("b.a.example", "*.a.example", True),
        ("a.example", ".a.example", True),
        ("ba.example", "a.example", False),
        ("a.example", "example.a", False),
        ("a.example.", "a.example", True),
        ("a.example", "a.example:443", True),
        ("a.example", "a.example:8443", False),
        ("a.example:8443", "a.example:8443", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.9/8", True),
        ("10.1.2.3", "10.1.2.3:443", True),
        ("10.1.2.3", "10.1.2.3:80", False),
        ("10.1.2.3", "2.3", False),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("[2001:db8::1]", "2001:db8::1", True),
        ("[2001:db8::1]", "2001:DB8:0::1", True),
        ("[2001:db8::1]", "[2001:db8::1]", True),
        ("[2001:db8::1]", "[2001:db8::1]:443", True),
        ("[2001:db8::1]", "[2001:db8::1]:80", False),
        ("[2001:db8::1]", "2001:db8::/32", True),
        ("[2001:db9::1]", "2001:db8::/32", False),
        ("a.example", "10.0.0.0/8,/,:,.,[,%", False),
        ("a.example", "", False),
    ],
)
def test_what_no_proxy_exempts(host: str, no_proxy: str, is_exempt: bool) -> None:  # noqa: FBT001
    """Names with their subdomains, addresses and networks are exempt, with or without a port."""
    assert (proxy_for(f"https://{host}", {**ALL, "NO_PROXY": no_proxy}) is None) == is_exempt


@pytest.mark.parametrize(
    "value",
    [
        "socks5://hunter2@p:1080",
        "socks://p",
        "SOCKS4a://p",
        "ftp://hunter2@p",
        "http://",
        "http://:3128",
        "http://u:hunter2@p:port",
        "http://u:hunter2#@p:1",
        "http://u:hunter2/@p:1",
        "http://u:hunter2?@p:1",
        "http://[hunter2@p",
        "http://p:99999",
        "http://u:hunter2@10.0.0.256:1",
        "http://u:hunter2@[:::]:1",
        "http://💩.example",
        "http://p/path",
        "two words",
        "://",
    ],
)
def test_a_proxy_that_can_not_be_used_is_named(value: str) -> None:
    """The error is one line with the variable and a way out. It shows no part of the value."""
    with pytest.raises(ConfigError) as caught:
        proxy_for("https://a.example", {"ALL_PROXY": value})
    text = str(caught.value)
    assert text.startswith("ALL_PROXY: ")
    assert "NO_PROXY" in text
    assert "hunter2" not in text
    assert "\n" not in text


async def test_every_caller_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients and the publisher raise it when they are made, and not at their first call."""
    monkeypatch.setenv("ALL_PROXY", "socks5://p:1080")

    async def show(_: object) -> None: ...

    for make in (http_client, lambda url: HttpPublisher(url, "t"), lambda url: _client(url, show)):
        with pytest.raises(ConfigError, match="ALL_PROXY"):
            make("https://a.example")
    async with HttpPublisher("http://127.0.0.1:1", "t"):
        pass


@pytest.mark.parametrize("host", ["10.0.0.256", "[1::2::3]", "💩.example", "ü" * 70, "xn--"])
async def test_a_host_that_can_not_be_is_refused_when_a_caller_is_made(host: str) -> None:
    """Otherwise each call would fail in a way that looks like a defect."""

    async def show(_: object) -> None: ...

    for make in (ApiClient, lambda url: HttpPublisher(url, "t"), lambda url: _client(url, show)):
        with pytest.raises(ConfigError, match="host"):
            make(f"https://{host}")


def _client(url: str, show: object) -> PokeClient:
    return PokeClient(url, "t", on_poke=show)  # type: ignore[arg-type]


@asynccontextmanager
async def proxying(port: int) -> AsyncIterator[tuple[str, list[str]]]:
    """A proxy that leads everywhere to ``port``; its URL, and the request lines that it got."""
    lines: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, rest = head.partition(b"\r\n")
        lines.append(line.decode())
        method, target, version = line.split(b" ")
        if method == b"CONNECT":
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            first = b""
        else:
            path = target.split(b"/", 3)[3]
            first = b"%s /%s %s\r\nConnection: close\r\n%s" % (method, path, version, rest)
        await relay(reader, writer, port, first=first)

    async with stream_server(serve) as own_port:
        yield f"http://user:pass@127.0.0.1:{own_port}", lines


async def test_socket_and_pulls_go_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the proxy can resolve the name, so both go through it."""
    got: list[object] = []

    async def show(messages: object) -> None:
        got.append(messages)

    async with FaultyBridge().run() as bridge:
        bridge.commit("a")
        async with proxying(urlsplit(bridge.url).port or 0) as (proxy, lines):
            monkeypatch.setenv("ALL_PROXY", proxy)
            async with PokeClient("http://bridge.invalid:8080", "t", show) as client:
                await client.wait_ready(30)
                await wait_until(lambda: bridge.acks == [1])
    assert sorted(line.split("?")[0].removesuffix(" HTTP/1.1") for line in lines) == [
        "CONNECT bridge.invalid:8080",
        "GET http://bridge.invalid:8080/v1/messages",
        "POST http://bridge.invalid:8080/v1/messages/ack",
    ]


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer a request with its host, as an instance that accepts one poke."""
    await reader.readuntil(b"\r\n\r\n")
    body = b'{"accepted":1}'
    writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize("accepts", [False, True])
async def test_a_mute_address_is_left(
    names: Names, monkeypatch: pytest.MonkeyPatch, *, accepts: bool
) -> None:
    """The first address of the name does not accept, or accepts and never answers.

    Then a publisher, a webhook and a client reach the second at once, or at the next try.
    """
    timeout_s = 2.0 if accepts else 10.0  # is waited for only at an address that accepts
    monkeypatch.setattr(http_publisher, "HTTP_TIMEOUT_S", timeout_s)
    names("bridge.test", [MUTE, LIVE])
    async with stream_server(_answer, host=LIVE) as port:
        url = f"http://bridge.test:{port}"
        webhook = Webhook(url, b"key", timeout_s=timeout_s)
        async with HttpPublisher(url, "t") as pokes, http_client(url, timeout=timeout_s) as http:
            with mute_listener(accepts=accepts, port=port):
                for call in (
                    lambda: pokes.poke("urn:user:bob"),
                    lambda: webhook.post("id", b"{}"),
                    lambda: http.get(url),
                ):
                    await _second_try_at_most(call, may_fail=accepts)
            await http.get(url)  # nothing listens at the first address now, so it refuses
        await webhook.close()


async def _second_try_at_most(call: Callable[[], Awaitable[object]], *, may_fail: bool) -> None:
    try:
        await call()
    except (TransportError, WebhookError, httpx.TimeoutException):
        assert may_fail
        await call()

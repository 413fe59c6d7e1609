"""protocol.md section 3 over real sockets: handshake, frames, close codes, limits."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from ipaddress import ip_network

import jwt
import pytest
from websockets.frames import Frame, Opcode

from pokebridge.forwarded import forwarded_for
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.handshake import client_address
from pokebridge.model import Poke
from pokebridge.session import Timing
from tests.gateway.harness import BOB, QUICK, SECRET, Client, running, token
from tests.support.waiting import wait_until

# --- bringing a token ---------------------------------------------------------------------------


async def test_ready_comes_first() -> None:
    """The first frame is ``ready`` with session, instance and the token's time left."""
    async with running() as server:
        client = await server.connect()
        ready = await client.message()
        assert ready["type"] == "ready"
        assert ready["instance"] == "i-1"
        assert ready["session"]
        assert 598 <= ready["expires_in"] <= 600


async def test_a_token_may_come_as_sub_protocol() -> None:
    """Browsers bring it as ``bearer.<jwt>``; the answer names pokebridge.v1 and not the token."""
    async with running() as server:
        client = await server.dial()
        offer = f"Sec-WebSocket-Protocol: pokebridge.v1, bearer.{token()}"
        assert await client.handshake(headers=(offer,)) == 101
        assert client.headers["sec-websocket-protocol"] == "pokebridge.v1"
        assert (await client.message())["type"] == "ready"


async def test_the_token_may_come_as_the_only_sub_protocol() -> None:
    """Some proxies keep only the first. A browser then wants that one in the answer."""
    async with running() as server:
        client = await server.dial()
        offer = f"Sec-WebSocket-Protocol: bearer.{token()}"
        assert await client.handshake(headers=(offer,)) == 101
        assert client.headers["sec-websocket-protocol"] == f"bearer.{token()}"


async def test_a_token_may_come_in_the_query() -> None:
    """``access_token`` serves where nothing else can be set; no sub-protocol is forced on it."""
    async with running() as server:
        client = await server.dial()
        assert await client.handshake(f"/v1/connect?access_token={token()}") == 101
        assert "sec-websocket-protocol" not in client.headers
        assert (await client.message())["type"] == "ready"


BAD_TOKENS = {
    "none": None,
    "garbage": "x.y.z",
    "foreign secret": token(secret="f" * 64),
    "expired": token(ttl_s=-10),
    "alg none": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ1cm46dXNlcjpib2IiLCJleHAiOjk5OTk5OTk5OTl9.",
}


@pytest.mark.parametrize("bad", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
async def test_without_a_valid_token_401(bad: str | None) -> None:
    """No token, and each kind of bad one, is refused before the upgrade, as problem details."""
    async with running() as server:
        client = await server.dial()
        headers = () if bad is None else (f"Authorization: Bearer {bad}",)
        assert await client.handshake(headers=headers) == 401
        assert client.headers["www-authenticate"] == "Bearer"
        problem = await client.problem()
        assert problem["status"] == 401
        assert bad is None or bad not in problem["detail"]
        assert await client.gone()


# --- the handshake ------------------------------------------------------------------------------


async def test_a_handshake_as_firefox_sends_it() -> None:
    """``Connection: keep-alive, Upgrade`` and the rest of Firefox's head are accepted."""
    head = (
        "GET /v1/connect HTTP/1.1\r\nHost: localhost:8080\r\n"
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0\r\n"
        "Accept: */*\r\nAccept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br\r\n"
        "Sec-WebSocket-Version: 13\r\nOrigin: http://localhost:8080\r\n"
        f"Sec-WebSocket-Protocol: pokebridge.v1, bearer.{token()}\r\n"
        "Sec-WebSocket-Extensions: permessage-deflate\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nConnection: keep-alive, Upgrade\r\n"
        "Sec-Fetch-Dest: empty\r\nSec-Fetch-Mode: websocket\r\nSec-Fetch-Site: same-origin\r\n"
        "Pragma: no-cache\r\nCache-Control: no-cache\r\nUpgrade: websocket\r\n\r\n"
    )
    async with running(allowed_origins=None) as server:
        client = await server.dial()
        assert await client.request(head) == 101
        # The sample of RFC 6455, section 1.3.
        assert client.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert "sec-websocket-extensions" not in client.headers
        assert (await client.message())["type"] == "ready"


async def test_header_tokens_are_case_insensitive() -> None:
    """``UPGRADE`` and ``WebSocket`` mean the same, in several headers too."""
    async with running() as server:
        client = await server.dial()
        status = await client.handshake(
            headers=(
                "host: x",
                "UPGRADE: WebSocket",
                "connection: Keep-Alive , uPGRADE",
                "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
                "SEC-WEBSOCKET-VERSION: 13",
                f"AUTHORIZATION: bearer {token()}",
            ),
            bare=True,
        )
        assert status == 101


KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
VERSION = "Sec-WebSocket-Version: 13"
UPGRADE = ("Host: x", "Upgrade: websocket", "Connection: Upgrade")
BAD_HANDSHAKES = {
    "no key": ((*UPGRADE, VERSION), 400),
    "short key": ((*UPGRADE, VERSION, "Sec-WebSocket-Key: c2hvcnQ="), 400),
    "two keys": ((*UPGRADE, VERSION, KEY, KEY), 400),
    "no version": ((*UPGRADE, KEY), 400),
    "old version": ((*UPGRADE, KEY, "Sec-WebSocket-Version: 8"), 400),
    "bad device": ((*UPGRADE, KEY, VERSION), 400),
}


@pytest.mark.parametrize(
    ("name", "headers", "status"), [(n, h, s) for n, (h, s) in BAD_HANDSHAKES.items()]
)
async def test_a_bad_handshake_is_refused(name: str, headers: tuple[str, ...], status: int) -> None:
    """Each missing or wrong part is a 400 that says what, and the server serves on."""
    async with running() as server:
        client = await server.dial()
        path = "/v1/connect?device=a%20b" if name == "bad device" else "/v1/connect"
        authorized = (*headers, f"Authorization: Bearer {token()}")
        assert await client.handshake(path, authorized, bare=True) == status
        assert (await client.problem())["detail"]
        await server.open()


async def test_websockets_are_served_at_one_path() -> None:
    """An upgrade anywhere else is 404."""
    async with running() as server:
        client = await server.dial()
        assert await client.handshake("/chat", (f"Authorization: Bearer {token()}",)) == 404


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 101),
        ("https://app.example", 101),
        ("https://evil.example", 403),
        ("https://app.example.evil.example", 403),
        ("null", 403),
    ],
)
async def test_origins_are_checked(origin: str | None, status: int) -> None:
    """A page with a foreign Origin gets 403. A client without an Origin is not a browser."""
    async with running(allowed_origins=frozenset({"https://app.example"})) as server:
        client = await server.dial()
        headers = () if origin is None else (f"Origin: {origin}",)
        assert (
            await client.handshake(headers=(f"Authorization: Bearer {token()}", *headers)) == status
        )


async def test_no_origin_is_allowed_by_default() -> None:
    """Outside --dev every Origin must be listed."""
    async with running() as server:
        client = await server.dial()
        headers = (f"Authorization: Bearer {token()}", "Origin: http://a.example")
        assert await client.handshake(headers=headers) == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Origin: http://localhost",), 101),  # the Host that the client asks for
        (("Origin: HTTPS://LOCALHOST:443",), 101),
        (("Origin: http://localhost:8080",), 403),
        (("Origin: https://a.app.example",), 101),
        (("Origin: https://app.example",), 403),
        (("Origin: null",), 403),
        (("Origin:",), 403),
        (("Origin: http://b.example", "Host: b.example"), 400),  # a second Host
        (("Origin: http://localhost", "Origin: http://a.example"), 400),
    ],
)
async def test_the_own_origin_and_patterns_are_allowed(
    headers: tuple[str, ...], status: int
) -> None:
    """A page of this host connects without a setting, and so does one that a pattern matches."""
    async with running(allowed_origins=frozenset({"https://*.app.example"})) as server:
        client = await server.dial()
        bearer = f"Authorization: Bearer {token()}"
        assert await client.handshake(headers=(bearer, *headers)) == status


async def test_a_huge_head_is_refused() -> None:
    """A head over the cap is 431 however it trickles in, and the connection ends."""
    async with running() as server:
        client = await server.dial()
        assert await client.request(b"GET / HTTP/1.1\r\n" + b"X-A: " + b"b" * 20_000) == 431
        assert await client.gone()
        await server.open()


async def test_a_head_that_never_ends_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that trickles its head is answered 408 at the deadline, and dropped."""
    monkeypatch.setattr("pokebridge.server.http.REQUEST_TIMEOUT_S", 0.3)
    async with running() as server:
        silent, slow = await server.dial(), await server.dial()
        slow.send_raw(b"GET / HTTP/1.1\r\nX-Slow: ")
        assert await slow.request(b"b") == 408
        assert await slow.gone()
        assert await silent.gone()


async def test_a_body_that_never_ends_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline covers the body of a request too."""
    monkeypatch.setattr("pokebridge.server.http.REQUEST_TIMEOUT_S", 0.3)
    async with running() as server:
        client = await server.dial()
        head = "POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
        assert await client.request(head) == 408
        assert await client.gone()


async def test_the_deadline_is_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is kept alive may be older than the deadline of one request."""
    monkeypatch.setattr("pokebridge.server.http.REQUEST_TIMEOUT_S", 0.4)
    async with running() as server:
        client = await server.dial()
        loop = asyncio.get_running_loop()
        until = loop.time() + 1.2
        while loop.time() < until:
            assert await client.request("GET / HTTP/1.1\r\nHost: x\r\n\r\n") == 404


async def test_bytes_that_are_no_http_are_refused() -> None:
    """Garbage is a 400, and the server serves on."""
    async with running() as server:
        client = await server.dial()
        assert await client.request(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n") == 400
        assert await client.gone()
        await server.open()


async def test_an_upgrade_to_anything_else_is_ignored() -> None:
    """A client that offers h2c, as curl may, is served as if it had not (RFC 9110, 7.8)."""
    async with running() as server:
        client = await server.dial()
        request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        assert await client.request(request) == 404


# --- limits -------------------------------------------------------------------------------------


async def test_one_session_too_many_replaces_the_oldest() -> None:
    """At the limit per recipient the oldest closes with 4409, and the others are still poked."""
    async with running(max_sessions_per_recipient=2) as server:
        first = await server.open()
        second, third = await server.open(), await server.open()
        assert await first.closed() == 4409
        await server.poke(version=9)
        for client in (second, third):
            assert await client.message() == {"type": "poke", "version": 9}


async def test_an_address_has_a_share() -> None:
    """Beyond the limit per address: 429 with Retry-After; a session that ends makes room."""
    async with running(max_sessions_per_address=1) as server:
        first = await server.open()
        client = await server.dial()
        assert await client.handshake(headers=(f"Authorization: Bearer {token()}",)) == 429
        assert int(client.headers["retry-after"]) > 0
        await first.close()
        await wait_until(lambda: not len(server.gateway.sessions))
        await server.open()


async def test_an_instance_has_a_limit() -> None:
    """Beyond the limit of the process: 503 with Retry-After."""
    async with running(max_sessions=1) as server:
        await server.open()
        client = await server.dial()
        assert await client.handshake(headers=(f"Authorization: Bearer {token('x')}",)) == 503
        assert int(client.headers["retry-after"]) > 0


async def test_sessions_last_their_time_and_do_not_end_together() -> None:
    """Before the platform's limit each is closed with 1012, some sooner than others."""
    async with running(max_session_s=1.0) as server:
        began_s = asyncio.get_running_loop().time()
        clients = [await server.open() for _ in range(8)]
        opened_s = asyncio.get_running_loop().time()
        ends_s = {each.session.due_at for each in server.connections}
        assert len(ends_s) == 8
        assert all(began_s + 0.8 <= end_s <= opened_s + 1.0 for end_s in ends_s)
        for client in clients:
            assert await client.closed() == 1012


async def test_handshakes_have_a_rate() -> None:
    """Handshakes beyond the rate are refused with 503 and Retry-After, those within served."""
    async with running(handshakes_per_s=3) as server:
        statuses = []
        for _ in range(5):
            client = await server.dial()
            statuses.append(await client.handshake(headers=(f"Authorization: Bearer {token()}",)))
        assert statuses[:3] == [101] * 3
        assert 503 in statuses[3:]


async def test_a_proxys_word_counts_only_when_it_is_trusted() -> None:
    """Only a trusted proxy's X-Forwarded-For, or else Forwarded, sets the counted address."""
    headers = ("X-Forwarded-For: 203.0.113.7",)
    standard = ('Forwarded: for=198.51.100.9;proto=https, For="203.0.113.7:4711";by=10.0.0.1',)
    trusted = [ip_network("127.0.0.0/8")]
    async with running(max_sessions_per_address=1, trusted_proxies=trusted) as server:
        await server.open(headers=headers)
        await server.open(headers=("X-Forwarded-For: 203.0.113.8",))
        again = await server.dial()
        bearer = (f"Authorization: Bearer {token()}",)
        assert await again.handshake(headers=(*bearer, *headers)) == 429
        again = await server.dial()
        assert await again.handshake(headers=(*bearer, *standard)) == 429
        await server.open(headers=("X-Forwarded-For: 203.0.113.9", *standard))
    async with running(max_sessions_per_address=1) as server:
        await server.open(headers=headers)
        other = await server.dial()
        spoofed = ("X-Forwarded-For: 203.0.113.9",)
        assert await other.handshake(headers=(*bearer, *spoofed)) == 429


# --- pokes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "forwarded", "counted"),
    [
        ("127.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("127.0.0.1", "203.0.113.7:51001", "203.0.113.7"),
        ("127.0.0.1", "198.51.100.1,\t203.0.113.7\t", "203.0.113.7"),
        ("::ffff:127.0.0.1", '"203.0.113.7:51001"', "203.0.113.7"),
        ("127.0.0.1", "::ffff:203.0.113.7", "203.0.113.7"),
        ("127.0.0.1", "[::ffff:203.0.113.7]:80", "203.0.113.7"),
        ("127.0.0.1", "::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "198.51.100.1", "10.0.0.1"),
        ("127.0.0.1", "203.0.113.7:", "203.0.113.7"),
        ("127.0.0.1", "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("127.0.0.1", "[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("127.0.0.1", "[2001:db8:1:2::9]", "2001:db8:1:2::/64"),
        ("127.0.0.1", "198.51.100.1, 203.0.113.7:1 , 127.0.0.2:2", "203.0.113.7"),
        ("127.0.0.1", "198.51.100.1, unknown", "127.0.0.1"),
        ("127.0.0.1", "198.51.100.1, ", "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),
        ("2001:db8:5:6:7::8", "198.51.100.1", "2001:db8:5:6::/64"),
        ("fe80::1%eth0", "", "fe80::/64"),
        ("127.0.0.1", "[fe80::1%eth0]:443", "fe80::/64"),
        ("127.0.0.1", "198.51.100.1, 203.0.113.7:99999999999999", "203.0.113.7"),
        ("127.0.0.1", "198.51.100.1, 203.0.113.256", "127.0.0.1"),
        ("127.0.0.1", "198.51.100.1, 0x7f.1", "127.0.0.1"),
        ("", "198.51.100.1", ""),
    ],
)
def test_what_an_address_is(peer: str, forwarded: str, counted: str) -> None:
    """Ports and brackets are removed, mapped addresses are IPv4, and IPv6 counts by /64."""
    trusted = [ip_network("127.0.0.0/8")]
    assert client_address(peer, [forwarded] if forwarded else [], trusted) == counted


@pytest.mark.parametrize(
    ("fields", "counted"),
    [
        (["for=192.0.2.60;proto=http;by=203.0.113.43"], "192.0.2.60"),
        (["for=198.51.100.17, for=192.0.2.43"], "192.0.2.43"),
        (["for=198.51.100.17", "for=192.0.2.43, for=127.0.0.9"], "192.0.2.43"),
        (['For="[2001:db8:cafe::17]:4711"'], "2001:db8:cafe::/64"),
        (["proto=https; FOR = 192.0.2.43 "], "192.0.2.43"),
        (['for="_gazonk"'], "127.0.0.1"),
        (["for=192.0.2.43, for=unknown"], "127.0.0.1"),
        (["for=192.0.2.43, proto=https"], "127.0.0.1"),
        (['for="192.0.2.1, for=198.51.100.2'], "198.51.100.2"),
        ([""], "127.0.0.1"),
    ],
)
def test_what_address_the_standard_field_names(fields: list[str], counted: str) -> None:
    """Without X-Forwarded-For, ``Forwarded`` (RFC 7239) is read in the same way."""
    trusted = [ip_network("127.0.0.0/8")]
    headers = [(b"forwarded", field.encode()) for field in fields]
    assert client_address("127.0.0.1", forwarded_for(headers), trusted) == counted
    headers.append((b"x-forwarded-for", b"203.0.113.5"))
    assert client_address("127.0.0.1", forwarded_for(headers), trusted) == "203.0.113.5"


async def test_a_poke_reaches_every_session_of_its_recipient_and_no_other() -> None:
    """All devices hear it, with its version or without; somebody else hears nothing."""
    async with running() as server:
        phone, laptop = await server.open(path="/v1/connect?device=phone"), await server.open()
        eve = await server.open("urn:user:eve")
        await server.poke(version=17)
        await server.poke()
        for client in (phone, laptop):
            assert await client.message() == {"type": "poke", "version": 17}
            assert await client.message() == {"type": "poke"}
        eve.say({"type": "ping"})
        assert await eve.message() == {"type": "pong"}


async def test_garbage_on_the_transport_is_counted_and_dropped() -> None:
    """Malformed signals and those of unknown type harm nothing and are counted."""
    async with running() as server:
        client = await server.open()
        for body in (b"", b"\xff", b'{"recipient":7}', b'{"type":"restart"}', b"[" * 9999):
            await server.publish_raw(body)
        assert server.gateway.bridge.counters.malformed == 5
        await server.poke()
        assert await client.message() == {"type": "poke"}


@pytest.mark.parametrize(
    "end",
    [
        lambda connection: connection.close(1001, "the end"),
        lambda connection: connection.move("ws://other.example"),
        lambda connection: connection.abort(),
    ],
    ids=["close", "move", "abort"],
)
async def test_no_poke_follows_the_end(end: Callable[[Connection], None]) -> None:
    """After a close frame nothing more is sent (RFC 6455, section 5.5.1)."""
    async with running() as server:
        await server.open()
        (connection,) = server.connections
        bridge = server.gateway.bridge
        bridge.handle_poke(Poke(BOB))
        end(connection)
        bridge.handle_poke(Poke(BOB))
        assert bridge.counters.delivered == 1


async def test_a_reader_that_reads_nothing_costs_one_pending_poke() -> None:
    """20,000 pokes to a session that does not read: no buffer grows, and the newest comes once."""
    async with running() as server:
        stuck = await server.open(receive_buffer=2048)
        other = await server.open("urn:user:eve")
        (connection, _) = server.connections
        stuck.stop_reading()
        for version in range(1, 20_001):
            await server.poke(version=version)
        assert connection._transport.get_write_buffer_size() < 200
        await server.poke("urn:user:eve", 1)
        assert await other.message() == {"type": "poke", "version": 1}
        stuck.read_on()
        heard: list[int] = []
        while not heard or heard[-1] != 20_000:
            heard.append((await stuck.message())["version"])
        assert heard == sorted(heard)
        # The frames in the kernels' full buffers, one frame in ours, and the merged one.
        assert len(heard) < 1000
        assert heard[-2] < 10_000
        stuck.say({"type": "ping"})
        assert await stuck.message() == {"type": "pong"}


async def test_a_peer_that_never_reads_is_dropped() -> None:
    """Blocked for the pong deadline, the session ends and its memory is free."""
    async with running(QUICK) as server:
        (await server.open(receive_buffer=2048)).stop_reading()
        for version in range(1, 20_001):
            await server.poke(version=version)
        await wait_until(lambda: len(server.gateway.sessions) == 0, 5)


# --- what a client may say ----------------------------------------------------------------------


async def test_pings_keep_their_interval_when_pongs_have_longer() -> None:
    """The deadline of a pong that came does not hold the next ping up."""
    timing = Timing(ping_interval_s=0.2, pong_timeout_s=30)
    async with running(timing) as server:
        client = await server.open()
        for _ in range(4):
            opcode, payload = await client.frame()
            assert opcode == Opcode.PING
            client.send(Opcode.PONG, payload)


async def test_json_ping_is_answered() -> None:
    """``ping`` gets ``pong``, also in fragments and byte by byte."""
    async with running() as server:
        client = await server.open()
        client.say({"type": "ping"})
        assert await client.message() == {"type": "pong"}
        client.send(Opcode.TEXT, b'{"type":', fin=False)
        client.send(Opcode.PING, b"between")
        client.send(Opcode.CONT, b'"ping"}')
        assert await client.frame() == (Opcode.PONG, b"between")
        assert await client.message() == {"type": "pong"}


def client_text(payload: bytes) -> bytes:
    """A masked text frame."""
    return Frame(Opcode.TEXT, payload).serialize(mask=True)


BAD_FRAMES = {
    "not JSON": (b"\x81\x84\0\0\0\0ping", 1008),
    "nested deeply": (client_text(b'{"type":"ping","x":' + b"[" * 2000 + b"]" * 2000 + b"}"), 1008),
    "empty fragments without end": (b"\x01\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * 2000, 1008),
    "fragments of a byte": (b"\x01\x81\0\0\0\0x" + b"\x00\x81\0\0\0\0x" * 2000, 1008),
    "pings between fragments": (
        b"\x01\x81\0\0\0\0x" + b"\x89\x80\0\0\0\0\x00\x80\0\0\0\0" * 2000,
        1008,
    ),
    "pongs without end": (b"\x8a\x80\0\0\0\0" * 3000, 1008),
    "unknown type": (b"\x81\x8f\0\0\0\0" + b'{"type":"poke"}', 1008),
    "unmasked": (b"\x81\x02{}", 1002),
    "reserved bit": (b"\xc1\x82\0\0\0\0{}", 1002),
    "binary": (b"\x82\x82\0\0\0\0{}", 1003),
    "oversize": (b"\x81\xfe\x10\x01\0\0\0\0" + b"x" * 4097, 1009),
    "oversize, with a token": (
        client_text(b'{"type":"auth","token":"' + b"x" * 9 * 1024 + b'"}'),
        1009,
    ),
    "oversize, a ping": (client_text(b'{"type":"ping","x":"' + b"x" * 4096 + b'"}'), 1009),
    "oversize, megabytes": (b"\x81\xff\0\0\0\0\0\x98\x96\x80\0\0\0\0" + b"x" * 2_000_000, 1009),
    "fragmented ping": (b"\x09\x80\0\0\0\0", 1002),
    "lone continuation": (b"\x80\x82\0\0\0\0{}", 1002),
    "not UTF-8": (b"\x81\x81\0\0\0\0\xff", 1007),
    "bad close code": (b"\x88\x82\0\0\0\0\x03\xed", 1002),
}


@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize(("data", "code"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_a_broken_rule_closes_with_its_code(
    data: bytes, code: int, *, bytewise: bool
) -> None:
    """Each kind of bad input gets its documented close code, and the server serves on."""
    async with running() as server:
        client, other = await server.open(), await server.open("urn:user:eve")
        if bytewise:
            for byte in data[:200]:
                client.send_raw(bytes([byte]))
                await asyncio.sleep(0)
        with contextlib.suppress(ConnectionError):
            client.send_raw(data[200:] if bytewise else data)
        assert await client.closed() == code
        await server.poke("urn:user:eve")
        assert await other.message() == {"type": "poke"}


async def test_a_clients_close_is_answered_with_its_code() -> None:
    """A closing handshake that the client starts ends cleanly on both sides."""
    async with running() as server:
        client = await server.open()
        client.send(Opcode.CLOSE, (1000).to_bytes(2, "big") + b"bye")
        assert await client.frame() == (Opcode.CLOSE, (1000).to_bytes(2, "big"))
        assert await client.gone()
        await wait_until(lambda: len(server.gateway.sessions) == 0)


async def test_a_chatterbox_is_closed() -> None:
    """More frames in a ping interval than our clients send close the session with 1008."""
    async with running(Timing(max_messages_per_ping=20)) as server:
        client = await server.open()
        for _ in range(21):
            client.say({"type": "ping"})
        assert await client.closed() == 1008


async def test_fragments_count_as_frames() -> None:
    """A limit on frames is one on fragments too, over many messages in fragments."""
    async with running(Timing(max_messages_per_ping=20)) as server:
        client = await server.open()
        for _ in range(8):
            client.send(Opcode.TEXT, b'{"type":', fin=False)
            client.send(Opcode.CONT, b"", fin=False)
            client.send(Opcode.CONT, b'"ping"}')
        assert await client.closed() == 1008


async def test_a_flood_of_pings_by_one_that_never_reads_is_bounded() -> None:
    """While the client reads no pongs, no more pings are read, so the buffer stays small."""
    async with running(Timing(max_messages_per_ping=10**9)) as server:
        client = await server.open(receive_buffer=2048)
        client.stop_reading()
        (connection,) = server.connections
        ping = json.dumps({"type": "ping"}).encode()
        for _ in range(20_000):
            client.send(Opcode.TEXT, ping)
        await wait_until(lambda: connection._transport.get_write_buffer_size() > 0)
        assert connection._transport.get_write_buffer_size() < 300_000
        await client.close()


# --- time ---------------------------------------------------------------------------------------


async def test_the_server_pings_and_a_pong_keeps_the_session() -> None:
    """Pings come at the interval; a client that answers lives on, and is poked."""
    async with running(QUICK) as server:
        client = await server.open()
        for _ in range(4):
            assert await client.frame() == (Opcode.PING, b"")
            client.send(Opcode.PONG, b"")
        await server.poke()
        assert await client.message() == {"type": "poke"}


async def test_no_pong_closes_the_session() -> None:
    """A client that does not answer pings is closed, and dropped when it does not answer that."""
    async with running(QUICK) as server:
        await server.open()
        await wait_until(lambda: len(server.gateway.sessions) == 0, 5)


async def test_an_expired_token_closes_4401() -> None:
    """At its token's end a session closes with 4401."""
    async with running() as server:
        client = await server.open(bearer=token(ttl_s=1))
        assert await client.closed() == 4401


async def test_a_long_token_renews_too() -> None:
    """A token that is accepted in a handshake is accepted on the socket, up to 8 KiB."""
    for size in (4800, 8100):
        padded = jwt.encode(
            {"sub": BOB, "exp": time.time() + 900, "x": "x" * (size * 3 // 4 - 150)}, SECRET
        )
        assert size - 150 < len(padded) <= size
        async with running() as server:
            client = await server.open(bearer=padded)
            client.say({"type": "auth", "token": padded})
            assert (await client.message())["type"] == "auth"


async def test_auth_renews_the_token() -> None:
    """A new token in time is answered ``auth`` and the session outlives the old one."""
    async with running() as server:
        client = await server.open(bearer=token(ttl_s=1))
        client.say({"type": "auth", "token": token(ttl_s=300)})
        answer = await client.message()
        assert answer["type"] == "auth"
        assert 297 <= answer["expires_in"] <= 300
        with pytest.raises(TimeoutError):
            await client.frame(1.6)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("garbage", 4401),
        (token(ttl_s=-10), 4401),
        (token(secret="f" * 64), 4401),
        (token("urn:user:eve", ttl_s=86_400), 4403),
    ],
    ids=["garbage", "expired", "foreign", "of somebody else"],
)
async def test_a_bad_new_token_closes(bad: str, code: int) -> None:
    """An invalid new token is 4401, one of another recipient 4403."""
    async with running() as server:
        client = await server.open()
        client.say({"type": "auth", "token": bad})
        assert await client.closed() == code


# --- ends ---------------------------------------------------------------------------------------


async def test_a_disconnect_signal_closes_4401() -> None:
    """``disconnect`` closes every session of the recipient, and no other session."""
    async with running() as server:
        mine, eve = [await server.open(), await server.open()], await server.open("urn:user:eve")
        await server.publisher.disconnect(BOB)
        for client in mine:
            assert await client.closed() == 4401
        await server.poke("urn:user:eve")
        assert await eve.message() == {"type": "poke"}


async def test_drain_closes_everyone_spread_out_and_admits_nobody() -> None:
    """1012 to all, over the window, while new handshakes are 503."""
    async with running() as server:
        clients = [await server.open(f"urn:user:{number}") for number in range(10)]
        loop = asyncio.get_running_loop()
        ends: list[float] = []

        async def wait_closed(client: Client) -> None:
            assert await client.closed() == 1012
            ends.append(loop.time())

        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(wait_closed(client))
            drain = group.create_task(server.gateway.drain(0.5))
            await wait_until(lambda: server.gateway.draining)
            late = await server.dial()
            assert await late.handshake(headers=(f"Authorization: Bearer {token()}",)) == 503
            assert not drain.done()
        assert ends[-1] - ends[0] >= 0.4
        assert len(server.gateway.sessions) == 0


async def test_an_abrupt_end_is_noticed() -> None:
    """A connection that is reset leaves nothing behind: map, wheel and counts are as before."""
    async with running() as server:
        clients = [await server.open() for _ in range(5)]
        for client in clients:
            await client.close()
        await wait_until(lambda: len(server.gateway.sessions) == 0)
        assert not server.gateway._all_sessions
        assert server.gateway.entrance.sessions == 0

"""HTTP/1.1 as its RFCs have it, where a library would not check it: RFC 9110, RFC 9112."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import h11
import pytest

from pokebridge.asgi import Receive, Scope, Send
from pokebridge.server import http
from tests.gateway.harness import TIMEOUT_S, Client, Running, running, token
from tests.support import wait_until

GET = "GET / HTTP/1.1\r\nHost: x\r\n"
HANDSHAKE = (
    "GET /v1/connect HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.fixture
async def server() -> AsyncIterator[Running]:
    """A gateway beside an app that answers 404 to everything."""
    async with running() as server:
        yield server


async def answers(server: Running, request: str, methods: str = "GET") -> list[int]:
    """The status of every answer to ``request`` until the server closes, read by a strict client.

    ``methods`` are those of the requests in it.
    """
    client = await server.dial()
    client.send_raw(request.encode("latin-1"))
    async with asyncio.timeout(TIMEOUT_S):
        said = await client.reader.read(-1)
    statuses = []
    for method in methods.split():
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(said)
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                statuses.append(event.status_code)
            assert event is not h11.NEED_DATA, said
        said = parser.trailing_data[0]
    assert not said
    return statuses


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        # Host (RFC 9112, section 3.2)
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x y\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x, y\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: u@x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x:port\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: [::1]:80\r\nConnection: close\r\n\r\n", 404),
        ("GET / HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", 404),
        ("GET / HTTP/1.0\r\n\r\n", 404),
        # the target (section 3.2)
        ("GET http://x/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        ("GET http://x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        ("GET HTTP://x?y HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        ("GET http://x\r\nHost: x\r\n\r\n", 505),  # as HTTP/0.9 had it
        ("GET http:// HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET ftp://x/a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /#a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        ("CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", 501),
        # white space and line ends (sections 2.2, 5.1 and 5.2)
        ("GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
        ("GET / HTTP/1.1\nHost: x\n\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nA: b\nB: c\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400),
        ("\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        ("GET / HTTP/1.1\r\nHost:\t x \t\r\nConnection: close\r\n\r\n", 404),
        # the version (section 2.3)
        ("GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        ("GET / HTTP/0.9\r\nHost: x\r\n\r\n", 505),
        ("GET / HTTP/1.2\r\nHost: x\r\n\r\n", 400),
        ("GET / http/1.1\r\nHost: x\r\n\r\n", 400),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        # framing (section 6)
        (f"{GET}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (f"{GET}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (f"{GET}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (f"{GET}Content-Length: +5\r\n\r\nhello", 400),
        (f"{GET}Content-Length: 5, 5\r\n\r\nhello", 400),
        (f"{GET}Content-Length: 0x5\r\n\r\nhello", 400),
        (f"{GET}Content-Length: {'9' * 30}\r\n\r\n", 400),
        (f"{GET}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (f"{GET}Transfer-Encoding: identity\r\n\r\n", 501),
        (f"{GET}Transfer-Encoding: chunked, gzip\r\n\r\n", 400),
        (f"{GET}Transfer-Encoding: xchunked\r\n\r\n", 501),
        (f"{GET}Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (f"{GET}Transfer-Encoding: chunked\r\n\r\nx\r\n\r\n", 400),
        (f"{GET}Transfer-Encoding: chunked\r\n\r\n1 \r\na\r\n0\r\n\r\n", 400),
        (f"{GET}Transfer-Encoding: chunked\r\n\r\n1\nab\r\n0\r\n\r\n", 400),
        (f"{GET}Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400),
        # handshakes (RFC 6455, section 4)
        (f"{HANDSHAKE}Content-Length: 5\r\n\r\nhello", 400),
        (f"{HANDSHAKE}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HANDSHAKE.replace("/v1", "//x/v1") + "\r\n", 404),
        (HANDSHAKE.replace("1.1", "1.0") + "\r\n", 404),  # there is no upgrade in HTTP/1.0
        (HANDSHAKE.replace("GET", "POST") + "\r\n", 400),
        (HANDSHAKE.replace("\r\n", " \t\r\n").replace("1.1 \t", "1.1") + "\r\n", 401),
    ],
)
async def test_a_request_is_taken_or_refused(
    server: Running, request_text: str, status: int
) -> None:
    """Each is answered once, with the right status, and a mistake closes the connection."""
    assert await answers(server, request_text, request_text.split(None, 1)[0]) == [status]


async def test_a_mistake_is_answered_after_the_requests_ahead_of_it(server: Running) -> None:
    """Whether it is in the head, in the body, a request too large, or a handshake too soon."""
    ahead = f"{GET}\r\n" * 3
    assert await answers(server, f"{ahead}nonsense\r\n\r\n", "GET GET GET GET") == [404] * 3 + [400]
    body = f"{ahead}{GET}Transfer-Encoding: chunked\r\n\r\nx\r\n"
    assert await answers(server, body, "GET GET GET GET") == [404] * 3 + [400]
    large = f"{ahead}{GET}A: {'b' * http.MAX_HEAD_BYTES}\r\n\r\n"
    assert await answers(server, large, "GET GET GET GET") == [404] * 3 + [431]
    bearer = f"Authorization: Bearer {token()}\r\n"
    assert await answers(server, f"{ahead}{HANDSHAKE}{bearer}\r\n", "GET " * 4) == [404] * 3 + [400]
    for bad, status in (("Host: x y", 400), ("Host: x\r\nTransfer-Encoding: gzip, chunked", 501)):
        for before in (1, 3):
            requests = f"{GET}\r\n" * before + f"GET / HTTP/1.1\r\n{bad}\r\n\r\n"
            given = await answers(server, requests, "GET " * (before + 1))
            assert given == [404] * before + [status]


async def test_few_requests_wait_for_the_answers_ahead_of_theirs(server: Running) -> None:
    """One too many is refused in its turn, and ends the connection."""
    statuses = [404] * (http.MAX_PIPELINED + 1) + [429]
    requests = f"{GET}\r\n" * 5_000
    assert await answers(server, requests, "GET " * len(statuses)) == statuses


async def test_what_follows_a_close_is_not_answered(server: Running) -> None:
    """RFC 9112, section 9.6."""
    assert await answers(server, f"{GET}Connection: close\r\n\r\n{GET}\r\n") == [404]


async def test_the_authority_of_the_target_counts(server: Running) -> None:
    """An absolute target replaces Host, where the own origin is concerned too."""
    bearer = f"Authorization: Bearer {token()}"
    for origin, status in (("http://own.example \t", 101), ("http://localhost", 403)):
        client = await server.dial()
        headers = (bearer, f"Origin: {origin}")
        assert await client.handshake("http://own.example/v1/connect", headers) == status


async def test_the_continue_is_said_once_and_to_http_1_1_alone(server: Running) -> None:
    """RFC 9110, section 10.1.1: a client that waits for it gets it, and then the answer."""
    expecting = "Host: x\r\nExpect: 100-Continue \t\r\nContent-Length: 2\r\n\r\n"
    client = await server.dial()
    assert await client.request(f"POST / HTTP/1.1\r\n{expecting}") == 100
    assert await client.request("{}") == 404
    assert await client.request(f"{GET}\r\n") == 404
    old = await server.dial()
    old.send_raw(f"POST / HTTP/1.0\r\n{expecting}".encode())
    assert await old.request("{}") == 404


async def test_who_has_said_all_is_answered(server: Running) -> None:
    """A client that closes its side after its request still gets the answer."""
    client = await server.dial()
    client.send_raw(f"{GET}\r\n{GET}\r\n".encode())
    client.writer.write_eof()
    async with asyncio.timeout(TIMEOUT_S):
        assert (await client.reader.read(-1)).count(b"HTTP/1.1 404") == 2


async def _all_it_says(client: Client) -> bytes:
    """What the server says until it closes. It resets a connection that is sent more afterwards."""
    said = b""
    with suppress(ConnectionResetError):
        while piece := await client.reader.read(1000):
            said += piece
    return said


async def test_a_connection_that_asked_nothing_is_closed_without_a_word(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at first nor later is there a 408, which a client could take for an answer.

    Line ends are no request: they keep no connection open.
    """
    monkeypatch.setattr(http, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 1.0)
    silent, asked, begun = [await server.dial() for _ in range(3)]
    assert await asked.request(f"{GET}\r\n") == 404
    begun.send_raw(b"GET / HTT")
    ends = [asyncio.create_task(_all_it_says(each)) for each in (silent, asked, begun)]
    while not all(end.done() for end in ends):
        for client in (silent, asked):
            client.send_raw(b"\r\n")
        await asyncio.sleep(0.05)
    assert [end.result()[:12] for end in ends] == [b"", b"", b"HTTP/1.1 408"]
    await wait_until(lambda: len(server.gateway.sockets) == 0)


async def test_a_slow_line_is_not_dead(server: Running) -> None:
    """A body that gets on may take longer than a request. One that drips may not."""
    client = await server.dial()
    client.send_raw(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    await wait_until(lambda: len(server.gateway.sockets) == 1)
    (connection,) = server.gateway.sockets
    assert isinstance(connection, http.HttpProtocol)
    for _ in range(3):
        client.send_raw(b"x" * http.SLOW_BODY_BYTES)
        await wait_until(lambda: connection._body_bytes == http.SLOW_BODY_BYTES)
        connection.wake(0.0)  # the deadline
        assert not connection.transport.is_closing()
    client.send_raw(b"x" * (http.SLOW_BODY_BYTES - 1))
    await wait_until(lambda: connection._body_bytes == http.SLOW_BODY_BYTES - 1)
    connection.wake(0.0)
    assert await client.request("") == 408


async def _answer_at_length(_scope: Scope, _receive: Receive, send: Send) -> None:
    body = b"x" * 10_000_000
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def test_who_does_not_read_an_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that does not read is disconnected, so it holds no descriptor for ever."""
    monkeypatch.setattr(http, "UNREAD_TIMEOUT_S", 0.5)
    async with running(create_app=lambda _: _answer_at_length) as server:
        client = await server.dial(receive_buffer=4096)
        client.stop_reading()
        client.send_raw(f"{GET}\r\n".encode())
        await wait_until(lambda: len(server.gateway.sockets) == 1)
        await wait_until(lambda: len(server.gateway.sockets) == 0)

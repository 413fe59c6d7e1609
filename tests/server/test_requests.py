"""HTTP requests that no library sends, at a running instance."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.gateway.harness import TIMEOUT_S, Client
from tests.support.serving import Instance, Serve

BOB = "urn:user:bob"
UPGRADE = (
    "Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
CHUNKED = b"GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def dialed(instance: Instance) -> AsyncIterator[Client]:
    """A connection to ``instance``."""
    client = await Client.dial(instance.port)
    try:
        yield client
    finally:
        await client.close()


async def test_requests_at_the_border(serve: Serve) -> None:
    """Bad targets, trailers and offers of HTTP/2 are answered, without a traceback."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    for path in ("//[", "//[::1/v1/connect", "http://[/healthz"):
        for headers in ("Host: x\r\n", UPGRADE):
            async with dialed(instance) as client:
                assert await client.request(f"GET {path} HTTP/1.1\r\n{headers}\r\n") == 400
    await _check_trailers(instance)
    await _check_upgrades(instance)
    assert "Traceback" not in instance.log()


async def _check_trailers(instance: Instance) -> None:
    head = "GET /v1/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with dialed(instance) as client:  # no trailer authenticates
        trailer = f"Authorization: Bearer {instance.token(BOB)}\r\n"
        assert await client.request(f"{head}0\r\n{trailer}\r\n") == 401
    async with dialed(instance) as client:
        client.send_raw((head + "0\r\n").encode() + b"X-A: b\r\n" * 2500)
        everything = await client.reader.read()
        assert b"HTTP/1.1 431 " in everything


async def _check_upgrades(instance: Instance) -> None:
    body = json.dumps({"recipient": BOB, "body": "é" * 2000}).encode()
    pieces = b"".join(
        b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:7], body[7:1000], body[1000:])
    )
    framed = {
        f"Content-Length: {len(body)}": body,
        "Transfer-Encoding: chunked": pieces + b"0\r\n\r\n",
    }
    for framing, sent in framed.items():
        head = (
            "POST /v1/messages HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n"
            "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
            f"Authorization: Bearer {instance.token(BOB, 'send')}\r\n{framing}\r\n\r\n"
        ).encode()
        async with dialed(instance) as client:
            # All at once, in halves, and once more on the same connection.
            for cut in (len(head + sent), len(head) + 5, len(head) - 5):
                client.send_raw((head + sent)[:cut])
                await asyncio.sleep(0)
                assert await client.request((head + sent)[cut:]) == 202
                await client.reader.readexactly(int(client.headers["content-length"]))


@pytest.mark.parametrize(
    ("begin", "drip"),
    [
        (b"0\r\n", b"X-A: b\r\n"),
        (b"0\r\nX-A: ", b"bbbbbbbb"),
        (b"1;", b"xxxxxxxx"),
        (b"", b"1;" + b"x" * 100 + b"\r\ny\r\n"),
    ],
    ids=["trailer fields", "a trailer field", "a chunk extension", "many chunk extensions"],
)
async def test_chunked_requests_are_limited(serve: Serve, begin: bytes, drip: bytes) -> None:
    """The trailer and the chunk extensions count against the limit of the head."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    async with dialed(instance) as client:
        client.send_raw(CHUNKED + begin)
        for size in (15_000, 5_000):  # in pieces, of which the last one is past the limit
            client.send_raw(drip * (size // len(drip)))
            await asyncio.sleep(0)
        async with asyncio.timeout(TIMEOUT_S):
            assert b"HTTP/1.1 431 " in await client.reader.read()


async def test_trailers_without_end_take_no_memory(serve: Serve) -> None:
    """Of 32 MB the kernels take some, the instance keeps none, and the answer is 431."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    end = 32 * 2**20

    def flood() -> tuple[int, bytes]:
        sent_bytes, said = 0, b""
        with socket.create_connection(("127.0.0.1", instance.port), TIMEOUT_S) as stranger:
            stranger.sendall(CHUNKED + b"0\r\n")
            with contextlib.suppress(ConnectionError):
                while sent_bytes < end:
                    sent_bytes += stranger.send(b"X-A: %s\r\n" % (b"b" * 1000))
            with contextlib.suppress(ConnectionError):
                while piece := stranger.recv(65536):
                    said += piece
        return sent_bytes, said

    await asyncio.to_thread(flood)  # buffers, and what is imported late
    before_bytes = instance.rss_bytes()
    for _ in range(3):
        sent_bytes, said = await asyncio.to_thread(flood)
        assert b"HTTP/1.1 431 " in said
        assert sent_bytes < end / 2
    assert instance.rss_bytes() - before_bytes < 4 * 2**20

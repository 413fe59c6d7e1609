"""The proxy cuts as a network does: silently, until it is healed."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support import CutProxy, wait_until
from tests.support.stream_server import stream_server


@pytest.fixture
async def proxy() -> AsyncIterator[CutProxy]:
    """A proxy before a server that sends every line back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)

    async with stream_server(echo) as port, CutProxy("127.0.0.1", port) as proxy:
        yield proxy


async def _say(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], line: bytes) -> bytes:
    reader, writer = connection
    writer.write(line)
    return await reader.readline()


async def test_it_forwards(proxy: CutProxy) -> None:
    """Uncut, it is not there; a close passes through it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _say((reader, writer), b"hello\n") == b"hello\n"
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await wait_until(lambda: proxy.connection_count == 0)


async def test_a_cut_is_silent_and_healing_delivers(proxy: CutProxy) -> None:
    """While it is cut nothing arrives and nothing closes. Afterwards the held bytes arrive."""
    old = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _say(old, b"before\n") == b"before\n"
    proxy.cut()
    new = await asyncio.open_connection("127.0.0.1", proxy.port)
    waiting = [asyncio.create_task(_say(old, b"old\n")), asyncio.create_task(_say(new, b"new\n"))]
    done, _ = await asyncio.wait(waiting, timeout=0.2)
    assert not done
    proxy.heal()
    assert await asyncio.gather(*waiting) == [b"old\n", b"new\n"]
    for _, writer in (old, new):
        writer.close()


async def test_a_reset_breaks_what_is_connected(proxy: CutProxy) -> None:
    """After a reset the old connection is dead and a new one works."""
    old = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _say(old, b"before\n") == b"before\n"
    proxy.reset()
    assert await old[0].read() == b""
    old[1].close()
    new = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await _say(new, b"after\n") == b"after\n"
    new[1].close()

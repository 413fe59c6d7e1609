"""Servers that send pokes on command: ``python -m benchmarks.peers pokebridge|websockets``.

Prints its port; then for each line SWEEPS on stdin it sends so many pokes to every client, one
client after the other, and prints the CPU seconds (user and system) that took. Both run on uvloop,
without compression. Ours verifies tokens as it always does, the other with PyJWT.
"""

import asyncio
import contextlib
import http
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import jwt
import uvicorn
import uvloop
from uvicorn.server import ServerState
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from benchmarks.harness import SECRET
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.gateway import Gateway
from pokebridge.model import Poke
from pokebridge.server.http import HttpProtocol
from pokebridge.telemetry import configure_logging
from pokebridge.tokens import TokenVerifier
from pokebridge.transport.memory import MemoryTransport

FIRST_VERSION = 1_000_000  # so that all frames have the same size

Send = Callable[[range], Awaitable[None]]
"""Sends pokes with these versions, each to every client."""


@contextlib.asynccontextmanager
async def pokebridge_server() -> AsyncIterator[tuple[int, Send]]:
    """The real gateway behind the real HTTP protocol; a sweep goes through ``handle_poke``."""
    settings = GatewayConfig(instance="bench", max_sessions_per_recipient=64, verify_every_s=60)
    gateway = Gateway(settings, MemoryTransport(), TokenVerifier(secret=SECRET))
    await gateway.start()
    config = uvicorn.Config(_no_app, ws="none", log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config, state, {}, gateway=gateway), "127.0.0.1", 0, backlog=4096
    )

    async def send(versions: range) -> None:
        handle_poke = gateway.bridge.handle_poke
        recipients = [connection.recipient for connection in gateway.sessions]
        for version in versions:
            for recipient in recipients:
                handle_poke(Poke(recipient, version))
            await asyncio.sleep(0)  # as signals do not all arrive in one turn of the loop

    yield server.sockets[0].getsockname()[1], send
    server.close()
    await gateway.close()


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    """Do nothing: there are only upgrades."""


@contextlib.asynccontextmanager
async def websockets_server() -> AsyncIterator[tuple[int, Send]]:
    """A plain server of the ``websockets`` library; pings as often as pokebridge does."""
    connections: set[ServerConnection] = set()

    def check(connection: ServerConnection, request: Request) -> Response | None:
        _, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            jwt.decode(token, SECRET, ["HS256"])
        except jwt.PyJWTError as error:
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, str(error))
        return None

    async def handle(connection: ServerConnection) -> None:
        connections.add(connection)
        session = secrets.token_hex(8)
        await connection.send(
            f'{{"type":"ready","session":"{session}","instance":"bench","expires_in":3599}}'
        )
        await connection.wait_closed()
        connections.remove(connection)

    async def send(versions: range) -> None:
        for version in versions:
            for connection in connections:
                await connection.send(f'{{"type":"poke","version":{version}}}')
            await asyncio.sleep(0)  # the loop writes what it has queued

    async with serve(
        handle,
        "127.0.0.1",
        0,
        process_request=check,
        compression=None,
        ping_interval=25,
        ping_timeout=20,
        backlog=4096,
    ) as server:
        yield next(iter(server.sockets)).getsockname()[1], send


async def _obey(kind: str) -> None:
    server = {"pokebridge": pokebridge_server, "websockets": websockets_server}[kind]
    loop, commands = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with server() as (port, send):
        print(port, flush=True)
        version = FIRST_VERSION
        while sweeps := await commands.readline():
            versions = range(version, version + int(sweeps))
            version = versions.stop
            started_s = time.process_time()
            await send(versions)
            print(time.process_time() - started_s, flush=True)


if __name__ == "__main__":
    configure_logging("json", "warning")
    uvloop.run(_obey(sys.argv[1]))

"""Servers that send pokes when told: ``python -m benchmarks.peers pokebridge|websockets``.

Prints its port; then for each line SWEEPS on stdin it sends so many pokes to every client, one
client after the other, and prints the CPU seconds (user and system) that took. Both run on uvloop,
without compression, and check tokens with the same verifier.
"""

import asyncio
import contextlib
import http
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from benchmarks.harness import SECRET
from pokebridge.errors import AuthError
from pokebridge.gateway.gateway import Gateway, GatewayConfig
from pokebridge.model import Poke
from pokebridge.server.http import HttpProtocol
from pokebridge.telemetry import configure_logging
from pokebridge.tokens import TokenVerifier
from pokebridge.transport.memory import MemoryTransport

FIRST_VERSION = 1_000_000  # so that all frames are of one size

Sweep = Callable[[int], Awaitable[None]]


@contextlib.asynccontextmanager
async def pokebridge_server() -> AsyncIterator[tuple[int, Sweep]]:
    """The real gateway behind the real HTTP protocol; a sweep goes through ``handle_poke``."""
    gateway = Gateway(
        GatewayConfig(instance="bench"), MemoryTransport(), TokenVerifier(secret=SECRET)
    )
    await gateway.start()
    config = uvicorn.Config(_no_app, ws="none", log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config, state, {}, gateway=gateway), "127.0.0.1", 0, backlog=4096
    )
    handle_poke = gateway.bridge.handle_poke

    async def sweep(version: int) -> None:
        for connection in gateway.sessions:
            handle_poke(Poke(connection.recipient, version))

    yield server.sockets[0].getsockname()[1], sweep
    server.close()
    await gateway.close()


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    """Nothing but upgrades is asked for."""


@contextlib.asynccontextmanager
async def websockets_server() -> AsyncIterator[tuple[int, Sweep]]:
    """A plain server of the ``websockets`` library; pings as often as pokebridge does."""
    verifier = TokenVerifier(secret=SECRET)
    connections: set[ServerConnection] = set()

    def check(connection: ServerConnection, request: Request) -> Response | None:
        _, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            verifier.verify_now(token)
        except AuthError as error:
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

    async def sweep(version: int) -> None:
        for connection in connections:
            await connection.send(f'{{"type":"poke","version":{version}}}')

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
        yield next(iter(server.sockets)).getsockname()[1], sweep


async def _obey(kind: str) -> None:
    server = {"pokebridge": pokebridge_server, "websockets": websockets_server}[kind]
    loop, version = asyncio.get_running_loop(), FIRST_VERSION
    async with server() as (port, sweep):
        print(port, flush=True)
        while sweeps := await loop.run_in_executor(None, sys.stdin.readline):
            started_s = time.process_time()
            for _ in range(int(sweeps)):
                await sweep(version)
                await asyncio.sleep(0)  # whatever the loop has queued goes out
                version += 1
            print(time.process_time() - started_s, flush=True)


if __name__ == "__main__":
    configure_logging("json", "warning")
    uvloop.run(_obey(sys.argv[1]))

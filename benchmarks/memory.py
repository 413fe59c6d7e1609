"""Memory of an idle session, and of a call that waits: the growth of a real instance's RSS.

The kernel's memory of the sockets is about the same for every server, and not in the RSS.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack

from benchmarks.callers import HttpConnection, request
from benchmarks.harness import (
    Figure,
    Herd,
    Server,
    connect_and_leave,
    herd,
    instance,
    progress,
    tokens,
    until,
    websockets_server,
)

AT_MOST_KB = 2.1
WAITING_AT_MOST_KB = 8.0
WAITING_CALLS = 3_000
_DIALED_AT_ONCE = 100


async def measure(*, clients: int = 10_000, warm_up: int = 300) -> list[Figure]:
    """Connect ``clients``, after ``warm_up`` others have come and gone."""
    ours_kb = await growth_kb(instance(), [clients], warm_up)
    progress("memory: pokebridge is measured")
    theirs_kb = await growth_kb(websockets_server(), [clients], warm_up)
    waiting_kb = await _waiting_kb(min(clients, WAITING_CALLS), warm_up)
    name = f"RSS of an idle session, at {clients:,}"
    return [
        Figure("memory", name, ours_kb, "KB", AT_MOST_KB, "1 KB is 1,024 bytes"),
        Figure(
            "memory",
            f"{name}, to websockets",
            ours_kb / theirs_kb,
            "x",
            detail=f"{ours_kb:.2f} to {theirs_kb:.2f} KB",
        ),
        Figure(
            "memory",
            "RSS of a pull that waits",
            waiting_kb,
            "KB",
            WAITING_AT_MOST_KB,
            "with its HTTP connection",
        ),
    ]


async def _waiting_kb(calls: int, warm_up: int) -> float:
    async with instance(max_connections_per_address="0") as server:
        await _wait(server, tokens(warm_up))
        before = server.rss_bytes()
        return (await _wait(server, tokens(calls)) - before) / calls / 1024


async def _wait(server: Server, bearers: Sequence[str]) -> int:
    """Have a pull wait for each token. Returns the RSS meanwhile."""
    open_files = server.open_files()
    with ExitStack() as opened:
        calls = []
        for number, bearer in enumerate(bearers):
            connection = HttpConnection(server.port)
            opened.callback(connection.close)
            question = request("GET", "/v1/messages?wait_s=60", bearer)
            calls.append(asyncio.ensure_future(connection.ask(question)))
            if number % _DIALED_AT_ONCE == 0:
                await until(
                    lambda: server.open_files() >= open_files + number,  # noqa: B023 - called at once
                    "the server has accepted",
                )
        await until(
            lambda: server.open_files() >= open_files + len(calls), "all calls are accepted"
        )
        await until(lambda: _is_idle(server), "all calls wait")
        rss_bytes = server.rss_bytes()
    for call in calls:
        call.cancel()
    await until(lambda: server.open_files() <= open_files, "all callers have left")
    return rss_bytes


def _is_idle(server: Server) -> bool:
    return server.process.cpu_percent(interval=0.3) < 10  # percent of a core


async def _nothing(_server: Server, _herds: Sequence[Herd]) -> None:
    pass


async def growth_kb(
    starting: AbstractAsyncContextManager[Server],
    clients: Sequence[int],
    warm_up: int,
    look: Callable[[Server, Sequence[Herd]], Awaitable[None]] = _nothing,
) -> float:
    """What each of ``clients`` adds to the RSS of a server, after ``warm_up`` others have left.

    They are those of several processes. ``look`` is called when all of one are connected. Each of
    them can be poked once.
    """
    async with AsyncExitStack() as opened:
        server = await opened.enter_async_context(starting)
        await connect_and_leave(server, tokens(warm_up))
        before = server.rss_bytes()
        herds: list[Herd] = []
        total = 0
        for count in clients:
            opening = herd(server.port, tokens(count, first=total), pokes_at_once=count)
            herds.append(await opened.enter_async_context(opening))
            total += count
            grown_kb = (server.rss_bytes() - before) / total / 1024
            await look(server, herds)
        return grown_kb
